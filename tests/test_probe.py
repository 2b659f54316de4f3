"""The probe at a stage's construction: faults are refused by name, or right; clean models pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.curvature import GaussNewton, Hessian
from msif_lib.links import Frozen, Optimum
from msif_lib.support.functional import DerivativeError
from msif_lib.support.probe import DerivativeWarning

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


class Float32(nn.Module):
    """Computes in single precision whatever it is given, so that nothing can be more exact."""

    def __init__(self, function) -> None:
        super().__init__()
        self.inner = Wrapped(function, torch.float32)

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.inner(x)


@pytest.mark.parametrize("kind", ["detach", "half", "backward", "straight function"])
def test_faults_are_found_in_single_precision_alone(kind):
    function, words = FAULTS[kind]
    with pytest.raises(DerivativeError, match=words):
        stage_of(Float32(function), dtype=torch.float32)


class Halved(nn.Module):
    """Rounds to half precision on the way, which is no straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(x).to(torch.bfloat16).tanh().to(x.dtype)


def test_rounding_to_a_shorter_dtype_is_no_fault():
    stage_of(Halved(), dtype=torch.float32)
    stage_of(Wrapped(lambda x: x.float().sin().to(x.dtype)))
    torch.manual_seed(0)
    half = nn.Linear(3, 4).to(torch.bfloat16)
    stage_of(half, dtype=torch.bfloat16)


GETTERS = {"list": lambda p: p[0], "dict": lambda p: p["b"], "closure": lambda p: p()}


class Pieces(nn.Module):
    """Parameters that a list, a dict or a closure holds as well."""

    def __init__(self, held) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 4, dtype=F64))
        self.b = nn.Parameter(torch.randn(4, 4, dtype=F64))
        b = self.b
        holders = {"list": [b], "dict": {"b": b}, "closure": lambda: b}
        self.held, self.get = holders[held], GETTERS[held]

    def forward(self, x):
        return ((x @ self.a).tanh() @ self.get(self.held)).tanh()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("held", ["list", "dict", "closure"])
def test_a_parameter_read_from_elsewhere_than_its_attribute_is_refused(held, frozen):
    model = Pieces(held)
    model.b.requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"reads embedding\.b from elsewhere.*ParameterList"):
        stage_of(model)
    assert model.b.requires_grad is not frozen
    assert model.b.grad is None


class Output(nn.Module):
    """A head that multiplies by the embedding's weight, got as it says."""

    def __init__(self, get) -> None:
        super().__init__()
        self.get, self.bias = get, nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, h):
        return h @ self.get() + self.bias


def test_a_head_that_reads_the_embedding_by_a_closure_is_refused():
    embedding = nn.Linear(3, 4).to(F64)
    examples = data()
    with pytest.raises(ValueError, match=r"reads embedding\.weight from elsewhere"):
        parameter = embedding.weight
        Stage(embedding, Output(lambda: parameter), cross_entropy, examples)
    with pytest.raises(ValueError, match=r"head reads parameters of the embedding.*Stage\.of"):
        Stage(embedding, Output(lambda: embedding.weight), cross_entropy, examples)
    held = Output(None)
    held.table = embedding
    held.get = lambda: held.table.weight
    assert_right(Stage(embedding, held, cross_entropy, examples, l2=0.1))


def test_a_loss_that_reads_a_parameter_is_refused():
    head = nn.Linear(4, 2).to(F64)

    def loss(outputs, targets):
        return cross_entropy(outputs, targets) + head.weight.square().sum()

    with pytest.raises(ValueError, match=r"the model or its loss reads head\.weight"):
        Stage(nn.Linear(3, 4).to(F64), head, loss, data())


# --- regularizers ---------------------------------------------------------------------------------


def with_regularizer(function, head=None):
    torch.manual_seed(0)
    head = head or nn.Linear(4, 2).to(F64)
    return Stage(nn.Linear(3, 4).to(F64), head, cross_entropy, data(), regularizer=function)


