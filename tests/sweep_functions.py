"""Cases for torch.nn.functional's functions, and for torch's operations as models use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sweep import COUNT, F64, Call, Case
from sweep_layers import WithTargets, each, first, layer, signs, with_targets
from torch import Tensor, nn


def call(
    name: str, function: Callable[[Tensor], Any], shape: tuple[int, ...] = (4,), **about: Any
) -> Case:
    """A function between a linear map and the head."""
    return layer(name, lambda: Call(lambda x: first(function(x))), shape, **about)


def functional(name: str, *arguments: Any, shape: tuple[int, ...] = (4,), **options: Any) -> Case:
    """A function of torch.nn.functional, named by the first word of `name`."""
    function = getattr(F, name.split()[0].removeprefix("F."))
    return call(name, lambda x: function(x, *arguments, **options), shape)


def chance() -> Iterator[Case]:
    for name, shape in (
        ("dropout", (4,)),
        ("alpha_dropout", (4,)),
        ("feature_alpha_dropout", (2, 2)),
        ("dropout1d", (2, 2)),
        ("dropout2d", (2, 2, 1)),
        ("dropout3d", (2, 2, 1, 1)),
    ):
        yield functional(f"F.{name} training", 0.5, True, shape=shape)
        yield functional(f"F.{name}", 0.5, False, shape=shape)
    yield functional("F.rrelu training", training=True)
    yield functional("F.rrelu_ training", training=True)
    yield functional("F.gumbel_softmax", 0.7)
    yield functional("F.gumbel_softmax hard", 0.7, hard=True)
    yield functional("F.fractional_max_pool2d", 2, 3, shape=(1, 7, 7))
    yield functional("F.fractional_max_pool3d_with_indices", 2, 3, shape=(1, 7, 7, 7))


def shaped() -> Iterator[Case]:
    yield call(
        "F.conv_tbc",
        lambda x: F.conv_tbc(x.permute(2, 0, 1).contiguous(), weight_tbc, bias_tbc, 1).permute(
            1, 0, 2
        ),
        (2, 3),
    )
    if hasattr(F, "native_channel_shuffle"):
        yield functional("F.native_channel_shuffle", 2, shape=(4, 1, 2))
    yield functional("F.normalize")
    yield functional("F.normalize 3", 3.0)
    for mode in ("constant", "reflect", "replicate", "circular"):
        yield functional(f"F.pad {mode}", (1, 2), mode, shape=(1, 4))
    for mode, shape in (
        ("nearest", (1, 2, 2)),
        ("nearest-exact", (1, 2, 2)),
        ("area", (1, 3, 3)),
        ("linear", (2, 2)),
        ("bilinear", (1, 2, 2)),
        ("bicubic", (1, 2, 2)),
        ("trilinear", (1, 2, 2, 2)),
    ):
        yield functional(f"F.interpolate {mode}", scale_factor=1.5, mode=mode, shape=shape)
    yield functional(
        "F.interpolate antialias", size=(2, 2), mode="bilinear", antialias=True, shape=(1, 3, 3)
    )
    for mode in ("bilinear", "nearest", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            yield call(
                f"F.grid_sample {mode} {padding}",
                lambda x, mode=mode, padding=padding: sampled(x, mode, padding),
                (8,),
            )
    yield call(
        "F.affine_grid", lambda x: F.affine_grid(x.view(-1, 2, 3), [len(x), 1, 2, 2], False), (6,)
    )
    mean, variance = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    yield functional("F.batch_norm", mean, variance, shape=(2, 3))
    yield functional("F.batch_norm training", None, None, training=True, shape=(2, 3))


_fixed = torch.Generator().manual_seed(6)
weight_tbc = torch.randn(2, 2, 1, generator=_fixed, dtype=F64)
bias_tbc = torch.randn(1, generator=_fixed, dtype=F64)


def sampled(x: Tensor, mode: str, padding: str) -> Tensor:
    """A picture of four pixels looked up at two places, both computed."""
    return F.grid_sample(
        x[:, :4].view(-1, 1, 2, 2), x[:, 4:].view(-1, 1, 2, 2).sin(), mode, padding, False
    )


class Tables(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.function = nn.Parameter(torch.randn(4, 2)), function

    def forward(self, words: Tensor) -> Tensor:
        return self.function(words, self.table).flatten(1).tanh()


def several() -> Iterator[Case]:
    def words() -> Tensor:
        return torch.randint(4, (COUNT, 3))

    yield Case("F.embedding", lambda: Tables(F.embedding), inputs=words)
    yield Case(
        "F.embedding padded",
        lambda: Tables(lambda w, t: F.embedding(w, t, padding_idx=1)),
        inputs=words,
        constant={"table": [1]},
    )
    yield Case(
        "F.embedding scaled",
        lambda: Tables(lambda w, t: F.embedding(w, t, scale_grad_by_freq=True)),
        inputs=words,
        called=("embedding",),
    )
    yield Case(
        "F.embedding_bag", lambda: Tables(F.embedding_bag), inputs=words, called=("embedding",)
    )
    yield Case("F.one_hot", lambda: Tables(lambda w, t: F.one_hot(w, 4).to(t) @ t), inputs=words)
    yield layer(
        "F.linear",
        lambda: nn.ParameterList([torch.randn(2, 4)]),
        use=lambda p, x: F.linear(x, p[0]).tanh(),
    )
    yield layer(
        "F.bilinear",
        lambda: nn.ParameterList([torch.randn(2, 2, 2)]),
        use=lambda p, x: F.bilinear(x[:, :2], x[:, 2:], p[0]),
    )
    yield call(
        "F.cosine_similarity", lambda x: F.cosine_similarity(x[:, :1], x[:, 1:], dim=2), (3, 2)
    )
    yield call(
        "F.pairwise_distance", lambda x: F.pairwise_distance(x[:, 0], x[:, 1])[:, None], (2, 2)
    )
    yield call("F.pdist", lambda x: torch.stack([F.pdist(one) for one in x]), (3, 2))
    yield call("F.pdist 1", lambda x: torch.stack([F.pdist(one, 1.0) for one in x]), (3, 2))
    yield from attention()
    if hasattr(F, "linear_cross_entropy"):
        yield Case("F.linear_cross_entropy", lambda: WithTargets(FusedLoss()), inputs=with_targets)


class FusedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, self.weight, targets, reduction="none")


def attention() -> Iterator[Case]:
    mask = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    added = torch.tensor([[0.0, -1.0, 0.5]], dtype=F64).expand(3, 3)

    def attended(*heads: int, **options: Any) -> Callable[[Tensor], Tensor]:
        """Attention over three words; queries, keys and values so many heads of width two."""

        def function(x: Tensor) -> Tensor:
            parts = x.split([2 * number for number in heads], 2)
            q, k, v = (part.unflatten(2, (-1, 2)).transpose(1, 2) for part in parts)
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

        return function

    for label, options in (
        ("", {}),
        ("mask", {"attn_mask": mask}),
        ("added mask", {"attn_mask": added}),
        ("causal", {"is_causal": True}),
        ("scaled", {"scale": 0.3}),
    ):
        yield call(
            f"F.scaled_dot_product_attention {label}".strip(), attended(1, 1, 1, **options), (3, 6)
        )
    yield call("F.scaled_dot_product_attention grouped", attended(2, 1, 1, enable_gqa=True), (3, 8))
    yield call("F.scaled_dot_product_attention dropout", attended(1, 1, 1, dropout_p=0.5), (3, 6))

    def multi_head(p: nn.Module, x: Tensor) -> Tensor:
        words = x.transpose(0, 1)
        return F.multi_head_attention_forward(
            words, words, words, 2, 1, p[0], p[1], None, None, False, 0.0, p[2], p[3]
        )[0].transpose(0, 1)

    yield layer(
        "F.multi_head_attention_forward",
        lambda: nn.ParameterList(
            [torch.randn(6, 2), torch.randn(6), torch.randn(2, 2), torch.randn(2)]
        ),
        (3, 2),
        multi_head,
    )


def losses() -> Iterator[Case]:
    """Of the functions that are losses those that no class calls the same way."""

    def loss(name: str, function: Callable[[Tensor, Tensor], Tensor], **about: Any) -> Case:
        return Case(
            name,
            lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh()),
            lambda o, t: each(function(o, t)),
            called=("loss",),
            **about,
        )

    def real() -> Tensor:
        return torch.randn(COUNT, 2, dtype=F64)

    def weights() -> Tensor:
        return torch.tensor([0.5, 2.0], dtype=F64)

    def weighted(
        function: Callable[..., Tensor], **options: Any
    ) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda o, t: function(
            o, t, reduction="none", weight=weights().expand_as(o), **options
        )

    yield loss("F.mse_loss weighted", weighted(F.mse_loss), targets=real)
    yield loss("F.huber_loss weighted", weighted(F.huber_loss, delta=0.5), targets=real)
    yield loss("F.l1_loss weighted", weighted(F.l1_loss), targets=real)
    yield loss(
        "F.binary_cross_entropy weighted",
        lambda o, t: F.binary_cross_entropy(o.sigmoid(), t, weights(), reduction="none"),
        targets=lambda: torch.rand(COUNT, 2, dtype=F64),
    )
    yield loss(
        "F.binary_cross_entropy_with_logits",
        lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="none"),
        targets=lambda: torch.rand(COUNT, 2, dtype=F64),
    )
    yield loss(
        "F.soft_margin_loss",
        lambda o, t: F.soft_margin_loss(o, t, reduction="none"),
        targets=signs(2),
    )
    yield loss(
        "F.cross_entropy averaged over the batch", lambda o, t: F.cross_entropy(o, t).expand(len(t))
    )
    yield loss(
        "F.ctc_loss",
        lambda o, t: F.ctc_loss(
            o.unflatten(1, (4, 3)).transpose(0, 1).log_softmax(2),
            t,
            torch.full((len(o),), 4),
            torch.full((len(o),), 2),
            reduction="none",
        ),
        outputs=12,
        targets=lambda: torch.randint(1, 3, (COUNT, 2)),
    )


def special() -> Iterator[Case]:
    names = (
        "airy_ai bessel_j0 bessel_j1 digamma erf erfc erfcx exp2 expit expm1 gammaln i0 i0e "
        "i1 i1e log_ndtr ndtr sinc spherical_bessel_j0"
    )
    for name in names.split():
        yield call(f"torch.special.{name}", getattr(torch.special, name))
    names = (
        "entr erfinv logit ndtri log1p bessel_y0 bessel_y1 modified_bessel_k0 modified_bessel_k1"
    )
    for name in names.split():
        yield call(
            f"torch.special.{name}", lambda x, name=name: getattr(torch.special, name)(x.sigmoid())
        )
    yield call("torch.special.xlogy", lambda x: torch.special.xlogy(x[:, :2], x[:, 2:].sigmoid()))
    yield call(
        "torch.special.xlog1py", lambda x: torch.special.xlog1py(x[:, :2], x[:, 2:].sigmoid())
    )
    yield call("torch.special.round", lambda x: x.sin() * torch.special.round(x))
    yield call("torch.special.polygamma", lambda x: torch.special.polygamma(1, x.exp() + 0.2))
    yield call("torch.special.multigammaln", lambda x: torch.special.multigammaln(x.exp() + 1, 2))
    yield call(
        "torch.special.zeta", lambda x: torch.special.zeta(torch.tensor(2.0, dtype=F64), x.exp())
    )
    yield call(
        "torch.special.gammainc",
        lambda x: torch.special.gammainc(torch.tensor(2.0, dtype=F64), x.exp()),
    )
    yield call(
        "torch.special.gammainc of both",
        lambda x: torch.special.gammainc(x[:, :2].exp(), x[:, 2:].exp()),
        called=("igamma",),
    )
    yield call("torch.special.logsumexp", lambda x: torch.special.logsumexp(x, 1, True))
    yield call(
        "torch.special.hermite_polynomial_h", lambda x: torch.special.hermite_polynomial_h(x, 3)
    )


def operations() -> Iterator[Case]:
    index = torch.tensor([1, 0, 1, 0])
    square = (2, 2)

    def symmetric(x: Tensor) -> Tensor:
        return x @ x.mT + torch.eye(2, dtype=F64)

    def plain(name: str, function: Callable[[Tensor], Any], shape: tuple[int, ...] = (4,)) -> Case:
        return call(f"torch.{name}", function, shape)

    yield plain("einsum", lambda x: torch.einsum("bij,bkj->bik", x, x.tanh()), square)
    yield plain(
        "scatter_add",
        lambda x: torch.zeros(len(x), 2, dtype=F64).scatter_add(
            1, index.expand(len(x), 4), x.tanh()
        ),
    )
    yield plain(
        "scatter_reduce",
        lambda x: torch.zeros(len(x), 2, dtype=F64).scatter_reduce(
            1, index.expand(len(x), 4), x, "amax"
        ),
    )
    yield plain(
        "scatter_reduce prod",
        lambda x: torch.ones(len(x), 2, dtype=F64).scatter_reduce(
            1, index.expand(len(x), 4), x, "prod"
        ),
    )
    yield plain(
        "scatter_reduce mean",
        lambda x: torch.ones(len(x), 2, dtype=F64).scatter_reduce(
            1, index.expand(len(x), 4), x.sin(), "mean"
        ),
    )
    yield plain(
        "index_add", lambda x: torch.zeros(len(x), 2, dtype=F64).index_add(1, index, x.tanh())
    )
    yield plain("index_select", lambda x: x.tanh().index_select(1, index))
    yield plain(
        "index_put",
        lambda x: x.index_put(
            (torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)), x[:, 1].sin()
        ),
    )
    yield plain("gather", lambda x: x.sin().gather(1, index.expand(len(x), 4)))
    yield plain("take_along_dim", lambda x: x.sin().take_along_dim(x.argsort(1), 1))
    for name in ("cumsum", "cumprod", "logcumsumexp"):
        yield plain(name, lambda x, name=name: getattr(torch, name)(x.sin(), 1))
    for name in ("cummax", "cummin"):
        yield plain(name, lambda x, name=name: getattr(torch, name)(x, 1)[0].sin())
    for name in (
        "logsumexp",
        "sum",
        "mean",
        "prod",
        "var",
        "std",
        "amax",
        "amin",
        "median",
        "norm",
    ):
        yield plain(
            name, lambda x, name=name: reduced(getattr(torch, name)(x, dim=1, keepdim=True))
        )
    for name in ("sort", "kthvalue", "topk", "max", "min"):
        given = {
            "sort": (1,),
            "kthvalue": (2, 1, True),
            "topk": (2, 1),
            "max": (1, True),
            "min": (1, True),
        }
        yield plain(
            name, lambda x, name=name, given=given: getattr(torch, name)(x, *given[name])[0].sin()
        )
    yield plain("where", lambda x: torch.where(x > 0, x.sin(), x.exp()))
    yield plain("where with a hole", lambda x: torch.where(x > 0, x.clamp(min=0.1).sqrt(), 0.3 * x))
    yield plain(
        "nan_to_num",
        lambda x: (x.sin() / torch.where(x > 0, x.detach().ceil(), 0.5)).nan_to_num(0.0),
    )
    yield plain("clamp", lambda x: x.clamp(-1.0, 1.5))
    yield plain("clamp by tensors", lambda x: torch.clamp(x[:, :2], x[:, 2:], x[:, 2:] + 1))
    yield plain("maximum", lambda x: torch.maximum(x[:, :2], x[:, 2:]))
    yield plain("roll", lambda x: x * x.roll(1, 1))
    yield plain("flip", lambda x: x * x.flip(1))
    yield plain("tril", lambda x: x.tril().exp(), square)
    yield plain("masked_fill", lambda x: x.sin().masked_fill(x > 1, 0.5))
    yield plain(
        "masked_scatter",
        lambda x: torch.zeros_like(x).masked_scatter(torch.ones_like(x, dtype=torch.bool), x.sin()),
    )
    yield plain(
        "repeat_interleave", lambda x: x.sin().repeat_interleave(torch.tensor([1, 2, 0, 1]), 1)
    )
    yield plain("unfold", lambda x: x.unfold(1, 2, 1).prod(2))
    yield plain("as_strided", lambda x: x.sin().contiguous().as_strided((len(x), 2), (4, 2)))
    yield plain("atan2", lambda x: torch.atan2(x[:, :2], x[:, 2:]))
    yield plain("hypot", lambda x: torch.hypot(x[:, :2], x[:, 2:]))
    yield plain("lerp", lambda x: torch.lerp(x[:, :2], x[:, 2:], x[:, 1:3].sigmoid()))
    yield plain("pow", lambda x: (x.exp() + 0.1).pow(x.tanh()))
    yield plain("fmod", lambda x: torch.fmod(x, 1.0))
    yield plain("remainder", lambda x: torch.remainder(x, 1.0).sin())
    yield plain("frac", lambda x: x.frac())
    yield plain("floor", lambda x: x * x.floor())
    yield plain("sign", lambda x: x.sign() * x.square())
    yield plain("abs", lambda x: x.abs().sqrt())
    yield plain(
        "bucketize",
        lambda x: x.sin() * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=F64)),
    )
    yield plain("argmax", lambda x: x * F.one_hot(x.argmax(1), 4))
    yield plain(
        "segment_reduce",
        lambda x: torch.segment_reduce(
            x.sin(), "mean", lengths=torch.tensor([[1, 3]]).expand(len(x), 2), axis=1
        ),
    )
    yield plain("cdist", lambda x: torch.cdist(x[:, :2], x[:, 2:]), (4, 2))
    yield plain("cdist 1", lambda x: torch.cdist(x[:, :2], x[:, 2:], p=1.0), (4, 2))
    yield plain("cross", lambda x: torch.linalg.cross(x[:, 0], x[:, 1]), (2, 3))
    yield plain("kron", lambda x: torch.stack([torch.kron(one[0], one[1]) for one in x]), square)
    yield plain(
        "tensordot",
        lambda x: torch.tensordot(x, torch.arange(4, dtype=F64).view(2, 2), 1).sin(),
        square,
    )
    yield plain("baddbmm", lambda x: torch.baddbmm(x, x.sin(), x.cos(), beta=0.5), square)
    yield plain("trapezoid", lambda x: torch.trapezoid(x.sin(), dim=1)[:, None])
    yield plain("diff", lambda x: torch.diff(x.sin(), dim=1))
    yield plain("stack of views in place", in_place)
    yield plain("bernoulli", lambda x: x * torch.bernoulli(x.sigmoid()))
    yield plain("randn_like", lambda x: x + torch.randn_like(x))
    yield plain("multinomial", lambda x: x.gather(1, torch.multinomial(x.softmax(1), 2)))
    yield plain("distributions rsample", lambda x: torch.distributions.Normal(x, 1.0).rsample())
    yield from spectra()
    yield from linear_algebra(symmetric)


def reduced(found: Any) -> Tensor:
    return (found if isinstance(found, Tensor) else found[0]).sin()


def in_place(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, ::2] = x[:, 1::2].sin()
    out[:, 1] += x[:, 0] * x[:, 3]
    return out.mul_(2.0)


def spectra() -> Iterator[Case]:
    yield call("torch.fft.rfft", lambda x: torch.fft.rfft(x).abs())
    yield call("torch.fft.fft", lambda x: torch.view_as_real(torch.fft.fft(x)).flatten(1).sin())
    yield call(
        "torch.fft.irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.sin()))
    )
    yield call("torch.fft.fft2", lambda x: torch.fft.fft2(x).abs().square(), (2, 2))
    yield call(
        "torch.stft",
        lambda x: torch.stft(x, 4, window=torch.ones(4, dtype=F64), return_complex=True).abs(),
        (6,),
    )
    yield call("torch.complex", lambda x: (torch.complex(x[:, :2], x[:, 2:]) ** 2 * 1j).exp().imag)
    yield call("torch.polar", lambda x: torch.polar(x[:, :2].exp(), x[:, 2:]).real)
    yield call("torch.angle", lambda x: torch.complex(x[:, :2], x[:, 2:]).angle())


def linear_algebra(symmetric: Callable[[Tensor], Tensor]) -> Iterator[Case]:
    square = (2, 2)

    def plain(
        name: str, function: Callable[[Tensor], Any], shape: tuple[int, ...] = square
    ) -> Case:
        return call(f"torch.linalg.{name}", function, shape)

    yield plain("solve", lambda x: torch.linalg.solve(symmetric(x), x))
    yield plain("inv", lambda x: torch.linalg.inv(symmetric(x)))
    yield plain("pinv", lambda x: torch.linalg.pinv(x), (2, 3))
    yield plain("det", lambda x: torch.linalg.det(x)[:, None])
    yield plain("slogdet", lambda x: torch.linalg.slogdet(symmetric(x))[1][:, None])
    yield plain("cholesky", lambda x: torch.linalg.cholesky(symmetric(x)))
    yield plain("qr", lambda x: torch.linalg.qr(x)[1].abs())
    yield plain("svdvals", torch.linalg.svdvals)
    yield plain(
        "svd",
        lambda x: (
            (torch.linalg.svd(x)[0] * torch.linalg.svd(x)[1][:, None, :])
            @ torch.linalg.svd(x)[0].mT
        ),
    )
    yield plain("eigh", lambda x: torch.linalg.eigh(symmetric(x))[1].square())
    yield plain("eigvals", lambda x: torch.linalg.eigvals(x).real.sort(1)[0])
    yield plain("matrix_exp", lambda x: torch.linalg.matrix_exp(0.3 * x))
    yield plain("matrix_power", lambda x: torch.linalg.matrix_power(x, 3))
    yield plain("vector_norm", lambda x: torch.linalg.vector_norm(x, 3, dim=2))
    yield plain("matrix_norm", lambda x: torch.linalg.matrix_norm(x, "nuc")[:, None])
    yield plain("lstsq", lambda x: torch.linalg.lstsq(x[:, :, :1], x[:, :, 1:]).solution)
    yield plain(
        "solve_triangular",
        lambda x: torch.linalg.solve_triangular(symmetric(x).tril(), x, upper=False),
    )
    yield plain("lu", lambda x: torch.linalg.lu(symmetric(x))[2])
    yield plain(
        "householder_product", lambda x: torch.linalg.householder_product(x, x[:, 0].sigmoid())
    )


def cases() -> dict[str, Case]:
    """All of them by name."""
    kinds = (chance, shaped, several, losses, special, operations)
    found = [case for kind in kinds for case in kind()]
    names = [case.name for case in found]
    assert len({*names}) == len(names), "a name twice"
    return {case.name: case for case in found}
