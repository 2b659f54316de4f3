"""Chains of trainings against trainings done again: the scores of the examples of every stage."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from chains import (
    EMBEDDING,
    Fit,
    Fits,
    Recipe,
    convex_net,
    examples,
    mlp,
    randomised,
    weights_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, check, log_loss, relative_error
from torch import Tensor, nn
from torch.func import hessian, jacrev

from msif_lib import Chain, Stage
from msif_lib.influence import StationarityWarning
from msif_lib.links import Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.solvers import Dense, MinRes
from msif_lib.training import SGD, AdamW, Path, descend

pytestmark = pytest.mark.numeric

EXACT = 1e-9  # against what is differentiated in another way
STEP = 1e-3
CHOSEN = [0, 5, 10]
NETS = {"convex": (convex_net, {"embedding.weight": "embedding.weight"}), "mlp": (mlp, EMBEDDING)}
LAST = {"convex": 3, "mlp": 4}  # classes of a third stage
HEAD = {"convex": ["head.linear.weight", "head.linear.bias"], "mlp": ["head.weight", "head.bias"]}


def fit(family: str, stage: int, seed: int, **settings) -> Fit:
    """One stage: sizes, classes, weights and weight decay are its own."""
    net, shared = NETS[family]
    count, classes, l2 = [(19, 3, 0.05), (14, 2, 0.03), (11, LAST[family], 0.08)][stage]
    seed = 10 * seed + stage
    model = randomised(net(classes), seed)
    if stage:
        settings["shared"] = shared
    return Fit(model, examples(count, classes, seed), l2, weights_of(count, seed), **settings)


@functools.cache
def solved(family: str, kinds: tuple[str, ...], seed: int) -> Fits:
    """Trainings to optima, the first from anywhere."""
    settings = {
        "optimum": {}, "frozen": {"trained": HEAD[family]}, "proximal": {"alpha": 0.07},
    }  # fmt: skip
    fits = [fit(family, stage, seed, **settings[kind]) for stage, kind in enumerate(kinds)]
    return Fits(fits, examples(6, [3, 2, LAST[family]][len(kinds) - 1], 10 * seed + 9))


def scores(fits: Fits) -> list[Tensor]:
    """Through the public names, one column a test example."""
    chain = Chain(fits.links(), progress=False)
    return [one.values for one in chain.scores(fits.test, per_test=True)]


# --- optima --------------------------------------------------------------------------------------

SOLVED = [
    ("optimum",),
    ("optimum", "frozen"),
    ("optimum", "proximal"),
    ("optimum", "proximal", "frozen"),
    ("optimum", "proximal", "proximal"),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("kinds", SOLVED, ids=" to ".join)
def test_chains_of_optima_are_the_dense_formula(family, kinds, seed):
    fits = solved(family, kinds, seed)
    for values, exact in zip(scores(fits), fits.exact(), strict=True):
        check(values, exact, EXACT)


@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("kinds", SOLVED, ids=" to ".join)
def test_chains_of_optima_are_what_retraining_says(family, kinds):
    fits = solved(family, kinds, 0)
    for stage, values in enumerate(scores(fits)):
        check(values[CHOSEN], fits.differences(stage, CHOSEN, STEP))


def test_a_head_trained_on_a_frozen_embedding_hands_nothing_of_its_own_on():
    fits = solved("mlp", ("optimum", "frozen", "proximal"), 0)
    given = Chain(fits.links(MinRes(tol=1e-12)), progress=False).scores(fits.test, per_test=True)
    check(given[0].values, fits.exact()[0], EXACT)
    assert (given[1].values == 0).all()
    assert fits.differences(1, CHOSEN, STEP).abs().max() < 1e-10
    check(given[2].values, fits.exact()[2], EXACT)


@pytest.mark.parametrize(
    "variant", ["2 alpha dropped", "cross term dropped", "the first stage's N"]
)
@pytest.mark.parametrize("family", NETS)
def test_wrong_chains_of_optima_are_refused(family, variant):
    fits = solved(family, ("optimum", "proximal", "frozen"), 0)
    wrong, refused = fits.exact(variant), 0
    for stage, values in enumerate(scores(fits)):
        exact = fits.differences(stage, CHOSEN, STEP)
        try:
            check(wrong[stage][CHOSEN], exact)
        except AssertionError:
            refused += 1
            with pytest.raises(AssertionError, match="relative error"):
                check(values, wrong[stage], EXACT)
    # What is wrong in a later stage does not touch its own examples, only those before.
    assert refused == (1 if variant == "2 alpha dropped" else 2)


# --- recorded trainings --------------------------------------------------------------------------


def sgd(l2: float = 0.0, **settings) -> Recipe:
    """torch.optim.SGD, with its coupled weight decay as the stage's l2."""
    torchs = dict(settings, weight_decay=l2)
    return Recipe(
        lambda parameters: torch.optim.SGD(parameters, **torchs), SGD(**settings), coupled=bool(l2)
    )


