"""The language model: against torch's LSTM, against its plain form, and as a stage."""

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from msif_lib import Stage, cross_entropy
from msif_lib.curvature import Hessian
from msif_lib.study.models.language import (
    PADDING,
    SIZES,
    UNKNOWN,
    Chains,
    LanguageModel,
    SentenceClassifier,
    Sizes,
    TokenPredictor,
    Vocabulary,
    encode_characters,
    language_loss,
)
from msif_lib.study.models.recurrence import chains, chains_plainly
from msif_lib.support.functional import DerivativeError

F64 = torch.float64
SENTENCES = [["a", "bc", "d"], ["bc"], ["a", "d", "d", "é", "bc"], ["d", "a"]]
SMALL = Sizes(2, ((1, 2), (2, 3)), 1, 3, 4)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the recurrence -------------------------------------------------------------------------------


def recurrence_inputs(steps=4, examples=3, cells=5, projection=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (2, steps, examples, 4 * cells),
        (2, 4 * cells, projection),
        (2, projection, cells),
    )
    return tuple(torch.randn(*shape, generator=generator, dtype=F64) for shape in shapes)


def functional_of(recurrence, parts):
    """A scalar function of all inputs of a recurrence, as one vector."""
    sizes = [part.numel() for part in parts]

    def value(vector):
        pieces = vector.split(sizes)
        states = recurrence(*(x.view(part.shape) for x, part in zip(pieces, parts, strict=True)))
        weights = torch.arange(1.0, states.numel() + 1, dtype=F64).view(states.shape).cos()
        return (weights * (states + states**2)).sum()

    return value


def double_backward(function, x, v):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(slope @ v, x)[0]


DERIVATIVES = {
    "gradient": lambda f, x, v: grad(f)(x),
    "forward mode": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "double backward": double_backward,
    "forward over reverse": lambda f, x, v: jvp(grad(f), (x,), (v,))[1],
    "reverse over forward": lambda f, x, v: grad(lambda x: jvp(f, (x,), (v,))[1])(x),
    "third": lambda f, x, v: grad(lambda x: grad(lambda y: grad(f)(y) @ v)(x) @ v)(x),
    "hessian": lambda f, x, v: hessian(f)(x),
    "many": lambda f, x, v: vmap(grad(f))(torch.stack([x, v, x - v])),
    "many products": lambda f, x, v: vmap(lambda u: jvp(grad(f), (x,), (u,))[1])(
        torch.stack([x, v])
    ),
}


@pytest.mark.parametrize("which", DERIVATIVES)
def test_written_out_derivatives_are_those_of_the_plain_recurrence(which):
    parts = recurrence_inputs()
    x = torch.cat([part.flatten() for part in parts])
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    ours = functional_of(chains, parts)
    plain = functional_of(lambda *inputs: chains_plainly(*inputs)[0], parts)
    close(ours(x), plain(x))
    close(DERIVATIVES[which](ours, x, v), DERIVATIVES[which](plain, x, v))


def test_forward_mode_over_forward_mode_is_refused():
    # torch would pass zero for the outer tangent without a word.
    parts = recurrence_inputs()
    x = torch.cat([part.flatten() for part in parts])
    f = functional_of(chains, parts)
    with pytest.raises(DerivativeError, match="forward mode over forward mode"):
        jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,))


def reordered(weight):
    """From torch's order of gates (input, forget, cell, output) to ours."""
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, f, o, g])


