"""Solvers of (A + λI) x = b for symmetric A known by its products.

Every solver takes an operator and one right-hand side ``(p,)`` or several as columns ``(p, k)``,
which share each product, and returns a :class:`Solution`: x and a :class:`SolveReport` that says
what was solved, how far the residual came and, where it did not reach the tolerance, why. Where
nothing was found at all, x = 0 for b ≠ 0, it raises :class:`FailedSolve`: no such answer goes on.
Nothing here knows about influence functions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.minres import Iterate, Preconditioner, far_scales, minimal_residual
from msif_lib.spectrum import lowest_eigenvalue
from msif_lib.support.arguments import check_limits, check_system, flag, not_negative, whole
from msif_lib.support.notices import warn_caller
from msif_lib.support.state import OwnState


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


class FailedSolve(FloatingPointError):
    """A solve found nothing: its solution is zero where b is not, or left the finite numbers.

    Attributes
    ----------
    report
        What the solver did. None where it could not end.
    """

    def __init__(self, message: str, report: SolveReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[FailedSolve], tuple[str, SolveReport | None]]:
        """Pickled with its report, as between processes."""
        return type(self), (str(self), self.report)


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
        Products with A, in columns: one product with ``(p, k)`` counts k. Those for an estimate of
        the lowest eigenvalue are among them.
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
    lowest_eigenvalue
        That of A, as :func:`automatic_damping` estimates it. None: it was not looked for.
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
    lowest_eigenvalue: float | None = None

    def __post_init__(self) -> None:
        if any(map(math.isnan, (self.damping, *self.residuals, *self.history))):
            raise ValueError(
                f"{self.solver}: a report states no residual that is not a number, but was given "
                f"residuals {self.residuals}"
            )

    @property
    def residual(self) -> float:
        """The largest relative residual."""
        return max(self.residuals)


@dataclass(frozen=True)
class Solution:
    """The solution `x`, shaped like the right-hand side, and the `report` of the solve."""

    x: Tensor
    report: SolveReport


# Automatic damping is at least so often what the lowest eigenvalue lies below zero, and this share
# of the geometric mean of that and the largest in size.
_TWICE, _BETWEEN = 2.0, 0.3


class AutomaticDamping(NamedTuple):
    """What :func:`automatic_damping` found.

    Attributes
    ----------
    damping
        λ.
    lowest_eigenvalue
        The estimate on which it rests.
    products
        Products with A that it took.
    """

    damping: float
    lowest_eigenvalue: float
    products: int


def automatic_damping(
    operator: Operator, like: Tensor | None = None, progress: bool = False
) -> AutomaticDamping:
    """The λ that ``damping="auto"`` takes, from the lowest and the largest eigenvalue.

        λ = max(−2 λ_min, 0.3 √(−λ_min ‖A‖))  where λ_min < 0,   else 0

    A smaller shift than −λ_min leaves eigenvalues below zero, and brings others so near it that
    their inverses outweigh the rest: too little damping is worse than none. Twice as much puts the
    lowest at −λ_min. Where λ_min is tiny beside ‖A‖, as in trainings by Adam, that is too little
    still, which the geometric mean of the two repairs; it goes to 0 with λ_min, so that nothing
    jumps near a minimum. The factors were chosen for two-stage datamodeling scores (digits, an
    updated embedding, four recipes of SGD and AdamW), on seeds that no result is reported on.

    A matrix with nothing below zero is left alone: at a minimum that is exact. But a head whose
    training stopped early has such a Hessian too, and only its gradient would tell.

    λ_min is estimated by Lanczos from a random start, always the same, in at most 40 products
    (:func:`msif_lib.spectrum.lowest_eigenvalue`). A negative estimate, which is one from above, is
    lowered by its error. One that is zero to rounding counts as zero.

    Parameters
    ----------
    operator
        A, symmetric, of shape ``(p, p)``.
    like
        A tensor of the dtype, on the device, that its products take; None: those of the operator.
    progress
        Show a bar for what takes more than a second.

    Returns
    -------
    AutomaticDamping
        λ, the estimate of λ_min, and how many products it took.

    Raises
    ------
    FloatingPointError
        A product with A is not finite.
    """
    known: Any = operator if like is None else like
    dtype, device = known.dtype, known.device
    # Drawn on the CPU: on each device, and in each of several processes, the same.
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    with tqdm(
        desc="lowest eigenvalue", disable=not progress, delay=1, leave=False, unit=" products"
    ) as bar:

        def product(v: Tensor) -> Tensor:
            bar.update()
            return _checked(operator @ v.to(dtype)).to(v)

        found = lowest_eigenvalue(product, start.to(device, _working(dtype)))
    if found.value >= -found.size * torch.finfo(dtype).eps ** 0.75:
        return AutomaticDamping(0.0, found.value, found.products)
    lowest = found.value - found.error
    damping = max(_TWICE * -lowest, _BETWEEN * math.sqrt(-lowest * found.size))
    return AutomaticDamping(damping, lowest, found.products)


@dataclass(frozen=True)
class Solver(OwnState, ABC):
    """A method for (A + λI) x = b; calling it is the same as :meth:`solve`.

    Attributes
    ----------
    damping
        λ ≥ 0, added to the diagonal; ``"auto"``: what :func:`automatic_damping` says of each A.
    """

    damping: float | Literal["auto"] = field(default=0.0, kw_only=True)

    # Whether a residual above the tolerance is news.
    _warns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.damping, str) and self.damping == "auto":
            return
        try:
            not_negative("damping", self.damping)
        except TypeError as error:
            raise TypeError(f'{error}; or "auto"') from None

    @property
    def shift(self) -> float:
        """λ, where it is a number.

        Raises
        ------
        ValueError
            It is ``"auto"``, which :meth:`decided` makes a number.
        """
        if isinstance(self.damping, str):
            raise ValueError('damping is "auto": it is decided for each operator')
        return self.damping

    def decided(
        self, operator: Operator, like: Tensor | None = None, progress: bool = False
    ) -> tuple[Self, AutomaticDamping | None]:
        """The same solver with a number for its damping, and what that rests on.

        Parameters
        ----------
        operator, like, progress
            As of :func:`automatic_damping`.

        Returns
        -------
        tuple
            The solver itself and None, where its damping is a number.
        """
        if self.damping != "auto":
            return self, None
        found = automatic_damping(operator, like, progress)
        return replace(self, damping=found.damping), found

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
            `b` does not fit the operator, has no columns, or is not finite.
        TypeError
            `operator` is no matrix, or `b` no dense tensor of floats.
        FailedSolve
            The solution is zero for a right-hand side that is not, or overflowed.
        FloatingPointError
            A product with A is not finite.

        Warns
        -----
        SolverWarning
            The residual is above the tolerance, or negative curvature was met.
        """
        check_system(operator, b)
        if b.dim() not in (1, 2) or tuple(operator.shape) != (b.shape[0],) * 2:
            raise ValueError(
                f"right-hand side of shape {tuple(b.shape)} does not fit an operator of shape "
                f"{tuple(operator.shape)}"
            )
        if not b.numel():
            raise ValueError(f"there is no right-hand side to solve for in shape {tuple(b.shape)}")
        if not b.isfinite().all():
            raise ValueError("the right-hand side is not finite")
        columns = b[:, None] if b.dim() == 1 else b
        solver, automatic = self.decided(operator, b, progress)
        x, report = solver._found(operator, columns, progress)
        if automatic is not None:
            report = _with_estimate(report, automatic)
        elif report.negative_curvature and report.damping and self._shifted:
            found = automatic_damping(operator, b, progress)
            report = _with_estimate(report, found)
            if report.damping < -found.lowest_eigenvalue:
                report = replace(report, message=f"{report.message}. {_too_little(report, found)}")
        if self._warns and report.message != SolveReport.message:
            warn_caller(f"{report.solver}: {report.message}", SolverWarning)
        return Solution(x[:, 0] if b.dim() == 1 else x, report)

    def _found(
        self, operator: Operator, columns: Tensor, progress: bool
    ) -> tuple[Tensor, SolveReport]:
        """The solution and the report, where something was found."""
        try:
            x, report = self._solve(operator, columns, progress)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise self._failed(f"a factorisation failed: {error}") from error
        if not x.isfinite().all():
            raise self._failed("the solution overflowed", report)
        lost = ((x == 0).all(0) & (columns != 0).any(0)).nonzero()[:, 0].tolist()
        if lost:
            raise self._failed(
                f"the solution is zero where the right-hand side is not, in {len(lost)} of "
                f"{x.shape[1]} columns (the first: {lost[0]}), so nothing is computed from it",
                report,
            )
        return x, report

    @abstractmethod
    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        """The solution ``(p, k)`` for `b` ``(p, k)``, and the report; λ is :attr:`shift`."""

    @property
    def _shifted(self) -> bool:
        """Whether the matrix is A + λI."""
        return True

    def _failed(self, why: str, report: SolveReport | None = None) -> FailedSolve:
        said = "" if report is None or report.message == SolveReport.message else report.message
        return FailedSolve(
            f"{type(self).__name__}: the solve of {self._system} failed: {why}. Compute products "
            "in float32 or float64, or raise the damping or the weight decay"
            + (f" (the solver {said})" if said else ""),
            report,
        )

    @property
    def _system(self) -> str:
        if isinstance(self.damping, str):
            return "(A + λI) x = b"
        return f"(A + {self.damping:g} I) x = b" if self.damping else "A x = b"