HEAD = nn.Linear(4, 2).to(F64)
REGULARIZERS = {
    "name": (lambda p: p["weight"].sum(), ValueError, "regularizer fails on the named.*KeyError"),
    "vector": (lambda p: p["head.weight"].square().sum(1), ValueError, r"scalar.*\(2,\)"),
    "one": (lambda p: p["head.bias"].square().sum().view(1), ValueError, r"scalar.*\(1,\)"),
    "number": (lambda p: 1.0, ValueError, "scalar tensor.*not float"),
    "infinite": (lambda p: p["head.bias"].sum().mul(0).log(), ValueError, "not finite"),
    "closure": (
        lambda p: HEAD.weight.square().sum(),
        ValueError,
        r"regularizer reads head\.weight",
    ),
    "both": (
        lambda p: (HEAD.weight * p["head.weight"]).sum(),
        ValueError,
        r"regularizer reads head\.weight from elsewhere",
    ),
    "detached": (
        lambda p: p["head.weight"].detach().square().sum() + p["head.bias"].square().sum(),
        DerivativeError,
        r"the regularizer depend.* on head\.weight, but no gradient",
    ),
    "wrong": (
        lambda p: Wrong.apply(p["embedding.weight"]).sum(),
        DerivativeError,
        r"gradient of the regularizer in embedding\.weight is off by",
    ),
    "twice": (
        lambda p: WrongTwice.apply(p["head.bias"]).sum(),
        DerivativeError,
        r"second derivatives of the regularizer along head\.bias",
    ),
}


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_a_regularizer_is_tried_when_the_stage_is_made(kind):
    function, error, words = REGULARIZERS[kind]
    with pytest.raises(error, match=words):
        with_regularizer(function, HEAD)


def test_regularizers_with_kinks_or_of_some_parameters_pass():
    stage = with_regularizer(lambda p: p["head.weight"].abs().sum() + p["head.bias"].norm())
    assert stage.gradient().isfinite().all()
    nought = nn.Linear(4, 2).to(F64)
    nn.init.zeros_(nought.weight)
    with_regularizer(lambda p: p["head.weight"].abs().sum(), nought)
    with_regularizer(lambda p: p["head.weight"].square().sum() ** 2, nought)


# --- what is trained without effect, what is not trained ------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank adapter that may be merged into it."""

    def __init__(self, merged) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4).to(F64)
        self.down = nn.Parameter(torch.randn(3, 2, dtype=F64))
        self.up = nn.Parameter(torch.zeros(2, 4, dtype=F64))
        self.merged = merged

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + x @ self.down @ self.up


def test_a_merged_adapter_is_warned_of(recwarn):
    stage_of(Adapted(False))
    assert not [w for w in recwarn if w.category is DerivativeWarning]
    with pytest.warns(DerivativeWarning, match=r"embedding\.down, embedding\.up.*unmerge"):
        stage_of(Adapted(True))
    with pytest.warns(DerivativeWarning, match=r"no loss depends on embedding\.1\.weight"):
        model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]).to(F64)
        model.forward = lambda x: model[0](x)
        stage_of(model)


