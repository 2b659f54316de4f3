"""The probe at a stage's construction: faults are refused by name, or right; clean models pass."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from msif_lib import Stage, cross_entropy
from msif_lib.curvature import GaussNewton, Hessian
from msif_lib.support.functional import DerivativeError

pytestmark = pytest.mark.numeric
F64 = torch.float64


def data(dtype=F64, seed=0):
    chance = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 3, generator=chance, dtype=dtype)
    return inputs, torch.randint(2, (12,), generator=chance)


class Wrapped(nn.Module):
    """A layer, a function of its output, and another layer."""

    def __init__(self, function, dtype=F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4).to(dtype), nn.Linear(4, 4).to(dtype)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x))).tanh()


def stage_of(embedding, examples=None, dtype=F64, **settings) -> Stage:
    torch.manual_seed(1)
    examples = data(dtype) if examples is None else examples
    return Stage(embedding, nn.Linear(4, 2).to(dtype), cross_entropy, examples, l2=0.1, **settings)


def differences(stage, step=1e-4):
    """Gradient and Hessian of the objective, by differences of its values alone."""
    theta, size = stage.vector(), len(stage.vector())
    steps = step * torch.eye(size, dtype=F64)
    points = [(a, b) for a in range(size) for b in range(a, size)]
    value = stage.objective
    gradient = torch.stack([(value(theta + v) - value(theta - v)) / (2 * step) for v in steps])
    hessian = torch.zeros(size, size, dtype=F64)
    for a, b in points:
        v, u = steps[a], steps[b]
        up, down = (value(theta + v + s * u) - value(theta - v + s * u) for s in (1, -1))
        hessian[a, b] = hessian[b, a] = (up - down) / (4 * step**2)
    return gradient, hessian


def assert_right(stage):
    """Gradient, Hessian and per-example derivatives are those of the losses."""
    gradient, hessian = differences(stage)
    torch.testing.assert_close(stage.gradient(), gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(Hessian(stage).dense(), hessian, rtol=1e-4, atol=1e-5)
    v = torch.randn(len(gradient), 1, dtype=F64)
    forward = torch.cat(list(stage.directional_derivatives(v)))
    reverse = torch.cat(list(stage.per_example_gradients())) @ v
    torch.testing.assert_close(forward, reverse)
    matrix = GaussNewton(stage).dense()
    torch.testing.assert_close(matrix, matrix.T)


# --- what torch differentiates as another function is made right ----------------------------------


class Checkpointed(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how = nn.Linear(3, 4).to(F64), how

    def forward(self, x):
        return self.how(lambda z: self.linear(z).tanh(), x)


CHECKPOINTS = {
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "non-reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "sequential": lambda f, x: checkpoint_sequential([f, torch.sin], 2, x, use_reentrant=True),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointed_activations_are_differentiated_as_the_plain_call(kind):
    assert_right(stage_of(Checkpointed(CHECKPOINTS[kind])))


def test_checkpoints_are_torchs_own_outside_of_evaluations():
    stage = stage_of(Checkpointed(CHECKPOINTS["reentrant"]))
    stage.gradient()
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    found = [getattr(torch.utils.checkpoint, name) for name in names]
    assert all(one.__module__ == "torch.utils.checkpoint" for one in found)
    assert torch.embedding.__name__ == "embedding"
    assert type(torch.embedding) is type(torch.addmm)


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_has_its_second_derivatives(norm):
    torch.manual_seed(0)
    assert_right(stage_of(nn.Sequential(norm(nn.Linear(3, 4).to(F64)), nn.Tanh())))


IDS = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 1, 2], [2, 2, 0], [5, 4, 3], [1, 0, 0]])


class Table(nn.Module):
    def __init__(self, kind=nn.Embedding, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = kind(6, 4, **settings).to(F64)
        nn.init.normal_(self.table.weight)

    def forward(self, ids):
        rows = self.table(ids)
        return (rows.sum(1) if rows.dim() == 3 else rows).tanh()


TARGETS = torch.tensor([0, 1, 1, 0, 1, 0])


def test_sparse_gradients_are_dense_within():
    assert_right(stage_of(Table(sparse=True), (IDS, TARGETS)))
    stage_of(Table(nn.EmbeddingBag, mode="sum", sparse=True), (IDS, TARGETS)).gradient()


def test_a_padding_row_is_a_constant_in_both_modes():
    """Against a table without such an index, the row taken out of the vector."""
    stage, plain = (stage_of(Table(padding_idx=i), (IDS, TARGETS)) for i in (0, None))
    plain.load_vector(stage.vector())
    kept = torch.arange(len(stage.vector())) >= 4  # the padding row comes first
    for of in (Hessian, GaussNewton):
        got, whole = of(stage).dense(), of(plain).dense()
        torch.testing.assert_close(got, got.T)
        torch.testing.assert_close(got[kept][:, kept], whole[kept][:, kept])
        torch.testing.assert_close(got[~kept][:, kept], torch.zeros_like(got[~kept][:, kept]))
    v = torch.randn(len(kept), 1, dtype=F64)
    got = torch.cat(list(stage.directional_derivatives(v)))
    want = torch.cat(list(plain.directional_derivatives(v * kept[:, None])))
    torch.testing.assert_close(got, want)


class Tied(nn.Module):
    """A table whose transpose is the output layer: its padding row is moved by that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 4, padding_idx=0).to(F64)
        nn.init.normal_(self.table.weight)

    def forward(self, ids):
        return self.table(ids).sum(1).tanh() @ self.table.weight.T


def test_a_padding_row_that_is_used_elsewhere_passes():
    stage = Stage.of(Tied(), cross_entropy, (IDS, TARGETS), l2=0.1)
    assert stage.gradient()[:4].any()


# --- what is refused ------------------------------------------------------------------------------


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4).to(F64)

    @torch.no_grad()
    def forward(self, x):
        return self.linear(x).tanh()


class Wrong(Function):
    """A sine whose backward is off by 5 %."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return 1.05 * gradient * ctx.saved_tensors[0].cos()


class WrongTwice(Function):
    """A sine whose backward computes with detached numbers."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].detach().cos()


class Straight(Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def straight(x):
    return x + ((x * 4).round() / 4 - x).detach()


def quantised(x):
    return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype)


FAULTS = {
    "detach": (lambda x: x.detach(), r"no gradient reaches it"),
    "no_grad": (torch.no_grad()(torch.sin), r"no gradient reaches it"),
    "numpy": (
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())),
        r"no gradient reaches it",
    ),
    "half": (lambda x: x.sin() + 0.5 * x.detach(), r"gradient of the losses in .* is off by"),
    "backward": (Wrong.apply, r"gradient of the losses in .* is off by .*Functions.*Wrong\)"),
    "twice": (WrongTwice.apply, r"second derivatives of the losses along .*WrongTwice\)"),
    "straight": (straight, r"nothing changes along it.*straight-through"),
    "straight function": (Straight.apply, r"Functions.*Straight\).*straight-through"),
    "quantised": (quantised, r"nothing changes along it.*straight-through"),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_derivative_that_the_losses_have_not_is_refused(kind, dtype):
    function, words = FAULTS[kind]
    with pytest.raises(DerivativeError, match=words) as refusal:
        stage_of(Wrapped(function, dtype), dtype=dtype)
    assert "embedding.first." in str(refusal.value)
    assert "embedding.second." not in str(refusal.value)
    stage_of(Wrapped(function, dtype), dtype=dtype, check="data")


def test_an_encoder_under_no_grad_is_refused():
    with pytest.raises(DerivativeError, match=r"embedding\.linear\..*no gradient reaches"):
        stage_of(NoGrad())
