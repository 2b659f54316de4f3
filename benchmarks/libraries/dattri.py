"""dattri: conjugate gradients for a fixed number of iterations, and Arnoldi's approximation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.libraries.base import Approximate, Exact, loader
from benchmarks.problems import Problem

BATCH = 250


def _task(problem: Problem) -> Any:
    from dattri.task import AttributionTask

    model = problem.model

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, data[0])
        return F.cross_entropy(outputs, data[1].long())

    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


@dataclass(frozen=True)
class DattriCg(Exact):
    """``IFAttributorCG``; all of the data as one batch, or each batch's own Hessian is solved."""

    def solve(self, problem: Problem, b: Tensor, setting: float, limit: int) -> Tensor:
        from dattri.algorithm.influence_function import IFAttributorCG

        attributor = IFAttributorCG(
            _task(problem), max_iter=min(int(setting), limit), regularization=problem.shift
        )
        attributor.cache(loader(problem, len(problem.inputs)))
        return attributor.transform_test_rep(0, b.T).T

    def scorer(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        from dattri.algorithm.influence_function import IFAttributorCG

        attributor = IFAttributorCG(_task(problem), regularization=problem.shift)

        def scores(x: Tensor) -> Tensor:
            blocks = []
            for batch in zip(problem.inputs.split(BATCH), problem.targets.split(BATCH)):
                data = tuple(part[None] for part in batch)
                blocks.append(-attributor.generate_train_rep(0, data) @ x)
            return torch.cat(blocks)

        return scores


@dataclass(frozen=True)
class DattriArnoldi(Approximate):
    """``IFAttributorArnoldi``."""

    def fit(self, problem: Problem) -> Callable[[int], Tensor]:
        from dattri.algorithm.influence_function import IFAttributorArnoldi

        attributor = IFAttributorArnoldi(
            _task(problem), proj_dim=25, max_iter=50, regularization=problem.shift
        )
        attributor.cache(loader(problem, len(problem.inputs)))

        def scores(count: int) -> Tensor:
            test = TensorDataset(*(part[:count] for part in problem.test))
            return -attributor.attribute(loader(problem, BATCH), DataLoader(test, count))

        return scores


METHODS = [
    DattriCg(
        "dattri CG", "dattri", ("dattri.algorithm.influence_function",),
        settings=(16, 32, 64),
        fixed_iterations=True, most_columns=1,
        note="iterations are fixed beforehand (its tolerance is ignored); all of the data is one "
        "batch, since it solves with each batch's own Hessian and adds the solutions; one "
        "right-hand side, as several at once multiply its memory",
    ),
    DattriArnoldi(
        "dattri Arnoldi", "dattri", ("dattri.algorithm.influence_function",),
        note="rank 25 of 50 iterations",
    ),
]  # fmt: skip
