"""What the gradient at the centre has to do with the best linear prediction of q over subsets.

Truth is an enumeration of all subsets: a regression, or a sum by definition. With w̄ = 1 − α, v =
α(1 − α), δ = w − w̄, and g, Q, C the derivatives of q at w̄ (C_ijk the third), the statements are

    independent       β_i = g_i + ½(2α − 1) Q_ii + (1 − 3v)/6 C_iii + ½ v Σ_{j≠i} C_ijj + fourth
    subsets of a size β = P[g + ½(2α − 1)(Q_ii − (2/(m − 2)) Σ_{j≠i} Q_ij) + third],

P taking the mean out. Over subset runs, of which an example is kept in some and left out of others,
the mean of ∂_i q differs from β_i by derivatives in w_i alone.

Proof of the first: an example's effect is q(w_i = 1) − q(w_i = 0) = ∫₀¹ ∂_i q dw_i, so that β_i is
the mean of that over the others, E ∫₀¹ ∂_i q(t, w_others) dt; expand ∂_i q about w̄ and use
∫₀¹ (t − w̄) dt = ½(2α − 1), ∫₀¹ (t − w̄)² dt = ⅓ − v and E δ_jδ_k = v for j = k, else 0. Of the
second: δ_i² = v + (2α − 1) δ_i for two values, so that squares are linear, and of a product δ_jδ_k,
j ≠ k, the best linear prediction is const − (2α − 1)/(m − 2) (δ_j + δ_k), because Σδ = 0 leaves
E δ_i²δ_j = −E δ_i³/(m − 1) and E δ_iδ_jδ_k = 2 E δ_i³/((m − 1)(m − 2)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from chains import Fit, Fits, examples, mlp, randomised
from problems import F64, relative_error
from test_retraining_chain import MOMENTUM
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from msif_lib import Chain
from msif_lib.descent import run
from msif_lib.retraining import with_weights

M = 7
Q = Callable[[Tensor], Tensor]


def polynomial(degree: int) -> Q:
    """A random polynomial of all weights, no coefficient of which vanishes."""
    generator = torch.Generator().manual_seed(degree)
    tensors = [
        torch.randn((M,) * power, generator=generator, dtype=F64) / math.factorial(power)
        for power in range(1, degree + 1)
    ]

    def q(w: Tensor) -> Tensor:
        total = w.new_ones(())
        for tensor in tensors:
            for _ in range(tensor.dim()):
                tensor = tensor @ w
            total = total + tensor
        return total

    return q


ROWS = torch.randn(4, M, generator=torch.Generator().manual_seed(5), dtype=F64)


def smooth(w: Tensor) -> Tensor:
    """No polynomial, and far from linear."""
    return torch.tanh(ROWS @ w).square().sum() + torch.exp(ROWS[0] @ w / 3)


ALL = torch.tensor(list(product([0.0, 1.0], repeat=M)), dtype=F64)


def likelihoods(subsets: Tensor, w: Tensor) -> Tensor:
    """Of each subset, where example i is kept with probability w_i."""
    return torch.where(subsets > 0, w, 1 - w).prod(1)


def multilinear(q: Q) -> Q:
    """Owen's extension: the mean of q over subsets, examples being kept with probabilities w."""
    values = vmap(q)(ALL)
    return lambda w: likelihoods(ALL, w) @ values


def datamodel(subsets: Tensor, values: Tensor, shares: Tensor) -> Tensor:
    """The coefficients of the weighted least-squares fit, those of least norm."""
    design = torch.cat([torch.ones(len(subsets), 1, dtype=F64), subsets - subsets.mean(0)], 1)
    root = shares.sqrt()[:, None]
    solution = torch.linalg.pinv(root * design) @ (root[:, 0] * values)
    return solution[1:]