def adam(coupled: float = 0.0, **settings) -> Recipe:
    """torch.optim.AdamW, or torch.optim.Adam with its coupled weight decay as the stage's l2."""
    if coupled:
        ours = AdamW(weight_decay=0.0, **settings)
        make = functools.partial(torch.optim.Adam, weight_decay=coupled, **settings)
    else:
        ours, make = AdamW(**settings), functools.partial(torch.optim.AdamW, **settings)
    return Recipe(make, ours, coupled=bool(coupled))


RECIPES = {
    "sgd": sgd(lr=0.3),
    "momentum": sgd(lr=0.1, momentum=0.8),
    "momentum, coupled decay": sgd(l2=0.05, lr=0.1, momentum=0.8),
    "nesterov": sgd(lr=0.1, momentum=0.7, nesterov=True),
    "adamw": adam(lr=0.03, betas=(0.8, 0.95), weight_decay=0.3),
    "adam, coupled decay": adam(coupled=0.05, lr=0.03, betas=(0.8, 0.95)),
}


def stepped(family: str, first: str | None, second: str | None, seed: int = 0) -> Fits:
    """Two trainings, each by a recipe, with cosine rates and odd last batches, or to an optimum."""
    fits = []
    for stage, name in enumerate((first, second)):
        settings: dict = {} if stage == 0 or name is not None else {"trained": HEAD[family]}
        if name is not None:
            # 19 = 4 · 4 + 3 and 14 = 2 · 5 + 4 examples.
            size, epochs = [(4, 2), (5, 3)][stage]
            settings["recipe"] = replace(
                RECIPES[name], batch_size=size, epochs=epochs, seed=stage, cosine=True
            )
        fits.append(fit(family, stage, seed, **settings))
        if name is not None and RECIPES[name].coupled:
            fits[-1].l2 = 0.05
    return Fits(fits, examples(6, 2, 10 * seed + 9))


STEPPED = [
    *((name, "momentum") for name in RECIPES),
    *((None, name) for name in RECIPES if name != "momentum"),
    ("nesterov", None),
    ("adamw", None),
    ("adam, coupled decay", "adamw"),
]


def named(pair: tuple[str | None, str | None]) -> str:
    first, second = pair
    return f"{first or 'optimum'} to {second or 'frozen'}"


@pytest.mark.parametrize("pair", STEPPED, ids=named)
def test_chains_through_trainings_by_torch_are_what_training_again_says(pair):
    fits = stepped("mlp", *pair)
    given, exact = scores(fits), fits.exact()
    for stage, values in enumerate(given):
        check(values[CHOSEN], fits.differences(stage, CHOSEN, STEP))
        check(values, exact[stage], EXACT)


@pytest.mark.parametrize("pair", [("momentum", "adamw"), (None, "nesterov"), ("adamw", None)])
def test_another_seed_and_another_model(pair):
    fits = stepped("convex", *pair, seed=1)
    for values, exact in zip(scores(fits), fits.exact(), strict=True):
        check(values, exact, EXACT)


def test_three_stages_of_which_the_middle_one_was_stopped_early():
    tuned = fit("mlp", 1, 4, recipe=replace(RECIPES["adamw"], cosine=True))
    fits = Fits(
        [fit("mlp", 0, 4), tuned, fit("mlp", 2, 4, trained=HEAD["mlp"])], examples(6, 4, 49)
    )
    exact = fits.exact()
    for stage, values in enumerate(scores(fits)):
        check(values, exact[stage], EXACT)
        check(values[CHOSEN[:2]], fits.differences(stage, CHOSEN[:2], STEP))


def test_only_the_finetuning_s_path_is_kept():
    """Stopped, then Unrolled: the walk hands λ over, and a bounded function of H takes it."""
    fits = stepped("mlp", "momentum", "adamw")
    first, second = fits.links()
    time = first.path.time
    assert time == pytest.approx(sum(fits.fits[0].rates) / (1 - 0.8))
    links = [Stopped(first.stage, time, tol=1e-13), second]
    found = Chain(links, progress=False).scores(fits.test, per_test=True)
    check(found[1].values, fits.exact()[1], EXACT)
    one, x, c = fits.fits[0], fits.trained[0], fits.handed[0]
    values, vectors = torch.linalg.eigh(hessian(one.objective)(x, c, one.weights))
    positive = torch.where(values > 0, values, 1.0)
    phi = torch.where(values > 0, -torch.expm1(-time * positive) / positive, time)
    slopes = jacrev(lambda x: one.losses(one.named(x, c)))(x)
    chain = Chain([first, second], progress=False)
    handed = chain.sensitivity(chain.test_gradients(fits.test, per_test=True))
    back = torch.cat([handed, torch.zeros(len(x) - len(handed), 6, dtype=F64)])
    check(found[0].values, -slopes @ (vectors * phi @ (vectors.T @ back)), EXACT)


