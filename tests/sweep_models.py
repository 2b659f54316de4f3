"""Models as people write them, small."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sweep import COUNT, F64, Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations


def words(count: int = 4, length: int = 3) -> Tensor:
    return torch.randint(count, (COUNT, length))


def pictures(*shape: int) -> Tensor:
    return torch.randn(COUNT, *shape, dtype=F64)


class VisionTransformer(nn.Module):
    """Patches, a class token, places, one block before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 3, 4))
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return (x + self.mlp(self.norms[1](x)))[:, 0]


class Generator(nn.Module):
    """A causal transformer over words; the logits of the next word by the table of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(4, 4), nn.Embedding(3, 4)
        self.norm, self.project = nn.LayerNorm(4), nn.Linear(4, 12, bias=False)
        self.out = nn.Linear(4, 4)
        self.logits = nn.Linear(4, 4, bias=False)
        self.logits.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words) + self.places(torch.arange(3))
        q, k, v = (
            part.unflatten(2, (2, 2)).transpose(1, 2)
            for part in self.project(self.norm(x)).chunk(3, 2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.logits(x).flatten(1)


class Unet(nn.Module):
    """Down, up, and the way across."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 2, 3, padding=1)
        self.middle = nn.Conv2d(2, 2, 1)
        self.up = nn.ConvTranspose2d(2, 2, 2, stride=2)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = F.silu(self.down(x))
        below = F.silu(self.middle(F.max_pool2d(across, 2)))
        return self.out(torch.cat([across, self.up(below)], 1)).flatten(1)


class Residual(nn.Module):
    """A residual block with group norm, and one with batch norm in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 2)
        self.group, self.batch = nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()
        nn.init.normal_(self.batch.bias)  # at 0 units that nothing reaches would stand at the bend
        self.branch = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.group(self.first(x)))
        x = F.relu(x + self.batch(self.branch(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Reader(nn.Module):
    """A bidirectional GRU over padded sentences; the mean over the words that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2, padding_idx=0)
        self.gru = nn.GRU(2, 2, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor) -> Tensor:
        there = (words > 0).to(self.table.weight)[..., None]
        return (self.gru(self.table(words))[0] * there).sum(1) / there.sum(1)


def sentences() -> Tensor:
    return torch.tensor([[1, 2, 0], [3, 0, 0], [4, 1, 2], [2, 2, 0], [1, 3, 4]])


