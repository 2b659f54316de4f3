"""Recorded trainings: steps of SGD and AdamW that can be taken again, and walked back.

A training is a start, the batches, the learning rates and an optimiser. Step t has the objective

    J_b(x, c; w) = (1/B) Σ_{i in b} w_i ℓ_i(x, c) + R(x, c)

of a batch b of B examples with weights w_i, where x are the parameters that are trained and c
those that are not, and moves x by the optimiser's rule. :func:`descend` takes the steps as
torch.optim would, and :func:`pull_back` takes a cotangent of the end back through them: to the
start, to c and to the weight of every example. In the walk back λ_x, λ_v and λ_g are the
cotangents of the parameters, of the optimiser's buffers and of the gradient that enters a step.

Vectors here are rows: what has a leading dimension ``(R, p)`` holds R models, or R cotangents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import Sampler
from tqdm import tqdm

from msif_lib.stage import Stage
from msif_lib.support.data import Nested, map_leaves
from msif_lib.support.functional import explain_missing_derivatives

Augment = Callable[[Nested], Nested]
Rate = Tensor | float

# How far a replay may end from the training, as a share of the way that the training went:
# rounding, which grows along a training, and no wrong rate or batch.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOW_PRECISION = 5e-2


# --- the optimisers ------------------------------------------------------------------------------


class State(NamedTuple):
    """Where a training is, or the cotangent of that: parameters, buffers, steps taken.

    Attributes
    ----------
    x
        The trained parameters ``(p_T,)``, with a leading dimension where there are several.
    buffers
        The optimiser's: the momentum of SGD, the two moments of Adam. Each of the shape of `x`.
    step
        Steps taken before this state.
    """

    x: Tensor
    buffers: tuple[Tensor, ...]
    step: int


class Optimiser(ABC):
    """A rule that moves parameters by a gradient, and the adjoint of that rule."""

    lr: float
    groups: Sequence[Mapping[str, Any]]
    clip: float | None

    #: The name under which a group says its decay.
    _decay_name: str

    @property
    @abstractmethod
    def decay(self) -> float:
        """δ, the decay decoupled from the gradient: a step shrinks x by 1 − ηδ."""

    @property
    @abstractmethod
    def slowness(self) -> float:
        """How much longer a step lasts than its learning rate says: 1/(1 − μ) for momentum μ."""

    @abstractmethod
    def begin(self, x: Tensor) -> State:
        """The state before the first step from parameters `x`."""

    @abstractmethod
    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """The state after a step.

        Parameters
        ----------
        state
            The state before, for one model or with a leading dimension of models.
        gradient
            Of the batch's objective, clipped, of the shape of ``state.x``.
        rate, decay
            η and δ, numbers or vectors ``(p_T,)``.
        """

    @abstractmethod
    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """The adjoint of :meth:`step`, but for what depends on x through the gradient.

        Parameters
        ----------
        state, gradient, rate, decay
            As the step was given them, for one model.
        cotangent
            λ after the step, rows ``(k, p_T)``.

        Returns
        -------
        tuple
            λ_g ``(k, p_T)`` and λ before the step, to whose x-part ∇²J_b λ_g is still to be added.
        """

    def rates(self, stage: Stage) -> tuple[Rate, Rate]:
        """What the groups make of a learning rate, as a factor, and δ: numbers or ``(p_T,)``.

        Raises
        ------
        ValueError
            A group names no trained parameter, or two groups name the same one.
        """
        if not self.groups:
            return 1.0, self.decay
        scale = dict.fromkeys(stage.trained, 1.0)
        decay = dict.fromkeys(stage.trained, self.decay)
        seen: dict[int, int] = {}
        for index, group in enumerate(self.groups):
            where = f'groups[{index}]["params"]'
            chosen = [n for n in stage.block(group["params"], where) if n in scale]
            if not chosen:
                raise ValueError(f"{where} names no parameter that the stage trains")
            for number in chosen:
                if number in seen:
                    raise ValueError(
                        f"groups[{seen[number]}] and groups[{index}] both name "
                        f"{stage.names[number]}; a parameter belongs to one group"
                    )
                seen[number] = index
                scale[number] = group.get("lr", self.lr) / self.lr
                decay[number] = group.get(self._decay_name, self.decay)
        return tuple(
            torch.cat(
                [
                    torch.full((stage.parameters.count((n,)),), values[n], dtype=stage.dtype)
                    for n in stage.trained
                ]
            ).to(stage.device)
            for values in (scale, decay)
        )  # type: ignore[return-value]

    def _check(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, not {self.lr}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive, or None for no clipping, not {self.clip}")
        _check_decay(self._decay_name, self.decay)
        for index, group in enumerate(self.groups):
            unknown = set(group) - {"params", "lr", self._decay_name}
            if unknown or "params" not in group:
                raise ValueError(
                    f"groups[{index}] must have 'params' and may have 'lr' and "
                    f"'{self._decay_name}'; it has {sorted(group)}"
                )
            if not 0 <= group.get("lr", 0.0) < math.inf:
                raise ValueError(f"groups[{index}]['lr'] must not be negative, not {group['lr']}")
            _check_decay(f"groups[{index}]['{self._decay_name}']", group.get(self._decay_name, 0.0))


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive, not {value}")


@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent, as torch.optim.SGD.

        v' = μ v + g;   d = v', or g + μ v' (Nesterov);   x' = (1 − ηδ) x − η d

    The coupled weight decay of torch is no setting of the optimiser: it is the `l2` of the stage.

    Parameters
    ----------
    lr
        Learning rate η.
    momentum
        μ, at least 0 and below 1.
    nesterov
        Nesterov's momentum.
    decoupled_decay
        δ, which torch.optim.SGD has not: each step multiplies the parameters by 1 − ηδ first.
    groups
        Dicts with ``"params"``, a shell pattern of parameter names or a list of them, and
        ``"lr"`` or ``"decoupled_decay"`` or both: other values for these parameters. At step t a
        group's rate is ``learning_rates[t]`` times its ``lr`` over the optimiser's.
    clip
        Longest gradient, over all trained parameters, as torch.nn.utils.clip_grad_norm_.

    Raises
    ------
    ValueError
        A value outside its range, or a group with a key that is not one of these.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    decoupled_decay: float = 0.0
    groups: Sequence[Mapping[str, Any]] = ()
    clip: float | None = None
    _decay_name = "decoupled_decay"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        self._check()

    @property
    def decay(self) -> float:
        """δ."""
        return self.decoupled_decay

    @property
    def slowness(self) -> float:
        """1/(1 − μ)."""
        return 1 / (1 - self.momentum)

    def begin(self, x: Tensor) -> State:
        """Parameters with a momentum of zero."""
        return State(x, (torch.zeros_like(x),) if self.momentum else (), 0)

    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """v' = μ v + g, x' = (1 − ηδ) x − η d."""
        x, buffers, d = state.x, state.buffers, gradient
        if buffers:
            v = self.momentum * buffers[0] + gradient
            buffers, d = (v,), gradient + self.momentum * v if self.nesterov else v
        return State(_shrunk(x, rate, decay) - rate * d, buffers, state.step + 1)

    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """λ_v' = λ_v − η λ_x · (1, or μ with Nesterov), λ_g = λ_v' − (η λ_x with Nesterov)."""
        moved = -rate * cotangent.x
        before, buffers, lambda_g = _shrunk(cotangent.x, rate, decay), cotangent.buffers, moved
        if buffers:
            lambda_v = buffers[0] + (self.momentum * moved if self.nesterov else moved)
            lambda_g = lambda_v + moved if self.nesterov else lambda_v
            buffers = (self.momentum * lambda_v,)
        return lambda_g, State(before, buffers, state.step)


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay, as torch.optim.AdamW; Adam where `weight_decay` is 0.

        m' = β₁m + (1−β₁)g;   v' = β₂v + (1−β₂)g²;   c₁ = 1−β₁ᵗ, c₂ = 1−β₂ᵗ
        r = √(v'/c₂), D = r + ε, m̂ = m'/c₁;   x' = (1 − ηδ)x − η m̂/D

    The coupled weight decay of torch.optim.Adam is the `l2` of the stage.

    Parameters
    ----------
    lr
        Learning rate η.
    betas
        β₁ and β₂, each at least 0 and below 1.
    eps
        ε.
    weight_decay
        δ, decoupled: each step multiplies the parameters by 1 − ηδ first.
    groups
        Dicts with ``"params"``, a shell pattern of parameter names or a list of them, and
        ``"lr"`` or ``"weight_decay"`` or both: other values for these parameters. At step t a
        group's rate is ``learning_rates[t]`` times its ``lr`` over the optimiser's.
    clip
        Longest gradient, over all trained parameters, as torch.nn.utils.clip_grad_norm_.

    Raises
    ------
    ValueError
        A value outside its range, or a group with a key that is not one of these.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    groups: Sequence[Mapping[str, Any]] = ()
    clip: float | None = None
    _decay_name = "weight_decay"

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers, at least 0 and below 1, not {self.betas}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive, not {self.eps}")
        self._check()

    @property
    def decay(self) -> float:
        """δ."""
        return self.weight_decay

    @property
    def slowness(self) -> float:
        """1: a mean of gradients moves as far as a gradient."""
        return 1.0

    def begin(self, x: Tensor) -> State:
        """Parameters with both moments zero."""
        return State(x, (torch.zeros_like(x), torch.zeros_like(x)), 0)

    def _moments(self, state: State, gradient: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """m', v', c₁ and c₂ of the step from `state`."""
        (beta1, beta2), (m, v), t = self.betas, state.buffers, state.step + 1
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        return m, v, 1 - beta1**t, 1 - beta2**t

    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """x' = (1 − ηδ)x − η m̂/D."""
        m, v, c1, c2 = self._moments(state, gradient)
        d = (m / c1) / ((v / c2).sqrt() + self.eps)
        return State(_shrunk(state.x, rate, decay) - rate * d, (m, v), state.step + 1)

    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """λ_m' = λ_m − (η/c₁) λ_x/D, λ_v' = λ_v + η m̂ λ_x/(2c₂D²r), λ_g by the chain rule."""
        (beta1, beta2), lambda_x = self.betas, cotangent.x
        m, v, c1, c2 = self._moments(state, gradient)
        r = (v / c2).sqrt()
        d = r + self.eps
        # Where a coordinate never had a gradient, r = 0, v' does not move and its term is 0.
        slope = torch.where(r > 0, (m / c1) / (2 * c2 * d**2 * r), 0.0)
        lambda_m = cotangent.buffers[0] - (rate / c1 / d) * lambda_x
        lambda_v = cotangent.buffers[1] + (rate * slope) * lambda_x
        lambda_g = (1 - beta1) * lambda_m + (2 * (1 - beta2) * gradient) * lambda_v
        before = _shrunk(lambda_x, rate, decay), (beta1 * lambda_m, beta2 * lambda_v)
        return lambda_g, State(*before, state.step)


