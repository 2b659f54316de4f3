"""The benchmark's implicit rows and baselines, against dense matrices and whole trainings."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks.two_stage import baselines, implicit
from benchmarks.two_stage.methods import METHODS
from benchmarks.two_stage.settings import Data, Problem, Recipe, Setting
from benchmarks.two_stage.settings import problem as trained
from msif_lib import Chain, Stage, cross_entropy
from msif_lib.curvature import AddDiagonal, CrossHessian, Hessian
from msif_lib.ekfac import EKFAC
from msif_lib.links import Frozen, Optimum, Proximal, Unrolled
from msif_lib.solvers import Dense
from msif_lib.training import SGD, descend, train

ALPHA = 0.07
KINDS = ("frozen", "proximal", "descent")


def linear_in_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared errors: a quadratic in the parameters of a linear model."""
    return 0.5 * (outputs - targets).square().sum(1)


def drawn(classes: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    map_ = torch.randn(5, classes, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ map_ + noise).argmax(1)


@functools.cache
def tiny(kind: str, quadratic: bool = False) -> Problem:
    """Forty examples, then thirty; unequal sizes throughout, so that no two faults cancel."""
    data = Data(drawn(3, 40, 0), drawn(2, 30, 1), drawn(2, 6, 2), drawn(2, 10, 3))
    torch.manual_seed(0)
    width = 3 if quadratic else 4
    embedding: nn.Module = nn.Linear(5, width).double()
    if not quadratic:
        embedding = nn.Sequential(embedding, nn.Tanh())
    heads = [nn.Linear(4, 3).double(), nn.Linear(width, 2).double()]
    if quadratic:
        targets = nn.functional.one_hot(data.pretrain[1], 3).double()
        heads[0] = nn.Identity()  # type: ignore[call-overload]
        pretrain = Stage(embedding, heads[0], linear_in_outputs, (data.pretrain[0], targets), 0.05)
    else:
        pretrain = Stage(embedding, heads[0], cross_entropy, data.pretrain, 0.02)
    recipes = None
    if kind == "descent":
        recipe = Recipe(SGD(0.2, momentum=0.5), 4, 8, 0.02)
        recipes = recipe, recipe
        first = Unrolled(pretrain, descend(pretrain, *recipe[:3], 5, progress=False))
    else:
        train(pretrain, 1e-10, seed=0)
        first = Optimum(pretrain)  # type: ignore[assignment]
    tuned = copy.deepcopy(embedding)
    tuned.requires_grad_(kind != "frozen")
    finetune = Stage(tuned, heads[1], cross_entropy, data.finetune, 0.03)
    if recipes is not None:
        last: object = Unrolled(finetune, descend(finetune, *recipes[1][:3], 6, progress=False))
    elif kind == "frozen":
        train(finetune, 1e-10, seed=0)
        last = Frozen(finetune)
    else:
        handed = pretrain.split(pretrain.vector())[0]
        train(finetune, 1e-10, seed=0, towards=handed, alpha=ALPHA)
        last = Proximal(finetune, ALPHA)
    setting = Setting(
        "tiny", "", lambda seed: data, lambda: embedding, recipes, 1, kind == "frozen", ALPHA
    )
    chain = Chain([first, last], progress=False)  # type: ignore[list-item]
    return Problem(setting, 0, chain, data, (1.0, 1.0), 1.0)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def gradients(stage: Stage, at: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Per-example gradients ``(n, p)``, an example after the other, by autograd."""
    rows = []
    for inputs, target in zip(*pair):
        theta = at.clone().requires_grad_()
        loss = stage.losses_at(theta, inputs[None], target[None])[0]
        rows.append(torch.autograd.grad(loss, theta)[0])
    return torch.stack(rows)


def of_both(problem: Problem) -> tuple[Tensor, Tensor]:
    """∇_W ℓ_i ``(m, p_W)`` as pretrained, ∇_W q ``(T, p_W)`` as finetuned."""
    size = problem.pretrain.embedding_size
    pretrain, finetune = problem.pretrain, problem.finetune
    ours = gradients(pretrain, pretrain.vector(), problem.data.pretrain)
    tested = gradients(finetune, finetune.vector(), problem.data.functionals)
    return ours[:, :size], tested[:, :size]


# --- exact curvature -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solves that leave no error to be taken for one of the formula."""
    monkeypatch.setattr(implicit, "_TOL", 1e-11)
    monkeypatch.setattr(implicit, "_ITERATIONS", 500)


@pytest.mark.parametrize("kind", ["frozen", "proximal"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_case_is_the_chain_with_dense_solves(kind: str, damping: float) -> None:
    problem = tiny(kind)
    case = 1 if kind == "frozen" else 2
    found = implicit.case_scores(problem, case, lambda operator: damping)
    solver, finetune = Dense(damping=damping), problem.finetune
    last = Frozen(finetune, solver) if case == 1 else Proximal(finetune, ALPHA, solver)
    chain = Chain([Optimum(problem.pretrain, solver), last], progress=False)
    wanted = chain.scores(problem.data.functionals, per_test=True)[0].values / problem.size
    assert distance(found, wanted) < 1e-8
    name = f"case {case}, no damping"
    if damping:
        assert distance(METHODS[name].function(problem), wanted) > 1e-2
    else:
        assert distance(METHODS[name].function(problem), wanted) < 1e-8


def test_case_1_of_a_finetuning_that_moved_the_embedding_takes_each_stage_where_it_ended() -> None:
    problem = tiny("descent")
    pretrain, finetune = problem.pretrain, problem.finetune
    size, tested = finetune.embedding_size, implicit.functionals(problem)
    whole = Hessian(finetune).dense()
    back = tested[:size] - whole[:size, size:] @ torch.linalg.solve(
        whole[size:, size:], tested[size:]
    )
    head = back.new_zeros(pretrain.head_size, back.shape[1])
    u = torch.linalg.solve(Hessian(pretrain).dense(), torch.cat([back, head]))
    ours = gradients(pretrain, pretrain.vector(), problem.data.pretrain)
    assert distance(implicit.case_1(problem), -(ours @ u) / problem.size) < 1e-8


def test_off_an_optimum_alpha_comes_from_the_time_that_finetuning_took() -> None:
    path = tiny("descent").chain.links[1].path
    assert implicit.pull_of(tiny("descent")) == pytest.approx(0.5 / path.time)
    assert path.time == pytest.approx(len(path) * 0.2 / 0.5)
    assert implicit.pull_of(tiny("proximal")) == ALPHA


def losses_again(problem: Problem, weights: Tensor) -> Tensor:
    """Losses of the functionals after both stages went on to the optimum with other weights."""
    first, last = (copy.deepcopy(link.stage.model) for link in problem.chain.links)
    before, after = problem.pretrain, problem.finetune
    pretrain = Stage(
        first.embedding, first.head, before.loss, before.data, before.l2, weights=weights
    )
    assert train(pretrain, 1e-9, epochs=0).gradient_norm <= 1e-9
    finetune = Stage(last.embedding, last.head, after.loss, after.data, after.l2)
    handed = pretrain.split(pretrain.vector())[0]
    alpha = problem.setting.alpha
    assert train(finetune, 1e-9, epochs=0, towards=handed, alpha=alpha).gradient_norm <= 1e-9
    with torch.no_grad():
        return finetune.losses_at(finetune.vector(), *problem.data.functionals)


@pytest.mark.parametrize("name", ["tiny", "digits-optimum"])
def test_case_2_is_the_derivative_of_training_both_stages_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences along random weights; one problem is of digits, 2,693 parameters."""
    problem = tiny("proximal") if name == "tiny" else trained(name, 100)
    few = tuple(part[:5] for part in problem.data.functionals)
    problem = replace(problem, data=problem.data._replace(functionals=few))
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(problem.size, generator=generator, dtype=torch.float64)
    h = 1e-2
    wanted = (losses_again(problem, 1 + h * way) - losses_again(problem, 1 - h * way)) / (2 * h)
    monkeypatch.setattr(implicit, "_TOL", 1e-6)
    assert distance(way @ implicit.case_2(problem), wanted) < 1e-3
    for wrong in (implicit.case_1(problem), implicit.case_2_fixed(problem, 0.1)):
        assert distance(way @ wrong, wanted) > 0.02


def test_dampings_are_of_the_eigenvalues() -> None:
    operator = Hessian(tiny("descent").pretrain)
    values = torch.linalg.eigvalsh(operator.dense())
    assert implicit.fixed(0.3)(operator) == pytest.approx(0.3 * float(values[-1]), rel=0.02)
    assert implicit.automatic(operator) == pytest.approx(-2 * float(values[0]), rel=0.2)
    assert values[0] < 0


# --- EK-FAC, eigenpairs, groups ------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True])
def test_ekfac_rows_are_products_of_dense_inverses(cross: bool) -> None:
    problem, factor = tiny("descent"), 0.2
    pretrain, finetune = problem.pretrain, problem.finetune
    size, alpha = finetune.embedding_size, implicit.pull_of(problem)
    eye = torch.eye(len(finetune.vector()), dtype=torch.float64)
    matrix = EKFAC(finetune).dense() + torch.diag(2 * alpha * (torch.arange(len(eye)) < size))
    matrix = matrix + factor * torch.linalg.eigvalsh(matrix)[-1] * eye
    assert not matrix[:size, size:].any()  # so that the cross term is dropped
    tested = implicit.functionals(problem)
    of_shared = tested[:size]
    if cross:
        answer = torch.linalg.solve(matrix[size:, size:], tested[size:])
        of_shared = of_shared - CrossHessian(finetune) @ answer
    handed = 2 * alpha * torch.linalg.solve(matrix[:size, :size], of_shared)
    first = EKFAC(pretrain).dense()
    first = first + factor * torch.linalg.eigvalsh(first)[-1] * torch.eye(len(first))
    ours = gradients(pretrain, pretrain.vector(), problem.data.pretrain)
    u = torch.linalg.solve(first, implicit.on_embedding(problem, handed))
    row = implicit.ekfac_cross if cross else implicit.ekfac
    other = implicit.ekfac if cross else implicit.ekfac_cross
    wanted = -(ours @ u) / problem.size
    assert distance(row(problem, factor), wanted) < 1e-8
    assert distance(other(problem, factor), wanted) > 1e-2


def test_ekfac_as_preconditioner_changes_nothing() -> None:
    problem = tiny("descent")
    assert distance(implicit.by_ekfac(problem), implicit.case_2_automatic(problem)) < 1e-8


def test_all_eigenpairs_are_the_inverse_and_a_few_are_the_leading_ones() -> None:
    problem = tiny("proximal")
    exact = implicit.case_scores(problem, 2, implicit.none)
    every = max(len(problem.pretrain.vector()), len(problem.finetune.vector()))
    assert distance(implicit.arnoldi(problem, every), exact) < 1e-8
    operator = Hessian(problem.pretrain)
    values, vectors = torch.linalg.eigh(operator.dense())
    kept = values.abs().argsort(descending=True)[:7]
    b = torch.randn(len(values), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    some = vectors[:, kept]
    wanted = some @ ((some.T @ b) / values[kept, None])
    assert distance(implicit.Leading(7).solve(operator, b).x, wanted) < 1e-4
    assert distance(implicit.Leading(6).solve(operator, b).x, wanted) > 1e-2
    # A known diagonal is kept, where it is zero by the smallest of the pairs.
    diagonal = torch.zeros(len(values), dtype=torch.float64)
    diagonal[: len(values) // 2] = 0.3
    rest = torch.where(diagonal > 0, diagonal, values[kept].abs().min())
    wanted = torch.linalg.solve(some @ torch.diag(values[kept]) @ some.T + torch.diag(rest), b)
    pulled = AddDiagonal(operator, diagonal)
    assert distance(implicit.Leading(7).solve(pulled, b).x, wanted) < 1e-4


def test_second_order_groups_of_a_quadratic_are_its_taylor_polynomial() -> None:
    problem = tiny("proximal", quadratic=True)
    stage, m = problem.pretrain, problem.size
    generator = torch.Generator().manual_seed(3)
    left_out = torch.stack([torch.randperm(m, generator=generator) < m // 5 for _ in range(12)])
    last = implicit.links(problem, 2)[1]
    solved = implicit.Solved(last, implicit.none)
    handed = solved.pull_back(implicit.functionals(problem)).handed
    inputs = torch.cat([problem.data.pretrain[0], torch.ones(m, 1)], 1).double()

    def without(some: Tensor) -> Tensor:
        """How far the least-squares optimum moves, by the normal equations of what is left."""
        targets = stage.data[1]

        def optimum(weights: Tensor) -> Tensor:
            matrix = inputs.T @ (weights[:, None] * inputs) / m + 0.05 * torch.eye(6)
            found = torch.linalg.solve(matrix, inputs.T @ (weights[:, None] * targets) / m).T
            return torch.cat([found[:, :5].flatten(), found[:, 5]])

        return optimum(1 - some.double()) - optimum(torch.ones(m, dtype=torch.float64))

    exact = torch.stack([without(some) for some in left_out]) @ handed
    first, second = (
        implicit.group_changes(problem, left_out, implicit.none, order) for order in (1, 2)
    )
    scores = implicit.case_scores(problem, 2, implicit.none)
    assert distance(first, -(left_out.double() @ scores)) < 1e-8
    whole = Hessian(stage).dense()
    rows = gradients(stage, stage.vector(), stage.data)
    polynomial = []
    for some in left_out:
        group = Hessian(stage.with_weights(some.double())).dense() - 0.05 * torch.eye(len(whole))
        x = torch.linalg.solve(whole, rows[some].sum(0) / m)
        polynomial.append(x + torch.linalg.solve(whole, group @ x))
    assert distance(second, torch.stack(polynomial) @ handed) < 1e-8
    assert distance(second, exact) < 0.5 * distance(first, exact) < 0.3


# --- baselines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_rows_are_products_of_gradients_by_autograd(kind: str) -> None:
    problem = tiny(kind)
    ours, tested = of_both(problem)
    assert distance(baselines.gradient_dot(problem), -(ours @ tested.T)) < 1e-10
    cosine = nn.functional.cosine_similarity(ours[:, None], tested[None], dim=2)
    assert distance(baselines.gradient_cosine(problem), -cosine) < 1e-10


def test_tracin_adds_products_at_states_by_their_rates() -> None:
    problem = tiny("descent")
    stage, path = problem.pretrain, problem.chain.links[0].path
    _, tested = of_both(problem)
    total = torch.zeros(problem.size, len(tested), dtype=torch.float64)
    states = sorted(path.states)
    for begin, end in pairwise(states):
        rows = gradients(stage, path.states[begin].x, problem.data.pretrain)
        total -= sum(path.learning_rates[begin:end]) * (rows[:, : tested.shape[1]] @ tested.T)
    assert len(states) > 3
    assert distance(baselines.tracin(problem), total) < 1e-10


def test_trak_without_a_projection_is_its_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny("descent")
    stage, size = problem.pretrain, problem.pretrain.embedding_size
    margins, given = [], []
    for inputs, label in zip(*problem.data.pretrain):
        theta = stage.vector().requires_grad_()
        p = (-stage.losses_at(theta, inputs[None], label[None])[0]).exp()
        (row,) = torch.autograd.grad((p / (1 - p)).log(), theta)
        margins.append(row[:size])
        given.append(float(p.detach()))
    features = torch.stack(margins)
    _, tested = of_both(problem)
    monkeypatch.setattr(baselines, "projected", lambda columns, size, seed: columns)
    inverse = torch.linalg.inv(features.T @ features)
    wanted = (1 - torch.tensor(given))[:, None].double() * (features @ inverse @ tested.T)
    assert distance(baselines.trak(problem, 128), wanted) < 1e-5


def test_a_projection_keeps_products_on_average() -> None:
    columns = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = baselines.projected(columns, 40_000, 0)
    assert found.shape == (40_000, 4)
    assert distance(found.T @ found, columns.T @ columns) < 0.03
    assert distance(baselines.projected(columns, 40_000, 1), found) > 1


def test_features_alike_help() -> None:
    problem = tiny("descent")
    with torch.no_grad():
        ours, tested = (
            problem.pretrain.embedding(pair[0])
            for pair in (problem.data.pretrain, problem.data.functionals)
        )
    wanted = -nn.functional.cosine_similarity(ours[:, None], tested[None], dim=2)
    assert distance(baselines.embedding_similarity(problem), wanted) < 1e-12


def test_regression_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(4)
    left_out = torch.rand(128, 12, generator=generator) < 0.3
    slopes = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    changes = 0.7 - left_out.double() @ slopes
    found = baselines.ridge(left_out[:28], changes[:28], left_out[28:])
    assert distance(found, changes[28:]) < 5e-3


def words_of(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    words = torch.tensor(rows)
    return words, torch.zeros(len(words), words.shape[1], words.shape[1])


def test_words_in_common_help_and_padding_is_none() -> None:
    pretrain = words_of([[1, 9, 8, 2], [1, 7, 6, 0], [1, 9, 6, 5]]), torch.zeros(3, 4)
    tested = words_of([[9, 8, 1, 0], [5, 0, 0, 0]]), torch.zeros(2)
    data = Data(pretrain, tested, tested, tested)
    known = tiny("descent")
    problem = Problem(known.setting, 0, known.chain, data, (1.0, 1.0), 1.0)
    found = baselines.word_overlap(problem)
    assert found[0, 0] < found[2, 0] < found[1, 0] == 0
    assert found[2, 1] < 0 == found[0, 1] == found[1, 1]
    assert METHODS["BM25"].fits(problem, 0.5)
    assert not METHODS["BM25"].fits(known, 0.5)
    labels = torch.zeros(3, 4, dtype=torch.long)
    several = Problem(
        known.setting, 0, known.chain, data._replace(pretrain=(pretrain[0], labels)), (1, 1), 1
    )
    assert not METHODS["EK-FAC in both stages"].fits(several, 0.5)
    assert METHODS["EK-FAC in both stages"].fits(known, 0.5)


ROWS = [
    name
    for name, method in METHODS.items()
    if method.function.__module__ in (implicit.__name__, baselines.__name__) and name != "BM25"
]


@pytest.mark.parametrize("name", [name for name in ROWS if not METHODS[name].of_subsets])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_scores_each_example_of_each_functional(name: str, kind: str) -> None:
    problem, method = tiny(kind), METHODS[name]
    if method.only is not None and not method.only(problem):
        assert name == "TracIn"
        assert kind != "descent"
        return
    function = functools.partial(method.function, problem, *method.tried[:1])
    found = function()
    assert found.shape == (problem.size, problem.functionals)
    assert found.isfinite().all()
    assert distance(function(), found) < 1e-6