def test_finetuning_in_place_after_a_recorded_training():
    """The first stage's modules are where the second ended; its path says where they were."""
    found = []
    for copied in (False, True):
        embedding = randomised(mlp(3), 1).embedding
        first = Stage(embedding, randomised(mlp(3), 2).head, log_loss, examples(19, 3, 1), l2=0.05)
        settings = {"batch_size": 4, "progress": False}
        path1 = descend(first, SGD(lr=0.1, momentum=0.8), epochs=2, seed=1, **settings)
        used = copy.deepcopy(embedding) if copied else embedding
        second = Stage(used, randomised(mlp(2), 3).head, log_loss, examples(14, 2, 2), l2=0.03)
        path2 = descend(second, AdamW(lr=0.03), epochs=2, seed=2, **settings)
        links = [Unrolled(first, path1), Unrolled(second, path2)]
        found.append(Chain(links, progress=False).scores(examples(6, 2, 3), per_test=True))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.values, other.values)
        assert one.values.abs().min() > 0


WRONG = {
    "momentum dropped": ("momentum", "momentum", 2),
    "buffers carried over a stage's end": ("momentum", "momentum", 1),
    "the head's cotangent handed back": ("nesterov", "momentum", 1),
    "B for N": ("sgd", "sgd", 2),
    "decay forgotten": ("adamw", "adamw", 2),
    "bias correction dropped": ("adamw", "adamw", 2),
    "the first stage's N": ("momentum", "adamw", 1),
    "cross term dropped": ("momentum", None, 1),
}


@pytest.mark.parametrize("variant", WRONG)
def test_wrong_walks_are_refused(variant):
    first, second, expected = WRONG[variant]
    fits = stepped("mlp", first, second)
    wrong, given, refused = fits.exact(variant), scores(fits), 0
    for stage, values in enumerate(given):
        try:
            check(values, wrong[stage])
        except AssertionError:
            refused += 1
            with pytest.raises(AssertionError, match="relative error"):
                check(wrong[stage][CHOSEN[:1]], fits.differences(stage, CHOSEN[:1], STEP))
    assert refused == expected


# --- other examples than a stage's own -----------------------------------------------------------


def enlarged(fits: Fits, stage: int, others: tuple[Tensor, Tensor]) -> Fits:
    """The same chain with further examples of weight 0 in a stage, its objective unchanged."""
    copies = []
    for number, one in enumerate(fits.fits):
        data, weights = one.data, one.weights
        if number == stage:
            data = tuple(torch.cat([own, more]) for own, more in zip(one.data, others))
            grown = len(data[1]) / one.size
            weights = torch.cat([one.weights * grown, torch.zeros(len(others[1]), dtype=F64)])
        copies.append(
            Fit(
                one.model, data, one.l2, weights, shared=one.shared, trained=one.trained,
                alpha=one.alpha,
            )
        )  # fmt: skip
    return Fits(copies, fits.test)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_scores_of_other_examples_are_those_of_members_of_weight_0(stage):
    fits = solved("mlp", ("optimum", "proximal", "frozen"), 0)
    others = examples(4, [3, 2, 4][stage], 77)
    chain = Chain(fits.links(), progress=False)
    given = chain.scores(fits.test, per_test=True, of={stage: others})
    more = enlarged(fits, stage, others)
    size = fits.fits[stage].size
    chosen = [size, size + 3]
    check(given[stage].values[[0, 3]], more.differences(stage, chosen, STEP))
    for number, values in enumerate(scores(fits)):
        if number != stage:
            check(given[number].values, values, EXACT)
    assert not given[stage].of_training_set
    if stage == 0:
        bare = chain.scores(fits.test, per_test=True, of=others)
        assert torch.equal(bare[0].values, given[0].values)


@pytest.mark.parametrize("stage", [0, 1])
def test_other_examples_of_a_recorded_training_are_in_every_step_s_objective(stage):
    fits = stepped("mlp", "momentum", "adamw")
    others = examples(3, [3, 2][stage], 77)
    chain = Chain(fits.links(), progress=False)
    given = chain.scores(fits.test, per_test=True, of={stage: others})[stage].values
    rows, own = [], fits.fits[stage]
    for example in range(3):
        losses = {}
        for k in (-2, -1, 1, 2):
            own.outside = others, k * STEP * torch.eye(3, dtype=F64)[example]
            losses[k] = fits.retrained(stage, own.weights)
        own.outside = None
        rows.append((losses[-2] - 8 * losses[-1] + 8 * losses[1] - losses[2]) / (12 * STEP))
    check(given, torch.stack(rows))


