"""Solvers of (A + λI) x = b for symmetric A known by its products.

Every solver takes an operator and one right-hand side ``(p,)`` or several as columns ``(p, k)``,
which share each product, and returns a :class:`Solution`: x and a :class:`SolveReport` that says
what was solved, how far the residual came and, where it did not reach the tolerance, why.
Nothing here knows about influence functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm


class Operator(Protocol):
    """What a solver needs of A: an operator of :mod:`msif_lib.curvature` or a square tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p, p)``."""
        ...

    def __matmul__(self, x: Tensor, /) -> Tensor:
        """The product with columns ``(p, k)``."""
        ...


class SolverWarning(UserWarning):
    """A solve stopped short of its tolerance or met negative curvature."""


@dataclass(frozen=True)
class SolveReport:
    """What a solve did.

    Attributes
    ----------
    solver
        Name of the solver.
    system
        The system solved, in words: ``"(A + 0.01 I) x = b"``.
    damping
        λ.
    iterations
        Iterations, of the slowest right-hand side.
    products
        Products with A, in columns: one product with ``(p, k)`` counts k.
    residuals
        ‖b − (A + λI) x‖ / ‖b‖ for each right-hand side, measured by a product at the end.
    history
        The largest relative residual after each iteration, from the solver's own recurrence.
    converged
        Whether every residual is within the tolerance.
    negative_curvature
        Whether a direction with dᵀ(A + λI)d ≤ 0 was met (the matrix is not positive definite).
    message
        A sentence for a person: what happened, and what to try where it failed.
    """

    solver: str
    system: str
    damping: float
    iterations: int
    products: int
    residuals: tuple[float, ...]
    history: tuple[float, ...]
    converged: bool
    negative_curvature: bool = False
    message: str = "solved to the tolerance"

    @property
    def residual(self) -> float:
        """The largest relative residual."""
        return max(self.residuals)


@dataclass(frozen=True)
class Solution:
    """The solution `x`, shaped like the right-hand side, and the `report` of the solve."""

    x: Tensor
    report: SolveReport


@dataclass(frozen=True)
class Solver:
    """A method for (A + λI) x = b; calling it is the same as :meth:`solve`.

    Attributes
    ----------
    damping
        λ ≥ 0, added to the diagonal.
    """

    damping: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping must be zero or positive, not {self.damping}")

    def __call__(self, operator: Operator, b: Tensor, *, progress: bool = False) -> Solution:
        """The same as :meth:`solve`."""
        return self.solve(operator, b, progress=progress)

    def solve(self, operator: Operator, b: Tensor, *, progress: bool = False) -> Solution:
        """Solve (A + λI) x = b.

        Parameters
        ----------
        operator
            A: symmetric, of shape ``(p, p)``, with ``@``.
        b
            Right-hand sides ``(p,)`` or ``(p, k)``.
        progress
            Show a bar for solves of more than a second.

        Returns
        -------
        Solution
            ``x`` of the shape of `b`, and the report.

        Raises
        ------
        ValueError
            `b` does not fit the operator, or is not finite.
        FloatingPointError
            A product with A is not finite.

        Warns
        -----
        SolverWarning
            The residual is above the tolerance, or negative curvature was met.
        """
        if b.dim() not in (1, 2) or tuple(operator.shape) != (b.shape[0],) * 2:
            raise ValueError(
                f"right-hand side of shape {tuple(b.shape)} does not fit an operator of shape "
                f"{tuple(operator.shape)}"
            )
        if not b.isfinite().all():
            raise ValueError("the right-hand side is not finite")
        columns = b[:, None] if b.dim() == 1 else b
        x, report = self._solve(operator, columns, progress)
        if not x.isfinite().all():
            raise FloatingPointError(f"{report.solver}: the solution of {report.system} overflowed")
        if report.message != SolveReport.message and not isinstance(self, Identity):
            warnings.warn(f"{report.solver}: {report.message}", SolverWarning, stacklevel=2)
        return Solution(x[:, 0] if b.dim() == 1 else x, report)

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        raise TypeError(f"{type(self).__name__} does not define a method")

    @property
    def _system(self) -> str:
        return f"(A + {self.damping:g} I) x = b" if self.damping else "A x = b"


def _checked(product: Tensor) -> Tensor:
    if not product.isfinite().all():
        raise FloatingPointError(
            "a product with the operator is not finite; look for non-finite second derivatives "
            "(sqrt or norm at zero) or overflow in float32"
        )
    return product


def _relative(residual: Tensor, b: Tensor) -> Tensor:
    """‖residual‖/‖b‖ a column, with 0 for a right-hand side that is zero."""
    scale = b.norm(dim=0)
    return residual.norm(dim=0) / torch.where(scale > 0, scale, 1.0)


@dataclass
class _State:
    """A Krylov iterate: x, the recurrence's residual norms ``(k,)``, and where A bent down."""

    x: Tensor
    norms: Tensor
    negative: Tensor