def _shrunk(x: Tensor, rate: Rate, decay: Rate) -> Tensor:
    """(1 − ηδ) x."""
    return x if isinstance(decay, float) and decay == 0 else (1 - rate * decay) * x


def _clipped(gradient: Tensor, longest: float | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gradient as torch.nn.utils.clip_grad_norm_ leaves it, and the adjoint of that.

    s = c/(‖g‖ + 10⁻⁶) where that is below 1: λ_g ← s (λ_g − ‖g‖/(‖g‖ + 10⁻⁶) ĝ ĝᵀ λ_g).
    """
    if longest is None:
        return gradient, lambda rows: rows
    norm = gradient.norm(dim=-1, keepdim=True)
    padded = norm + 1e-6
    s = (longest / padded).clamp(max=1.0)

    def adjoint(rows: Tensor) -> Tensor:
        if s >= 1:
            return rows
        return s * (rows - (rows @ gradient)[:, None] * gradient / (norm * padded))

    return s * gradient, adjoint


# --- batches and noise ---------------------------------------------------------------------------


class Batches(Sampler[list[int]]):
    """Batches of an epoch in random order, which remember what they gave.

    To be given to a ``DataLoader`` as its ``batch_sampler``; each iteration is an epoch, draws
    another permutation and keeps a short last batch. Worker processes read ahead, so that
    `taken` is what a training took only once an epoch is finished.

    Parameters
    ----------
    n
        Examples.
    batch_size
        Examples of a batch.
    seed
        Of the permutations.

    Attributes
    ----------
    taken
        The indices ``(B,)`` of each batch so far.

    Raises
    ------
    ValueError
        `n` or `batch_size` below 1.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.n, self.batch_size = n, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self.taken: list[Tensor] = []

    def __iter__(self) -> Iterator[list[int]]:
        for indices in torch.randperm(self.n, generator=self._generator).split(self.batch_size):
            self.taken.append(indices)
            yield indices.tolist()

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)


