"""The error budget: the exact derivative with one factor exchanged at a time.

Each row leaves all else exact, so that what it loses against ``unrolled → unrolled`` is what this
factor costs. Three rows of the table belong here too: ``stopped → unrolled``, ``optimum →
unrolled`` and ``HYDRA``. Those of the paths take another link for a whole training, the others
change what each step back takes (:mod:`benchmarks.two_stage.walks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.two_stage.exact import stopped
from benchmarks.two_stage.methods import by_steps, register
from benchmarks.two_stage.settings import Problem
from benchmarks.two_stage.walks import (
    Change,
    damped,
    ekfac_of,
    gauss_newton,
    gradients_at,
    hessian_at,
    scores,
    walk,
    without_cross,
    without_hessian,
)
from msif_lib import Chain
from msif_lib.curvature import Hessian
from msif_lib.descent import Path
from msif_lib.links import Frozen, Link, Proximal, Unrolled
from msif_lib.optimisers import AdamW, Rate, State
from msif_lib.solvers import MinRes
from msif_lib.support.data import map_leaves

#: What is made of a link: the change of its walk.
Factor = Callable[[Unrolled], Change]

#: Factors that are exchanged in each step back of a training, by what a row says of them.
FACTORS: dict[str, Factor] = {
    "Gauss–Newton in each step": lambda link: gauss_newton,
    "Hessians left out": lambda link: without_hessian,
    "Hessians without embedding × head": lambda link: without_cross,
    "Hessians at the end of the path": lambda link: hessian_at(_end(link)),
    "examples' gradients at the end": lambda link: gradients_at(_end(link)),
    "EK-FAC at the end of the path": lambda link: ekfac_of(link.stage),
}
#: Added to each Hessian, in shares of the largest eigenvalue at the end of the path.
DAMPINGS = (1e-3, 1e-2, 1e-1)


def _end(link: Unrolled) -> Tensor:
    return link.stage.parameters.take(link.path.end, link.stage.trained)


def exchanged(of: Problem, factor: Factor, number: int) -> Tensor:
    """The walk with a factor exchanged in pretraining (0) or in finetuning (1)."""
    changes: list[Change | None] = [None, None]
    changes[number] = factor(of.chain.links[number])
    return walk(of, *changes)


for _number, _name in enumerate(("pretraining", "finetuning")):
    for _says, _factor in FACTORS.items():
        # The gradients of finetuning's examples are in none of these scores.
        if not (_number and _says.startswith("examples")):
            register(f"{_name}: {_says}", only=by_steps, effort=2, group="budget")(
                partial(exchanged, factor=_factor, number=_number)
            )


@register("both trainings: Gauss–Newton in each step", only=by_steps, effort=2, group="budget")
def gauss_newton_in_both(of: Problem) -> Tensor:
    """Gauss-Newton in the place of each batch's Hessian."""
    return walk(of, gauss_newton, gauss_newton)


def largest_eigenvalue(link: Link, products: int = 30) -> float:
    """Of the Hessian where the link's training ended, by power iterations."""
    operator = Hessian(link.stage, link.stage.trained)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64).to(operator.dtype)
    for _ in range(products):
        v = operator @ (v / v.norm())
    return float(v.norm())


def with_damping(of: Problem, share: float) -> Tensor:
    """λI added to every Hessian of both trainings, λ a share of the largest eigenvalue."""
    first, second = (damped(share * largest_eigenvalue(link)) for link in of.chain.links)
    return walk(of, first, second)


for _share in DAMPINGS:
    register(f"both trainings: damping of {_share:g} σ₁", only=by_steps, effort=2, group="budget")(
        partial(with_damping, share=_share)
    )


@dataclass(frozen=True)
class HeldScale(AdamW):
    """AdamW whose adjoint takes √v̂ + ε for a constant, as flows do that scale gradients by it."""

    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """λ_m' = λ_m − (η/c₁) λ_x/D, λ_g = (1−β₁) λ_m'."""
        _, v, c1, c2 = self._moments(state, gradient)
        scale = rate / c1 / ((v / c2).sqrt() + self.eps)
        moment = cotangent.buffers[0] - scale * cotangent.x
        buffers = self.betas[0] * moment, torch.zeros_like(moment)
        shrunk = (1 - rate * decay) * cotangent.x
        return (1 - self.betas[0]) * moment, State(shrunk, buffers, state.step)


def _by_adam(of: Problem) -> bool:
    link = of.chain.links[0]
    return isinstance(link, Unrolled) and isinstance(link.path.optimiser, AdamW)


@register(
    "both trainings: Adam's scale taken for constant", only=_by_adam, effort=2, group="budget"
)
def scale_held(of: Problem) -> Tensor:
    """No derivative of Adam's second moment."""
    return scores(of, *(_held(link) for link in of.chain.links))


def _held(link: Unrolled) -> Unrolled:
    known = {one.name: getattr(link.path.optimiser, one.name) for one in fields(AdamW)}
    return Unrolled(link.stage, replace(link.path, optimiser=HeldScale(**known)))


# --- whole trainings -----------------------------------------------------------------------------


@register("finetuning: gradient flow at its end", only=by_steps, effort=2, group="budget")
def finetuning_stopped(of: Problem) -> Tensor:
    """The finetuning path not kept."""
    return scores(of, None, stopped(of, 1))


@register("finetuning: at an optimum, embedding fixed", only=by_steps, effort=2, group="budget")
def finetuning_frozen(of: Problem) -> Tensor:
    """Case 1 of the paper in the place of the finetuning path."""
    return scores(of, None, Frozen(of.finetune, _solver()))


@register("finetuning: at an optimum, proximal", only=by_steps, effort=2, group="budget")
def finetuning_proximal(of: Problem) -> Tensor:
    """Case 2 of the paper with α = 1/(2τ), which pulls as a flow of length τ does.

    Where finetuning keeps the embedding this is case 1.
    """
    if of.setting.frozen:
        return finetuning_frozen(of)
    alpha = 1 / (2 * of.chain.links[1].path.time)
    return scores(of, None, Proximal(of.finetune, alpha, _solver()))


def _solver() -> MinRes:
    return MinRes(tol=1e-3, damping="auto", max_iterations=500)


@register("single precision", only=by_steps, effort=2, group="budget")
def in_single_precision(of: Problem) -> Tensor:
    """Steps and walks in float32, along the same states."""
    links = [Unrolled(link.stage.to(torch.float32), _single(link.path)) for link in of.chain.links]
    test = map_leaves(
        lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, of.data.functionals
    )
    chain = Chain(links, progress=False)
    return chain.scores(test, per_test=True)[0].values.double() / of.size


def _single(path: Path) -> Path:
    states = {
        step: State(state.x.float(), tuple(part.float() for part in state.buffers), step)
        for step, state in path.states.items()
    }
    return replace(path, start=path.start.float(), end=path.end.float(), states=states)
