"""Cases for torch.nn's public classes: layers, losses, and what torch.nn.utils makes of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sweep import COUNT, F64, Call, Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


def first(outputs: Any) -> Tensor:
    """The first tensor of a layer's outputs."""
    return first(outputs[0]) if isinstance(outputs, tuple) else outputs


def features(size: int) -> nn.Linear:
    """What gives a layer its input: values on both sides of zero, beyond the usual thresholds."""
    linear = nn.Linear(2, size, bias=False)
    nn.init.normal_(linear.weight, std=1.5)
    return linear


def layer(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...] = (4,),
    use: Callable[[nn.Module, Tensor], Any] | None = None,
    **about: Any,
) -> Case:
    """A layer between a linear map and the head, called as it is or by ``use(layer, features)``."""

    def embedding() -> nn.Module:
        made = make()
        return nn.Sequential(
            features(math.prod(shape)),
            nn.Unflatten(1, shape),
            made if use is None else Call(lambda within, x: first(use(within, x)), made),
            nn.Flatten(),
        )

    return Case(name, embedding, **about)


def simple(name: str, *arguments: Any, shape: tuple[int, ...] = (4,), **options: Any) -> Case:
    """A layer named by the first word of `name`, made from these arguments."""
    return layer(name, lambda: getattr(nn, name.split()[0])(*arguments, **options), shape)


def each(losses: Tensor) -> Tensor:
    """One loss an example."""
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def loss(
    name: str,
    targets: Callable[[], Any],
    *arguments: Any,
    outputs: int = 2,
    of: Callable[[nn.Module, Any, Any], Tensor] | None = None,
    link: Callable[[Tensor], Tensor] = lambda outputs: outputs,
    **options: Any,
) -> Case:
    """A loss of torch.nn without reduction, averaged over what is not examples."""
    module = getattr(nn, name.split()[0])(*arguments, reduction="none", **options)

    def losses(found: Any, wanted: Any) -> Tensor:
        found = link(found)
        return each(module(found, wanted) if of is None else of(module, found, wanted))

    return Case(
        name,
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh()),
        losses,
        targets=targets,
        outputs=outputs,
        called=("loss",),
    )


def real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(COUNT, *shape, dtype=F64)