@contextmanager
def drawn_from(noise_seed: int, step: int) -> Iterator[None]:
    """A context in which step number `step`, from 0, draws its dropout and its augmentation.

    A training of one's own that evaluates each step within it can be recorded with `noise_seed`.

    Parameters
    ----------
    noise_seed
        The recorded seed, from 0 to 2³¹ − 1.
    step
        Steps taken before this one.
    """
    with torch.random.fork_rng():
        torch.manual_seed((noise_seed << 32) + step)
        yield


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout acts; layers that keep running statistics stay as they are."""
    modes = {m: m.training for m in model.modules() if not isinstance(m, _NormBase)}
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# --- a recorded training -------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
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
        By number of steps taken, every √T steps from 0 on; from these a walk back replays.
    noise_seed
        What dropout and augmentation drew from (:func:`drawn_from`); None: nothing was drawn.
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

    @property
    def time(self) -> float:
        """How long gradient flow takes to go as far: Σ η, divided by 1 − μ for momentum μ."""
        return sum(self.learning_rates) * self.optimiser.slowness

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
        if isinstance(batches, Batches):
            batches = batches.taken
        given = {step: _as_vector(stage, state) for step, state in (states or {}).items()}
        first, target = _as_vector(stage, start), stage.vector()
        still = tuple(n for n in stage.parameters.all if n not in stage.trained)
        if not torch.equal(
            stage.parameters.take(first, still), stage.parameters.take(target, still)
        ):
            raise ValueError(
                "start differs from the stage in parameters that the stage does not train; say "
                "which were trained with Stage(trained=...) or requires_grad"
            )
        training = _Training(
            stage, first, _as_indices(batches), optimiser, learning_rates, noise_seed, augment
        )
        way = (target - first).norm()
        differs: int | None = None

        def compare(state: State) -> None:
            nonlocal differs
            if differs is None and state.step in given:
                there = stage.parameters.take(given[state.step], stage.trained)
                if not _near(state.x, there, way):
                    differs = state.step

        name = "repeating the training"
        path = _recorded(training, name, progress, compare)
        if differs is not None or not _near(path.end, target, way):
            away = float((path.end - target).norm() / way) if way > 0 else math.inf
            where = (
                f"it differs first after step {differs}"
                if differs is not None
                else "give states= to see from which step on it differs"
            )
            raise ValueError(
                "batches, learning_rates and optimiser do not lead from start to the stage's "
                f"parameters: the repetition ends {away:.1e} of the way off; {where}. Check the "
                "order of the batches, the rate of each step, weights= and l2= of the stage "
                "(torch's weight_decay of SGD and Adam), and that nothing but a recorded "
                "noise_seed drew dropout or augmentation"
            )
        return path


def _near(a: Tensor, b: Tensor, way: Tensor) -> bool:
    """Whether two ends of a training of length `way` are the same but for rounding."""
    rounding = 100 * torch.finfo(b.dtype).eps * b.norm()
    return bool((a - b).norm() <= _TOLERANCE.get(b.dtype, _LOW_PRECISION) * way + rounding)


def _as_vector(stage: Stage, state: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Parameters ``(p,)`` in the stage's order, from a vector or a ``state_dict``."""
    if not isinstance(state, Tensor):
        missing = [name for name in stage.names if name not in state]
        if missing:
            raise ValueError(
                f"start or states lacks the parameter {missing[0]}; give a vector as "
                "stage.vector() or a state_dict with the names of stage.names"
            )
        state = torch.cat([state[name].detach().reshape(-1) for name in stage.names])
    size = stage.parameters.size
    if state.shape != (size,):
        raise ValueError(f"start and states must be vectors ({size},), not {tuple(state.shape)}")
    return state.detach().to(dtype=stage.dtype, device=stage.device, copy=True)