def test_the_scores_of_an_unknown_stage_are_asked_for_in_vain():
    fits = stepped("mlp", "momentum", None)
    chain = Chain(fits.links(), progress=False)
    for number in (2, -1):
        with pytest.raises(
            ValueError, match=rf"of= names stages by their numbers, 0..1, not .*{number}"
        ):
            chain.scores(fits.test, of={number: examples(2, 3, 0)})
    with pytest.raises(ValueError, match="of: "):
        chain.scores(fits.test, of={1: (torch.zeros(2, 5, dtype=F64), torch.tensor([0, 9]))})


# --- what else a chain answers -------------------------------------------------------------------

EITHER = [("optimum", "proximal", "frozen"), ("momentum", "adamw")]


def either(kind: tuple[str, ...]) -> Fits:
    return stepped("mlp", *kind) if len(kind) == 2 else solved("mlp", kind, 0)


@pytest.mark.parametrize("kind", EITHER, ids=" to ".join)
def test_columns_are_walks_of_their_own_and_the_sum_is_that_of_the_columns(kind):
    fits = either(kind)
    chain = Chain(fits.links(), progress=False)
    together = chain.scores(fits.test, per_test=True)
    gradients = chain.test_gradients(fits.test, per_test=True)
    summed = chain.scores(fits.test)
    pulled = chain.pull_back(gradients)
    alone = chain.pull_back(gradients[:, 2:3])
    for stage, one in enumerate(together):
        assert one.values.shape == (fits.fits[stage].size, 6)
        assert summed[stage].values.shape == (fits.fits[stage].size,)
        check(summed[stage].values, one.values.sum(1), EXACT)
        check(pulled[stage].values, one.values, EXACT)
        check(alone[stage].values[:, 0], one.values[:, 2], EXACT)


@pytest.mark.parametrize("kind", EITHER, ids=" to ".join)
def test_sensitivity_is_the_derivative_by_what_was_handed_over(kind):
    fits = either(kind)
    chain = Chain(fits.links(), progress=False)
    gradients = chain.test_gradients(fits.test, per_test=True)
    for stage in range(len(fits.fits) - 1):
        found = chain.sensitivity(gradients, stage)
        handed = fits.handed[stage + 1]
        for entry in (0, len(handed) - 1):
            losses = {}
            for k in (-2, -1, 1, 2):
                fits.handed[stage + 1] = (
                    handed + k * STEP * torch.eye(len(handed), dtype=F64)[entry]
                )
                losses[k] = fits.retrained(stage + 1, fits.fits[stage + 1].weights)
            fits.handed[stage + 1] = handed
            slope = (losses[-2] - 8 * losses[-1] + 8 * losses[1] - losses[2]) / (12 * STEP)
            check(found[entry], slope)
    for stage in (len(fits.fits) - 1, -1):
        with pytest.raises(ValueError, match="hands nothing on"):
            chain.sensitivity(gradients, stage)
    for wrong in (gradients[:-1], gradients[:, 0], gradients * math.nan):
        for ask in (chain.sensitivity, chain.pull_back):
            with pytest.raises(ValueError, match="cotangent must hold finite columns"):
                ask(wrong)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_self_influence_through_the_steps(name):
    one = fit("mlp", 0, 3, recipe=replace(RECIPES[name], cosine=True))
    fits = Fits([one], one.data)
    chain = Chain(fits.links(), progress=False)
    exact = fits.exact()[0].diagonal()
    check(chain.self_influence(at_once=4).values, exact, EXACT)
    check(chain.self_influence([3, 0]).values, exact[[3, 0]], EXACT)
    for index in (0, 5):
        check(exact[index : index + 1], fits.differences(0, [index], STEP)[0, index : index + 1])
    with pytest.raises(ValueError, match="of one training"):
        Chain(stepped("mlp", name, None).links(), progress=False).self_influence()


def test_groups_and_effects_of_any_stage_with_weights():
    fits = either(EITHER[0])
    for stage, one in enumerate(Chain(fits.links(), progress=False).scores(fits.test)):
        weights, size = fits.fits[stage].weights, fits.fits[stage].size
        check(one.removal_effect, -weights * one.values / size, 1e-14)
        assert torch.allclose(one.group([0, 3]), one.values[[0, 3]].sum(), rtol=1e-14)
        assert torch.allclose(
            one.group_effect([0, 3]), one.removal_effect[[0, 3]].sum(), rtol=1e-14
        )
        with pytest.raises(ValueError, match="have weights"):
            _ = one.removal_effect_renormalised


