"""A stage opened: weights, single modules, names, tied and untrained parameters, and errors."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from chains import EMBEDDING, Fit, Fits, Net, Recipe, examples, mlp, randomised, weights_of
from hypothesis import given
from hypothesis import strategies as st
from problems import F64, check, log_loss
from torch import Tensor, nn

from msif_lib import Chain, Stage, UpdatedEmbeddingInfluence, cross_entropy
from msif_lib.links import Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.solvers import Dense
from msif_lib.support.parameters import overlapping
from msif_lib.training import SGD, descend

pytestmark = pytest.mark.numeric

EXACT, STEP, CHOSEN = 1e-9, 1e-3, [0, 5, 10]
HEAD = ["head.weight", "head.bias"]
MOMENTUM = Recipe(
    functools.partial(torch.optim.SGD, lr=0.1, momentum=0.8), SGD(0.1, 0.8), cosine=True
)


def agree(fits: Fits, **last) -> None:
    """Every stage's scores: dense or differentiated steps, and training again.

    What the last stage is said to be may be said otherwise.
    """
    links = fits.links()
    if last:
        links[-1] = fits.fits[-1].link(fits.trained[-1], fits.handed[-1], **last)
    chain = Chain(links, progress=False)
    exact = fits.exact()
    for stage, one in enumerate(chain.scores(fits.test, per_test=True)):
        check(one.values, exact[stage], EXACT)
        check(one.values[CHOSEN], fits.differences(stage, CHOSEN, STEP))


def stage_of(seed: int = 0, classes: int = 3, **settings) -> Stage:
    model = randomised(mlp(classes), seed)
    return Stage.of(model, log_loss, examples(8, classes, seed), **settings)


# --- weights -------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_weights_stand_before_each_loss(seed):
    weights = weights_of(8, seed)
    weights[seed % 8] = 0
    stage = stage_of(0, l2=0.3, weights=weights)
    losses = stage.example_losses()
    exact = (weights * losses).mean() + 0.15 * stage.vector().square().sum()
    assert torch.allclose(stage.objective(), exact, rtol=1e-14)
    slopes = torch.cat(list(stage.per_example_gradients()))
    check(stage.gradient(), (weights[:, None] * slopes).mean(0) + 0.3 * stage.vector(), 1e-12)
    assert not stage_of().weighted
    assert stage.with_weights(2 * weights).weights.equal(2 * weights)
    assert not stage.with_data(examples(3, 3, 1)).weighted


def test_weights_changed_afterwards_change_nothing():
    weights, indices = weights_of(8, 0), torch.arange(8.0)
    stage = stage_of(weights=weights)
    again = stage.with_weights(indices.to(F64))
    found = [stage.gradient(), again.gradient(), stage.weights.clone()]
    weights.zero_()
    indices.zero_()
    assert torch.equal(stage.gradient(), found[0]) and found[0].any()
    assert torch.equal(again.gradient(), found[1]) and found[1].any()
    assert torch.equal(stage.weights, found[2])
    (scores,) = Chain([Stopped(stage, 1.0)], progress=False).scores(examples(4, 3, 1))
    scores.weights.zero_()
    assert torch.equal(stage.weights, found[2])


def test_batches_carry_the_weights_of_their_examples():
    weights = weights_of(8, 1)
    whole, parts = (stage_of(0, weights=weights, batch_size=size) for size in (8, 3))
    assert torch.cat([some for _, some in parts.weighted_batches()]).equal(weights)
    check(parts.gradient(), whole.gradient(), 1e-13)
    section = parts.section([6, 1])
    assert torch.cat([some for _, some in section.weighted_batches()]).equal(weights[[6, 1]])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(7), r"one number for each of the 8 examples, not shape \(7,\)"),
        (torch.ones(8, 1), r"not shape \(8, 1\)"),
        (torch.tensor([1.0, 1, -2, 1, 1, 1, 1, 1]), "weight of example 2 is -2.0, not zero or pos"),
        (torch.tensor([1.0, 1, 1, 1, 1, math.nan, 1, 1]), "weight of example 5 is nan"),
        (torch.full((8,), math.inf), "weight of example 0 is inf"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        stage_of(weights=weights)
    with pytest.raises(ValueError, match=message):
        stage_of().with_weights(weights)


# --- names ---------------------------------------------------------------------------------------


def test_shared_parameters_come_first_in_the_order_of_the_model():
    for shared in ("head.*", ["head.weight", "head.b*"], {"head.*": "classifier.*"}):
        stage = stage_of(shared=shared)
        assert stage.names[:2] == ("head.weight", "head.bias")
        assert stage.names[2:] == ("embedding.0.weight", "embedding.0.bias")
        assert (stage.shared, stage.own) == ((0, 1), (2, 3))
        assert (stage.embedding_size, stage.head_size) == (12, 18)
        model = stage.model
        head = torch.cat([model.head.weight.flatten(), model.head.bias])
        assert stage.embedding_vector().equal(head)
        check(stage.outputs(*stage.split(stage.vector()), stage.data[0]), model(stage.data[0]))
    assert stage_of().own == ()
    assert stage_of().block(["*.bias"]) == (1, 3)


@pytest.mark.parametrize("argument", ["shared", "trained"])
def test_patterns_that_fit_nothing_are_named(argument):
    for patterns in ("encoder.*", ["head.*", "encoder.*"]):
        with pytest.raises(ValueError, match=rf"{argument}: no parameter is called 'encoder.\*'"):
            stage_of(**{argument: patterns})
    with pytest.raises(ValueError, match="shared: no parameter is called 'encoder"):
        stage_of(shared={"encoder.*": "embedding.*"})


class Renamed(nn.Module):
    """The same network as mlp under other names and in another order."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, classes, dtype=F64)
        self.encoder = nn.Linear(5, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.encoder(x)))


