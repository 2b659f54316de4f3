"""Functions of a symmetric matrix applied to vectors, f(A) b, from products with A alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.solvers import FailedSolve, Operator, SolveReport, SolverWarning
from msif_lib.spectrum import Tridiagonal, lanczos
from msif_lib.support.arguments import check_limits, check_system
from msif_lib.support.notices import warn_caller
from msif_lib.support.state import in_own_state

#: A function of eigenvalues, entry by entry.
Spectral = Callable[[Tensor], Tensor]

# Steps between two looks at how far the result still moves.
_LOOK_EVERY = 5


@in_own_state
def functions_of(
    operator: Operator,
    b: Tensor,
    functions: Sequence[Spectral],
    *,
    tol: float | None = None,
    max_iterations: int | None = None,
    system: str = "f(A) b",
    progress: bool = False,
) -> tuple[list[Tensor], SolveReport]:
    """The products f(A) b for several functions f, by Lanczos with full reorthogonalisation.

    After m steps A V = V T + a remainder, with T tridiagonal, and f(A) b ≈ ‖b‖ V f(T) e_1 (Saad
    1992; Higham, Functions of Matrices, ch. 13). A bounded f makes an indefinite A harmless.

    Parameters
    ----------
    operator
        A, symmetric ``(p, p)``.
    b
        Columns ``(p, k)``; each has a Krylov space of its own, and all share each product.
    functions
        f, on eigenvalues ``(m,)``.
    tol
        Relative change of every result between two looks at which it counts as converged; None:
        1e-8 in float64, 1e-4 in float32.
    max_iterations
        Steps, at most; None: the size, at most 300.
    system
        What is computed, in words, for the report.
    progress
        Show a bar for what takes more than a second.

    Returns
    -------
    tuple
        One ``(p, k)`` for each function, and a report whose residuals are these relative changes.

    Raises
    ------
    TypeError, ValueError
        `tol` is no number between 0 and 1, or `max_iterations` no whole number from 1 on.
    FailedSolve
        The first result is zero, or any is not finite, for a column that is not zero; a product
        with A is not finite.

    Warns
    -----
    SolverWarning
        The tolerance was not reached.
    """
    check_limits(tol, max_iterations)
    check_system(operator, b, columns=True)
    if tol is None:
        tol = 1e-8 if b.dtype == torch.float64 else 1e-4
    limit, dtype = min(len(b), max_iterations or 300), b.dtype
    b = b.to(torch.promote_types(dtype, torch.float32))
    lengths = b.norm(dim=0, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        w = (operator @ v.to(dtype)).to(b)
        if not w.isfinite().all():
            raise FailedSolve(
                f"Lanczos: {system}: a product with A is not finite; look for non-finite "
                "second derivatives (sqrt or norm at zero) or overflow in float32"
            )
        return w

    before: list[Tensor] = []
    change, history = torch.full_like(lengths, torch.inf), []
    with tqdm(desc="Lanczos", disable=not progress, delay=1, leave=False, unit=" it") as bar:
        for found in lanczos(product, b):
            bar.update()
            steps = len(found.alphas)
            ended = found.exhausted or steps >= limit
            if not ended and steps % _LOOK_EVERY:
                continue
            now = [_coefficients(f, found) for f in functions]
            change = torch.zeros_like(lengths)
            for index, weights in enumerate(now):
                moved = weights.clone()
                if before:
                    moved[: len(before[index])] -= before[index]
                scale = weights.norm(dim=0)
                change = change.maximum(moved.norm(dim=0) / torch.where(scale > 0, scale, 1.0))
            exhausted = found.exhausted
            change = torch.zeros_like(change) if exhausted else change.nan_to_num(torch.inf)
            history.append(float(change.max()))
            before = now
            if ended or bool((change <= tol).all()):
                break
    results = [
        sum((v * weights for v, weights in zip(found.basis, coefficients)), torch.zeros_like(b)).to(
            dtype
        )
        for coefficients in (weights * lengths for weights in before)
    ]
    converged = bool((change <= tol).all())
    report = SolveReport(
        solver="Lanczos",
        system=system,
        damping=0.0,
        iterations=steps,
        products=steps * b.shape[1],
        residuals=tuple(change.tolist()),
        history=tuple(history),
        converged=converged,
        message=SolveReport.message
        if converged
        else f"stopped at the limit of {limit} steps, the result still moving by "
        f"{float(change.max()):.1e} of itself where {tol:.1e} was asked for; allow more steps",
    )
    lost = ((results[0] == 0).all(0) & (lengths > 0)).any()
    if lost or not all(result.isfinite().all() for result in results):
        raise FailedSolve(
            f"Lanczos: {system} came out as zero or left the finite numbers; compute the "
            "products in float32 or float64",
            report,
        )
    if not converged:
        warn_caller(f"Lanczos: {report.message}", SolverWarning)
    return results, report


def _coefficients(f: Spectral, found: Tridiagonal) -> Tensor:
    """f(T) e_1 for the tridiagonal T of each column, ``(m, k)``."""
    values, vectors = found.eigenpairs()
    return (vectors @ (f(values) * vectors[:, 0, :])[:, :, None])[:, :, 0].T