def _with_estimate(report: SolveReport, found: AutomaticDamping) -> SolveReport:
    """The report of a solve for which the lowest eigenvalue was estimated."""
    return replace(
        report,
        lowest_eigenvalue=found.lowest_eigenvalue,
        products=report.products + found.products,
    )


def _too_little(report: SolveReport, found: AutomaticDamping) -> str:
    return (
        f"The damping {report.damping:.2g} is too little for the lowest eigenvalue, about "
        f"{found.lowest_eigenvalue:.2g}: directions keep the wrong sign, and those that it brings "
        f'near zero outweigh all others; damping="auto" takes {found.damping:.2g}'
    )


def _checked(product: Tensor) -> Tensor:
    """A product with A, if it is finite, and above what its dtype holds with all digits."""
    size = float(product.abs().amax()) if product.numel() else 0.0
    if not math.isfinite(size):
        raise FloatingPointError(
            "a product with the operator is not finite; look for non-finite second derivatives "
            "(sqrt or norm at zero) or overflow in float32"
        )
    if 0 < size < torch.finfo(product.dtype).tiny and product.dtype.itemsize >= 4:
        raise FloatingPointError(
            f"a product with the operator is of size {size:.0e}, where {product.dtype} loses "
            "digits; give the loss and its regularizer in larger units, or solve in float64"
        )
    return product