NAMES = {"encoder.weight": "embedding.0.weight", "encoder.bias": "embedding.0.bias"}


@pytest.mark.parametrize("mapping", [NAMES, {"encoder.*": "embedding.0.*"}], ids=["each", "all"])
@pytest.mark.parametrize("settings", [{"alpha": 0.07}, {"recipe": MOMENTUM}], ids=["opt", "steps"])
def test_a_mapping_to_the_names_of_the_stage_before(mapping, settings):
    fits = Fits(
        [
            Fit(randomised(mlp(3), 0), examples(19, 3, 0), 0.05, weights_of(19, 0)),
            Fit(randomised(Renamed(2), 1), examples(14, 2, 1), 0.03, shared=NAMES, **settings),
        ],
        examples(6, 2, 9),
    )
    first, second = fits.links()
    exact = fits.exact()
    second = fits.fits[1].link(fits.trained[1], fits.handed[1], shared=mapping)
    given = Chain([first, second], progress=False).scores(fits.test, per_test=True)
    for stage, one in enumerate(given):
        check(one.values, exact[stage], EXACT)
        check(one.values[CHOSEN[:2]], fits.differences(stage, CHOSEN[:2], STEP))


def test_a_mapping_to_a_name_that_is_not_there_or_to_another_shape():
    first = Stopped(stage_of(), 1.0)
    model = randomised(Renamed(2), 1)
    for mapping, message in [
        (
            {"encoder.*": "backbone.*"},
            r"takes \['backbone.weight', 'backbone.bias'\].*as a mapping",
        ),
        ({"encoder.weight": "head.weight"}, r"head.weight is \(3, 3\) in one and \(3, 5\)"),
        ("*", r"takes \['classifier.weight'.*which hands on \['embedding.0.bias'"),
    ]:
        second = Stopped(Stage.of(model, log_loss, examples(8, 2, 1), mapping), 1.0)
        with pytest.raises(ValueError, match=message):
            Chain([first, second], progress=False)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.*", "embedding.0."), ("encoder.weight", "embedding.*"),
        ("*.weight", "*.weight"), ("en?oder.*", "embedding.0.*"),
    ],
)  # fmt: skip
def test_a_mapping_that_cannot_be_read(ours, theirs):
    with pytest.raises(ValueError, match=r"shared: .* must be two names, or two beginnings"):
        Stage.of(randomised(Renamed(2), 1), log_loss, examples(8, 2, 1), {ours: theirs})