def test_reports_stand_with_their_stage_and_hold_no_nan():
    fits = solved("mlp", ("optimum", "proximal", "frozen"), 0)
    chain = Chain(fits.links(MinRes()), progress=False)
    given = chain.scores(fits.test, per_test=True)
    for one in given:
        (report,) = one.solves
        assert len(report.residuals) == 6
        assert all(math.isfinite(r) for r in (*report.residuals, *report.history))
        assert report.converged
        assert set(one.gradient_norms) == {"stage 0", "stage 1", "stage 2"}
    through = stepped("mlp", "momentum", None)
    first, second = Chain(through.links(), progress=False).scores(through.test)
    assert not first.solves
    assert len(second.solves) == 1
    assert set(first.gradient_norms) == {"finetuning"}


def test_self_influence_takes_a_removed_example_at_its_weight():
    fits = solved("mlp", ("optimum",), 0)
    one = fits.fits[0]
    own = Chain(fits.links(), progress=False).self_influence()
    check(own.removal_effect, -one.weights * own.values / one.size, 1e-14)
    chosen = [5, 0, 7]
    some = Chain(fits.links(), progress=False).self_influence(chosen)
    check(some.removal_effect, own.removal_effect[chosen], 1e-12)
    with pytest.raises(AssertionError, match="relative error"):  # wrong: the weight left out
        check(own.removal_effect, -own.values / one.size, 1e-2)
    # The change of an example's loss as its own weight goes, and its weight with that.
    x, y = one.data
    itself = Fits([one], (x[chosen], y[chosen]))
    for place, example in enumerate(chosen):
        slope = itself.differences(0, [example], STEP)[0, place]
        check(some.values[place : place + 1], slope[None])
        weights = one.weights.clone()
        weights[example] *= 1 - 1e-4
        before = itself.test_losses(itself.trained[0], itself.handed[0])[place]
        change = (itself.retrained(0, weights)[place] - before) / 1e-4
        check(some.removal_effect[place : place + 1], change[None], 1e-3)


# --- optima that moved, and how far from one a stage is ------------------------------------------


@pytest.mark.filterwarnings("ignore::msif_lib.solvers.SolverWarning")
@pytest.mark.parametrize("kind", ["optimum", "frozen", "proximal", "stopped"])
def test_parameters_moved_after_a_solve_have_a_curvature_of_their_own(kind):
    second = {"optimum": (), "stopped": ("proximal",)}.get(kind, (kind,))
    fits = solved("mlp", ("optimum", *second), 0)
    links = fits.links()
    moved = links[-1].stage
    if kind == "stopped":
        links[-1] = Stopped(moved, 2.0, tol=1e-12)
    chain = Chain(links, progress=False)
    cotangent = chain.test_gradients(fits.test, per_test=True)
    before = [one.values for one in chain.pull_back(cotangent)]
    generator = torch.Generator().manual_seed(3)
    at = moved.vector()
    block = links[-1].block
    step = 0.1 * torch.randn(moved.parameters.count(block), dtype=F64, generator=generator)
    there = moved.parameters.replaced(at, moved.parameters.take(at, block) + step, block)
    moved.load_vector(there)
    after = chain.pull_back(cotangent)
    afresh = [replace(link, stage=link.stage.to(F64)) for link in links]
    exact = Chain(afresh, math.inf, progress=False).pull_back(cotangent)
    for one, other in zip(after, exact, strict=True):
        check(one.values, other.values, 1e-12)
    assert relative_error(after[-1].values, before[-1]) > 1e-2
    moved.load_vector(at)  # and back
    for one, old in zip(chain.pull_back(cotangent), before, strict=True):
        assert torch.equal(one.values, old)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_how_far_from_an_optimum_a_stage_is_knows_no_size_of_weights(size):
    """Nor of the losses: as far at any scale of the objective."""
    one = solved("mlp", ("optimum",), 0).fits[0]
    x, c = solved("mlp", ("optimum",), 0).trained[0], torch.zeros(0, dtype=F64)
    for away, warned in ((1e-6, False), (1e-2, True)):
        step = away * torch.ones_like(x)
        by_weights = one.stage(one.named(x + step, c), weights=size * one.weights, l2=size * one.l2)
        scaled = Fit(
            one.model, one.data, size * one.l2, one.weights, loss=lambda o, t: size * log_loss(o, t)
        )
        for stage in (by_weights, scaled.stage(one.named(x + step, c))):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                chain = Chain([Optimum(stage)], progress=False)
            found = [w for w in caught if w.category is StationarityWarning]
            assert bool(found) == warned, chain.gradient_norms


def test_examples_without_weight_do_not_make_a_stage_look_far_from_its_optimum():
    weights = torch.zeros(200, dtype=F64)
    weights[1:200:14] = 1.0
    one = Fit(randomised(convex_net(3), 0), examples(200, 3, 0), 0.1, weights)
    x = Fits([one], one.data).trained[0]
    c = torch.zeros(0, dtype=F64)
    for away, warned in ((1e-9, False), (1e-1, True)):
        stage = one.stage(one.named(x + away, c))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Chain([Optimum(stage)], progress=False)
        assert any(w.category is StationarityWarning for w in caught) == warned


