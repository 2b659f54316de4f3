"""Rows of the two-stage benchmark that walk back through the trainings.

The exact row and its centre are held against central differences through both trainings of
torch.optim, at relative errors. Walks with a changed factor are held against the exact one where
the change must change nothing, and against written-out recursions.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from chains import convex_net, examples, randomised
from problems import F64, relative_error
from torch import Tensor, nn

from benchmarks.two_stage import budget, exact, smoothness
from benchmarks.two_stage.methods import METHODS
from benchmarks.two_stage.settings import SETTINGS, Data, Problem
from benchmarks.two_stage.walks import (
    InSegments,
    damped,
    gauss_newton,
    gradients_at,
    hessian_at,
    passing,
    scores,
    walk,
    without_cross,
    without_hessian,
)
from benchmarks.two_stage.walks import exact as plain
from msif_lib import Chain, Stage, cross_entropy
from msif_lib.curvature import Hessian
from msif_lib.links import Stopped, Unrolled
from msif_lib.optimisers import State
from msif_lib.training import SGD, AdamW, descend

WIDE = {"wide": AdamW(1e4, eps=1e6, weight_decay=0.0)}
OPTIMISERS = {"sgd": SGD(0.1, momentum=0.8), "adamw": AdamW(0.02, weight_decay=0.1)}
L2 = (0.03, 0.02)
DATA = Data(examples(11, 3, 0), examples(8, 2, 1), examples(4, 2, 2), examples(4, 2, 3))


def modules(linear: bool, frozen: bool = False) -> list[nn.Module]:
    """Embedding and both heads; with `linear`, outputs linear in all parameters together."""
    if linear:
        nets = [randomised(convex_net(classes), classes) for classes in (3, 2)]
        return [nets[0].embedding, nets[0].head, nets[1].head]
    made = [
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh()),
        nn.Linear(3, 3),
        nn.Linear(3, 2),
    ]
    return [randomised(module.to(F64), seed) for seed, module in enumerate(made)]


@functools.cache
def problem(kind: str, linear: bool = False, frozen: bool = False, loss=cross_entropy) -> Problem:
    embedding, *heads = modules(linear)
    first = Stage(embedding, heads[0], loss, DATA.pretrain, L2[0], check=False)
    path1 = descend(first, (OPTIMISERS | WIDE)[kind], 3, 4, 0, progress=False)
    tuned = copy.deepcopy(embedding).requires_grad_(not frozen)
    second = Stage(tuned, heads[1], loss, DATA.finetune, L2[1], check=False)
    path2 = descend(second, (OPTIMISERS | WIDE)[kind], 3, 3, 1, progress=False)
    chain = Chain([Unrolled(first, path1), Unrolled(second, path2)], progress=False)
    setting = replace(SETTINGS["digits-sgd"], frozen=frozen)
    return Problem(setting, 0, chain, DATA, (1.0, 1.0), 1.0)


def retrained(of: Problem, kind: str, weights: Tensor) -> Tensor:
    """Losses of the functionals after both trainings by torch.optim."""
    embedding, *heads = modules(False)
    for number, (head, data) in enumerate(zip(heads, (DATA.pretrain, DATA.finetune))):
        if number:
            embedding.requires_grad_(not of.setting.frozen)
        moved = [*embedding.parameters(), *head.parameters()]
        moved = [one for one in moved if one.requires_grad]
        if kind == "sgd":
            optimiser = torch.optim.SGD(moved, 0.1, momentum=0.8)
        else:
            optimiser = torch.optim.AdamW(moved, 0.02, weight_decay=0.1)
        for batch in of.chain.links[number].path.batches:
            losses = cross_entropy(head(embedding(data[0][batch])), data[1][batch])
            w = weights[batch] if number == 0 else torch.ones_like(losses)
            decay = sum(one.square().sum() for one in moved)
            optimiser.zero_grad()
            (w @ losses / len(batch) + L2[number] / 2 * decay).backward()
            optimiser.step()
    with torch.no_grad():
        return cross_entropy(heads[1](embedding(DATA.functionals[0])), DATA.functionals[1])


def differences(of: Problem, kind: str, at: float, step: float = 1e-4) -> Tensor:
    """dq/dw_i ``(m, T)`` by central differences."""
    found = []
    for example in range(of.size):
        ends = []
        for sign in (1, -1):
            weights = torch.full((of.size,), at, dtype=F64)
            weights[example] += sign * step
            ends.append(retrained(of, kind, weights))
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(found)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_exact_row_is_the_derivative_through_both_trainings(kind, frozen):
    of = problem(kind, frozen=frozen)
    assert relative_error(exact.unrolled(of), differences(of, kind, 1.0)) < 1e-6


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_centre_is_the_derivative_there(kind):
    of = problem(kind)
    truth = differences(of, kind, 0.7)
    assert relative_error(exact.at_the_centre(of, 0.3), truth) < 1e-6
    assert relative_error(exact.unrolled(of), truth) > 1e-2


def test_a_mean_over_subset_runs_is_one_over_the_trainings_that_keep_an_example():
    of = problem("sgd")
    generator = torch.Generator().manual_seed(1000)
    drawn: list[Tensor] = []
    while len(drawn) < 2 or not torch.stack(drawn).any(0).all():
        weights = torch.ones(of.size, dtype=F64)
        weights[torch.randperm(of.size, generator=generator)[:5]] = 0
        drawn.append(weights)
    step, found = 1e-4, torch.zeros(of.size, 4, dtype=F64)
    for weights in drawn:
        for example in weights.nonzero()[:, 0].tolist():
            along = step * torch.eye(of.size, dtype=F64)[example]
            ends = [retrained(of, "sgd", weights + sign * along) for sign in (1, -1)]
            found[example] += (ends[0] - ends[1]) / (2 * step)
    found /= torch.stack(drawn).sum(0)[:, None]
    assert len(drawn) > 2 and relative_error(exact.mean_of_runs(of, 5 / 11, 2), found) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_a_walk_without_a_change_is_the_library_s(kind, frozen):
    of = problem(kind, frozen=frozen)
    truth = exact.unrolled(of)
    assert relative_error(walk(of, plain, plain), truth) < 1e-10
    assert relative_error(walk(of, damped(0.0), damped(0.0)), truth) < 1e-10


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_gauss_newton_is_exact_where_outputs_are_linear(kind, frozen):
    of = problem(kind, linear=True, frozen=frozen)
    assert relative_error(walk(of, gauss_newton, gauss_newton), exact.unrolled(of)) < 1e-10
    bent = problem(kind, frozen=frozen)
    assert relative_error(walk(bent, gauss_newton, gauss_newton), exact.unrolled(bent)) > 1e-3


def linear_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss without curvature in outputs that are linear in the parameters."""
    return -outputs.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_hydra_is_exact_where_hessians_vanish(kind):
    of = problem(kind, linear=True, loss=linear_loss)
    assert relative_error(exact.hydra(of), exact.unrolled(of)) < 1e-10
    curved = problem(kind)
    assert relative_error(exact.hydra(curved), exact.unrolled(curved)) > 1e-2


