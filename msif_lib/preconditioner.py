"""A preconditioner for the Hessian of a stage, from a few rows of its Gauss-Newton matrix.

The Gauss-Newton matrix is a sum of outer products, one for each example and each mode of the
loss's curvature in the outputs,

    (1/N) Σ_i J_iᵀ ℓ''_i J_i = (1/N) Σ_i Σ_c (J_iᵀ u_ic)(J_iᵀ u_ic)ᵀ,    ℓ''_i = Σ_c u_ic u_icᵀ,

and in a trained network most of ℓ'' sits in few examples, those of which it is not certain. The
modes with the largest ‖u_ic‖² are found by one forward pass and cost one backward pass each; with
them as the rows of R, a matrix near the Hessian that can be inverted is

    P = D + RᵀR,        D = (l2 + damping) I  (+ 2α on W, in case 2).

P is positive definite whether the Hessian is or not, so MINRES may use it on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor
from torch.func import hessian, vjp, vmap

from msif_lib.data import Batch, Nested, map_leaves
from msif_lib.stage import Stage

# Rows taken at most, since factorising r of them costs r³; fewer than the fewest would not pay.
MOST_ROWS, FEWEST_ROWS = 1024, 16
# Examples among which the leading modes are looked for, at most.
_EXAMPLES = 2**16
# Outputs of more numbers than this (the softmax of a language model) have a curvature too large to
# take apart.
_LARGEST_OUTPUT = 128
# Where D is zero or next to it, P takes this share of its largest eigenvalue in place of D: what
# the rows leave out is not zero.
_FLOOR = 1e-4
# Eigenvalues of D^(−1/2) RᵀR D^(−1/2) that change nothing beside the 1 that D contributes.
_NEGLIGIBLE = 1e-2


@dataclass(frozen=True)
class Preconditioner:
    """P⁻¹ = S Sᵀ with P = D + RᵀR, for D diagonal and positive.

    Attributes
    ----------
    scale
        D^(−1/2), ``(p,)``.
    vectors
        Orthonormal eigenvectors U ``(p, r)`` of D^(−1/2) RᵀR D^(−1/2).
    shrink
        (1 + λ)^(−1/2) − 1 for their eigenvalues λ, ``(r,)``.
    """

    scale: Tensor
    vectors: Tensor
    shrink: Tensor

    @staticmethod
    def from_rows(rows: Tensor, diagonal: Tensor) -> Preconditioner:
        """Factorise P = diag(`diagonal`) + RᵀR for the rows R ``(r, p)``, which are overwritten."""
        largest = float(rows.pow(2).sum(1).max())
        diagonal = diagonal.clamp_min(max(_FLOOR * largest, torch.finfo(rows.dtype).tiny))
        scaled = rows.mul_(diagonal.rsqrt())
        wide = len(rows) < rows.shape[1]
        # The eigenvectors of R̂ᵀR̂ from those of R̂R̂ᵀ, where that is the smaller matrix.
        gram = scaled @ scaled.T if wide else scaled.T @ scaled
        values, vectors = torch.linalg.eigh(gram.double())
        kept = values > _NEGLIGIBLE
        values, vectors = values[kept], vectors[:, kept]
        if wide:
            vectors = scaled.T @ (vectors / values.sqrt()).to(rows.dtype)
        vectors = vectors.to(rows.dtype)
        shrink = ((1 + values).rsqrt() - 1).to(rows.dtype)
        return Preconditioner(diagonal.rsqrt(), vectors, shrink)

    @property
    def rank(self) -> int:
        """Number of eigenvectors r."""
        return self.vectors.shape[1]

    def __str__(self) -> str:
        return f"Gauss-Newton, rank {self.rank}"

    def root(self, columns: Tensor) -> Tensor:
        """S x = D^(−1/2) (I + U shrink Uᵀ) x for columns ``(p, k)``."""
        return self.scale[:, None] * self._inner(columns)

    def root_transposed(self, columns: Tensor) -> Tensor:
        """Sᵀ x for columns ``(p, k)``."""
        return self._inner(self.scale[:, None] * columns)

    def _inner(self, columns: Tensor) -> Tensor:
        return columns + self.vectors @ (self.shrink[:, None] * (self.vectors.T @ columns))


def gauss_newton_rows(stage: Stage, theta: Tensor, rows: int) -> Tensor | None:
    """The leading rows of the Gauss-Newton matrix's root, scaled to the trace of all of them.

    Parameters
    ----------
    stage
        The stage.
    theta
        Parameters ``(p_W + p_U,)`` at which the matrix is taken.
    rows
        Rows wanted, r; fewer where there are fewer modes.

    Returns
    -------
    Tensor or None
        R ``(r, p_W + p_U)`` with RᵀR ≈ (1/N) Σ J_iᵀ ℓ''_i J_i; None where the outputs of the
        model are not one tensor of at most 128 numbers an example, or the loss has no curvature
        in them.
    """
    first = next(stage.examples.batches(1, range(1)))
    with torch.no_grad():
        size = _output_size(stage, theta, map_leaves(lambda leaf: leaf.to(stage.device), first))
    if not 0 < size <= _LARGEST_OUTPUT:
        return None
    looked_at = range(0, stage.size, -(-stage.size // _EXAMPLES))
    part = stage.section(looked_at)
    squares = (_modes(stage, theta, batch).pow(2).sum(2) for batch in part.batches())
    masses = part.gather(squares, size).flatten()
    # Ties, as all modes of a squared error are, are broken by chance: the data may be sorted.
    chance = torch.Generator(masses.device).manual_seed(0)
    jitter = torch.rand(masses.shape, generator=chance, dtype=masses.dtype, device=masses.device)
    chosen = (masses * (1 + 1e-3 * jitter)).topk(min(rows, len(masses))).indices.sort().values
    share = float(masses[chosen].sum() / masses.sum())
    if not share > 0:  # nor where it is not a number
        return None
    examples, modes = chosen // size * looked_at.step, chosen % size

    def row(mode: Tensor, inputs: Nested) -> Tensor:
        one = map_leaves(lambda leaf: leaf[None], inputs)
        outputs, pull_back = vjp(lambda at: stage.outputs(*stage.split(at), one), theta)[:2]
        return pull_back(mode.view(outputs.shape))[0]

    read = examples.unique()
    part = stage.section(read.tolist())
    result = theta.new_zeros(len(chosen), len(theta))
    read = torch.as_tensor(part.share, device=stage.device)
    start = 0
    for batch in part.batches():
        roots = _modes(stage, theta, batch)
        here = read[start : start + len(roots)]
        start += len(roots)
        wanted = torch.isin(examples, here).nonzero()[:, 0]
        for some in wanted.split(stage.gradients_at_once):
            which = torch.searchsorted(here, examples[some])
            inputs = map_leaves(itemgetter(which), batch[0])
            result[some] = vmap(row)(roots[which, modes[some]], inputs)
    return stage.all_reduce(result) / (len(looked_at) * share) ** 0.5


def _output_size(stage: Stage, theta: Tensor, batch: Batch) -> int:
    """Numbers in the model's output for one example; 0 where that is not one tensor."""
    outputs = stage.outputs(*stage.split(theta), batch[0])
    return outputs.numel() if isinstance(outputs, Tensor) else 0


def _modes(stage: Stage, theta: Tensor, batch: Batch) -> Tensor:
    """The u_ic of a batch, ``(b, K, K)``: ℓ''_i = Σ_c u_ic u_icᵀ for outputs of K numbers."""
    inputs, targets = batch
    with torch.no_grad():
        outputs = stage.outputs(*stage.split(theta), inputs)

    def loss(output: Tensor, target: Nested) -> Tensor:
        one = map_leaves(lambda leaf: leaf[None], target)
        return stage.loss(output.view(1, *outputs.shape[1:]), one)[0]

    curvature = vmap(hessian(loss))(outputs.flatten(1), targets).detach()
    values, vectors = torch.linalg.eigh(curvature)
    return vectors.mT * values.clamp_min(0).sqrt()[:, :, None]
