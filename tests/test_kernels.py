"""Attention and operations of a user's own: the right kernels, or a message that helps."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from msif_lib import Stage, cross_entropy
from msif_lib.curvature import GaussNewton, Hessian
from msif_lib.support.functional import (
    DerivativeError,
    differentiable_kernels,
    explain_missing_derivatives,
    require_second_derivatives,
)

pytestmark = pytest.mark.numeric
F64 = torch.float64
LENGTHS = torch.tensor([3, 1, 2, 3])


# --- attention ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """nn.TransformerEncoder over padded sentences, averaged over their tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, activation="gelu",
                                           batch_first=True)  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, inputs):
        x, padding = inputs["x"], inputs["padding"]
        x = self.encoder(x, src_key_padding_mask=padding)
        return x.masked_fill(padding[..., None], 0.0).sum(1)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        x, padding = inputs["x"], inputs["padding"]
        x = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return x.masked_fill(padding[..., None], 0.0).sum(1)


class Scaled(nn.Module):
    """F.scaled_dot_product_attention with a mask, or causal."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.project = nn.Linear(4, 12)

    def forward(self, inputs):
        x, padding = inputs["x"], inputs["padding"]
        query, key, value = (
            part.unflatten(2, (2, 2)).transpose(1, 2) for part in self.project(x).chunk(3, 2)
        )
        mask = None if self.causal else ~padding[:, None, None]
        x = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal)
        x = x.transpose(1, 2).flatten(2)
        return x.masked_fill(padding[..., None], 0.0).sum(1)


MODELS = {
    "encoder": Encoder,
    "multi-head": MultiHead,
    "masked": lambda: Scaled(False),
    "causal": lambda: Scaled(True),
}


def attention_stage(kind: str) -> Stage:
    torch.manual_seed(0)
    embedding, head = MODELS[kind]().to(F64).eval(), nn.Linear(4, 2).to(F64)
    x = torch.randn(4, 3, 4, dtype=F64)
    inputs = {"x": x, "padding": torch.arange(3) >= LENGTHS[:, None]}
    return Stage(embedding, head, cross_entropy, (inputs, torch.tensor([0, 1, 1, 0])), l2=0.1)


def independent_losses(stage: Stage, theta):
    """The losses without the stage's machinery, in torch's slow attention written out."""
    model = nn.Sequential(stage.embedding, stage.head)
    values, start = {}, 0
    for name, parameter in model.named_parameters():
        values[name] = theta[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    inputs, targets = stage.data
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        # Training mode keeps torch off its fused path; there is no dropout.
        outputs = functional_call(model.train(), values, (inputs,))
    model.eval()
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("kind", MODELS)
def test_attention_has_second_derivatives_and_forward_mode_by_itself(kind):
    stage = attention_stage(kind)
    theta = stage.vector()

    def objective(vector):
        penalty = 0.5 * stage.l2 * vector @ vector
        return independent_losses(stage, vector).mean() + penalty

    expected = torch.autograd.functional.hessian(objective, theta)
    torch.testing.assert_close(Hessian(stage).dense(), expected, rtol=1e-10, atol=1e-10)
    rows = torch.autograd.functional.jacobian(lambda v: independent_losses(stage, v), theta)
    directions = torch.randn(len(theta), 2, dtype=F64)
    assert stage.can.forward_mode
    got = torch.cat(list(stage.directional_derivatives(directions)))
    torch.testing.assert_close(got, rows @ directions, rtol=1e-10, atol=1e-10)
    got = torch.cat(list(stage.per_example_gradients()))
    torch.testing.assert_close(got, rows, rtol=1e-10, atol=1e-10)


def test_the_kernels_of_the_caller_are_put_back():
    stage = attention_stage("masked")

    def flags():
        cuda = torch.backends.cuda
        return (
            torch.backends.mha.get_fastpath_enabled(),
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            cuda.math_sdp_enabled(),
        )

    before = flags()
    with stage.kernels():
        inside = flags()
        stage.example_losses()
        assert flags() == inside == (False, False, False, False, True)
    assert flags() == before
    with pytest.raises(ZeroDivisionError), stage.kernels():
        raise ZeroDivisionError
    assert flags() == before


# --- operations without a derivative --------------------------------------------------------------


class Once(Function):
    """A sine whose backward is marked once_differentiable."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Backward(Function):
    """A sine with a differentiable backward, in the old form, and no jvp."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


@torch.library.custom_op("msif_tests::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


sine.register_autograd(
    lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def fused(x):
    queries = x.view(len(x), 1, 2, 2)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(queries, queries, queries)[0].reshape(x.shape)


def plain(x):
    queries = x.view(len(x), 1, 2, 2)
    weights = (queries @ queries.mT / 2**0.5).softmax(3)
    return (weights @ queries).reshape(x.shape)


def distances(x):
    return torch.cdist(x[:, None], torch.ones(1, 1, 4, dtype=F64)).flatten(1) * x


class Wrapped(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def stage_with(function) -> Stage:
    torch.manual_seed(0)
    embedding, head = Wrapped(function).to(F64), nn.Linear(4, 2).to(F64)
    data = torch.randn(5, 4, dtype=F64), torch.tensor([0, 1, 1, 0, 1])
    return Stage(embedding, head, cross_entropy, data, l2=0.1)


@pytest.mark.parametrize(
    ("function", "same"),
    [(Once.apply, torch.sin), (Backward.apply, torch.sin), (sine, torch.sin), (fused, plain)],
    ids=["once", "backward", "operator", "fused"],
)
def test_scores_without_forward_mode_are_those_by_reverse_mode(function, same):
    stage, reference = stage_with(function), stage_with(same)
    directions = torch.randn(stage.vector().shape[0], 2, dtype=F64)
    assert reference.can.forward_mode
    assert not stage.can.forward_mode
    got = torch.cat(list(stage.directional_derivatives(directions)))
    expected = torch.cat(list(reference.directional_derivatives(directions)))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weights", [[0.0, 1, 1, 2, 1], [0.0, 0, 0, 0, 0]])
def test_an_example_without_a_gradient_proves_nothing_about_forward_mode(weights):
    """The operator passes on zero tangents without a word, and zero is right for example 0."""
    torch.manual_seed(0)
    data = torch.randn(5, 4, dtype=F64), torch.tensor(weights, dtype=F64)
    stage = Stage(
        Wrapped(sine).to(F64), nn.Linear(4, 2).to(F64), lambda o, t: t * o[:, 0] ** 2, data
    )
    assert not stage.can.forward_mode


@pytest.mark.parametrize(
    ("function", "name"),
    [(fused, "_scaled_dot_product_flash_attention_for_cpu"), (distances, "_cdist_backward")],
)
def test_torchs_errors_about_second_derivatives_become_a_message_that_helps(function, name):
    stage = stage_with(function)
    (batch,) = stage.batches()
    theta = stage.vector().requires_grad_()
    loss = stage.losses(*stage.split(theta), *batch).sum()
    with pytest.raises(DerivativeError, match=f"{name}.*lacks a derivative.*replace it by"):  # noqa: SIM117
        with explain_missing_derivatives():
            (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
            torch.autograd.grad(slope.sum(), theta)


def test_a_function_differentiated_only_once_is_refused():
    stage = stage_with(Once.apply)
    (batch,) = stage.batches()
    theta = stage.vector().requires_grad_()
    losses = stage.losses(*stage.split(theta), *batch)
    with pytest.raises(DerivativeError, match=r"Once lacks a derivative.*once_differentiable"):
        require_second_derivatives(losses)
    for function in (Backward.apply, sine, torch.sin):
        other = stage_with(function)
        theta = other.vector().requires_grad_()
        require_second_derivatives(other.losses(*other.split(theta), *batch))


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^out of cheese$"), explain_missing_derivatives():
        raise RuntimeError("out of cheese")


@pytest.mark.parametrize("function", [Once.apply, fused], ids=["once", "fused"])
def test_a_hessian_says_what_lacks_a_second_derivative(function):
    with pytest.raises(DerivativeError, match="lacks a derivative that curvature needs"):
        Hessian(stage_with(function)).dense()


@pytest.mark.parametrize(
    ("function", "same"), [(Once.apply, torch.sin), (fused, plain)], ids=["once", "fused"]
)
def test_a_head_on_a_fixed_embedding_asks_nothing_of_the_embedding(function, same):
    got = Hessian(stage_with(function), block="head").dense()
    torch.testing.assert_close(got, Hessian(stage_with(same), block="head").dense())


def test_gauss_newton_says_what_lacks_a_second_derivative():
    stage = stage_with(fused)
    with pytest.raises(DerivativeError, match="_scaled_dot_product_flash_attention_for_cpu"):
        GaussNewton(stage).dense()


# --- settings of the whole process ---------------------------------------------------------------


class WithThread(nn.Module):
    """Something else is done by another thread while the model is evaluated."""

    def __init__(self, work) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.work = nn.Embedding(6, 4).to(F64), work

    def forward(self, ids):
        thread = Thread(target=self.work)
        thread.start()
        thread.join()
        return self.table(ids).sum(1).tanh()


def test_another_thread_trains_by_torchs_own_operations_meanwhile():
    table = nn.Embedding(6, 4, sparse=True)
    layer, calls, seen = nn.Linear(4, 4), [], []

    def train():
        calls.clear()
        optimiser = torch.optim.SparseAdam(table.parameters())
        with torch.enable_grad():
            for reentrant in (True, False):
                rows = table(torch.tensor([1, 1, 2]))
                h = checkpoint(lambda x: calls.append(1) or layer(x), rows, use_reentrant=reentrant)
                h.sum().backward()
        seen.append((table.weight.grad.is_sparse, len(calls)))  # once forward, once backward
        optimiser.step()
        table.weight.grad = None

    ids = torch.randint(6, (5, 3), generator=torch.Generator().manual_seed(0))
    stage = Stage.of(WithThread(train), cross_entropy, (ids, ids[:, 0] % 2), check=False)
    stage.gradient()
    assert seen and set(seen) == {(True, 4)}


def settings():
    cuda = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(), cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled,
        torch.backends.cudnn.allow_tf32, torch.embedding,
    )  # fmt: skip


def test_the_first_thread_to_finish_leaves_the_kernels_that_another_needs():
    """Entered by two, left in the order of entry, the settings are the user's only at the end."""
    before = settings()
    first, second = (differentiable_kernels(True) for _ in range(2))
    with ThreadPoolExecutor(1) as other:
        other.submit(first.__enter__).result()
        with second:
            within = settings()
            other.submit(first.__exit__, None, None, None).result()
            assert settings() == within != before
    assert settings() == before


def test_recurrent_layers_are_evaluated_without_a_warning():
    torch.manual_seed(0)
    layer = nn.LSTM(3, 2, batch_first=True)
    layer.forward = lambda x, f=layer.forward: f(x)[0][:, -1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stage.of(layer, cross_entropy, (torch.randn(5, 2, 3), torch.tensor([0, 1, 0, 1, 1])))


def test_a_compiled_module_is_refused_with_the_one_to_take():
    """Its backward gives buffers away that a second derivative would read."""
    said = "This backward function was compiled with non-empty donated buffers which requires"
    words = r"lacks a derivative.*_orig_mod"
    with pytest.raises(DerivativeError, match=words), explain_missing_derivatives():
        raise RuntimeError(said)