def test_hydra_is_its_own_recursion():
    """Without a Hessian λ_v ← μ λ_v' and λ_x ← λ_x + l2 λ_g, through both trainings."""
    of = problem("sgd")
    rows = of.chain.test_gradients(of.data.functionals, True).T
    found = torch.zeros(of.size, len(rows), dtype=F64)
    for number in (1, 0):
        stage, path = of.chain.links[number].stage, of.chain.links[number].path
        velocity, states = torch.zeros_like(rows), states_of(stage, path)
        for step in reversed(range(len(path))):
            velocity = velocity - 0.1 * rows
            if number == 0:
                batch = path.batches[step]
                gradients = torch.cat(list(stage.per_example_gradients(states[step])))[batch]
                found[batch] += gradients @ velocity.T / len(batch)
            rows, velocity = rows + stage.l2 * velocity, 0.8 * velocity
        if number:
            embedding = rows[:, : stage.embedding_size]
            head = len(of.pretrain.vector()) - stage.embedding_size
            rows = torch.cat([embedding, torch.zeros(len(rows), head, dtype=F64)], 1)
    assert relative_error(exact.hydra(of), found) < 1e-10
    assert relative_error(walk(of, without_hessian, passing), found) < 1e-10


def states_of(stage: Stage, path) -> list[Tensor]:
    steps, state = path.steps(stage), path.steps(stage).begin()
    with steps.running():
        return [state.x, *(later.x for later in steps.after(state, len(path)))]


def test_one_segment_at_its_end_is_the_stopped_link():
    of = problem("adamw")
    first, second = of.chain.links
    for link in (first, second):
        cotangent = torch.randn(len(link.stage.vector()), 3, dtype=F64)
        flow = replace(Stopped.of(link.stage, link.path), tol=1e-10)
        truth = flow.pull_back(cotangent)
        derivatives = -torch.cat(list(link.stage.directional_derivatives(truth.u)))
        found = InSegments(link.stage, link.path, 1, "end", 1e-10).pull_back(cotangent)
        assert relative_error(found.scores, derivatives) < 1e-7
        assert relative_error(found.handed, truth.handed) < 1e-7


