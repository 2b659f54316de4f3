"""Solvers of (A + λI) x = b for symmetric A known by its products.

Every solver takes an operator and one right-hand side ``(p,)`` or several as columns ``(p, k)``,
which share each product, and returns a :class:`Solution`: x and a :class:`SolveReport` that says
what was solved, how far the residual came and, where it did not reach the tolerance, why.
Nothing here knows about influence functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.support.notices import warn_caller


class Operator(Protocol):
    """What a solver needs of A: an operator of :mod:`msif_lib.curvature` or a square tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p, p)``."""
        ...

    def __matmul__(self, x: Tensor, /) -> Tensor:
        """The product with columns ``(p, k)``."""
        ...


class Preconditioner(Protocol):
    """What a solver needs of P⁻¹ = S Sᵀ, near (A + λI)⁻¹ and positive definite."""

    def root(self, columns: Tensor, /) -> Tensor:
        """S times columns ``(p, k)``."""
        ...

    def root_transposed(self, columns: Tensor, /) -> Tensor:
        """Sᵀ times columns ``(p, k)``."""
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
    preconditioner
        The preconditioner used, in words.
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
    preconditioner: str = "none"

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
            warn_caller(f"{report.solver}: {report.message}", SolverWarning)
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


def _worst(norms: Tensor, b: Tensor) -> float:
    """The largest of residual norms ``(k,)`` relative to the right-hand sides."""
    return float(_relative(norms[None], b).max())


def _relative(residual: Tensor, b: Tensor) -> Tensor:
    """‖residual‖/‖b‖ a column, with 0 for a right-hand side that is zero."""
    scale = b.norm(dim=0)
    return residual.norm(dim=0) / torch.where(scale > 0, scale, 1.0)


@dataclass
class _State:
    """A Krylov iterate: x, the recurrence's residual norms ``(k,)``, where A bent down, ‖A‖."""

    x: Tensor
    norms: Tensor
    negative: Tensor
    size: float = 0.0


# A Krylov run ends when its recurrence promises a residual this much smaller than the true one,
# which is measured every so many iterations.
_DRIFT, _DRIFT_EVERY = 10.0, 100
# A residual above this is reached before a preconditioner would be ready (and half precision, whose
# default it is, is none that one could be factorised in).
_ROUGH = 5e-3

# (product with the matrix, right-hand sides, residual norms to be reached, what is known of ‖A‖
# from earlier runs) -> iterates.
_Iteration = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, float], Iterator[_State]]


def _conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Tensor, target: Tensor, size: float
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


def _orthonormal(columns: Tensor, negligible: float) -> tuple[Tensor, Tensor]:
    """V ``(p, s)`` with orthonormal columns and B ``(s, k)`` with columns = V B.

    s is the numerical rank: directions of length at most `negligible` are left out.
    """
    q, r = torch.linalg.qr(columns)
    left, lengths, right = torch.linalg.svd(r, full_matrices=False)
    kept = lengths > negligible
    return q @ left[:, kept], lengths[kept, None] * right[kept]


