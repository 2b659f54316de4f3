"""The centre: chains trained again with other weights, and what the gradient there predicts.

The scores of such a chain are held against central differences through whole trainings of
torch.optim and SciPy at the same weights. What the gradient at the centre has to do with linear
datamodels and Banzhaf values is held against an enumeration of all subsets.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace

import pytest
import torch
from chains import Fits, examples, mlp, randomised
from problems import F64, relative_error
from problems import train as minimum
from test_retraining_chain import fit
from torch import Tensor

from msif_lib import Chain, FixedEmbeddingInfluence, Stage, cross_entropy
from msif_lib.influence import StationarityWarning
from msif_lib.links import Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.retraining import RetrainingSettings, retrain_without, with_weights
from msif_lib.solvers import Dense
from msif_lib.training import SGD, AdamW, TrainingWarning, descend, train

QUIET = {"progress": False}
SHARE = 0.4
EXACT = RetrainingSettings(tol=1e-11)


@functools.cache
def fits_of(kinds: tuple[str, ...]) -> Fits:
    fits = [fit(stage, kind) for stage, kind in enumerate(kinds)]
    return Fits(fits, examples(6, fits[-1].model.head.out_features, 9))


@functools.cache
def chain_of(kinds: tuple[str, ...]) -> Chain:
    return Chain(fits_of(kinds).links(), **QUIET)


def fits_near(kinds: tuple[str, ...], stage: int, at: Tensor) -> Fits:
    """The same trainings, whose optima are looked for near those with these weights."""
    fits = copy.copy(fits_of(kinds))
    fits.fits = [copy.copy(one) for one in fits.fits]
    x, c = fits.trained[stage], fits.handed[stage]
    for number, one in enumerate(fits.fits[stage:], stage):
        if number > stage:
            before = fits.fits[number - 1]
            c = one.takes(before, before.named(x, c))
        weights = at if number == stage else one.weights
        if one.recipe is None:
            # BFGS from the first optimum on, and Newton's method.
            objective = functools.partial(one.objective, c=c, weights=weights)
            one._near = minimum(objective, one._near.x)
        x = one.fit(c, weights)
    return fits


def differences(fits: Fits, stage: int, at: Tensor, chosen: list[int], step: float) -> Tensor:
    """N dq/dw_i ``(len(chosen), T)`` at the weights `at`, of fourth order, by whole trainings."""
    rows = []
    for example in chosen:
        losses = {}
        for k in (-2, -1, 1, 2):
            weights = at.clone()
            weights[example] += k * step
            losses[k] = fits.retrained(stage, weights)
        slope = (losses[-2] - 8 * losses[-1] + 8 * losses[1] - losses[2]) / (12 * step)
        rows.append(len(at) * slope)
    return torch.stack(rows)


CENTRED = [
    (("steps",), 0),
    (("steps", "steps"), 0),
    (("steps, adamw", "steps, adamw"), 0),
    (("steps", "steps, adamw"), 1),
    (("optimum", "proximal"), 0),
    (("optimum", "frozen"), 0),
    (("optimum", "lora", "proximal"), 1),
    (("steps", "steps, adamw", "frozen"), 1),
    (("optimum", "proximal", "frozen"), 1),
]


# Without a third of its examples the low-rank stage ends where its correction is zero: no strict
# minimum, of which there would be differences.
EACH = [(*one, False) for one in CENTRED] + [
    (*one, True) for one in CENTRED if "lora" not in one[0]
]


def named(value: object) -> str:
    if isinstance(value, bool):
        return "subset run" if value else "centre"
    return " to ".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.numeric
@pytest.mark.parametrize(("kinds", "stage", "masked"), EACH, ids=named)
def test_scores_are_differences_of_whole_trainings_with_these_weights(kinds, stage, masked):
    chain = chain_of(kinds)
    own = chain.links[stage].stage.weights
    at = own * (1 - SHARE)
    if masked:
        at = own * (torch.arange(len(own)) % 3 > 0)
    fits = fits_near(kinds, stage, at)
    centre = with_weights(chain, at if masked else 1 - SHARE, stage, settings=EXACT, **QUIET)
    assert [type(link) for link in centre.links] == [type(link) for link in chain.links]
    assert torch.equal(centre.links[stage].stage.weights, at)
    # One subset run of the same weights by the other entrance: the same models.
    test = centre.links[-1].stage.with_data(fits.test)
    losses = test.losses_at(centre.links[-1].vector(), *fits.test)
    assert relative_error(losses, fits.retrained(stage, at)) < 1e-9
    if masked:
        left_out = (at == 0).nonzero()[:, 0].tolist()
        found = retrain_without(chain, [left_out], fits.test, stage, settings=EXACT, **QUIET)
        assert relative_error(losses, found.losses[0]) < 1e-9
    values = centre.scores(fits.test, per_test=True)[stage].values
    # An example of weight 0 is scored as another is; one that is has no step below 0 to take.
    chosen = [1, 4] if masked else [0, 3, 5]
    if masked:
        assert (values[at == 0].abs().amax(1) > 0).all()
    steps = differences(fits, stage, at, chosen, 1e-2 if "steps" in kinds[stage] else 3e-3)
    assert relative_error(values[chosen], steps) < 1e-6
    # And they are not those at the weights of the chain.
    assert relative_error(chain.scores(fits.test, per_test=True)[stage].values, values) > 1e-2


# --- what the chain is made of -------------------------------------------------------------------


def small(dtype: torch.dtype = F64, **settings) -> Stage:
    return Stage(*parts(3, dtype), cross_entropy, cast(examples(12, 3, 0), dtype), **settings)


def parts(classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.nn.Module, ...]:
    net = randomised(mlp(classes), seed).to(dtype)
    return net.embedding, net.head


def cast(data: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return data[0].to(dtype), data[1]


def recorded(dtype: torch.dtype = F64, dropout: float = 0.0) -> Chain:
    """Two recorded trainings on one embedding, as in the README, some of it with dropout."""
    first = small(dtype)
    noise = {"noise_seed": 3} if dropout else {}
    if dropout:
        first = Stage(
            torch.nn.Sequential(first.embedding, torch.nn.Dropout(dropout)).eval(), first.head,
            cross_entropy, first.data, l2=0.01,
        )  # fmt: skip
    path1 = descend(first, SGD(lr=0.2, momentum=0.8), 3, 5, 0, **noise, **QUIET)
    second = Stage(
        first.embedding,
        parts(2, dtype, 1)[1],
        cross_entropy,
        cast(examples(9, 2, 1), dtype),
        l2=0.02,
    )
    path2 = descend(second, AdamW(lr=0.02), 2, 4, 1, **noise, **QUIET)
    return Chain([Unrolled(first, path1), Unrolled(second, path2)], **QUIET)


def everything_of(chain: Chain) -> list[Tensor]:
    """All numbers of a user's objects, copied."""
    found = []
    for link in chain.links:
        stage = link.stage
        found += [stage.vector().clone(), stage.weights.clone(), link.vector().clone()]
        found += [buffer.clone() for buffer in stage.model.buffers()]
        if isinstance(link, Unrolled):
            found += [link.path.start.clone(), *(link.path.states[t].x for t in link.path.states)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_weights_take_the_same_steps_to_the_last_bit(dtype, dropout):
    chain = recorded(dtype, dropout)
    before = everything_of(chain)
    again = with_weights(chain, 1, **QUIET)
    for one, other in zip(chain.links, again.links, strict=True):
        assert torch.equal(one.vector(), other.vector())
        assert other.stage.dtype == dtype and other.path.states.keys() == one.path.states.keys()
    test = cast(examples(5, 2, 2), dtype)
    for one, other in zip(chain.scores(test), again.scores(test), strict=True):
        assert torch.equal(one.values, other.values)
    centre = with_weights(chain, 0.5, **QUIET)
    assert not torch.equal(centre.links[1].vector(), chain.links[1].vector())
    later = with_weights(chain, torch.linspace(0, 1, 9), 1, **QUIET)
    assert later.links[0] is chain.links[0]
    assert later.links[1].stage.weights[0] == 0
    ours = {id(p) for link in centre.links for p in link.stage.model.parameters()}
    ours |= {id(p) for p in later.links[1].stage.model.parameters()}
    assert not ours & {id(p) for link in chain.links for p in link.stage.model.parameters()}
    assert len(ours) == 12  # each new stage has modules of its own
    for old, new in zip(before, everything_of(chain), strict=True):
        assert torch.equal(old, new)


@pytest.mark.numeric
def test_links_keep_their_settings_and_single_precision_its_dtype():
    stage = small(torch.float32, l2=0.05, weights=torch.full((12,), 2.0))
    data = cast(examples(9, 2, 1), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)  # rounding of single precision
        train(stage, 1e-6)
        frozen = Stage(copy.deepcopy(stage.embedding), parts(2, torch.float32)[1], cross_entropy,
                       data, l2=0.03)  # fmt: skip
        train(frozen, 1e-6, head_only=True)
        pulled = Stage(copy.deepcopy(stage.embedding), parts(2, torch.float32)[1], cross_entropy,
                       data, l2=0.03)  # fmt: skip
        train(pulled, 1e-6, towards=stage.split(stage.vector())[0], alpha=0.3)
    solver, first = Dense(damping=0.01), Optimum(stage, Dense(), "gauss-newton")
    test = cast(examples(5, 2, 2), torch.float32)
    for last in (Frozen(frozen, solver), Proximal(pulled, 0.3, solver, "gauss-newton")):
        chain = Chain([first, last], stationarity_tol=0.5, **QUIET)
        centre = with_weights(chain, 0.6, **QUIET)
        assert torch.equal(centre.links[0].stage.weights, torch.full((12,), 1.2))
        for old, new in zip(chain.links, centre.links, strict=True):
            assert (type(new), new.solver, new.curvature) == (type(old), old.solver, old.curvature)
            assert new.stage.dtype == torch.float32 and new.stage is not old.stage
        assert getattr(centre.links[1], "alpha", None) == getattr(last, "alpha", None)
        assert centre.stationarity_tol == 0.5
        # Rounded from what double precision finds.
        double = with_weights(
            Chain([replace(link, stage=link.stage.to(F64)) for link in chain.links], 0.5, False),
            0.6, **QUIET,
        )  # fmt: skip
        for one, other in zip(centre.links, double.links, strict=True):
            assert relative_error(one.vector().double(), other.vector()) < 1e-6
        assert [scores.values.isfinite().all() for scores in centre.scores(test)] == [True, True]


def test_the_papers_names_give_a_chain_of_their_links():
    fits = fits_of(("optimum", "frozen"))
    first, last = fits.links()
    named = FixedEmbeddingInfluence(first.stage, last.stage, solver=Dense())
    centre = with_weights(named, 0.6, settings=EXACT, **QUIET)
    other = with_weights(chain_of(("optimum", "frozen")), 0.6, settings=EXACT, **QUIET)
    assert type(centre) is Chain
    for one, two in zip(centre.scores(fits.test), other.scores(fits.test), strict=True):
        assert relative_error(one.values, two.values) < 1e-12


def test_what_has_no_training_or_no_weights_is_refused():
    chain = recorded()
    first, second = chain.links
    ended = first.stage.to()
    ended.load_vector(first.path.end)
    flowed = Chain([Stopped(ended, first.path.time), second], **QUIET)
    before = everything_of(chain)
    for wrong, error in [
        (0, "weights must be positive"),
        (-0.5, "weights must be positive"),
        (float("nan"), "weights must be positive"),
        (torch.zeros(12), "leaves no example"),
        (torch.ones(11), "one number for each of the 12 examples"),
        (-torch.ones(12), "the weight of example 0"),
        (torch.full((12,), float("inf")), "the weight of example 0"),
    ]:
        with pytest.raises(ValueError, match=error):
            with_weights(chain, wrong, **QUIET)
    for wrong in (True, "0.5", None, torch.ones(12) > 0):
        with pytest.raises(TypeError, match="weights must"):
            with_weights(chain, wrong, **QUIET)
    with pytest.raises(TypeError, match="chain must be a Chain"):
        with_weights(list(chain.links), 0.5)
    with pytest.raises(ValueError, match="number of a stage of the chain"):
        with_weights(chain, 0.5, 2)
    with pytest.raises(ValueError, match="Stopped approximates a training"):
        with_weights(flowed, 0.5)
    # What stays need not be trained again.
    assert torch.equal(
        with_weights(flowed, 1, 1, **QUIET).links[1].vector(), flowed.links[1].vector()
    )
    with pytest.raises(FloatingPointError, match="diverged in step"):
        with_weights(chain, 1e200, **QUIET)
    for old, new in zip(before, everything_of(chain), strict=True):
        assert torch.equal(old, new)


def test_a_training_that_falls_short_says_so():
    chain = chain_of(("optimum", "proximal"))
    with (
        pytest.warns(TrainingWarning, match="the pretraining stage ended at gradient norm"),
        pytest.warns(StationarityWarning, match="Optimum assumes zero"),
    ):
        with_weights(chain, 0.5, settings=RetrainingSettings(max_evaluations=1), **QUIET)


def test_adam_has_no_useful_derivative_at_weight_zero():
    """Where one example alone moves a coordinate, Adam divides its gradient by its own size.

    At weight 0 that is ε: the derivative is right, of size 1/ε, and tells nothing of the way to 1.
    """
    inputs, classes = examples(12, 3, 0)
    inputs[:, 4] = 0
    inputs[0, 4] = 1
    values = {}
    for optimiser in (AdamW(lr=0.02), SGD(lr=0.2, momentum=0.8)):
        stage = Stage(*parts(3, F64), cross_entropy, (inputs, classes))
        chain = Chain([Unrolled(stage, descend(stage, optimiser, 3, 5, 0, **QUIET))], **QUIET)
        mask = torch.ones(12, dtype=F64)
        mask[0] = 0
        without = with_weights(chain, mask, **QUIET)
        test = examples(5, 3, 2)
        values[type(optimiser)] = [
            float(one.scores(test)[0].values[0].abs()) for one in (chain, without)
        ]
    at_one, at_zero = values[AdamW]
    assert at_zero > 1e3 * at_one > 0
    at_one, at_zero = values[SGD]
    assert at_zero < 10 * at_one
