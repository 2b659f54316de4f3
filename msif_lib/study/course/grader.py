"""Checks a student's function and says which kind of mistake it makes.

The exercises of the book ask for functions. `check` runs one of them on several small problems
whose answer is known (:mod:`msif_lib.study.course.exercises`), and compares the answer with the
right one and with those that the usual mistakes lead to: a wrong sign, a missing 1/m, α in place of
2α, a forgotten cross term. An answer is right if it is near the right one on every problem,
whatever the way it was found; it is given the name of a mistake only if that mistake explains it on
all of them.

>>> check("hvp", lambda objective, theta, v: None).state
'not done'
>>> check("hvp", lambda objective, theta, v: v)
hvp: not right yet (v returned). v came back unchanged. ...
"""

from __future__ import annotations

import html
import linecache
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msif_lib.study.course.exercises import EXERCISES, Array, Endless, Exercise, Problem

__all__ = ["Verdict", "check"]

# Seconds of computing for one call of a student's function. Time on the clock would blame it for
# a machine that is busy with something else.
TIME_LIMIT = 30.0
# Answers nearer than this to the right one are called near, not wrong.
NEAR = 0.1
# What an exception of PyTorch mostly means here.
ADVICE = {
    "does not require grad": (
        "Derivatives are recorded only for tensors that ask for it: differentiate with respect to "
        "theta.detach().clone().requires_grad_(), and use create_graph=True where a gradient is "
        "to be differentiated once more."
    ),
    "not have been used in the graph": (
        "What is differentiated does not depend on the tensor named: evaluate the function at the "
        "very tensor with respect to which the derivative is taken."
    ),
    "backward through the graph a second time": (
        "The graph of a gradient is kept only with create_graph=True (or retain_graph=True)."
    ),
    "shape": "Look at the shapes of the factors.",
    "size": "Look at the sizes of the factors.",
}


@dataclass(frozen=True)
class Verdict:
    """What the grader says about one function.

    Attributes
    ----------
    exercise
        The name of the exercise.
    state
        ``"passed"``, ``"failed"`` or ``"not done"``.
    kind
        A short name of the mistake; empty where there is none.
    message
        What was found, and what was expected.
    hint
        Where the book says what is right; empty where nothing is wrong.
    """

    exercise: str
    state: str
    kind: str
    message: str
    hint: str = ""

    @property
    def passed(self) -> bool:
        """Whether the function is right."""
        return self.state == "passed"

    @property
    def title(self) -> str:
        """The verdict in a line."""
        if self.state == "passed":
            return f"{self.exercise}: right"
        if self.state == "not done":
            return f"{self.exercise}: not done yet"
        return f"{self.exercise}: not right yet ({self.kind})"

    def __str__(self) -> str:
        return " ".join(part for part in (f"{self.title}.", self.message, self.hint) if part)

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        parts = (f"**{self.title}**", self.message, self.hint)
        return "\n\n".join(html.escape(part, quote=False) for part in parts if part)

    def _repr_html_(self) -> str:
        # Own foreground and background: legible on a light page and on a dark one.
        edge = {"passed": "#0072B2", "failed": "#D55E00", "not done": "#6B7280"}[self.state]
        mark = {"passed": "✓", "failed": "✗", "not done": "…"}[self.state]
        style = (
            f"border-left:0.4rem solid {edge};background:#FCFCFC;color:#1F2933;"
            "padding:0.5rem 0.9rem;border-radius:4px;max-width:46rem;overflow-wrap:anywhere"
        )
        text = "".join(
            f'<p style="margin:0.3rem 0 0;color:inherit">{html.escape(part)}</p>'
            for part in (self.message, self.hint)
            if part
        )
        title = (
            f'<p style="margin:0;color:inherit"><span aria-hidden="true">{mark} </span>'
            f"<strong>{html.escape(self.title)}</strong></p>"
        )
        return f'<div role="note" aria-label="Verdict" style="{style}">{title}{text}</div>'


