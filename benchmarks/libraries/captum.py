"""captum: Arnoldi's approximation of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.libraries.base import Approximate
from benchmarks.problems import Problem

BATCH = 250


@dataclass(frozen=True)
class CaptumArnoldi(Approximate):
    """``ArnoldiInfluenceFunction``."""

    def fit(self, problem: Problem) -> Callable[[int], Tensor]:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

        influence = ArnoldiInfluenceFunction(
            problem.model, TensorDataset(problem.inputs, problem.targets), "",
            checkpoints_load_func=lambda model, path: 1.0,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=BATCH,
            sample_wise_grads_per_batch=True, projection_dim=25, arnoldi_dim=50,
            # Its Hessian is of the summed loss.
            hessian_reg=len(problem.inputs) * problem.shift,
        )  # fmt: skip
        return lambda count: -influence.influence(tuple(part[:count] for part in problem.test)).T


METHODS = [
    CaptumArnoldi(
        "captum Arnoldi", "captum", ("captum.influence",),
        note="rank 25 of 50 iterations; Hessian of the summed loss, so that its scores are 1/m "
        "of the others'",
    )
]  # fmt: skip
