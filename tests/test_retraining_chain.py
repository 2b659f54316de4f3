"""The truth for chains of any links, against trainings of torch.optim and Newton's method."""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import replace

import pytest
import torch
from chains import EMBEDDING, Fit, Fits, Named, Recipe, examples, mlp, randomised, weights_of
from problems import F64, relative_error
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.links import Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.retraining import Retraining, RetrainingSettings, retrain_without
from msif_lib.support.fingerprint import fingerprint
from msif_lib.training import SGD, AdamW, descend, train

QUIET = {"progress": False}
HEAD = ["head.weight", "head.bias"]
MOMENTUM = Recipe(
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8),
    SGD(lr=0.1, momentum=0.8), cosine=True,
)  # fmt: skip
ADAMW = Recipe(
    lambda parameters: torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.3),
    AdamW(lr=0.03, weight_decay=0.3), cosine=True,
)  # fmt: skip


class LowRank(nn.Module):
    """tanh of a layer that stays, with a correction of rank 1 that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(3))
        self.a, self.b = nn.Parameter(torch.zeros(1, 5)), nn.Parameter(torch.zeros(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight + self.b @ self.a, self.bias))


def merged(named: Named) -> Named:
    """What a plain layer would be handed."""
    weight = named["embedding.weight"] + named["embedding.b"] @ named["embedding.a"]
    return {"embedding.0.weight": weight, "embedding.0.bias": named["embedding.bias"]}


def lora(seed: int) -> nn.Module:
    net = mlp(2)
    net.embedding = LowRank().to(F64)
    return randomised(net, seed)


def fit(stage: int, kind: str) -> Fit:
    """One stage of another size, weight decay and weights than the others."""
    count, classes, l2 = [(19, 3, 0.05), (14, 2, 0.03), (11, 2, 0.08)][stage]
    settings: dict = {"shared": EMBEDDING} if stage else {}
    model = lora(stage) if "lora" in kind else randomised(mlp(classes), stage)
    if "lora" in kind:
        settings["shared"] = {f"embedding.{name}": f"embedding.0.{name}" for name in
                              ("weight", "bias")}  # fmt: skip
        settings |= {"trained": ["embedding.a", "embedding.b", *HEAD], "hands_on": merged}
    if kind == "frozen":
        settings["trained"] = HEAD
    if kind == "proximal":
        settings["alpha"] = 0.07
    if "steps" in kind:
        settings["recipe"] = replace(ADAMW if "adamw" in kind else MOMENTUM, seed=stage)
    if "all" in kind:
        settings["shared"] = {name: name for name in (*EMBEDDING, *HEAD)}
    return Fit(model, examples(count, classes, stage), l2, weights_of(count, stage), **settings)


@functools.cache
def fits_of(kinds: tuple[str, ...]) -> Fits:
    fits = [fit(stage, kind) for stage, kind in enumerate(kinds)]
    return Fits(fits, examples(6, fits[-1].model.head.out_features, 9))


@functools.cache
def chain_of(kinds: tuple[str, ...]) -> Chain:
    return Chain(fits_of(kinds).links(), **QUIET)


def truth(kinds: tuple[str, ...], stage: int, removals=([3], [0, 5]), **settings) -> Retraining:
    test = fits_of(kinds).test
    how = RetrainingSettings(tol=1e-11)
    return retrain_without(
        chain_of(kinds), removals, test, stage, settings=how, **settings, **QUIET
    )


CHAINS = [
    ("optimum",),
    ("steps",),
    ("optimum", "proximal", "frozen"),
    ("optimum", "frozen", "steps, all"),
    ("steps", "steps, adamw"),
    ("steps, adamw", "frozen"),
    ("optimum", "lora", "proximal"),
    ("optimum", "lora, steps", "frozen"),
]
EACH = [(kinds, stage) for kinds in CHAINS for stage in range(len(kinds))]


def named(value: object) -> str:
    return " to ".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.numeric
@pytest.mark.parametrize(("kinds", "stage"), EACH, ids=named)
def test_retraining_is_what_torch_and_newton_find(kinds, stage):
    fits = fits_of(kinds)
    found = truth(kinds, stage, fraction=0.3)
    assert found.converged.all() and found.converged_before
    assert (found.stage, found.convention, found.start) == (stage, "fixed weight", "warm")
    assert found.gradient_norms.shape == found.evaluations.shape == (2, len(kinds))
    assert found.gradient_norms.isfinite().all()
    assert (found.evaluations[:, :stage] == 0).all()
    # Steps are the same steps; a minimum is found twice, as far as its gradient vanishes.
    steps = all("steps" in kind for kind in kinds[stage:])
    before = fits.retrained(stage, fits.fits[stage].weights)
    assert relative_error(found.losses_before, before) < (1e-12 if steps else 1e-9)
    for row, removal in enumerate(([3], [0, 5])):
        weights = fits.fits[stage].weights.clone()
        weights[removal] *= 0.7
        after = fits.retrained(stage, weights)
        assert relative_error(found.losses[row], after) < (1e-10 if steps else 1e-9)
        if kinds[stage:] == ("frozen", "steps, all"):
            assert (after - before).abs().max() > 1e-4
        assert relative_error(found.per_test_change[row], after - before) < (
            1e-9 if steps else 1e-7
        )
    for number, kind in enumerate(kinds[stage:], stage):
        if "steps" in kind:
            fit = fits.fits[number]
            assert (found.evaluations[:, number] == len(fit.batches())).all()
            assert (found.gradient_norms[:, number] > 1e-6).all()


@pytest.mark.numeric
@pytest.mark.parametrize(("kinds", "stage"), EACH, ids=named)
def test_the_scores_of_a_chain_are_its_first_order(kinds, stage):
    fits, chain = fits_of(kinds), chain_of(kinds)
    scores = chain.scores(fits.test, per_test=True)
    removals, fraction = [[3], [0, 5], [7]], 1e-4
    found = truth(kinds, stage, removals, fraction=fraction).per_test_change / fraction
    exact = torch.stack([scores[stage].group_effect(removal) for removal in removals])
    assert relative_error(found, exact) < 1e-3
    # The weights of the examples forgotten, another stage's N or another stage.
    wrong = [dataclasses.replace(scores[stage], weights=None)]
    wrong += [
        dataclasses.replace(scores[stage], training_size=scores[other].training_size)
        for other in range(len(kinds)) if other != stage
    ]  # fmt: skip
    wrong += [scores[other] for other in range(len(kinds)) if other != stage]
    for one in wrong:
        mistaken = torch.stack([one.group_effect(removal) for removal in removals])
        assert relative_error(found, mistaken) > 0.05


@pytest.mark.numeric
def test_removing_all_of_an_example_s_weight_is_removing_it():
    kinds = ("steps", "steps, adamw")
    fits = fits_of(kinds)
    weights = fits.fits[1].weights.clone()
    weights[3] = 0
    found = truth(kinds, 1)
    assert relative_error(found.losses[0], fits.retrained(1, weights)) < 1e-10


def test_how_many_recorded_trainings_run_together_changes_nothing():
    kinds, removals = ("steps", "steps, adamw"), [[i] for i in range(5)]
    base = truth(kinds, 0, removals)
    for at_once, jobs in ((1, None), (2, 2)):
        how = RetrainingSettings(models_at_once=at_once, jobs=jobs)
        other = retrain_without(
            chain_of(kinds), removals, fits_of(kinds).test, settings=how, **QUIET
        )
        assert torch.allclose(base.losses, other.losses, rtol=1e-12)


def test_a_cold_start_of_three_stages_ends_where_a_warm_one_does():
    kinds = ("optimum", "proximal", "frozen")
    chain = chain_of(kinds)
    cold = [copy.deepcopy(link.stage) for link in chain.links]
    for stage in cold:
        stage.load_vector(0.9 * stage.vector())
    how = RetrainingSettings(tol=1e-11, cold_start=cold)
    for number in range(3):
        found = retrain_without(
            chain, [[3], [0, 5]], fits_of(kinds).test, number, settings=how, **QUIET
        )
        warm = truth(kinds, number)
        assert found.start == "cold" and found.converged.all()
        assert torch.allclose(found.losses, warm.losses, atol=1e-8)
        assert found.evaluations.sum() > warm.evaluations.sum()


def test_recorded_trainings_are_kept_and_known_by_their_steps(tmp_path, monkeypatch):
    kinds = ("optimum", "frozen", "steps, all")
    chain, test = chain_of(kinds), fits_of(kinds).test
    first = retrain_without(chain, [[3]], test, 1, checkpoint=tmp_path, **QUIET)
    files = set(tmp_path.iterdir())
    again = retrain_without(chain, [[3]], test, 1, checkpoint=tmp_path, **QUIET)
    assert torch.equal(first.losses, again.losses) and set(tmp_path.iterdir()) == files
    *before, last = chain.links
    rates = tuple(0.99 * rate for rate in last.path.learning_rates)
    slower = Chain(
        [*before, Unrolled(last.stage, replace(last.path, learning_rates=rates))], **QUIET
    )
    other = retrain_without(slower, [[3]], test, 1, checkpoint=tmp_path, **QUIET)
    assert not torch.equal(first.losses, other.losses)
    # The other steps before and after; the factors of the head's Hessian are read again.
    assert len(set(tmp_path.iterdir()) - files) == 2


def test_settings_are_known_by_all_that_changes_a_result():
    base = RetrainingSettings()
    same = [RetrainingSettings(models_at_once=3), RetrainingSettings(jobs=2)]
    different = [
        base, RetrainingSettings(tol=1e-8), RetrainingSettings(damping=1e-3),
        RetrainingSettings(threads=2), RetrainingSettings(max_evaluations=7),
        RetrainingSettings(first_hessian=torch.eye(3000)),
        RetrainingSettings(first_hessian=torch.eye(3000).fill_diagonal_(2.0)),
    ]  # fmt: skip
    assert {fingerprint(one.of_results()) for one in same} == {fingerprint(base.of_results())}
    assert len({fingerprint(one.of_results()) for one in different}) == len(different)
    middle = torch.eye(3000)
    middle[1500, 1500] = 2.0  # what the repr of a large tensor leaves out
    assert fingerprint(RetrainingSettings(first_hessian=middle)) != fingerprint(different[5])


def test_float32_trainings_are_repeated_in_float64():
    x, y = examples(12, 2, 0)
    stage = Stage.of(randomised(mlp(2), 0).float(), cross_entropy, (x.float(), y), l2=0.1)
    path = descend(stage, SGD(lr=0.1), epochs=2, batch_size=5, seed=0, **QUIET)
    chain = Chain([Unrolled(stage, path)], **QUIET)
    found = retrain_without(chain, [[0]], (x.float(), y), **QUIET)
    assert found.losses.dtype == F64
    assert relative_error(found.losses_before, stage.example_losses().double()) < 1e-6
    assert path.start.dtype == torch.float32


@pytest.mark.parametrize("augmented", [False, True])
def test_a_training_that_draws_is_repeated_in_its_own_precision_alone(augmented):
    x, y = examples(12, 2, 0)
    augment = (lambda inputs: inputs + 0.1 * torch.randn_like(inputs)) if augmented else None
    layers = nn.Linear(5, 4), nn.Tanh(), *([] if augmented else [nn.Dropout(0.3)]), nn.Linear(4, 2)
    model = randomised(nn.Sequential(*layers).double().eval(), 0)
    settings = {"epochs": 2, "batch_size": 5, "seed": 0, "noise_seed": 7, "augment": augment}

    single = Stage.of(copy.deepcopy(model).float(), cross_entropy, (x.float(), y), l2=0.1)
    path = descend(single, SGD(lr=0.1), **settings, **QUIET)
    with pytest.raises(ValueError, match=r"noise_seed=.* than in torch.float32.*record it in floa"):
        retrain_without(Chain([Unrolled(single, path)], **QUIET), [[0]], (x.float(), y), **QUIET)

    stage = Stage.of(model, cross_entropy, (x, y), l2=0.1)
    path = descend(stage, SGD(lr=0.1), **settings, **QUIET)
    chain = Chain([Unrolled(stage, path)], **QUIET)
    found = retrain_without(chain, [[0]], (x, y), fraction=1e-4, **QUIET)
    assert relative_error(found.losses_before, stage.example_losses()) < 1e-12
    effect = chain.scores((x, y)).pop().removal_effect[0]
    change = (found.losses[0] - found.losses_before).sum() / 1e-4
    assert abs(change - effect) < 1e-3 * abs(effect)


class LastState(nn.Module):
    """A recurrent embedding; torch has no batching rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