class _Wrong(Exception):
    """A mistake that ends the examination.

    Parameters
    ----------
    kind
        Its short name.
    message
        What was found.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


class _NotDone(Exception):
    """The function returned nothing."""


class _Raised(_Wrong):
    """The function raised an exception."""


def check(name: str, function: Callable[..., Any]) -> Verdict:
    """Examine a function, and say what is wrong with it.

    Parameters
    ----------
    name
        Which exercise: ``"hvp"``, ``"conjugate_gradient"``, ``"influence"``, ``"case1"``,
        ``"case2"``, ``"chain"``, ``"adjoint"`` or ``"retraining"``. Arguments and result of each
        are described in ``exercises/influence.py`` and in the chapters.
    function
        The student's function; called with positional arguments.

    Returns
    -------
    Verdict
        What a notebook shows if this call is the last line of a cell. Exceptions of the function
        are reported in it, not raised.

    Raises
    ------
    ValueError
        If there is no such exercise.
    TypeError
        If what is given is not a function.
    """
    if name not in EXERCISES:
        raise ValueError(f"no exercise is called {name!r}; known: {', '.join(EXERCISES)}")
    if not callable(function):
        raise TypeError(f"give the function itself, check({name!r}, my_function), not its result")
    exercise = EXERCISES[name]
    problems = exercise.problems()
    try:
        answers = [_answer(function, exercise, problem) for problem in problems]
        reached = _judge(exercise, problems, answers)
    except _NotDone:
        message = f"The function returned nothing yet. Wanted: {exercise.returns}"
        return Verdict(name, "not done", "", message)
    except _Wrong as wrong:
        message, kind = wrong.message, wrong.kind
        if isinstance(wrong, _Raised):
            kind, message = _explain_exception(function, exercise, kind, message)
        return Verdict(name, "failed", kind, f"{message} Wanted: {exercise.returns}", exercise.hint)
    return Verdict(name, "passed", "", reached)


def _answer(function: Callable[..., Any], exercise: Exercise, problem: Problem) -> Array:
    """Return what the function answers to one problem, as numbers in a row."""
    found = []
    for arguments in problem.calls:
        given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        result = _run(function, exercise, given)
        if result is None or result is Ellipsis:
            raise _NotDone
        for name, before, after in zip(exercise.arguments, arguments, given, strict=True):
            if isinstance(before, Tensor) and not torch.equal(before, after.detach()):
                raise _Wrong(
                    "argument changed in place",
                    f"The function changes its argument {name}, and with it the data of whoever "
                    f"calls it. Operations like += and methods that end in an underscore work in "
                    f"place: start from {name}.clone().",
                )
        found.append(_numbers(result, problem))
    values = np.concatenate(found)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise _Wrong(
            "NaN or infinity",
            f"{bad} of {len(values)} numbers are NaN or infinite: a division by zero, or an "
            "iteration that diverged.",
        )
    return values


def _run(function: Callable[..., Any], exercise: Exercise, arguments: Sequence[Any]) -> Any:
    """Call the function; an exception becomes a `_Wrong`."""
    try:
        with _time_limit(TIME_LIMIT):
            return function(*arguments)
    except _Late as error:
        raise _Wrong("does not end", f"No answer after {TIME_LIMIT:.0f} s of computing.") from error
    except Endless as error:
        raise _Wrong("does not end", str(error)) from error
    except (Exception, SystemExit) as error:
        # Whatever a student's function raises is the student's to read about.
        raise _Raised("exception", _described(error, function, exercise, arguments)) from None


class _Late(BaseException):
    """The time is over. No `Exception`, which a student's function may well catch."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_Late` after some time of computing, where the system has such an alarm."""
    if not hasattr(signal, "SIGPROF") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGPROF, ring)
    # Again and again: a function may catch what it is told.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _described(
    error: BaseException, function: Callable[..., Any], exercise: Exercise, arguments: Sequence[Any]
) -> str:
    """Return an exception in a sentence or two: what, where, and what it mostly means."""
    text = (str(error).strip().splitlines() or [""])[0]
    told = f"The function raised {type(error).__name__}: {text[:200]}".rstrip(".: ") + "."
    code = getattr(function, "__code__", None)
    trace, line = error.__traceback__, ""
    while trace is not None:
        if code is not None and trace.tb_frame.f_code.co_filename == code.co_filename:
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
        trace = trace.tb_next
    if line:
        told += f" It happened at: {line}."
    elif isinstance(error, TypeError) and "argument" in text:
        told += f" It is called as {exercise.signature}."
    for key, advice in ADVICE.items():
        if key in text:
            told += f" {advice}"
            break
    if isinstance(error, RuntimeError):
        shapes = [
            f"{name} {tuple(value.shape)}"
            for name, value in zip(exercise.arguments, arguments, strict=True)
            if isinstance(value, Tensor)
        ]
        told += f" The arguments were: {', '.join(shapes)}."
    return told


def _numbers(result: Any, problem: Problem) -> Array:
    """Return a student's result as float64 numbers in a row, or say why it can't be one."""
    wanted = problem.size
    if isinstance(result, tuple) and not all(np.ndim(_plain(part)) == 0 for part in result):
        raise _Wrong(
            "wrong type",
            f"The function returned {len(result)} things; only one is wanted, the answer itself.",
        )
    try:
        values = np.asarray(_plain(result), dtype=np.float64)
    except (TypeError, ValueError):
        raise _Wrong(
            "wrong type",
            f"The function returned a {type(result).__name__}, from which no numbers can be read.",
        ) from None
    # (m, 1), (1, m) and (m,) say the same.
    if values.size != wanted or max(values.shape, default=1) != wanted:
        shape = "a single number" if values.ndim == 0 else f"the shape {values.shape}"
        message = f"The result has {shape}, but {wanted} numbers are wanted, one {problem.each}."
        for size, meaning in problem.shapes.items():
            if values.shape == size:
                message += f" {meaning}"
        raise _Wrong("wrong shape", message)
    return values.reshape(-1)


