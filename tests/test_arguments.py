"""Arguments that are no numbers, or none in their range, are refused by name before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msif_lib import Chain, SingleStageInfluence, Stage, cross_entropy
from msif_lib.curvature import Hessian
from msif_lib.descent import Batches, Path, descend
from msif_lib.lanczos import functions_of
from msif_lib.links import Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.optimisers import SGD, AdamW
from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.solvers import ConjugateGradient, Dense, Identity, MinRes
from msif_lib.training import train

F64, NAN, INF = torch.float64, float("nan"), float("inf")
SGD_HERE = SGD(lr=0.1)


def stage_of(dtype: torch.dtype = F64, **settings: Any) -> Stage:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, dtype=dtype), torch.arange(8) % 2
    parts = nn.Linear(3, 3).to(dtype), nn.Linear(3, 2).to(dtype)
    return Stage(*parts, cross_entropy, (x, y), l2=0.1, **settings)


STAGE = stage_of()
TEST = STAGE.data
CHAIN = Chain([Optimum(STAGE, Dense(damping=1.0))], stationarity_tol=INF, progress=False)
OPERATOR = torch.eye(3, dtype=F64)


def trained(stage: Stage) -> Path:
    return descend(copy.deepcopy(stage), SGD_HERE, 1, 4, seed=0, progress=False)


def recorded(**changes: Any) -> object:
    stage = copy.deepcopy(STAGE)
    start = stage.vector()
    path = descend(stage, SGD_HERE, 1, 4, seed=0, progress=False)
    given = {"batches": path.batches, "optimiser": SGD_HERE, "progress": False} | changes
    return Path.record(stage, start, **given)


def descended(**changes: Any) -> object:
    given = {"epochs": 1, "batch_size": 4, "seed": 0, "progress": False} | changes
    return descend(copy.deepcopy(STAGE), SGD_HERE, **given)


def entries(value: float = 1.0, **options: Any) -> Tensor:
    return torch.full_like(STAGE.vector(), value, **options)


#: What takes one number: its name in messages, the call, and whether it is a whole one.
NUMBERS: dict[str, tuple[str, Callable[[Any], object], bool]] = {
    "damping of MinRes": ("damping", lambda v: MinRes(damping=v), False),
    "damping of Dense": ("damping", lambda v: Dense(damping=v), False),
    "damping of Identity": ("damping", lambda v: Identity(damping=v), False),
    "tol of MinRes": ("tol", lambda v: MinRes(tol=v), False),
    "tol of ConjugateGradient": ("tol", lambda v: ConjugateGradient(tol=v), False),
    "iterations": ("max_iterations", lambda v: MinRes(max_iterations=v), True),
    "memory": ("memory", lambda v: MinRes(memory=v), True),
    "tol of Lanczos": (
        "tol", lambda v: functions_of(OPERATOR, OPERATOR, [torch.exp], tol=v), False,
    ),
    "stationarity": (
        "stationarity_tol", lambda v: SingleStageInfluence(STAGE, stationarity_tol=v), False,
    ),
    "at_once": ("at_once", lambda v: CHAIN.self_influence(at_once=v), True),
    "stage": ("stage", lambda v: CHAIN.sensitivity(CHAIN.test_gradients(TEST), stage=v), True),
    "alpha": ("alpha", lambda v: Proximal(STAGE, v), False),
    "time": ("time", lambda v: Stopped(STAGE, v), False),
    "decay": ("decay", lambda v: Stopped(STAGE, 1.0, decay=v), False),
    "tol of Stopped": ("tol", lambda v: Stopped(STAGE, 1.0, tol=v), False),
    "iterations of Stopped": (
        "max_iterations", lambda v: Stopped(STAGE, 1.0, max_iterations=v), True,
    ),
    "lr of SGD": ("lr", SGD, False),
    "momentum": ("momentum", lambda v: SGD(0.1, momentum=v), False),
    "decoupled decay": ("decoupled_decay", lambda v: SGD(0.1, decoupled_decay=v), False),
    "clip": ("clip", lambda v: SGD(0.1, clip=v), False),
    "lr of AdamW": ("lr", AdamW, False),
    "beta": (r"betas\[0\]", lambda v: AdamW(betas=(v, 0.9)), False),
    "eps": ("eps", lambda v: AdamW(eps=v), False),
    "weight decay": ("weight_decay", lambda v: AdamW(weight_decay=v), False),
    "lr of a group": (
        r"groups\[0\]\['lr'\]", lambda v: SGD(0.1, groups=[{"params": "*", "lr": v}]), False,
    ),
    "epochs": ("epochs", lambda v: descended(epochs=v), True),
    "batch size": ("batch_size", lambda v: descended(batch_size=v), True),
    "seed": ("seed", lambda v: descended(seed=v), True),
    "noise seed": ("noise_seed", lambda v: descended(noise_seed=v), True),
    "rate of a step": (
        r"learning_rates\[1\]", lambda v: descended(learning_rates=[0.1, v]), False,
    ),
    "n": ("n", lambda v: Batches(v, 2, 0), True),
    "tol of train": ("tol", lambda v: train(STAGE, tol=v), False),
    "alpha of train": (
        "alpha", lambda v: train(STAGE, towards=STAGE.embedding_vector(), alpha=v), False,
    ),
    "epochs of train": ("epochs", lambda v: train(STAGE, epochs=v), True),
    "minibatch": ("minibatch", lambda v: train(STAGE, minibatch=v), True),
    "evaluations": ("lbfgs_evaluations", lambda v: train(STAGE, lbfgs_evaluations=v), True),
    "learning rate of train": ("learning_rate", lambda v: train(STAGE, learning_rate=v), False),
    "tol of retraining": ("tol", lambda v: RetrainingSettings(tol=v), False),
    "damping of retraining": ("damping", lambda v: RetrainingSettings(damping=v), False),
    "most evaluations": ("max_evaluations", lambda v: RetrainingSettings(max_evaluations=v), True),
    "models": ("models_at_once", lambda v: RetrainingSettings(models_at_once=v), True),
    "threads": ("threads", lambda v: RetrainingSettings(threads=v), True),
    "jobs": ("jobs", lambda v: RetrainingSettings(jobs=v), True),
    "fraction": (
        "fraction", lambda v: retrain_without(CHAIN, [[0]], TEST, fraction=v), False,
    ),
    "l2": ("l2", lambda v: stage_of_l2(v), False),
    "batch size of a stage": ("batch_size", lambda v: stage_of(batch_size=v), True),
    "memory budget": ("memory_budget", lambda v: stage_of(memory_budget=v), True),
}  # fmt: skip
# Where infinity, or a whole number below 0, has a meaning.
UNLIMITED, NEGATIVE = {"stationarity"}, {"jobs", "seed"}


def stage_of_l2(l2: Any) -> Stage:
    return Stage(nn.Linear(3, 3), nn.Linear(3, 2), cross_entropy, TEST, l2=l2)


@pytest.mark.parametrize("what", NUMBERS)
def test_what_is_no_number_is_refused_by_name(what):
    name, call, whole = NUMBERS[what]
    kind = "whole number" if whole else "number"
    for value in ("1e-6", True, [1], 1j, np.array([0.5])):
        with pytest.raises(TypeError, match=rf"^{name} must be a {kind}, not "):
            call(value)
    with pytest.raises(TypeError, match=r"not '1e-6' in quotes \(YAML takes 1e-6 for text"):
        call("1e-6")
    if what != "decay":
        with pytest.raises(TypeError, match=r"not a Tensor; take the number out by \.item\(\)"):
            call(torch.tensor(0.5))
    if whole:
        with pytest.raises(TypeError, match=rf"^{name} must be a whole number, not a float"):
            call(2.5)


@pytest.mark.parametrize("what", NUMBERS)
def test_what_is_out_of_range_is_refused_by_name(what):
    name, call, whole = NUMBERS[what]
    values: list[Any] = [] if what in NEGATIVE else [-1]
    if not whole:
        values += [NAN, -0.5] + [INF] * (what not in UNLIMITED)
    for value in values:
        said = rf"^{name} (must|-1 hands nothing on)"
        with pytest.raises(ValueError, match=said):
            call(value)


def test_numbers_of_numpy_are_numbers():
    assert MinRes(damping=np.float32(0.5), max_iterations=np.int64(3)).max_iterations == 3
    scores = CHAIN.self_influence(np.array([1, 2]), at_once=np.int32(1))
    assert torch.allclose(scores.values, CHAIN.self_influence([1, 2]).values)


# --- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "error", "said"),
    [
        ([0, 8], ValueError, r"indices names example 8, outside 0\.\.7"),
        ([-9], ValueError, "indices names example -9"),
        ([0.0, 1.0], TypeError, "indices must be a vector of whole numbers or a Boolean mask"),
        ([[0, 1]], TypeError, "indices must be a vector of whole numbers"),
        (["0"], TypeError, "indices must be a vector of whole numbers"),
        (3, TypeError, "indices must be a vector of whole numbers"),
        ([True, False], ValueError, r"indices is a mask of shape \(2,\), which does not fit 8 exa"),
    ],
)
def test_examples_are_named_by_whole_numbers(indices, error, said):
    with pytest.raises(error, match=said):
        CHAIN.self_influence(indices)


def test_examples_are_named_in_several_ways():
    every = CHAIN.self_influence().values
    mask = torch.arange(8) % 3 == 0
    assert torch.allclose(CHAIN.self_influence(mask).values, every[mask])
    assert torch.allclose(CHAIN.self_influence([-1, 2, 2]).values, every[[7, 2, 2]])
    assert CHAIN.self_influence([]).values.shape == (0,)
    for at_once in (1, 3, 100):
        assert torch.allclose(CHAIN.self_influence(at_once=at_once).values, every)


def cotangent(**options: Any) -> Tensor:
    return torch.ones(STAGE.parameters.size, 1, **({"dtype": F64} | options))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (cotangent(dtype=torch.float32), r"cotangent is torch\.float32 on cpu, the parameters are"),
        (cotangent()[:, :0], r"cotangent has no columns: its shape is \(20, 0\)"),
        (cotangent()[:, 0], r"cotangent must hold finite columns \(20, k\), not \(20,\)"),
        (cotangent() * NAN, "cotangent must hold finite columns"),
        ([1.0] * 20, "cotangent must hold finite columns .*, not list"),
    ],
)
def test_a_cotangent_is_one_of_the_model(given, said):
    path = trained(STAGE)
    walked = Chain([Unrolled(STAGE, path)], progress=False)
    for chain in (CHAIN, walked):
        with pytest.raises(ValueError, match=said):
            chain.pull_back(given)


def test_a_right_hand_side_has_columns():
    with pytest.raises(ValueError, match=r"no right-hand side to solve for in shape \(3, 0\)"):
        MinRes().solve(OPERATOR, OPERATOR[:, :0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": entries(dtype=torch.float32)}, r"scale is torch\.float32 on cpu"),
        ({"scale": 2.0}, "scale must hold 20 positive numbers"),
        ({"scale": entries(0.0)}, "scale must hold 20 positive numbers"),
        ({"scale": entries(NAN)}, "scale must hold 20 positive numbers"),
        ({"decay": entries(dtype=torch.float32)}, r"decay is torch\.float32 on cpu"),
        ({"decay": entries(-1.0)}, "decay must hold 20 zero or positive numbers"),
        ({"decay": entries()[:3]}, "decay must hold 20 zero or positive numbers"),
    ],
)
def test_what_a_flow_scales_and_decays_by_is_of_the_stage(settings, said):
    with pytest.raises(ValueError, match=said):
        Stopped(STAGE, 1.0, **settings)


def test_a_group_that_stands_still_has_no_flow():
    stage = copy.deepcopy(STAGE)
    still = SGD(0.1, groups=[{"params": "embedding.*", "lr": 0.0}])
    path = descend(stage, still, 1, 4, seed=0, progress=False)
    with pytest.raises(ValueError, match="groups: with a learning rate of 0 parameters do"):
        Stopped.of(stage, path)


def test_a_path_is_of_the_stages_own_precision():
    path, single = trained(STAGE), stage_of(torch.float32)
    for make in (Unrolled, Stopped.of):
        with pytest.raises(ValueError, match=r"path is of a training in torch\.float64 on cpu"):
            make(single, path)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"batches": [[0.5, 1.0]]}, TypeError, r"batches\[0\] must be a vector of whole numbers"),
        ({"batches": [[0, 1], [2, 99]]}, ValueError, r"batches\[1\] names example 99"),
        ({"batches": [[True, False]]}, ValueError, r"batches\[0\] is a mask of shape \(2,\)"),
        ({"batches": [[0, 1], []]}, ValueError, r"batches\[1\] must be a list of indices"),
        ({"learning_rates": [0.1]}, ValueError, "learning_rates must be 2 numbers"),
        ({"learning_rates": [0.1, "0.1"]}, TypeError, r"learning_rates\[1\] must be a number"),
    ],
)
def test_what_a_record_is_told_is_checked(changes, error, said):
    with pytest.raises(error, match=said):
        recorded(**changes)


def test_a_mask_in_a_record_is_the_examples_that_it_marks():
    stage = copy.deepcopy(STAGE)
    start = stage.vector()
    path = descend(stage, SGD_HERE, 1, 8, seed=0, progress=False)
    again = Path.record(stage, start, [torch.ones(8, dtype=torch.bool)], SGD_HERE, progress=False)
    assert sorted(path.batches[0].tolist()) == again.batches[0].tolist()


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: SGD(0.1, groups={"params": "*"}), TypeError, "groups must be a list of dicts"),
        (lambda: SGD(0.1, groups=["*"]), TypeError, "groups must be a list of dicts"),
        (lambda: AdamW(betas=0.9), ValueError, "betas must be two numbers"),
        (lambda: AdamW(betas=(0.9, "0.99")), TypeError, r"betas\[1\] must be a number, not '0"),
        (
            lambda: descend(STAGE, SGD(0.1, groups=[{"params": "hed.*"}]), 1, 4, 0),
            ValueError, r"groups\[0\]\[\"params\"\]: no parameter is called 'hed\.\*'",
        ),
        (lambda: train("stage"), TypeError, "train takes a Stage first, not a str"),
        (
            lambda: train(STAGE, towards=torch.ones(2, dtype=F64), alpha=1.0),
            ValueError, r"towards must be a vector \(12,\)",
        ),
        (
            lambda: train(STAGE, towards=torch.ones(12), alpha=1.0),
            ValueError, r"towards is torch\.float32 on cpu, the stage torch\.float64",
        ),
        (
            lambda: RetrainingSettings(first_hessian=[[1.0]]),
            TypeError, r"first_hessian must be a tensor \(p, p\)",
        ),
    ],
)  # fmt: skip
def test_other_settings(make, error, said):
    with pytest.raises(error, match=said):
        make()


# --- models that look at values ------------------------------------------------------------------


class Looking(nn.Module):
    """A linear layer that looks at a value, which no model can that vmap takes many of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if self.linear.weight.abs().max().item() < 1e9 else 1.0)


class Plain(Looking):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2.0


@pytest.mark.numeric
def test_models_that_look_at_values_are_retrained_one_by_one():
    changes = []
    for kind in (Looking, Plain):
        torch.manual_seed(0)
        stage = Stage.of(kind(), cross_entropy, TEST, l2=0.1)
        train(stage)
        chain = Chain([Optimum(stage)], progress=False)
        done = retrain_without(chain, [[0], [1, 2]], TEST, progress=False)
        assert done.converged.all()
        changes.append(done.change)
    assert torch.allclose(*changes, rtol=1e-6)


def test_a_hessian_and_a_frozen_link_are_made_from_good_settings():
    """What is refused above is refused for its value alone."""
    assert Hessian(STAGE).shape == (20, 20)
    assert replace(MinRes(tol=1e-3, max_iterations=7, memory=0), damping=0).damping == 0
    assert Frozen(STAGE).block == STAGE.own
    assert recorded().learning_rates == (0.1, 0.1)
