"""Methods held against retraining: the rows of a record, and those of anyone's scores."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.two_stage import bank, choices
from benchmarks.two_stage.bank import OTHER_SHARES, Truth
from benchmarks.two_stage.methods import METHODS, Method, Predictions, by_steps
from benchmarks.two_stage.settings import SETTINGS, SHARES, Problem, problem
from benchmarks.two_stage.smoothness import metasmoothness, sweep
from msif_lib.evaluation import Estimate, fidelity, linear_datamodeling_score, reliability
from msif_lib.solvers import FailedSolve
from msif_lib.study.imports import code_of, imported_files
from msif_lib.study.records import read_record, write_record

RESULTS = bank.BANK.parent
# Subsets in whose direction smoothness is measured.
_DIRECTIONS = 8
# How far losses may lie apart on another machine, in a training of a hundred steps.
_SAME = 1e-3
#: Makes of a truth the predicted changes ``(100, T)`` at a share, or None where it has none.
Predict = Callable[[int, Truth, float], Tensor | None]


def rows_of(
    method: str,
    truths: Mapping[int, Truth],
    predict: Predict,
    scaled: bool,
    exact: Predict | None = None,
) -> list[dict[str, Any]]:
    """The rows of one method on one setting: one a share, and one a share of the other seeds.

    Where the predictions of the exact row are given, each row tells how far its score is above.
    """
    rows = []
    for share in SHARES:
        found = {seed: predict(seed, truth, share) for seed, truth in truths.items()}
        pairs = {seed: one.numpy() for seed, one in found.items() if one is not None}
        if not pairs:
            continue
        predicted = np.stack(list(pairs.values()))
        actual = np.stack([truths[seed].judged(share)[1].numpy() for seed in pairs])
        row = _row(method, share, "same seed", predicted, actual, scaled)
        best = exact and [exact(seed, truths[seed], share) for seed in pairs]
        if best and all(one is not None for one in best):
            row["above exact"] = linear_datamodeling_score(
                predicted, actual, against=np.stack([np.asarray(one) for one in best])
            )
        rows.append(row)
        others = [truths[seed].judged_by_others(share).numpy() for seed in pairs]
        if all(map(len, others)):
            means = np.stack([one.mean(0) for one in others])
            rows.append(_row(method, share, "other seeds", predicted, means, scaled))
    return rows


def _row(
    method: str, share: float, reading: str, predicted: Any, actual: Any, scaled: bool
) -> dict[str, Any]:
    found = fidelity(predicted, actual, scaled=scaled)
    return {
        "method": method,
        "share": share,
        "reading": reading,
        "lds": found.lds,
        "pearson": found.pearson,
        "slope": found.slope,
        "error": found.error,
        "quantiles": found.quantiles,
    }


def _exact_of(of: Problem) -> Method:
    """The exact row of a problem."""
    return METHODS["unrolled → unrolled" if by_steps(of) else "optimum → proximal"]


class Bench:
    """A setting trained with each of its seeds, before which methods come.

    Parameters
    ----------
    name
        Of the setting.
    seeds
        Those of the bank that are judged by.
    chosen
        By the names of methods, the value of each that has one to choose.

    Raises
    ------
    ValueError
        The bank is of other trainings than those of the setting.
    """

    def __init__(self, name: str, seeds: Sequence[int], chosen: Mapping[str, float]) -> None:
        self.name, self.chosen = name, chosen
        self.truths = {seed: bank.read(name, seed) for seed in seeds}
        problem(name, seeds[0])  # what is run first takes longer
        self.problems = {seed: problem(name, seed) for seed in seeds}
        for seed, truth in self.truths.items():
            _check_bank(self.problems[seed], truth)
        self._exact = {
            seed: Predictions(_exact_of(of), of, self.truths[seed])
            for seed, of in self.problems.items()
        }

    def rows(self, method: Method) -> list[dict[str, Any]]:
        """The rows of a method; none where it has nothing to say.

        A row's cost, in trainings, is the median over seeds of the processor time that a method
        took, by that of both trainings, and the retrainings that it was given.

        Raises
        ------
        FailedSolve, FloatingPointError, ValueError
            The method fails, or a value of it has to be chosen first.
        """
        fitting = [
            seed for seed, of in self.problems.items() if any(method.fits(of, s) for s in SHARES)
        ]
        if not fitting:
            return []
        if method.tried and method.name not in self.chosen:
            raise ValueError(
                f"no value was chosen of those that {method.name!r} tries on {self.name}: "
                f"python -m benchmarks.two_stage choose {self.name}"
            )
        value = self.chosen[method.name] if method.tried else None
        asked = {
            seed: Predictions(method, of, self.truths[seed], value)
            for seed, of in self.problems.items()
        }
        exact = self._exact
        if all(one.method is method for one in exact.values()):
            asked = exact

        def of(these: Mapping[int, Predictions], seed: int, share: float) -> Tensor | None:
            one = these[seed]
            return one.of(share) if one.method.fits(one.problem, share) else None

        found = rows_of(
            method.name,
            self.truths,
            lambda seed, truth, share: of(asked, seed, share),
            method.scaled,
            lambda seed, truth, share: of(exact, seed, share),
        )
        cost = [one.seconds / one.problem.seconds for one in asked.values()]
        each = method.by_share or method.of_subsets
        answers = len({row["share"] for row in found}) if each else 1
        for row in found:
            row["trainings"] = statistics.median(cost) / answers + method.trainings
            row["group"], row["chosen"], row["code"] = method.group, value, code()
        if found:
            scores = "  ".join(
                f"{row['share']:.0%} {row['lds']}" for row in found if row["reading"] == "same seed"
            )
            print(
                f"{self.name}: {method.name}: {scores}  ({found[0]['trainings']:.1f})", flush=True
            )
        return found


@cache
def code() -> str:
    """Which code makes the rows: a digest of what is executed, docstrings and comments left out."""
    files = imported_files(bank.ROOT, ["import benchmarks.two_stage.__main__"])
    text = "".join(code_of(file.read_text(encoding="utf-8")) for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_bank(of: Problem, truth: Truth) -> None:
    """Refuse a bank whose models are not those that a setting and a seed are trained to here."""
    finetune = of.finetune
    with torch.no_grad():
        before = finetune.losses_at(finetune.vector(), *of.data.functionals)
    if (before - truth.before).norm() > _SAME * truth.before.norm():
        raise ValueError(
            f"the bank of {of.setting.name}, seed {of.seed}, is of another training: the losses as "
            "trained differ. Remove its file and make it again, by the command train"
        )


def ceilings(truths: Mapping[int, Truth]) -> list[dict[str, Any]]:
    """How reliable the mean over other seeds is, one half of them against the other, by share."""
    rows = []
    for share in OTHER_SHARES:
        others = [truth.judged_by_others(share).numpy() for truth in truths.values()]
        if all(len(one) > 1 for one in others):
            found = reliability(np.stack(others))
            rows.append({"share": share, "found": found})
    return rows


def _smoothness(of: Problem, share: float) -> dict[str, float] | None:
    """How linear the trained models are in the weights; None where they are at an optimum."""
    return metasmoothness(of, share, _DIRECTIONS, of.seed)._asdict() if by_steps(of) else None


def write(name: str, methods: Sequence[Method]) -> Path:
    """Judge methods on a setting and write its record, method by method.

    A row that the record has of the same code, bank and choice is not computed again, so that an
    interrupted run goes on. Rows of methods that are not asked for stay as they are.
    """
    began = time.perf_counter()
    seeds = bank.seeds_of(name)
    if not seeds:
        bank.read(name, 0)  # says how to make it
    path, setting = RESULTS / f"{name}.json", SETTINGS[name]
    sums = {str(seed): bank.sha256(name, seed) for seed in seeds}
    chosen = choices.chosen(name)
    old = read_record(path) if path.exists() else None
    spent = 0.0
    rows: dict[str, list[Any]] = defaultdict(list)
    if old and old["values"]["bank"] == sums:
        for row in old["values"]["rows"]:
            now = row.get("code") == code() and row.get("chosen") == chosen.get(row["method"])
            if row["method"] in METHODS and (now or METHODS[row["method"]] not in methods):
                rows[row["method"]].append(row)
        if rows:
            spent = old["wall_time"]
    waiting = [method for method in methods if method.name not in rows]
    if not waiting:
        return path
    bench = Bench(name, seeds, chosen)
    about = [truth.about for truth in bench.truths.values()]
    values: dict[str, Any] = {
        "says": setting.says,
        "rows": [],
        "failed": [],
        "bank": sums,
        "ceilings": ceilings(bench.truths),
        "metasmoothness": [
            {"share": share, "seeds": [_smoothness(of, share) for of in bench.problems.values()]}
            for share in OTHER_SHARES
        ],
        "accuracy": [one["accuracy"] for one in about],
        "parameters": about[0]["parameters"],
        "pretraining examples": about[0]["pretraining examples"],
        "finetuning examples": about[0]["finetuning examples"],
        "functionals": len(bench.truths[seeds[0]].before),
        "subsets": bank.JUDGED,
        "retraining seconds": [one["seconds of all retrainings"] for one in about],
    }
    for method in waiting:
        try:
            rows[method.name] = bench.rows(method)
        except (FailedSolve, FloatingPointError, ValueError) as error:
            values["failed"].append({"method": method.name, "says": str(error)[:300]})
            print(f"{name}: {method.name} failed: {error}", flush=True)
        values["rows"] = [row for one in METHODS for row in rows.get(one, [])]
        write_record(
            path,
            section="two_stage",
            dataset=setting.says,
            values=values,
            parameters={"shares": SHARES},
            seeds=seeds,
            wall_time=spent + time.perf_counter() - began,
        )
    return path


def write_smoothness(seeds: Sequence[int] = (0, 1, 2)) -> Path:
    """Try what makes training smoother, and write the record."""
    began, path = time.perf_counter(), RESULTS / "smoothness.json"
    write_record(
        path,
        section="two_stage",
        dataset="digits",
        values={"rows": sweep(seeds, OTHER_SHARES, _DIRECTIONS)},
        parameters={"directions": _DIRECTIONS, "shares": OTHER_SHARES},
        seeds=seeds,
        wall_time=time.perf_counter() - began,
    )
    return path


def from_file(path: Path) -> tuple[dict[tuple[str, int], Tensor], bool]:
    """Scores of a ``.npz`` file by setting and seed, and whether they are in units of the loss.

    An array ``<setting>-<seed>`` holds dq/dw_i ``(m, T)``; ``scaled`` (False by default) says that
    they are in units of the loss.

    Raises
    ------
    ValueError
        No array is of a setting; an array of another shape, or with values that are not finite.
    """
    found: dict[tuple[str, int], Tensor] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, _, seed = key.rpartition("-")
            if name in SETTINGS and seed.isdigit():
                values = torch.from_numpy(np.asarray(arrays[key], dtype=float))
                truth = bank.read(name, int(seed))
                expected = (truth.left_out.shape[2], len(truth.before))
                if tuple(values.shape) != expected:
                    raise ValueError(f"{key} must be (m, T) = {expected}, not {values.shape}")
                if not values.isfinite().all():
                    raise ValueError(f"{key} has values that are not finite")
                found[name, int(seed)] = values
            elif key != "scaled":
                raise ValueError(
                    f"{key!r} is no <setting>-<seed>; the settings are {', '.join(SETTINGS)}"
                )
        scaled = bool(arrays["scaled"]) if "scaled" in arrays.files else False
    if not found:
        raise ValueError(f"{path} holds no scores; an array is called digits-sgd-0, say")
    return found, scaled


def score(path: Path) -> list[dict[str, Any]]:
    """The rows of scores in a file, with no training at all."""
    found, scaled = from_file(path)
    by_setting: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, seed), values in found.items():
        by_setting[name][seed] = values
    rows = []
    for name, scores in by_setting.items():
        truths = {seed: bank.read(name, seed) for seed in scores}

        def predict(
            seed: int, truth: Truth, share: float, scores: Mapping[int, Tensor] = scores
        ) -> Tensor:
            return -(truth.judged(share)[0].to(scores[seed]) @ scores[seed])

        rows += [{"setting": name, **row} for row in rows_of(path.stem, truths, predict, scaled)]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Datamodeling scores with intervals, in text: methods down, shares across."""
    import pandas as pd

    plain = [
        {
            "setting": row["setting"],
            "seeds": row["seeds"],
            "method": row["method"],
            "truth": row["reading"],
            "share": f"{row['share']:.0%}",
            "lds": str(_estimate(row["lds"])),
        }
        for row in rows
    ]
    shown = pd.DataFrame(plain).pivot_table(
        index=["setting", "seeds", "truth", "method"], columns="share", values="lds",
        aggfunc="first", sort=False,
    )  # fmt: skip
    return shown.fillna("").to_string()


def _estimate(value: Any) -> Estimate:
    return Estimate(**value) if isinstance(value, Mapping) else value