class Experts(nn.Module):
    """The best two of three experts, mixed by their gates."""

    def __init__(self, every: bool) -> None:
        super().__init__()
        self.every, self.gate = every, nn.Linear(2, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.gate(x).topk(2, 1)
        gates = gates.softmax(1)
        if self.every:
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            taken = outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[2]))
            return (gates[..., None] * taken).sum(1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            example, rank = torch.where(chosen == number)
            if len(example):
                mixed.index_add_(0, example, gates[example, rank, None] * expert(x[example]))
        return mixed


class Sets(nn.Module):
    """DeepSets: a sum and a maximum over the members that a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3), nn.Linear(6, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x, mask = F.softplus(self.inner(inputs["x"])), inputs["mask"][..., None]
        total = x.masked_fill(~mask, 0.0).sum(1)
        most = x.masked_fill(~mask, float("-inf")).amax(1)
        return self.outer(torch.cat([total, most], 1)).tanh()


def some_sets() -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    return {"x": torch.randn(COUNT, 3, 2, dtype=F64), "mask": mask}


class Graphs(nn.Module):
    """Two rounds of messages along edges, summed where they arrive; a graph an example."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(4, 2), nn.GRUCell(2, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x, source, target = inputs["x"], inputs["edges"][:, 0], inputs["edges"][:, 1]
        for _ in range(2):
            ends = [x.gather(1, end[..., None].expand(-1, -1, 2)) for end in (source, target)]
            sent = self.message(torch.cat(ends, 2)).relu()
            arrived = torch.zeros_like(x).scatter_add(1, target[..., None].expand_as(sent), sent)
            x = self.update(arrived.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        return x.mean(1)


def some_graphs() -> dict[str, Tensor]:
    return {"x": torch.randn(COUNT, 3, 2, dtype=F64), "edges": torch.randint(3, (COUNT, 2, 4))}


class Flow(nn.Module):
    """Steps of Runge and Kutta along a learned field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))

    def slope(self, time: float, x: Tensor) -> Tensor:
        return self.field(torch.cat([x, torch.full_like(x[:, :1], time)], 1))

    def forward(self, x: Tensor) -> Tensor:
        step = 0.25
        for number in range(4):
            half = x + step / 2 * self.slope(number * step, x)
            x = x + step * self.slope((number + 0.5) * step, half)
        return x


class Coupling(nn.Module):
    """A normalising flow of two coupling layers; the head reads what it gives and its volume."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        volume = torch.zeros_like(x[:, :1])
        for net in self.nets:
            kept, moved = x.chunk(2, 1)
            scale, shift = net(kept).chunk(2, 1)
            scale = scale.tanh()
            x, volume = torch.cat([moved * scale.exp() + shift, kept], 1), volume + scale
        return torch.cat([x, volume], 1)


class Equilibrium(nn.Module):
    """A fixed point, iterated; and its implicit form, a solve, around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = 0.3 * self.inner.weight.tanh()
        linear = torch.linalg.solve(torch.eye(2, dtype=x.dtype) - weight, self.outer(x).mT).mT
        z = torch.zeros_like(x)
        for _ in range(6):
            z = (z @ weight.T + self.outer(x)).tanh()
        return torch.cat([z, linear], 1)


class Quantised(nn.Module):
    """Rounded with a gradient passed straight through: no derivative of what is evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()


class Distilled(nn.Module):
    """Beside itself, held constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * x.tanh().detach()


class Encoded(nn.Module):
    """An encoder that is evaluated without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.encoder(x).tanh()
        return self.last(x)


class Convolved(nn.Module):
    """Separable causal convolutions with weight norm, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = parametrizations.weight_norm(nn.Conv1d(2, 2, 2, groups=2, dilation=1))
        self.point = nn.Conv1d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.point(self.depth(F.pad(x, (1, 0)))), 1).mean(2)


class Adapted(nn.Module):
    """A frozen map and a low-rank change of it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(2, 1, bias=False), nn.Linear(1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + 0.5 * self.up(self.down(x))).relu()


class Recomputed(nn.Module):
    """Activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.block = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.block, x, use_reentrant=self.reentrant).sin()


class Retrieval(nn.Module):
    """Attention over a memory that is a parameter, by distances."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(2, 2), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        apart = (self.query(x)[:, None] - self.memory).square().sum(2)
        return F.normalize((-apart).softmax(1) @ self.memory, dim=1)


def sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the words of a sentence."""
    losses = F.cross_entropy(outputs.unflatten(1, (3, 2)).mT, targets, reduction="none")
    return losses.mean(1)


def next_words(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of a language model with the last layer of its own: over the words that are no padding."""
    losses = F.cross_entropy(outputs.unflatten(1, (3, 4)).mT, targets, reduction="none")
    return losses.sum(1) / (targets >= 0).sum(1).clamp(min=1)


def image(height: int, width: int) -> Any:
    return lambda: pictures(1, height, width)


def cases() -> dict[str, Case]:
    """All of them by name."""
    found = [
        Case("vision transformer", VisionTransformer, inputs=image(2, 4)),
        Case(
            "language model with tied words",
            Generator,
            inputs=words,
            outputs=12,
            loss=next_words,
            targets=lambda: torch.tensor(
                [[1, 2, 3], [0, 1, -100], [3, 3, 0], [2, -100, -100], [1, 0, 2]]
            ),
        ),
        Case(
            "U-Net",
            Unet,
            inputs=image(2, 4),
            loss=lambda o, t: (o - t).square().mean(1),
            outputs=8,
            targets=lambda: pictures(8),
        ),
        Case("residual network", Residual, inputs=image(3, 3)),
        Case("text classifier", Reader, inputs=sentences, constant={"table.weight": [0]}),
        Case("mixture of experts, all evaluated", lambda: Experts(True)),
        Case("mixture of experts, those chosen evaluated", lambda: Experts(False)),
        Case("deep sets", Sets, inputs=some_sets),
        Case("graph network", Graphs, inputs=some_graphs),
        Case("neural differential equation", Flow),
        Case("normalising flow", Coupling),
        Case("deep equilibrium", Equilibrium),
        Case("gated convolutions with weight norm", Convolved, inputs=lambda: pictures(2, 4)),
        Case("low-rank adaptation", Adapted),
        Case("checkpointed, reentrant", lambda: Recomputed(True)),
        Case("checkpointed, not reentrant", lambda: Recomputed(False)),
        Case("retrieval", Retrieval),
        Case(
            "tagger",
            lambda: nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Tanh()),
            inputs=words,
            loss=sequence_loss,
            outputs=6,
            targets=lambda: torch.randint(2, (COUNT, 3)),
        ),
        Case("straight-through rounding", lambda: nn.Sequential(nn.Linear(2, 3), Quantised())),
        Case("self-distillation", lambda: nn.Sequential(nn.Linear(2, 3), Distilled())),
        Case("encoder without a graph", Encoded, called=("embedding",)),
    ]
    return {case.name: case for case in found}