@pytest.mark.parametrize("settings", [{"alpha": 0.07}, {"recipe": MOMENTUM}], ids=["opt", "steps"])
def test_one_parameter_may_be_handed_on_to_two(settings):
    """A tied weight begins two that are tied no longer: what comes back is added."""
    names = {"words.weight": "words.weight", "out.weight": "words.weight"}
    untied = Tied(5)
    untied.out.weight = nn.Parameter(untied.words.weight.detach().clone())
    fits = Fits(
        [
            Fit(randomised(Tied(5), 0, 1.0), sentences(23, 5, 0), 0.02, weights_of(23, 0)),
            Fit(randomised(untied, 1), sentences(16, 5, 1), 0.03, shared=names, **settings),
        ],
        sentences(6, 5, 9),
    )
    agree(fits)


def test_a_head_may_be_handed_on_too():
    """What the next stage shares need not be what this one took."""
    everything = {name: name for name in (*EMBEDDING, *HEAD)}
    fits = Fits(
        [
            Fit(randomised(mlp(3), 0), examples(19, 3, 0), 0.05),
            Fit(randomised(mlp(3), 1), examples(14, 3, 1), 0.03, shared=EMBEDDING, alpha=0.07),
            Fit(randomised(mlp(3), 2), examples(11, 3, 2), 0.03, shared=everything, alpha=0.2),
        ],
        examples(6, 3, 9),
    )
    agree(fits)


# --- tied parameters -----------------------------------------------------------------------------


class Tied(nn.Module):
    """Words to vectors, their mean, and back to words by the same matrix."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 3, dtype=F64)
        self.mix = nn.Linear(3, 3, dtype=F64)
        self.out = nn.Linear(3, words, dtype=F64)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.words(tokens).mean(1))))


def sentences(count: int, words: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (count, 4), generator=generator)
    return tokens, (tokens[:, 0] + torch.randint(2, (count,), generator=generator)) % words


TIED = {name: name for name in ("words.weight", "mix.weight", "mix.bias")}


@pytest.mark.parametrize(
    "second", [{"alpha": 0.07}, {"trained": ["out.bias"]}, {"recipe": MOMENTUM}]
)
def test_a_head_that_reads_the_embedding_s_weight_is_one_parameter(second):
    fits = Fits(
        [
            Fit(randomised(Tied(5), 0, 1.0), sentences(23, 5, 0), 0.02, weights_of(23, 0)),
            Fit(randomised(Tied(5), 1, 1.0), sentences(16, 5, 1), 0.03, shared=TIED, **second),
        ],
        sentences(6, 5, 9),
    )
    stage = fits.links()[0].stage
    assert stage.names == ("words.weight", "mix.weight", "mix.bias", "out.bias")
    agree(fits)
    # Wrong: the weight's two uses taken for two parameters.
    untied = copy.deepcopy(stage.model)
    untied.out.weight = nn.Parameter(untied.words.weight.detach().clone())
    assert len(Stage.of(untied, log_loss, stage.data).names) == 5


def test_a_head_tied_to_its_embedding_trains_it():
    """Made of two modules, the tied weight is the embedding's, and handed on."""
    model = randomised(Tied(5), 0, 1.0)
    embedding = nn.ModuleDict({"words": model.words, "mix": model.mix})
    embedding.forward = lambda tokens: torch.tanh(model.mix(model.words(tokens).mean(1)))
    fits = Fits([Fit(model, sentences(23, 5, 0), 0.02)], sentences(6, 5, 9))
    trained = fits.stage = fits.links()[0].stage

    class Encoder(nn.Module):
        def __init__(self, source: Tied) -> None:
            super().__init__()
            self.words, self.mix = source.words, source.mix

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tanh(self.mix(self.words(tokens).mean(1)))

    encoder = Encoder(trained.model)
    stage = Stage(encoder, trained.model.out, log_loss, sentences(23, 5, 0), l2=0.02)
    assert stage.names[0] == "embedding.words.weight"
    assert stage.names[-1] == "head.bias"
    assert stage.head_size == 5
    (given,) = Chain([Optimum(stage, Dense())], progress=False).scores(fits.test, per_test=True)
    check(given.values, fits.exact()[0], EXACT)


