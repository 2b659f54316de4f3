"""Products with the Hessian, and conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from msif_lib.study.course.exercises.problem import (
    Array,
    Endless,
    Exercise,
    Outcome,
    Problem,
    solve,
    tensor,
)


def _hvp_problems() -> list[Problem]:
    """Sums of fourth powers, sines and a quadratic form, whose Hessians can be written down."""
    problems = []
    for seed, p in enumerate((3, 5, 8)):
        rng = np.random.default_rng(100 + seed)
        a, c = rng.standard_normal((2 * p, p)) / np.sqrt(p), rng.standard_normal(2 * p)
        # Not symmetric: only the symmetric half is the Hessian of the quadratic form.
        b = rng.standard_normal((p, p))
        theta, v = rng.standard_normal((2, p))

        def objective(t: Tensor, a: Array = a, b: Array = b, c: Array = c) -> Tensor:
            a_, b_, c_ = (tensor(x).to(t.dtype) for x in (a, b, c))
            s = a_ @ t
            return (s**4).sum() / 4 + (c_ * s.sin()).sum() + t @ b_ @ t / 2

        def gradient(t: Array, a: Array = a, b: Array = b, c: Array = c) -> Array:
            s = a @ t
            return a.T @ (s**3 + c * np.cos(s)) + (b + b.T) @ t / 2

        def hessian(t: Array, a: Array = a, b: Array = b, c: Array = c) -> Array:
            s = a @ t
            return (a.T * (3 * s**2 - c * np.sin(s))) @ a + (b + b.T) / 2

        h, g = hessian(theta), gradient(theta)
        problems.append(
            Problem(
                [(objective, tensor(theta), tensor(v))],
                h @ v,
                "for each parameter",
                wrong={
                    "gradient, not product": g,
                    "product with θ, not v": h @ theta,
                    "outer product of the gradient": g * (g @ v),
                    "Hessian at the wrong point": hessian(np.zeros(p)) @ v,
                    "difference not divided by its step": gradient(theta + v) - g,
                    "diagonal only": np.diag(h) * v,
                    "H applied twice": h @ (h @ v),
                    "v normalised": h @ v / np.linalg.norm(v),
                    "inverse product": solve(h, v),
                    "v returned": v,
                },
                factors={"sign": -1.0, "factor 2": 2.0, "factor 1/2": 0.5},
                shapes={
                    (): "A single number is what the gradient times v gives; differentiate it.",
                    (p, p): "That is the whole Hessian; only its product with v is wanted.",
                },
            )
        )
    return problems


HVP = Exercise(
    signature="hvp(objective, theta, v)",
    returns="H v, shape (p,), with H the Hessian of objective at theta.",
    hint="See the first equation of the chapter “Hessian-vector products and solvers”.",
    mistakes={
        "sign": "The sign is wrong.",
        "factor 2": "A factor 2 too many: a central difference is divided by 2t.",
        "factor 1/2": "A factor 2 is missing.",
        "gradient, not product": "This is the gradient of the objective: it was differentiated "
        "once, not twice.",
        "product with θ, not v": "H was multiplied with theta in place of v.",
        "outer product of the gradient": "This is the gradient times its product with v, a "
        "stand-in for the Hessian that needs one differentiation only. Differentiate the number "
        "∇G·v, keeping v constant.",
        "Hessian at the wrong point": "The Hessian was taken at zero, not at theta.",
        "difference not divided by its step": "The gradient at theta + v minus that at theta is "
        "not the derivative in direction v: shorten the step, and divide by it.",
        "diagonal only": "Only the diagonal of H was used: the second derivatives in two different "
        "parameters are missing (the cross terms).",
        "H applied twice": "H was applied twice.",
        "v normalised": "v was scaled to length one; the product is linear in v.",
        "inverse product": "This solves H x = v; the product H v is wanted.",
        "v returned": "v came back unchanged.",
    },
    problems=_hvp_problems,
    near="step of a wrong size",
    inexact="a difference quotient with too long a step (or, in single precision, too short a one) "
    "would do this. Differentiate a second time instead.",
)


class Products:
    """Products with a matrix, counted.

    Parameters
    ----------
    matrix
        The matrix.
    limit
        Products after which `Endless` is raised.
    """

    def __init__(self, matrix: Array, limit: int = 20000) -> None:
        self.matrix, self.limit, self.count = tensor(matrix), limit, 0

    def __call__(self, v: Tensor) -> Tensor:
        """Return the matrix times v, in v's precision."""
        self.count += 1
        if self.count > self.limit:
            raise Endless(
                f"Stopped after {self.limit} products with A, where conjugate gradients need a few "
                "dozen: the residual did not reach the tolerance."
            )
        return self.matrix.to(v.dtype) @ v


