"""Block MINRES, preconditioned: symmetric systems, definite or not, of several right-hand sides.

Â V_k = V_{k−1} β_{k−1}ᵀ + V_k α_k + V_{k+1} β_k,  V_1 β_0 = Sᵀ b, is block Lanczos on Â = Sᵀ A S,
for the preconditioner P⁻¹ = S Sᵀ or S = I. A QR factorisation of this block tridiagonal matrix
gives the x of least residual ‖Sᵀ(b − A x)‖ in the span of S V_1, ..., S V_k, for all right-hand
sides at once:

    D_k = (V_k − D_{k−1} δ_k − D_{k−2} ε_k) γ_k⁻¹,         x += S D_k τ_k.

(Paige & Saunders 1975; in blocks, Soodhalter 2015.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Preconditioner(Protocol):
    """What MINRES needs of P⁻¹ = S Sᵀ, near (A + λI)⁻¹ and positive definite."""

    def root(self, columns: Tensor, /) -> Tensor:
        """S times columns ``(p, k)``."""
        ...

    def root_transposed(self, columns: Tensor, /) -> Tensor:
        """Sᵀ times columns ``(p, k)``."""
        ...


def far_scales(columns: Tensor, share: int = 3) -> Tensor:
    """Powers of two ``(k,)`` by which columns are divided whose squares leave the range; else 1.

    The norm of a gradient of 1e-25 is zero in float32. The range that counts is the dtype's
    exponents divided by `share`.
    """
    most = -math.frexp(torch.finfo(columns.dtype).tiny)[1]
    exponents = torch.frexp(columns.abs().amax(0)).exponent.tolist()
    far = [max(-most, min(e, most)) if abs(e) > most // share else 0 for e in exponents]
    return torch.tensor([2.0**e for e in far], dtype=columns.dtype, device=columns.device)


@dataclass(frozen=True)
class Iterate:
    """A Krylov iterate of k systems.

    Attributes
    ----------
    x
        ``(p, k)``.
    norms
        Residual norms ``(k,)``, from the method's own recurrence.
    negative
        Where a direction with dᵀAd ≤ 0 was met, ``(k,)``.
    size
        What is known of ‖A‖, or 0.
    """

    x: Tensor
    norms: Tensor
    negative: Tensor
    size: float = 0.0


def minimal_residual(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    target: Tensor,
    size: float,
    preconditioner: Preconditioner | None,
    memory: int,
) -> Iterator[Iterate]:
    """The iterates of block MINRES from x = 0.

    A is nowhere required to be definite. Blocks shrink where the right-hand sides have less than
    k independent directions left. Rounding would let the V lose their orthogonality, and with it
    many iterations; those that `memory` can hold are kept and held against.

    The run ends before its target where no further step would help: Krylov space exhausted, or a
    direction d of length ‖d‖ ‖Â‖ ≫ 1 = ‖Â d‖, which is a null vector to rounding.

    Parameters
    ----------
    apply
        Product of A with columns ``(p, s)``.
    b
        Right-hand sides ``(p, k)``, whose squares neither overflow nor underflow.
    target
        Residual norms to be reached, ``(k,)``.
    size
        What is known of ‖Â‖ from earlier runs, or 0.
    preconditioner
        P⁻¹ = S Sᵀ, or None.
    memory
        Bytes for basis vectors.

    Yields
    ------
    Iterate
        After each iteration.
    """
    state = _State.begin(b, size, preconditioner, memory)
    while not state.ended and state.v.shape[1] and bool((state.norms > target).any()):
        state.advance(apply)
        yield Iterate(state.x, state.norms, state.negative, state.size * state.unit)


@dataclass
class _State:
    """What iteration k changes, named as in the recurrences above, and what it needs.

    Attributes
    ----------
    b, preconditioner, basis, rounding
        Right-hand sides; S; basis vectors kept; what counts as zero beside ‖Â‖.
    v, v_old, beta
        V_k, V_{k−1} and β_{k−1}.
    d_1, d_2
        D_{k−1} and D_{k−2}. With a preconditioner, A S D stands below D.
    q_1, q_2
        The reflections that made them.
    phi
        What is left of Sᵀb, as coefficients of V_k.
    moved
        S⁻¹x, or x without a preconditioner. With one, A x stands below.
    x, norms
        The iterate and its residual norms.
    pivot, negative, size
        The last pivot of the tridiagonal matrix; whether one was not positive definite; ‖Â‖.
    unit
        What Â is divided by, and x multiplied, where its squares leave the range; 0: not known yet.
    ended
        Whether no further step would help.
    """

    b: Tensor
    preconditioner: Preconditioner | None
    basis: _Basis
    rounding: float
    v: Tensor
    v_old: Tensor
    beta: Tensor
    d_1: Tensor
    d_2: Tensor
    q_1: Tensor
    q_2: Tensor
    phi: Tensor
    moved: Tensor
    x: Tensor
    norms: Tensor
    pivot: Tensor
    negative: Tensor
    size: float
    ended: bool = False
    unit: float = 0.0

    @staticmethod
    def begin(b: Tensor, size: float, preconditioner: Preconditioner | None, memory: int) -> _State:
        """The state before the first iteration, at x = 0."""
        rounding = torch.finfo(b.dtype).eps ** 0.75
        lengths = b.norm(dim=0)
        right = b / torch.where(lengths > 0, lengths, 1.0)
        right = preconditioner.root_transposed(right) if preconditioner else right
        v, phi = _orthonormal(right, rounding * float(right.norm(dim=0).max()))
        x = torch.zeros_like(b)
        moved = torch.cat([x, x]) if preconditioner else x
        return _State(
            b=b,
            preconditioner=preconditioner,
            basis=_Basis(b, memory),
            rounding=rounding,
            v=v,
            v_old=v[:, :0],
            beta=v.new_zeros(v.shape[1], 0),
            d_1=moved[:, :0],
            d_2=moved[:, :0],
            q_1=torch.eye(v.shape[1], dtype=v.dtype, device=v.device),
            q_2=v.new_zeros(0, 0),
            phi=phi * lengths,
            moved=moved,
            x=x,
            norms=lengths,
            pivot=v.new_zeros(0, 0),
            negative=torch.zeros_like(lengths, dtype=torch.bool),
            size=size,
        )

    def advance(self, apply: Callable[[Tensor], Tensor]) -> None:
        """One iteration."""
        az, alpha, v_new, beta_new = self._extend(apply)
        self._watch(alpha)
        delta, epsilon, gamma = self._reflect(alpha, beta_new)
        # γ_k⁻¹ by its singular values: where one is zero to rounding there is a null vector, and
        # what the other directions give is taken before the run ends.
        left, values, right = torch.linalg.svd(gamma)
        good = values > self.rounding * self.size
        inverse = (right[good].T / values[good]) @ left[:, good].T
        # With a preconditioner φ is not the norm of the residual, so A S D is carried along with D.
        d = torch.cat([self.v, az]) if self.preconditioner else self.v
        self.d_1, self.d_2 = (d - self.d_1 @ delta - self.d_2 @ epsilon) @ inverse, self.d_1
        longest = float(self.d_1[: len(self.b)].norm(dim=0).max())
        if self.rounding * self.size * longest > 1:
            self.ended = True
            return
        self._move(len(alpha), len(beta_new))
        self.ended = not bool(good.all())
        self.v_old, self.v, self.beta = self.v, v_new, beta_new

    def _extend(self, apply: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A S V_k, α_k, V_{k+1} and β_k."""
        v, s = self.v, self.preconditioner
        self.basis.append(v)
        az = apply(s.root(v) if s else v)
        q = s.root_transposed(az) if s else az
        if not self.unit:
            self.unit = float(far_scales(q.reshape(-1, 1)))
            self.size /= self.unit
        az, q = az / self.unit, q / self.unit
        alpha = v.T @ q
        q = q - v @ alpha - self.v_old @ self.beta.T
        # Once more, for rounding has left some of them in.
        q = self.basis.remove_from(q - v @ (v.T @ q) - self.v_old @ (self.v_old.T @ q))
        column = torch.cat([alpha, self.beta], 1)
        self.size = max(self.size, float(torch.linalg.matrix_norm(column, 2)))
        return az, alpha, *_orthonormal(q, self.rounding * self.size)

    def _watch(self, alpha: Tensor) -> None:
        """Note a pivot that is not positive: the tridiagonal matrix is definite while all are."""
        if self.negative.any():
            return
        beta = self.beta
        below = beta @ torch.linalg.solve(self.pivot, beta.T) if len(self.pivot) else 0.0
        self.pivot = alpha - below
        self.negative |= bool(torch.linalg.eigvalsh((self.pivot + self.pivot.T) / 2)[0] <= 0)

    def _reflect(self, alpha: Tensor, beta_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """δ_k, ε_k and γ_k: the last two reflections on the new blocks, then the next one."""
        old, before = self.d_1.shape[1], self.d_2.shape[1]
        above = self.beta.new_zeros(len(self.q_2) - self.beta.shape[1], len(alpha))
        rows = self.q_2.T @ torch.cat([above, self.beta.T])
        epsilon, rest = rows.split([before, len(rows) - before])
        rows = self.q_1.T @ torch.cat([rest, alpha])
        delta, gamma = rows.split([old, len(rows) - old])
        reflection, r = torch.linalg.qr(torch.cat([gamma, beta_new]), mode="complete")
        self.q_1, self.q_2 = reflection, self.q_1
        return delta, epsilon, r[: len(alpha)]

    def _move(self, here: int, left: int) -> None:
        """x += S D_k τ_k, for blocks of `here` columns now and `left` columns next."""
        phi = self.q_1.T @ torch.cat([self.phi, self.phi.new_zeros(left, self.phi.shape[1])])
        tau, self.phi = phi.split([here, left])
        self.moved = self.moved + self.d_1 @ tau
        inner, ax = self.moved.split([len(self.b), len(self.moved) - len(self.b)])
        self.norms = (self.b - ax if self.preconditioner else self.phi).norm(dim=0)
        x = self.preconditioner.root(inner) if self.preconditioner else inner
        self.x = x / self.unit


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