@pytest.mark.parametrize("first", ["words.weight", "out.weight"])
@pytest.mark.parametrize("second", ["words.weight", "out.weight"])
@pytest.mark.parametrize("settings", [{"alpha": 0.07}, {"recipe": MOMENTUM}], ids=["opt", "steps"])
def test_a_tied_parameter_is_handed_over_by_any_of_its_names(first, second, settings):
    """In patterns, and as key and value of a mapping, of one name and of a beginning."""
    fits = Fits(
        [
            Fit(randomised(Tied(5), 0, 1.0), sentences(23, 5, 0), 0.02, weights_of(23, 0)),
            Fit(randomised(Tied(5), 1, 1.0), sentences(16, 5, 1), 0.03, shared=TIED, **settings),
        ],
        sentences(6, 5, 9),
    )
    one, two = fits.links()
    exact = [given.values for given in Chain([one, two], progress=False).scores(fits.test)]

    def also(shared) -> None:
        link = fits.fits[1].link(fits.trained[1], fits.handed[1], shared=shared)
        assert link.stage.shared == two.stage.shared and link.stage.names == two.stage.names
        found = Chain([one, link], progress=False).scores(fits.test)
        for scored, values in zip(found, exact, strict=True):
            assert torch.equal(scored.values, values)

    also([second, "mix.*"])
    also({second: first, "mix.*": "mix.*"})
    ours, theirs = second.replace("weight", "w*"), first.replace("weight", "w*")
    also({ours: theirs, "mix.*": "mix.*"})


def test_a_model_that_is_tied_no_longer_takes_a_tied_parameter_by_both_names():
    untied = randomised(Tied(5), 1)
    untied.out.weight = nn.Parameter(untied.words.weight.detach().clone())
    first = Stage.of(randomised(Tied(5), 0), log_loss, sentences(12, 5, 0))
    chains = []
    for shared in (["*.weight"], {"words.weight": "words.weight", "out.weight": "words.weight",
                                  "mix.weight": "mix.weight"}):  # fmt: skip
        second = Stage.of(untied, log_loss, sentences(9, 5, 1), shared)
        chain = Chain([Stopped(first, 1.0), Stopped(second, 1.0)], progress=False)
        chains.append([one.values for one in chain.scores(sentences(4, 5, 2))])
    for one, other in zip(*chains, strict=True):
        assert torch.equal(one, other) and one.any()


def test_a_tied_parameter_is_trained_by_any_of_its_names():
    data, ends = sentences(12, 5, 0), []
    for name in ("words.weight", "out.weight"):
        groups = [{"params": name, "lr": 0.3}]
        model = randomised(Tied(5), 0)
        stage = Stage.of(model, log_loss, data, trained=[name, "mix.bias"])
        assert [stage.names[n] for n in stage.trained] == ["words.weight", "mix.bias"]
        optimiser = SGD(0.1, groups=groups)
        path = descend(stage, optimiser, epochs=2, batch_size=5, seed=0, progress=False)
        ends.append(path.end)
        assert not torch.equal(path.start, path.end)
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match=r"groups\[0\] and groups\[1\] both name words.weight"):
        both = [{"params": "words.weight"}, {"params": "out.weight"}]
        descend(stage, SGD(0.1, groups=both), 1, 5, 0, progress=False)


# --- what is not trained -------------------------------------------------------------------------


def deep(classes: int, seed: int) -> Net:
    embedding = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
    return randomised(Net(embedding, nn.Linear(3, classes)).to(F64), seed, 0.7)


DEEP = {
    f"embedding.{layer}.{kind}": f"embedding.{layer}.{kind}"
    for layer in (0, 2)
    for kind in ("weight", "bias")
}
UPPER = ["embedding.2.weight", "embedding.2.bias", *HEAD]


@pytest.mark.parametrize("first_recipe", [None, MOMENTUM])
@pytest.mark.parametrize("recipe", [None, MOMENTUM])
def test_frozen_layers_in_both_stages(first_recipe, recipe):
    """The first layer is random for good; the finetuning trains the second and its head."""
    first, second = deep(3, 0), deep(2, 1)
    for model in (first, second):
        model.embedding[0].requires_grad_(False)
    settings = {"recipe": recipe} if recipe else {"alpha": 0.07}
    once = {"trained": UPPER, "recipe": first_recipe}
    fits = Fits(
        [
            Fit(first, examples(19, 3, 0), 0.05, weights_of(19, 0), **once),
            Fit(second, examples(14, 2, 1), 0.03, shared=DEEP, trained=UPPER, **settings),
        ],
        examples(6, 2, 9),
    )
    # requires_grad says it, or else trained= does.
    said = Chain(fits.links(trained=None), progress=False).scores(fits.test)
    for one, other in zip(said, Chain(fits.links(), progress=False).scores(fits.test), strict=True):
        assert torch.equal(one.values, other.values)
    agree(fits)


