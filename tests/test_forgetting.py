"""Influence through a finetuning that stops early, and the filter at an optimum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from msif_lib import (
    Chain,
    FixedEmbeddingInfluence,
    Stage,
    UpdatedEmbeddingInfluence,
    cross_entropy,
)
from msif_lib.links import Optimum
from msif_lib.solvers import Dense
from msif_lib.study.experiments.forgetting import (
    curvature,
    descent_gain,
    finetune_in_steps,
    proximal_gain,
)
from msif_lib.training import train

pytestmark = pytest.mark.numeric
F64 = torch.float64
ALPHA = 0.07  # not 0.5, where a missing 2 alpha would not show
RATE = 0.4


def data(seed: int, count: int, classes: int):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=F64)
    targets = torch.randint(classes, (count,), generator=generator)
    return inputs, (targets + (inputs[:, 0] > 0)) % classes


@pytest.fixture(scope="module")
def stages():
    """A pretrained stage, one finetuned in each case, and test data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embedding = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
        heads = nn.Linear(3, 2).double(), nn.Linear(3, 3).double()
    pretrain = Stage(embedding, heads[0], cross_entropy, data(1, 40, 2), l2=0.02)
    train(pretrain, 1e-11)
    fixed = Stage(copy.deepcopy(embedding), heads[1], cross_entropy, data(2, 30, 3), l2=0.03)
    train(fixed, 1e-11, head_only=True)
    tuned = Stage(
        copy.deepcopy(embedding), copy.deepcopy(heads[1]), cross_entropy, fixed.data, l2=0.03
    )
    train(tuned, 1e-11, towards=pretrain.embedding_vector(), alpha=ALPHA, epochs=0)
    return pretrain, fixed, tuned, data(3, 20, 3)


def unrolled(stage: Stage, test, steps: int, alpha: float):
    """Plain autograd through all steps, the objective written out."""
    inputs, targets = stage.data
    w_bar = stage.embedding_vector().requires_grad_()
    theta = torch.cat([w_bar, stage.head_vector()])
    for _ in range(steps):
        w, h = stage.split(theta)
        value = nn.functional.cross_entropy(stage.outputs(w, h, inputs), targets)
        value = value + 0.5 * stage.l2 * (theta @ theta) + alpha * (w - w_bar) @ (w - w_bar)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        theta = theta - RATE * gradient
    outputs = stage.outputs(*stage.split(theta), test[0])
    loss = nn.functional.cross_entropy(outputs, test[1], reduction="sum")
    (sensitivity,) = torch.autograd.grad(loss, w_bar)
    accuracy = (outputs.argmax(1) == test[1]).double().mean()
    return theta.detach(), float(loss.detach()), float(accuracy), sensitivity


def scores_for(pretrain: Stage, sensitivity):
    """Scores of the pretraining examples for a sensitivity dq/dW̄."""
    cotangent = pretrain.parameters.put(sensitivity[:, None], pretrain.shared)
    chain = Chain([Optimum(pretrain, Dense())], progress=False)
    return chain.pull_back(cotangent)[0].values[:, 0]


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_descent_gives_the_derivative_through_its_steps(stages, alpha):
    _, fixed, _, test = stages
    before = fixed.vector()
    found = finetune_in_steps(fixed, test, [7, 0, 3], RATE, alpha)
    assert list(found) == [0, 3, 7]
    assert torch.equal(fixed.vector(), before)
    for steps, stopped in found.items():
        vector, loss, accuracy, sensitivity = unrolled(fixed, test, steps, alpha)
        torch.testing.assert_close(stopped.vector, vector, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stopped.sensitivity, sensitivity, rtol=1e-9, atol=1e-12)
        assert (stopped.test_loss, stopped.accuracy) == pytest.approx((loss, accuracy))


