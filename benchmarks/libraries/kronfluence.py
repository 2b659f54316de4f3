"""kronfluence: EK-FAC in place of the Hessian."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.libraries.base import Approximate
from benchmarks.problems import Problem


def _task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, targets = batch
            outputs = model(inputs)
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(outputs.softmax(1), 1).flatten()
            return F.cross_entropy(outputs, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()


@dataclass(frozen=True)
class Ekfac(Approximate):
    """``Analyzer`` with the strategy ``ekfac``."""

    def fit(self, problem: Problem) -> Callable[[int], Tensor]:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments

        torch.manual_seed(0)
        # Its own precisions, but for the gradients: float64 where the model is.
        dtype = problem.dtype
        factor_arguments = FactorArguments(
            strategy="ekfac", activation_covariance_dtype=dtype, gradient_covariance_dtype=dtype,
            per_sample_gradient_dtype=dtype, lambda_dtype=dtype,
        )  # fmt: skip
        score_arguments = ScoreArguments(
            damping_factor=problem.shift, per_sample_gradient_dtype=dtype, score_dtype=dtype,
            query_gradient_svd_dtype=dtype, precondition_dtype=dtype,
        )  # fmt: skip
        task, train = _task(), TensorDataset(problem.inputs, problem.targets)
        folder = tempfile.TemporaryDirectory()
        analyzer = Analyzer(
            "bench", prepare_model(problem.model, task), task, cpu=True, disable_tqdm=True,
            output_dir=folder.name,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=500, factor_args=factor_arguments
        )

        def scores(count: int) -> Tensor:
            name = f"scores{count} of {folder.name[-8:]}"
            analyzer.compute_pairwise_scores(
                name, "factors", TensorDataset(*(part[:count] for part in problem.test)), train,
                per_device_query_batch_size=count, per_device_train_batch_size=500,
                score_args=score_arguments,
            )  # fmt: skip
            return -analyzer.load_pairwise_scores(name)["all_modules"].T

        return scores


METHODS = [
    Ekfac(
        "kronfluence EK-FAC", "kronfluence", ("kronfluence.analyzer",),
        note="eigenvalue-corrected Kronecker factors of the Fisher matrix",
    )
]  # fmt: skip