@pytest.mark.parametrize("recipe", [None, MOMENTUM])
def test_a_linear_probe_and_a_layer_of_its_own_that_stays_random(recipe):
    """The encoder is handed on; on it a fixed random layer, and a trained head."""
    probe = deep(2, 1)
    shared = {name: name for name in ("embedding.0.weight", "embedding.0.bias")}
    first = randomised(mlp(3, 4), 0)
    fits = Fits(
        [
            Fit(first, examples(19, 3, 0), 0.05, weights_of(19, 0)),
            Fit(probe, examples(14, 2, 1), 0.03, shared=shared, trained=HEAD, recipe=recipe),
        ],
        examples(6, 2, 9),
    )
    agree(fits, trained="head.*")


@pytest.mark.parametrize("recipe", [None, MOMENTUM])
def test_biases_alone(recipe):
    """Shared parameters of which some are trained and some are not, in no order."""
    biases = ["embedding.0.bias", "embedding.2.bias", *HEAD]
    fits = Fits(
        [
            Fit(deep(3, 0), examples(19, 3, 0), 0.05, weights_of(19, 0)),
            Fit(
                deep(2, 1), examples(14, 2, 1), 0.03, shared=DEEP, trained=biases, recipe=recipe,
                alpha=None if recipe else 0.07,
            ),
        ],
        examples(6, 2, 9),
    )  # fmt: skip
    agree(fits, trained=["*bias", "head.*"])


def test_trained_says_otherwise_than_requires_grad():
    model = randomised(mlp(3), 0)
    model.embedding.requires_grad_(False)
    assert Stage.of(model, log_loss, examples(8, 3, 0)).trained == (2, 3)
    assert Stage.of(model, log_loss, examples(8, 3, 0), trained="*").trained == (0, 1, 2, 3)
    two = Stage(model.embedding, model.head, log_loss, examples(8, 3, 0))
    assert two.trained == (2, 3)
    assert two.to(torch.float32).trained == (2, 3)
    assert not model.embedding[0].weight.requires_grad


# --- errors before any work ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::msif_lib.influence.StationarityWarning")
def test_a_first_stage_that_trains_nothing_that_it_hands_on():
    model = randomised(mlp(3), 0)
    model.embedding.requires_grad_(False)
    first = Stage(model.embedding, model.head, log_loss, examples(8, 3, 0))
    second = Stage(model.embedding, nn.Linear(3, 2).to(F64), log_loss, examples(8, 2, 1))
    with pytest.raises(ValueError, match=r"pretrain: nothing that it hands on to .*trained="):
        Chain([Optimum(first), Frozen(second)], progress=False)
    model.head.requires_grad_(False)
    nothing = Stage(model.embedding, model.head, log_loss, examples(8, 3, 0))
    with pytest.raises(ValueError, match="trained="):
        Chain([Optimum(nothing)], progress=False)
    with pytest.raises(ValueError, match="trained="):
        Chain([Frozen(stage_of())], progress=False)  # nothing of its own


def test_a_finetuning_in_place_has_no_embedding_to_compare_with():
    pretrain = stage_of(0, shared="embedding.*")
    tuned = Stage.of(pretrain.model, log_loss, examples(8, 3, 1), "embedding.*")
    for link in (Proximal(tuned, 0.1), Stopped(tuned, 1.0)):
        with pytest.raises(ValueError, match=r"copy.deepcopy"):
            Chain([Optimum(pretrain), link], progress=False)
    with pytest.raises(ValueError, match=r"copy.deepcopy"):
        UpdatedEmbeddingInfluence(pretrain, tuned, 0.1, progress=False)