def derivatives(q: Q, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad(q)(w), hessian(q)(w), jacfwd(hessian(q))(w)


def centred(values: Tensor) -> Tensor:
    return values - values.mean()


SHARES = [0.15, 0.5, 0.7]


@pytest.mark.numeric
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("degree", [2, 3])
def test_the_datamodel_is_the_gradient_at_the_centre_and_one_entry(degree, share):
    q, at = polynomial(degree), torch.full((M,), 1 - share, dtype=F64)
    shares = likelihoods(ALL, at)
    found = datamodel(ALL, vmap(q)(ALL), shares)
    (g, second, third), v = derivatives(q, at), share * (1 - share)
    own = third.diagonal(dim1=1, dim2=2)  # C_ijj
    cubic = (1 - 3 * v) / 6 * own.diagonal() + v / 2 * (own.sum(1) - own.diagonal())
    if degree == 2:
        assert not cubic.any()
    diagonal = (2 * share - 1) / 2 * second.diagonal()
    assert relative_error(g + diagonal + cubic, found) < 1e-12
    # The whole row, the other sign and the gradient at w = 1 are something else.
    ones = grad(q)(torch.ones(M, dtype=F64))
    wrong = [ones, ones + diagonal, g + diagonal + share * second.sum(1)]
    if share != 0.5:
        wrong += [g + cubic, g - diagonal + cubic]
    for other in wrong:
        assert relative_error(other, found) > 1e-2
    if degree == 2:
        assert relative_error(ones - share * second.sum(1), g) < 1e-12


@pytest.mark.numeric
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("q", [polynomial(3), smooth])
def test_it_is_the_derivative_of_the_multilinear_extension(q, share):
    at = torch.full((M,), 1 - share, dtype=F64)
    found, extension = datamodel(ALL, vmap(q)(ALL), likelihoods(ALL, at)), multilinear(q)
    assert relative_error(grad(extension)(at), found) < 1e-12
    if share == 0.5:
        assert relative_error(banzhaf(q), found) < 1e-12
    # And the mean of ∂_i q along the example's own weight, over the others' subsets.
    means = torch.zeros(M, dtype=F64)
    for t, length in zip(*gauss(24)):
        for i in range(M):
            subsets = ALL.clone()
            subsets[:, i] = t
            means[i] += length * vmap(grad(q))(subsets)[:, i] @ likelihoods(ALL, at)
    assert relative_error(means, found) < 1e-9


def gauss(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def table(q: Q) -> dict[frozenset[int], float]:
    """q of every set of examples."""
    kept = [frozenset(subset.nonzero()[:, 0].tolist()) for subset in ALL]
    return dict(zip(kept, vmap(q)(ALL).tolist(), strict=True))


def banzhaf(q: Q) -> Tensor:
    """By its definition: the mean of what an example adds to a set of others."""
    values = table(q)
    added = [
        [values[kept | {i}] - values[kept] for kept in values if i not in kept] for i in range(M)
    ]
    return torch.tensor(added, dtype=F64).mean(1)


@pytest.mark.numeric
@pytest.mark.parametrize("q", [polynomial(3), smooth])
def test_shapley_values_are_the_mean_over_all_centres(q):
    extension, values, shapley = multilinear(q), table(q), torch.zeros(M, dtype=F64)
    along = sum(
        length * grad(extension)(torch.full((M,), t, dtype=F64)) for t, length in zip(*gauss(8))
    )
    for order in permutations(range(M)):
        for place, i in enumerate(order):
            before = frozenset(order[:place])
            shapley[i] += values[before | {i}] - values[before]
    assert relative_error(along, shapley / math.factorial(M)) < 1e-12


@pytest.mark.numeric
@pytest.mark.parametrize("share", SHARES)
def test_means_over_subset_runs_leave_an_examples_own_derivatives_alone(share):
    q, at = polynomial(3), torch.full((M,), 1 - share, dtype=F64)
    shares, v = likelihoods(ALL, at), share * (1 - share)
    found = datamodel(ALL, vmap(q)(ALL), shares)
    (_, second, third), slopes = derivatives(q, at), vmap(grad(q))(ALL)
    q_ii, c_iii = second.diagonal(), third.diagonal(dim1=1, dim2=2).diagonal()
    mean = shares @ slopes
    assert relative_error(mean + (2 * share - 1) / 2 * q_ii + (1 / 6 - v) * c_iii, found) < 1e-12
    # Of the runs that keep an example alone, where those that do not have no use (Adam).
    kept = (shares[:, None] * slopes * ALL).sum(0) / (1 - share)
    assert relative_error(kept - q_ii / 2 + (1 / 3 - share) / 2 * c_iii, found) < 1e-12
    # Runs that keep an example and runs that do not count as much: the rule of trapezoids.
    halves = (kept + (shares[:, None] * slopes * (1 - ALL)).sum(0) / share) / 2
    assert relative_error(halves - c_iii / 12, found) < 1e-12
    for other in (mean, kept, halves, halves + c_iii / 12, grad(q)(at)):
        assert relative_error(other, found) > 1e-2


# --- subsets of one size -------------------------------------------------------------------------


def of_size(left_out: int) -> Tensor:
    """All subsets that leave out so many."""
    return ALL[(ALL == 0).sum(1) == left_out]


@pytest.mark.numeric
@pytest.mark.parametrize("left_out", [1, 2, 3, 5])
@pytest.mark.parametrize("degree", [2, 3])
def test_of_subsets_of_one_size_a_mean_of_the_row_is_left(degree, left_out):
    q, subsets, share = polynomial(degree), of_size(left_out), left_out / M
    values = vmap(q)(subsets)
    found = datamodel(subsets, values, torch.ones(len(subsets), dtype=F64))
    assert abs(float(found.sum())) < 1e-10  # of all that are alike it has no common constant
    at, v, skew = torch.full((M,), 1 - share, dtype=F64), share * (1 - share), 2 * share - 1
    g, second, third = derivatives(q, at)
    # Third derivatives: δ³ and δ_i²δ_j by δ² = v + (2α − 1) δ, and the best prediction of products.
    own = third.diagonal(dim1=1, dim2=2)  # C_ijj
    linear = (v + skew**2) / 6 * own.diagonal() + v / 2 * (own.sum(1) - own.diagonal())
    pairs = second + skew / 2 * (own + own.T)
    triples = torch.zeros(M, dtype=F64)
    for i in range(M):
        others = [j for j in range(M) if j != i]
        triples[i] = sum(third[i, j, k] for j, k in combinations(others, 2))
    row = pairs.sum(1) - pairs.diagonal()
    quadratic = skew / 2 * (second.diagonal() - 2 / (M - 2) * row)
    cubic = linear + (2 * skew**2 / (M - 2) - v) / (M - 3) * triples
    assert relative_error(centred(g + quadratic + cubic), found) < 1e-11
    # Kept against left out, and the mean over exchanges with another example.
    kept = torch.stack([values[subsets[:, i] > 0].mean() for i in range(M)])
    gone = torch.stack([values[subsets[:, i] == 0].mean() for i in range(M)])
    assert relative_error((M - 1) / M * (kept - gone), found) < 1e-11
    # The statement for independent removals is another one, and so is the gradient at w = 1.
    other = g + skew / 2 * second.diagonal() + cubic
    assert relative_error(centred(other), found) > 1e-2
    assert relative_error(centred(grad(q)(torch.ones(M, dtype=F64))), found) > 1e-2


@pytest.mark.numeric
def test_half_of_the_examples_leave_nothing_of_second_order():
    generator = torch.Generator().manual_seed(0)
    rows, size = torch.randn(2, 6, generator=generator, dtype=F64), 6
    square = torch.randn(size, size, generator=generator, dtype=F64)

    def q(w: Tensor) -> Tensor:
        return rows[0] @ w + w @ square @ w

    subsets = torch.tensor([w for w in product([0.0, 1.0], repeat=size) if sum(w) == 3], dtype=F64)
    found = datamodel(subsets, vmap(q)(subsets), torch.ones(len(subsets), dtype=F64))
    at = grad(q)(torch.full((size,), 0.5, dtype=F64))
    assert relative_error(centred(at), found) < 1e-12


# --- and of a training ---------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_trained_model_is_predicted_from_its_centre(share):
    size = 10
    fit = Fit(randomised(mlp(2), 0), examples(size, 2, 0), 0.02, recipe=MOMENTUM)
    fits = Fits([fit], examples(5, 2, 9))
    chain = Chain(fits.links(), progress=False)
    stage, path = chain.links[0].stage, chain.links[0].path
    subsets = torch.tensor(list(product([0.0, 1.0], repeat=size)), dtype=F64)
    ends = run(stage, path, subsets, path.start.expand(len(subsets), -1).contiguous())
    test = stage.with_data(fits.test)
    q = torch.stack([test.losses_at(end, *fits.test).sum() for end in ends]).detach()
    at = torch.full((size,), 1 - share, dtype=F64)
    found = datamodel(subsets, q, likelihoods(subsets, at))

    def gradient(weights: Tensor) -> Tensor:
        there = with_weights(chain, weights, progress=False)
        return there.scores(fits.test)[0].values / size

    step, eye = 1e-3, torch.eye(size, dtype=F64)
    second = torch.stack(
        [(gradient(at + step * e) - gradient(at - step * e))[i] for i, e in enumerate(eye)]
    ) / (2 * step)
    at_centre = gradient(at)
    corrected = at_centre + (2 * share - 1) / 2 * second
    at_one = gradient(torch.ones_like(at))
    errors = [relative_error(one, found) for one in (corrected, at_centre, at_one)]
    assert errors[0] < 0.1 and errors[1] < errors[2] / 2