def _cg_problems() -> list[Problem]:
    """Definite systems: few distinct eigenvalues, ill-conditioned, and a small right-hand side."""
    problems = []
    # Eigenvalues, the size of b, the tolerance.
    cases = [
        (np.repeat([0.5, 2.0, 7.0, 20.0], 10), 1.0, 1e-6),
        (np.geomspace(1e-2, 1.0, 30), 30.0, 1e-8),
        (np.linspace(1.0, 60.0, 24), 1e-4, 1e-5),
    ]
    for seed, (eigenvalues, scale, tol) in enumerate(cases):
        rng = np.random.default_rng(200 + seed)
        p = len(eigenvalues)
        q, _ = np.linalg.qr(rng.standard_normal((p, p)))
        a = (q * eigenvalues) @ q.T
        b = rng.standard_normal(p)
        b *= scale / np.linalg.norm(b)
        problems.append(
            Problem(
                [(Products((a + a.T) / 2), tensor(b), tol)],
                solve(a, b),
                "for each unknown",
                wrong={
                    "product, not solution": a @ b,
                    "right-hand side returned": b,
                    "solved twice": solve(a, solve(a, b)),
                },
                factors={"sign": -1.0},
            )
        )
    return problems


def _cg_steps(a: Array, b: Array, tol: float) -> int:
    """Return the number of steps that conjugate gradients take."""
    x, r = np.zeros_like(b), b.copy()
    d, steps = r.copy(), 0
    while np.linalg.norm(r) > tol * np.linalg.norm(b):
        ad = a @ d
        step = (r @ r) / (d @ ad)
        x, new = x + step * d, r - step * ad
        d, r, steps = new + (new @ new) / (r @ r) * d, new, steps + 1
    return steps


def _judge_cg(problems: Sequence[Problem], answers: Sequence[Array]) -> Outcome:
    """Judge by the residual that was asked for, and by the number of products."""
    residuals, tols, counts, steps = [], [], [], []
    for problem, x in zip(problems, answers, strict=True):
        products, right_hand_side, tol = problem.calls[0]
        a, b = products.matrix.numpy(), right_hand_side.numpy()
        residuals.append(float(np.linalg.norm(b - a @ x) / np.linalg.norm(b)))
        tols.append(tol)
        counts.append(products.count)
        steps.append(_cg_steps(a, b, tol))
        if np.linalg.norm(x) < 1e-3 * np.linalg.norm(problem.truth):
            return Outcome(
                "residual returned",
                "The answer is next to nothing: this looks like the residual r, which goes to "
                "zero; return x.",
            )
    # What rounding makes of a recurrence is no fault; twice the tolerance passes.
    missed = [r > 2 * tol for r, tol in zip(residuals, tols, strict=True)]
    listed = ", ".join(f"{r:.1e} (asked: {t:g})" for r, t in zip(residuals, tols, strict=True))
    found = f"The relative residuals ‖b − Ax‖/‖b‖ are {listed}."
    if any(missed):
        scales = [float(np.linalg.norm(p.calls[0][1].numpy())) for p in problems]
        absolute = [r * s <= 2 * t for r, s, t in zip(residuals, scales, tols, strict=True)]
        # Where the rule is rᵀr ≤ tol·bᵀb, what is missed lies just below the root of tol.
        roots = [
            0.03 < r / np.sqrt(t) < 1.5
            for r, t, bad in zip(residuals, tols, missed, strict=True)
            if bad
        ]
        if all(absolute):
            return Outcome(
                "absolute tolerance",
                f"{found} The residual was compared with tol itself; compare it with tol times "
                "‖b‖, or a small right-hand side counts as solved at once.",
            )
        if all(roots):
            return Outcome(
                "unconverged solve (squared norm)",
                f"{found} They look like square roots of what was asked: is the squared norm rᵀr "
                "compared with tol? The norm is its root.",
            )
        return Outcome(
            "unconverged solve",
            f"{found} The iteration stopped before the tolerance was reached. Let the residual "
            "decide, not a fixed number of steps; and if many steps do not help, look at the step "
            "length and at the new direction.",
        )
    allowed = [4 * s + 5 for s in steps]  # a product or three more a step are no harm
    if any(c > most for c, most in zip(counts, allowed, strict=True)):
        pairs = ", ".join(f"{c} (needed: {s})" for c, s in zip(counts, steps, strict=True))
        return Outcome(
            "too many products",
            f"The systems are solved, but with too many products with A: {pairs}. Steepest "
            "descent does that, if the part of the old direction is missing from the new one, and "
            "so does forming A column by column.",
        )
    return Outcome("", f"{found} Products with A: {', '.join(map(str, counts))}.")


CONJUGATE_GRADIENT = Exercise(
    signature="conjugate_gradient(matvec, b, tol)",
    returns="x, shape (p,), with ‖b − Ax‖ ≤ tol·‖b‖, where matvec(v) is A v.",
    hint="See the algorithm “Conjugate gradients” in the chapter “Hessian-vector products and "
    "solvers”.",
    mistakes={
        "sign": "The sign is wrong.",
        "product, not solution": "This is A b; the solution of A x = b is wanted.",
        "right-hand side returned": "This is b itself, as if A were the identity.",
        "solved twice": "The inverse was applied twice.",
    },
    problems=_cg_problems,
    judge=_judge_cg,
)