def positive(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(COUNT, *shape, dtype=F64) + 0.1


def share(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(COUNT, *shape, dtype=F64)


def signs(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(2, (COUNT, *shape)).to(F64) * 2 - 1


def classes(count: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(count, (COUNT, *shape))


def activations() -> Iterator[Case]:
    names = (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU "
        "LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh "
        "Tanhshrink"
    )
    for name in names.split():
        yield simple(name)
    names = "CELU ELU Hardsigmoid Hardswish Hardtanh LeakyReLU Mish ReLU ReLU6 SELU SiLU"
    for name in names.split():
        yield simple(f"{name} inplace", inplace=True)
    yield simple("GELU tanh", approximate="tanh")
    yield simple("PReLU channels", 2, shape=(2, 2))
    yield simple("Softplus threshold", 2.0, 1.0)
    yield simple("Threshold", 0.1, -2.0)
    yield simple("Threshold inplace", 0.1, -2.0, True)
    yield simple("GLU", 1)
    for name in ("Softmax", "Softmin", "LogSoftmax"):
        yield simple(name, 1)
    yield simple("Softmax2d", shape=(2, 2, 1))
    yield layer("RReLU eval", lambda: nn.RReLU().eval())
    yield layer("RReLU training", nn.RReLU)
    yield layer("RReLU inplace training", lambda: nn.RReLU(inplace=True))
    shapes = {
        "Dropout1d": (2, 3),
        "Dropout2d": (2, 2, 1),
        "Dropout3d": (2, 1, 2, 1),
        "FeatureAlphaDropout": (2, 2, 1),
    }
    for name in (*shapes, "Dropout", "AlphaDropout"):
        shape = shapes.get(name, (4,))
        yield layer(f"{name} eval", lambda name=name: getattr(nn, name)(0.5).eval(), shape)
        yield layer(f"{name} training", lambda name=name: getattr(nn, name)(0.5), shape)
    yield simple("Dropout of nothing", 0.0)
    yield simple("Dropout inplace training", 0.5, True)


def convolutions() -> Iterator[Case]:
    shapes = {1: (2, 4), 2: (2, 3, 2), 3: (2, 2, 2, 2)}
    for d, shape in shapes.items():
        yield simple(f"Conv{d}d", 2, 1, 2, shape=shape)
        yield simple(f"Conv{d}d padded groups", 2, 2, 2, padding=1, stride=2, groups=2, shape=shape)
        yield simple(f"ConvTranspose{d}d", 2, 1, 2, shape=shape)
        for mode in ("circular", "replicate", "reflect"):
            yield simple(
                f"Conv{d}d {mode}", 1, 1, 3, padding=1, padding_mode=mode, shape=(1, *shape[1:])
            )
    yield simple("Conv1d dilated same", 2, 1, 3, padding="same", dilation=2, shape=(2, 4))
    yield simple("ConvTranspose1d strided", 2, 2, 2, 2, 1, 1, 2, dilation=2, shape=(2, 3))
    yield simple("ConvTranspose2d strided", 1, 1, 2, 2, 1, 1, shape=(1, 2, 3))
    yield simple("Unfold", 2, padding=1, shape=(1, 2, 3))
    yield simple("Fold", (2, 3), (2, 2), shape=(4, 2))
    yield simple("PixelShuffle", 2, shape=(4, 1, 1))
    yield simple("PixelUnshuffle", 2, shape=(1, 2, 2))
    yield simple("ChannelShuffle", 2, shape=(4, 1, 2))
    for mode, shape in (
        ("nearest", (1, 2, 2)),
        ("nearest-exact", (1, 2, 2)),
        ("linear", (2, 2)),
        ("bilinear", (1, 2, 2)),
        ("bicubic", (1, 2, 2)),
        ("trilinear", (1, 2, 2, 2)),
    ):
        yield simple(f"Upsample {mode}", scale_factor=1.5, mode=mode, shape=shape)
    yield simple(
        "Upsample corners", size=(3, 3), mode="bilinear", align_corners=True, shape=(1, 2, 2)
    )
    yield simple("UpsamplingNearest2d", scale_factor=2, shape=(1, 2, 2))
    yield simple("UpsamplingBilinear2d", scale_factor=2, shape=(1, 2, 2))
    for d, shape in ((1, (1, 4)), (2, (1, 2, 3)), (3, (1, 2, 2, 2))):
        for kind in ("Circular", "Reflection", "Replication", "Zero"):
            yield simple(f"{kind}Pad{d}d", 1, shape=shape)
        yield simple(f"ConstantPad{d}d", 1, 0.7, shape=shape)


def pools() -> Iterator[Case]:
    shapes = {1: (1, 5), 2: (1, 3, 3), 3: (1, 3, 2, 3)}
    for d, shape in shapes.items():
        yield simple(f"AvgPool{d}d", 2, shape=shape)
        yield simple(
            f"AvgPool{d}d padded", 2, 2, 1, ceil_mode=True, count_include_pad=False, shape=shape
        )
        yield simple(f"MaxPool{d}d", 2, shape=shape)
        yield simple(
            f"MaxPool{d}d padded dilated", 2, 1, 1, 2 if d < 3 else 1, ceil_mode=True, shape=shape
        )
        if hasattr(nn, f"LPPool{d}d"):
            yield simple(f"LPPool{d}d", 4, 2, shape=shape)
        yield simple(f"AdaptiveAvgPool{d}d", 2, shape=shape)
        yield simple(f"AdaptiveMaxPool{d}d", 2, shape=shape)

        def unpooled(pool: nn.Module, x: Tensor, d: int = d) -> Tensor:
            values, places = pool(x)
            return getattr(nn, f"MaxUnpool{d}d")(2)(values, places, output_size=x.shape)

        yield layer(
            f"MaxUnpool{d}d",
            lambda d=d: getattr(nn, f"MaxPool{d}d")(2, return_indices=True),
            shape,
            unpooled,
        )
    yield simple("LPPool1d norm 2", 2, 2, shape=(1, 4))
    yield simple("LPPool1d infinite", float("inf"), 2, shape=(1, 4))
    for d, shape in ((2, (1, 3, 3)), (3, (1, 3, 3, 3))):
        # Where it has fewer places, or as many as fit evenly, its samples count for nothing.
        yield simple(f"FractionalMaxPool{d}d", 2, 3, shape=(1,) + (7,) * d)

        def fixed(d: int = d) -> nn.Module:
            samples = torch.full((1, 1, d), 0.3, dtype=F64)
            kind = getattr(nn, f"FractionalMaxPool{d}d")
            return kind(2, 1, _random_samples=samples)

        # One sample serves a batch of one; each example is pooled by itself.
        yield layer(
            f"FractionalMaxPool{d}d without chance",
            fixed,
            shape,
            lambda pool, x: torch.cat([pool(one) for one in x.split(1)]),
        )


def norms() -> Iterator[Case]:
    shapes = {1: (2, 3), 2: (2, 3, 1), 3: (2, 1, 3, 1)}

    def moved(norm: Any) -> Any:
        """With running statistics that are not those of the start."""
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        return norm

    for d, shape in shapes.items():
        batch, instance = getattr(nn, f"BatchNorm{d}d"), getattr(nn, f"InstanceNorm{d}d")
        yield layer(f"BatchNorm{d}d eval", lambda batch=batch: moved(batch(2)).eval(), shape)
        yield layer(f"BatchNorm{d}d training", lambda batch=batch: batch(2), shape)
        yield layer(
            f"BatchNorm{d}d without statistics",
            lambda batch=batch: batch(2, track_running_stats=False).eval(),
            shape,
        )
        yield layer(f"InstanceNorm{d}d", lambda instance=instance: instance(2), shape)
        yield layer(
            f"InstanceNorm{d}d affine", lambda instance=instance: instance(2, affine=True), shape
        )
        yield layer(
            f"InstanceNorm{d}d statistics training",
            lambda instance=instance: moved(instance(2, track_running_stats=True)),
            shape,
        )
        yield layer(
            f"InstanceNorm{d}d statistics eval",
            lambda instance=instance: moved(instance(2, track_running_stats=True)).eval(),
            shape,
        )
    yield layer("BatchNorm1d flat eval", lambda: moved(nn.BatchNorm1d(4)).eval())
    yield layer("BatchNorm1d cumulative training", lambda: nn.BatchNorm1d(4, momentum=None))
    yield layer("SyncBatchNorm eval", lambda: moved(nn.SyncBatchNorm(2)).eval(), (2, 3))
    yield layer("SyncBatchNorm training", lambda: nn.SyncBatchNorm(2), (2, 3))
    yield simple("GroupNorm", 2, 4, shape=(4, 2))
    yield simple("GroupNorm plain", 1, 2, affine=False, shape=(2, 2))
    yield simple("LayerNorm", (2, 2), shape=(2, 2))
    yield simple("LayerNorm plain", 4, elementwise_affine=False)
    yield simple("RMSNorm", 4)
    yield simple("RMSNorm plain", (2, 2), elementwise_affine=False, shape=(2, 2))
    yield simple("LocalResponseNorm", 2, 0.5, shape=(3, 2))
    yield simple("CrossMapLRN2d", 2, 0.5, shape=(3, 2, 1))


def recurrent() -> Iterator[Case]:
    shape = (3, 2)  # steps, features
    for name in ("RNN", "LSTM", "GRU"):
        kind = getattr(nn, name)
        options: dict[str, dict[str, Any]] = {
            "": {},
            "both ways": {"bidirectional": True},
            "dropout eval": {"num_layers": 2, "dropout": 0.5},
            "dropout training": {"num_layers": 2, "dropout": 0.5},
        }
        if name == "LSTM":
            options["projected"] = {"proj_size": 1, "num_layers": 2, "bidirectional": True}
        if name == "RNN":
            options["relu without bias"] = {"nonlinearity": "relu", "bias": False}
        for label, given in options.items():

            def make(kind: Any = kind, given: Any = given, label: str = label) -> nn.Module:
                return kind(2, 2, batch_first=True, **given).train("eval" not in label)

            yield layer(f"{name} {label}".strip(), make, shape, lambda rnn, x: rnn(x))
        yield layer(
            f"{name} last state",
            lambda kind=kind: kind(2, 2, batch_first=True),
            shape,
            lambda rnn, x: first(rnn(x)[1]).transpose(0, 1),
        )

        yield Case(
            f"{name} packed",
            lambda kind=kind: Packed(kind(2, 2, batch_first=True)),
            inputs=lambda: {
                "x": torch.randn(COUNT, 3, 2, dtype=F64),
                "length": torch.tensor([3, 1, 2, 3, 2]),
            },
        )
    yield layer(
        "GRU steps first",
        lambda: nn.GRU(2, 2),
        shape,
        lambda rnn, x: first(rnn(x.transpose(0, 1))).transpose(0, 1),
    )
    for name in ("RNNCell", "LSTMCell", "GRUCell"):

        def stepped(cell: nn.Module, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = cell(step, state)
            return first(state)

        yield layer(name, lambda name=name: getattr(nn, name)(2, 2), shape, stepped)
    yield layer(
        "RNNCell relu",
        lambda: nn.RNNCell(2, 2, nonlinearity="relu"),
        use=lambda cell, x: cell(x[:, :2], x[:, 2:]),
    )


class Packed(nn.Module):
    """A recurrent layer over sentences of several lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        words = nn.utils.rnn.pack_padded_sequence(
            inputs["x"], inputs["length"], True, enforce_sorted=False
        )
        outputs, _ = self.layer(words)
        return nn.utils.rnn.pad_packed_sequence(outputs, True, total_length=3)[0].flatten(1)


def attention() -> Iterator[Case]:
    shape = (2, 3)
    causal = nn.Transformer.generate_square_subsequent_mask(2, dtype=F64)
    padding = torch.tensor([[False, True]])

    def heads(**options: Any) -> Callable[[], nn.Module]:
        return lambda: nn.MultiheadAttention(3, 3, batch_first=True, **options)

    for label, options in (
        ("training", {}),
        ("eval", {}),
        ("no bias eval", {"bias": False}),
        ("bias in keys eval", {"add_bias_kv": True}),
        ("zero key training", {"add_zero_attn": True}),
    ):
        yield layer(
            f"MultiheadAttention {label}",
            lambda options=options, label=label: heads(**options)().train("eval" not in label),
            shape,
            lambda a, x: a(x, x, x),
        )
    yield layer(
        "MultiheadAttention dropout eval",
        lambda: heads(dropout=0.5)().eval(),
        shape,
        lambda a, x: a(x, x, x),
    )
    yield layer(
        "MultiheadAttention dropout training", heads(dropout=0.5), shape, lambda a, x: a(x, x, x)
    )
    yield layer(
        "MultiheadAttention without weights",
        lambda: heads()().eval(),
        shape,
        lambda a, x: a(x, x, x, need_weights=False),
    )
    yield layer(
        "MultiheadAttention causal",
        lambda: heads()().eval(),
        shape,
        lambda a, x: a(x, x, x, attn_mask=causal, is_causal=True, need_weights=False),
    )
    yield layer(
        "MultiheadAttention padded",
        lambda: heads()().eval(),
        shape,
        lambda a, x: a(x, x, x, key_padding_mask=padding.expand(len(x), 2)),
    )
    yield layer(
        "MultiheadAttention weights",
        lambda: heads()().eval(),
        shape,
        lambda a, x: torch.cat(
            [part.flatten(1) for part in a(x, x, x, average_attn_weights=False)], 1
        ),
    )
    yield layer(
        "MultiheadAttention other widths",
        heads(kdim=1, vdim=2),
        shape,
        lambda a, x: a(x, x[..., :1], x[..., 1:]),
    )

    def encoder_layer(**options: Any) -> nn.Module:
        return nn.TransformerEncoderLayer(
            3, 1, 2, **{"dropout": 0.0, "batch_first": True, **options}
        )

    def decoder_layer(**options: Any) -> nn.Module:
        return nn.TransformerDecoderLayer(3, 1, 2, dropout=0.0, batch_first=True, **options)

    for mode in ("training", "eval"):
        training = mode == "training"
        yield layer(
            f"TransformerEncoderLayer {mode}",
            lambda training=training: encoder_layer().train(training),
            shape,
        )
        yield layer(
            f"TransformerEncoder {mode}",
            lambda training=training: nn.TransformerEncoder(
                encoder_layer(norm_first=True, activation="gelu"), 1, nn.LayerNorm(3), False
            ).train(training),
            shape,
        )
        yield layer(
            f"TransformerDecoderLayer {mode}",
            lambda training=training: decoder_layer().train(training),
            shape,
            lambda d, x: d(x, x.flip(1), tgt_mask=causal),
        )
    yield Case(
        "TransformerEncoder padded",
        lambda: Padded(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 2, 0.0, "gelu", batch_first=True), 1
            ).eval()
        ),
        inputs=lambda: {
            "src": torch.randn(COUNT, 2, 4, dtype=F64),
            "src_key_padding_mask": torch.tensor([[0, 1], [0, 0], [0, 1], [0, 0], [0, 0]]).bool(),
        },
    )
    yield layer(
        "TransformerEncoder causal",
        lambda: nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=False).eval(),
        shape,
        lambda e, x: e(x, mask=causal, is_causal=True),
    )
    yield layer(
        "TransformerDecoder",
        lambda: nn.TransformerDecoder(decoder_layer(norm_first=True), 1),
        shape,
        lambda d, x: d(x, x.flip(1), memory_mask=causal, tgt_is_causal=False),
    )
    yield layer(
        "TransformerEncoderLayer dropout training", lambda: encoder_layer(dropout=0.1), shape
    )
    yield layer(
        "TransformerEncoderLayer dropout eval", lambda: encoder_layer(dropout=0.1).eval(), shape
    )
    yield layer(
        "Transformer",
        lambda: nn.Transformer(3, 1, 1, 1, 1, dropout=0.0, batch_first=True),
        shape,
        lambda t, x: t(x, x.flip(1)),
    )


class Padded(nn.Module):
    """The first word of what an encoder makes of padded sentences."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.layer(**inputs)[:, 0]


class Both(nn.Module):
    """A table of three rows, and what gives it an input."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, inputs: Any) -> Tensor:
        found = self.table(inputs) if isinstance(inputs, Tensor) else self.table(**inputs)
        return torch.tanh(found.flatten(1) if found.dim() > 2 else found)


def embeddings() -> Iterator[Case]:
    words = lambda: torch.randint(4, (COUNT, 3))  # noqa: E731
    for label, options in (
        ("", {}),
        ("padded", {"padding_idx": 1}),
        ("max_norm", {"max_norm": 0.7}),
        ("scale_grad_by_freq", {"scale_grad_by_freq": True}),
        ("sparse", {"sparse": True}),
    ):
        constant = {"table.weight": [1]} if label == "padded" else {}
        yield Case(
            f"Embedding {label}".strip(),
            lambda options=options: Both(nn.Embedding(4, 2, **options)),
            inputs=words,
            constant=constant,
        )
        for mode in ("sum", "mean", "max"):
            if (label, mode) in (("sparse", "max"), ("scale_grad_by_freq", "max")):
                continue  # torch itself refuses these
            yield Case(
                f"EmbeddingBag {mode} {label}".strip(),
                lambda options=options, mode=mode: Both(
                    nn.EmbeddingBag(4, 2, mode=mode, **options)
                ),
                inputs=words,
                constant=constant,
            )
    yield Case(
        "Embedding pretrained",
        lambda: Both(nn.Embedding.from_pretrained(torch.randn(4, 2))),
        inputs=words,
    )
    yield Case(
        "EmbeddingBag weighted",
        lambda: Both(nn.EmbeddingBag(4, 2, mode="sum")),
        inputs=lambda: {"input": words(), "per_sample_weights": torch.rand(COUNT, 3, dtype=F64)},
    )
    yield Case("EmbeddingBag weights from features", EmbeddingOfFeatures)


class EmbeddingOfFeatures(nn.Module):
    """A bag whose weights are computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.table = nn.Linear(2, 3), nn.EmbeddingBag(3, 2, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(3).expand(len(x), 3)
        return self.table(rows, per_sample_weights=self.weights(x).tanh())


def others() -> Iterator[Case]:
    yield simple("Linear", 4, 2)
    yield simple("Linear no bias", 4, 2, bias=False)
    yield layer("Bilinear", lambda: nn.Bilinear(2, 2, 2), use=lambda b, x: b(*x.chunk(2, 1)))
    yield simple("Flatten", 1, 2, shape=(2, 2, 1))
    yield simple("Unflatten", 1, (2, 2))
    yield layer(
        "CosineSimilarity", nn.CosineSimilarity, (2, 2), lambda c, x: c(x[:, 0], x[:, 1])[:, None]
    )
    yield layer(
        "PairwiseDistance", nn.PairwiseDistance, (2, 2), lambda c, x: c(x[:, 0], x[:, 1])[:, None]
    )
    yield layer(
        "PairwiseDistance 3",
        lambda: nn.PairwiseDistance(3.0, keepdim=True),
        (2, 2),
        lambda c, x: c(x[:, 0], x[:, 1]),
    )
    yield layer("Sequential", lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh()))
    yield layer(
        "ModuleList",
        lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)]),
        use=lambda some, x: some[1](some[0](x).tanh()),
    )
    yield layer(
        "ModuleDict",
        lambda: nn.ModuleDict({"a": nn.Linear(4, 2)}),
        use=lambda some, x: some["a"](x),
    )
    yield layer(
        "ParameterList",
        lambda: nn.ParameterList([torch.randn(4, 2), torch.randn(2, 2)]),
        use=lambda some, x: (x @ some[0]).tanh() @ some[1],
    )
    yield layer(
        "ParameterDict",
        lambda: nn.ParameterDict({"a": torch.randn(4, 2)}),
        use=lambda some, x: x @ some["a"],
    )
    yield layer("DataParallel", lambda: nn.DataParallel(nn.Linear(4, 2)))
    yield layer("Module with a Buffer", Scales)
    for name, arguments, shape in (
        ("LazyLinear", (2,), (4,)),
        ("LazyConv1d", (1, 2), (2, 3)),
        ("LazyConv2d", (1, 2), (2, 2, 2)),
        ("LazyConv3d", (1, 2), (1, 2, 2, 2)),
        ("LazyConvTranspose1d", (1, 2), (2, 3)),
        ("LazyConvTranspose2d", (1, 2), (2, 2, 2)),
        ("LazyConvTranspose3d", (1, 2), (1, 2, 2, 2)),
    ):
        yield simple(name, *arguments, shape=shape)
    for d, shape in ((1, (2, 3)), (2, (2, 3, 1)), (3, (2, 1, 3, 1))):
        for kind in ("Batch", "Instance"):
            name = f"Lazy{kind}Norm{d}d"
            yield layer(
                f"{name} eval",
                lambda name=name, shape=shape: met(getattr(nn, name)(), shape),
                shape,
            )


def met(lazy: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A lazy layer that has met features of this shape."""
    lazy(torch.randn(3, *shape))
    return lazy.eval()


class Scales(nn.Module):
    """A parameter and a buffer used as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.randn(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x + self.shift).tanh()


class Softened(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def reparametrized() -> Iterator[Case]:
    linear = lambda: nn.Linear(3, 2)  # noqa: E731

    def own() -> nn.Module:
        made = linear()
        parametrize.register_parametrization(made, "weight", Softened())
        return made

    yield layer("parametrize", own, (3,))
    yield layer(
        "parametrizations.weight_norm", lambda: parametrizations.weight_norm(linear()), (3,)
    )
    yield layer(
        "parametrizations.weight_norm dim 1",
        lambda: parametrizations.weight_norm(linear(), dim=1),
        (3,),
    )
    yield layer(
        "parametrizations.weight_norm whole",
        lambda: parametrizations.weight_norm(linear(), dim=None),
        (3,),
    )
    yield layer(
        "parametrizations.spectral_norm eval",
        lambda: settled(parametrizations.spectral_norm(linear())),
        (3,),
    )
    yield layer(
        "parametrizations.spectral_norm training",
        lambda: parametrizations.spectral_norm(linear()),
        (3,),
    )
    signs = torch.arange(2)  # of which torch takes the integer part
    for kind in ("matrix_exp", "cayley", "householder"):
        yield layer(
            f"parametrizations.orthogonal {kind}",
            lambda kind=kind: parametrizations.orthogonal(linear(), orthogonal_map=kind),
            (3,),
            constant={
                "2.parametrizations.weight.original": [(signs, signs)]
                if kind == "householder"
                else []
            },
        )
    yield layer("weight_norm", lambda: quiet(nn.utils.weight_norm, linear()), (3,))
    yield layer("spectral_norm eval", lambda: settled(nn.utils.spectral_norm(linear())), (3,))
    yield layer(
        "spectral_norm training",
        lambda: nn.utils.spectral_norm(linear()),
        (3,),
        called=("embedding.2",),
    )
    yield layer("prune.l1_unstructured", lambda: prune.l1_unstructured(linear(), "weight", 2), (3,))
    yield layer(
        "prune.remove",
        lambda: prune.remove(prune.l1_unstructured(linear(), "weight", 2), "weight"),
        (3,),
    )
    yield layer(
        "fuse_conv_bn_eval",
        lambda: nn.utils.fuse_conv_bn_eval(nn.Conv1d(2, 2, 2).eval(), nn.BatchNorm1d(2).eval()),
        (2, 3),
    )
    yield layer("skip_init", lambda: copied(nn.utils.skip_init(nn.Linear, 3, 2)), (3,))


def copied(module: nn.Module) -> nn.Module:
    module.load_state_dict(nn.Linear(3, 2).state_dict())
    return module


def settled(norm: nn.Module) -> nn.Module:
    """After some steps of the power iteration, without which it divides by next to nothing."""
    for _ in range(10):
        norm(torch.randn(1, 3))
    return norm.eval()


def quiet(make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """Without torch's word that there is a newer one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments)


def losses() -> Iterator[Case]:
    pair = lambda found: found.chunk(2, 1)  # noqa: E731
    yield loss("BCELoss", share(2), link=torch.sigmoid)
    yield loss("BCEWithLogitsLoss", share(2))
    yield loss(
        "BCEWithLogitsLoss weighted",
        share(2),
        pos_weight=torch.tensor([2.0, 0.5], dtype=F64),
        weight=torch.tensor([1.0, 3.0], dtype=F64),
    )
    yield loss(
        "CosineEmbeddingLoss", signs(), outputs=4, margin=-0.5, of=lambda m, o, t: m(*pair(o), t)
    )
    yield loss("CrossEntropyLoss", classes(3), outputs=3)
    yield loss("CrossEntropyLoss smoothed", classes(3), outputs=3, label_smoothing=0.1)
    yield loss(
        "CrossEntropyLoss weighted",
        classes(3),
        outputs=3,
        weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64),
    )
    yield loss("CrossEntropyLoss ignored", lambda: torch.tensor([0, 1, -100, 2, -100]), outputs=3)
    yield loss(
        "CrossEntropyLoss soft", lambda: torch.rand(COUNT, 3, dtype=F64).softmax(1), outputs=3
    )
    yield loss(
        "CrossEntropyLoss of positions",
        classes(2, 2),
        outputs=4,
        link=lambda o: o.unflatten(1, (2, 2)),
    )
    yield loss(
        "CTCLoss",
        lambda: torch.randint(1, 3, (COUNT, 2)),
        outputs=12,
        zero_infinity=True,
        of=lambda m, o, t: m(
            o.unflatten(1, (4, 3)).transpose(0, 1).log_softmax(2),
            t,
            torch.full((len(o),), 4),
            torch.full((len(o),), 2),
        ),
    )
    yield loss(
        "GaussianNLLLoss",
        real(2),
        outputs=4,
        full=True,
        of=lambda m, o, t: m(pair(o)[0], t, pair(o)[1].exp()),
    )
    yield loss("HingeEmbeddingLoss", signs(2))
    yield loss("HuberLoss", real(2), delta=0.5)
    yield loss(
        "KLDivLoss",
        lambda: torch.rand(COUNT, 3, dtype=F64).softmax(1),
        outputs=3,
        link=lambda o: o.log_softmax(1),
    )
    yield loss(
        "KLDivLoss logarithmic",
        lambda: torch.rand(COUNT, 3, dtype=F64).log_softmax(1),
        outputs=3,
        log_target=True,
        link=lambda o: o.log_softmax(1),
    )
    yield loss("L1Loss", real(2))
    yield loss("MSELoss", real(2))
    yield loss("MarginRankingLoss", signs(), margin=0.3, of=lambda m, o, t: m(o[:, 0], o[:, 1], t))
    yield loss(
        "MultiLabelMarginLoss",
        lambda: torch.tensor([[0, -1, 1], [2, 1, -1], [1, -1, -1], [0, 1, 2], [2, -1, 0]]),
        outputs=3,
    )
    yield loss("MultiLabelSoftMarginLoss", lambda: torch.randint(2, (COUNT, 3)).to(F64), outputs=3)
    yield loss("MultiMarginLoss", classes(3), outputs=3)
    yield loss(
        "MultiMarginLoss squared",
        classes(3),
        outputs=3,
        p=2,
        margin=0.5,
        weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64),
    )
    yield loss("NLLLoss", classes(3), outputs=3, link=lambda o: o.log_softmax(1))
    yield loss("PoissonNLLLoss", positive(2), full=True)
    yield loss("PoissonNLLLoss of rates", positive(2), log_input=False, link=torch.exp)
    yield loss("SmoothL1Loss", real(2), beta=0.5)
    yield loss("SoftMarginLoss", signs(2))
    yield loss("TripletMarginLoss", real(2), outputs=4, of=lambda m, o, t: m(*pair(o), t))
    yield loss(
        "TripletMarginLoss swapped",
        real(2),
        outputs=4,
        margin=2.0,
        swap=True,
        p=3.0,
        of=lambda m, o, t: m(*pair(o), t),
    )
    yield loss(
        "TripletMarginWithDistanceLoss",
        real(2),
        outputs=4,
        margin=3.0,
        distance_function=lambda a, b: (a - b).square().sum(1),
        of=lambda m, o, t: m(*pair(o), t),
    )
    yield layer(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(3, 4, [2], div_value=1.5),
        (3,),
        lambda a, x: a.log_prob(x),
    )
    # Losses with parameters of their own are part of the model.
    yield Case(
        "AdaptiveLogSoftmaxWithLoss of targets",
        lambda: WithTargets(nn.AdaptiveLogSoftmaxWithLoss(3, 4, [2], div_value=1.5)),
        inputs=with_targets,
    )
    if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
        for name, options in (
            ("LinearCrossEntropyLoss", lambda: None),
            ("LinearCrossEntropyOptions", lambda: nn.LinearCrossEntropyOptions()),
        ):
            yield Case(
                name,
                lambda options=options: WithTargets(
                    nn.LinearCrossEntropyLoss(3, 4, reduction="none", options=options())
                ),
                inputs=with_targets,
                called=("linear_cross_entropy",),
            )


class WithTargets(nn.Module):
    """A loss with parameters of its own, as the model's last layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(2, 3), layer

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return first(self.layer(self.first(inputs["x"]).tanh(), inputs["t"]))[:, None]


def with_targets() -> dict[str, Tensor]:
    return {"x": torch.randn(COUNT, 2, dtype=F64), "t": torch.tensor([0, 3, 1, 2, 3])}


def cases() -> dict[str, Case]:
    """All of them by name."""
    kinds = (
        activations,
        convolutions,
        pools,
        norms,
        recurrent,
        attention,
        embeddings,
        others,
        reparametrized,
        losses,
    )
    found = [case for kind in kinds for case in kind() if case is not None]
    names = [case.name for case in found]
    assert len({*names}) == len(names), "a name twice"
    return {case.name: case for case in found}
