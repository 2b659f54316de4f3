"""The units of the loss: scores scale with them, and nothing is judged by its bare size."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msif_lib import Chain, SingleStageInfluence, Stage
from msif_lib.descent import Path, descend
from msif_lib.evaluation import pearson, slope, spearman
from msif_lib.influence import StationarityWarning
from msif_lib.links import Link, Optimum, Stopped, Unrolled
from msif_lib.optimisers import SGD
from msif_lib.retraining import minimise, retrain_without
from msif_lib.solvers import ConjugateGradient, Dense, Identity, MinRes
from msif_lib.training import TrainingWarning, train

F32, F64 = torch.float32, torch.float64
X = torch.randn(40, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
Y = (X[:, :1] * 2 - X[:, 1:2]).tanh()


def stage_in(unit: float, dtype: torch.dtype = F64, l2: float = 0.1) -> Stage:
    """Squared error of a small tanh network in units of which there are 1/`unit` in one."""
    torch.manual_seed(1)
    parts = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh()), nn.Linear(3, 1, bias=False)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return unit * (outputs - targets).square()[:, 0]

    data = X.to(dtype), Y.to(dtype)
    return Stage(*(part.to(dtype) for part in parts), loss, data, l2=l2 * unit, check=False)


def walked(stage: Stage, unit: float) -> Unrolled:
    start = stage.vector()
    path = descend(stage, SGD(lr=0.1 / unit), 2, 8, seed=0, progress=False)
    again = Path.record(stage, start, path.batches, path.optimiser, progress=False)
    return Unrolled(stage, again)


#: By name: the link, and the power of the unit that its scores have.
LINKS: dict[str, tuple[Callable[[Stage, float], Link], int]] = {
    "MINRES": (lambda stage, unit: Optimum(stage, MinRes(damping=unit)), 1),
    "MINRES, Gauss-Newton": (lambda stage, unit: Optimum(stage, MinRes(), "gauss-newton"), 1),
    "conjugate gradients": (
        lambda stage, unit: Optimum(stage, ConjugateGradient(), "gauss-newton"), 1,
    ),
    "eq. 16": (lambda stage, unit: Optimum(stage, ConjugateGradient(squared=True)), 1),
    "Cholesky": (lambda stage, unit: Optimum(stage, Dense()), 1),
    "identity": (lambda stage, unit: Optimum(stage, Identity()), 2),
    "stopped": (lambda stage, unit: Stopped(stage, time=3 / unit), 1),
    "unrolled": (walked, 1),
}  # fmt: skip


def scores(name: str, unit: float, dtype: torch.dtype) -> Tensor:
    """In units of 1."""
    make, power = LINKS[name]
    test = X[:3].to(dtype), Y[:3].to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # indefinite, and no optimum: not the matter here
        chain = Chain([make(stage_in(unit, dtype), unit)], progress=False)
        return chain.scores(test)[0].values.double() / unit**power


@pytest.mark.numeric
@pytest.mark.parametrize("exponent", [-12, -6, 6, 12])
@pytest.mark.parametrize("name", LINKS)
def test_scores_scale_with_the_units_of_the_loss(name, exponent):
    exact, found = scores(name, 1.0, F64), scores(name, 10.0**exponent, F64)
    assert (found - exact).norm() <= (1e-6 if name == "eq. 16" else 1e-8) * exact.norm()


@pytest.mark.numeric
@pytest.mark.parametrize("exponent", [-40, -36, -25, -20, -12, -6, 6, 12])
@pytest.mark.parametrize("name", LINKS)
def test_in_single_precision_scores_are_right_or_refused(name, exponent):
    """Squares of 1e-25 are zero there: nothing that is judged by them may pass for converged."""
    exact = scores(name, 1.0, F64)
    try:
        found = scores(name, 10.0**exponent, F32)
    except FloatingPointError as error:
        assert exponent <= -20
        assert any(word in str(error) for word in ("digits", "units", "zero", "finite", "lower lr"))
        return
    # Of the squared system a residual of 1e-4 says less.
    assert (found - exact).norm() <= (5e-2 if name == "eq. 16" else 1e-2) * exact.norm()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("exponent", [-30, -12, -6, 0, 6, 12])
def test_an_untrained_model_is_warned_of_in_all_units(exponent, dtype):
    stage = stage_in(10.0**exponent, dtype)
    with pytest.warns(StationarityWarning, match=r"of one example's \(above 1\.0e-04\)"):
        SingleStageInfluence(stage, progress=False)


@pytest.mark.numeric
@pytest.mark.parametrize("exponent", [-12, -6, 0, 6, 12])
def test_a_trained_model_is_not(exponent):
    stage = stage_in(10.0**exponent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = train(stage, tol=1e-7 * 10.0**exponent)
        SingleStageInfluence(stage, progress=False)
    assert report.converged


@pytest.mark.numeric
@pytest.mark.parametrize("exponent", [-12, -6, 0, 6, 12])
@pytest.mark.parametrize("width", [3, 40], ids=["eigenvalues", "ARPACK"])
def test_a_saddle_is_one_in_all_units(exponent, width):
    """At zero the gradient of this network vanishes, and its Hessian bends down."""
    unit = 10.0**exponent
    parts = nn.Sequential(nn.Linear(3, width, bias=False), nn.Tanh()), nn.Linear(width, 1, False)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return unit * (outputs - targets).square()[:, 0]

    stage = Stage(*(part.double() for part in parts), loss, (X, Y), l2=0.01 * unit)
    saddle = torch.zeros_like(stage.vector())
    stage.load_vector(saddle)
    with pytest.warns(TrainingWarning, match="Hessian eigenvalue of -"):
        stopped = train(stage, tol=1e-7 * unit, epochs=0, lbfgs_evaluations=1, newton_steps=0)
    assert not stopped.converged
    assert -10 < stopped.lowest_eigenvalue / unit < -0.1
    stage.load_vector(saddle)
    report = train(stage, tol=1e-7 * unit, epochs=0)
    assert report.converged
    assert report.escapes >= 1
    assert report.lowest_eigenvalue / unit > -1e-4


@pytest.mark.numeric
@pytest.mark.parametrize("exponent", [-12, 0, 12])
def test_minimising_takes_as_long_in_all_units(exponent):
    unit = 10.0**exponent

    def rosenbrock(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = unit * (100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    found = minimise(rosenbrock, torch.tensor([[-1.2, 1.0]], dtype=F64), tol=1e-7 * unit)
    assert found.converged.all()
    assert (found.x - 1).abs().max() <= 1e-6
    assert found.evaluations.max() <= 60


@pytest.mark.numeric
@pytest.mark.parametrize("exponent", [-12, -6, 0])
def test_a_retraining_is_no_less_exact_where_the_loss_is_small(exponent):
    """A tolerance above the gradients themselves would call what was not trained converged."""
    unit = 10.0**exponent
    stage = stage_in(unit)
    train(stage, tol=1e-9 * unit)
    chain = Chain([Optimum(stage)], progress=False)
    done = retrain_without(chain, [[0], [1]], (X[:3], Y[:3]), progress=False)
    assert done.converged.all()
    known = stage_in(1.0)
    train(known, tol=1e-9)
    exact = retrain_without(
        Chain([Optimum(known)], progress=False), [[0], [1]], (X[:3], Y[:3]), progress=False
    )
    assert (done.change / unit - exact.change).norm() <= 1e-4 * exact.change.norm()


def test_agreement_has_no_units():
    drawn = np.random.default_rng(0)
    x = drawn.standard_normal(20)
    y = x + 0.3 * drawn.standard_normal(20)
    for scale in (1e-200, 1e-30, 1e30, 1e200):
        for statistic in (pearson, spearman):
            found, known = statistic(scale * x, y), statistic(x, y)
            assert [found.value, found.low, found.high] == pytest.approx(
                [known.value, known.low, known.high]
            )
        assert slope(scale * x, scale * y).value == pytest.approx(slope(x, y).value)
    with pytest.raises(ValueError, match="constant"):
        pearson(1 + 1e-16 * np.arange(20) / 2, y)