def test_descent_comes_to_the_scores_of_case_2(stages):
    pretrain, _, tuned, test = stages
    exact = UpdatedEmbeddingInfluence(pretrain, tuned, ALPHA, Dense(), progress=False)
    start = Stage(
        copy.deepcopy(pretrain.embedding), copy.deepcopy(tuned.head), cross_entropy, tuned.data,
        l2=tuned.l2,
    )  # fmt: skip
    stopped = finetune_in_steps(start, test, [500], 1.5, ALPHA)[500]
    torch.testing.assert_close(stopped.vector, tuned.vector(), rtol=1e-6, atol=1e-7)
    scores = scores_for(pretrain, stopped.sensitivity)
    torch.testing.assert_close(scores, exact.scores(test).values, rtol=1e-5, atol=1e-7)


def test_the_filter_gives_the_scores_of_case_2(stages):
    pretrain, _, tuned, test = stages
    bent = curvature(tuned, test)
    sensitivity = bent.filtered(proximal_gain(bent.eigenvalues, ALPHA))
    exact = UpdatedEmbeddingInfluence(pretrain, tuned, ALPHA, Dense(), progress=False)
    expected = exact.sensitivity(exact.test_gradients(test))[:, 0]
    torch.testing.assert_close(sensitivity, expected, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(
        scores_for(pretrain, sensitivity),
        exact.scores(test).values,
        rtol=1e-6,
        atol=1e-9,
    )


def test_without_a_filter_the_gradient_is_that_of_case_1(stages):
    pretrain, fixed, _, test = stages
    exact = FixedEmbeddingInfluence(pretrain, fixed, Dense(), progress=False)
    bent = curvature(fixed, test)
    expected = exact.sensitivity(exact.test_gradients(test))[:, 0]
    torch.testing.assert_close(bent.gradient, expected, rtol=1e-9, atol=1e-12)
    several = bent.filtered(torch.ones(len(expected), 2, dtype=F64), expected)
    torch.testing.assert_close(several, torch.stack([expected] * 2, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_the_gain_of_descent_is_exact_on_a_quadratic(alpha):
    """W <- W - rate (sigma W + 2 alpha (W - 1)) from W = 1 leaves this share of the start."""
    sigma = torch.tensor([-0.01, 0.0, 0.3, 2.0], dtype=F64)
    w = torch.ones_like(sigma)
    for _ in range(9):
        w = w - RATE * (sigma * w + 2 * alpha * (w - 1))
    torch.testing.assert_close(descent_gain(sigma, 9, RATE, alpha), w, rtol=1e-12, atol=1e-14)
    if alpha:
        endless = descent_gain(sigma, 10**6, RATE, alpha)
        torch.testing.assert_close(endless, proximal_gain(sigma, alpha), rtol=1e-9, atol=1e-12)


def test_what_cannot_finetune_in_steps(stages):
    _, fixed, _, test = stages
    for steps in ([], [-1]):
        with pytest.raises(ValueError, match="steps must be numbers from 0 on"):
            finetune_in_steps(fixed, test, steps, RATE)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        finetune_in_steps(fixed, test, [1], 0.0)
    with pytest.raises(ValueError, match="alpha must not be negative"):
        finetune_in_steps(fixed, test, [1], RATE, -1.0)
    with pytest.raises(FloatingPointError, match="diverges at learning rate"):
        finetune_in_steps(fixed, test, [100], 1e6)


def test_where_the_steps_stay_finite_but_not_their_derivatives():
    """At a stationary point no step moves, but each carries 1 − ησ back: here −29."""
    embedding, head = (nn.Linear(1, size, bias=False, dtype=F64) for size in (1, 2))
    embedding.load_state_dict({"weight": torch.zeros(1, 1)})
    head.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]])})
    both = torch.ones(2, 1, dtype=F64), torch.tensor([0, 1])
    stage = Stage(embedding, head, cross_entropy, both)
    test = both[0][:1], both[1][:1]
    some = finetune_in_steps(stage, test, [0, 1, 2], 30.0)
    start = some[0].sensitivity
    for k, stopped in some.items():
        assert torch.equal(stopped.vector, stage.vector())
        torch.testing.assert_close(stopped.sensitivity, (-29.0) ** k * start)
    with pytest.raises(FloatingPointError, match="derivatives of gradient descent overflow"):
        finetune_in_steps(stage, test, [300], 30.0)