def _plain(value: Any) -> Any:
    """Return tensors, also in lists, as NumPy arrays."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def relative_error(found: Array, reference: Array) -> float:
    """Return ‖found − reference‖ / ‖reference‖.

    Parameters
    ----------
    found, reference
        Arrays of the same shape.
    """
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def _judge(exercise: Exercise, problems: Sequence[Problem], answers: Sequence[Array]) -> str:
    """Return what the answers reached; a wrong one raises `_Wrong` with the kind of mistake."""
    if exercise.judge is not None:
        # A solver is judged by its residual and its costs, not by the solution alone.
        named = _named(exercise, problems, answers)
        outcome = exercise.judge(problems, answers)
        if outcome.kind and named:
            raise _Wrong(*named)
        if outcome.kind:
            raise _Wrong(outcome.kind, outcome.message)
        return outcome.message
    errors = [relative_error(x, p.truth) for x, p in zip(answers, problems, strict=True)]
    if max(errors) <= exercise.tolerance:
        return (
            f"The relative error is at most {max(errors):.0e} on {len(problems)} problems of "
            "different size."
        )
    named = _named(exercise, problems, answers)
    if named:
        raise _Wrong(*named)
    raise _Wrong(*_unnamed(exercise, problems, answers, errors))


def _named(
    exercise: Exercise, problems: Sequence[Problem], answers: Sequence[Array]
) -> tuple[str, str] | None:
    """Return name and description of a mistake, or of two, that explain all answers."""
    near = 10 * exercise.tolerance

    def explains(candidates: Sequence[Array]) -> bool:
        return all(relative_error(x, c) <= near for x, c in zip(answers, candidates, strict=True))

    said = exercise.mistakes
    for kind in problems[0].factors:
        if explains([p.factors[kind] * p.truth for p in problems]):
            return kind, f"{said[kind]} {_ratio(problems, kind)}"
    for kind in problems[0].wrong:
        candidates = [p.wrong[kind] for p in problems]
        if explains(candidates):
            errors = [relative_error(p.wrong[kind], p.truth) for p in problems]
            return kind, f"{said[kind]} The relative error is up to {max(errors):.2g}."
    for kind in problems[0].wrong:
        for factor in problems[0].factors:
            if explains([p.factors[factor] * p.wrong[kind] for p in problems]):
                return f"{kind}; {factor}", f"Two mistakes. {said[kind]} {said[factor]}"
    return None


def _ratio(problems: Sequence[Problem], kind: str) -> str:
    """Return the factor of a mistake, as found."""
    ratios = [f"{p.factors[kind]:.3g}" for p in problems]
    if len(set(ratios)) == 1:
        return f"Your answer is {ratios[0]} times the right one."
    return f"Your answers are {', '.join(ratios)} times the right ones."


def _unnamed(
    exercise: Exercise,
    problems: Sequence[Problem],
    answers: Sequence[Array],
    errors: Sequence[float],
) -> tuple[str, str]:
    """Return kind and description of an answer that no known mistake explains."""
    if all(
        float(np.linalg.norm(x)) <= 1e-3 * float(np.linalg.norm(p.truth))
        for x, p in zip(answers, problems, strict=True)
    ):
        return "zero", exercise.mistakes.get("zero", "All numbers are zero, or next to it.")
    scales = [
        float(x @ p.truth / (p.truth @ p.truth)) for x, p in zip(answers, problems, strict=True)
    ]
    left = [
        float(np.linalg.norm(x - c * p.truth) / np.linalg.norm(x)) if x.any() else 1.0
        for x, c, p in zip(answers, scales, problems, strict=True)
    ]
    if max(left) <= min(10 * exercise.tolerance, 0.01):
        listed = ", ".join(f"{c:.3g}" for c in scales)
        return (
            "wrong factor",
            "The answers are right but for a factor, to which a correlation would be blind. "
            f"It is {listed} on the problems in turn.",
        )
    if max(errors) <= NEAR:
        return (
            f"{exercise.near}, it seems",
            f"Near, but the relative error is up to {max(errors):.1e} where {exercise.tolerance:g} "
            f"is allowed: {exercise.inexact}",
        )
    wrong = sum(error > exercise.tolerance for error in errors)
    return (
        "not recognised",
        f"Wrong on {wrong} of {len(problems)} problems, with a relative error of up to "
        f"{max(errors):.2g}, and by none of the usual mistakes alone: there may be two at once. "
        f"Take the formula term by term. Also, {exercise.inexact}",
    )


def _explain_exception(
    function: Callable[..., Any], exercise: Exercise, kind: str, message: str
) -> tuple[str, str]:
    """Return what a function that raised would have answered where all sizes are equal.

    A transposed or misplaced block does not fit where the sizes differ. On a problem where they
    agree its name can be told.
    """
    problems = exercise.square()
    if not problems:
        return kind, message
    try:
        answers = [_answer(function, exercise, problem) for problem in problems]
    except (_Wrong, _NotDone):
        return kind, message
    named = _named(exercise, problems, answers)
    return (named[0], f"{message} {named[1]}") if named else (kind, message)