def test_recorded_trainings_of_recurrent_models_are_repeated_one_after_the_other():
    torch.manual_seed(0)
    x = torch.randn(10, 3, 2, dtype=F64)
    data = x, (x[:, -1, 0] > 0).long()
    stage = Stage(LastState().double(), nn.Linear(3, 2).double(), cross_entropy, data)
    path = descend(stage, SGD(lr=0.1), epochs=2, batch_size=4, seed=0, **QUIET)
    found = retrain_without(Chain([Unrolled(stage, path)], **QUIET), [[0], [1]], data, **QUIET)
    assert torch.allclose(found.losses_before, stage.example_losses(), rtol=1e-12)
    assert (found.change.abs() > 1e-4).all()


# --- errors --------------------------------------------------------------------------------------


def pair() -> tuple[Stage, Stage]:
    x, y = examples(12, 2, 0)
    first = Stage.of(randomised(mlp(2), 0), cross_entropy, (x, y), l2=0.1)
    train(first, 1e-9)
    second = Stage.of(
        copy.deepcopy(first.model), cross_entropy, (x, y), list(EMBEDDING), HEAD, l2=0.1
    )
    return first, second


def test_the_call_of_two_stages_is_shown_the_chain_s():
    first, second = pair()
    with pytest.raises(TypeError, match=r"not a Stage: .*Chain\(\[Optimum\(pretrain\), Frozen\("):
        retrain_without(first, second, [[0]], first.data)
    with pytest.raises(TypeError, match="takes a chain of links, not a list"):
        retrain_without([Optimum(first)], [[0]], first.data)
    with pytest.raises(TypeError, match=r"not \['alpha'\]: .*Proximal\(tuned, alpha\) in place of"):
        retrain_without(first, second, [[0]], first.data, alpha=0.1)
    for named in (
        {"pretrain": first, "finetune": second},
        {"pretrain": first, "finetune": second, "removals": [[0]], "test": first.data},
    ):
        with pytest.raises(TypeError, match=r"not \['finetune', 'pretrain'\]: .*Chain\(\[Optimum"):
            retrain_without(**named)
    with pytest.raises(TypeError, match=r"takes a chain of links, not a NoneType.*Chain\(\["):
        retrain_without(removals=[[0]], test=first.data)
    chain = Chain([Optimum(first), Frozen(second)], **QUIET)
    with pytest.raises(TypeError, match=r"not \['tol'\].*settings=RetrainingSettings"):
        retrain_without(chain, [[0]], first.data, tol=1e-6)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'test'"):
        retrain_without(chain, [[0]])
    named = {"chain": chain, "removals": [[0]], "test": first.data, **QUIET}
    assert torch.equal(
        retrain_without(**named).losses, retrain_without(chain, [[0]], first.data, **QUIET).losses
    )


