"""Rows that take no account of how a training depends on its examples, or learn it from others.

The gradient of a functional is that of the finetuned model, by the embedding; what it meets is the
pretraining examples' gradients by the embedding of the pretrained model. A head of pretraining is
not in the finetuned model, so that nothing of it is compared. All values have the sign of dq/dw_i:
an example like the functional helps, and more weight of it lowers the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import Tensor

from benchmarks.two_stage.bank import GIVEN
from benchmarks.two_stage.implicit import along, functionals, on_embedding
from benchmarks.two_stage.methods import by_steps, of_words, register
from benchmarks.two_stage.settings import Problem
from msif_lib.study.data.texts import bm25

# Numbers of words below this are padding, starts, ends and what the vocabulary has not.
_FIRST_WORD = 4


def on_the_embedding(of: Problem) -> Tensor:
    """∇_W q of each functional at the finetuned model, ``(p_W, T)``."""
    return of.finetune.split(functionals(of))[0]


def example_gradients(of: Problem, at: Tensor | None = None) -> Iterator[Tensor]:
    """∇_W ℓ_i of the pretraining examples in blocks ``(b, p_W)``, by default as pretrained."""
    size = of.pretrain.embedding_size
    return (block[:, :size] for block in of.pretrain.per_example_gradients(at))


# --- gradients -----------------------------------------------------------------------------------


@register("gradient dot product", scaled=False)
def gradient_dot(of: Problem) -> Tensor:
    """−∇_W ℓ_iᵀ ∇_W q: the Hessians taken for multiples of the identity. Nothing to choose."""
    return -along(of, on_embedding(of, on_the_embedding(of)))


@register("gradient cosine", scaled=False)
def gradient_cosine(of: Problem) -> Tensor:
    """The same of gradients of length 1 (Barshan et al. 2020 show what large gradients do)."""
    lengths = torch.cat([block.norm(dim=1) for block in example_gradients(of)])
    tested = F.normalize(on_the_embedding(of), dim=0)
    return -along(of, on_embedding(of, tested)) / lengths.clamp_min(1e-300)[:, None]


@register("TracIn", scaled=False, only=by_steps)
def tracin(of: Problem) -> Tensor:
    """TracInCP (Pruthi et al. 2020): −Σ_c η_c ∇_W ℓ_i(x_c)ᵀ ∇_W q over states of pretraining.

    The states are those that the path has kept, one in about √T steps; η_c is the sum of the
    learning rates until the next, so that each step counts once. No state of pretraining has the
    head of finetuning: ∇_W q is that of the finetuned model throughout.
    """
    stage, path = of.pretrain, of.chain.links[0].path
    u = on_embedding(of, on_the_embedding(of))
    kept = sorted(path.states)
    total = torch.zeros(of.size, u.shape[1], dtype=u.dtype)
    for begin, end in pairwise(kept):
        at = stage.parameters.replaced(path.start, path.states[begin].x, stage.trained)
        rate = sum(path.learning_rates[begin:end])
        total -= rate * torch.cat(list(stage.directional_derivatives(u, at)))
    return total


def projected(columns: Tensor, size: int, seed: int) -> Tensor:
    """Pᵀ of columns ``(p, k)`` by a random P of independent normal entries, ``(size, k)``."""
    generator = torch.Generator().manual_seed(seed)
    found = [
        torch.randn(size, len(some), generator=generator, dtype=columns.dtype) @ some
        for some in columns.split(4096)
    ]
    return torch.stack(found).sum(0) / size**0.5


def trak_scores(margins: Tensor, losses: Tensor, tested: Tensor) -> Tensor:
    """Q Φ (ΦᵀΦ)⁺ times what functionals have, ``(m, T)``; see :func:`trak`.

    Parameters
    ----------
    margins
        Φ, projected gradients of the margins ``(m, k)``.
    losses
        ℓ_i ``(m,)``; Q = 1 − e^(−ℓ_i), the probability that is not given to the label.
    tested
        Projected gradients of the functionals' losses ``(k, T)``.
    """
    inverse = torch.linalg.pinv(margins.T @ margins, hermitian=True)
    return -torch.expm1(-losses)[:, None] * (margins @ (inverse @ tested))


@register("TRAK, one model", scaled=False, tried=(16, 32, 64, 128, 256, 512, 1024))
def trak(of: Problem, size: float) -> Tensor:
    """TRAK (Park et al. 2023) of the pretraining set, with one model.

    The output is the margin log(p/(1 − p)) of an example's label, p = e^(−ℓ), whose gradient by the
    embedding is −∇_W ℓ / (1 − p); of a sentence, of which several words are told, p is their
    geometric mean. Gradients are projected by a random matrix, the functionals' losses' too, and
    dq/dw_i = ∇_W qᵀ P (ΦᵀΦ)⁺ φ_i (1 − p_i). Its ensemble of models trained on random halves would
    cost that many further trainings, and is left out. The size of the projection is chosen.
    """
    losses = of.pretrain.example_losses()
    # An example of which nothing is told has no loss, and no gradient.
    given = torch.where(losses > 0, -torch.expm1(-losses), 1.0)
    gradients = torch.cat(list(example_gradients(of)))
    margins = projected((-gradients / given[:, None]).T, int(size), of.seed).T
    return trak_scores(margins, losses, projected(on_the_embedding(of), int(size), of.seed))


# --- no gradients --------------------------------------------------------------------------------


def _features(of: Problem, pair: tuple[object, Tensor]) -> Tensor:
    """What the pretrained embedding makes of inputs ``(n, d)``; of words, a mean of those told."""
    inputs, labels = pair
    with torch.no_grad():
        found: Tensor = of.pretrain.embedding(inputs)
    if found.dim() < 3:
        return found
    counted = (labels >= 0).to(found) if labels.dim() > 1 else found.new_ones(found.shape[:2])
    return (counted[..., None] * found).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)


@register("embedding similarity", scaled=False)
def embedding_similarity(of: Problem) -> Tensor:
    """Minus the cosine of the features that the pretrained embedding gives. Nothing to choose."""
    pairs = of.data.pretrain, of.data.functionals
    ours, tested = (F.normalize(_features(of, pair), dim=1) for pair in pairs)
    return -(ours @ tested.T)


@register("random", scaled=False)
def random(of: Problem) -> Tensor:
    """Independent normal numbers: what a score of nothing looks like."""
    generator = torch.Generator().manual_seed(7919 + of.seed)
    return torch.randn(of.size, of.functionals, generator=generator, dtype=torch.float64)


@register("BM25", scaled=False, only=of_words)
def word_overlap(of: Problem) -> Tensor:
    """Minus BM25 of functionals' words in pretraining sentences (Robertson & Zaragoza 2009)."""

    def words(inputs: Tensor) -> list[list[str]]:
        return [[str(word) for word in row if word >= _FIRST_WORD] for row in inputs.tolist()]

    return -bm25(words(of.data.functionals[0][0]), words(of.data.pretrain[0][0]))


# --- other trainings -----------------------------------------------------------------------------


def ridge(left_out: Tensor, changes: Tensor, asked: Tensor) -> Tensor:
    """Predicted changes ``(M, T)`` of subsets ``(M, m)`` by ridge regression on others' changes.

    The penalty is chosen for each functional by leave-one-out cross-validation among the subsets
    that are given: of 1e-2 to 1e6, half a decade apart.
    """
    model = RidgeCV(alphas=np.logspace(-2, 6, 17), alpha_per_target=True)
    model.fit(left_out.double().numpy(), changes.numpy())
    return torch.from_numpy(model.predict(asked.double().numpy()).reshape(len(asked), -1))


@register("datamodel regression", of_subsets=True, trainings=GIVEN)
def datamodel(of: Problem, share: float, left_out: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
    """Regression on retrainings (Ilyas et al. 2022), as many as the exact row's time allows.

    28 subsets of the share that is asked about, which the judged ones are not among. Their
    trainings, 28 times both stages, count as its cost. Ridge
    in place of the lasso: 28 equations do not tell which of a thousand examples matter.
    """
    return ridge(*given, left_out)
