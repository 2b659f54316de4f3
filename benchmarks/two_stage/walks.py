"""Walks back through recorded trainings of which one factor is another than the exact one.

Going back over a step takes three things of the gradient of its batch: its derivative by the
parameters (the Hessian's product), by what was handed on and not trained (the cross term), and by
the examples' weights. :class:`Changed` is a path whose walk back takes something else for one of
them. :class:`InSegments` needs no more of a path than some of its states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from benchmarks.two_stage.settings import Problem
from msif_lib import Stage
from msif_lib.curvature import CrossHessian, Hessian, Scaled
from msif_lib.descent import Path
from msif_lib.ekfac import EKFAC
from msif_lib.lanczos import functions_of
from msif_lib.links import Asked, Link, PulledBack, Unrolled
from msif_lib.steps import Linearised, Steps

#: Cotangents of a batch's gradient ``(k, p_T)`` to those of parameters, of what was handed on and
#: not trained, and of the weights of its examples.
Back = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
#: What is taken of the step of this number, from these trained parameters on.
Change = Callable[[Steps, Tensor, int], Back]


def exact(steps: Steps, x: Tensor, step: int) -> Back:
    """What the step was."""
    return Steps.linearised(steps, x, step)[1].pull_back


# Of a first stage nothing is handed back.
_ALONE = Asked(hand_back=False)


class _Taken(Linearised):
    """A step's gradient whose derivatives are those of a change."""

    def __init__(self, back: Back) -> None:
        self._back = back

    def pull_back(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._back(rows)


class _ChangedSteps(Steps):
    change: Change = staticmethod(exact)

    def linearised(self, x: Tensor, step: int) -> tuple[Tensor, Linearised]:
        return self.gradient(x, step), _Taken(self.change(self, x, step))


@dataclass(frozen=True, eq=False)
class Changed(Path):
    """A training that is repeated as it was and walked back with a change.

    Attributes
    ----------
    change
        What is taken of each step.
    """

    change: Change = exact

    @classmethod
    def of(cls, path: Path, change: Change) -> Changed:
        """The same training, walked back with a change."""
        known = {field.name: getattr(path, field.name) for field in fields(Path)}
        return cls(**known, change=change)

    def steps(self, stage: Stage) -> Steps:
        """The steps of this training, their derivatives changed."""
        steps = _ChangedSteps(
            stage, self.start, self.batches, self.optimiser, self.learning_rates,
            self.noise_seed, self.augment,
        )  # fmt: skip
        steps.change = self.change
        return steps


# --- changes -------------------------------------------------------------------------------------


def _by_weight(steps: Steps, x: Tensor, step: int, rows: Tensor) -> Tensor:
    """∇ℓ_iᵀ λ_g / B of the examples of a step, ``(k, B)``, without a second derivative."""
    stage, batch = steps.stage, steps.examples(step)
    at = stage.parameters.replaced(steps.vector, x, stage.trained)
    columns = stage.parameters.put(rows.T, stage.trained)
    once = stage.gradients_at_once
    found = torch.cat(list(stage.can.directional_derivatives(at, columns, [batch], once)))
    return found.T / len(found)


def without_hessian(steps: Steps, x: Tensor, step: int) -> Back:
    """No second derivative of the losses: HYDRA's. Weight decay is not in them and stays."""

    def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed = rows.new_zeros(len(rows), steps.stage.parameters.count(steps.fixed))
        return torch.zeros_like(rows), fixed, _by_weight(steps, x, step, rows)

    return back


def passing(steps: Steps, x: Tensor, step: int) -> Back:
    """The same where nobody asks for the weights' derivatives: the optimiser's adjoint alone."""

    def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed = rows.new_zeros(len(rows), steps.stage.parameters.count(steps.fixed))
        return torch.zeros_like(rows), fixed, rows.new_zeros(len(rows), len(steps.batches[step]))

    return back


def damped(damping: float) -> Change:
    """The Hessian of each step with `damping` added to its diagonal."""

    def change(steps: Steps, x: Tensor, step: int) -> Back:
        known = exact(steps, x, step)

        def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            product, mixed, by_weight = known(rows)
            return product + damping * rows, mixed, by_weight

        return back

    return change


def without_cross(steps: Steps, x: Tensor, step: int) -> Back:
    """No second derivative by embedding and head together."""
    known, stage = exact(steps, x, step), steps.stage
    whole = torch.zeros_like(steps.vector)
    whole[: stage.embedding_size] = 1
    shared = stage.parameters.take(whole, stage.trained)

    def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product, mixed, by_weight = known(torch.cat([rows * shared, rows * (1 - shared)]))
        first, second = product.split(len(rows))
        return (
            first * shared + second * (1 - shared),
            torch.zeros_like(mixed[: len(rows)]),
            by_weight[: len(rows)] + by_weight[len(rows) :],
        )

    return back


def hessian_at(x: Tensor) -> Change:
    """The Hessian and the cross term of each batch at other parameters ``(p_T,)``."""

    def change(steps: Steps, here: Tensor, step: int) -> Back:
        there = exact(steps, x, step)

        def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *there(rows)[:2], _by_weight(steps, here, step, rows)

        return back

    return change


def gradients_at(x: Tensor) -> Change:
    """The examples' gradients at other parameters ``(p_T,)``."""

    def change(steps: Steps, here: Tensor, step: int) -> Back:
        known = exact(steps, here, step)

        def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *known(rows)[:2], _by_weight(steps, x, step, rows)

        return back

    return change


def ekfac_of(stage: Stage) -> Change:
    """EK-FAC of all examples where the stage is now in place of each step's Hessian."""
    operator = EKFAC(stage, stage.trained)

    def change(steps: Steps, x: Tensor, step: int) -> Back:
        known = exact(steps, x, step) if steps.fixed else without_hessian(steps, x, step)

        def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            _, mixed, by_weight = known(rows)
            # The walk adds l2 by itself.
            return (operator @ rows.T).T - stage.l2 * rows, mixed, by_weight

        return back

    return change


def gauss_newton(steps: Steps, x: Tensor, step: int) -> Back:
    """The Gauss-Newton matrix of each batch in place of its Hessian; the cross term is exact."""
    known = exact(steps, x, step) if steps.fixed else without_hessian(steps, x, step)
    stage, leaf = steps.stage, x.detach().requires_grad_()
    inputs, targets = steps.examples(step)
    parts = stage.parameters.parts(steps.vector, (stage.trained, leaf))
    outputs = stage.batch_outputs(parts, inputs)
    at = outputs.detach().requires_grad_()
    losses = stage.loss(at, targets)
    value = stage.weights[steps.batches[step]] @ losses / len(losses)
    (slope,) = torch.autograd.grad(value, at, create_graph=True)
    # u ↦ Jᵀu is linear, and its own pull-back is J.
    u = torch.ones_like(at, requires_grad=True)
    (pulled,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)

    def product(row: Tensor) -> Tensor:
        moved = torch.autograd.grad(pulled, u, row, retain_graph=True)
        curved = torch.autograd.grad(
            slope, at, moved, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.autograd.grad(outputs, leaf, curved, retain_graph=True)[0]

    def back(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, mixed, by_weight = known(rows)
        together = steps.vectorised and len(rows) > 1
        found = vmap(product)(rows) if together else torch.stack([product(row) for row in rows])
        return found, mixed, by_weight

    return back


# --- scores --------------------------------------------------------------------------------------


def scores(of: Problem, pretrain: Link | None = None, finetune: Link | None = None) -> Tensor:
    """dq/dw_i ``(m, T)`` where a link stands in place of the problem's own, if one is given.

    λ goes through the links as :class:`msif_lib.Chain` takes it; whether a link fits how its stage
    was trained is what is asked about, and not checked.
    """
    own = of.chain.links
    first, second = pretrain or own[0], finetune or own[1]
    gradients = of.chain.test_gradients(of.data.functionals, per_test=True)
    handed = second.pull_back(gradients).handed
    stage = first.stage
    pulled = first.pull_back(stage.parameters.put(handed, stage.shared), _ALONE)
    if pulled.u is None:
        assert pulled.scores is not None
        return pulled.scores / of.size
    return -torch.cat(list(stage.directional_derivatives(pulled.u))) / of.size


def walk(of: Problem, pretrain: Change | None = None, finetune: Change | None = None) -> Tensor:
    """dq/dw_i ``(m, T)`` by walks through both trainings, with changes where they are given."""
    links = [
        link if change is None else Unrolled(link.stage, Changed.of(link.path, change))
        for link, change in zip(of.chain.links, (pretrain, finetune))
    ]
    return scores(of, *links)


# --- in segments ---------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """A part of a training: where its derivatives are taken, τ, and P of its end ``(p_T,)``."""

    x: Tensor
    time: float
    scale: Tensor | float


@dataclass(frozen=True, eq=False)
class InSegments(Link):
    """A training as flows of quadratic models, one a segment of its path (Bae et al. 2024).

    From the last segment to the first, with H of all examples at one point of the segment, τ its
    time and P what the optimiser multiplied gradients by at its end,

        u = P^½ φ(H̃) P^½ λ,   I_i −= ∇ℓ_iᵀ u,   λ ← P^−½ e^(−τH̃⁺) P^½ λ,   H̃ = P^½ H P^½ + δI

    with φ and H⁺ of :class:`~msif_lib.links.Stopped`, which is the last segment alone.

    Attributes
    ----------
    stage, path
        The stage and its training.
    count
        Segments; fewer where the path kept fewer states.
    at
        Where derivatives are taken: at the mean of a segment's states, at its end, or on the
        straight line between the two ends of the path, of which nothing else is known then.
    tol
        Of Lanczos.
    """

    stage: Stage
    path: Path
    count: int
    at: Literal["mean", "end", "line"]
    tol: float = 1e-6

    def pull_back(self, cotangent: Tensor, asked: Asked = _ALONE) -> PulledBack:
        """λ through the flow of each segment, the last first."""
        own, block, parameters = self.stage.to(), self.block, self.stage.parameters
        decay = parameters.take(self.path.flow(self.stage)[1], block)
        rates = self.path.optimiser.rates(self.stage)[0]
        scores = cotangent.new_zeros(self.stage.size, cotangent.shape[1])
        for x, tau, factor in reversed(self._segments()):
            own.load_vector(parameters.replaced(self.path.end, x, block))
            root = (torch.ones_like(x) * rates * factor).sqrt()
            (inner, flowed), _ = functions_of(
                Scaled(Hessian(own, block), root, decay),
                root[:, None] * parameters.take(cotangent, block),
                _flow(tau),
                tol=self.tol,
            )
            u = root[:, None] * inner
            blocks = own.directional_derivatives(parameters.put(u, block))
            scores -= torch.cat(list(blocks))
            of_held = parameters.take(cotangent, self.held)
            if self.held:
                of_held = of_held - CrossHessian(own, self.held, block) @ u
            cotangent = parameters.put(flowed / root[:, None], block)
            cotangent = cotangent + parameters.put(of_held, self.held)
        return PulledBack(self.stage.split(cotangent)[0], None, scores)

    def _segments(self) -> list[_Segment]:
        """Parts as equal in length as the states that the path has kept allow."""
        path, kept = self.path, sorted(self.path.states)
        if self.at == "line":
            return self._on_a_line()
        count = min(self.count, len(kept) - 1)
        bounds = [kept[round(n * (len(kept) - 1) / count)] for n in range(count + 1)]
        found = []
        for begin, end in itertools.pairwise(bounds):
            within = torch.stack([path.states[n].x for n in kept if begin <= n <= end])
            x = within.mean(0) if self.at == "mean" else path.states[end].x
            time = sum(path.learning_rates[begin:end]) * path.optimiser.slowness
            found.append(_Segment(x, time, path.optimiser.scaling(path.states[end])))
        return found

    def _on_a_line(self) -> list[_Segment]:
        """Equal parts of the time, each at the middle of its part of the line."""
        path, take = self.path, self.stage.parameters.take
        start, end = take(path.start, self.block), take(path.end, self.block)
        scale, time = path.optimiser.scaling(path.states[len(path)]), path.time / self.count
        return [
            _Segment(start.lerp(end, (number + 0.5) / self.count), time, scale)
            for number in range(self.count)
        ]


def _flow(tau: float) -> Sequence[Callable[[Tensor], Tensor]]:
    """φ(σ) and e^(−τσ⁺)."""

    def phi(sigma: Tensor) -> Tensor:
        positive = sigma > 0
        safe = torch.where(positive, sigma, 1.0)
        return torch.where(positive, -torch.expm1(-tau * safe) / safe, tau)

    return phi, lambda sigma: torch.exp(-tau * sigma.clamp_min(0))