def test_segments_of_a_quadratic_are_one():
    """Where the Hessian is the same everywhere, flows of parts make up the flow of the whole.

    The gradients of the examples change along the way, so that it is what is handed back.
    """
    of = problem("sgd", linear=True, loss=squared)
    stage, path = of.finetune, of.chain.links[1].path
    cotangent = torch.randn(len(stage.vector()), 3, dtype=F64)
    handed = [
        InSegments(stage, path, count, at, 1e-10).pull_back(cotangent).handed
        for count, at in ((1, "end"), (3, "end"), (3, "mean"), (2, "line"))
    ]
    for other in handed[1:]:
        assert relative_error(other, handed[0]) < 1e-8


def test_on_a_line_are_only_the_two_ends_of_the_path():
    of = problem("sgd")
    link = of.chain.links[0]
    cotangent = torch.randn(len(link.stage.vector()), 2, dtype=F64)
    found = InSegments(link.stage, link.path, 1, "line", 1e-10).pull_back(cotangent)
    middle = link.stage.to()
    middle.load_vector((link.path.start + link.path.end) / 2)
    truth = Stopped(middle, link.path.time, tol=1e-10).pull_back(cotangent)
    derivatives = -torch.cat(list(middle.directional_derivatives(truth.u)))
    assert relative_error(found.scores, derivatives) < 1e-7
    known = {len(link.path): link.path.states[len(link.path)]}
    forgotten = replace(link.path, states=known)
    again = InSegments(link.stage, forgotten, 3, "line", 1e-10).pull_back(cotangent)
    whole = InSegments(link.stage, link.path, 3, "line", 1e-10).pull_back(cotangent)
    assert torch.equal(again.scores, whole.scores)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - nn.functional.one_hot(targets, outputs.shape[1])).square().sum(1)


def test_segments_keep_what_finetuning_holds():
    of = problem("sgd", frozen=True)
    link = of.chain.links[1]
    cotangent = torch.randn(len(link.stage.vector()), 2, dtype=F64)
    truth = replace(Stopped.of(link.stage, link.path), tol=1e-10).pull_back(cotangent)
    found = InSegments(link.stage, link.path, 1, "end", 1e-10).pull_back(cotangent)
    assert relative_error(found.handed, truth.handed) < 1e-7
    assert found.handed.abs().min() > 0


def test_hessians_at_the_end_are_exact_where_they_are_the_same_everywhere():
    of = problem("sgd", linear=True, loss=squared)
    changes = [hessian_at(link.path.end) for link in of.chain.links]
    assert relative_error(walk(of, *changes), exact.unrolled(of)) < 1e-10
    of = problem("sgd", linear=True, loss=linear_loss)
    changes = [gradients_at(link.path.end) for link in of.chain.links]
    assert relative_error(walk(of, *changes), exact.unrolled(of)) < 1e-10
    bent = problem("sgd")
    for made in (hessian_at, gradients_at):
        first = made(bent.chain.links[0].path.end)
        assert relative_error(walk(bent, first), exact.unrolled(bent)) > 1e-3


def test_a_hessian_without_its_cross_term_is_block_diagonal():
    of = problem("sgd")
    stage, path = of.pretrain, of.chain.links[0].path
    steps, split = path.steps(stage), stage.embedding_size
    rows = torch.randn(2, len(stage.vector()), dtype=F64)
    with steps.running():
        known, found = plain(steps, path.end, 0), without_cross(steps, path.end, 0)
        matrix = known(torch.eye(len(stage.vector()), dtype=F64))[0]
        matrix[:split, split:] = matrix[split:, :split] = 0
        assert relative_error(found(rows)[0], rows @ matrix) < 1e-10
        assert relative_error(found(rows)[2], known(rows)[2]) < 1e-10


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.group == "budget"])
def test_each_row_of_the_budget_differs_from_the_exact_one(name):
    of = problem("adamw" if "Adam" in name else "sgd")
    found, truth = METHODS[name].function(of), exact.unrolled(of)
    assert found.shape == truth.shape and found.isfinite().all()
    error = relative_error(found, truth)
    assert error < 1e-3 if name == "single precision" else error > 1e-3


def test_adam_s_scale_held_is_exact_where_it_hardly_moves():
    """With ε far above √v̂ the scale is ε, whatever the weights."""
    of = problem("wide")
    assert relative_error(budget.scale_held(of), exact.unrolled(of)) < 1e-5
    name = "both trainings: Adam's scale taken for constant"
    fitting = [kind for kind in ("sgd", "adamw", "wide") if METHODS[name].only(problem(kind))]
    assert fitting == ["adamw", "wide"]  # of SGD it is the exact row, which says nothing


def test_the_largest_eigenvalue():
    link = problem("sgd").chain.links[0]
    dense = Hessian(link.stage, link.stage.trained).dense()
    truth = float(torch.linalg.eigvalsh(dense).abs().max())
    assert budget.largest_eigenvalue(link, 300) == pytest.approx(truth, rel=1e-3)


def test_only_changed_links_are_replaced():
    of = problem("sgd")
    assert relative_error(scores(of), exact.unrolled(of)) < 1e-12