@pytest.mark.parametrize("stage", [2, -1, 0.0, None])
def test_a_stage_must_be_one_of_the_chain(stage):
    first, second = pair()
    chain = Chain([Optimum(first), Frozen(second)], **QUIET)
    with pytest.raises(
        ValueError, match=r"stage must be the number of a stage of the chain, 0\.\."
    ):
        retrain_without(chain, [[0]], first.data, stage)


def test_an_index_outside_the_stage_is_named_with_it():
    test = fits_of(("optimum", "proximal", "frozen")).test
    chain = chain_of(("optimum", "proximal", "frozen"))
    with pytest.raises(ValueError, match=r"removal 0 names an example outside 0\.\.10"):
        retrain_without(chain, [[15]], test, 2)
    with pytest.raises(ValueError, match="a mask of length 19, which does not fit 14 stage 1 ex"):
        retrain_without(chain, [[True] * 19], test, 1)


def test_an_approximation_has_no_training_to_repeat():
    first, second = pair()
    chain = Chain([Optimum(first), Stopped(second, 3.0)], **QUIET)
    for stage in (0, 1):
        with pytest.raises(ValueError, match=r"Stopped approximates .*give Unrolled\(stage, path"):
            retrain_without(chain, [[0]], first.data, stage)
    both = Chain([Stopped(first, 3.0), Proximal(copy.deepcopy(second), 0.1)], 1e9, **QUIET)
    assert retrain_without(both, [[0]], first.data, 1, **QUIET).converged.all()