@pytest.mark.filterwarnings("ignore::msif_lib.influence.StationarityWarning")
@pytest.mark.parametrize(
    "early", [Optimum, functools.partial(Stopped, time=1.0)], ids=["optimum", "flow"]
)
def test_no_module_of_a_stage_is_trained_later_on(early):
    """Head or embedding, by the next stage or a later one, whatever its link."""
    model = randomised(mlp(3), 0)
    embedding, head, data = model.embedding, model.head, examples(8, 3, 0)

    def refused(*links, name) -> None:
        with pytest.raises(ValueError, match=rf"trains {name}.*same module.*copy.deepcopy"):
            Chain(links, progress=False)

    first = Stage(embedding, head, log_loss, data)
    probe = Stage(embedding, head, log_loss, examples(8, 3, 1))
    refused(early(first), Frozen(probe), name="head.weight of finetune")
    other = Stage(embedding, copy.deepcopy(head), log_loss, examples(8, 3, 1))
    Chain([early(first), Frozen(other)], progress=False)
    refused(early(first), Proximal(other, 0.1), name="embedding.0.weight of tuned")

    # Two stages on: of the head that the stage between has not, and of the embedding.
    between = Stage(copy.deepcopy(embedding), copy.deepcopy(head), log_loss, examples(8, 3, 1))
    last = Stage(between.embedding, head, log_loss, examples(8, 3, 2))
    links = early(first), Proximal(between, 0.1)
    refused(*links, Frozen(last), name="head.weight of stage 2")
    again = Stage(embedding, copy.deepcopy(head), log_loss, examples(8, 3, 2))
    refused(*links, Proximal(again, 0.1), name="embedding.0.weight of stage 2")

    # A recorded training on the modules of the first.
    path = descend(again, SGD(0.1), epochs=1, batch_size=4, seed=0, progress=False)
    refused(*links, Unrolled(again, path), name="embedding.0.weight of stage 2")


def test_the_modules_of_a_recorded_training_may_be_trained_later_on():
    model, settings = randomised(mlp(3), 0), {"epochs": 2, "batch_size": 4, "progress": False}
    first = Stage.of(model, log_loss, examples(8, 3, 0))
    path1 = descend(first, SGD(0.1), seed=0, **settings)
    between = Stage.of(copy.deepcopy(model), log_loss, examples(8, 3, 1))
    path2 = descend(between, SGD(0.1), seed=1, **settings)
    model.load_state_dict(between.model.state_dict())
    last = Stage.of(model, log_loss, examples(8, 3, 2))
    path3 = descend(last, SGD(0.1), seed=2, **settings)
    for link in (Unrolled(between, path2), Stopped(between, 1.0)):
        links = [Unrolled(first, path1), link, Unrolled(last, path3)]
        given = Chain(links, progress=False).scores(examples(4, 3, 3))
        copied = Stage.of(copy.deepcopy(model), log_loss, examples(8, 3, 0))
        copied.load_vector(path1.end)
        apart = [Unrolled(copied, path1), link, Unrolled(last, path3)]
        for one, other in zip(given, Chain(apart, progress=False).scores(examples(4, 3, 3))):
            assert torch.equal(one.values, other.values) and one.values.any()


def test_a_recorded_training_must_start_where_the_stage_before_ended():
    pretrain = stage_of(0, shared="embedding.*")
    tuned = stage_of(1, shared="embedding.*")
    path = descend(tuned, SGD(0.1), epochs=1, batch_size=4, seed=0, progress=False)
    with pytest.raises(ValueError, match="path of finetune does not start at the parameters"):
        Chain([Stopped(pretrain, 1.0), Unrolled(tuned, path)], progress=False)
    smaller = stage_of(1, 2, shared="embedding.*")
    with pytest.raises(ValueError, match="a training of 30 parameters is not one of this stage"):
        Unrolled(smaller, path)
    frozen = tuned.with_trained(tuned.block("head.*"))
    with pytest.raises(ValueError, match="differ"):
        Chain([Stopped(pretrain, 1.0), Stopped(frozen, 1.0)], progress=False)


def test_a_walk_along_another_stage_s_path_is_refused():
    stage = stage_of(0)
    path = descend(stage, SGD(0.1), epochs=1, batch_size=4, seed=0, progress=False)
    for other in (
        stage.with_weights(weights_of(8, 1)),
        stage.with_data(examples(8, 3, 5)),
        Stage.of(stage.model, log_loss, examples(8, 3, 0), l2=0.1),
    ):
        chain = Chain([Unrolled(other, path)], progress=False)
        with pytest.raises(ValueError, match="the same steps lead elsewhere"):
            chain.scores(examples(4, 3, 1))


def test_chains_of_no_links():
    for links in ([], [stage_of()], [Optimum]):
        with pytest.raises(ValueError, match=r"links must be links of msif_lib.links"):
            Chain(links, progress=False)


