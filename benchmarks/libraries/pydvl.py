"""pyDVL: conjugate gradients one by one, and block conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.libraries.base import Exact, loader
from benchmarks.problems import Problem

# It averages the batches' means whatever their sizes: those must be equal, and so divide m.
BATCH = 200


@dataclass(frozen=True)
class PyDvl(Exact):
    """``CgInfluence``."""

    block: bool = False

    def _model(self, problem: Problem, setting: float, limit: int) -> Any:
        from pydvl.influence.torch import CgInfluence

        # Its bound is max(rtol² ‖·‖, atol²), with a norm over the wrong axis where the columns are
        # solved one by one: of the two only atol means something.
        return CgInfluence(
            problem.model, F.cross_entropy, regularization=problem.shift, rtol=0.0,
            atol=setting**0.5, maxiter=limit, solve_simultaneously=self.block,
        ).fit(loader(problem, BATCH))  # fmt: skip

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        (block,) = self._model(problem, setting, limit).block_mapper.composable_block_dict.values()
        return block.op.apply(b.T.contiguous()).T

    def scorer(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        model = self._model(problem, 1e-3, 1)

        def scores(x: Tensor) -> Tensor:
            batches = zip(problem.inputs.split(BATCH), problem.targets.split(BATCH))
            blocks = [model.influences_from_factors(x.T, *batch) for batch in batches]
            return -torch.cat(blocks, 1).T

        return scores


METHODS = [
    PyDvl(
        "pyDVL CG",
        "pyDVL",
        ("pydvl.influence.torch",),
        note="columns one after the other; its batches must divide the examples, as it averages "
        "their means whatever their sizes; only its absolute tolerance is used, as the relative "
        "one takes a norm over the wrong axis",
    ),
    PyDvl("pyDVL block CG", "pyDVL", ("pydvl.influence.torch",), block=True, separate_scores=False),
]