class Experts(nn.Module):
    """Only the last example is seen by the second expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]).to(F64)

    def forward(self, x):
        return torch.where(x[:, :1] > 50, self.experts[1](x), self.experts[0](x))


def test_what_one_example_alone_depends_on_is_no_idle_parameter(recwarn):
    inputs, targets = data()
    inputs[-1] = 60.0
    stage_of(Experts(), (inputs, targets))
    assert not [w for w in recwarn if w.category is DerivativeWarning]


def test_what_is_not_trained_may_be_evaluated_without_gradients_by_itself_alone():
    first = stage_of(encoder := NoGrad(), check="data")
    encoder.requires_grad_(False)
    second = stage_of(encoder)
    assert second.unreached == (0, 1)
    with pytest.raises(DerivativeError, match=r"takes embedding\.linear\.weight.*no gradient"):
        Chain([Optimum(first), Frozen(second)], stationarity_tol=9)


# --- embeddings whose table or gradient is not what it seems --------------------------------------


class Read(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.read = nn.Parameter(torch.randn(6, 4, dtype=F64)), read

    def forward(self, ids):
        return self.read(ids, self.weight).sum(1)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("setting", "words"),
    [({"max_norm": 0.7}, "max_norm = None"), ({"scale_grad_by_freq": True}, "before training")],
)
def test_tables_that_are_rewritten_or_scaled_are_refused(setting, words, check):
    (name,) = setting
    for kind in (nn.Embedding, nn.EmbeddingBag):
        with pytest.raises(
            ValueError, match=rf"embedding\.table \({kind.__name__}\) has {name}.*{words}"
        ):
            stage_of(Table(kind, **setting), (IDS, TARGETS), check=check)
    model = Read(lambda ids, weight: F.embedding(ids, weight, **setting))
    with pytest.raises(ValueError, match=f"an embedding has {name}.*{words}"):
        stage_of(model, (IDS, TARGETS), check=check).gradient()
    assert model.weight.norm(dim=1).max() > 0.7  # untouched


# --- operations without forward derivatives -------------------------------------------------------


@torch.library.custom_op("msif_probe::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


sine.register_autograd(
    lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_an_operator_that_passes_on_zero_tangents_is_differentiated_in_reverse(share):
    """The operator's share of the gradient may be small: no direction hides it."""
    stage, plain = (
        stage_of(Wrapped(lambda x, f=f: x.tanh() + share * f(x))) for f in (sine, torch.sin)
    )
    assert plain.can.forward_mode
    assert not stage.can.forward_mode
    torch.testing.assert_close(GaussNewton(stage).dense(), GaussNewton(plain).dense())
    assert_right(stage)


@pytest.mark.parametrize("check", ["all", None, 1])
def test_what_is_checked_is_named_before_any_work(check):
    model = NoGrad()
    model.forward = None  # a call would fail
    with pytest.raises(ValueError, match=r'check must be True, "data" or False, not'):
        stage_of(model, check=check)


# --- losses of which nothing but rounding is left -------------------------------------------------


def squares(outputs, targets):
    return (outputs - targets).square().mean(1)


def distances(outputs, targets):
    return (outputs - targets).abs().mean(1)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("loss", [squares, distances])
def test_targets_that_are_fitted_exactly_are_no_fault(loss, dtype):
    torch.manual_seed(0)
    inputs = torch.randn(20, 6, dtype=dtype)
    model = nn.Linear(6, 3).to(dtype)
    Stage.of(model, loss, (inputs, model(inputs).detach()))
    same = nn.Linear(6, 6, bias=False).to(dtype)
    same.weight.data.copy_(torch.eye(6))
    Stage.of(same, loss, (inputs, inputs))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    Stage.of(model, loss, (inputs, torch.zeros(20, 3, dtype=dtype)))


@pytest.mark.filterwarnings("ignore::msif_lib.support.probe.DerivativeWarning")
@pytest.mark.parametrize("margin", [5.0, 12.0, 20.0, 30.0, 36.0, 60.0, 200.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["double", "single"])
def test_margins_at_which_losses_are_rounded_to_nothing_are_no_fault(dtype, margin):
    torch.manual_seed(0)
    inputs = torch.randn(20, 6, dtype=dtype)
    targets = (inputs[:, 0] > 0).long()
    inputs[:, 0] += inputs[:, 0].sign()
    model = nn.Linear(6, 2).to(dtype)
    with torch.no_grad():
        model.weight.zero_()[1, 0] = margin
    Stage.of(model, cross_entropy, (inputs, targets))
    Stage.of(Float32Only(model), cross_entropy, (inputs.float(), targets))


# --- gradients that hooks change ------------------------------------------------------------------


@pytest.mark.parametrize("most", [1e-4, 0.1, 3.0, 1e3])
def test_a_gradient_that_a_hook_clips_is_refused_whatever_the_bound(most):
    def clipped(x):
        h = x.tanh()
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-most, most))
        return h

    with pytest.raises(DerivativeError) as refusal:
        stage_of(Wrapped(clipped))
    if most >= 0.1:  # too far off for this gradient, but not for a multiple
        assert "embedding.first." in str(refusal.value)
        assert "not in proportion" in str(refusal.value)
        assert "register_hook" in str(refusal.value)