class _Basis:
    """Orthonormal vectors, kept as long as `memory` bytes allow, to hold later ones against."""

    def __init__(self, like: Tensor, memory: int) -> None:
        self._room = max(0, memory // (like.shape[0] * like.element_size()))
        self._rows = like.new_empty(0, like.shape[0])
        self._count = 0

    def append(self, v: Tensor) -> None:
        if self._count + v.shape[1] > self._room:
            return
        if self._count + v.shape[1] > len(self._rows):
            longer = min(self._room, max(2 * len(self._rows), 16 * v.shape[1]))
            rows = self._rows.new_empty(longer, self._rows.shape[1])
            rows[: self._count] = self._rows[: self._count]
            self._rows = rows
        self._rows[self._count : self._count + v.shape[1]] = v.T
        self._count += v.shape[1]

    def remove_from(self, columns: Tensor) -> Tensor:
        """The columns less their components along the vectors kept."""
        known = self._rows[: self._count]
        return columns - known.T @ (known @ columns)


def _minimal_residual(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    target: Tensor,
    size: float,
    preconditioner: Preconditioner | None,
    memory: int,
) -> Iterator[_State]:
    """Block MINRES (Paige & Saunders 1975; in blocks, Soodhalter 2015), preconditioned.

    With P⁻¹ = S Sᵀ it works on Â = Sᵀ A S. Block Lanczos builds V_1, V_2, ... with

        Â V_k = V_{k−1} β_{k−1}ᵀ + V_k α_k + V_{k+1} β_k,      V_1 β_0 = Sᵀ b,

    and a QR factorisation of this block tridiagonal matrix gives the x of least residual
    ‖Sᵀ(b − A x)‖ in the span of S V_1, ..., S V_k, for all right-hand sides at once:

        D_k = (V_k − D_{k−1} δ_k − D_{k−2} ε_k) γ_k⁻¹,         x += S D_k τ_k.

    A is nowhere required to be definite. Blocks shrink where the right-hand sides have less than
    k independent directions left. Rounding would let the V lose their orthogonality, and with it
    many iterations; those that `memory` can hold are kept and held against.

    The run ends before its target where no further step would help: Krylov space exhausted, or a
    direction d of length ‖d‖ ‖Â‖ ≫ 1 = ‖Â d‖, which is a null vector to rounding.
    """
    rounding = torch.finfo(b.dtype).eps ** 0.75
    lengths = b.norm(dim=0)
    right = b / torch.where(lengths > 0, lengths, 1.0)
    right = preconditioner.root_transposed(right) if preconditioner else right
    v, phi = _orthonormal(right, rounding * float(right.norm(dim=0).max()))
    phi = phi * lengths
    x, norms = torch.zeros_like(b), lengths
    basis = _Basis(b, memory)
    v_old, beta = v[:, :0], v.new_zeros(v.shape[1], 0)
    # D of the last two blocks and the reflections that made them.
    moved = torch.cat([x, x]) if preconditioner else x
    d_1 = d_2 = moved[:, :0]
    q_1 = torch.eye(v.shape[1]).to(v)
    q_2 = v.new_zeros(0, 0)
    pivot, negative = beta.new_zeros(0, 0), torch.zeros_like(lengths, dtype=torch.bool)
    while v.shape[1] and bool((norms > target).any()):
        basis.append(v)
        z = preconditioner.root(v) if preconditioner else v
        az = apply(z)
        q = preconditioner.root_transposed(az) if preconditioner else az
        alpha = v.T @ q
        q = q - v @ alpha - v_old @ beta.T
        # Once more, for rounding has left some of them in.
        q = basis.remove_from(q - v @ (v.T @ q) - v_old @ (v_old.T @ q))
        size = max(size, float(torch.linalg.matrix_norm(torch.cat([alpha, beta], 1), 2)))
        v_new, beta_new = _orthonormal(q, rounding * size)

        # The tridiagonal matrix is positive definite while its pivots are.
        if not negative.any():
            below = beta @ torch.linalg.solve(pivot, beta.T) if len(pivot) else 0.0
            pivot = alpha - below
            negative |= bool(torch.linalg.eigvalsh((pivot + pivot.T) / 2)[0] <= 0)

        # The last two reflections applied to the new column of blocks, then the next one.
        rows = torch.cat([beta.new_zeros(len(q_2) - beta.shape[1], len(alpha)), beta.T])
        rows = q_2.T @ rows
        epsilon, rest = rows.split([d_2.shape[1], len(rows) - d_2.shape[1]])
        rows = q_1.T @ torch.cat([rest, alpha])
        delta, gamma = rows.split([d_1.shape[1], len(rows) - d_1.shape[1]])
        q_2, (q_1, r) = q_1, torch.linalg.qr(torch.cat([gamma, beta_new]), mode="complete")
        # γ_k⁻¹ by its singular values: where one is zero to rounding there is a null vector, and
        # what the other directions give is taken before the run ends.
        left, values, right = torch.linalg.svd(r[: len(alpha)])
        good = values > rounding * size
        inverse = (right[good].T / values[good]) @ left[:, good].T
        # With a preconditioner φ is not the norm of the residual, so A S D is carried along with D.
        d = torch.cat([v, az]) if preconditioner else v
        d_1, d_2 = (d - d_1 @ delta - d_2 @ epsilon) @ inverse, d_1
        if rounding * size * float(d_1[: len(b)].norm(dim=0).max()) > 1:
            yield _State(x, norms, negative, size)
            return
        phi = q_1.T @ torch.cat([phi, phi.new_zeros(beta_new.shape[0], phi.shape[1])])
        tau, phi = phi.split([len(alpha), beta_new.shape[0]])
        moved = moved + d_1 @ tau
        x, ax = moved.split([len(b), len(moved) - len(b)])
        norms = (b - ax if preconditioner else phi).norm(dim=0)
        if preconditioner:
            x = preconditioner.root(x)
        if not good.all():
            yield _State(x, norms, negative, size)
            return
        v_old, v, beta = v, v_new, beta_new
        yield _State(x, norms, negative, size)


@dataclass(frozen=True)
class _Krylov(Solver):
    """A Krylov method, begun again on the true residual where rounding made it drift.

    Attributes
    ----------
    tol
        Relative residual ‖b − (A + λI) x‖ ≤ tol ‖b‖ asked for. None: 1e-8 in float64, 1e-4
        in float32 and 1e-2 in half precision, about what each can reach on the Hessian of a trained
        network.
    max_iterations
        Iterations allowed for a right-hand side. None: twice the size, at least 1,000 and at most
        10,000.
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
        definite: bool = False,
    ) -> tuple[Tensor, SolveReport]:
        """Iterate, measure the true residual, and begin again on it while that helps.

        `definite` says that the method needs a positive definite matrix.
        """
        tol = self._tolerance(b.dtype)
        asked = b.dtype
        if asked.itemsize < 4:  # the products in half precision, the recurrences in single
            b = b.float()
        limit = self.max_iterations or min(max(1000, 2 * b.shape[0]), 10_000)
        history: list[float] = []
        products = 0
        negative, size = False, 0.0

        def counted(columns: Tensor) -> Tensor:
            nonlocal products
            products += columns.shape[1]
            return _checked(apply(columns.to(asked))).to(b.dtype)

        x, residual, target = torch.zeros_like(b), b, tol * b.norm(dim=0)
        norms = b.norm(dim=0)
        iterations = torch.zeros(b.shape[1], dtype=torch.long)

        def measure(trial: Tensor, columns: Tensor) -> Tensor:
            """The true residual norms of an iterate, which is kept where it is the best yet."""
            nonlocal x, residual, norms
            true = b[:, columns] - counted(trial)
            measured = true.norm(dim=0)
            better = measured < norms[columns]
            chosen = columns[better]
            x, residual, norms = x.clone(), residual.clone(), norms.clone()
            x[:, chosen], residual[:, chosen] = trial[:, better], true[:, better]
            norms[chosen] = measured[better]
            return measured

        with tqdm(
            desc=type(self).__name__, disable=not progress, delay=1, leave=False, unit=" it"
        ) as bar:

            def run(columns: Tensor) -> None:
                """One run on the residual of some columns, in step."""
                nonlocal negative, size
                start, trial = x[:, columns], x[:, columns]
                wanted, promised = target[columns], norms.clone()
                for state in iteration(counted, residual[:, columns], wanted, size):
                    trial, size = start + state.x, state.size
                    negative |= bool(state.negative.any())
                    promised[columns] = state.norms
                    history.append(float(_relative(promised[None], b).max()))
                    iterations[columns.cpu()] += 1
                    bar.set_postfix(residual=f"{history[-1]:.1e}", refresh=False)
                    bar.update()
                    if int(iterations[columns.cpu()].max()) >= limit:
                        break
                    if len(history) % _DRIFT_EVERY == 0:
                        expected = torch.maximum(state.norms, wanted)
                        if bool((measure(trial, columns) > _DRIFT * expected).any()):
                            return
                measure(trial, columns)

            # Begun again while that at least halves the residual: rounding sets a floor. Where a
            # block of right-hand sides gets no further, each goes on by itself.
            together = b.shape[1] > 1
            worst, before = _worst(norms, b), torch.inf
            while worst > tol and not (definite and negative):
                if worst > 0.5 * before:
                    if not together:
                        break
                    together, before = False, torch.inf
                    continue
                before = worst
                left = ((norms > target).cpu() & (iterations < limit)).nonzero()[:, 0].to(b.device)
                if not len(left):
                    break
                for columns in [left] if together else left.split(1):
                    run(columns)
                worst = _worst(norms, b)
        broken = definite and negative and worst > tol
        converged = worst <= tol
        bent = f"met negative curvature, so the matrix of {self._system} is not positive definite"
        if converged:
            message = f"{bent}; solved to the tolerance" if negative else SolveReport.message
        elif broken:
            message = (
                f"{bent}; stopped after {int(iterations.max())} iterations with relative residual "
                f"{worst:.1e}. Train to a minimum, raise the damping, or use MinRes, which does "
                "not need a definite matrix"
            )
        else:
            why = (
                f"stopped at the limit of {limit} iterations"
                if int(iterations.max()) >= limit
                else "stagnated: the system is singular, or "
                f"{str(asked).removeprefix('torch.')} allows no more"
            )
            message = (
                f"{why}: relative residual {worst:.1e} where {tol:.1e} was asked for. Allow more "
                "iterations, raise the damping, or solve in float64"
            )
        report = SolveReport(
            solver=type(self).__name__,
            system=self._system,
            damping=self.damping,
            iterations=int(iterations.max()),
            products=products,
            residuals=tuple(_relative(residual, b).tolist()),
            history=tuple(history),
            converged=converged,
            negative_curvature=negative,
            message=message,
        )
        return x.to(asked), report

    def _tolerance(self, dtype: torch.dtype) -> float:
        return self.tol or {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 1e-2)


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
                definite=True,
            )
        x, report = self._run(
            _conjugate_gradient,
            lambda x: operator @ (operator @ x) + self.damping * x,
            _checked(operator @ b),
            progress,
            definite=True,
        )
        return x, replace(report, products=2 * report.products + b.shape[1])

    @property
    def _system(self) -> str:
        if not self.squared:
            return super()._system
        return f"(A² + {self.damping:g} I) x = A b" if self.damping else "A² x = A b"


@dataclass(frozen=True)
class MinRes(_Krylov):
    """Minimal residuals on A + λI, definite or not, in blocks and preconditioned: the default.

    Several right-hand sides share one Krylov space, which then needs fewer iterations than any
    of them alone. Costs what conjugate gradients cost where both work.

    Attributes
    ----------
    tol, max_iterations, damping
        Relative residual, iterations allowed, λ.
    precondition
        Use the operator's preconditioner, where it has one (see :mod:`msif_lib.preconditioner`).
        Changes the number of iterations, never what is solved.
    memory
        Bytes for basis vectors, which are kept to hold later ones orthogonal to them. Beside them
        a solve holds about sixteen times the right-hand sides.
    """

    precondition: bool = True
    memory: int = 2**29

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        preconditioner = None
        rough = self._tolerance(b.dtype) > _ROUGH
        if self.precondition and not rough and hasattr(operator, "preconditioner"):
            preconditioner = operator.preconditioner(self.damping)
        x, report = self._run(
            partial(_minimal_residual, preconditioner=preconditioner, memory=self.memory),
            lambda x: operator @ x + self.damping * x,
            b,
            progress,
        )
        return x, replace(report, preconditioner=str(preconditioner or "none"))


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
