"""Methods held against retraining: the rows of a record, and those of anyone's scores."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.two_stage import bank
from benchmarks.two_stage.bank import OTHER_SHARES, Truth
from benchmarks.two_stage.methods import Method, Predictions, by_steps
from benchmarks.two_stage.settings import SETTINGS, SHARES, Problem, problem
from benchmarks.two_stage.smoothness import metasmoothness, sweep
from msif_lib.evaluation import Estimate, fidelity, reliability
from msif_lib.solvers import FailedSolve
from msif_lib.study.records import write_record

RESULTS = bank.BANK.parent
# Subsets in whose direction smoothness is measured.
_DIRECTIONS = 8
# How far losses may lie apart on another machine, in a training of a hundred steps.
_SAME = 1e-3
#: Makes of a truth the predicted changes ``(100, T)`` at a share, or None where it has none.
Predict = Callable[[int, Truth, float], Tensor | None]


def rows_of(
    method: str, truths: Mapping[int, Truth], predict: Predict, scaled: bool
) -> list[dict[str, Any]]:
    """The rows of one method on one setting: one a share, and one a share of the other seeds."""
    rows = []
    for share in SHARES:
        found = [(predict(seed, truth, share), truth) for seed, truth in truths.items()]
        pairs = [(predicted.numpy(), truth) for predicted, truth in found if predicted is not None]
        if not pairs:
            continue
        predicted = np.stack([one for one, _ in pairs])
        actual = np.stack([truth.judged(share)[1].numpy() for _, truth in pairs])
        rows.append(_row(method, share, "same seed", predicted, actual, scaled))
        others = [truth.judged_by_others(share).numpy() for _, truth in pairs]
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


def judge(
    name: str, methods: Sequence[Method], seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rows of registered methods on a setting, and which methods failed, and how.

    A row's cost, in trainings, is the median over seeds of a method's time, by the time of both
    trainings, and the retrainings that it was given.

    Raises
    ------
    ValueError
        The bank is of other trainings than those of the setting.
    """
    truths = {seed: bank.read(name, seed) for seed in seeds}
    problem(name, seeds[0])  # what is run first takes longer
    problems = {seed: problem(name, seed) for seed in seeds}
    for seed, truth in truths.items():
        _check_bank(problems[seed], truth)
    rows, failed = [], []
    for method in methods:
        asked = {seed: Predictions(method, problems[seed], truths[seed]) for seed in seeds}

        def predict(
            seed: int, truth: Truth, share: float, asked: Mapping[int, Predictions] = asked
        ) -> Tensor | None:
            one = asked[seed]
            return one.of(share) if one.method.fits(one.problem, share) else None

        try:
            found = rows_of(method.name, truths, predict, method.scaled)
        except (FailedSolve, FloatingPointError, ValueError) as error:
            failed.append({"method": method.name, "says": str(error)[:300]})
            print(f"{name}: {method.name} failed: {error}", flush=True)
            continue
        cost = [one.seconds / one.problem.seconds for one in asked.values()]
        each = method.by_share or method.of_subsets
        answers = len({row["share"] for row in found}) if each else 1
        for row in found:
            row["trainings"] = statistics.median(cost) / answers + method.trainings
            row["group"] = method.group
        rows += found
        if found:
            scores = "  ".join(
                f"{row['share']:.0%} {row['lds']}" for row in found if row["reading"] == "same seed"
            )
            print(f"{name}: {method.name}: {scores}  ({found[0]['trainings']:.1f})", flush=True)
    return rows, failed


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


def _of_others(
    path: Path, judged: set[str], sums: Mapping[str, str]
) -> tuple[list[Any], list[Any]]:
    """Rows and failures in a record of methods that are not judged now, of the same bank."""
    if not path.exists():
        return [], []
    values = json.loads(path.read_text(encoding="utf-8"))["values"]
    rest = [
        [one for one in values[which] if one["method"] not in judged]
        for which in ("rows", "failed")
    ]
    if any(rest) and values["bank"] != sums:
        raise ValueError(
            f"{path} has rows of other methods, judged by another bank; judge all methods again"
        )
    return rest[0], rest[1]


def _smoothness(name: str, seed: int, share: float) -> dict[str, float] | None:
    """How linear the trained models are in the weights; None where they are at an optimum."""
    of = problem(name, seed)
    return metasmoothness(of, share, _DIRECTIONS, seed)._asdict() if by_steps(of) else None


def write(name: str, methods: Sequence[Method]) -> Path:
    """Judge methods on a setting and write its record, in which other methods' rows stay."""
    began = time.perf_counter()
    seeds = bank.seeds_of(name)
    if not seeds:
        bank.read(name, 0)  # says how to make it
    truths = {seed: bank.read(name, seed) for seed in seeds}
    path = RESULTS / f"{name}.json"
    sums = {str(seed): bank.sha256(name, seed) for seed in seeds}
    rows, failed = _of_others(path, {method.name for method in methods}, sums)
    found, not_found = judge(name, methods, seeds)
    about = [truth.about for truth in truths.values()]
    setting = SETTINGS[name]
    values = {
        "says": setting.says,
        "rows": rows + found,
        "failed": failed + not_found,
        "bank": sums,
        "ceilings": ceilings(truths),
        "metasmoothness": [
            {"share": share, "seeds": [_smoothness(name, seed, share) for seed in seeds]}
            for share in OTHER_SHARES
        ],
        "accuracy": [one["accuracy"] for one in about],
        "parameters": about[0]["parameters"],
        "pretraining examples": about[0]["pretraining examples"],
        "finetuning examples": about[0]["finetuning examples"],
        "functionals": len(truths[seeds[0]].before),
        "subsets": bank.JUDGED,
        "retraining seconds": [one["seconds of all retrainings"] for one in about],
    }
    write_record(
        path,
        section="two_stage",
        dataset=setting.says,
        values=values,
        parameters={"shares": SHARES},
        seeds=seeds,
        wall_time=time.perf_counter() - began,
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
