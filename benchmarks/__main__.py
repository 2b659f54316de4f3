"""Time this library and its peers in turn: ``python -m benchmarks``, or ``make bench``.

Every measurement is made in a fresh process, all with the same number of threads, and the methods
take turns: A B C A B C ..., so that a busy machine hits all alike. A method first gets its loosest
tolerance; where the residual, measured by the one independent product of
:mod:`benchmarks.reference`, is above the target it is given the next tighter one, and the time is
that of the first that suffices. What fails is recorded with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import CACHE, RESULTS, ROOT, machine
from benchmarks.libraries import METHODS, Approximate, Exact
from benchmarks.problems import SPECS, Spec
from benchmarks.tables import OURS, report
from msif_lib.study.records import write_record

TARGET = 1e-3
PROBLEMS, QUICK = ("small", "large", "indefinite"), ("tiny", "tiny indefinite")
# Problems whose units are measured.
WITH_UNITS = ("small", "large", "tiny")


@dataclass
class Job:
    """One method at one task, and what came of each repetition."""

    method: str
    task: str
    columns: int
    limit: int | None = None
    setting: float | None = None
    attempts: list[dict[str, float]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.results[-1]["status"] if self.results else "not run"


def named(only: str) -> list[str]:
    """The method of that name, or all whose names hold the text."""
    return [only] if only in METHODS else [name for name in METHODS if only in name]


def jobs_of(spec: Spec, only: str, several: str = "") -> list[Job]:
    """What is measured on a problem, in the order of a repetition.

    `several` names the methods that are given several right-hand sides, by default all.
    """
    chosen = {name: METHODS[name] for name in named(only)}
    exact = {name: method for name, method in chosen.items() if isinstance(method, Exact)}
    found = [
        Job(name, "solve", columns, limit)
        for limit in spec.limits
        for columns in (1, spec.tests)
        for name, method in exact.items()
        if columns <= method.most_columns
        and (columns == 1 or not several or name in several.split(","))
    ]
    # Scores from given solutions do not depend on whether A is definite.
    found += [
        Job(name, "score", columns)
        for columns in ((1, spec.tests) if spec.damping is not None else ())
        for name, method in exact.items()
        if method.separate_scores and (columns == 1 or method.several_scores)
    ]
    found += [
        Job(name, "approximate", spec.tests)
        for name, method in chosen.items()
        if isinstance(method, Approximate)
    ]
    return found


class Runner:
    """Starts the processes, one after the other.

    Parameters
    ----------
    threads
        Of every process.
    timeout
        Seconds that a measurement may take.
    """

    def __init__(self, threads: int, timeout: float) -> None:
        self.threads, self.timeout = threads, timeout
        count = str(threads)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def __call__(self, timeout: float | None = None, **request: Any) -> dict[str, Any]:
        """The result of one request to :mod:`benchmarks.measure`."""
        request["threads"] = self.threads
        with tempfile.TemporaryDirectory() as name:
            asked, answer = Path(name, "request.json"), Path(name, "result.json")
            asked.write_text(json.dumps(request), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.measure", str(asked), str(answer)]
            try:
                process = subprocess.run(
                    command, cwd=ROOT, env=self.environment, capture_output=True, text=True,
                    timeout=timeout or self.timeout,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return {"status": "timeout", "error": f"more than {self.timeout:.0f} s"}
            if process.returncode < 0:
                return {"status": "killed", "error": f"signal {-process.returncode}"}
            if process.returncode:
                raise RuntimeError(f"{request}:\n{process.stderr[-4000:]}")
            result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return result


def run_job(job: Job, problem: str, run: Runner, tighten: bool) -> None:
    """One repetition; the first one finds the setting."""
    method = METHODS[job.method]
    settings: tuple[float | None, ...] = (job.setting,)
    if job.task == "solve" and job.setting is None:
        assert isinstance(method, Exact)
        settings = method.settings if tighten else method.settings[:1]
        if not tighten and method.fixed_iterations:
            settings = method.settings[-1:]
    result: dict[str, Any] = {}
    for setting in settings:
        result = run(
            problem=problem, method=job.method, task=job.task, columns=job.columns,
            setting=setting, limit=job.limit,
        )  # fmt: skip
        if job.task != "solve" or result["status"] != "ok":
            break
        if job.setting is None and result["finite"]:
            job.attempts.append({"setting": setting, "residual": result["residual"]})  # type: ignore[dict-item]
        if result["finite"] and result["residual"] <= TARGET:
            break
    if job.task == "solve":
        job.setting = setting
    job.results.append(result)
    time_taken = f"{result['seconds']:8.2f} s" if "seconds" in result else ""
    reached = f"residual {result['residual']:.0e}" if "residual" in result else ""
    print(
        f"  {job.method:20} {job.task:12} T = {job.columns:<3} {job.limit or '':>5} "
        f"{job.status:13} {time_taken:>11}  {reached}".rstrip(),
        flush=True,
    )


def row_of(job: Job, against: list[float] | None) -> dict[str, Any]:
    """A row of the record: medians over the repetitions, the worst residual and r."""
    row: dict[str, Any] = {"method": job.method, "task": job.task, "columns": job.columns}
    done = [result for result in job.results if result["status"] == "ok"]
    # A failure in any repetition is the method's status, whatever went before.
    row["status"] = job.status
    if job.status != "ok":
        row["error"] = job.results[-1].get("error", "")
    if METHODS[job.method].note:
        row["note"] = METHODS[job.method].note
    if job.task == "solve":
        row.update(setting=job.setting, limit=job.limit, attempts=job.attempts)
    if not done:
        return row
    row["seconds"] = [result["seconds"] for result in done]
    row["median_seconds"] = statistics.median(row["seconds"])
    for key in ("seconds_fit", "seconds_score_one", "seconds_score", "scale", "peak", "baseline"):
        if key in done[0]:
            row[key] = statistics.median(result[key] for result in done)
    for key, worst in (("residual", max), ("pearson_lowest", min), ("pearson_median", min)):
        values = [result[key] for result in done if key in result]
        if values:
            row[key] = worst(values)
    row["finite"] = all(result.get("finite", True) for result in done)
    row["words"] = done[0]["words"]
    if against:
        pairs = zip(row["seconds"], against)
        row["ratio"] = statistics.median(mine / ours for mine, ours in pairs)
    return row


def rows_of(jobs: list[Job]) -> list[dict[str, Any]]:
    """All rows, each with its ratio to this library's default solver on the same task.

    An approximation is held against solve and scores together.
    """
    ours = {
        (job.task, job.columns, job.limit): [result["seconds"] for result in job.results]
        for job in jobs
        if job.method == OURS and job.status == "ok"
    }
    for task, columns, _ in list(ours):
        solved = [ours[key] for key in ours if key[:2] == ("solve", columns)]
        if task == "score" and solved:
            pairs = zip(solved[0], ours["score", columns, None])
            ours["approximate", columns, None] = [sum(pair) for pair in pairs]
    return [row_of(job, ours.get((job.task, job.columns, job.limit))) for job in jobs]


def units_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a forward pass, and everything else in forward passes of the same process."""
    done = [result["units"] for result in results if result["status"] == "ok"]
    if not done:
        return {}
    return {
        "seconds_forward": statistics.median(unit["forward"] for unit in done),
        "forward_passes": {
            name: statistics.median(unit[name] / unit["forward"] for unit in done)
            for name in done[0]
        },
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for package in dict.fromkeys(method.package for method in METHODS.values()):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_problem(spec: Spec, options: argparse.Namespace, run: Runner) -> dict[str, Any]:
    """Measure everything on one problem and return its record."""
    begin = time.perf_counter()
    print(f"{spec.name}: {spec.about}", flush=True)
    # Training and the exact answer, once; hours would be a mistake, not a measurement.
    built = run(timeout=7200, task="build", problem=spec.name, folder=str(CACHE))
    if built["status"] != "ok":
        raise RuntimeError(f"{spec.name} could not be built: {built['error']}")
    jobs = jobs_of(spec, options.only, options.several)
    units: list[dict[str, Any]] = []
    for repetition in range(options.repeats):
        for job in jobs:
            slow = job.results and job.results[-1].get("seconds", 0) > options.slow
            if repetition and (job.status != "ok" or slow):
                continue
            run_job(job, built["path"], run, tighten=spec.damping is not None)
        if spec.name in WITH_UNITS:
            units.append(run(task="units", problem=built["path"], columns=spec.tests))
    name = spec.name.replace(" ", "-")
    record = write_record(
        options.out / f"{name}.json",
        "benchmarks",
        spec.name,
        {
            "about": spec.about,
            "facts": built["facts"],
            "rows": rows_of(jobs),
            "units": units_of(units),
            "packages": versions(),
            "machine": machine(),
        },
        {
            "target": TARGET,
            "repeats": options.repeats,
            "threads": options.threads,
            "timeout": options.timeout,
            "slow": options.slow,
            "several": options.several or "all",
            "columns": [1, spec.tests],
            "dtype": spec.dtype,
        },
        [spec.seed],
        time.perf_counter() - begin,
        dtype=getattr(torch, spec.dtype),
    )
    print(f"\n{report(record)}", flush=True)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("problems", nargs="*", help=f"of {', '.join(SPECS)}; by default {PROBLEMS}")
    parser.add_argument("--quick", action="store_true", help="tiny problems, for tests")
    parser.add_argument("--only", default="", help="a method, or part of the names of several")
    parser.add_argument(
        "--several", default="", help="methods for several right-hand sides, a,b,c; by default all"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each process: physical cores")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a measurement may take")
    parser.add_argument(
        "--slow", type=float, default=300, help="what takes longer than this is measured once"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the records")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.problems if name not in SPECS]
    if unknown:
        parser.error(f"unknown problem {unknown[0]}; known: {', '.join(SPECS)}")
    if not named(options.only):
        parser.error(f"no method holds {options.only!r} in its name: {', '.join(METHODS)}")
    if options.out is None:
        options.out = CACHE / "quick" if options.quick else RESULTS
    torch.set_num_threads(options.threads)
    run = Runner(options.threads, options.timeout)
    for name in options.problems or (QUICK if options.quick else PROBLEMS):
        run_problem(SPECS[name], options, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
