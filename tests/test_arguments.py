"""Arguments of another kind, or out of range, are refused by name before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msif_lib import (
    Chain,
    FixedEmbeddingInfluence,
    SingleStageInfluence,
    Stage,
    UpdatedEmbeddingInfluence,
    cross_entropy,
)
from msif_lib.curvature import AddDiagonal, CrossHessian, GaussNewton, Hessian, proximal_hessian
from msif_lib.descent import Batches, Path, descend
from msif_lib.evaluation import linear_datamodeling_score, mean_estimate, paired, pearson, spearman
from msif_lib.lanczos import functions_of
from msif_lib.links import Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.optimisers import SGD, AdamW
from msif_lib.retraining import RetrainingSettings, retrain_without
from msif_lib.solvers import ConjugateGradient, Dense, Identity, MinRes
from msif_lib.training import train, train_kept

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


# --- other kinds ---------------------------------------------------------------------------------

P, SCORES = STAGE.parameters.size, CHAIN.scores(TEST)[0]
PATH = trained(STAGE)
SPARSE, LIST = torch.ones(P, dtype=F64).to_sparse(), [1.0] * P
COPY = copy.deepcopy(STAGE)


def said(*rows: tuple[Any, type[Exception], str]) -> list[tuple[Any, type[Exception], str]]:
    return list(rows)


#: What is no vector of the stage.
NO_VECTORS = said(
    (LIST, TypeError, r"^{} must be a tensor \(20,\), not a list"),
    (np.ones(P), TypeError, r"^{} must be .*, not a ndarray; make it one by torch.as_tensor"),
    ("0", TypeError, r"^{} must be a tensor \(20,\), not a str"),
    (SPARSE, TypeError, r"^{} must be a tensor \(20,\), not a sparse or nested one"),
    (entries()[:3], ValueError, r"^{} must be of shape \(20,\), not \(3,\)"),
    (entries()[0], ValueError, r"^{} must be of shape \(20,\), not \(\)"),
    (entries()[:, None], ValueError, r"^{} must be of shape \(20,\), not \(20, 1\)"),
)
OTHER_DTYPE = said((entries(dtype=torch.float32), ValueError, r"^{} is torch\.float32 on cpu, the"))
NO_FLOATS = said((torch.ones(P).long(), TypeError, r"^{} must hold real floats, not torch\.int64"))
NO_FLAGS = said(
    ("False", TypeError, r"^{} must be True or False, not 'False' in quotes"),
    ("", TypeError, r"^{} must be True or False, not '' in quotes"),
    (1, TypeError, r"^{} must be True or False, not a int"),
    (None, TypeError, r"^{} must be True or False, not a NoneType"),
    (torch.tensor([True, False]), TypeError, r"^{} must be True or False, not a Tensor"),
)
NO_STAGES = said(
    (None, TypeError, r"(Stage|^takes a Stage first).*, not (a )?NoneType"),
    (nn.Linear(3, 2), TypeError, r"Stage.*, not (a )?Linear"),
)
NO_PATHS = said(
    (None, TypeError, r"^{} must be a Path, from descend or Path\.record, not NoneType"),
    (STAGE, TypeError, r"^{} must be a Path, from descend or Path\.record, not Stage"),
    (Path, TypeError, r"^{} must be a Path, from descend or Path\.record, not the class Path"),
)
NO_SOLVERS = said(
    (torch.ones(3), TypeError, r"^{} must be a solver of msif_lib\.solvers, as MinRes\(\)"),
    (MinRes, TypeError, r"^{} must be a solver of msif_lib\.solvers, as MinRes\(\), not <class"),
    ("", TypeError, r"^{} must be a solver of msif_lib\.solvers, as MinRes\(\), not ''"),
    (0, TypeError, r"^{} must be a solver of msif_lib\.solvers, as MinRes\(\), not 0"),
)
NO_OPTIMISERS = said(
    (None, TypeError, r"^{} must be an Optimiser, as SGD\(lr=0\.1\), not NoneType"),
    (SGD, TypeError, r"^{} must be an Optimiser, as SGD\(lr=0\.1\), not the class SGD"),
)
NO_PRODUCTS = said(
    (LIST, TypeError, r"^{} must be a tensor, not a list"),
    (None, TypeError, r"^{} must be a tensor, not a NoneType"),
    (np.ones(P), TypeError, r"^{} must be a tensor, not a ndarray; make it one"),
    (SPARSE, TypeError, r"^{} must be a tensor, not a sparse or nested one"),
)
NO_MATRICES = said(
    (None, TypeError, r"^{} must be a matrix with \.shape and @, .* not a NoneType"),
    (np.eye(P), TypeError, r"^{} must be a matrix with \.shape and @, .* not a ndarray"),
    (Hessian, TypeError, r"^{} must be a matrix with \.shape and @"),
    (nn.Linear(3, 2), TypeError, r"^{} must be a matrix .* not a Linear"),
)
NO_RIGHT_SIDES = said(
    (LIST, TypeError, r"^{} must be a tensor of right-hand sides, not a list"),
    (SPARSE, TypeError, r"^{} must be a tensor of right-hand sides, not a sparse"),
    (torch.ones(P).long(), TypeError, r"^{} must hold real floats, not torch\.int64"),
)
NO_PLACES = said(
    (5, TypeError, r"^{} must be a path, not a int"),
    (b"x", TypeError, r"^{} must be a path, not a bytes"),
    ("", ValueError, r"^{} is '', which is no path"),
    ("a\0b", ValueError, r"^{} is 'a\\x00b', which is no path"),
)
NO_INDICES = said(
    ("", TypeError, r"^{} must be a vector of whole numbers or a Boolean mask, not a str"),
    ({0: 1}, TypeError, r"^{} must be a vector of whole numbers or a Boolean mask, not a dict"),
    (torch.ones(0, 3), TypeError, r"^{} must be a vector of whole numbers .* of shape \(0, 3\)"),
)
NO_BLOCKS = said(
    (torch.tensor(1), ValueError, r"^block: there are parameters 0\.\.3, not tensor\(1\)"),
    (0, ValueError, r"^block: there are parameters 0\.\.3, not 0"),
    ([4], ValueError, r"^block: there are parameters 0\.\.3, not \[4\]"),
    ([None], ValueError, r"^block: there are parameters 0\.\.3, not \[None\]"),
    ({0: 1}, ValueError, r"^block: there are parameters 0\.\.3, not \{{0: 1\}}"),
)
NO_NUMBERS = said(
    (["a", "b", "c"], TypeError, r"^{} must hold numbers, not <U1"),
    ([1.0, [2.0], 3.0], TypeError, r"^{} must hold numbers"),
    ([1j, 2j, 3j], TypeError, r"^{} must hold numbers, not complex128"),
    (SPARSE, TypeError, r"^{} must be a tensor, not a sparse or nested one"),
)
NO_SEEDS = said(
    (10**30, ValueError, r"^{} must be from -2\*\*63 to 2\*\*64 - 1, not 10000"),
    (-(10**30), ValueError, r"^{} must be (from -2\*\*63 to|at least 0)"),
)

#: What takes one argument: its name in messages, the call, and what it is not.
KINDS: dict[str, tuple[str, Callable[[Any], object], list[tuple[Any, type[Exception], str]]]] = {
    "gradient": ("vector", STAGE.gradient, NO_VECTORS + OTHER_DTYPE),
    "objective": ("vector", STAGE.objective, NO_VECTORS + OTHER_DTYPE),
    "both": ("vector", STAGE.objective_and_gradient, NO_VECTORS + OTHER_DTYPE),
    "each": ("vector", STAGE.per_example_gradients, NO_VECTORS + OTHER_DTYPE),
    "load": ("vector", COPY.load_vector, NO_VECTORS + NO_FLOATS),
    "where": (
        "vector", lambda v: STAGE.directional_derivatives(entries()[:, None], v),
        NO_VECTORS + OTHER_DTYPE,
    ),
    "directions": (
        "directions", STAGE.directional_derivatives,
        said(
            (None, TypeError, r"^{} must be a tensor \(20, k\), not a NoneType"),
            (entries(), ValueError, r"^{} must be of shape \(20, k\), not \(20,\)"),
            (entries()[:3, None], ValueError, r"^{} must be of shape \(20, k\), not \(3, 1\)"),
            (entries()[:, None].float(), ValueError, r"^{} is torch\.float32 on cpu"),
        ),
    ),
    "split": (
        "vector", STAGE.split,
        said(
            (LIST, TypeError, r"^{} must be a tensor \(20, ...\), not a list"),
            (entries()[0], ValueError, r"^{} must be of shape \(20, ...\), not \(\)"),
        ),
    ),
    "dtype": (
        "dtype", STAGE.to,
        said(
            ("x", TypeError, r"^{} must be a torch\.dtype, not 'x'"),
            (torch.int64, ValueError, r"^{} must be one of real floats, not torch\.int64"),
        ),
    ),
    "device": (
        "device", lambda v: STAGE.to(device=v),
        said(
            (1.5, TypeError, r"^{} must be a torch\.device or its name, not 1\.5"),
            ("x", ValueError, r"^{} 'x' is not there"),
            ("cuda:99", ValueError, r"^{} 'cuda:99' is not there"),
        ),
    ),
    "trained": ("block", STAGE.with_trained, NO_BLOCKS),
    "section": ("indices", STAGE.section, NO_INDICES),
    "weights": (
        "weights", STAGE.with_weights,
        said((torch.ones(8).bool(), TypeError, r"^{} must hold one number .*, not truth values")),
    ),
    "patterns": (
        "patterns", STAGE.block,
        said((torch.tensor(1.0), TypeError, r"^{} must be a pattern of parameter names")),
    ),
    "check": (
        "check", lambda v: stage_of(check=v),
        said(
            (torch.ones(3), ValueError, r"^{} must be True, \"data\" or False, not tensor"),
            ("False", ValueError, r"^{} must be True, \"data\" or False, not 'False'"),
        ),
    ),
    "Hessian": ("stage", Hessian, NO_STAGES),
    "GaussNewton": ("stage", GaussNewton, NO_STAGES),
    "CrossHessian": ("stage", CrossHessian, NO_STAGES),
    "proximal": ("stage", lambda v: proximal_hessian(v, 1.0), NO_STAGES),
    "descend": ("stage", lambda v: descend(v, SGD_HERE, 1, 4, 0), NO_STAGES),
    "record": ("stage", lambda v: Path.record(v, entries(), [[0]], SGD_HERE), NO_STAGES),
    "train": ("stage", train, NO_STAGES),
    "train kept": ("stage", train_kept, NO_STAGES),
    "Optimum": ("stage", Optimum, NO_STAGES),
    "Frozen": ("stage", Frozen, NO_STAGES),
    "Stopped.of": ("stage", lambda v: Stopped.of(v, PATH), NO_STAGES),
    "Unrolled": ("stage", lambda v: Unrolled(v, PATH), NO_STAGES),
    "path of a flow": ("path", lambda v: Stopped.of(STAGE, v), NO_PATHS),
    "path": ("path", lambda v: Unrolled(STAGE, v), NO_PATHS),
    "solver": ("solver", lambda v: Optimum(STAGE, v), NO_SOLVERS),
    "solver of Proximal": ("solver", lambda v: Proximal(STAGE, 1.0, v), NO_SOLVERS),
    "second solver": (
        "finetune_solver",
        lambda v: FixedEmbeddingInfluence(STAGE, STAGE, finetune_solver=v), NO_SOLVERS,
    ),
    "second solver of case 2": (
        "finetune_solver",
        lambda v: UpdatedEmbeddingInfluence(STAGE, COPY, 1.0, finetune_solver=v), NO_SOLVERS,
    ),
    "curvature": (
        "curvature", lambda v: Optimum(STAGE, curvature=v),
        said((["hessian"], ValueError, r"^{} must be one of .*, not \['hessian'\]")),
    ),
    "block": ("block", lambda v: Hessian(STAGE, v), NO_BLOCKS),
    "memory of a Hessian": (
        "memory_budget", lambda v: Hessian(STAGE, memory_budget=v),
        said(
            (NAN, TypeError, r"^{} must be a whole number, not a float"),
            (-1, ValueError, r"^{} must be at least 0, not -1"),
            (torch.ones(3), TypeError, r"^{} must be a whole number, not a Tensor"),
        ),
    ),
    "product": ("x", lambda v: Hessian(STAGE) @ v, NO_PRODUCTS),
    "product with the cross term": ("x", lambda v: CrossHessian(STAGE) @ v, NO_PRODUCTS),
    "diagonal": (
        "diagonal", lambda v: AddDiagonal(Hessian(STAGE), v),
        NO_PRODUCTS + said((entries().float(), ValueError, r"^{} is torch\.float32, the operator")),
    ),
    "operator": ("operator", lambda v: AddDiagonal(v, entries()), NO_MATRICES),
    "matrix": ("operator", lambda v: MinRes().solve(v, entries()), NO_MATRICES),
    "matrix of Lanczos": (
        "operator", lambda v: functions_of(v, OPERATOR, [torch.exp]), NO_MATRICES,
    ),
    "right": ("b", lambda v: Dense().solve(Hessian(STAGE), v), NO_RIGHT_SIDES),
    "right of Lanczos": ("b", lambda v: functions_of(OPERATOR, v, [torch.exp]), NO_RIGHT_SIDES),
    "precondition": ("precondition", lambda v: MinRes(precondition=v), NO_FLAGS),
    "squared": ("squared", lambda v: ConjugateGradient(squared=v), NO_FLAGS),
    "nesterov": ("nesterov", lambda v: SGD(0.1, momentum=0.5, nesterov=v), NO_FLAGS),
    "progress": ("progress", lambda v: Chain([Optimum(STAGE)], progress=v), NO_FLAGS),
    "progress of descend": ("progress", lambda v: descended(progress=v), NO_FLAGS),
    "progress of a record": ("progress", lambda v: recorded(progress=v), NO_FLAGS),
    "progress of retraining": (
        "progress", lambda v: retrain_without(CHAIN, [[0]], TEST, progress=v), NO_FLAGS,
    ),
    "per_test": ("per_test", lambda v: CHAIN.scores(TEST, v), NO_FLAGS),
    "per_test of a gradient": ("per_test", lambda v: CHAIN.test_gradients(TEST, v), NO_FLAGS),
    "head_only": ("head_only", lambda v: train(COPY, head_only=v), NO_FLAGS),
    "renormalise": ("renormalise", lambda v: SCORES.group_effect([0], v), NO_FLAGS),
    "renormalise a retraining": (
        "renormalise", lambda v: retrain_without(CHAIN, [[0]], TEST, renormalise=v), NO_FLAGS,
    ),
    "links": (
        "links", Chain,
        said(
            (torch.tensor(1.0), TypeError, r"^{} must be a list of links, not a Tensor"),
            (5, TypeError, r"^{} must be a list of links, not a int"),
            ([STAGE], ValueError, r"^{} must be links of msif_lib\.links"),
        ),
    ),
    "out": ("out", lambda v: CHAIN.scores(TEST, out=v), NO_PLACES),
    "checkpoint": (
        "checkpoint", lambda v: retrain_without(CHAIN, [[0]], TEST, checkpoint=v), NO_PLACES,
    ),
    "indices": ("indices", CHAIN.self_influence, NO_INDICES),
    "group": ("indices", SCORES.group, NO_INDICES),
    "optimiser": ("optimiser", lambda v: descend(COPY, v, 1, 4, 0), NO_OPTIMISERS),
    "optimiser of a record": ("optimiser", lambda v: recorded(optimiser=v), NO_OPTIMISERS),
    "states": (
        "states", lambda v: recorded(states=v),
        said(
            (torch.ones(3), TypeError, r"^{} must be a Mapping by steps taken, not Tensor"),
            ([entries()], TypeError, r"^{} must be a Mapping by steps taken, not list"),
            ({0: 1}, TypeError, r"^{} must be a Mapping as a state_dict, or a vector, not int"),
        ),
    ),
    "batches": (
        "batches", lambda v: recorded(batches=v),
        said((torch.tensor(1), TypeError, r"^{} must be a list of the indices of each step")),
    ),
    "start": (
        "start", lambda v: Path.record(STAGE, v, [[0]], SGD_HERE),
        said(
            (None, TypeError, r"^{} must be a Mapping as a state_dict, or a vector, not NoneTy"),
            ({"embedding.weight": 1}, ValueError, r"^start or states lacks the parameter embed"),
        ),
    ),
    "rates": (
        "learning_rates", lambda v: descended(learning_rates=v),
        said(
            (0.1, TypeError, r"^{} must be a list of numbers, one a step, not a float"),
            ("0.1", TypeError, r"^{} must be a list of numbers, one a step, not a str"),
            (SPARSE, TypeError, r"^{} must be a tensor, not a sparse or nested one"),
        ),
    ),
    "augment": (
        "augment", lambda v: descended(augment=v, noise_seed=0),
        said((5, TypeError, r"^{} must be a function of the inputs, not int")),
    ),
    "epochs": (
        "epochs", lambda v: descended(epochs=v),
        said((10**30, ValueError, r"^{}: 10+ epochs of 8 examples are more than memory")),
    ),
    "seed of batches": ("seed", lambda v: Batches(8, 4, v), NO_SEEDS),
    "seed of train": ("seed", lambda v: train(COPY, seed=v), NO_SEEDS),
    "groups": (
        "groups", lambda v: SGD(0.1, groups=v),
        said((5, TypeError, r"^{} must be a list of dicts, each with 'params'")),
    ),
    "settings": (
        "settings", lambda v: retrain_without(CHAIN, [[0]], TEST, settings=v),
        said(({"tol": 1.0}, TypeError, r"^{} must be a RetrainingSettings, not dict")),
    ),
    "removals": (
        "removals", lambda v: retrain_without(CHAIN, v, TEST),
        said(
            (5, TypeError, r"^{} must be a list of sets of indices, not a int"),
            ({0: [1]}, TypeError, r"^{} must be a list of sets of indices, not a dict"),
        ),
    ),
    "cold start": (
        r"cold_start\[0\]",
        lambda v: retrain_without(CHAIN, [[0]], TEST, settings=RetrainingSettings(cold_start=v)),
        said(([None], TypeError, r"^{} must be a Stage, not NoneType")),
    ),
    "x": ("x", lambda v: pearson(v, [1.0, 2.0, 3.0]), NO_NUMBERS),
    "y": ("y", lambda v: spearman([1.0, 2.0, 3.0], v), NO_NUMBERS),
    "predicted": (
        "predicted", lambda v: linear_datamodeling_score(v, [1.0, 2.0, 3.0]), NO_NUMBERS,
    ),
    "values": ("values", mean_estimate, NO_NUMBERS),
    "after": ("after", lambda v: paired(v, [1.0, 2.0, 3.0]), NO_NUMBERS),
    "seed of the resampling": (
        "seed", lambda v: pearson([1.0, 2.0, 4.0], [1.0, 2.0, 3.0], seed=v),
        said(
            ("0", TypeError, r"^{} must be a whole number, not '0' in quotes"),
            (-1, ValueError, r"^{} must be at least 0, not -1"),
        ),
    ),
}  # fmt: skip
BAD = [
    pytest.param(call, value, error, words.format(name), id=f"{what}-{number}")
    for what, (name, call, refused) in KINDS.items()
    for number, (value, error, words) in enumerate(refused)
]


@pytest.mark.parametrize(("call", "value", "error", "words"), BAD)
def test_what_is_of_another_kind_is_refused_by_name(call, value, error, words):
    with pytest.raises(error, match=words):
        call(value)


def test_what_is_of_the_kind_is_taken():
    """The calls of the table, each with what it wants."""
    at, columns = entries(0.1), entries()[:, None]
    assert torch.equal(STAGE.gradient(at), STAGE.objective_and_gradient(at)[1])
    assert next(STAGE.directional_derivatives(columns, at)).shape == (8, 1)
    COPY.load_vector(STAGE.vector().float())
    assert STAGE.to(torch.float32, "cpu").dtype == torch.float32
    assert STAGE.with_trained([1, 0, 1]).trained == (0, 1)
    assert STAGE.block(iter(["head.*"])) == (2, 3)
    assert CHAIN.scores(TEST, np.bool_(True))[0].values.shape == (8, 8)
    assert pearson(torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1, 2, 3]).value == 1.0
    assert Batches(8, 10**30, 2**64 - 1).batch_size == 10**30
    assert next(iter(Batches(8, 10**30, -(2**63)))) is not None


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


class Twice(torch.autograd.Function):
    """x ↦ 2x, with a rule for vmap that is right or, as `Wrong`, is not."""

    factor = 1.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * slope

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return cls.apply(x) * cls.factor, in_dims[0]


class Wrong(Twice):
    factor = 1.5


class Applying(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.linear = function, nn.Linear(3, 2).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.linear(x))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("function", [Twice, Wrong])
def test_a_wrong_rule_for_vmap_is_not_used(function, dtype):
    data = TEST[0].to(dtype), TEST[1]
    stage = Stage.of(Applying(function, dtype), cross_entropy, data)
    assert stage.can.batching_rules is (function is Twice)
    mean = torch.cat(list(stage.per_example_gradients())).mean(0)
    assert torch.allclose(mean, stage.gradient(), rtol=1e-5, atol=1e-7)


@pytest.mark.numeric
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_saturated_losses_are_vectorised_all_the_same(dtype, scale):
    """Where nothing but rounding is left of a gradient it tells nothing of a rule."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        x = torch.randn(8, 3, dtype=dtype)
        fitted = Stage.of(model, cross_entropy, (x, model(x).argmax(1)), check="data")
        assert fitted.can.batching_rules