def test_the_mean_over_the_others_is_refused_where_there_is_none():
    kinds = ("optimum", "frozen", "steps, all")
    with pytest.raises(ValueError, match="renormalise: the stage 2 training is taken step by step"):
        truth(kinds, 2, renormalise=True)
    with pytest.raises(ValueError, match="renormalise: the examples of the stage 1 stage have wei"):
        truth(kinds, 1, renormalise=True)


def test_cold_starts_and_hessians_must_fit_the_chain():
    first, second = pair()
    chain = Chain([Optimum(first), Frozen(second)], **QUIET)

    def run(**settings: object) -> None:
        retrain_without(chain, [[0]], first.data, settings=RetrainingSettings(**settings))

    with pytest.raises(ValueError, match="a stage for each of the 2 links, not 1"):
        run(cold_start=[first])
    wide = Stage.of(mlp(2, 4), cross_entropy, first.data)
    with pytest.raises(ValueError, match=r"cold_start\[1\] has 34 parameters, but .* 26"):
        run(cold_start=[first, wide])
    with pytest.raises(ValueError, match=r"first_hessian must be of shape \(26, 26\)"):
        run(first_hessian=torch.eye(18))


def test_a_training_that_diverges_says_so():
    x, y = examples(12, 2, 0)
    stage = Stage.of(
        nn.Linear(5, 2).to(F64), lambda f, t: (f**4).sum(1), (x, y), weights=torch.ones(12)
    )
    path = descend(stage, SGD(lr=1e-3), epochs=3, batch_size=4, seed=0, **QUIET)
    fast = replace(path, learning_rates=(100.0,) * len(path))
    chain = Chain([Unrolled(stage, fast)], **QUIET)
    with pytest.raises(FloatingPointError, match="diverged"):
        retrain_without(chain, [[0]], (x, y), **QUIET)
