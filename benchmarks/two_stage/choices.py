"""What is left to choose: the values that methods try, and how kind a setting's rates are.

The rule, for each setting by itself: of the values that a method tries, the one with the highest
datamodeling score at a share of 0.05, averaged over the seeds 100 and 101. These have other initial
weights, batches and subsets than the seeds that are reported, and another draw of examples. The
score is that of 32 subsets and of the first 8 functionals. Of equal scores the first counts, and a
value with which a method fails is not taken.

Beside it stands, of settings whose training was picked by hand, what half and twice the learning
rates would do to accuracy and to the score of the exact row. Nothing is chosen by that: it tells
how kind the rates are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.two_stage import bank
from benchmarks.two_stage.methods import METHODS, Method
from benchmarks.two_stage.settings import CHOICE, SETTINGS, SHARES, Problem, Setting, problem
from msif_lib.evaluation import linear_datamodeling_score
from msif_lib.solvers import FailedSolve
from msif_lib.study.records import read_record, write_record

SEEDS = (CHOICE, CHOICE + 1)
SHARE, SUBSETS, FUNCTIONALS = 0.05, 32, 8
#: Factors of a setting's learning rates whose effect is told.
RATES = (0.5, 1.0, 2.0)
_EXACT = "unrolled → unrolled"


def folder() -> Path:
    """Where the choices are kept, a record a setting."""
    return bank.BANK.parent / "choices"


def chosen(name: str) -> dict[str, float]:
    """The value of each method that has one to choose, on a setting.

    Empty where nothing was chosen yet.
    """
    path = folder() / f"{name}.json"
    if not path.exists():
        return {}
    return {one["method"]: one["chosen"] for one in read_record(path)["values"]["methods"]}


class Small(NamedTuple):
    """A problem with fewer functionals, and what retraining says of them at one share."""

    problem: Problem
    left_out: Tensor
    changes: Tensor

    @classmethod
    def of(cls, setting: str | Setting, seed: int) -> Small:
        """Train a setting, and again without each subset ``(32, m)``."""
        of = problem(setting, seed)
        inputs, labels = of.data.functionals
        first = slice(FUNCTIONALS)
        some = tuple(part[first] for part in inputs) if isinstance(inputs, tuple) else inputs[first]
        of = replace(of, data=of.data._replace(functionals=(some, labels[first])))
        left_out = bank.subsets(of.size, seed)[SHARES.index(SHARE), :SUBSETS]
        return cls(of, left_out, bank.trained(of, left_out))

    def predicted(self, method: Method, *value: float) -> Tensor:
        """Predicted changes ``(32, 8)``."""
        scores = method.function(self.problem, *value)
        return -(self.left_out.to(scores) @ scores)


def _score(small: Sequence[Small], method: Method, *value: float) -> float | None:
    """The datamodeling score over seeds; None where the method fails."""
    try:
        found = torch.stack([one.predicted(method, *value) for one in small])
        return linear_datamodeling_score(found, torch.stack([one.changes for one in small])).value
    except (FailedSolve, FloatingPointError, ValueError) as error:
        print(f"{method.name} with {value} failed: {error}", flush=True)
        return None


def choose(name: str, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """What is chosen of each method on a setting, and every value's score.

    Raises
    ------
    ValueError
        A method fails with every value.
    """
    methods = [method for method in methods if method.tried]
    small = [Small.of(name, seed) for seed in SEEDS] if methods else []
    found = []
    for method in methods:
        if not method.fits(small[0].problem, SHARE):
            continue
        scores = {value: _score(small, method, value) for value in method.tried}
        known = {value: score for value, score in scores.items() if score is not None}
        if not known:
            raise ValueError(f"{method.name} fails on {name} with each of {method.tried}")
        shown = {f"{value:g}": score for value, score in scores.items()}
        best = max(known, key=known.__getitem__)
        found.append({"method": method.name, "chosen": best, "scores": shown})
        print(f"{name}: {method.name}: {best:g} of {shown}", flush=True)
    return found


def _at_rates(setting: Setting, factor: float) -> Setting:
    """The setting with all learning rates times a factor."""
    assert setting.recipes is not None
    first, second = (
        one._replace(optimiser=replace(one.optimiser, lr=factor * one.optimiser.lr))
        for one in setting.recipes
    )
    return replace(setting, name=f"{setting.name}-x{factor:g}", recipes=(first, second))


def kindness(name: str) -> list[dict[str, Any]]:
    """Accuracy and score of the exact row at half, one and two times a setting's rates."""
    if SETTINGS[name].recipes is None or not SETTINGS[name].picked:
        return []
    rows = []
    for factor in RATES:
        small = [Small.of(_at_rates(SETTINGS[name], factor), seed) for seed in SEEDS]
        score = _score(small, METHODS[_EXACT])
        accuracy = sum(one.problem.accuracy[1] for one in small) / len(small)
        rows.append({"factor": factor, "accuracy": accuracy, "lds": score})
        print(f"{name}: rates x {factor:g}: accuracy {accuracy:.3f}, score {score}", flush=True)
    return rows


def write(name: str, methods: Sequence[Method]) -> Path:
    """Choose on a setting and write the record, in which choices among the same values stay."""
    began, path = time.perf_counter(), folder() / f"{name}.json"
    old = read_record(path)["values"] if path.exists() else {"methods": [], "rates": None}
    tried = {method.name: {f"{value:g}" for value in method.tried} for method in methods}
    found = {
        one["method"]: one
        for one in old["methods"]
        if tried.get(one["method"]) == set(one["scores"])
    }
    first = problem(name, SEEDS[0])
    waiting = [
        one for one in methods if one.tried and one.name not in found and one.fits(first, SHARE)
    ]
    if waiting or old["rates"] is None:
        found |= {one["method"]: one for one in choose(name, waiting)}
        write_record(
            path,
            section="two_stage",
            dataset=SETTINGS[name].says,
            values={
                "methods": [found[method.name] for method in methods if method.name in found],
                "rates": kindness(name) if old["rates"] is None else old["rates"],
            },
            parameters={"share": SHARE, "subsets": SUBSETS, "functionals": FUNCTIONALS},
            seeds=SEEDS,
            wall_time=time.perf_counter() - began,
        )
    return path