# --- who owns which parameter: what lies in the same memory is the same --------------------------


def test_parameters_over_the_same_memory_are_found_whatever_objects_they_are():
    flat = torch.arange(12.0)
    rows, columns = flat[:6].view(2, 3), flat.view(3, 4)
    parts = [flat[6:], columns[:, :2], columns[:, 2:], torch.zeros(0), torch.zeros(3)]
    assert overlapping(parts, parts[1:3]) == [(0, 0), (0, 1), (1, 0), (2, 1)]
    assert overlapping([rows.detach()], [rows]) == [(0, 0)]
    assert overlapping([flat.to("meta")], [flat, flat.to("meta")]) == []
    assert overlapping([flat.view(torch.float64)[:1]], [flat[2:], flat[1:2]]) == [(0, 1)]


def same_memory(module: nn.Module) -> nn.Module:
    """Other Parameter objects over the same memory."""
    other = copy.deepcopy(module)
    for (_, ours), theirs in zip(other.named_parameters(), module.parameters(), strict=True):
        ours.data = theirs.data
    return other


def test_a_wrapper_around_the_memory_of_an_earlier_stage_is_no_copy():
    embedding = nn.Linear(4, 3).double()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 2
    first = Stage(embedding, nn.Linear(3, 2).double(), cross_entropy, (x, y), l2=0.1)
    second = Stage(same_memory(embedding), nn.Linear(3, 2).double(), cross_entropy, (x, y), l2=0.1)
    with pytest.raises(ValueError, match=r"hold the same module; give tuned a copy \(copy.deepc"):
        UpdatedEmbeddingInfluence(first, second, alpha=0.1)


def test_parameters_that_came_to_share_their_memory_are_noticed():
    embedding, head = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 3
    stage = Stage(embedding, head, cross_entropy, (x, y), l2=0.1)
    head.weight.data = embedding.weight.data
    with pytest.raises(ValueError, match=r"head\.weight shares its memory with embedding\.weight"):
        stage.check_module()


@pytest.mark.parametrize("mapped", [False, True])
def test_running_statistics_without_weights_belong_to_the_layer_before(mapped):
    """Frozen keeps them too, under whatever name the stage before has them."""

    def model(shift: float, name: str) -> nn.Module:
        norm = nn.BatchNorm1d(3, affine=False)
        norm.running_mean += shift
        parts = {name: nn.Sequential(nn.Linear(4, 3), norm), "last": nn.Linear(3, 2)}
        module = nn.Sequential()
        for called, part in parts.items():
            module.add_module(called, part)
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        return module.double().eval()

    data, name = (torch.randn(9, 4).double(), torch.arange(9) % 2), "backbone" if mapped else "body"
    first = Stage.of(model(0.0, name), cross_entropy, data, l2=0.1)
    shared = {"body.*": "backbone.*"} if mapped else "body.*"
    for shift in (0.0, 1.0):
        second = Stage.of(model(shift, "body"), cross_entropy, data, l2=0.1, shared=shared)
        assert set(second.shared_buffers()) == {
            f"{name}.1.{one}" for one in ("running_mean", "running_var", "num_batches_tracked")
        }
        links = [Optimum(first), Frozen(second)]
        if shift:
            with pytest.raises(ValueError, match="Frozen keeps what is shared fixed, but the buff"):
                Chain(links, stationarity_tol=float("inf"), progress=False)
        else:
            Chain(links, stationarity_tol=float("inf"), progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda named: list(named.values()), "must return .* a dict of tensors by name.* list"),
        (lambda named: None, "must return .* a dict of tensors by name.* NoneType"),
        (lambda named: dict.fromkeys(named, 1.0), "must return tensors, but 'weight' is a flo"),
    ],
)
def test_a_hand_over_that_gives_no_tensors_by_name(given, message):
    data = torch.randn(6, 3, dtype=F64), torch.arange(6) % 2
    torch.manual_seed(0)
    first = Stage.of(nn.Linear(3, 2, dtype=F64), cross_entropy, data, hands_on=given)
    second = Stage.of(copy.deepcopy(first.model), cross_entropy, data, shared="weight")
    with pytest.raises(TypeError, match="^hands_on of pretrain " + message):
        Chain([Optimum(first), Optimum(second)], progress=False)