# A Krylov run ends when its recurrence promises a residual this much smaller than the true one,
# which is measured every so many iterations.
_DRIFT, _DRIFT_EVERY = 10.0, 100

_Iteration = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Iterator[_State]]


def _conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Tensor, target: Tensor
) -> Iterator[_State]:
    """Conjugate gradients (Hestenes & Stiefel 1952), all columns in step, each to its target."""
    x, r, d = torch.zeros_like(b), b, b
    rho = (r * r).sum(0)
    active = rho.sqrt() > target
    negative = torch.zeros_like(active)
    while active.any():
        q = torch.zeros_like(b)
        q[:, active] = apply(d[:, active])
        curvature = (d * q).sum(0)
        negative |= active & (curvature <= 0)
        active &= curvature > 0
        step = torch.where(active, rho / curvature, 0.0)
        x, r = x + step * d, r - step * q
        previous, rho = rho, (r * r).sum(0)
        d = r + torch.where(active, rho / previous, 0.0) * d
        active &= rho.sqrt() > target
        yield _State(x, rho.sqrt(), negative)


def _minimal_residual(
    apply: Callable[[Tensor], Tensor], b: Tensor, target: Tensor
) -> Iterator[_State]:
    """MINRES (Paige & Saunders 1975): Lanczos vectors v, a QR factorisation by reflections.

    Names follow Choi & Saunders: T_k has the diagonal α and the off-diagonal β, (c, s) is the
    last reflection, φ the residual norm. A is nowhere required to be definite.

    A column ends before its target where no step would help, x staying as it was: A r = 0 to
    rounding (a singular system without a solution, whose least residual is reached), or a
    direction d of length ‖d‖ ‖A‖ ≫ 1 = ‖A d‖, which is a null vector to rounding.
    """
    x = torch.zeros_like(b)
    beta = b.norm(dim=0)
    phi = beta.clone()
    active = phi > target
    negative = torch.zeros_like(active)
    v_old, v = torch.zeros_like(b), torch.where(active, b / beta, 0.0)
    beta = torch.zeros_like(beta)
    d_old, d = torch.zeros_like(b), torch.zeros_like(b)
    c, s = -torch.ones_like(beta), torch.zeros_like(beta)
    delta, epsilon = torch.zeros_like(beta), torch.zeros_like(beta)
    size, rounding = torch.zeros_like(beta), torch.finfo(b.dtype).eps ** 0.75
    while active.any():
        q = torch.zeros_like(b)
        q[:, active] = apply(v[:, active])
        alpha = (v * q).sum(0)
        q = q - alpha * v - beta * v_old
        beta = q.norm(dim=0)
        # The last two reflections applied to the new column of T, then the next one.
        delta_2, gamma = c * delta + s * alpha, s * delta - c * alpha
        epsilon_old, epsilon, delta = epsilon, s * beta, -c * beta
        # size estimates ‖A‖; ‖A r‖ = φ hypot(γ, δ) for the residual r before this step.
        size = torch.maximum(size, torch.hypot(alpha, beta))
        active &= torch.hypot(gamma, delta) > rounding * size
        # rᵀAr = −c γ φ² (Liu & Roosta 2022).
        negative |= active & (c * gamma >= 0)
        gamma_2 = torch.hypot(gamma, beta)
        d_old, d = d, torch.where(active, (v - delta_2 * d - epsilon_old * d_old) / gamma_2, 0.0)
        active &= rounding * size * d.norm(dim=0) <= 1
        c, s = (torch.where(active, part / gamma_2, 0.0) for part in (gamma, beta))
        x = x + torch.where(active, c * phi * d, 0.0)
        phi = torch.where(active, s * phi, phi)
        v_old, v = v, torch.where(active & (beta > 0), q / beta, 0.0)
        active &= phi > target
        yield _State(x, phi, negative)


