"""Each example's loss is its own: the same in any company, at any time, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from problems import F64
from torch import Tensor, nn

from msif_lib import Stage, cross_entropy


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, dtype=F64, generator=g), torch.arange(count) % 2


def of(module: nn.Module, **changes) -> Stage:
    torch.manual_seed(1)
    given = {"head": nn.LazyLinear(2).double(), "loss": cross_entropy, "data": data(), "l2": 0.1}
    given |= changes
    given["head"](module(given["data"][0]))
    return Stage(module, **given)


# --- what a module holds beside its parameters ---------------------------------------------------


class Counting(nn.Module):
    """Writes into a buffer, a plain tensor and a number, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=F64)
        self.register_buffer("seen", torch.zeros(3, dtype=F64))
        self.also, self.calls = torch.zeros(2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.also.add_(1)
        self.calls += 1
        self.linear.last = x
        return self.linear(x)


def held_by(module: nn.Module) -> list[tuple[object, int]]:
    """Everything that a module and its children hold, with the version of what is a tensor."""
    return [
        (value, value._version if isinstance(value, Tensor) else 0)
        for child in module.modules()
        for place in (vars(child), child._buffers)
        for value in place.values()
    ]


def with_statistics() -> nn.Module:
    return nn.InstanceNorm1d(2, affine=True, track_running_stats=True)


MOVING = {
    "its own": Counting,
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), with_statistics(), nn.Flatten()
    ).double(),
    "weight_norm by a hook": lambda: nn.utils.weight_norm(nn.Linear(4, 3)).double(),
}


@pytest.mark.parametrize("name", MOVING)
def test_evaluations_leave_what_a_module_holds_as_it_was(name):
    module = MOVING[name]()
    module(data()[0])
    before = held_by(module)
    stage = of(module, check=False)
    before = held_by(module)
    first = stage.gradient()
    stage.gradient(stage.vector() + 1.0)
    assert len(list(stage.per_example_gradients())) and len(stage.example_losses()) == 24
    assert torch.equal(stage.gradient(), first), "a gradient depends on earlier calls"
    after = held_by(module)
    assert all(a is b and one == two for (a, one), (b, two) in zip(before, after, strict=True))


def test_a_mode_switched_later_is_noticed():
    """In evaluation mode running statistics stay; set to training, they would move."""
    module = MOVING["InstanceNorm"]().eval()
    stage = of(module)
    stage.gradient()
    module.train()
    stage.check_module()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    stage.gradient()
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
