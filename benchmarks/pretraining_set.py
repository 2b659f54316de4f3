"""The paper's job of 230 s: the scores of a whole pretraining set of 10,000 images.

    MSIF_DATA=/path/to/data python -m benchmarks.pretraining_set

takes all images of two classes of CIFAR-10 (bird, frog) as pretraining set and some of the other
eight classes as finetuning set, trains a tanh network of about 15,000 parameters in float32, and
computes all scores of case 1 (inverse products with F_ΘΘ and H_G) and of case 2 (K and H_G). On a
GPU:

    MSIF_DATA=/path/to/data python -m benchmarks.pretraining_set --device cuda --paper-examples 0 \
        --out results/benchmarks/cuda

The terms are the paper's: its recipe, conjugate gradients on (H² + λI) x = H b, is given so many
iterations, the residual of H x = b at which it arrives is measured, and that residual is what the
default solver is asked for, whose time is then taken; and again for `--tol`. On a CPU the 400
products of the recipe over 10,000 images take too long for a first look, so that it runs on
`--paper-examples` of each stage, and the residual is that of the smaller problem; 0 takes all. The
record says which.

Time is that of ``scores()``: graphs recorded, both solves, all scores. The unit is one gradient of
the pretraining objective over all images. Training is not part of it; the trained networks are kept
under ``build/bench``. Residuals are measured by the product of :mod:`benchmarks.reference`, in
float64. It writes ``results/benchmarks/pretraining_set.json``; ``--quick`` runs on scikit-learn's
digits and writes under ``build/bench/quick``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from benchmarks.cache import keep, kept
from benchmarks.command import CACHE, make_parser, parse, record
from benchmarks.problems import Spec
from benchmarks.problems import train as train_model
from benchmarks.reference import Product
from benchmarks.sentences import seconds
from msif_lib import FixedEmbeddingInfluence, Stage, UpdatedEmbeddingInfluence, cross_entropy
from msif_lib.solvers import ConjugateGradient, MinRes, Solution, SolveReport, SolverWarning
from msif_lib.study.data.datasets import two_stages
from msif_lib.study.models.networks import build_model
from msif_lib.support.minimise import minimise

PAPER_SECONDS = 230
ALPHA = 0.01
MODULES = ("embedding", "head", "finetune_head", "tuned_embedding", "tuned_head")
CASES = {"case 1": ("F_ΘΘ", "H_G"), "case 2": ("K", "H_G")}
# A residual is asked for that a float32 solve reaches, and that is a residual at all.
LOWEST, HIGHEST = 1e-5, 0.9


@dataclasses.dataclass(frozen=True)
class Networks:
    """The trained modules of both stages, on the CPU, and the gradient norms where they ended."""

    embedding: nn.Module
    head: nn.Module
    finetune_head: nn.Module
    tuned_embedding: nn.Module
    tuned_head: nn.Module
    gradient_norms: dict[str, float]
    seconds: float


@dataclasses.dataclass
class Watched:
    """A solver that keeps what it was asked, what it answered and how long that took."""

    solver: Any
    device: str
    kept: list[tuple[Tensor, Tensor, SolveReport, float]] = dataclasses.field(default_factory=list)

    def solve(self, operator: Any, b: Tensor, *, progress: bool = False) -> Solution:
        found: list[Solution] = []

        def work() -> None:
            found.append(self.solver.solve(operator, b, progress=progress))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolverWarning)  # the report stands in the record
            taken = seconds(work, self.device)
        self.kept.append((b, found[0].x, found[0].report, taken))
        return found[0]


# --- the problem ---------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> Any:
    """Pretraining, finetuning and test data, in float32."""
    return two_stages(
        options.dataset, pretrain_size=options.examples, finetune_size=options.finetune_examples,
        test_size=options.tests, seed=options.seed, dtype=torch.float32,
    )  # fmt: skip


def modules(data: Any, options: argparse.Namespace) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Embedding and both heads, not yet trained."""
    return build_model(
        "cnn", "linear", data.images.image_shape, len(data.pretrain_classes),
        len(data.finetune_classes), options.seed, torch.float32, options.widths,
    )  # fmt: skip