def _norms(columns: Tensor) -> Tensor:
    """‖·‖ a column, with 1 for a column that is zero."""
    norms = columns.norm(dim=0)
    return torch.where(norms > 0, norms, 1.0)


def _relative(residual: Tensor, b: Tensor) -> Tensor:
    """‖residual‖/‖b‖ a column, 0 for b = 0 and infinite where it cannot be measured."""
    residual, b = residual.to(_working(b.dtype)), b.to(_working(b.dtype))
    scales = far_scales(b)
    lengths = (b / scales).norm(dim=0)
    relative = (residual / scales).norm(dim=0) / lengths
    return torch.where(lengths > 0, relative.nan_to_num(nan=torch.inf, posinf=torch.inf), 0.0)


def _working(dtype: torch.dtype) -> torch.dtype:
    """Half precision is for products: norms, recurrences and factorisations are in single."""
    return torch.float32 if dtype.itemsize < 4 else dtype


# A Krylov run ends when its recurrence promises a residual this much smaller than the true one,
# which is measured every so many iterations.
_DRIFT, _DRIFT_EVERY = 10.0, 100
# A run stagnates where so many iterations have not brought the residual down by this share.
_PATIENCE, _LEAST_GAIN = 100, 0.1
# A residual above this is reached before a preconditioner would be ready (and half precision, whose
# default it is, is none that one could be factorised in).
_ROUGH = 5e-3

