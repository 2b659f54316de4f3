"""This library: block MINRES, preconditioned, and conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.libraries.base import Exact
from benchmarks.problems import Problem


def stage_of(problem: Problem) -> Any:
    from msif_lib import Stage, cross_entropy

    data = problem.inputs, problem.targets
    return Stage(problem.embedding, problem.head, cross_entropy, data, l2=problem.l2)


@dataclass(frozen=True)
class Ours(Exact):
    """A solver of :mod:`msif_lib.solvers`."""

    solver: str = "MinRes"
    options: dict[str, Any] = field(default_factory=dict)

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        from msif_lib import solvers
        from msif_lib.curvature import Hessian

        solver = getattr(solvers, self.solver)(
            tol=setting, damping=problem.damping, max_iterations=limit, **self.options
        )
        return solver.solve(Hessian(stage_of(problem)), b).x

    def scorer(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        stage = stage_of(problem)
        return lambda x: -torch.cat(list(stage.directional_derivatives(x)))


def _ours(name: str, **more: Any) -> Ours:
    return Ours(f"msif {name}", "msif", ("msif_lib",), **more)


METHODS = [
    _ours("MinRes"),
    _ours(
        "MinRes, plain",
        note="without its preconditioner",
        options={"precondition": False},
        separate_scores=False,
    ),
    _ours("CG", solver="ConjugateGradient", separate_scores=False),
]
