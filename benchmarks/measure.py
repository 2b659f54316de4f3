"""One measurement in a process of its own: ``python -m benchmarks.measure REQUEST RESULT``.

The request and the result are JSON files. A result has a ``status``: ``ok``, ``not installed`` or
``failed`` (with the ``error``); the parent adds ``timeout`` and ``killed``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import problems, units
from benchmarks.libraries import METHODS, Approximate, Exact
from benchmarks.reference import example_derivatives

# Quick work is repeated for at least so long, and the median taken.
_REPEAT_SECONDS, _REPEAT_TIMES = 3.0, 7
_WARM_UP_EXAMPLES = 20
_MAX_TEXT = 300
# What a library tells its user about the answer; deprecations, and torch's own, are none of that.
_WORDS = (UserWarning, RuntimeWarning)


def peak_megabytes() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def limit_memory() -> None:
    """Let an allocation fail before the machine runs out of memory and ends other processes."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return
    kilobytes = int(meminfo.split("MemAvailable:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * 2**10 * kilobytes),) * 2)


def plain_text(text: str) -> str:
    """A message without this machine's paths, on one line, cut to what a record holds."""
    text = re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "", " ".join(text.split()))
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what a library says: warnings and log messages from WARNING on."""
    words: list[str] = []
    handler = _Log()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield words
    finally:
        logging.getLogger().removeHandler(handler)
        said = [
            str(one.message)
            for one in caught
            if issubclass(one.category, _WORDS) and f"{os.sep}torch{os.sep}" not in one.filename
        ]
        words += list(dict.fromkeys(map(plain_text, said + handler.messages)))[:5]


def pearson(values: Tensor, exact: Tensor) -> list[float]:
    """Pearson's r a column; 0 where the values are not finite or constant."""
    values, exact = (part.double() - part.double().mean(0) for part in (values, exact))
    r = (values * exact).sum(0) / (values.norm(dim=0) * exact.norm(dim=0))
    return torch.nan_to_num(r, nan=0.0, posinf=0.0, neginf=0.0).tolist()


def _agreement(scores: Tensor, problem: problems.Problem) -> dict[str, float]:
    r = pearson(scores, problem.scores[:, : scores.shape[1]])
    return {"pearson_lowest": min(r), "pearson_median": statistics.median(r)}


def _seconds(function: Callable[[], Any], once: bool = False) -> tuple[float, Any]:
    """Seconds of a call, the median of several where it is quick, and what it returned."""
    times: list[float] = []
    result = None
    while not times or (not once and sum(times) < _REPEAT_SECONDS and len(times) < _REPEAT_TIMES):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), result


def solve(method: Exact, problem: problems.Problem, request: dict[str, Any]) -> dict[str, Any]:
    """Solve for some right-hand sides, from the library's first call to the solution."""
    b = problem.b[:, : request["columns"]]
    setting, limit = request["setting"], request["limit"]
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        # Imports and compilations at the first call are no part of the method.
        try:
            method.solve(problem.few(_WARM_UP_EXAMPLES), b, method.settings[0], 5)
        except Exception:  # the measurement itself will say so
            gc.collect()
    with listening() as words:
        seconds, x = _seconds(lambda: method.solve(problem, b, setting, limit), once=True)
    peak = peak_megabytes()
    finite = bool(x.isfinite().all())
    result: dict[str, Any] = {"seconds": seconds, "peak": peak, "words": words, "finite": finite}
    if finite:
        residuals = problem.product().residuals(x, b)
        scores = -example_derivatives(problem.model, problem.inputs, problem.targets, x.double())
        result.update(residual=float(residuals.max()), **_agreement(scores, problem))
    return result


def score(method: Exact, problem: problems.Problem, request: dict[str, Any]) -> dict[str, Any]:
    """All scores, given the exact solutions in the problem's precision."""
    x = problem.x[:, : request["columns"]].to(problem.dtype)
    scorer = method.scorer(problem)
    method.scorer(problem.few(_WARM_UP_EXAMPLES))(x)
    with listening() as words:
        seconds, scores = _seconds(lambda: scorer(x))
    return {
        "seconds": seconds,
        "peak": peak_megabytes(),
        "words": words,
        **_agreement(scores, problem),
    }


def approximate(
    method: Approximate, problem: problems.Problem, request: dict[str, Any]
) -> dict[str, Any]:
    """Fit, then all scores of one and of several test functionals."""
    with listening() as words:
        fit, scores_of = _seconds(lambda: method.fit(problem), once=True)
        one, _ = _seconds(lambda: scores_of(1), once=True)
        several, scores = _seconds(lambda: scores_of(request["columns"]), once=True)
    peak = peak_megabytes()
    finite = bool(scores.isfinite().all())
    exact = problem.scores[:, : scores.shape[1]] * problem.norms[: scores.shape[1]].double()
    scale = float((scores * exact).sum() / (exact * exact).sum()) if finite else 0.0
    return {
        "seconds": fit + several,
        "seconds_fit": fit,
        "seconds_score_one": one,
        "seconds_score": several,
        "peak": peak,
        "words": words,
        "finite": finite,
        "scale": scale,
        **_agreement(scores, problem),
    }


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request."""
    torch.set_num_threads(request["threads"])
    problem = problems.load(Path(request["problem"]))
    if request["task"] == "units":
        return {"status": "ok", "units": units.measure(problem, request["columns"])}
    method = METHODS[request["method"]]
    try:
        method.load()
    except ImportError as error:
        return {"status": "not installed", "error": plain_text(str(error))}
    baseline = peak_megabytes()
    tasks = {"solve": solve, "score": score, "approximate": approximate}
    try:
        result = tasks[request["task"]](method, problem, request)  # type: ignore[operator]
    except Exception as error:
        text = plain_text(f"{type(error).__name__}: {error}")
        return {"status": "failed", "error": text, "peak": peak_megabytes()}
    return {"status": "ok", "baseline": baseline, **result}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if request["task"] == "build":
        spec, folder = problems.SPECS[request["problem"]], Path(request["folder"])
        path = problems.build(spec, folder)
        result = {"status": "ok", "path": str(path), "facts": problems.load(path).facts}
    else:
        limit_memory()
        result = measure(request)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
