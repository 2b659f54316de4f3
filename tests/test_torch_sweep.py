"""What torch.nn offers, and models made of it: right to finite differences, or refused by name.

Every public class of torch.nn and every public function of torch.nn.functional is in the sweep, or
stands below with the reason why not. What is refused is written down: a new silent fault fails as
a new false refusal does.
"""

from __future__ import annotations

import inspect

import pytest
import sweep_functions
import sweep_layers
import sweep_models
import torch
import torch.nn.functional as F
from sweep import Call, judge, log_loss, squashed
from torch import Tensor, nn

from msif_lib import Stage

pytestmark = [
    pytest.mark.filterwarnings("error::msif_lib.support.probe.DerivativeWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap's fallback
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # checkpoint's
]

MODELS = sweep_models.cases()
CASES = {**sweep_layers.cases(), **sweep_functions.cases(), **MODELS}

# Refused when a stage is made.
REFUSED = frozenset(
    {
        "AlphaDropout training",
        "BatchNorm1d cumulative training",
        "BatchNorm1d training",
        "BatchNorm1d without statistics",
        "BatchNorm2d training",
        "BatchNorm2d without statistics",
        "BatchNorm3d training",
        "BatchNorm3d without statistics",
        "CrossMapLRN2d",
        "Dropout inplace training",
        "Dropout training",
        "Dropout1d training",
        "Dropout2d training",
        "Dropout3d training",
        "Embedding max_norm",
        "Embedding scale_grad_by_freq",
        "EmbeddingBag max max_norm",
        "EmbeddingBag mean max_norm",
        "EmbeddingBag mean scale_grad_by_freq",
        "EmbeddingBag sum max_norm",
        "EmbeddingBag sum scale_grad_by_freq",
        "F.alpha_dropout training",
        "F.batch_norm training",
        "F.cross_entropy averaged over the batch",
        "F.dropout training",
        "F.dropout1d training",
        "F.dropout2d training",
        "F.dropout3d training",
        "F.embedding scaled",
        "F.feature_alpha_dropout training",
        "F.fractional_max_pool2d",
        "F.fractional_max_pool3d_with_indices",
        "F.gumbel_softmax",
        "F.gumbel_softmax hard",
        "F.native_channel_shuffle",
        "F.rrelu training",
        "F.rrelu_ training",
        "F.scaled_dot_product_attention dropout",
        "FeatureAlphaDropout training",
        "FractionalMaxPool2d",
        "FractionalMaxPool3d",
        "GRU dropout training",
        "LSTM dropout training",
        "LinearCrossEntropyOptions",
        "MultiheadAttention dropout training",
        "RNN dropout training",
        "RReLU inplace training",
        "RReLU training",
        "SyncBatchNorm training",
        "TransformerEncoderLayer dropout training",
        "encoder without a graph",
        "parametrizations.spectral_norm training",
        "self-distillation",
        "spectral_norm training",
        "straight-through rounding",
        "torch.bernoulli",
        "torch.distributions rsample",
        "torch.multinomial",
        "torch.randn_like",
        "torch.special.airy_ai",
        "torch.special.bessel_j0",
        "torch.special.bessel_j1",
        "torch.special.bessel_y0",
        "torch.special.bessel_y1",
        "torch.special.gammainc of both",
        "torch.special.hermite_polynomial_h",
        "torch.special.modified_bessel_k0",
        "torch.special.modified_bessel_k1",
        "torch.special.spherical_bessel_j0",
    }
)
# Of torch's kernels those without a second derivative: curvature is refused, the rest is right.
ONCE_DIFFERENTIABLE = frozenset(
    {
        "CTCLoss",
        "EmbeddingBag max",
        "EmbeddingBag max padded",
        "EmbeddingBag mean",
        "EmbeddingBag mean padded",
        "EmbeddingBag mean sparse",
        "EmbeddingBag sum",
        "EmbeddingBag sum padded",
        "EmbeddingBag sum sparse",
        "EmbeddingBag weighted",
        "EmbeddingBag weights from features",
        "F.ctc_loss",
        "F.embedding_bag",
        "F.pdist",
        "F.pdist 1",
        "Hardsigmoid",
        "Hardsigmoid inplace",
        "MultiLabelMarginLoss",
        "MultiMarginLoss",
        "MultiMarginLoss squared",
        "torch.cdist",
        "torch.cdist 1",
        "torch.segment_reduce",
    }
)

NOT_SWEPT = {
    "Buffer": "in the case of a module with a buffer",
    "Container": "another name of Module",
    "NLLLoss2d": "another name of NLLLoss",
    "Parameter": "in every case",
    "RNNBase": "abstract",
    "RNNCellBase": "abstract",
    "UninitializedBuffer": "in the test of lazy layers",
    "UninitializedParameter": "in the test of lazy layers",
    "assert_int_or_pair": "no function of tensors",
    "boolean_dispatch": "no function of tensors",
    "grouped_mm": "not in double precision",
    "handle_torch_function": "no function of tensors",
    "has_torch_function": "no function of tensors",
    "has_torch_function_unary": "no function of tensors",
    "has_torch_function_variadic": "no function of tensors",
    "scaled_grouped_mm": "eight bits",
    "scaled_mm": "eight bits",
    "upsample_bilinear": "another name of interpolate",
    "upsample_nearest": "another name of interpolate",
}


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused_by_name(name: str) -> None:
    expected = "refused" if name in REFUSED else "right"
    if name in ONCE_DIFFERENTIABLE:
        expected = "once differentiable"
    assert judge(CASES[name], trained=name in MODELS) == expected


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("straight-through rounding", "'gradient'"),
        ("torch.special.bessel_j0", "'gradient'"),
        ("parametrizations.spectral_norm training", "'Hessian'"),
        ("F.batch_norm training", "'losses'"),
        ("torch.randn_like", "changed"),
    ],
)
def test_the_sweep_sees_what_a_stage_without_checks_lets_pass(name: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        judge(CASES[name], check=False)


# --- nothing left out ------------------------------------------------------------------------


def common(name: str) -> str:
    """What a class and the function that it calls are both called."""
    return squashed(name).removesuffix("withindices").removesuffix("loss")


def public(module: object, kind: object) -> set[str]:
    found = {name for name in dir(module) if not name.startswith("_")}
    return {name for name in found if kind(getattr(module, name))}


def left_out(names: set[str]) -> set[str]:
    """Those of these names of torch.nn or torch.nn.functional that no case is about."""
    swept = {name.split()[0] for name in CASES}
    layers = {common(name).removesuffix(end) for name in swept for end in ("", "1d")}
    return {
        name
        for name in names
        if f"F.{name}" not in swept and common(name) not in layers and name not in NOT_SWEPT
    }


def is_function(value: object) -> bool:
    return inspect.isroutine(value) and not inspect.isclass(value)


def test_every_public_class_and_function_is_swept_or_excused() -> None:
    classes, functions = public(nn, inspect.isclass), public(F, is_function)
    assert len(classes) > 150 and len(functions) > 120
    assert not left_out(classes | functions)
    assert left_out({"Hardswash", "hard_swash"}) == {"Hardswash", "hard_swash"}


def test_a_lazy_layer_that_has_met_no_features_is_refused_by_name() -> None:
    case = CASES["LazyLinear"]
    data = case.data()
    lazy = nn.Sequential(nn.Linear(2, 4), nn.LazyLinear(2)).double()
    with pytest.raises(ValueError, match=r"embedding\.1\.weight.*has no shape yet"):
        Stage(lazy, nn.Linear(2, 2).double(), case.loss, data)


def test_a_slope_that_is_not_a_number_is_refused_by_its_example() -> None:
    torch.manual_seed(0)

    def rooted(x: Tensor) -> Tensor:
        return torch.where(x > 0, x.sqrt(), 0.3 * x)  # finite, and 0 · inf backwards

    embedding, data = nn.Sequential(nn.Linear(2, 4), Call(rooted)).double(), CASES["Tanh"].data()
    with pytest.raises(ValueError, match=r"gradient .*example \d is not finite"):
        Stage(embedding, nn.Linear(4, 2).double(), log_loss, data).gradient()


def test_units_that_stand_exactly_at_a_bend_are_no_fault() -> None:
    # Half black pictures: convolutions without bias are 0 there, and so is torch's slope of ReLU.
    torch.manual_seed(0)
    pictures = torch.randn(6, 1, 4, 4).double()
    pictures[:, :, 2:] = 0
    embedding = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Flatten()).double()
    head, targets = nn.Linear(18, 2).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    stage = Stage(embedding, head, log_loss, (pictures, targets))
    log_loss(head(embedding(pictures)), targets).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in (*embedding.parameters(), *head.parameters())])
    assert torch.allclose(stage.gradient(), expected, rtol=1e-12, atol=1e-15)