@dataclass(frozen=True)
class _Krylov(Solver):
    """A Krylov method, begun again on the true residual where rounding made it drift.

    Attributes
    ----------
    tol
        Relative residual ‖b − (A + λI) x‖ ≤ tol ‖b‖ asked for. None: 1e-8 in float64 and 1e-4
        in float32, about what each can reach on the Hessian of a trained network.
    max_iterations
        Iterations allowed in all. None: twice the size, at least 1,000 and at most 10,000.
    """

    tol: float | None = None
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tol is not None and not 0 < self.tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, not {self.tol}")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, not {self.max_iterations}")

    def _run(
        self,
        iteration: _Iteration,
        apply: Callable[[Tensor], Tensor],
        b: Tensor,
        progress: bool,
    ) -> tuple[Tensor, SolveReport]:
        tol = self.tol or (1e-8 if b.dtype == torch.float64 else 1e-4)
        limit = self.max_iterations or min(max(1000, 2 * b.shape[0]), 10_000)
        history: list[float] = []
        products = 0
        negative = False

        def counted(columns: Tensor) -> Tensor:
            nonlocal products
            products += columns.shape[1]
            return _checked(apply(columns))

        x, residual, target = torch.zeros_like(b), b, tol * b.norm(dim=0)
        norms = torch.full_like(target, torch.inf)

        def measure(trial: Tensor) -> Tensor:
            """The true residual norms of an iterate, which is kept where it is the best yet."""
            nonlocal x, residual, norms
            true = b - counted(trial)
            measured = true.norm(dim=0)
            better = measured < norms
            x, residual = torch.where(better, trial, x), torch.where(better, true, residual)
            norms = torch.where(better, measured, norms)
            return measured

        worst, before = 1.0, torch.inf
        with tqdm(
            desc=type(self).__name__, disable=not progress, delay=1, leave=False, unit=" it"
        ) as bar:
            # Begun again only while that at least halves the residual: rounding sets a floor.
            broken = False
            while worst > tol and worst <= 0.5 * before and not broken and len(history) < limit:
                before, start = worst, x
                trial = start
                for state in iteration(counted, residual, target):
                    trial = start + state.x
                    negative |= bool(state.negative.any())
                    history.append(float(_relative(state.norms[None], b).max()))
                    bar.set_postfix(residual=f"{history[-1]:.1e}", refresh=False)
                    bar.update()
                    if len(history) == limit:
                        break
                    if len(history) % _DRIFT_EVERY == 0:
                        promised = torch.maximum(state.norms, target)
                        if bool((measure(trial) > _DRIFT * promised).any()):
                            break
                measure(trial)
                worst = float(_relative(residual, b).max())
                broken = negative and iteration is _conjugate_gradient
        converged = worst <= tol
        bent = f"met negative curvature, so the matrix of {self._system} is not positive definite"
        if converged:
            message = f"{bent}; solved to the tolerance" if negative else SolveReport.message
        elif broken:
            message = (
                f"{bent}; stopped after {len(history)} iterations with relative residual "
                f"{worst:.1e}. Train to a minimum, raise the damping, or use MinRes, which does "
                "not need a definite matrix"
            )
        else:
            why = (
                f"stopped at the limit of {limit} iterations"
                if len(history) >= limit
                else "stagnated: the system is singular, or "
                f"{str(b.dtype).removeprefix('torch.')} allows no more"
            )
            message = (
                f"{why}: relative residual {worst:.1e} where {tol:.1e} was asked for. Allow more "
                "iterations, raise the damping, or solve in float64"
            )
        report = SolveReport(
            solver=type(self).__name__,
            system=self._system,
            damping=self.damping,
            iterations=len(history),
            products=products,
            residuals=tuple(_relative(residual, b).tolist()),
            history=tuple(history),
            converged=converged,
            negative_curvature=negative,
            message=message,
        )
        return x, report


