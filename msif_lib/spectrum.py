"""Lanczos: a basis in which a symmetric matrix is tridiagonal, from its products alone.

After m steps A V = V T + β v eᵀ, with V orthonormal, T tridiagonal and v the next direction. The
eigenvalues θ of T (Ritz values) lie within the spectrum of A, so that the lowest is an estimate of
A's from above. For each the residual ‖A V s − θ V s‖, which is β times the last entry of its
eigenvector s in size, says how near some eigenvalue of A is (Parlett, The Symmetric Eigenvalue
Problem, 1980, ch. 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Products at most for an estimate of the lowest eigenvalue, and the share of it that may be error.
_PRODUCTS, _PRECISION = 40, 0.05
# And at least, where it is above zero.
_ENOUGH = 20


@dataclass
class Tridiagonal:
    """What a Lanczos run has found, for each of k starting columns by itself.

    Attributes
    ----------
    basis
        V, m vectors a column, ``(p, k)`` each.
    alphas, betas
        The diagonal of T and the m − 1 entries beside it, ``(k,)`` each.
    beta
        Length of the next direction ``(k,)``; 0 where the Krylov space is exhausted.
    """

    basis: list[Tensor]
    alphas: list[Tensor] = field(default_factory=list)
    betas: list[Tensor] = field(default_factory=list)
    beta: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def exhausted(self) -> bool:
        """Whether there is no further direction: what is known is all of A that the columns see."""
        return len(self.alphas) == len(self.basis[0]) or not bool(self.beta.any())

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues of T, ascending, and its eigenvectors, ``(k, m)`` and ``(k, m, m)``."""
        tridiagonal = torch.diag_embed(torch.stack(self.alphas, 1))
        if self.betas:
            beside = torch.stack(self.betas, 1)
            tridiagonal = tridiagonal + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values, vectors


def lanczos(product: Callable[[Tensor], Tensor], b: Tensor) -> Iterator[Tridiagonal]:
    """Lanczos with full reorthogonalisation; what is known is yielded after each product.

    Parameters
    ----------
    product
        The product of A with columns ``(p, k)``, in the dtype of `b`.
    b
        Columns to start from, ``(p, k)``, in single or double precision.

    Yields
    ------
    Tridiagonal
        The same object, one step longer, until the Krylov spaces are exhausted.
    """
    # Norms and inner products are in double precision, where no square of theirs is lost.
    found = Tridiagonal([divided(b, b.norm(dim=0, dtype=torch.float64))])
    while True:
        v = found.basis[-1]
        w = product(v)
        found.alphas.append((v.double() * w).sum(0))
        for _ in range(2):  # once more, for rounding has left some of them in
            for old in found.basis:
                w = w - old * (old * w).sum(0)
        beta = w.norm(dim=0, dtype=torch.float64)
        size = max(float(torch.stack(found.alphas).abs().max()), float(beta.max()))
        # A direction that is rounding only: the Krylov space holds all of b.
        found.beta = torch.where(beta > size * torch.finfo(b.dtype).eps ** 0.75, beta, 0.0)
        yield found
        if found.exhausted:
            return
        found.betas.append(found.beta)
        found.basis.append(divided(w, found.beta))


def divided(columns: Tensor, lengths: Tensor) -> Tensor:
    """Columns of length 1, or zero where that is the length."""
    inverse = torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1.0), 0.0)
    return (columns.double() * inverse).to(columns.dtype)


@dataclass(frozen=True)
class LowestEigenvalue:
    """The lowest eigenvalue of a symmetric matrix, as a few products tell it.

    Attributes
    ----------
    value
        An estimate from above: the lowest Ritz value.
    error
        Some eigenvalue lies within this of `value`.
    size
        The largest Ritz value in size, a lower bound of ‖A‖.
    products
        Products taken.
    """

    value: float
    error: float
    size: float
    products: int


def lowest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, products: int = _PRODUCTS
) -> LowestEigenvalue:
    """Estimate the lowest eigenvalue by Lanczos, until its error is 5 % of it.

    One above zero is believed after 20 products at the soonest.

    Extreme eigenvalues come first, the sooner the farther they stand from the others: for those
    that negative curvature leaves far below zero ten to forty products do.

    Parameters
    ----------
    product
        The product of A with one column ``(p, 1)``.
    start
        A vector ``(p,)`` with a share in every direction, such as a random one; not zero.
    products
        Products allowed.

    Returns
    -------
    LowestEigenvalue
        The estimate, its error, and the size of A.
    """
    for found in lanczos(product, start[:, None]):
        values, vectors = (one[0] for one in found.eigenpairs())
        value, error = float(values[0]), float(found.beta[0] * vectors[-1, 0].abs())
        taken, settled = len(found.alphas), error <= _PRECISION * abs(value)
        # A value above zero may be the edge of a cluster that hides a lowest one below it.
        if taken >= products or (settled and (value < 0 or taken >= _ENOUGH)):
            break
    return LowestEigenvalue(value, error, float(values.abs().max()), len(found.alphas))
