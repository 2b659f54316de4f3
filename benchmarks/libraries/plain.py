"""What one writes without a library: conjugate gradients on a linearisation, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from benchmarks.libraries.base import Exact
from benchmarks.problems import Problem, linearised, losses_of


@dataclass(frozen=True)
class Plain(Exact):
    """The gradient is linearised once; columns are solved one after the other."""

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        product = linearised(problem)

        def solved(b: Tensor) -> Tensor:
            x, r, d = torch.zeros_like(b), b, b
            rho, target = r @ r, (setting * b.norm()) ** 2
            for _ in range(limit):
                if rho <= target:
                    break
                q = product(d)
                step = rho / (d @ q)
                x, r = x + step * d, r - step * q
                rho, previous = r @ r, rho
                d = r + rho / previous * d
            return x

        return torch.stack([solved(column) for column in b.unbind(1)], 1)

    def scorer(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        losses, theta = losses_of(problem)

        def scores(x: Tensor) -> Tensor:
            return -torch.stack([jvp(losses, (theta,), (v,))[1] for v in x.unbind(1)], 1)

        return scores


METHODS = [
    Plain("plain CG", "torch", ("torch.func",), note="linearised once, scores by forward mode")
]
