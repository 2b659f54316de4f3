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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor
from torch.func import hessian, vjp, vmap

from msif_lib.stage import Stage
from msif_lib.support.data import Batch, Nested, count_of, map_leaves
from msif_lib.support.parameters import Block

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
class GaussNewtonPreconditioner:
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
    def from_rows(rows: Tensor, diagonal: Tensor) -> GaussNewtonPreconditioner:
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
        return GaussNewtonPreconditioner(diagonal.rsqrt(), vectors, shrink)

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


def gauss_newton_rows(stage: Stage, at: Tensor, rows: int, block: Block) -> Tensor | None:
    """The leading rows of the Gauss-Newton matrix's root, scaled to the trace of all of them.

    Where the data are shared out among processes, each looks at all of these examples by itself.

    Parameters
    ----------
    stage
        The stage.
    at
        The parameters ``(p,)``, at which the matrix is taken.
    rows
        Rows wanted, r; fewer where there are fewer modes.
    block
        The parameters that J differentiates by, their numbers.

    Returns
    -------
    Tensor or None
        R ``(r, p_B)`` with RᵀR ≈ (1/N) Σ w_i J_iᵀ ℓ''_i J_i. None where there is none: the outputs
        of the model are not one tensor, with at most 128 numbers for each example, or the loss
        has no curvature in them, or they cannot be vectorised.
    """
    try:
        return _rows(stage, at.detach(), rows, block)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError):  # what vmap says, or a strange shape
        return None


def _rows(stage: Stage, at: Tensor, rows: int, block: Block) -> Tensor | None:
    looked_at = range(0, stage.size, -(-stage.size // _EXAMPLES))
    trace = torch.cat(
        [_curvature(stage, at, *some).diagonal(0, 1, 2).sum(1) for some in _read(stage, looked_at)]
    ).clamp_min(0)
    # The examples of largest curvature, and of those the largest modes. Ties, as all examples of a
    # squared error are, are broken by chance: the data may be sorted.
    chance = torch.Generator(trace.device).manual_seed(0)
    jitter = torch.rand(trace.shape, generator=chance, dtype=trace.dtype, device=trace.device)
    leading = (trace * (1 + 1e-3 * jitter)).topk(min(rows, len(trace))).indices.sort().values
    examples = [looked_at[number] for number in leading.tolist()]
    modes = torch.cat([modes_of(_curvature(stage, at, *some)) for some in _read(stage, examples)])
    mass = modes.pow(2).sum(2).flatten()
    chosen = mass.topk(min(rows, len(mass))).indices.sort().values
    share = float(mass[chosen].sum() / trace.sum())
    if not share > 0:  # nor where it is not a number
        return None
    modes, owners = modes.flatten(0, 1)[chosen], chosen // modes.shape[1]
    leaf = stage.parameters.take(at, block)

    def outputs(inputs: Nested, leaf: Tensor) -> Tensor:
        return stage.batch_outputs(stage.parameters.parts(at, (block, leaf)), inputs)

    def row(mode: Tensor, inputs: Nested) -> Tensor:
        one = map_leaves(itemgetter(None), inputs)
        value, pull_back = vjp(partial(outputs, one), leaf)[:2]
        return pull_back(mode.view(value.shape))[0]

    found = modes.new_empty(len(modes), len(leaf))
    start = 0
    for (inputs, targets), _ in _read(stage, examples):
        count = count_of((inputs, targets))
        here = ((owners >= start) & (owners < start + count)).nonzero()[:, 0]
        for some in here.split(stage.gradients_at_once):
            these = map_leaves(itemgetter(owners[some] - start), inputs)
            found[some] = vmap(row)(modes[some], these)
        start += count
    return found.div_((len(looked_at) * share) ** 0.5)


def _read(stage: Stage, indices: Sequence[int]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of these examples, and their weights."""
    weights = stage.weights[list(indices)].split(stage.chunk_size)
    return zip(stage.read(stage.chunk_size, indices), weights, strict=True)


def _curvature(stage: Stage, at: Tensor, batch: Batch, weights: Tensor) -> Tensor:
    """The Hessians w ℓ'' of a batch of losses in the K outputs of each example, ``(b, K, K)``."""
    inputs, targets = batch
    with torch.no_grad():
        outputs = stage.batch_outputs(stage.parameters.views(at), inputs)
    return curvature_in_outputs(stage, outputs, targets, weights)


def curvature_in_outputs(stage: Stage, outputs: Tensor, targets: Nested, weights: Tensor) -> Tensor:
    """The Hessians w ℓ'' of losses in the K outputs of each example, ``(b, K, K)``.

    Raises
    ------
    ValueError
        `outputs` is not one tensor with the examples as first dimension, or more than 128 numbers
        an example.
    """
    count = len(weights)
    if not isinstance(outputs, Tensor) or len(outputs) != count:
        raise ValueError("the outputs are not one tensor with the examples as first dimension")
    flat = outputs.reshape(count, -1)
    if flat.shape[1] > _LARGEST_OUTPUT:
        raise ValueError(
            f"the outputs of an example are too many: {flat.shape[1]}, at most {_LARGEST_OUTPUT}"
        )

    def loss(output: Tensor, target: Nested) -> Tensor:
        one = map_leaves(itemgetter(None), target)
        return stage.loss(output.view(1, *outputs.shape[1:]), one)[0]

    return vmap(hessian(loss))(flat, targets).detach() * weights[:, None, None]


def modes_of(curvature: Tensor) -> Tensor:
    """The u_ic ``(b, K, K)`` of w ℓ''_i = Σ_c u_ic u_icᵀ; a negative eigenvalue gives none."""
    values, vectors = torch.linalg.eigh(curvature)
    return vectors.mT * values.clamp_min(0).sqrt()[:, :, None]