# (product with the matrix, right-hand sides, residual norms to be reached, what is known of ‖A‖
# from earlier runs) -> iterates.
_Iteration = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, float], Iterator[Iterate]]


def _conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Tensor, target: Tensor, size: float
) -> Iterator[Iterate]:
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
        yield Iterate(x, rho.sqrt(), negative)


def _stagnates(history: Sequence[float]) -> bool:
    """Whether the last iterations have brought the residual down by next to nothing."""
    if len(history) <= _PATIENCE or len(history) % 10:
        return False
    return min(history[-_PATIENCE:]) > (1 - _LEAST_GAIN) * min(history[:-_PATIENCE])


@dataclass
class _Run:
    """A Krylov solve under way: of each column the best iterate yet, with its true residual.

    Attributes
    ----------
    iteration, matrix, b
        The method, the product with the matrix, and right-hand sides ``(p, k)``.
    tol, limit
        Relative residual asked for, and iterations allowed for a column.
    definite
        Whether the method needs a positive definite matrix.
    dtype
        In which products are computed.
    bar
        Where progress is shown.
    plain
        The method without the preconditioner, to go on with where it stagnates with it.
    x, residual, norms
        Iterates ``(p, k)``, b − A x as measured by a product, and its norms ``(k,)``.
    lengths
        ‖b‖, with 1 for zero, ``(k,)``.
    iterations
        Of each column ``(k,)``.
    products, history, negative, size
        As the report states them, and what is known of ‖A‖.
    dropped
        What became of the preconditioner, in words, where it was dropped.
    """

    iteration: _Iteration
    matrix: Callable[[Tensor], Tensor]
    b: Tensor
    tol: float
    limit: int
    definite: bool
    dtype: torch.dtype
    bar: tqdm
    plain: _Iteration | None = None
    x: Tensor = field(init=False)
    residual: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    lengths: Tensor = field(init=False)
    iterations: Tensor = field(init=False)
    products: int = 0
    history: list[float] = field(default_factory=list)
    negative: bool = False
    size: float = 0.0
    dropped: str = ""

    def __post_init__(self) -> None:
        self.x, self.residual = torch.zeros_like(self.b), self.b.clone()
        self.norms, self.lengths = self.b.norm(dim=0), _norms(self.b)
        self.iterations = torch.zeros(self.b.shape[1], dtype=torch.long, device="cpu")

    @property
    def target(self) -> Tensor:
        """Residual norms to be reached, ``(k,)``."""
        return self.tol * self.b.norm(dim=0)

    @property
    def worst(self) -> float:
        """The largest relative residual."""
        return float((self.norms / self.lengths).max())

    @property
    def broken(self) -> bool:
        """Whether the method has met a matrix that it is not for."""
        return self.definite and self.negative

    def solve(self) -> None:
        """Run again on what is left while that at least halves it: rounding sets a floor.

        Where a block of right-hand sides gets no further, each goes on by itself. Where that ends
        too, or stagnates, with a preconditioner, all go on without it.
        """
        together, before = self.b.shape[1] > 1, torch.inf
        while (worst := self.worst) > self.tol and not self.broken:
            if worst > 0.5 * before:
                if together:
                    together = False
                elif self.plain is not None:
                    self.drop()
                else:
                    return
                before = torch.inf
                continue
            before = worst
            left = (self.norms > self.target).cpu() & (self.iterations < self.limit)
            columns = left.nonzero()[:, 0].to(self.b.device)
            if not len(columns):
                return
            for some in [columns] if together else columns.split(1):
                self.run(some)

    def run(self, columns: Tensor) -> None:
        """One run on the residual of some columns, in step."""
        start, trial = self.x[:, columns], self.x[:, columns]
        wanted, promised = self.target[columns], self.norms.clone()
        begun = len(self.history)
        for state in self.iteration(self.product, self.residual[:, columns], wanted, self.size):
            if not state.norms.isfinite().all():
                break
            trial, self.size = start + state.x, state.size
            self.negative |= bool(state.negative.any())
            promised[columns] = state.norms
            self.note(columns, float((promised / self.lengths).max()))
            if int(self.iterations[columns.cpu()].max()) >= self.limit:
                break
            if self.plain is not None and _stagnates(self.history[begun:]):
                self.drop()
                break
            if len(self.history) % _DRIFT_EVERY == 0:
                expected = torch.maximum(state.norms, wanted)
                if bool((self.measure(trial, columns) > _DRIFT * expected).any()):
                    return
        self.measure(trial, columns)

    def drop(self) -> None:
        """Go on without the preconditioner, from the best iterates."""
        assert self.plain is not None
        self.dropped = f", dropped after {len(self.history)} iterations, in which it stagnated"
        self.iteration, self.plain, self.size = self.plain, None, 0.0

    def note(self, columns: Tensor, residual: float) -> None:
        """Count an iteration of some columns and show the residual promised."""
        self.history.append(residual)
        self.iterations[columns.cpu()] += 1
        self.bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
        self.bar.update()

    def measure(self, trial: Tensor, columns: Tensor) -> Tensor:
        """The true residual norms of an iterate, which is kept where it is the best yet.

        That is, of least residual; while this is no less than that of x = 0, as in the first
        iterations of conjugate gradients, of least error ‖x − x*‖² in the norm of the matrix, which
        is xᵀ(Mx − 2b) but for a constant.
        """
        x, b = self.x[:, columns], self.b[:, columns]
        trial = torch.where(trial.isfinite().all(0), trial, x)
        true = b - self.product(trial)
        measured = true.norm(dim=0)
        better = measured < self.norms[columns]
        if self.definite:
            nearer = -(trial * (b + true)).sum(0) < -(x * (b + self.residual[:, columns])).sum(0)
            better |= nearer & (self.norms[columns] >= self.lengths[columns])
        chosen = columns[better]
        self.x[:, chosen], self.residual[:, chosen] = trial[:, better], true[:, better]
        self.norms[chosen] = measured[better]
        return measured

    def product(self, columns: Tensor) -> Tensor:
        """The product with the matrix, counted and checked."""
        self.products += columns.shape[1]
        return _checked(self.matrix(columns.to(self.dtype))).to(self.b.dtype)


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
        check_limits(self.tol, self.max_iterations)

    def _run(
        self,
        iteration: _Iteration,
        matrix: Callable[[Tensor], Tensor],
        b: Tensor,
        progress: bool,
        definite: bool = False,
        preconditioner: Preconditioner | None = None,
    ) -> tuple[Tensor, SolveReport]:
        """Iterate, measure the true residual, and begin again on it while that helps.

        `definite` says that the method needs a positive definite matrix; with a `preconditioner`
        the method takes that, as long as it helps.
        """
        worked = b.to(_working(b.dtype))
        scales = far_scales(worked)
        limit = self.max_iterations or min(max(1000, 2 * b.shape[0]), 10_000)
        with tqdm(
            desc=type(self).__name__, disable=not progress, delay=1, leave=False, unit=" it"
        ) as bar:
            run = _Run(
                iteration, matrix, worked / scales, self._tolerance(b.dtype), limit, definite,
                b.dtype, bar,
            )  # fmt: skip
            if preconditioner:
                run.plain = iteration
                run.iteration = partial(iteration, preconditioner=preconditioner)  # type: ignore[call-arg]
            run.solve()
        report = SolveReport(
            solver=type(self).__name__,
            system=self._system,
            damping=self.shift,
            iterations=int(run.iterations.max()),
            products=run.products,
            residuals=tuple((run.norms / run.lengths).tolist()),
            history=tuple(run.history),
            converged=run.worst <= run.tol,
            negative_curvature=run.negative,
            message=self._message(run),
            preconditioner=f"{preconditioner or 'none'}{run.dropped}",
        )
        return (run.x * scales).to(b.dtype), report

    def _message(self, run: _Run) -> str:
        """What happened, for a person."""
        bent = f"met negative curvature, so the matrix of {self._system} is not positive definite"
        iterations = int(run.iterations.max())
        if run.worst <= run.tol:
            return f"{bent}; solved to the tolerance" if run.negative else SolveReport.message
        if run.broken:
            return (
                f"{bent}; stopped after {iterations} iterations with relative residual "
                f"{run.worst:.1e}. Train to a minimum, raise the damping, or use MinRes, which "
                "does not need a definite matrix"
            )
        wanted = f"relative residual {run.worst:.1e} where {run.tol:.1e} was asked for"
        gained = run.history[: -max(_PATIENCE, len(run.history) // 4)]
        if iterations >= run.limit and not (gained and run.worst > (1 - _LEAST_GAIN) * min(gained)):
            return (
                f"stopped at the limit of {run.limit} iterations: {wanted}. Allow more "
                "iterations, raise the damping, or solve in float64"
            )
        precise = run.dtype == torch.float64
        return (
            "stagnated: the system is singular, or "
            f"{str(run.dtype).removeprefix('torch.')} allows no more: {wanted} after {iterations} "
            "iterations, and more would not help. Raise the damping or the weight decay"
            + ("" if precise else ", or solve in float64 (Stage.to(torch.float64))")
        )

    def _tolerance(self, dtype: torch.dtype) -> float:
        return self.tol or {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 1e-2)


@dataclass(frozen=True)
class ConjugateGradient(_Krylov):
    """Conjugate gradients on A + λI, or on A² + λI as the paper does (its eq. 16).

    Stops with a warning where A + λI is not positive definite.

    Attributes
    ----------
    tol, max_iterations, damping
        Relative residual, iterations allowed, λ (not ``"auto"`` with `squared`).
    squared
        Solve (A² + λI) x = A b. That is positive definite for every nonsingular A, at the price
        of two products an iteration and of the condition number squared. It is not damped
        inversion: on an eigenvalue h it applies h/(h² + λ) where damping applies 1/(h + λ).
        Residuals are then those of this system.
    """

    squared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if flag("squared", self.squared) and self.damping == "auto":
            raise ValueError(
                'damping="auto" is for A + λI, and squared=True solves (A² + λI) x = A b, which no '
                "negative eigenvalue makes indefinite; give it a number"
            )

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        if self.squared:
            return self._solve_squared(operator, b, progress)
        return self._run(
            _conjugate_gradient,
            lambda x: operator @ x + self.shift * x,
            b,
            progress,
            definite=True,
        )

    def _solve_squared(
        self, operator: Operator, b: Tensor, progress: bool
    ) -> tuple[Tensor, SolveReport]:
        """(A² + λI) x = A b as ((A/u)² + λ/u²) (u x) = (A/u) b, with b in units of its own."""
        scales = far_scales(b.to(_working(b.dtype)))
        right = _checked(operator @ (b / scales).to(b.dtype))
        unit = self._unit(right, b / scales)

        def matrix(x: Tensor) -> Tensor:
            return operator @ ((operator @ x) / unit) / unit + self.shift / unit / unit * x

        x, report = self._run(_conjugate_gradient, matrix, right / unit, progress, definite=True)
        # The second division is of numbers that its dtype may not hold.
        x = (x.double() * scales / unit).to(b.dtype)
        return x, replace(report, products=2 * report.products + b.shape[1])

    def _unit(self, product: Tensor, b: Tensor) -> float:
        """A power of two near the size of A, or of √λ, whose fourth power is out of range; else 1.

        The iteration squares products with A².
        """
        working = _working(product.dtype)
        sizes = product.to(working).abs().amax(0) / _norms(b.to(working))
        size = sizes.amax().clamp_min(math.sqrt(self.shift))
        return float(far_scales(size.reshape(1, 1), 8))

    @property
    def _shifted(self) -> bool:
        return not self.squared

    @property
    def _system(self) -> str:
        if not self.squared:
            return super()._system
        return f"(A² + {self.shift:g} I) x = A b" if self.shift else "A² x = A b"


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

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("precondition", self.precondition)
        whole("memory", self.memory, 0)

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        preconditioner = None
        rough = self._tolerance(b.dtype) > _ROUGH
        if self.precondition and not rough and hasattr(operator, "preconditioner"):
            preconditioner = operator.preconditioner(self.shift)
        return self._run(
            partial(minimal_residual, preconditioner=None, memory=self.memory),
            lambda x: operator @ x + self.shift * x,
            b,
            progress,
            preconditioner=preconditioner,
        )


@dataclass(frozen=True)
class Dense(Solver):
    """Cholesky of the whole matrix A + λI, or its eigenvalues where it is not positive definite.

    For a few thousand parameters: p products and p² numbers. The matrix is kept by the operator,
    so that further solves cost its factorisation only.

    Attributes
    ----------
    damping
        λ, a number or ``"auto"``.
    """

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        known, working = isinstance(operator, Tensor), _working(b.dtype)
        if not known and not callable(getattr(operator, "dense", None)):
            raise TypeError(f"operator must have .dense() for Dense, not {type(operator).__name__}")
        right = b.to(working)
        matrix = operator if isinstance(operator, Tensor) else operator.dense()  # type: ignore[attr-defined]
        matrix = _checked((matrix + matrix.T) / 2).to(working)
        shifted = matrix + self.shift * torch.eye(len(matrix), dtype=working, device=matrix.device)
        # In units in which no square of an entry is lost.
        unit, units = far_scales(shifted.reshape(-1, 1)), far_scales(right)
        shifted, right = shifted / unit, right / units
        eps = torch.finfo(working).eps
        factor, failed = torch.linalg.cholesky_ex(shifted)
        pivots = factor.diagonal() ** 2
        # A pivot that is rounding of a zero can come out positive.
        definite = not failed and bool(pivots.min() > len(matrix) * eps * pivots.max())
        message, converged = SolveReport.message, True
        if definite:
            x = torch.cholesky_solve(right, factor)
        else:
            values, vectors = torch.linalg.eigh(shifted)
            small = values.abs() <= len(values) * eps * values.abs().max()
            inverse = torch.where(small, 0.0, 1 / torch.where(small, 1.0, values))
            x = vectors @ (inverse[:, None] * (vectors.T @ right))
            converged = not bool(small.any())
            message = (
                f"{self._system} is not positive definite (lowest eigenvalue "
                f"{float(values[0] * unit):.1e}); "
                "solved by eigenvalues"
                if converged
                else f"{self._system} is singular ({int(small.sum())} eigenvalues are zero to "
                "rounding); returned the least-norm solution. Add damping or weight decay"
            )
        residuals = _relative(right - shifted @ x, right)
        report = SolveReport(
            solver="Dense",
            system=self._system,
            damping=self.shift,
            iterations=0,
            products=0 if known else len(matrix),
            residuals=tuple(residuals.tolist()),
            history=(),
            converged=converged,
            negative_curvature=not definite,
            message=message,
        )
        return (x.double() * units / unit).to(b.dtype), report


@dataclass(frozen=True)
class Identity(Solver):
    """x = b: the identity in place of the inverse Hessian, the paper's baseline (Figure 2c).

    Its report states the residual that this leaves, and makes no claim to have converged.
    """

    _warns: ClassVar[bool] = False

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        squares = (b * b).amax(0)[(b != 0).any(0)]
        if b.dtype.itemsize >= 4 and (squares < torch.finfo(b.dtype).tiny).any():
            raise self._failed(
                f"squares of the right-hand side, as which it is scored, are none in {b.dtype}; "
                "give the loss and its regularizer in larger units"
            )
        residuals = _relative(b - _checked(operator @ b + self.shift * b), b)
        report = SolveReport(
            solver="Identity",
            system=self._system,
            damping=self.shift,
            iterations=0,
            products=b.shape[1],
            residuals=tuple(residuals.tolist()),
            history=(),
            converged=False,
            message="the identity stands in for the inverse: a baseline, not a solution",
        )
        return b.clone(), report