def from_torch(lstm: nn.LSTM) -> Chains:
    """One layer of two chains with the weights of a bidirectional ``nn.LSTM``."""
    ours = Chains(lstm.input_size, lstm.hidden_size, lstm.proj_size).to(F64)
    with torch.no_grad():
        for chain, suffix in enumerate(("l0", "l0_reverse")):
            theirs = {name: getattr(lstm, f"{name}_{suffix}") for name in
                      ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")}  # fmt: skip
            ours.input_weight[chain] = reordered(theirs["weight_ih"])
            ours.state_weight[chain] = reordered(theirs["weight_hh"])
            ours.bias[chain] = reordered(theirs["bias_ih"] + theirs["bias_hh"])
            ours.projection_weight[chain] = theirs["weight_hr"]
    return ours


def bidirectional(layer: Chains, x, lengths):
    """A layer as ``nn.LSTM(bidirectional=True)`` runs it, by the model's own forward."""
    model = LanguageModel(Sizes(2, ((1, 2),), 0, x.shape[2], 4, 0), dtype=F64)
    model.tokens = nn.Identity()
    model.layers = nn.ModuleList([layer])
    return model({"characters": x, "lengths": lengths})["layers"][:, :, 1]


def test_values_and_gradients_are_those_of_torch_on_packed_sentences():
    torch.manual_seed(0)
    lengths = torch.tensor([4, 1, 3])
    theirs = nn.LSTM(3, 5, proj_size=3, bidirectional=True, batch_first=True).to(F64)
    ours = from_torch(theirs)
    x = torch.randn(3, 4, 3, dtype=F64)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected = pad_packed_sequence(theirs(packed)[0], batch_first=True)[0]
    got = bidirectional(ours, x, lengths)
    real = (torch.arange(4) < lengths[:, None])[..., None]
    close(torch.where(real, got, 0.0), expected)
    weights = torch.randn(expected.shape, dtype=F64)
    (weights * expected).sum().backward()
    (weights * torch.where(real, got, 0.0)).sum().backward()
    for chain, suffix in enumerate(("l0", "l0_reverse")):
        for mine, name in (
            (ours.input_weight, "weight_ih"),
            (ours.state_weight, "weight_hh"),
            (ours.bias, "bias_ih"),
        ):
            close(mine.grad[chain], reordered(getattr(theirs, f"{name}_{suffix}").grad))
        gradient = getattr(theirs, f"weight_hr_{suffix}").grad
        close(ours.projection_weight.grad[chain], gradient)


def test_clipping_bounds_the_outputs_and_one_out_of_reach_changes_nothing():
    torch.manual_seed(0)
    layer = Chains(3, 8, 3).to(F64)
    with torch.no_grad():
        layer.projection_weight.mul_(20)
    x = torch.randn(2, 5, 3, 3, dtype=F64)
    free = layer(x)
    layer.clip = 1e6
    close(layer(x), free)
    layer.clip = 0.5
    assert free.abs().max() > 0.5
    assert layer(x).abs().max() == 0.5


# --- the model ------------------------------------------------------------------------------------


def test_the_full_size_is_that_of_the_published_elmo():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in LanguageModel(sizes).parameters())
            for name, sizes in SIZES.items()
        }
    assert counts["elmo"] == 93_600_864
    assert counts["tiny"] < counts["small"] < counts["middle"] < counts["elmo"]