@dataclass(frozen=True)
class ConjugateGradient(_Krylov):
    """Conjugate gradients on A + λI, or on A² + λI as the paper does (its eq. 16).

    Stops with a warning where A + λI is not positive definite.

    Attributes
    ----------
    tol, max_iterations, damping
        Relative residual, iterations allowed, λ.
    squared
        Solve (A² + λI) x = A b. That is positive definite for every nonsingular A, at the price
        of two products an iteration and of the condition number squared. It is not damped
        inversion: on an eigenvalue h it applies h/(h² + λ) where damping applies 1/(h + λ).
        Residuals are then those of this system.
    """

    squared: bool = False

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        if not self.squared:
            return self._run(
                _conjugate_gradient,
                lambda x: operator @ x + self.damping * x,
                b,
                progress,
            )
        x, report = self._run(
            _conjugate_gradient,
            lambda x: operator @ (operator @ x) + self.damping * x,
            _checked(operator @ b),
            progress,
        )
        return x, replace(report, products=2 * report.products + b.shape[1])

    @property
    def _system(self) -> str:
        if not self.squared:
            return super()._system
        return f"(A² + {self.damping:g} I) x = A b" if self.damping else "A² x = A b"


@dataclass(frozen=True)
class MinRes(_Krylov):
    """Minimal residuals on A + λI, definite or not: the default.

    Costs what conjugate gradients cost where both work, and the residual never grows.

    Attributes
    ----------
    tol, max_iterations, damping
        Relative residual, iterations allowed, λ.
    """

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        return self._run(_minimal_residual, lambda x: operator @ x + self.damping * x, b, progress)


@dataclass(frozen=True)
class Dense(Solver):
    """Cholesky of the whole matrix A + λI, or its eigenvalues where it is not positive definite.

    For a few thousand parameters: p products and p² numbers. The matrix is kept by the operator,
    so that further solves cost its factorisation only.

    Attributes
    ----------
    damping
        λ.
    """

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        known = isinstance(operator, Tensor)
        matrix = operator if isinstance(operator, Tensor) else operator.dense()  # type: ignore[attr-defined]
        matrix = _checked((matrix + matrix.T) / 2)
        shifted = matrix + self.damping * torch.eye(len(matrix)).to(matrix)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        pivots = factor.diagonal() ** 2
        # A pivot that is rounding of a zero can come out positive.
        rounding = len(matrix) * torch.finfo(b.dtype).eps * pivots.max()
        definite = not failed and bool(pivots.min() > rounding)
        message, converged = SolveReport.message, True
        if definite:
            x = torch.cholesky_solve(b, factor)
        else:
            values, vectors = torch.linalg.eigh(shifted)
            small = values.abs() <= len(values) * torch.finfo(b.dtype).eps * values.abs().max()
            inverse = torch.where(small, 0.0, 1 / torch.where(small, 1.0, values))
            x = vectors @ (inverse[:, None] * (vectors.T @ b))
            converged = not bool(small.any())
            message = (
                f"{self._system} is not positive definite (lowest eigenvalue {values[0]:.1e}); "
                "solved by eigenvalues"
                if converged
                else f"{self._system} is singular ({int(small.sum())} eigenvalues are zero to "
                "rounding); returned the least-norm solution. Add damping or weight decay"
            )
        residuals = _relative(b - shifted @ x, b)
        report = SolveReport(
            solver="Dense",
            system=self._system,
            damping=self.damping,
            iterations=0,
            products=0 if known else len(matrix),
            residuals=tuple(residuals.tolist()),
            history=(),
            converged=converged,
            negative_curvature=not definite,
            message=message,
        )
        return x, report


@dataclass(frozen=True)
class Identity(Solver):
    """x = b: the identity in place of the inverse Hessian, the paper's baseline (Figure 2c).

    Its report states the residual that this leaves, and makes no claim to have converged.
    """

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        residuals = _relative(b - _checked(operator @ b + self.damping * b), b)
        report = SolveReport(
            solver="Identity",
            system=self._system,
            damping=self.damping,
            iterations=0,
            products=b.shape[1],
            residuals=tuple(residuals.tolist()),
            history=(),
            converged=False,
            message="the identity stands in for the inverse: a baseline, not a solution",
        )
        return b.clone(), report
