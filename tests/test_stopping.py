"""Trainings that stop early, against the same trainings done one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from msif_lib import Stage, cross_entropy
from msif_lib.study.stopping import finetune_plainly, stop_early, through_steps
from msif_lib.support.minimise import Descent, descend
from msif_lib.training import _adam, train

pytestmark = pytest.mark.numeric
F64 = torch.float64


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


def test_a_training_that_stops_is_the_first_phase_of_a_training() -> None:
    pretrain, finetune = stages()
    before = pretrain.vector(), finetune.vector()
    test = finetune.data
    (stopped,) = stop_early(pretrain, finetune, [[3]], test, [], epochs=4, seed=7, minibatch=16)
    expected = _adam(pretrain, pretrain.vector(), False, None, None, 4, 5e-3, 16, 7)
    assert torch.allclose(stopped.pretrain.vector(), expected, rtol=1e-9)
    for stage, vector in zip((pretrain, finetune), before, strict=True):
        assert torch.equal(stage.vector(), vector)
    pretrain.load_vector(expected)
    assert stopped.gradient_norm == pytest.approx(float(pretrain.gradient().norm()), rel=1e-9)


def test_a_removal_is_the_same_training_with_its_weight_zero() -> None:
    pretrain, finetune = stages()
    test = finetune.data
    removals = [[3], [0, 11]]
    stops = stop_early(
        pretrain, finetune, removals, test, [1e-2, 1e-9], epochs=3, seed=7, minibatch=16
    )

    def loss(removed: list[int], optimum: bool) -> float:
        weights = torch.ones(40, dtype=F64)
        weights[removed] = 0

        def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
            # The last target entry carries the weight.
            return targets[:, 1] * nn.functional.cross_entropy(
                outputs, targets[:, 0].long(), reduction="none"
            )

        inputs, targets = pretrain.data
        data = inputs, torch.stack([targets.to(F64), weights], 1)
        first = Stage(
            copy.deepcopy(pretrain.embedding), copy.deepcopy(pretrain.head), weighted, data,
            l2=0.02,
        )  # fmt: skip
        first.load_vector(_adam(first, first.vector(), False, None, None, 3, 5e-3, 16, 7))
        if optimum:
            assert train(first, 1e-10, epochs=0).converged
        second = copy.deepcopy(finetune)
        second.load_vector(torch.cat([first.embedding_vector(), finetune.head_vector()]))
        assert train(second, 1e-10, head_only=True, epochs=0).converged
        return float(second.losses(second.embedding_vector(), second.head_vector(), *test).sum())

    for stopped, optimum in ((stops[0], False), (stops[2], True)):
        changes = [loss(removal, optimum) - loss([], optimum) for removal in removals]
        assert torch.allclose(stopped.change, torch.tensor(changes, dtype=F64), rtol=1e-5)
    norms = [stopped.gradient_norm for stopped in stops]
    assert norms[0] > 1e-2 >= norms[1] > 1e-9 >= norms[2]
    assert all(torch.equal(stopped.pretrain.vector()[:24], stopped.finetune.vector()[:24])
               for stopped in stops)  # fmt: skip


def test_plain_finetuning_follows_the_descent() -> None:
    _, stage = stages()
    steps = Descent(9, 0.1, 0.8)
    start = stage.vector()

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = stage.objective_and_gradient(x[0])
        return value[None], gradient[None]

    end = descend(objective, start[None], 1e-9, steps).x[0]
    path = finetune_plainly(stage, steps)
    assert torch.allclose(stage.vector(), end, rtol=1e-12)
    assert len(path) == 9
    assert torch.equal(path[0], start)


@pytest.mark.parametrize("alpha", [0.0, 0.07])
def test_the_gradient_through_the_steps_is_that_of_finite_differences(alpha: float) -> None:
    _, stage = stages()
    steps = Descent(12, 0.2, 0.7)
    start = stage.vector()
    at_end = torch.linspace(-1, 1, len(start), dtype=F64)

    def end_from(x: Tensor) -> Tensor:
        moved = copy.deepcopy(stage)
        moved.load_vector(x)
        finetune_plainly(moved, steps, alpha)
        return at_end @ moved.vector()

    path = finetune_plainly(stage, steps, alpha)
    found = through_steps(stage, path, steps, {12: at_end}, alpha)[12]
    assert torch.equal(stage.vector(), start)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = torch.randn(len(start), generator=generator, dtype=F64)
        h = 1e-5
        slope = (end_from(start + h * direction) - end_from(start - h * direction)) / (2 * h)
        assert float(found @ direction) == pytest.approx(float(slope), rel=1e-6)
