"""Small problems with known answers, and the answers that the usual mistakes give.

What :mod:`msif_lib.study.course.grader` compares a student's function with. The right answers come
from NumPy and closed forms, never from the library's own code or from automatic differentiation;
none is stored. Every exercise has several problems, of different size and kind, so that no constant
and no coincidence passes. Where a mistake would not show, the problem is made so that it does:
unequal numbers of parameters, 2α far from 1, few examples, a strong weight decay.
"""

from __future__ import annotations

from msif_lib.study.course.exercises.chains import CHAIN
from msif_lib.study.course.exercises.one_stage import INFLUENCE, RETRAINING
from msif_lib.study.course.exercises.problem import Array, Endless, Exercise, Outcome, Problem
from msif_lib.study.course.exercises.solvers import CONJUGATE_GRADIENT, HVP
from msif_lib.study.course.exercises.steps import ADJOINT
from msif_lib.study.course.exercises.two_stages import CASE1, CASE2

__all__ = ["EXERCISES", "Array", "Endless", "Exercise", "Outcome", "Problem"]

EXERCISES = {
    "hvp": HVP,
    "conjugate_gradient": CONJUGATE_GRADIENT,
    "influence": INFLUENCE,
    "case1": CASE1,
    "case2": CASE2,
    "chain": CHAIN,
    "adjoint": ADJOINT,
    "retraining": RETRAINING,
}
