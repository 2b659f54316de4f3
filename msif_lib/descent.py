"""Recorded trainings: taken once, they can be taken again and walked back.

A training is a start, the batches, the learning rates and an optimiser. :func:`descend` takes its
steps as torch.optim would, :func:`run` takes them again with other weights of the examples, and
:func:`pull_back` takes a cotangent of the end back through them: to the start, to what was handed
on and not trained, and to the weight of every example. One step back, for the batch's gradient g
and its objective J_b, is

    λ_g and λ_x, λ_v before the step   by the optimiser's adjoint (:mod:`msif_lib.optimisers`)
    λ_g ← s (λ_g − ĝ ĝᵀ λ_g)           where the gradient was clipped
    dq/dw_i += ∇ℓ_iᵀ λ_g / B;   λ_x ← λ_x + ∇²J_b λ_g;   λ_c ← λ_c + ∂²J_b/∂c∂x λ_g
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.optimisers import SGD, AdamW, Optimiser, State
from msif_lib.stage import Stage
from msif_lib.steps import Augment, Batches, Linearised, Steps, drawn_from
from msif_lib.support.arguments import (
    check_columns,
    dense,
    flag,
    indices_of,
    instance,
    listed,
    whole,
)
from msif_lib.support.state import OwnState, in_own_state

__all__ = [
    "SGD",
    "AdamW",
    "Batches",
    "Keep",
    "Path",
    "Unwound",
    "descend",
    "drawn_from",
    "pull_back",
    "run",
    "take_steps",
]

# How far a repetition may end from the training, as a share of the way that the training went:
# rounding, which grows along a training, but no wrong rate or batch.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOW_PRECISION = 5e-2
# Examples drawn in a training, whose numbers are kept: 256 GiB of them.
_MOST_DRAWN = 2**35
# Bytes of the graphs that are kept from the repetition of steps, not to be recorded once more.
_GRAPHS = 2**26

# Steps at most by which what was drawn is known.
_KNOWN_BY = 16

#: The gradient of a step's objective with its graph.
Recorded = tuple[Tensor, Linearised]


@dataclass(frozen=True, eq=False)
class Path(OwnState):
    """A training as it went: all that it takes to repeat it and to walk it back.

    Attributes
    ----------
    start, end
        All parameters of the stage ``(p,)`` before the first step and after the last.
    batches
        The indices ``(B,)`` of the examples of each step.
    learning_rates
        One a step.
    optimiser
        The rule of the steps.
    states
        By number of steps taken, every √T steps from 0 on and at the end; a walk back replays
        from these.
    noise_seed
        What dropout and augmentation drew from (:func:`~msif_lib.steps.drawn_from`); None: nothing
        was drawn.
    augment
        What changed the inputs of each batch, if anything did.
    """

    start: Tensor
    end: Tensor
    batches: Sequence[Tensor]
    learning_rates: tuple[float, ...]
    optimiser: Optimiser
    states: Mapping[int, State]
    noise_seed: int | None = None
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __repr__(self) -> str:
        return f"Path({len(self)} steps of {self.optimiser}, time {self.time:.4g})"

    def steps(self, stage: Stage) -> Steps:
        """The steps of this training as functions of a stage's parameters."""
        return Steps(
            stage, self.start, self.batches, self.optimiser, self.learning_rates,
            self.noise_seed, self.augment,
        )  # fmt: skip

    def trained_after(self, steps: int, stage: Stage) -> Tensor:
        """The trained parameters ``(p_T,)`` after so many steps as one of `states`, or all."""
        if steps in self.states:
            return self.states[steps].x
        return stage.parameters.take(self.end, stage.trained)

    def drawn(self, stage: Stage) -> Tensor:
        """What code that draws gave in some of the steps: losses of their examples ``(2, n)``.

        Each with the draws of its step, at the parameters of that step and at the start; n = 0
        where nothing was drawn.
        """
        known = sorted(step for step in self.states if step < len(self))
        if self.noise_seed is None or not known:
            return self.start.new_zeros(2, 0)
        steps, first = self.steps(stage), stage.parameters.take(self.start, stage.trained)
        with steps.running():
            found = [
                torch.stack([steps.losses(x, step) for x in (self.states[step].x, first)])
                for step in known[:: -(-len(known) // _KNOWN_BY)]
            ]
        return torch.cat(found, 1).cpu()

    @property
    def time(self) -> float:
        """How long gradient flow takes to go as far: Σ η, divided by 1 − μ for momentum μ.

        Of plain gradients; where the optimiser scales them or decays weights, or groups have
        rates of their own, :meth:`flow` says what the flow is of.
        """
        return sum(self.learning_rates) * self.optimiser.slowness

    @property
    def moved(self) -> int | None:
        """How many parameters the training moved; None where no state was kept."""
        return self.states[0].x.numel() if self.states else None

    def flow(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """P, by which the optimiser multiplies gradients at the end, and δ, both ``(p,)``.

        δ is the decoupled decay for each unit of :attr:`time`. For parameters that are not
        trained they are 1 and 0.
        """
        ones = torch.ones_like(stage.parameters.take(self.end, stage.trained))
        factor, decay = (ones * rate for rate in self.optimiser.rates(stage))
        if not bool((factor > 0).all()):
            raise ValueError(
                "groups: with a learning rate of 0 parameters do not move, which gradient flow "
                "has no time for; leave their group out, and say in trained= what is trained"
            )
        scale = factor * self.optimiser.scaling(self.states[len(self)])
        put, trained = stage.parameters.replaced, stage.trained
        return (
            put(torch.ones_like(self.end), scale, trained),
            put(torch.zeros_like(self.end), factor * decay / self.optimiser.slowness, trained),
        )

    @classmethod
    def record(
        cls,
        stage: Stage,
        start: Tensor | Mapping[str, Tensor],
        batches: Sequence[Any] | Batches,
        optimiser: Optimiser,
        learning_rates: Sequence[float] | None = None,
        states: Mapping[int, Tensor | Mapping[str, Tensor]] | None = None,
        *,
        noise_seed: int | None = None,
        augment: Augment | None = None,
        progress: bool = True,
    ) -> Path:
        """Record a training that was run elsewhere, after repeating it.

        Parameters
        ----------
        stage
            The stage, whose modules are where the training ended.
        start
            Where it began: all parameters ``(p,)`` in the stage's order, or the model's
            ``state_dict``.
        batches
            The indices of each step's examples, or the :class:`Batches` that drew them.
        optimiser
            The rule of the steps.
        learning_rates
            One a step; None repeats the optimiser's.
        states
            Parameters after some numbers of steps, to tell from which step on a repetition
            differs: a mapping from steps taken to a vector or a ``state_dict``.
        noise_seed, augment
            As for :func:`descend`.
        progress
            Whether a bar is shown.

        Returns
        -------
        Path
            The training.

        Raises
        ------
        ValueError
            The repetition does not end at the stage's parameters; no step or an index that is
            not an example's; as many learning rates as steps are wanted.
        """
        _check_training(stage, optimiser, augment, progress)
        taken = batches.taken if isinstance(batches, Batches) else batches
        known = {} if states is None else instance("states", states, Mapping, " by steps taken")
        given = {step: _as_vector(stage, state, "states") for step, state in known.items()}
        first, end = _as_vector(stage, start, "start"), stage.vector()
        still = tuple(n for n in stage.parameters.all if n not in stage.trained)
        if not torch.equal(stage.parameters.take(first, still), stage.parameters.take(end, still)):
            raise ValueError(
                "start differs from the stage in parameters that the stage does not train; say "
                "which were trained by Stage(trained=...) or requires_grad"
            )
        if torch.equal(first, end):
            raise ValueError(
                "start is where the training ended: a state_dict holds the parameters themselves, "
                "which move; give copy.deepcopy(model.state_dict()), taken before training"
            )
        indices = [
            indices_of(f"batches[{step}]", batch, stage.size)
            for step, batch in enumerate(listed("batches", taken, "the indices of each step"))
        ]
        steps = Steps(stage, first, indices, optimiser, learning_rates, noise_seed, augment)
        way, differing = _length(end - first), []

        def compare(state: State) -> None:
            if state.step in given:
                there = stage.parameters.take(given[state.step], stage.trained)
                if not _near(state.x, there, way):
                    differing.append(state.step)

        path = take_steps(steps, "repeating the training", progress, compare)
        if differing or not _near(path.end, end, way):
            where = (
                f"the first of `states` that differs is that after step {differing[0]}"
                if differing
                else "give states= to see from which step on it differs"
            )
            raise ValueError(
                "batches, learning_rates and optimiser do not lead from start to the stage's "
                f"parameters: the repetition ends {float(_length(path.end - end)):.1e} from them, "
                f"on a way of {float(way):.1e}; {where}. Compare the order of the batches, the "
                "rate of each step, weights= and l2= of the stage (torch's coupled weight_decay), "
                "and see that dropout and augmentation drew from noise_seed or not at all"
            )
        # Where the user's training ended, bit by bit: what came after it began there.
        return replace(path, end=end)


def _near(a: Tensor, b: Tensor, way: Tensor) -> bool:
    """Whether two ends of a training of length `way` are the same but for rounding."""
    rounding = 100 * torch.finfo(b.dtype).eps * _length(b)
    return bool(_length(a - b) <= _TOLERANCE.get(b.dtype, _LOW_PRECISION) * way + rounding)


def _length(difference: Tensor) -> Tensor:
    """‖·‖, of numbers whose squares single precision cannot hold too."""
    return difference.norm(dtype=torch.float64)


def _check_training(stage: Any, optimiser: Any, augment: Any, progress: Any) -> None:
    """What a training is made of is of the kind that is wanted."""
    instance("stage", stage, Stage)
    instance("optimiser", optimiser, Optimiser, ", as SGD(lr=0.1)")
    flag("progress", progress)
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be a function of the inputs, not {type(augment).__name__}")


def _as_vector(stage: Stage, state: Tensor | Mapping[str, Tensor], name: str) -> Tensor:
    """Parameters ``(p,)`` in the stage's order, from a vector or a ``state_dict``."""
    if not isinstance(state, Tensor):
        known = instance(name, state, Mapping, " as a state_dict, or a vector")
        missing = [name for name in stage.names if not isinstance(known.get(name), Tensor)]
        if missing:
            raise ValueError(
                f"start or states lacks the parameter {missing[0]}; give a vector as "
                "stage.vector() or a state_dict with the names of stage.names"
            )
        state = torch.cat([state[name].detach().reshape(-1) for name in stage.names])
    size = stage.parameters.size
    dense(name, state)
    if state.shape != (size,):
        raise ValueError(f"start and states must be vectors ({size},), not {tuple(state.shape)}")
    return state.detach().to(dtype=stage.dtype, device=stage.device, copy=True)


@in_own_state
def descend(
    stage: Stage,
    optimiser: Optimiser,
    epochs: int,
    batch_size: int,
    seed: int,
    learning_rates: Sequence[float] | None = None,
    noise_seed: int | None = None,
    augment: Augment | None = None,
    progress: bool = True,
) -> Path:
    """Train a stage's modules in place and keep what it takes to walk the training back.

    Equal to torch.optim, step for step, but for rounding. An interrupted training leaves the
    modules as they were.

    Parameters
    ----------
    stage
        The stage; training begins at its modules' parameters and moves those of
        ``stage.trained``. Batches are means over their own size, with the stage's weights.
    optimiser
        :class:`SGD` or :class:`AdamW`.
    epochs, batch_size, seed
        Every example is taken once an epoch, in an order drawn from `seed`; a short last batch
        is kept.
    learning_rates
        One a step; None repeats the optimiser's.
    noise_seed
        A seed from which each step draws dropout and augmentation anew, dropout acting during
        the steps alone. None: the modules are evaluated in the mode in which they are.
    augment
        Changes the inputs of a batch, drawing from torch's generator; needs a `noise_seed`.
    progress
        Whether a bar is shown.

    Returns
    -------
    Path
        The training.

    Raises
    ------
    ValueError
        A setting outside its range, BatchNorm in training mode, no trained parameter.
    FloatingPointError
        The training diverged; the message names the step.
    """
    _check_training(stage, optimiser, augment, progress)
    if whole("epochs", epochs, 1) * stage.size > _MOST_DRAWN:
        raise ValueError(
            f"epochs: {epochs} epochs of {stage.size} examples are more than memory could hold"
        )
    sampler = Batches(stage.size, batch_size, seed)
    for _ in range(epochs):
        for _ in sampler:
            pass
    start = stage.vector()
    steps = Steps(stage, start, sampler.taken, optimiser, learning_rates, noise_seed, augment)
    path = take_steps(steps, "training", progress)
    stage.load_vector(path.end)
    return path


@in_own_state
def take_steps(
    steps: Steps, name: str, progress: bool, watch: Callable[[State], None] = lambda state: None
) -> Path:
    """The path of all steps from their beginning; each state is shown to `watch`."""
    every = math.isqrt(len(steps))
    begun = steps.begin()
    states = {0: begun}
    with steps.running(), _bar(f"{name}, {len(steps)} steps", len(steps), progress) as bar:
        for state in steps.after(begun, len(steps)):
            watch(state)
            if state.step % every == 0:
                states[state.step] = state
            bar.update()
    states[state.step] = state
    return Path(
        start=steps.vector,
        end=steps.stage.parameters.replaced(steps.vector, state.x, steps.stage.trained),
        batches=steps.batches,
        learning_rates=steps.learning_rates,
        optimiser=steps.optimiser,
        states=states,
        noise_seed=steps.noise_seed,
        augment=steps.augment,
    )


def _bar(name: str, total: int, progress: bool, initial: int = 0) -> tqdm:
    shown = {"delay": 1, "leave": False, "disable": not progress}
    return tqdm(total=total, initial=initial, desc=name, **shown)


# --- and back ------------------------------------------------------------------------------------


class Keep(Protocol):
    """Where an interrupted walk is kept: one set of named tensors, each put in place of the last.

    What is found must come from the same walk: whoever makes the object sees to that.
    """

    def get(self) -> dict[str, Tensor] | None:
        """What was put last; None where there is nothing."""

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Keep these."""


@dataclass(frozen=True)
class Unwound:
    """What a walk back through a training found, for k cotangents.

    Attributes
    ----------
    handed
        Cotangents ``(p, k)`` of all parameters of the stage at the start of the training: of
        those that were trained λ_x at the start; of those that are shared and were not, that of
        the end and what each step added; of the stage's own that were not trained zero.
    derivatives
        dq/dw_i of each example ``(N, k)``, or Σ_t ∇ℓ(z; x_t)ᵀ λ_g for other examples ``(M, k)``.
    """

    handed: Tensor
    derivatives: Tensor


@in_own_state
def pull_back(
    stage: Stage,
    path: Path,
    cotangent: Tensor,
    of: Stage | None = None,
    progress: bool = True,
    keep: Keep | None = None,
) -> Unwound:
    """Walk a training back: the derivatives of q by its start and by the examples' weights.

    The training is repeated from the states of the path, each part of it once, so that about
    2√T states are alive at most, besides up to 64 MiB of the graphs of their gradients. A step
    costs one product with the Hessian of its batch for each cotangent.

    Parameters
    ----------
    stage
        The stage; wherever its modules are now, the walk goes along the path.
    path
        The training.
    cotangent
        dq/dx at its end, columns ``(p, k)``, over all parameters of the stage.
    of
        A stage with other examples, as if every step's objective had ε ℓ(z) besides. They are
        evaluated without dropout and without augmentation.
    progress
        Whether a bar is shown.
    keep
        Where the walk is kept after each part, to go on from there.

    Returns
    -------
    Unwound
        Cotangents at the start, and derivatives by the weights.

    Raises
    ------
    ValueError
        `cotangent` of another shape; a stage whose data, weights or regularizer lead elsewhere.
    DerivativeError
        The model has an operation without a second derivative.
    """
    check_columns("cotangent", cotangent, stage.vector())
    k = cotangent.shape[1]
    # Not compared with where the modules are now: what came after may have trained them further.
    way, steps = _length(path.end - path.start), path.steps(stage)
    steps.require_second_derivatives()
    walk = _Walk(steps, cotangent, of)
    if keep is not None and (kept := keep.get()) is not None:
        walk.restore(kept)
    name = f"back through {len(path)} steps, {k} functional{'s' if k > 1 else ''}"
    with steps.running(), _bar(name, len(path), progress, len(path) - walk.step) as bar:
        for first in sorted(path.states, reverse=True):
            if first >= walk.step:
                continue
            trail, end = walk.repeated(path.states[first])
            if not _near(end.x, path.trained_after(walk.step, stage), way):
                raise ValueError(
                    "the stage is not the one whose training path records: the same steps lead "
                    "elsewhere; compare its data, weights=, l2= and regularizer"
                )
            while trail:
                walk.back(*trail.pop())
                bar.update()
            if keep is not None:
                keep.put(walk.kept())
    return walk.finish()


class _Walk:
    """A walk back that has come to the state after so many steps, for k cotangents.

    λ are rows: of trained parameters and buffers ``(k, p_T)``, of fixed parameters ``(k, p_c)``.
    """

    def __init__(self, steps: Steps, cotangent: Tensor, of: Stage | None) -> None:
        self.steps, self.of = steps, of
        self._parameters, self._trained = steps.stage.parameters, steps.stage.trained
        # Between trainings the buffers start anew: at the end of one their cotangent is zero.
        rows = self._parameters.take(cotangent, self._trained).T.contiguous()
        self.cotangent = steps.optimiser.begin(rows)._replace(step=len(steps))
        self.fixed = self._parameters.take(cotangent, steps.fixed).T
        size = steps.stage.size if of is None else of.size
        self.derivatives = cotangent.new_zeros(size, cotangent.shape[1])
        self._graphs = steps.graphs_within(_GRAPHS)

    @property
    def step(self) -> int:
        """Steps taken before the state that the walk has come to."""
        return self.cotangent.step

    def repeated(self, state: State) -> tuple[list[tuple[State, Recorded | None]], State]:
        """The states from `state` up to here, the graphs of the last ones, and the state here."""
        steps, trail = self.steps, []
        while state.step < self.step:
            recorded = None
            if self.step - state.step <= self._graphs:
                recorded = steps.linearised(state.x, state.step)
            gradient = recorded[0] if recorded else steps.gradient(state.x, state.step)
            trail.append((state, recorded))
            state = steps.taken(state, gradient)
        return trail, state

    def back(self, state: State, recorded: Recorded | None) -> None:
        """Go back over the step that was taken from `state`."""
        steps, optimiser, t = self.steps, self.steps.optimiser, state.step
        slopes, linearised = recorded or steps.linearised(state.x, t)
        gradient, clipping = steps.ruled(slopes, state.x)
        lambda_g, before = optimiser.pull_back(
            state, gradient, steps.rate(t), steps.decay, self.cotangent
        )
        of_l2, lambda_g = steps.stage.l2 * lambda_g, clipping(lambda_g)
        product, mixed, by_weight = linearised.pull_back(lambda_g)
        self.cotangent = before._replace(x=product.add_(before.x).add_(of_l2))
        self.fixed = self.fixed + mixed
        if self.of is None:
            indices = steps.batches[t].to(by_weight.device)
            self.derivatives.index_add_(0, indices, by_weight.T)
        else:
            vector = self._parameters.replaced(steps.vector, state.x, self._trained)
            directions = self._parameters.put(lambda_g.T, self._trained)
            blocks = self.of.directional_derivatives(directions, vector)
            self.derivatives += self.of.reader.gather(blocks, self.derivatives[:0])

    def finish(self) -> Unwound:
        """What was found, once the start is reached."""
        handed = self._parameters.put(self.cotangent.x.T, self._trained)
        return Unwound(
            handed + self._parameters.put(self.fixed.T, self.steps.fixed), self.derivatives
        )

    def kept(self) -> dict[str, Tensor]:
        """All that changes along the way, by name."""
        buffers = {f"buffer {index}": rows for index, rows in enumerate(self.cotangent.buffers)}
        return {
            "step": torch.tensor(self.step, device="cpu"),
            "x": self.cotangent.x,
            "fixed": self.fixed,
            "derivatives": self.derivatives,
            **buffers,
        }

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go on from what :meth:`kept` gave."""
        buffers = tuple(kept[f"buffer {index}"] for index in range(len(self.cotangent.buffers)))
        self.cotangent = State(kept["x"], buffers, int(kept["step"]))
        self.fixed, self.derivatives = kept["fixed"], kept["derivatives"]


# --- many at once --------------------------------------------------------------------------------


@in_own_state
def run(stage: Stage, path: Path, weights: Tensor, start: Tensor, progress: bool = False) -> Tensor:
    """Take the steps of a path with other weights of the examples, or from other starts.

    Parameters
    ----------
    stage
        The stage, for its model, loss, data and regularizer.
    path
        Batches, learning rates, optimiser and noise.
    weights
        Of the examples, ``(R, N)``: a row a model.
    start
        All parameters of each model, ``(R, p)``; those that the stage trains move.
    progress
        Whether a bar is shown.

    Returns
    -------
    Tensor
        All parameters of each model at the end, ``(R, p)``.

    Raises
    ------
    ValueError
        `weights` or `start` of another shape.
    FloatingPointError
        A training diverged.
    """
    size = stage.parameters.size
    if weights.dim() != 2 or weights.shape[1] != stage.size:
        raise ValueError(f"weights must be (R, {stage.size}), not {tuple(weights.shape)}")
    if start.shape != (len(weights), size):
        raise ValueError(f"start must be ({len(weights)}, {size}), not {tuple(start.shape)}")
    steps, trained = path.steps(stage), stage.trained
    state = path.optimiser.begin(stage.parameters.take(start.T, trained).T.contiguous())
    name = f"{len(weights)} trainings of {len(path)} steps"
    with steps.running(), _bar(name, len(path), progress) as bar:
        steps.vectorised = steps.vectorised and _alike(steps, state.x, start, weights)
        for t in range(len(path)):
            slopes = steps.gradients(state.x, start, weights, t)
            gradients, _ = steps.ruled(slopes, state.x)
            state = path.optimiser.step(state, gradients, steps.rate(t), steps.decay)
            bar.update()
    diverged = (~state.x.isfinite().all(1)).nonzero()[:, 0]
    if len(diverged):
        raise FloatingPointError(
            f"the training of model {int(diverged[0])} diverged: from its start, or with its "
            "weights, the path's learning rates are too large"
        )
    still = tuple(n for n in stage.parameters.all if n not in trained)
    kept = stage.parameters.put(stage.parameters.take(start.T, still), still)
    return (kept + stage.parameters.put(state.x.T, trained)).T.contiguous()


def _alike(steps: Steps, x: Tensor, start: Tensor, weights: Tensor) -> bool:
    """Whether many models together have the gradient that one has: dropout may draw otherwise."""
    alone = steps.gradient(x[0], 0, start[0], weights[0])
    try:
        together = steps.gradients(x, start, weights, 0)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return bool((together - alone).norm() <= torch.finfo(x.dtype).eps ** 0.5 * alone.norm())