# --- on disk -------------------------------------------------------------------------------------


class Interrupted(Exception):
    """What stops a call midway."""


def stop_at(monkeypatch: pytest.MonkeyPatch, where: type, method: str, number: int) -> list[int]:
    """Let a method raise in its call of this number, and count its calls."""
    original, calls = getattr(where, method), [0]

    def counted(*arguments, **settings):
        calls[0] += 1
        if calls[0] == number:
            raise Interrupted
        return original(*arguments, **settings)

    monkeypatch.setattr(where, method, counted)
    return calls


def same(given, whole) -> None:
    """To the last bit, and with the same reports."""
    for one, other in zip(given, whole, strict=True):
        assert torch.equal(one.values, other.values)
        assert one.solves == other.solves


@pytest.mark.parametrize("per_test", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupted_chain_of_solves_goes_on(tmp_path, monkeypatch, number, per_test):
    fits = solved("mlp", ("optimum", "proximal", "frozen"), 0)
    chain = Chain(fits.links(MinRes()), progress=False)
    whole = chain.scores(fits.test, per_test=per_test)
    for where, method in ((MinRes, "solve"), (Stage, "directional_derivatives")):
        out = tmp_path / method
        with monkeypatch.context() as patch:
            stop_at(patch, where, method, number)
            with pytest.raises(Interrupted):
                chain.scores(fits.test, per_test=per_test, out=out)
        with monkeypatch.context() as patch:
            calls = stop_at(patch, MinRes, "solve", 0)
            same(chain.scores(fits.test, per_test=per_test, out=out), whole)
            # Solved before the interruption is solved for good.
            assert calls[0] == 3 - number + (method == "solve")
        with monkeypatch.context() as patch:
            stop_at(patch, MinRes, "solve", 1)
            stop_at(patch, Stage, "directional_derivatives", 1)
            same(chain.scores(fits.test, per_test=per_test, out=out), whole)


@pytest.mark.parametrize("of", [None, {0: examples(4, 3, 5), 1: examples(3, 2, 6)}])
@pytest.mark.parametrize("number", [3, 13, 18])
def test_an_interrupted_walk_goes_on_where_it_was(tmp_path, monkeypatch, number, of):
    fits = stepped("mlp", "momentum", "nesterov")
    steps = [len(one.batches()) for one in fits.fits]
    chain = Chain(fits.links(), progress=False)
    whole = chain.scores(fits.test, of=of)
    with monkeypatch.context() as patch:
        stop_at(patch, SGD, "pull_back", number)
        with pytest.raises(Interrupted):
            chain.scores(fits.test, of=of, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        calls = stop_at(patch, SGD, "pull_back", 0)
        same(chain.scores(fits.test, of=of, out=tmp_path / "out"), whole)
        # Taken again are at most the 3 steps of a part of the walk, between two kept states.
        assert calls[0] <= sum(steps) - number + 1 + 3
    with monkeypatch.context() as patch:
        stop_at(patch, SGD, "pull_back", 1)
        same(chain.scores(fits.test, of=of, out=tmp_path / "out"), whole)


def test_what_belongs_to_another_problem_is_refused(tmp_path):
    fits = solved("mlp", ("optimum", "proximal"), 0)
    links = fits.links(MinRes())

    def scores_of(links, test=fits.test, **settings):
        return Chain(links, 1e9, progress=False).scores(test, out=tmp_path / "out", **settings)

    scores_of(links)
    first, second = (link.stage for link in links)
    x, y = fits.test
    for changed, asked in [
        (links, {"test": (x + 1e-6, y)}),
        (links, {"per_test": True}),
        (links, {"of": examples(19, 3, 8)}),
        (links, {"of": {1: examples(14, 2, 8)}}),
        ([links[0], Proximal(second, 0.08, MinRes())], {}),
        ([links[0], Proximal(second, 0.07, MinRes(tol=1e-9))], {}),
        ([links[0], Proximal(second, 0.07, MinRes(), curvature="gauss-newton")], {}),
        ([Optimum(first.with_weights(first.weights + 1e-3), MinRes()), links[1]], {}),
        ([links[0], Proximal(second.with_weights(second.weights * 1.1), 0.07, MinRes())], {}),
        ([Stopped(first, time=3.0), links[1]], {}),
        ([links[0]], {"test": examples(6, 3, 9)}),
    ]:
        with pytest.raises(ValueError, match="belongs to another problem"):
            scores_of(changed, **asked)
    scores_of(links)

    through = stepped("mlp", "momentum", "sgd")
    one, two = through.links()
    out = tmp_path / "paths"
    chain = Chain([one, two], progress=False)
    chain.scores(through.test, out=out)
    path = replace(two.path, learning_rates=(*two.path.learning_rates[:-1], 0.0))
    for changed, asked in [
        ([one, Unrolled(two.stage, path)], {}),
        ([one, two], {"of": examples(19, 3, 8)}),
    ]:
        with pytest.raises(ValueError, match="belongs to another problem"):
            Chain(changed, progress=False).scores(through.test, out=out, **asked)


class Exact:
    """A solver that nothing tells from another."""

    def __init__(self) -> None:
        self.solves = 0

    def solve(self, operator, right, progress=False):
        self.solves += 1
        return Dense().solve(operator, right, progress=progress)


@pytest.mark.parametrize("place", [0, 1])
def test_a_solver_without_settings_to_know_it_by_keeps_nothing(tmp_path, place, monkeypatch):
    fits, solver = solved("mlp", ("optimum", "proximal"), 0), Exact()
    links = fits.links()
    links[place] = replace(links[place], solver=solver)
    chain = Chain(links, progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, Chain, "test_gradients", 1)
        stop_at(patch, Dense, "solve", 1)
        with pytest.raises(ValueError, match=r"out: .*by its settings, and Exact is no data"):
            chain.scores(fits.test, out=tmp_path / "out")
    assert solver.solves == 0
    assert not list(tmp_path.rglob("*.npy"))
    given = chain.scores(fits.test)  # in memory it is as good as any
    assert solver.solves == 1
    for one, values in zip(given, Chain(fits.links(), progress=False).scores(fits.test)):
        assert torch.equal(one.values, values.values)


@pytest.mark.parametrize("of", [None, {0: examples(4, 3, 5)}])
def test_trainings_in_place_are_kept_and_asked_for_again(tmp_path, monkeypatch, of):
    """The first stage's modules have moved since; no walk is left on disk."""
    embedding, settings = randomised(mlp(3), 1).embedding, {"batch_size": 4, "progress": False}
    first = Stage(embedding, randomised(mlp(3), 2).head, log_loss, examples(19, 3, 1), l2=0.05)
    path1 = descend(first, SGD(lr=0.1, momentum=0.8), epochs=2, seed=1, **settings)
    second = Stage(embedding, randomised(mlp(2), 3).head, log_loss, examples(14, 2, 2), l2=0.03)
    path2 = descend(second, AdamW(lr=0.03), epochs=2, seed=2, **settings)
    chain = Chain([Unrolled(first, path1), Unrolled(second, path2)], progress=False)
    test, out = examples(6, 2, 3), tmp_path / "out"
    whole = chain.scores(test, of=of)
    kept = chain.scores(test, of=of, out=out)
    same(kept, whole)
    assert not [path for path in out.iterdir() if "walk" in path.name]
    files = sorted(path.name for path in out.iterdir())
    with monkeypatch.context() as patch:
        stop_at(patch, SGD, "pull_back", 1)
        stop_at(patch, AdamW, "pull_back", 1)
        same(chain.scores(test, of=of, out=out), whole)
        links = [Unrolled(first, path1), Unrolled(second, path2)]
        same(Chain(links, progress=False).scores(test, of=of, out=out), whole)
    assert sorted(path.name for path in out.iterdir()) == files


@pytest.mark.parametrize("number", [3, 8])
def test_a_walk_is_kept_while_it_goes_and_not_longer(tmp_path, monkeypatch, number):
    fits, out = stepped("mlp", "momentum", "nesterov"), tmp_path / "out"
    chain = Chain(fits.links(), progress=False)

    def walks() -> list[str]:
        return [path.name for path in out.iterdir() if ".walk-" in path.name]

    with monkeypatch.context() as patch:
        stop_at(patch, SGD, "pull_back", number)
        with pytest.raises(Interrupted):
            chain.scores(fits.test, out=out)
    assert len(walks()) == (number > 3)
    # Nothing was found yet, so that another problem may have the folder, and leaves no walk.
    chain.scores(fits.test, per_test=True, out=out)
    assert not walks()


def test_another_hand_over_is_another_problem(tmp_path):
    """The same stages, of which the second takes another of the first's parameters."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 2, dtype=F64), nn.Linear(5, 2, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x.cos())

    data = examples(9, 2, 1)
    stages = [Stage.of(randomised(Twins(), 1), log_loss, data)]
    second, test = randomised(Twins(), 2), examples(3, 2, 2)

    def scores_of(taken: str, hands_on=None) -> None:
        tuned = Stage.of(second, log_loss, data, {"left.*": taken})
        first = Stage.of(stages[0].model, log_loss, data, hands_on=hands_on)
        links = [Stopped(first, 1.0), Stopped(tuned, 1.0)]
        Chain(links, progress=False).scores(test, out=tmp_path / taken[0])

    def doubled(named: dict[str, Tensor], factor: float = 2.0) -> dict[str, Tensor]:
        return {name: factor * part for name, part in named.items()}

    scores_of("left.*")
    scores_of("left.*")
    (tmp_path / "r").symlink_to(tmp_path / "l")
    with pytest.raises(ValueError, match="belongs to another problem"):
        scores_of("right.*")
    with pytest.raises(ValueError, match="belongs to another problem"):
        scores_of("left.*", doubled)


# --- laws ----------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**31 - 1)


@functools.cache
def chain_of(kind: tuple[str, ...]) -> tuple[Fits, Chain]:
    fits = either(kind)
    return fits, Chain(fits.links(), progress=False)


@given(SEEDS, st.integers(1, 4), st.sampled_from(EITHER))
def test_scores_are_linear_in_the_functional(seed, count, kind):
    _, chain = chain_of(kind)
    generator = torch.Generator().manual_seed(seed)
    size = chain.links[-1].stage.parameters.size
    cotangents = torch.randn(size, count, generator=generator, dtype=F64)
    factors = torch.randn(count, generator=generator, dtype=F64)
    together = chain.pull_back(cotangents)
    mixed = chain.pull_back((cotangents @ factors)[:, None])
    for one, all_of in zip(mixed, together, strict=True):
        check(one.values[:, 0], all_of.values @ factors, EXACT)


@settings(max_examples=8)
@given(SEEDS, st.sampled_from([0, 1, 2]))
def test_a_permutation_of_the_examples_permutes_the_scores(seed, stage):
    fits, chain = chain_of(EITHER[0])
    order = torch.randperm(fits.fits[stage].size, generator=torch.Generator().manual_seed(seed))
    links = list(chain.links)
    old = links[stage].stage
    new = old.with_data(tuple(part[order] for part in old.data)).with_weights(old.weights[order])
    links[stage] = [Optimum, partial(Proximal, alpha=0.07), Frozen][stage](new, solver=Dense())
    given = Chain(links, progress=False).scores(fits.test)
    for number, one in enumerate(chain.scores(fits.test)):
        exact = one.values[order] if number == stage else one.values
        check(given[number].values, exact, 1e-8)


def test_a_strong_pull_is_a_frozen_embedding():
    exact = scores(solved("mlp", ("optimum", "frozen"), 0))
    errors = []
    for alpha in (1e2, 1e4):
        fits = [fit("mlp", 0, 0), fit("mlp", 1, 0, alpha=alpha)]
        given = scores(Fits(fits, solved("mlp", ("optimum", "frozen"), 0).test))
        errors.append([relative_error(a, b) for a, b in zip(given, exact)])
        assert max(errors[-1]) < 1 / alpha
    # The difference falls as 1/alpha.
    for weak, strong in zip(*errors):
        assert 80 < weak / strong < 125


@settings(max_examples=10)
@given(SEEDS, st.integers(1, 11), st.sampled_from(["sgd", "constant"]))
def test_a_training_cut_in_two_has_the_same_sum_of_scores(seed, cut, schedule):
    """SGD without momentum has no memory: two stages in a row are one."""
    data, l2, rates = examples(9, 3, 5), 0.05, [0.3] * 12
    if schedule == "sgd":
        rates = (
            0.05 + 0.4 * torch.rand(12, generator=torch.Generator().manual_seed(seed))
        ).tolist()
    batches = [
        batch
        for epoch in range(4)
        for batch in torch.randperm(
            9, generator=torch.Generator().manual_seed(seed % 1000 + epoch)
        ).split(4)
    ]
    start = randomised(mlp(3), seed % 97)
    weights = weights_of(9, 4)

    def taken(begin: nn.Module, first: int, last: int) -> Unrolled:
        end = copy.deepcopy(begin)
        stage = Stage.of(end, log_loss, data, l2=l2, weights=weights)
        optimiser = torch.optim.SGD(end.parameters(), lr=1.0, weight_decay=l2)
        for batch, rate in zip(batches[first:last], rates[first:last]):
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            (weights[batch] @ log_loss(end(data[0][batch]), data[1][batch]) / len(batch)).backward()
            optimiser.step()
        path = Path.record(
            stage, begin.state_dict(), batches[first:last], SGD(lr=1.0), rates[first:last],
            progress=False,
        )  # fmt: skip
        return Unrolled(stage, path)

    test = examples(5, 3, 6)
    (whole,) = Chain([taken(start, 0, 12)], progress=False).scores(test, per_test=True)
    one = taken(start, 0, cut)
    chain = Chain([one, taken(one.stage.model, cut, 12)], progress=False)
    first, second = chain.scores(test, per_test=True)
    check(first.values + second.values, whole.values, EXACT)
