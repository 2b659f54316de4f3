"""Error of the scores in float32, TF32 and bfloat16 against the dense answer in float64.

    python -m benchmarks.precision

trains a two-stage problem on scikit-learn's digits in float64, once with the weight decay that
makes its systems well conditioned and once with so little that they are nearly singular, and
computes the scores of case 1 and case 2 in each precision. It writes
``results/benchmarks/precision.json``; ``--quick`` writes a small one under ``build/bench/quick``.
TF32 is a mode of GPUs, so that what it does is seen with

    python -m benchmarks.precision --device cuda --out results/benchmarks/cuda

In "bfloat16 products" the modules keep float32 parameters and evaluate under ``torch.autocast``,
so that what is summed over the data is computed in bfloat16 and the solver's recurrences are in
float32. In "bfloat16" everything is of that type.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks.command import make_parser, parse, record
from benchmarks.measure import listening, pearson, plain_text
from msif_lib import FixedEmbeddingInfluence, Stage, UpdatedEmbeddingInfluence, cross_entropy
from msif_lib.curvature import Hessian, proximal_hessian
from msif_lib.solvers import Dense, FailedSolve, MinRes, Solution
from msif_lib.study.data.datasets import two_stages
from msif_lib.study.models.networks import build_model
from msif_lib.training import train

ALPHA = 0.01
# Weight decay of both stages.
REGIMES = {"well conditioned": 2e-2, "nearly singular": 1e-5}
CASES = ("case 1", "case 2")


@dataclass
class Watched:
    """A solver that keeps what it was asked and what it answered."""

    solver: Any
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def solve(self, operator: Any, b: Tensor, *, progress: bool = False) -> Solution:
        solution = self.solver.solve(operator, b, progress=progress)
        self.kept.append((b, solution.x))
        return solution


class Autocast(nn.Module):
    """A module evaluated in bfloat16, its parameters and its output in float32."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module, self.device = module, device

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.module(inputs).float()


@dataclass(frozen=True)
class Problem:
    """Two stages at their optima, in float64: of case 1 and of case 2."""

    pretrain: Stage
    finetune: Stage
    tuned: Stage
    test: tuple[Tensor, Tensor]
    gradient_norms: dict[str, float]


def build(l2: float, options: argparse.Namespace) -> Problem:
    """Train all stages."""
    data = two_stages(
        "digits", pretrain_size=options.examples, finetune_size=options.examples,
        test_size=options.tests, seed=options.seed,
    )  # fmt: skip
    embedding, head, finetune_head = build_model(
        "cnn", "linear", data.images.image_shape, len(data.pretrain_classes),
        len(data.finetune_classes), options.seed, widths=options.widths,
    )  # fmt: skip
    pretrain = Stage(embedding, head, cross_entropy, data.pretrain, l2=l2)
    norms = {"pretraining": train(pretrain, options.tol, seed=options.seed).gradient_norm}
    finetune = Stage(embedding, finetune_head, cross_entropy, data.finetune, l2=l2)
    report = train(finetune, options.tol, head_only=True, seed=options.seed)
    norms["finetuning, case 1"] = report.gradient_norm
    moved = copy.deepcopy(embedding), copy.deepcopy(finetune_head)
    tuned = Stage(*moved, cross_entropy, data.finetune, l2=l2)
    towards = pretrain.embedding_vector()
    report = train(
        tuned, options.tol, towards=towards, alpha=ALPHA, epochs=0, seed=options.seed,
        lbfgs_evaluations=20_000,
    )  # fmt: skip
    norms["finetuning, case 2"] = report.gradient_norm
    return Problem(pretrain, finetune, tuned, data.test, norms)


def influence(case: str, problem: Problem, solver: Any) -> Any:
    stationarity: dict[str, Any] = {"stationarity_tol": float("inf"), "progress": False}
    if case == "case 1":
        return FixedEmbeddingInfluence(problem.pretrain, problem.finetune, solver, **stationarity)
    return UpdatedEmbeddingInfluence(problem.pretrain, problem.tuned, ALPHA, solver, **stationarity)


def converted(problem: Problem, change: Callable[[Stage], Stage], dtype: torch.dtype) -> Problem:
    """The problem with every stage changed, and the test inputs in another type."""
    stages = (change(stage) for stage in (problem.pretrain, problem.finetune, problem.tuned))
    device = problem.pretrain.device
    test = problem.test[0].to(device, dtype), problem.test[1].to(device)
    return Problem(*stages, test, problem.gradient_norms)


def autocast(stage: Stage) -> Stage:
    """The stage in float32, its modules evaluated in bfloat16."""
    stage = stage.to(torch.float32)
    device = stage.device.type
    modules = Autocast(stage.embedding, device), Autocast(stage.head, device)
    # The checks hold losses to the precision of float32.
    return Stage(*modules, stage.loss, stage.data, l2=stage.l2, check=False)  # type: ignore[arg-type]


