"""torch-influence: SciPy's conjugate gradients, gradients one example at a time.

It is installed from its repository (github.com/alstonlo/torch-influence) and is on no package
index. Where it cannot be imported the record says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.libraries.base import Exact, loader
from benchmarks.problems import Problem

BATCH = 250


def _module(problem: Problem, setting: float, limit: int) -> Any:
    from torch_influence import BaseObjective, CGInfluenceModule

    class Objective(BaseObjective):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0])

        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

        def train_regularization(self, params: Tensor) -> Tensor:
            return 0.0 * params.sum()  # the weight decay is part of the damping

        def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

    test = DataLoader(TensorDataset(*problem.test))
    return CGInfluenceModule(
        problem.model, Objective(), loader(problem, BATCH), test, torch.device("cpu"),
        damp=problem.shift, rtol=setting, atol=0.0, maxiter=limit,
    )  # fmt: skip


@dataclass(frozen=True)
class TorchInfluence(Exact):
    """``CGInfluenceModule``."""

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        module = _module(problem, setting, limit)
        return torch.stack([module.inverse_hvp(column) for column in b.unbind(1)], 1)

    def scorer(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        module, size = _module(problem, 1e-3, 1), len(problem.inputs)
        everything = list(range(size))

        def scores(x: Tensor) -> Tensor:
            # It gives the change of the loss on removal, which is −1/m of the score.
            columns = [module.influences(everything, [0], stest=v) for v in x.unbind(1)]
            return -size * torch.stack(columns, 1)

        return scores


METHODS = [
    TorchInfluence(
        "torch-influence CG", "torch-influence", ("torch_influence",), most_columns=1,
        several_scores=False, note="one right-hand side at a time",
    )
]  # fmt: skip
