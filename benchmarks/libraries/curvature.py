"""curvlinops: the Hessian as an operator, its inverse by conjugate gradients; no scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.libraries.base import Exact, loader
from benchmarks.problems import Problem

BATCH = 250


@dataclass(frozen=True)
class Curvlinops(Exact):
    """``CGInverseLinearOperator``, whose solver is that of linear_operator."""

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        from curvlinops import HessianLinearOperator
        from linear_operator.utils.linear_cg import linear_cg

        model = problem.model
        hessian = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), loader(problem, BATCH),
            check_deterministic=False,
        )  # fmt: skip
        # What CGInverseLinearOperator calls; it has no place for a multiple of the identity.
        with torch.no_grad():
            return linear_cg(
                lambda v: hessian @ v + problem.shift * v, b, tolerance=setting,
                max_iter=limit, max_tridiag_iter=0,
            )  # fmt: skip


METHODS = [
    Curvlinops(
        "curvlinops CG", "curvlinops-for-pytorch", ("curvlinops", "linear_operator"),
        separate_scores=False, note="no scores; its check of determinism is switched off",
    )
]  # fmt: skip