def train(data: Any, options: argparse.Namespace) -> Networks:
    """Adam and L-BFGS for each stage, near a stationary point as far as the budget goes."""
    begin = time.perf_counter()
    embedding, head, finetune_head = modules(data, options)
    spec = Spec(
        "pretraining set", "", 0, 0, (0, 0), "float32", options.l2, None,
        options.epochs, options.evaluations, seed=options.seed,
    )  # fmt: skip
    norms = {
        "pretraining": train_model(nn.Sequential(embedding, head), *data.pretrain, spec),
    }
    inputs, targets = data.finetune
    with torch.no_grad():
        features = torch.cat([embedding(part) for part in inputs.split(250)])
    # The head alone is quick, and convex.
    quick = dataclasses.replace(spec, epochs=20, evaluations=500)
    norms["finetuning, case 1"] = train_model(finetune_head, features, targets, quick)

    tuned = Stage(
        copy.deepcopy(embedding), copy.deepcopy(finetune_head), cross_entropy, data.finetune,
        l2=options.l2,
    )  # fmt: skip
    towards = tuned.embedding_vector()

    def proximal(rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = tuned.objective_and_gradient(rows[0])
        away = rows[0, : len(towards)] - towards
        gradient = gradient.clone()
        gradient[: len(towards)] += 2 * ALPHA * away
        return (value + ALPHA * away @ away)[None], gradient[None]

    found = minimise(
        proximal, tuned.vector()[None], 1e-5, max_evaluations=options.evaluations, memory=50
    )
    tuned.load_vector(found.x[0])
    norms["finetuning, case 2"] = float(found.gradient_norms[0])
    return Networks(
        embedding, head, finetune_head, tuned.embedding, tuned.head, norms,
        time.perf_counter() - begin,
    )  # fmt: skip


def networks(data: Any, options: argparse.Namespace) -> Networks:
    """The trained modules, trained once and kept."""
    names = ("dataset", "examples", "finetune_examples", "widths", "l2", "epochs", "evaluations")
    words = [str(getattr(options, name)) for name in (*names, "seed")]
    key = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
    path = options.cache / f"pretraining-set-{options.dataset}-{key}.pt"
    known = kept(path)
    if known is not None:
        embedding, head, finetune_head = modules(data, options)
        fresh = [embedding, head, finetune_head, *map(copy.deepcopy, (embedding, finetune_head))]
        for name, module in zip(MODULES, fresh):
            module.load_state_dict(known[name])
        return Networks(**known | dict(zip(MODULES, fresh)))
    found = train(data, options)
    keep(path, vars(found) | {name: vars(found)[name].state_dict() for name in MODULES})
    return found


@dataclasses.dataclass(frozen=True)
class Problem:
    """The three stages on a device, with the test examples."""

    pretrain: Stage
    finetune: Stage
    tuned: Stage
    test: tuple[Tensor, Tensor]

    def influence(self, case: str, finetune_solver: Any, solver: Any) -> Any:
        settings: dict[str, Any] = {
            "solver": solver, "finetune_solver": finetune_solver,
            "stationarity_tol": float("inf"), "progress": False,
        }  # fmt: skip
        if case == "case 1":
            return FixedEmbeddingInfluence(self.pretrain, self.finetune, **settings)
        return UpdatedEmbeddingInfluence(self.pretrain, self.tuned, ALPHA, **settings)

    def residuals(self, case: str, watched: Watched) -> list[float]:
        """‖b − A x‖ / ‖b‖ of both solves, in float64, by plain double backward."""
        products = [self._first_product(case), self._product(self.pretrain)]
        return [
            float((b.double() - product(x.double())).norm() / b.double().norm())
            for product, (b, x, _, _) in zip(products, watched.kept, strict=True)
        ]

    @staticmethod
    def _product(stage: Stage) -> Product:
        model = nn.Sequential(stage.embedding, stage.head)
        return Product(model, *stage.examples.tensors(), stage.l2)

    def _first_product(self, case: str) -> Any:
        if case == "case 2":
            product, size = self._product(self.tuned), self.tuned.embedding_size

            def proximal(x: Tensor) -> Tensor:
                result = product(x)
                result[:size] += 2 * ALPHA * x[:size]
                return result

            return proximal
        inputs, targets = self.finetune.examples.tensors()
        with torch.no_grad():
            features = torch.cat([self.finetune.embedding(part) for part in inputs.split(250)])
        return Product(self.finetune.head, features, targets, self.finetune.l2)


def make(
    data: Any, trained: Networks, options: argparse.Namespace, examples: int | None = None
) -> Problem:
    """The stages, of all examples or of the first few."""
    device = options.device

    def part(pair: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0][:examples].to(device), pair[1][:examples].to(device)

    def stage(embedding: nn.Module, head: nn.Module, pair: Sequence[Tensor]) -> Stage:
        modules = (copy.deepcopy(module).to(device) for module in (embedding, head))
        return Stage(*modules, cross_entropy, part(pair), l2=options.l2, check=False)  # type: ignore[misc]

    return Problem(
        stage(trained.embedding, trained.head, data.pretrain),
        stage(trained.embedding, trained.finetune_head, data.finetune),
        stage(trained.tuned_embedding, trained.tuned_head, data.finetune),
        tuple(leaf.to(device) for leaf in data.test),  # type: ignore[arg-type]
    )


# --- what is measured ----------------------------------------------------------------------------


def unit(problem: Problem, device: str) -> dict[str, float]:
    """Seconds of one gradient of the pretraining objective, and of one forward pass."""
    found = {}
    for name, work in (
        ("gradient", problem.pretrain.gradient),
        ("forward", problem.pretrain.example_losses),
    ):
        seconds(work, device)
        found[name] = statistics.median(seconds(work, device) for _ in range(3))
    return found


def run_case(
    problem: Problem, case: str, solvers: Sequence[Any], device: str
) -> tuple[dict[str, Any], Tensor]:
    """One computation of all scores with a solver for each of the two solves."""
    first, second = (Watched(solver, device) for solver in solvers)
    made = problem.influence(case, first, second)
    found: list[Any] = []
    total = seconds(lambda: found.append(made.scores(problem.test)), device)
    watched = Watched(None, device, [*first.kept, *second.kept])
    v = watched.kept[1][1]
    scoring = seconds(lambda: list(problem.pretrain.directional_derivatives(v)), device)
    solves = [
        {
            "system": system,
            "solver": report.solver,
            "seconds": taken,
            "iterations": report.iterations,
            "products": report.products,
            "residual": residual,
            "residual_reported": report.residual,
            "converged": report.converged,
            "negative_curvature": report.negative_curvature,
            "preconditioner": report.preconditioner,
            "message": report.message,
        }
        for system, (_, _, report, taken), residual in zip(
            CASES[case], watched.kept, problem.residuals(case, watched), strict=True
        )
    ]
    solving = sum(taken for *_, taken in watched.kept)
    result = {
        "seconds": {
            "total": total,
            "solves": solving,
            "scores": scoring,
            "graphs and test gradients": max(0.0, total - solving - scoring),
        },
        "solves": solves,
    }
    return result, found[0].values.double().cpu()


def paper(problem: Problem, case: str, iterations: int, options: argparse.Namespace) -> Any:
    """The paper's recipe, both solves with so many iterations."""
    solver = ConjugateGradient(
        tol=1e-12, max_iterations=iterations, damping=options.paper_damping, squared=True
    )
    return run_case(problem, case, (solver, solver), options.device)


def minres(tolerances: Sequence[float], options: argparse.Namespace) -> list[MinRes]:
    """The default solver, for each of the two solves."""
    return [MinRes(tol=tol, max_iterations=options.most_iterations) for tol in tolerances]


def agreement(values: Tensor, reference: Tensor) -> dict[str, float]:
    return {
        "pearson": float(pearsonr(values, reference).statistic),
        "spearman": float(spearmanr(values, reference).statistic),
        "error": float((values - reference).norm() / reference.norm()),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's recipe, then the default solver to the same residuals and to a fixed one."""
    data = load(options)
    trained = networks(data, options)
    whole = make(data, trained, options)
    units = unit(whole, options.device)
    print(f"gradient {units['gradient']:.3g} s, trained to {trained.gradient_norms}", flush=True)
    few = whole
    if options.paper_examples:
        few = make(data, trained, options, options.paper_examples)
    cases: dict[str, Any] = {}
    for case in CASES:
        recipes = {}
        for iterations in options.paper_iterations:
            recipes[iterations], by_recipe = paper(few, case, iterations, options)
            print(f"{case}  the paper's, {iterations}: {line(recipes[iterations])}", flush=True)
        last = recipes[max(options.paper_iterations)]["solves"]
        targets = [min(max(solve["residual"], LOWEST), HIGHEST) for solve in last]
        ours, _ = run_case(whole, case, minres(targets, options), options.device)
        print(f"{case}  ours, to the same residual: {line(ours)}", flush=True)
        fixed = minres([options.tol] * 2, options)
        tight, reference = run_case(whole, case, fixed, options.device)
        print(f"{case}  ours, to {options.tol:g}: {line(tight)}", flush=True)
        if few is not whole:
            _, reference = run_case(few, case, fixed, options.device)
        for found in (ours, tight, *(recipes.values() if few is whole else ())):
            found["gradients"] = {k: v / units["gradient"] for k, v in found["seconds"].items()}
        cases[case] = {
            "ours": ours,
            "tight": tight,
            "targets": targets,
            "recipe": {str(iterations): found for iterations, found in recipes.items()},
            "recipe_against_tight": agreement(by_recipe, reference),
        }
    return {
        "cases": cases,
        "unit_seconds": units,
        "examples": whole.pretrain.size,
        "finetune_examples": whole.finetune.size,
        "recipe_examples": few.pretrain.size,
        "recipe_finetune_examples": few.finetune.size,
        "parameters": {
            "pretraining": len(whole.pretrain.vector()),
            "finetuning": len(whole.finetune.vector()),
        },
        "gradient_norms": trained.gradient_norms,
        "training_seconds": trained.seconds,
        "paper_seconds": PAPER_SECONDS,
    }


def line(found: dict[str, Any]) -> str:
    solves = ", ".join(
        f"{solve['system']} {solve['products']} products, residual {solve['residual']:.1e}"
        for solve in found["solves"]
    )
    return f"{found['seconds']['total']:.1f} s; {solves}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the record."""
    parser = make_parser("pretraining_set", __doc__)
    parser.add_argument("--examples", type=int, default=None, help="of pretraining; by default all")
    parser.add_argument("--finetune-examples", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=500, help="test examples, their losses summed")
    parser.add_argument("--tol", type=float, default=1e-3, help="residual of the second run")
    parser.add_argument("--most-iterations", type=int, default=300, help="of the default solver")
    parser.add_argument(
        "--paper-examples", type=int, default=1000, help="of each stage, for its recipe; 0 for all"
    )
    parser.add_argument("--paper-iterations", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--paper-damping", type=float, default=1e-4, help="λ of its eq. 16")
    parser.add_argument("--l2", type=float, default=5e-3, help="weight decay of both stages")
    parser.add_argument("--epochs", type=int, default=10, help="of Adam")
    parser.add_argument("--evaluations", type=int, default=60, help="of L-BFGS, for each stage")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of trained networks")
    options = parse(parser, arguments)
    options.dataset, options.widths = "cifar10", [16, 32, 32]
    if options.quick:
        options.dataset, options.examples, options.widths = "digits", 60, [2, 3]
        options.finetune_examples, options.tests, options.paper_examples = 60, 20, 30
        options.paper_iterations, options.epochs, options.evaluations = [5, 20], 20, 200
    return record(options, "pretraining_set", options.dataset, run(options), alpha=ALPHA)


if __name__ == "__main__":
    main()