# --- smoothness ----------------------------------------------------------------------------------


def test_metasmoothness_is_that_of_three_trainings():
    of = problem("sgd")
    generator = torch.Generator().manual_seed(5)
    agreed, bent = [], []
    for _ in range(3):
        mask = torch.zeros(of.size, dtype=F64)
        mask[torch.randperm(of.size, generator=generator)[:4]] = 1
        at = [retrained(of, "sgd", 1 - part * mask) for part in (0, 0.5, 1)]
        first, second = at[1] - at[0], at[2] - at[1]
        same = torch.where(first * second > 0, 1.0, -1.0)
        agreed.append(float((same * (at[2] - at[0]).abs()).sum() / (at[2] - at[0]).abs().sum()))
        bent.append(float((second - first).norm() / (at[2] - at[0]).norm()))
    found = smoothness.metasmoothness(of, 4 / 11, 3, seed=5)
    assert found.losses == pytest.approx(sum(agreed) / 3, abs=1e-9)
    assert found.bend == pytest.approx(sum(bent) / 3, rel=1e-6)
    assert -1 <= found.finetuned <= 1 and found.pretrained != found.finetuned


def test_a_training_linear_in_the_weights_is_smooth():
    found = smoothness.metasmoothness(problem("sgd", linear=True, loss=linear_loss), 4 / 11, 3)
    assert found[:3] == pytest.approx((1, 1, 1), abs=1e-9)
    assert found.bend < 1e-9
    ahead, back = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0])
    assert smoothness.agreement(ahead, ahead) == 1
    assert smoothness.agreement(ahead, back) == 0


def test_an_epsilon_inside_the_root_is_smooth_at_zero():
    gradient, plain_adam = torch.tensor([0.0, 1e-9, 2.0], dtype=F64), AdamW(0.1, eps=1e-12)
    rooted, begun = (
        smoothness.RootedAdam(0.1, eps=1e-24),
        plain_adam.begin(torch.ones(3, dtype=F64)),
    )
    near = rooted.step(begun, gradient, 0.1, 0.0).x, plain_adam.step(begun, gradient, 0.1, 0.0).x
    assert relative_error(*near) < 1e-3
    wide = smoothness.RootedAdam(0.1, eps=4.0).step(begun, gradient, 0.1, 0.0)
    assert wide.x.tolist() == pytest.approx([1, 1 - 0.1 * 1e-9 / 2, 1 - 0.1 * 2 / 8**0.5])


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_a_step_of_adam_with_a_rooted_epsilon_goes_back_as_autograd_has_it(eps: float):
    adam, generator = smoothness.RootedAdam(0.1, eps=eps), torch.Generator().manual_seed(3)
    x, m, gradient = (torch.randn(5, dtype=F64, generator=generator) for _ in range(3))
    v = torch.rand(5, dtype=F64, generator=generator)
    leaves = [one.requires_grad_() for one in (x, m, v, gradient)]
    after = adam.step(State(x, (m, v), 4), gradient, 0.3, 0.2)
    rows = [torch.randn(1, 5, dtype=F64, generator=generator) for _ in range(3)]
    truth = torch.autograd.grad((after.x, *after.buffers), leaves, [row[0] for row in rows])
    with torch.no_grad():
        cotangent = State(rows[0], (rows[1], rows[2]), 5)
        given = State(x, (m, v), 4), gradient, 0.3, 0.2, cotangent
        lambda_g, before = adam.pull_back(*given)
    for found, wanted in zip((before.x, *before.buffers, lambda_g), truth, strict=True):
        assert relative_error(found[0], wanted) < 1e-12


def test_variants_of_one_training_go_equally_far():
    def far(setting) -> list[float]:
        sizes = (600, 300)
        return [
            recipe.epochs * -(-size // recipe.batch_size) * recipe.optimiser.lr
            for recipe, size in zip(setting.recipes, sizes)
        ]

    known = list(smoothness.variants())
    assert len({(what, to) for what, to, _ in known}) == len(known)
    for what, _, setting in known:
        if what in ("batch", "rate"):
            assert far(setting) == pytest.approx(far(SETTINGS["digits-sgd"]), rel=1e-9)


def test_a_sweep_reports_accuracy_beside_smoothness(monkeypatch):
    one = next(smoothness.variants())
    short = tuple(recipe._replace(epochs=2) for recipe in one[2].recipes)
    setting = replace(one[2], recipes=short)
    monkeypatch.setattr(smoothness, "variants", lambda: [("batch", "small", setting)])
    (row,) = smoothness.sweep((100,), (0.05,), 1)
    assert row["changed"] == "batch" and 0 < row["accuracy"] < 1
    assert set(row["0.05"]) == set(smoothness.Smoothness._fields)
