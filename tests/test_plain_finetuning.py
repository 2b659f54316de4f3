"""Trainings that stop early, as links of a chain, against the same done by torch.optim."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.links import Frozen, Optimum, Unrolled
from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.study.experiments.forgetting import _pulled
from msif_lib.training import SGD, AdamW, Path, descend, train

F64 = torch.float64
EPOCHS, MINIBATCH = 4, 16
STEPS = EPOCHS * 3  # 40 examples: two batches of 16 and one of 8


def stages() -> tuple[Stage, Stage]:
    """A pretraining and a finetuning stage at initial weights, with one embedding each."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator, dtype=F64)
    targets = (inputs[:, 0] + inputs[:, 1] ** 2 > 0.5).long()
    others = (inputs[:, 2] > inputs[:, 3]).long() + (inputs[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        embedding = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
        heads = nn.Linear(4, 2).double(), nn.Linear(4, 3).double()
    return (
        Stage(embedding, heads[0], cross_entropy, (inputs[:40], targets[:40]), l2=0.02),
        Stage(
            copy.deepcopy(embedding), heads[1], cross_entropy, (inputs[40:], others[40:]), l2=0.03
        ),
    )


def stopped_early(stage: Stage) -> Path:
    """Some epochs of Adam, the learning rate falling to zero along a cosine."""
    rates = [5e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    adam = AdamW(5e-3, weight_decay=0.0)
    return descend(stage, adam, EPOCHS, MINIBATCH, seed=7, learning_rates=rates, progress=False)


def adam_by_torch(stage: Stage, batches: Sequence[Tensor], removed: Sequence[int]) -> Tensor:
    """The same by torch.optim, each loss written out and some of them left out of their batch."""
    model = copy.deepcopy(stage.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    inputs, targets = stage.examples.tensors()
    keep = torch.ones(len(inputs), dtype=F64)
    keep[list(removed)] = 0
    for batch in batches:
        losses = nn.functional.cross_entropy(model(inputs[batch]), targets[batch], reduction="none")
        penalty = 0.5 * stage.l2 * sum(part.square().sum() for part in model.parameters())
        optimizer.zero_grad()
        ((keep[batch] * losses).mean() + penalty).backward()
        optimizer.step()
        schedule.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def head_on(finetune: Stage, embedding: Tensor) -> Stage:
    """The finetuning stage with a head trained to its optimum on another embedding."""
    headed = copy.deepcopy(finetune)
    headed.load_vector(torch.cat([embedding, finetune.head_vector()]))
    assert train(headed, 1e-10, head_only=True, epochs=0).converged
    return headed


def without(pretrain: Stage, removed: Sequence[int]) -> Stage:
    """The pretraining stage with weight zero for some of its examples."""
    weights = torch.ones(pretrain.size, dtype=F64)
    weights[list(removed)] = 0
    modules = copy.deepcopy((pretrain.embedding, pretrain.head))
    return Stage(*modules, cross_entropy, pretrain.data, l2=pretrain.l2, weights=weights)


def test_a_training_that_stops_is_that_of_torch() -> None:
    pretrain, _ = stages()
    before = pretrain.vector()
    path = stopped_early(pretrain)
    expected = adam_by_torch(without(stages()[0], []), path.batches, [])
    assert torch.equal(path.start, before)
    assert torch.allclose(pretrain.vector(), expected, rtol=1e-9)
    assert float(pretrain.gradient().norm()) > 1e-2


@pytest.mark.parametrize("optimum", [False, True], ids=["stopped", "optimum"])
def test_a_removal_is_the_same_training_with_its_weight_zero(optimum: bool) -> None:
    pretrain, finetune = stages()
    removals, test = [[3], [0, 11]], finetune.examples.tensors()
    path = stopped_early(pretrain)
    if optimum:
        assert train(pretrain, 1e-10, epochs=0).converged
    headed = head_on(finetune, pretrain.embedding_vector())
    before = pretrain.vector(), headed.vector()
    first = Optimum(pretrain) if optimum else Unrolled(pretrain, path)
    found = retrain_without(
        Chain([first, Frozen(headed)], progress=False),
        removals,
        test,
        settings=RetrainingSettings(tol=1e-9),
        progress=False,
    )
    for stage, vector in zip((pretrain, headed), before, strict=True):
        assert torch.equal(stage.vector(), vector)

    def loss(removed: list[int]) -> float:
        again = without(stages()[0], removed)
        if optimum:  # from the optimum with all examples: another start may lead to another one
            again.load_vector(before[0])
            assert train(again, 1e-10, epochs=0).converged
        else:
            again.load_vector(adam_by_torch(again, path.batches, removed))
        second = head_on(finetune, again.embedding_vector())
        return float(second.losses(*second.split(second.vector()), *test).sum())

    changes = torch.tensor([loss(removed) - loss([]) for removed in removals], dtype=F64)
    assert torch.allclose(found.change, changes, rtol=1e-5)


def sgd_by_torch(stage: Stage, start: Tensor, steps: int, alpha: float = 0.0) -> Tensor:
    """Where full-batch steps lead from `start`, with a pull α‖W − W̄‖² towards its W̄."""
    w_bar, _ = stage.split(start)
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.2, momentum=0.7)
    inputs, targets = stage.examples.tensors()
    for _ in range(steps):
        w, h = stage.split(theta)
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(stage.outputs(w, h, inputs), targets)
        value = value + 0.5 * stage.l2 * (theta @ theta) + alpha * (w - w_bar) @ (w - w_bar)
        value.backward()
        optimizer.step()
    return theta.detach()


def finetuned(stage: Stage, steps: int) -> Path:
    return descend(stage, SGD(0.2, momentum=0.7), steps, stage.size, seed=0, progress=False)


def test_plain_finetuning_follows_the_descent() -> None:
    _, stage = stages()
    start = stage.vector()
    path = finetuned(stage, 9)
    assert torch.allclose(stage.vector(), sgd_by_torch(stage, start, 9), rtol=1e-12)
    assert len(path) == 9
    assert torch.equal(path.start, start)


def from_start(alpha: float) -> tuple[Callable[[Tensor], Tensor], Tensor, Stage]:
    """The gradient by the start, as the library has it, of a function with a given end gradient."""
    _, stage = stages()
    work, size = _pulled(stage, alpha), stage.parameters.size
    path = finetuned(work, 12)
    at_end = torch.linspace(-1, 1, size, dtype=F64)
    cotangent = work.parameters.put(at_end[:, None], stage.parameters.all)
    handed = Unrolled(work, path).pull_back(cotangent).handed[:, 0]
    found = handed[:size].clone()
    found[: stage.embedding_size] += handed[size:]
    return lambda x: at_end @ sgd_by_torch(stage, x, 12, alpha), found, stage


@pytest.mark.parametrize("alpha", [0.0, 0.07])
def test_the_gradient_through_the_steps_is_that_of_finite_differences(alpha: float) -> None:
    end_from, found, stage = from_start(alpha)
    start = stage.vector()
    assert torch.equal(start, stages()[1].vector())
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = torch.randn(len(start), generator=generator, dtype=F64)
        h = 1e-5
        slope = (end_from(start + h * direction) - end_from(start - h * direction)) / (2 * h)
        assert float(found @ direction) == pytest.approx(float(slope), rel=1e-6)
