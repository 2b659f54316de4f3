"""Rows of the exact derivative, of its centres, and of what needs less of the paths.

All are dq/dw_i in units of the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.two_stage.methods import at_optimum, by_steps, register
from benchmarks.two_stage.settings import Problem
from benchmarks.two_stage.walks import InSegments, passing, scores, walk, without_hessian
from msif_lib.links import Optimum, Stopped
from msif_lib.retraining import with_weights
from msif_lib.solvers import MinRes

# Relative change at which Lanczos stops. Scores then differ from converged ones by less than 1 %,
# and datamodeling scores by about .001.
_TOL = 2e-2
#: Numbers of segments that are tried.
SEGMENTS = (1, 3)
_RUNS = 4


def _of_chain(of: Problem, weights: float | Tensor | None = None) -> Tensor:
    """dq/dw_i ``(m, T)`` at other weights of the pretraining examples, if given."""
    chain = of.chain
    if weights is not None:
        chain = with_weights(chain, weights, progress=False)
    return chain.scores(of.data.functionals, per_test=True)[0].values / of.size


@register("unrolled → unrolled", only=by_steps)
def unrolled(of: Problem) -> Tensor:
    """The exact derivative, back through every step of both trainings."""
    return _of_chain(of)


@register("optimum → proximal", only=at_optimum)
def optimum_proximal(of: Problem) -> Tensor:
    """The exact derivative where both trainings end at an optimum: the paper's case 2."""
    return _of_chain(of)


@register("the same, at the centre", by_share=True)
def at_the_centre(of: Problem, share: float) -> Tensor:
    """The exact derivative of the model trained with all pretraining weights 1 − share.

    There the subsets left out lie on average. It costs both trainings once more.
    """
    return _of_chain(of, 1 - share)


def mean_of_runs(of: Problem, share: float, runs: int) -> Tensor:
    """The mean of exact derivatives over trainings without random subsets of their own.

    Of each example over the runs that keep it: where Adam moves a parameter by left-out examples
    alone, the derivative by their weight at 0 is of the size of 1/ε.
    """
    generator = torch.Generator().manual_seed(1000 + of.seed)
    total = torch.zeros(of.size, of.functionals, dtype=torch.float64)
    kept = torch.zeros(of.size, 1, dtype=torch.float64)
    while runs > 0 or not kept.all():
        weights = torch.ones(of.size, dtype=torch.float64)
        weights[torch.randperm(of.size, generator=generator)[: round(share * of.size)]] = 0
        total += weights[:, None] * _of_chain(of, weights)
        kept += weights[:, None]
        runs -= 1
    return total / kept


@register("mean over subset runs", effort=2, by_share=True, shares=(0.5,))
def over_runs(of: Problem, share: float) -> Tensor:
    """A centre for optimisers that hardly see a common factor of all weights, as Adam's.

    At least 4 runs, and as many as it takes to keep each example once: about 10 at 50 %. How many
    was chosen for cost. One rough run among them can own the mean.
    """
    return mean_of_runs(of, share, _RUNS)


@register("stopped → unrolled", effort=1, only=by_steps)
def stopped_unrolled(of: Problem) -> Tensor:
    """The pretraining path not kept: gradient flow at its end, for as long as it took."""
    return scores(of, stopped(of, 0))


@register("stopped → stopped", effort=2, only=by_steps)
def stopped_stopped(of: Problem) -> Tensor:
    """No path kept: SOURCE with one segment, by exact Hessians (Bae et al. 2024)."""
    return scores(of, stopped(of, 0), stopped(of, 1))


def stopped(of: Problem, number: int) -> Stopped:
    """The flow in the place of a training's path."""
    link = of.chain.links[number]
    found = Stopped.of(link.stage, link.path)
    return Stopped(found.stage, found.time, "hessian", found.scale, found.decay, tol=_TOL)


def in_segments(of: Problem, count: float, at: Literal["mean", "line"], both: bool) -> Tensor:
    """One or both trainings in segments."""
    links = [
        InSegments(link.stage, link.path, int(count), at, _TOL)
        for link in (of.chain.links if both else of.chain.links[:1])
    ]
    return scores(of, *links)


@register("in segments → in segments", effort=2, only=by_steps, tried=SEGMENTS)
def segments_segments(of: Problem, count: float) -> Tensor:
    """SOURCE (Bae et al. 2024), with exact Hessians where they have EK-FAC.

    They average curvature and gradients over checkpoints of a segment, here both are taken at the
    mean of its states.
    """
    return in_segments(of, count, "mean", True)


@register("in segments → unrolled", effort=2, only=by_steps, tried=SEGMENTS)
def segments_unrolled(of: Problem, count: float) -> Tensor:
    """SOURCE for pretraining, of which some states are kept; the exact adjoint of finetuning."""
    return in_segments(of, count, "mean", False)


@register("on a straight line → unrolled", effort=1, only=by_steps, tried=SEGMENTS)
def line_unrolled(of: Problem, count: float) -> Tensor:
    """No path of pretraining but its two ends: as many segments, on the line between them.

    Besides it takes how long the training was, and what Adam scaled gradients by at its end.
    """
    return in_segments(of, count, "line", False)


@register("optimum → unrolled", effort=1, only=by_steps)
def optimum_unrolled(of: Problem) -> Tensor:
    """Pretraining taken for one that ended at its optimum: (H + λ)⁻¹ there, λ automatic."""
    solver = MinRes(tol=1e-3, damping="auto", max_iterations=500)
    return scores(of, Optimum(of.pretrain, solver))


@register("HYDRA", only=by_steps)
def hydra(of: Problem) -> Tensor:
    """The recursion through the steps without Hessians (Chen et al. 2021), in both trainings.

    Momentum, weight decay and, of AdamW, the derivatives of both moments are kept. Through
    finetuning λ goes back by the optimiser's adjoint alone.
    """
    return walk(of, without_hessian, passing)