def test_a_hook_that_only_looks_passes():
    seen = []

    def looked_at(x):
        if x.requires_grad:
            x.register_hook(lambda gradient: seen.append(gradient.norm()))
        return x.tanh()

    stage_of(Wrapped(looked_at))
    assert seen


# --- models that compute in single precision, or in half ------------------------------------------


class Float32Only(nn.Module):
    """Takes no other dtype."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model.float()

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.model(x)


class Scaled(Function):
    """The identity, the backward of which multiplies."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.scale * gradient, None


class Deep(nn.Module):
    """A network whose activations pass single precision; in its midst a backward multiplies."""

    def __init__(self, width, activation, scale) -> None:
        super().__init__()
        layers = [nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)]
        self.layers = nn.ModuleList(layers)
        self.activation, self.scale = activation, scale

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x)).float().to(x.dtype)
        return self.layers[-1](Scaled.apply(x, self.scale))


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_a_tenth_of_a_gradient_shows_in_single_precision_and_none_where_nothing_is_wrong(
    activation, width
):
    for seed in range(4):
        torch.manual_seed(seed)
        examples = torch.randn(40, 5, dtype=F64), torch.randint(3, (40,))
        single = examples[0].float(), examples[1]
        for scale in (1.1, 0.9, 0.78):
            model = Deep(width, activation, scale).to(F64)
            with pytest.raises(DerivativeError, match=r"layers\.[01].*is off by.*Scaled\)"):
                Stage.of(model, cross_entropy, examples)
            with pytest.raises(DerivativeError, match=r"layers\.[01].*is off by.*Scaled\)"):
                Stage.of(Float32Only(model), cross_entropy, single)
        model = Deep(width, activation, 1.0).to(F64)
        Stage.of(model, cross_entropy, examples)
        Stage.of(Float32Only(model), cross_entropy, single)


class HalfOnly(nn.Module):
    """Computes in half precision whatever it is given; an encoder perhaps without gradients."""

    def __init__(self, detached) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(3, 16), nn.Linear(16, 2)
        self.detached = detached

    def forward(self, x):
        x = x.bfloat16()
        h = F.linear(x, self.encoder.weight.bfloat16(), self.encoder.bias.bfloat16()).tanh()
        h = h.detach() if self.detached else h
        return F.linear(h, self.head.weight.bfloat16(), self.head.bias.bfloat16()).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_no_gradient_reaches_is_found_in_half_precision(dtype):
    inputs, targets = data(dtype)
    Stage.of(HalfOnly(False).to(dtype), cross_entropy, (inputs, targets))
    with pytest.raises(DerivativeError, match=r"depend on encoder\..*no gradient reaches it"):
        Stage.of(HalfOnly(True).to(dtype), cross_entropy, (inputs, targets))


# --- finite losses whose gradient is not, parameters without a part -------------------------------


@pytest.mark.parametrize("check", [True, "data"])
def test_a_gradient_that_is_not_finite_is_found_when_the_stage_is_made(check):
    inputs = data()[0]
    inputs[:, 0] = 1.0
    inputs[3] = 0.0
    targets = torch.zeros(12, 4, dtype=F64)
    model = nn.Linear(3, 4, bias=False).to(F64)

    def made():
        return Stage.of(model, lambda o, t: (o - t).norm(dim=1).sqrt(), (inputs, targets))

    if check == "data":
        Stage.of(model, lambda o, t: (o - t).norm(dim=1).sqrt(), (inputs, targets), check=check)
        return
    with pytest.raises(ValueError, match=r"loss of example 3 is not finite in weight"):
        made()


def test_how_many_examples_have_no_part_of_a_parameter_is_said():
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]).to(F64)
    model.forward = lambda x: model[0](x)
    inputs = torch.randn(600, 3, dtype=F64)
    targets = torch.randint(2, (600,))
    with pytest.warns(DerivativeWarning, match=r"no loss of the first 512 .*dead or saturated"):
        stage_of(model, (inputs, targets))
    with pytest.warns(DerivativeWarning, match=r"no loss depends on embedding\.1\.weight"):
        stage_of(model, (inputs[:500], targets[:500]))