def _as_indices(batches: Sequence[Any]) -> list[Tensor]:
    return [torch.as_tensor(batch, dtype=torch.long).cpu() for batch in batches]


def _as_rates(rates: Sequence[float] | None, optimiser: Optimiser, steps: int) -> tuple[float, ...]:
    if rates is None:
        return (float(optimiser.lr),) * steps
    if len(rates) != steps:
        raise ValueError(f"learning_rates must be {steps} numbers, one a step, not {len(rates)}")
    values = tuple(float(rate) for rate in rates)
    if not all(0 <= rate < math.inf for rate in values):
        raise ValueError("learning_rates must be finite and not negative")
    return values


class _Training:
    """The objectives of a training's batches, as functions of the trained parameters.

    Parameters
    ----------
    stage
        Model, loss, data, weights and regularizer.
    vector
        All parameters ``(p,)``, for those that are not trained.
    batches, optimiser, learning_rates, noise_seed, augment
        As of :class:`Path`.
    """

    def __init__(
        self,
        stage: Stage,
        vector: Tensor,
        batches: Sequence[Tensor],
        optimiser: Optimiser,
        learning_rates: Sequence[float] | None,
        noise_seed: int | None,
        augment: Augment | None,
    ) -> None:
        self.stage, self.vector, self.batches, self.optimiser = stage, vector, batches, optimiser
        self.noise_seed, self.augment = noise_seed, augment
        if not stage.trained:
            raise ValueError("the stage trains no parameter; say which with trained=")
        if noise_seed is not None and not 0 <= noise_seed < 2**31:
            raise ValueError(f"noise_seed must be from 0 to 2**31 - 1, not {noise_seed}")
        if augment is not None and noise_seed is None:
            raise ValueError("augment draws, so that it needs a noise_seed")
        if not batches:
            raise ValueError("batches is empty: a training takes at least one step")
        for step, indices in enumerate(batches):
            if indices.dim() != 1 or not len(indices):
                raise ValueError(f"batches[{step}] must be a list of indices, not empty")
            if int(indices.min()) < 0 or int(indices.max()) >= stage.size:
                raise ValueError(
                    f"batches[{step}] has an index outside the {stage.size} examples of the stage"
                )
        for name, module in stage.model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise ValueError(
                    f"{name} is BatchNorm in training mode: it mixes the examples of a batch, so "
                    "that no example has a loss of its own; use GroupNorm, or its statistics of "
                    "evaluation with .eval()"
                )
        self.learning_rates = _as_rates(learning_rates, optimiser, len(batches))
        self._scale, self.decay = optimiser.rates(stage)
        self.constants = [part.detach() for part in stage.parameters.parts(vector)]
        self.shapes = [self.constants[number].shape for number in stage.trained]
        self.sizes = [shape.numel() for shape in self.shapes]
        # Shared and not trained: a start handed on, which every step's gradient depends on.
        self.fixed = tuple(n for n in stage.shared if n not in stage.trained)
        # vmap makes grouped convolutions of convolutions, which take longer than one by one.
        convolves = any(isinstance(module, _ConvNd) for module in stage.model.modules())
        self.vectorised = stage.can.batching_rules and not convolves
        data = stage.data
        self._tensors = (data[0], data[1]) if isinstance(data, list | tuple) else None

    def split(self, rows: Tensor) -> list[Tensor]:
        """Parameters ``(..., p_T)`` as the trained ones, each in its shape."""
        parts = rows.split(self.sizes, -1)
        lead = rows.shape[:-1]
        return [part.reshape(lead + shape) for part, shape in zip(parts, self.shapes)]

    def examples(self, step: int, weights: Tensor | None = None) -> tuple[Nested, Nested, Tensor]:
        """Inputs, targets and weights of a step's batch."""
        indices, stage = self.batches[step], self.stage
        weights = stage.weights if weights is None else weights
        if self._tensors is None:
            ((inputs, targets),) = stage.read(len(indices), indices.tolist())
        else:
            inputs, targets = map_leaves(partial(_rows, indices, stage.device), self._tensors)
        return inputs, targets, weights[indices.to(weights.device)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of many steps."""
        with torch.enable_grad(), self.stage.kernels(), explain_missing_derivatives():
            yield

    @contextmanager
    def noise(self, step: int) -> Iterator[None]:
        """The context of one step's losses: dropout acts, if its draws are recorded."""
        if self.noise_seed is None:
            yield
            return
        with drawn_from(self.noise_seed, step), _training_mode(self.stage.model):
            yield

    def rate(self, step: int) -> Rate:
        """η of a step."""
        return self.learning_rates[step] * self._scale

    def steps(self, state: State, stop: int) -> Iterator[State]:
        """The states that follow `state`, up to that after `stop` steps."""
        while state.step < stop:
            gradient, _ = _clipped(self.gradient(state.x, state.step), self.optimiser.clip)
            rate = self.rate(state.step)
            state = self.optimiser.step(state, gradient, rate, self.decay)
            if not state.x.sum().isfinite():
                raise FloatingPointError(
                    f"the training diverged in step {state.step - 1} of {len(self.batches)}, "
                    f"counted from 0, at learning rate "
                    f"{self.learning_rates[state.step - 1]:g}: lower lr, or shorten gradients "
                    "with clip= of the optimiser"
                )
            yield state

    def objective(self, parts: list[Tensor], batch: tuple[Nested, Nested, Tensor]) -> Tensor:
        """J_b without the l2 term, which has no need of a graph; within :meth:`noise`."""
        inputs, targets, weights = batch
        if self.augment is not None:
            inputs = self.augment(inputs)
        losses = self.stage.batch_losses(parts, inputs, targets)
        value = weights @ losses / len(losses)
        return value if self.stage.regularizer is None else value + self.stage.penalty(parts)

    @property
    def l2(self) -> float:
        """The l2 that :meth:`objective` leaves out."""
        return self.stage.l2 if self.stage.regularizer is None else 0.0

    def leaves(self, x: Tensor) -> list[Tensor]:
        return [part.detach().requires_grad_() for part in self.split(x)]

    def replaced(
        self, leaves: Sequence[Tensor], block: Sequence[int], vector: Tensor | None = None
    ) -> list[Tensor]:
        """All parameters, those of a block exchanged."""
        parts = list(self.constants if vector is None else self.stage.parameters.parts(vector))
        for number, leaf in zip(block, leaves, strict=True):
            parts[number] = leaf
        return parts

    def gradient(
        self, x: Tensor, step: int, vector: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """∇J_b ``(p_T,)``, with other fixed parameters ``(p,)`` and weights ``(N,)`` if given."""
        leaves = self.leaves(x)
        parts = self.replaced(leaves, self.stage.trained, vector)
        batch = self.examples(step, weights)
        with self.noise(step):
            value = self.objective(parts, batch)
        slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([slope.reshape(-1) for slope in slopes])
        return gradient.add_(x, alpha=self.l2) if self.l2 else gradient

    def gradients(self, x: Tensor, vectors: Tensor, weights: Tensor, step: int) -> Tensor:
        """∇J_b ``(R, p_T)`` of R models, each with parameters and example weights of its own."""
        indices = self.batches[step].to(weights.device)
        inputs, targets, _ = self.examples(step)

        def objective(x: Tensor, vector: Tensor, weights: Tensor) -> Tensor:
            parts = self.replaced(self.split(x), self.stage.trained, vector)
            return self.objective(parts, (inputs, targets, weights))

        with self.noise(step):
            slopes = vmap(grad(objective), randomness="same")(x, vectors, weights[:, indices])
        return slopes + self.l2 * x

    def linearised(self, x: Tensor, step: int) -> tuple[Tensor, _Pull]:
        """∇J_b ``(p_T,)`` and, from the same graph, what a cotangent of it is pulled back to."""
        leaves = self.leaves(x)
        fixed = [self.constants[number].clone().requires_grad_() for number in self.fixed]
        inputs, targets, weights = self.examples(step)
        weights = weights.clone().requires_grad_()
        parts = self.replaced(leaves, self.stage.trained)
        for number, leaf in zip(self.fixed, fixed):
            parts[number] = leaf
        with self.noise(step):
            value = self.objective(parts, (inputs, targets, weights))
        slopes = torch.autograd.grad(
            value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        gradient = torch.cat([slope.detach().reshape(-1) for slope in slopes])
        if self.l2:
            gradient.add_(x, alpha=self.l2)
        return gradient, _Pull(self, slopes, (leaves, fixed, [weights]))


def _rows(indices: Tensor, device: torch.device, leaf: Tensor) -> Tensor:
    return leaf[indices.to(leaf.device)].to(device)


class _Pull:
    """The pull-back of a gradient: from λ_g to x, to the fixed parameters and to the weights."""

    def __init__(
        self,
        training: _Training,
        slopes: Sequence[Tensor],
        inputs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    ) -> None:
        self.training, self.slopes, self.inputs = training, slopes, inputs

    def __call__(self, rows: Tensor, vectorised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """∇²J_b λ_g ``(k, p_T)``, ∂²J_b/∂c∂x λ_g ``(k, p_c)`` and ∇ℓ_iᵀ λ_g/B ``(k, B)``."""
        if vectorised and len(rows) > 1:
            blocks = self._pull(self.training.split(rows), is_grads_batched=True)
        else:
            each = [self._pull(self.training.split(row)) for row in rows]
            blocks = [torch.stack(parts) for parts in zip(*each)]
        flat = [block.reshape(len(rows), -1) for block in blocks]
        first, second = len(self.inputs[0]), len(self.inputs[0]) + len(self.inputs[1])
        product = torch.cat(flat[:first], 1)
        if self.training.l2:
            product.add_(rows, alpha=self.training.l2)
        return product, torch.cat([rows[:, :0], *flat[first:second]], 1), flat[second]

    def _pull(self, cotangents: Sequence[Tensor], is_grads_batched: bool = False) -> list[Tensor]:
        # A slope that depends on nothing here has no graph and pulls back to zero.
        chosen = [(s, c) for s, c in zip(self.slopes, cotangents) if s.requires_grad]
        inputs = [leaf for leaves in self.inputs for leaf in leaves]
        return list(
            torch.autograd.grad(
                [slope for slope, _ in chosen],
                inputs,
                [cotangent for _, cotangent in chosen],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
                is_grads_batched=is_grads_batched,
            )
        )


# --- there ---------------------------------------------------------------------------------------


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
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    sampler = Batches(stage.size, batch_size, seed)
    for _ in range(epochs):
        for _ in sampler:
            pass
    training = _Training(
        stage, stage.vector(), sampler.taken, optimiser, learning_rates, noise_seed, augment
    )
    path = _recorded(training, "training", progress)
    stage.load_vector(path.end)
    return path


def _recorded(
    training: _Training,
    name: str,
    progress: bool,
    watch: Callable[[State], None] = lambda state: None,
) -> Path:
    """Take all steps, showing each state to `watch`."""
    stage, count = training.stage, len(training.batches)
    every = max(1, math.isqrt(count))
    begun = training.optimiser.begin(stage.parameters.take(training.vector, stage.trained))
    states = {0: begun}
    with training.running(), _bar(f"{name}, {count} steps", count, progress) as bar:
        for state in training.steps(begun, count):
            watch(state)
            if state.step % every == 0 and state.step < count:
                states[state.step] = state
            bar.update()
    return Path(
        start=training.vector,
        end=stage.parameters.replaced(training.vector, state.x, stage.trained),
        batches=training.batches,
        learning_rates=training.learning_rates,
        optimiser=training.optimiser,
        states=states,
        noise_seed=training.noise_seed,
        augment=training.augment,
    )


def _bar(name: str, total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc=name, disable=not progress, delay=1, leave=False)


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
    2√T states are alive at most. A step costs one product with the Hessian of its batch for each
    cotangent.

    Parameters
    ----------
    stage
        The stage, where the training ended.
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
        `cotangent` of another shape; a stage that is not where the path ends, or whose data,
        weights or regularizer lead elsewhere.
    DerivativeError
        The model has an operation without a second derivative.
    """
    size, count = stage.parameters.size, len(path)
    if cotangent.dim() != 2 or len(cotangent) != size:
        raise ValueError(f"cotangent must be ({size}, k), not {tuple(cotangent.shape)}")
    training = _Training(
        stage, path.start, path.batches, path.optimiser, path.learning_rates, path.noise_seed,
        path.augment,
    )  # fmt: skip
    way = (path.end - path.start).norm()
    if not _near(stage.vector(), path.end, way):
        raise ValueError(
            "the stage's parameters are not where path ends; load them with "
            "stage.load_vector(path.end), or record the path anew"
        )
    k = cotangent.shape[1]
    name = f"walk back through {count} steps for {k} functional{'s' if k > 1 else ''}"
    walk = _Walk.begin(training, cotangent, stage.size if of is None else of.size)
    if keep is not None and (kept := keep.get()) is not None:
        walk.restore(kept)
    with training.running(), _bar(name, count, progress) as bar:
        bar.update(count - walk.cotangent.step)
        for first in sorted(path.states, reverse=True):
            stop = walk.cotangent.step
            if first >= stop:
                continue
            states = [path.states[first], *training.steps(path.states[first], stop)]
            there = (
                path.states[stop].x
                if stop in path.states
                else stage.parameters.take(path.end, stage.trained)
            )
            if not _near(states.pop().x, there, way):
                raise ValueError(
                    "the stage is not the one whose training path records: the same steps lead "
                    "elsewhere; compare its data, weights=, l2= and regularizer"
                )
            while states:
                walk.step(states.pop(), of)
                bar.update()
            if keep is not None:
                keep.put(walk.kept())
    return walk.finish()


@dataclass
class _Walk:
    """The state of a walk back, for k cotangents.

    Attributes
    ----------
    cotangent
        λ at the state after so many steps as it says, rows ``(k, p_T)``.
    fixed
        λ_c ``(k, p_c)`` of what is shared and not trained.
    derivatives
        ``(N, k)``.
    """

    training: _Training
    cotangent: State
    fixed: Tensor
    derivatives: Tensor

    @classmethod
    def begin(cls, training: _Training, cotangent: Tensor, examples: int) -> _Walk:
        """At the end of the training; between trainings the buffers start anew, so λ_v = 0."""
        stage, count = training.stage, len(training.batches)
        begun = training.optimiser.begin(
            stage.parameters.take(cotangent, stage.trained).T.contiguous()
        )
        fixed = stage.parameters.take(cotangent, training.fixed).T
        zeros = cotangent.new_zeros(examples, cotangent.shape[1])
        return cls(training, begun._replace(step=count), fixed, zeros)

    def step(self, state: State, of: Stage | None) -> None:
        """Back over the step that was taken from `state`."""
        training, optimiser, t = self.training, self.training.optimiser, state.step
        gradient, pull = training.linearised(state.x, t)
        gradient, unclip = _clipped(gradient, optimiser.clip)
        lambda_g, before = optimiser.pull_back(
            state, gradient, training.rate(t), training.decay, self.cotangent
        )
        lambda_g = unclip(lambda_g)
        product, fixed, derivatives = pull(lambda_g, training.vectorised)
        self.cotangent = before._replace(x=before.x + product)
        self.fixed = self.fixed + fixed
        if of is None:
            indices = training.batches[t].to(self.derivatives.device)
            self.derivatives.index_add_(0, indices, derivatives.T)
        else:
            parameters, trained = training.stage.parameters, training.stage.trained
            vector = parameters.replaced(training.vector, state.x, trained)
            blocks = of.directional_derivatives(parameters.put(lambda_g.T, trained), vector)
            self.derivatives += of.reader.gather(blocks, self.derivatives[:0])

    def kept(self) -> dict[str, Tensor]:
        """All that changes, by name."""
        state = self.cotangent
        buffers = {f"buffer {index}": buffer for index, buffer in enumerate(state.buffers)}
        step = torch.tensor(state.step)
        fixed = {"fixed": self.fixed, "derivatives": self.derivatives}
        return {"step": step, "x": state.x, **buffers, **fixed}

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go on from what :meth:`kept` gave."""
        buffers = tuple(kept[f"buffer {i}"] for i in range(len(self.cotangent.buffers)))
        self.cotangent = State(kept["x"], buffers, int(kept["step"]))
        self.fixed, self.derivatives = kept["fixed"], kept["derivatives"]

    def finish(self) -> Unwound:
        """At the start of the training."""
        stage = self.training.stage
        handed = stage.parameters.put(self.cotangent.x.T, stage.trained)
        handed = handed + stage.parameters.put(self.fixed.T, self.training.fixed)
        return Unwound(handed, self.derivatives)


# --- many at once --------------------------------------------------------------------------------


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
    training = _Training(
        stage, path.start, path.batches, path.optimiser, path.learning_rates, path.noise_seed,
        path.augment,
    )  # fmt: skip
    state = path.optimiser.begin(stage.parameters.take(start.T, stage.trained).T.contiguous())
    name = f"{len(weights)} trainings of {len(path)} steps"
    with training.running(), _bar(name, len(path), progress) as bar:
        for t in range(len(path)):
            gradients = training.gradients(state.x, start, weights, t)
            gradients, _ = _clipped(gradients, path.optimiser.clip)
            state = path.optimiser.step(state, gradients, training.rate(t), training.decay)
            bar.update()
    diverged = (~state.x.isfinite().all(1)).nonzero()[:, 0]
    if len(diverged):
        raise FloatingPointError(
            f"the training of model {int(diverged[0])} diverged: its weights or its start take "
            "it where the path's learning rates are too large"
        )
    still = tuple(n for n in stage.parameters.all if n not in stage.trained)
    end = stage.parameters.put(state.x.T, stage.trained) + stage.parameters.put(
        stage.parameters.take(start.T, still), still
    )
    return end.T.contiguous()