@contextmanager
def fast_matrix_products(fast: bool) -> Iterator[None]:
    """TF32 in products and convolutions where the device has it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@dataclass(frozen=True)
class Setting:
    """A precision: how a float64 problem is brought to it, and the tolerance of its solves."""

    name: str
    dtype: torch.dtype
    change: Callable[[Stage], Stage]
    tol: float | None = None
    fast: bool = False


def _single(stage: Stage) -> Stage:
    return stage.to(torch.float32)


SETTINGS = (
    Setting("float64", torch.float64, lambda stage: stage.to(torch.float64)),
    Setting("float64, to 1e-4", torch.float64, lambda stage: stage.to(torch.float64), 1e-4),
    Setting("float32", torch.float32, _single),
    Setting("float32, to 1e-6", torch.float32, _single, 1e-6),
    Setting("float32, TF32 allowed", torch.float32, _single, fast=True),
    Setting("bfloat16 products", torch.float32, autocast),
    Setting("bfloat16", torch.bfloat16, lambda stage: stage.to(torch.bfloat16)),
)


def spearman(values: Tensor, wanted: Tensor) -> float:
    """Correlation of the ranks; 0 where one side is constant, as in :func:`pearson`."""
    ranks = (torch.from_numpy(rankdata(side.cpu()))[:, None] for side in (values, wanted))
    return pearson(*ranks)[0]


def residual(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    """‖b − matrix x‖/‖b‖ of one system or a block, and 0 where b and x are zero."""
    length = float(b.norm())
    return float((b - matrix @ x).norm()) / length if length else float((matrix @ x).norm())


def measure(
    case: str, setting: Setting, exact: Problem, wanted: Tensor, matrices: list[Tensor]
) -> dict[str, Any]:
    """Error of the scores, and the residuals of the two solves, measured and reported."""
    watched = Watched(MinRes(tol=setting.tol))
    with listening() as words, fast_matrix_products(setting.fast):
        try:
            problem = converted(exact, setting.change, setting.dtype)
            scores = influence(case, problem, watched).scores(problem.test)
        except Exception as error:
            status = "failed solve" if isinstance(error, FailedSolve) else "failed"
            return {"status": status, "error": plain_text(f"{type(error).__name__}: {error}")}
    values = scores.values.double()
    residuals = [
        residual(matrix, x.double(), b.double())
        for matrix, (b, x) in zip(matrices, watched.kept, strict=True)
    ]
    return {
        "status": "ok",
        "error_of_the_scores": float((values - wanted).norm() / wanted.norm()),
        "pearson": pearson(values[:, None], wanted[:, None])[0],
        "spearman": spearman(values, wanted),
        "residuals": residuals,
        "residuals_reported": [report.residual for report in scores.solves],
        "converged": all(report.converged for report in scores.solves),
        "iterations": [report.iterations for report in scores.solves],
        "products": sum(report.products for report in scores.solves),
        "words": words,
    }


def spectrum(matrix: Tensor) -> dict[str, float]:
    values = torch.linalg.eigvalsh(matrix)
    return {
        "size": len(values),
        "lowest": float(values[0]),
        "highest": float(values[-1]),
        "condition": float(values.abs().max() / values.abs().min()),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All precisions, on both kinds of systems and in both cases."""
    found: dict[str, Any] = {}
    for regime, l2 in REGIMES.items():
        trained = build(l2, options)
        exact = converted(trained, lambda stage: stage.to(device=options.device), torch.float64)
        h = Hessian(exact.pretrain).dense()
        systems = {
            "case 1": [Hessian(exact.finetune, block="head").dense(), h],
            "case 2": [proximal_hessian(exact.tuned, ALPHA).dense(), h],
        }
        found[regime] = {
            "l2": l2,
            "gradient_norms": exact.gradient_norms,
            "spectra": {
                "F_ΘΘ": spectrum(systems["case 1"][0]),
                "K": spectrum(systems["case 2"][0]),
                "H_G": spectrum(h),
            },
            "cases": {},
        }
        for case in CASES:
            wanted = influence(case, exact, Dense()).scores(exact.test).values
            rows = found[regime]["cases"][case] = {}
            for setting in SETTINGS:
                row = rows[setting.name] = measure(case, setting, exact, wanted, systems[case])
                error = row.get("error_of_the_scores")
                shown = row.get("error") if error is None else f"error of the scores {error:.1e}"
                print(f"{regime:17} {case}  {setting.name:22} {shown}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the record."""
    options = parse(make_parser("precision", __doc__), arguments)
    options.examples, options.tests, options.widths, options.tol = 400, 200, [6, 8], 1e-8
    if options.quick:
        options.examples, options.tests, options.widths = 60, 20, [2, 2]
    values = {"regimes": run(options)}
    return record(options, "precision", "digits", values, torch.float64, alpha=ALPHA)


if __name__ == "__main__":
    main()
