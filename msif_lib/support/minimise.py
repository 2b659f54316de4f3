"""Many smooth functions minimised at once: preconditioned L-BFGS, one row a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_lib.support.state import in_own_state

#: Values ``(R,)`` and gradients ``(R, p)`` of R objectives at R parameter vectors ``(R, p)``;
#: the second argument says which of them are asked for.
BatchedObjective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: Maps rows ``(r, p)`` to H₀⁻¹ rows, with H₀ ≻ 0 near the Hessian.
RowPreconditioner = Callable[[Tensor], Tensor]

# A warm start that has not converged after this many evaluations has left the region where the
# Hessian at the start is of use, even with the pairs that correct it.
_PRECONDITIONED = 200

# Pairs of L-BFGS: the fewest, the most, and the bytes that they may take in between.
_FEWEST, _MOST, _MEMORY_BYTES = 20, 200, 256 * 2**20


@dataclass(frozen=True)
class Minimum:
    """Where :func:`minimise` ended, for R objectives.

    Attributes
    ----------
    x
        Parameter vectors ``(R, p)``.
    gradient_norms
        ``(R,)``.
    converged
        Whether each gradient norm is within the tolerance, ``(R,)``.
    evaluations
        Evaluations of value and gradient of each objective, ``(R,)``.
    """

    x: Tensor
    gradient_norms: Tensor
    converged: Tensor
    evaluations: Tensor


class AbsoluteInverse:
    """``|H|⁻¹`` of a dense symmetric H: the saddle-free Newton step, always descending.

    Its eigenvalues are taken in absolute value (Dauphin et al. 2014).

    Parameters
    ----------
    matrix
        H, ``(p, p)``.
    floor
        Eigenvalues are taken in absolute value and not below this share of the largest.

    Attributes
    ----------
    values, vectors
        The eigenvalues so taken ``(p,)`` and the eigenvectors, columns of ``(p, p)``.
    """

    def __init__(self, matrix: Tensor, floor: float = 1e-10) -> None:
        values, self.vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        self.values = values.abs().clamp_min(floor * float(values.abs().max()))

    @classmethod
    def from_eigenpairs(cls, values: Tensor, vectors: Tensor) -> AbsoluteInverse:
        """The same without a factorisation: `values` ``(p,)`` positive, `vectors` ``(p, p)``."""
        made = cls.__new__(cls)
        made.values, made.vectors = values, vectors
        return made

    def __call__(self, rows: Tensor) -> Tensor:
        """H⁻¹, its eigenvalues in absolute value, applied to each row of ``(R, p)``."""
        return (rows @ self.vectors / self.values) @ self.vectors.T


@in_own_state
def minimise(
    objective: BatchedObjective,
    start: Tensor,
    tol: float,
    preconditioner: RowPreconditioner | None = None,
    max_evaluations: int = 500,
    memory: int | None = None,
) -> Minimum:
    """Minimise R smooth functions at once by preconditioned L-BFGS.

    Nocedal & Wright (2006), algorithms 7.4 and 7.5, with backtracking (Armijo), all objectives
    in step; those that have converged are no longer evaluated.

    Parameters
    ----------
    objective
        ``objective(x, which)`` with x ``(r, p)`` and `which` ``(r,)``, the numbers of the
        objectives asked for; returns values ``(r,)`` and gradients ``(r, p)``.
    start
        Where to begin, ``(R, p)``.
    tol
        Euclidean norm of the gradient to be reached.
    preconditioner
        Maps rows ``(r, p)`` to H₀⁻¹ rows, with H₀ ≻ 0 near the Hessian, each row by itself. None:
        a multiple of the identity, set from the last step.
    max_evaluations
        Evaluations allowed for each objective.
    memory
        Pairs of steps and gradient differences kept. None: 200, or as many as fit into 256 MiB,
        but at least 20. Where an evaluation passes over a data set, pairs are cheap beside it,
        and many of them take several times fewer evaluations than 20.

    Returns
    -------
    Minimum
        Where each objective ended, and whether it converged.

    Raises
    ------
    FloatingPointError
        A value or gradient at `start` is not finite.
    """
    if memory is None:
        pair = max(1, 2 * start.numel() * start.element_size())
        memory = min(max(_MEMORY_BYTES // pair, _FEWEST), _MOST)
    count = len(start)
    x = start.clone()
    which = torch.arange(count, device=x.device)
    value, gradient = objective(x, which)
    if not (value.isfinite().all() and gradient.isfinite().all()):
        raise FloatingPointError("the objective or its gradient is not finite at the start")
    evaluations = torch.ones(count, dtype=torch.long, device=x.device)
    step = torch.ones(count, dtype=x.dtype, device=x.device)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    noise, tiny = 10 * torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny

    def direction(gradient: Tensor) -> Tensor:
        """−H_k ∇, by the two-loop recursion over the pairs (s, y, 1/yᵀs)."""
        q, coefficients = gradient, []
        for s, y, rho in reversed(pairs):
            a = rho * (s * q).sum(1)
            q = q - a[:, None] * y
            coefficients.append(a)
        if preconditioner is not None:
            r = preconditioner(q)
        else:
            r = scale[:, None] * q
        for (s, y, rho), a in zip(pairs, reversed(coefficients), strict=True):
            r = r + (a - rho * (y * r).sum(1))[:, None] * s
        return -r

    # Without a preconditioner the first step has length one at most, in whatever units values are.
    scale = 1 / gradient.norm(dim=1).maximum(value.abs()).clamp_min(tiny)
    d = direction(gradient)
    while True:
        open_ = (gradient.norm(dim=1) > tol) & (evaluations < max_evaluations)
        # A step that has shrunk to nothing has met the limit of the arithmetic.
        open_ &= step > 1e-12
        if not open_.any():
            break
        which = open_.nonzero()[:, 0]
        trial = x[which] + step[which, None] * d[which]
        new_value, new_gradient = objective(trial, which)
        evaluations[which] += 1
        slope = (gradient[which] * d[which]).sum(1)
        allowed = value[which] + 1e-4 * step[which] * slope + noise * value[which].abs()
        accepted = new_value <= allowed
        taken = which[accepted]
        step[which[~accepted]] *= 0.5

        s, y = torch.zeros_like(x), torch.zeros_like(x)
        s[taken] = trial[accepted] - x[taken]
        y[taken] = new_gradient[accepted] - gradient[taken]
        curvature = (s * y).sum(1)
        useful = curvature > noise * s.norm(dim=1) * y.norm(dim=1)
        rho = torch.where(useful, 1 / curvature, 0.0)
        pairs = [*pairs, (s, y, rho)][-memory:]
        scale = torch.where(useful, curvature / (y * y).sum(1), scale)

        x[taken], value[taken] = trial[accepted], new_value[accepted]
        gradient[taken], step[taken] = new_gradient[accepted], 1.0
        if len(taken):
            renewed = direction(gradient)
            d[taken] = renewed[taken]
    norms = gradient.norm(dim=1)
    return Minimum(x, norms, norms <= tol, evaluations)


def minimise_near(
    objective: BatchedObjective,
    start: Tensor,
    tol: float,
    preconditioner: RowPreconditioner | None,
    limit: int,
    near: int = _PRECONDITIONED,
) -> Minimum:
    """Minimise, first with the Hessian at the start, then without for what went far from it.

    Parameters
    ----------
    objective, start, tol, preconditioner
        As for :func:`minimise`.
    limit
        Evaluations allowed for each objective, of both attempts together.
    near
        Evaluations allowed for the first.

    Returns
    -------
    Minimum
        As of :func:`minimise`.
    """
    if preconditioner is None or limit <= near:
        return minimise(objective, start, tol, preconditioner, limit)
    first = minimise(objective, start, tol, preconditioner, near)
    rest = (~first.converged).nonzero()[:, 0]
    if not len(rest):
        return first
    far = minimise(
        lambda x, which: objective(x, rest[which]), first.x[rest], tol, None, limit - near
    )
    x, norms, evaluations = first.x.clone(), first.gradient_norms.clone(), first.evaluations.clone()
    x[rest], norms[rest] = far.x, far.gradient_norms
    evaluations[rest] += far.evaluations
    return Minimum(x, norms, norms <= tol, evaluations)
