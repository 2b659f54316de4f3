"""Training reaches a stationary point that is a minimum, or says that it did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from msif_lib import Stage, cross_entropy, training
from msif_lib.training import TrainingWarning, train, train_kept

pytestmark = pytest.mark.numeric
F64 = torch.float64


def small_stage(seed: int = 0, l2: float = 0.02, count: int = 40) -> Stage:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator, dtype=F64)
    targets = (inputs[:, 0] + inputs[:, 1] ** 2 > 0.5).long()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        embedding = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
        head = nn.Linear(4, 2).double()
    return Stage(embedding, head, cross_entropy, (inputs, targets), l2=l2)


def dense_gradient_and_hessian(stage: Stage, pull: float = 0.0, towards: Tensor | None = None):
    """Independent of the trainer: autograd on the objective written out."""
    inputs, targets = stage.data

    def objective(theta: Tensor) -> Tensor:
        w, h = stage.split(theta)
        value = nn.functional.cross_entropy(stage.outputs(w, h, inputs), targets)
        value = value + 0.5 * stage.l2 * (theta @ theta)
        return value if towards is None else value + pull * ((w - towards) ** 2).sum()

    theta = stage.vector().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(theta), theta)
    return gradient, torch.autograd.functional.hessian(objective, theta.detach())


@pytest.mark.parametrize("epochs", [0, 5])
def test_trains_to_a_minimum(epochs: int) -> None:
    stage = small_stage()
    report = train(stage, 1e-10, epochs=epochs)
    gradient, hessian = dense_gradient_and_hessian(stage)
    assert report.converged and float(gradient.norm()) <= 1.01e-10
    lowest = float(torch.linalg.eigvalsh(hessian)[0])
    assert lowest > 0
    assert report.lowest_eigenvalue == pytest.approx(lowest, abs=1e-9)


def test_head_only_leaves_the_embedding_alone() -> None:
    stage = small_stage()
    before = stage.embedding_vector()
    report = train(stage, 1e-10, head_only=True)
    assert torch.equal(stage.embedding_vector(), before)
    gradient, _ = dense_gradient_and_hessian(stage)
    assert report.converged and float(stage.split(gradient)[1].norm()) <= 1.01e-10


def test_proximal_training_is_stationary_for_the_proximal_objective() -> None:
    stage = small_stage()
    towards = stage.embedding_vector() + 0.3
    report = train(stage, 1e-10, towards=towards, alpha=0.07)
    gradient, hessian = dense_gradient_and_hessian(stage, 0.07, towards)
    assert report.converged and float(gradient.norm()) <= 1.01e-10
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 0


def test_leaves_the_saddle_at_the_origin() -> None:
    # With all weights of embedding and head zero the gradient of a tanh network in them vanishes.
    stage = small_stage(l2=0.001)
    train(stage, 1e-10, head_only=True)
    start = torch.zeros_like(stage.vector())
    stage.load_vector(start)
    report = train(stage, 1e-9, epochs=0)
    assert report.escapes >= 1 and report.converged
    assert float(torch.linalg.eigvalsh(dense_gradient_and_hessian(stage)[1])[0]) > 0


def test_says_when_the_tolerance_was_not_reached() -> None:
    stage = small_stage()
    with pytest.warns(TrainingWarning, match="asked for 1.0e-12"):
        report = train(stage, 1e-12, epochs=0, lbfgs_evaluations=3, newton_steps=0)
    assert not report.converged and report.gradient_norm > 1e-12


def test_float32_reaches_its_own_precision() -> None:
    stage = small_stage().to(torch.float32)
    report = train(stage, 1e-5)
    assert report.converged and stage.dtype == torch.float32


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = small_stage(), small_stage()
    train(first, 1e-8, seed=3)
    train(second, 1e-8, seed=3)
    assert torch.equal(first.vector(), second.vector())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.1}, "towards and alpha belong together"),
        ({"towards": torch.zeros(24, dtype=F64)}, "towards and alpha belong together"),
        ({"towards": torch.zeros(24, dtype=F64), "alpha": 0.0}, "alpha must be positive"),
        (
            {"towards": torch.zeros(24, dtype=F64), "alpha": 0.1, "head_only": True},
            "no place in head_only",
        ),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(small_stage(), **arguments)


def test_a_kept_training_is_read_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_stage()
    report = train_kept(first, 1e-8, checkpoint=tmp_path, seed=3)
    assert report == train_kept(small_stage(), 1e-8, seed=3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", refuse)
    again = small_stage()
    assert train_kept(again, 1e-8, checkpoint=tmp_path, seed=3) == report
    assert torch.equal(again.vector(), first.vector())
    for other, settings in (
        (small_stage(), {"seed": 4}),
        (small_stage(), {"seed": 3, "head_only": True}),
        (small_stage(seed=1), {"seed": 3}),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            train_kept(other, 1e-8, checkpoint=tmp_path, **settings)