def test_a_seed_gives_one_model_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    models = [LanguageModel(SMALL, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_padding_changes_neither_features_nor_losses():
    model = LanguageModel(SMALL, dtype=F64)
    vocabulary = Vocabulary(SENTENCES)
    head = TokenPredictor(3, len(vocabulary), dtype=F64)
    classifier = SentenceClassifier(3, dtype=F64)
    with torch.no_grad():
        classifier.mix.copy_(torch.tensor([0.3, -1.0, 2.0]))
    together = model(encode_characters(SENTENCES, 6))
    losses = language_loss(head(together), vocabulary.encode(SENTENCES))
    logits = classifier(together)
    for index, sentence in enumerate(SENTENCES):
        alone = model(encode_characters([sentence], 6))
        count = len(sentence) + 2
        close(together["layers"][index, :count], alone["layers"][0])
        close(losses[index], language_loss(head(alone), vocabulary.encode([sentence]))[0])
        close(logits[index], classifier(alone)[0])


def test_a_smooth_encoder_is_its_formula_written_out():
    encoder = LanguageModel(SMALL, dtype=F64, smooth=True).tokens
    characters = encode_characters([["abc"]], 6)["characters"][0, 1]
    x = encoder.characters(characters).T
    widest = []
    for layer in encoder.convolutions:
        span = layer.kernel_size[0]
        windows = x.unfold(1, span, 1)  # (width, positions, span)
        responses = torch.einsum("fws,wps->fp", layer.weight, windows) + layer.bias[:, None]
        widest.append(responses.exp().mean(1).log())
    value = torch.cat(widest).tanh()
    (highway,) = encoder.highways
    new, carry = (highway.weight @ value + highway.bias).chunk(2)
    value = carry.sigmoid() * value + (1 - carry.sigmoid()) * new.tanh()
    close(encoder(characters[None])[0], encoder.projection(value))


def test_each_chain_sees_only_its_side():
    model = LanguageModel(SMALL, dtype=F64)
    inputs = encode_characters([["a", "b", "c"], ["a", "x", "c"]], 6)
    left, right = model(inputs)["layers"][:, :, -1].chunk(2, 2)
    changed = 2  # the token that differs, after the start
    close(left[0, :changed], left[1, :changed])
    close(right[0, changed + 1 :], right[1, changed + 1 :])
    assert not torch.allclose(left[0, changed:], left[1, changed:])
    assert not torch.allclose(right[0, : changed + 1], right[1, : changed + 1])


def test_the_loss_is_the_mean_over_both_directions_written_out():
    vocabulary = Vocabulary(SENTENCES)
    targets = vocabulary.encode(SENTENCES)
    count, length = targets.shape
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(count, length - 1, 2, len(vocabulary), generator=generator, dtype=F64)
    logs = outputs.log_softmax(3)
    expected = []
    for n, sentence in enumerate(SENTENCES):
        terms = []
        for t in range(len(sentence) + 1):
            terms.append(-logs[n, t, 0, targets[n, t + 1]])
            terms.append(-logs[n, t, 1, targets[n, t]])
        expected.append(torch.stack(terms).mean())
    close(language_loss(outputs, targets), torch.stack(expected))


def stages():
    vocabulary = Vocabulary(SENTENCES)
    inputs = encode_characters(SENTENCES, 6)
    embedding = LanguageModel(SMALL, dtype=F64)
    head = TokenPredictor(3, len(vocabulary), dtype=F64)
    pretrain = Stage(embedding, head, language_loss, (inputs, vocabulary.encode(SENTENCES)), l2=0.1)
    labels = torch.tensor([0, 1, 0, 1])
    classifier = SentenceClassifier(3, hidden=4, dtype=F64)
    finetune = Stage(embedding, classifier, cross_entropy, (inputs, labels), l2=0.1)
    return pretrain, finetune


@pytest.mark.parametrize("which", [0, 1])
def test_as_a_stage_scores_and_products_are_those_of_plain_differentiation(which):
    stage = stages()[which]
    (batch,) = stage.batches()
    theta = stage.vector().requires_grad_()

    def losses(vector):
        return stage.losses(*stage.split(vector), *batch)

    # Reverse mode alone, an example at a time.
    rows = torch.stack(
        [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses(theta)]
    )
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=F64)
    assert stage.can.forward_mode
    close(torch.cat(list(stage.directional_derivatives(v[:, None])))[:, 0], rows @ v)
    close(torch.cat(list(stage.per_example_gradients())), rows)

    def slope(shift):
        return torch.autograd.grad(losses(theta + shift * v).mean(), theta)[0]

    # Fourth-order differences of the gradient: the model is smooth at this point.
    step = 1e-3
    ends = [slope(k * step) for k in (-2, -1, 1, 2)]
    expected = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * step) + stage.l2 * v
    close(Hessian(stage) @ v, expected, 1e-8)


def test_a_vocabulary_orders_by_frequency_and_knows_what_it_lacks():
    vocabulary = Vocabulary(SENTENCES, size=6)
    assert vocabulary.tokens == ["<pad>", "<S>", "</S>", "<UNK>", "d", "a"]
    ids = vocabulary.encode([["a", "d"], ["zebra"]])
    assert ids.tolist() == [[1, 5, 4, 2], [1, UNKNOWN, 2, PADDING]]
    with pytest.raises(ValueError, match="size must exceed the 4 special entries, not 4"):
        Vocabulary(SENTENCES, size=4)


def test_characters_are_bytes_between_boundaries():
    encoded = encode_characters([["é", "abcdef"], []], characters=5)
    assert encoded["lengths"].tolist() == [4, 2]
    start, accented, long, end = encoded["characters"][0].tolist()
    assert start == [259, 257, 260, 261, 261]
    assert accented == [259, 0xC3 + 1, 0xA9 + 1, 260, 261]
    assert long == [259, ord("a") + 1, ord("b") + 1, ord("c") + 1, 260]
    assert end == [259, 258, 260, 261, 261]
    assert encoded["characters"][1, 2:].eq(0).all()
    with pytest.raises(ValueError, match="characters must be at least 3, not 2"):
        encode_characters(SENTENCES, characters=2)
