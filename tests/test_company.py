"""Each example's loss is its own: the same in any company, at any time, and nothing else moves."""

from __future__ import annotations

import copy
import os
import random
from collections import UserDict, deque, namedtuple
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from problems import F64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from msif_lib import Chain, FixedEmbeddingInfluence, SingleStageInfluence, Stage, cross_entropy
from msif_lib.links import Frozen, Optimum, Unrolled
from msif_lib.solvers import Dense
from msif_lib.support.chance import Generators
from msif_lib.training import SGD, descend, train


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, dtype=F64, generator=g), torch.arange(count) % 2


def of(module: nn.Module, width: int = 3, **changes) -> Stage:
    torch.manual_seed(1)
    given = {"head": nn.Linear(width, 2).double(), "loss": cross_entropy, "data": data(), "l2": 0.1}
    return Stage(module, **(given | changes))


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


class Averaging(nn.Module):
    """Keeps an average of what it saw, past torch's counter, of large batches only or in a dict."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 3, dtype=F64), how
        self.register_buffer("mean", torch.zeros(4, dtype=F64))
        self.log, self.inside = [], {"mean": torch.zeros(4, dtype=F64)}

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().mean(0)
        if self.how == "data":
            self.mean.data.mul_(0.9).add_(seen)
        elif {"large": len(x) > 8, "positive": (x[:, 0] > 1.5).any()}.get(self.how):
            self.mean += seen
        elif self.how == "containers":
            self.log.append(len(x))
            self.inside["mean"].add_(seen)
            self.inside["calls"] = 1
        return self.linear(x)


@pytest.mark.parametrize(
    ("how", "check"),  # what only some examples move is found by reading all of them
    [("positive", True), *product(["data", "large", "containers"], [True, False])],
)
def test_what_is_written_at_some_evaluations_only_or_past_the_counter_stays(how, check):
    module = Averaging(how)
    stage = of(module, check=check)
    stage.gradient()
    stage.example_losses()
    assert not module.mean.any() and not module.log
    assert module.inside.keys() == {"mean"} and not module.inside["mean"].any()


class Remembering(nn.Module):
    """A learned table that is looked up once and kept, as position embeddings are."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.kept, self.keeps = nn.Embedding(3, 4, dtype=F64), {}, keeps

    def forward(self, x: Tensor) -> Tensor:
        if 3 not in self.kept or not self.keeps:
            self.kept[3] = self.table(torch.arange(3))
        return torch.tanh(x[:, None] + self.kept[3]).sum(2)


def test_what_a_model_keeps_of_a_parameter_is_no_constant():
    module = Remembering(keeps=True)
    stage, want = of(module), of(Remembering(keeps=False))
    for _ in range(2):
        assert torch.equal(stage.gradient(), want.gradient())
    assert not module.kept and stage.gradient()[:12].all()


class Weighing(nn.Module):
    """A loss that counts what it was called for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.log = []

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(float(self.calls))
        return cross_entropy(outputs, targets)


class Plain:
    def __init__(self) -> None:
        self.calls, self.log = 0, []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        return cross_entropy(outputs, targets)

    method = __call__


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [Weighing, Plain, "method"])
def test_what_a_loss_holds_stays(kind, check):
    mine = Plain() if kind == "method" else kind()
    stage = of(Counting(), loss=mine.method if kind == "method" else mine, check=check)
    stage.gradient()
    stage.example_losses()
    assert mine.calls == 0 and not mine.log


def test_a_scripted_module_and_its_buffers_are_left_as_they_were():
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    scripted = torch.jit.script(norm)
    stage = of(scripted)
    torch.testing.assert_close(stage.gradient(), of(norm).gradient())
    assert all(torch.equal(one, two) for one, two in zip(scripted.buffers(), norm.buffers()))


@pytest.mark.parametrize("name", MOVING)
def test_evaluations_leave_what_a_module_holds_as_it_was(name):
    module = MOVING[name]()
    module(data()[0])
    stage = of(module, 4 if name == "InstanceNorm" else 3, check=False)
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
    stage = of(module, 4)
    stage.gradient()
    module.train()
    stage.check_module()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    stage.gradient()
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


# --- the company of an example -------------------------------------------------------------------


def linear(width: int = 2) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(4, width, dtype=F64)


def plain(loss: Callable, given: Any, module: nn.Module | None = None, **changes) -> Stage:
    return Stage.of(module or linear(), loss, given, l2=0.1, **changes)


def class_weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """What reduction="mean" does to weights, with the shape of losses an example."""
    weights = torch.tensor([1.0, 3.0], dtype=F64)[targets]
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses * weights / weights.mean()


def broadcast(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean(1)


def sorted_data(count: int, first: int) -> tuple[Tensor, Tensor]:
    """The first so many of one class, then the other."""
    x, _ = data(count)
    return x, (torch.arange(count) >= first).long()


@pytest.mark.parametrize("batch_size", [1, 5, 1024])
@pytest.mark.parametrize(("count", "first"), [(24, 10), (24, 23), (200, 180), (3, 2)])
def test_losses_that_mix_examples_of_sorted_data(batch_size, count, first):
    x, y = sorted_data(count, first)
    message = "the loss mixes the examples of a batch"
    with pytest.raises(ValueError, match=message):
        plain(class_weighted, (x, y), batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        plain(broadcast, (x, y.to(F64)), linear(1), batch_size=batch_size)
    assert plain(cross_entropy, (x, y), batch_size=batch_size).size == count


class Centred(nn.Module):
    """Takes the mean over the batch away; a head of zeros hides it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 3, dtype=F64), nn.Linear(3, 2, dtype=F64)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.head(y - y.mean(0))


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_a_model_that_mixes_examples_is_found_behind_a_head_of_zeros_and_in_any_unit(scale):
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * cross_entropy(outputs, targets)

    with pytest.raises(ValueError, match="the model mixes the examples of a batch"):
        plain(loss, data(), Centred())


def test_rounding_is_no_company():
    """Float32, fitted to losses at the rounding of the outputs: only the last bits differ."""
    x, y = (one.float() if one.is_floating_point() else one for one in data(60))
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        cross_entropy(model(x), y).mean().backward()
        optimiser.step()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter *= 3
    losses = cross_entropy(model(x), y)
    assert losses.max() < 1e-3 and losses.min() < 1e-7
    assert Stage.of(model, cross_entropy, (x, y)).size == 60


class Words(Dataset):
    """Sentences of unequal length."""

    def __init__(self, lengths: list[int]) -> None:
        g = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(1, 6, (length,), generator=g) for length in lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.ids[i], torch.tensor(i % 2)


def padded(items: list) -> tuple[Tensor, Tensor]:
    ids, targets = zip(*items, strict=True)
    return pad_sequence(ids, batch_first=True), torch.stack(targets)


class Bag(nn.Module):
    """Averages over words, with or without the padding."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(6, 3, dtype=F64), nn.Linear(3, 2, dtype=F64)
        self.masked = masked

    def forward(self, ids: Tensor) -> Tensor:
        counted = (ids > 0) if self.masked else torch.ones_like(ids)
        weights = (counted / counted.sum(1, keepdim=True)).to(F64)
        return self.head((weights[:, None] @ self.table(ids))[:, 0])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("lengths", [[2, 7, 1, 4, 3, 6, 5, 2, 1, 8], [3] * 30 + [4]])
def test_padding_by_collate_counts_or_does_not(lengths, batch_size):
    loader = DataLoader(Words(lengths), collate_fn=padded)
    changes = {"batch_size": batch_size}
    with pytest.raises(ValueError, match=r"collate_fn pads its tensors to .* mask it in the model"):
        plain(cross_entropy, loader, Bag(masked=False), **changes)
    assert plain(cross_entropy, loader, Bag(masked=True), **changes).size == len(lengths)


def test_a_collate_that_makes_other_values_of_an_example():
    def centred(items: list) -> tuple[Tensor, Tensor]:
        x, y = map(torch.stack, zip(*items, strict=True))
        return x - x.mean(0), y

    loader = DataLoader(TensorDataset(*data()), collate_fn=centred)
    with pytest.raises(ValueError, match="collate_fn makes other values of it"):
        plain(cross_entropy, loader)


# --- chance --------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Leaves a layer out, rarely, by a generator of its choice."""

    def __init__(self, draw: Callable[[], float], rate: float = 0.02) -> None:
        super().__init__()
        self.draw, self.rate = draw, rate

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.draw() >= self.rate)


def numpy_draws(generator: Any) -> Callable[[], float]:
    return lambda: generator.random()


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "NumPy": lambda: np.random.rand(),  # noqa: NPY002 (what a user's code may do)
    "Python": random.random,
    "one of torch that it holds": (lambda g: lambda: float(torch.rand((), generator=g)))(
        torch.Generator()
    ),
    "one of NumPy that it holds": numpy_draws(np.random.default_rng(0)),
    "an old one of NumPy": np.random.RandomState(0).random_sample,
    "one of Python that it holds": random.Random(0).random,
}


def states() -> list[bytes]:
    return Generators().states()


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", range(3))
def test_what_draws_rarely_is_always_found_and_named(name, seed):
    torch.manual_seed(seed)
    before = states()
    model = nn.Sequential(linear(3), nn.Sequential(DropPath(DRAWS[name])), nn.Linear(3, 2).double())
    before = states()
    with pytest.raises(
        ValueError, match=r"depends on chance: random numbers change what 1\.0 returns"
    ):
        plain(cross_entropy, data(), model)
    assert states() == before, "the user's generators have moved"


def test_a_loss_that_draws():
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * (torch.rand(()) > 0.001)

    with pytest.raises(
        ValueError, match="depends on chance: random numbers change what the loss returns"
    ):
        plain(loss, data())


RNG, GENERATOR, COUNTS = np.random.default_rng(0), torch.Generator(), {"calls": 0}


def counted() -> float:
    COUNTS["calls"] += 1
    return COUNTS["calls"]


FACTORS = {
    "a generator of the module": lambda: RNG.standard_normal(),
    "one of torch": lambda: float(torch.randn((), generator=GENERATOR)),
    "the system": lambda: int.from_bytes(os.urandom(2)) / 2**16,
    "the system by random": lambda: random.SystemRandom().random(),
    "a new one each time": lambda: np.random.default_rng().standard_normal(),
    "a counter": counted,
}


class Scaled(nn.Module):
    def __init__(self, factor: Callable[[], Any]) -> None:
        super().__init__()
        self.linear, self.factor = linear(), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor()


@pytest.mark.parametrize("size", [0.5, 1e-4, 1e-9])
@pytest.mark.parametrize("name", FACTORS)
def test_chance_and_counters_that_move_no_known_generator(name, size):
    model = Scaled(lambda: 1 + size * FACTORS[name]())
    with pytest.raises(ValueError, match="depends on chance"):
        plain(cross_entropy, data(), model)


@pytest.mark.parametrize("kept", [[0], {"calls": 0}, deque([0])], ids=lambda kept: str(type(kept)))
def test_a_counter_in_a_list_or_dict_is_put_back_and_refused_where_losses_depend_on_it(kept):
    class Keeping(nn.Module):
        def __init__(self, counts: float) -> None:
            super().__init__()
            self.linear, self.kept, self.counts = linear(), kept, counts

        def forward(self, x: Tensor) -> Tensor:
            key = next(iter(self.kept)) if isinstance(self.kept, dict) else 0
            self.kept[key] += 1
            return self.linear(x) * (1 + self.counts * self.kept[key])

    before = copy.copy(kept)
    plain(cross_entropy, data(), Keeping(0.0)).gradient()
    assert kept == before
    with pytest.raises(ValueError, match=r"earlier evaluations left in model \(.*call model\.eval"):
        plain(cross_entropy, data(), Keeping(1e-3))
    assert kept == before


class Drawing(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return x @ torch.randn(x.shape[1], x.shape[1], dtype=x.dtype)


def left_out(rate: float, x: Tensor) -> Tensor:
    """Stochastic depth, as it is written."""
    kept = torch.bernoulli(torch.full((len(x), 1), 1 - rate, dtype=x.dtype))
    return x * kept if torch.rand(()) >= rate else 0 * x


def there_and_back(x: Tensor) -> Tensor:
    order = torch.randperm(len(x))
    return x[order][order.argsort()]


HARMLESS = {
    "seeded": seeded,
    "times zero": lambda x: x + 0.0 * torch.randn_like(x),
    "a rate of zero": partial(left_out, 0.0),
    "a layer thrown away": lambda x: x + 0.0 * nn.Linear(2, 2).weight.sum(),
    "an order and its inverse": there_and_back,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_draws_that_no_loss_depends_on_are_taken_and_put_back(name):
    model = nn.Sequential(Drawing(HARMLESS[name]), linear())
    before = states()
    stage = plain(cross_entropy, data(), model)
    once = stage.gradient()
    assert states() == before
    torch.rand(1)
    before = states()
    torch.testing.assert_close(stage.gradient(), once, rtol=1e-13, atol=1e-15)
    stage.example_losses()
    assert states() == before
    unchecked = plain(cross_entropy, data(), model, check=False)
    unchecked.gradient()
    assert states() == before


@pytest.mark.parametrize("rate", [0.02, 1e-4])
def test_the_module_whose_draws_count_is_named_beside_one_whose_do_not(rate):
    parts = [Drawing(HARMLESS["times zero"]), Drawing(partial(left_out, rate)), linear()]
    with pytest.raises(
        ValueError, match=r"depends on chance: random numbers change what 1 returns"
    ):
        plain(cross_entropy, data(), nn.Sequential(*parts))


class Erased(Dataset):
    """Erases an example, rarely; or seeds by its index before it does."""

    def __init__(self, seeds: bool, draw: Callable[[], float] = DRAWS["torch"]) -> None:
        self.seeds, self.draw = seeds, draw

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.seeds:
            torch.manual_seed(index)
        keep = self.draw() >= 0.02
        noise = torch.randn(4) if self.seeds else torch.zeros(4)
        return data()[0][index] * keep + noise, data()[1][index]


@pytest.mark.parametrize(("name", "workers"), [("torch", 1), *((name, 0) for name in DRAWS)])
def test_a_data_set_that_erases_rarely(name, workers):
    before = states()
    loader = DataLoader(Erased(False, DRAWS[name]), num_workers=workers)
    with pytest.raises(ValueError, match=r"each time example \d+ is read .*seed it by the index"):
        plain(cross_entropy, loader)
    assert states() == before


def test_a_data_set_that_seeds_each_example_is_taken_and_moves_no_generator():
    before = states()
    stage = plain(cross_entropy, Erased(True))
    once = stage.example_losses()
    torch.manual_seed(7)
    before = states()
    assert torch.equal(stage.example_losses(), once) and states() == before
    torch.testing.assert_close(
        torch.cat([stage.losses_at(stage.vector(), *batch) for batch in stage.read(5)]), once
    )


# --- what a user's objects are -------------------------------------------------------------------


class Halved(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.how = linear(3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.how(x))


def by_column(x: Tensor) -> Tensor:
    x[:, 1] = 0
    return x


IN_PLACE = {
    "ReLU": nn.Sequential(nn.ReLU(inplace=True), linear(3)),
    "mul_": Halved(lambda x: x.mul_(0.5)),
    "an index": Halved(by_column),
    "a view": Halved(lambda x: x.view(-1).clamp_(min=0).view_as(x)),
    "data": Halved(lambda x: x.data.clamp_(min=0)),
    "NumPy": Halved(lambda x: torch.from_numpy(np.maximum(x.numpy(), 0, out=x.numpy()))),
}


@pytest.mark.parametrize("form", ["tensors", "data set"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_writes_into_its_inputs(name, form):
    x, y = data()
    mine = x.clone()
    given = (mine, y) if form == "tensors" else TensorDataset(mine, y)
    who = r"embedding\.0" if name == "ReLU" else "embedding"
    with pytest.raises(ValueError, match=rf"^{who} writes into the inputs .*inplace=False"):
        of(IN_PLACE[name], data=given)
    assert torch.equal(mine, x) and mine._version == 0


def test_a_loss_that_writes_into_its_targets_or_only_into_outputs():
    x, y = data()
    mine = y.clone()

    def replaced(outputs: Tensor, targets: Tensor) -> Tensor:
        targets[targets == 1] = 0
        return cross_entropy(outputs, targets)

    with pytest.raises(ValueError, match=r"loss writes into the targets .*targets\.clone"):
        plain(replaced, (x, mine))
    assert torch.equal(mine, y)

    def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.mul_(2.0), targets)

    def twice(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(2.0 * outputs, targets)

    assert torch.equal(plain(scaled, data()).gradient(), plain(twice, data()).gradient())


def test_power_iterations_in_training_mode_are_refused_and_taken_in_evaluation_mode():
    def module() -> nn.Module:
        torch.manual_seed(0)
        part = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        return nn.Sequential(part, nn.Tanh()).double()

    with pytest.raises(ValueError, match=r"earlier evaluations left in embedding\.0.*\.eval\(\)"):
        of(module())
    assert of(module().eval()).size == 24


@pytest.mark.numeric
@pytest.mark.parametrize("form", ["tensors", "data set"])
def test_inputs_and_targets_that_require_a_gradient_are_read_without(form, tmp_path):
    x, _ = data(20)
    t = torch.softmax(torch.sin(torch.arange(40.0, dtype=F64)).view(20, 2), 1)
    results = []
    for requires in (False, True):
        x, t = x.detach().requires_grad_(requires), t.detach().requires_grad_(requires)
        given = (x, t) if form == "tensors" else TensorDataset(x, t)
        torch.manual_seed(0)
        embedding = nn.Sequential(nn.Linear(4, 2), nn.Tanh()).double()
        stage = Stage(embedding, nn.Linear(2, 2).double(), cross_entropy, given, l2=0.1)
        train(stage)
        run = SingleStageInfluence(stage, Dense(), progress=False)
        found = [
            run.scores(given, per_test=True).values,
            run.scores(given, out=tmp_path / f"{form}{requires}.npy").values,
            run.self_influence().values,
            stage.example_losses(),
        ]
        path = descend(stage, SGD(0.1), epochs=1, batch_size=5, seed=0, progress=False)
        chain = Chain([Unrolled(stage, path)], progress=False)
        found.append(chain.scores(given)[0].values)
        results.append([torch.as_tensor(np.array(one)) for one in found])
        assert not any(getattr(one, "requires_grad", False) for one in found)
        assert x.grad is None and t.grad is None and x.requires_grad == requires
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_hand_over_that_merges_in_place_leaves_the_stage_as_it_was():
    def merge(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.mul_(2.0) for name, part in named.items()}

    x, y = data()
    first = plain(cross_entropy, (x, y), hands_on=merge)
    before = first.vector()
    second = plain(cross_entropy, (x, y), shared="weight", trained="bias")
    second.load_vector(2.0 * before)
    Chain([Optimum(first), Frozen(second)], stationarity_tol=float("inf"), progress=False)
    assert torch.equal(first.vector(), before)


def test_modes_hooks_and_requires_grad_stay(mlp):
    first, second = mlp.stages()
    modules = [first.model, second.model]

    def seen() -> list[Any]:
        return [
            (child.training, len(child._forward_hooks), len(child._forward_pre_hooks),
             [(p.requires_grad, p.grad) for p in child.parameters()])
            for module in modules
            for child in module.modules()
        ]  # fmt: skip

    second.head.eval()
    next(iter(second.head.parameters())).requires_grad_(False)
    before = seen()
    second = Stage(second.embedding, second.head, second.loss, second.data, second.l2)
    run = FixedEmbeddingInfluence(first, second, Dense(), stationarity_tol=100, progress=False)
    run.scores(mlp.test_data)
    assert seen() == before


# --- what counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 2)])
def test_cross_entropy_leaves_out_what_torch_leaves_out(shape):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, *shape[1:], dtype=F64, generator=g).requires_grad_()
    targets = torch.randint(3, shape, generator=g)
    targets[1], targets[2:, ...][targets[2:] == 1] = -100, -100
    losses = cross_entropy(logits, targets)
    for i in range(6):
        counts = (targets[i] != -100).any()
        want = nn.functional.cross_entropy(logits[[i]], targets[[i]]) if counts else torch.zeros(())
        torch.testing.assert_close(losses[i], want.to(F64), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


def test_cross_entropy_takes_probabilities():
    g = torch.Generator().manual_seed(0)
    logits, p = torch.randn(2, 4, 3, 5, dtype=F64, generator=g).unbind(0)
    p = p.softmax(1)
    want = -(p * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(cross_entropy(logits, p), want.mean(1))
    torch.testing.assert_close(cross_entropy(logits[..., 0], p[..., 0]), want[:, 0])


def test_an_example_of_which_nothing_counts_has_no_influence():
    x, y = data()
    y[3] = -100
    stage = plain(cross_entropy, (x, y))
    run = SingleStageInfluence(stage, Dense(), stationarity_tol=100, progress=False)
    values = run.scores((x, y)).values
    assert values[3] == 0 and values[:3].all() and values.isfinite().all()


def test_masks_may_hold_infinities_but_no_derivative_may_meet_them():
    class Attention(nn.Module):
        def __init__(self, after: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.key, self.head, self.after = nn.Linear(3, 3), nn.Linear(3, 2), after
            self.double()

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            k, mask = self.key(inputs["words"]), inputs["mask"]
            scores = k @ k.mT + mask
            if self.after:  # finite, but 0 times infinity in its derivative
                scores = torch.exp(k @ k.mT * torch.where(mask < 0, 2 * mask, 1.0)).clamp(max=1.0)
                scores = scores.nan_to_num(0.0)
            return self.head((scores.softmax(-1) @ k).sum(1))

    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(12, 4, 4, dtype=F64)
    mask[5:, :, 3] = float("-inf")
    words = torch.randn(12, 4, 3, dtype=F64, generator=g)
    given = {"words": words, "mask": mask}, torch.arange(12) % 2
    stage = plain(cross_entropy, given, Attention(after=False))
    assert stage.gradient().isfinite().all()
    SingleStageInfluence(stage, Dense(), 99.0, progress=False).scores(given)
    with pytest.raises(ValueError, match="inputs of example 5 are not finite, nor is the gradient"):
        plain(cross_entropy, given, Attention(after=True))
    words[7] = float("nan")
    with pytest.raises(ValueError, match="the inputs of example 7 are not finite, nor is its loss"):
        plain(cross_entropy, given, Attention(after=False))


def test_missing_targets_may_be_nan_where_the_loss_masks_them():
    def masked(outputs: Tensor, targets: Tensor) -> Tensor:
        there = ~targets.isnan()
        return (torch.where(there, targets - outputs, 0.0) ** 2).sum(1)

    x, _ = data()
    t = torch.sin(torch.arange(48.0, dtype=F64)).view(24, 2)
    t[4, 1] = t[9, 0] = float("nan")
    assert plain(masked, (x, t)).gradient().isfinite().all()
    with pytest.raises(ValueError, match="the targets of example 4 are not finite, nor is its los"):
        plain(lambda o, t: ((o - t) ** 2).sum(1), (x, t))


def test_a_model_whose_outputs_are_not_finite_is_named():
    model = linear()
    with torch.no_grad():
        model.bias[0] = float("inf")
    with pytest.raises(ValueError, match="the model's outputs for example 0 are not finite"):
        plain(cross_entropy, data(), model)


# --- forms of data -------------------------------------------------------------------------------


def examples() -> TensorDataset:
    return TensorDataset(*data())


class Normalising(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield (x - 1.0) / 2.0, y


class Backwards(SequentialSampler):
    def __iter__(self):
        return iter(range(3))


class Tampered(BatchSampler):
    def __iter__(self):
        return iter([[0, 1], [2]])


OTHER_EXAMPLES = {
    "own __iter__": (lambda d: Normalising(d, batch_size=4), "Normalising with an __iter__ of its"),
    "num_samples": (
        lambda d: DataLoader(d, sampler=RandomSampler(d, num_samples=5)), r"each once \(5 a pass"),
    "replacement": (
        lambda d: DataLoader(d, sampler=RandomSampler(d, True)), r"each once \(with replacement"),
    "some of them": (lambda d: DataLoader(d, sampler=SequentialSampler(range(9))), "9 a pass"),
    "repeated": (
        lambda d: DataLoader(d, sampler=RandomSampler(range(5), num_samples=24)), "other examples"),
    "a subclass": (lambda d: DataLoader(d, sampler=Backwards(d)), "Backwards as its sampler"),
    "weights": (
        lambda d: DataLoader(d, sampler=WeightedRandomSampler([1.0] * 24, 24)), "WeightedRandom"),
    "a batch sampler's subclass": (
        lambda d: DataLoader(d, batch_sampler=Tampered(SequentialSampler(d), 2, False)),
        "Tampered as its sampler"),
    "drop_last": (
        lambda d: DataLoader(d, batch_size=10, drop_last=True), "leaves 4 of 24 examples out"),
    "no batches": (lambda d: DataLoader(d, batch_size=None), "with batch_size=None; give it a"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_EXAMPLES)
def test_loaders_that_give_other_examples_than_their_data_set(name):
    make, message = OTHER_EXAMPLES[name]
    with pytest.raises(ValueError, match=message):
        plain(cross_entropy, make(examples()))


@pytest.mark.parametrize(
    "settings", [{"shuffle": True}, {"batch_size": 6, "drop_last": True}, {"batch_size": 7}]
)
def test_loaders_that_give_each_example_once_are_read_in_order(settings):
    stage = plain(cross_entropy, DataLoader(examples(), **settings))
    assert torch.equal(stage.example_losses(), plain(cross_entropy, data()).example_losses())


@pytest.mark.numeric
@pytest.mark.parametrize("empty", [(), {}, None, []], ids=repr)
def test_data_without_targets(empty):
    """A self-supervised loss looks at the outputs alone."""

    def loss(outputs: Tensor, _: Any) -> Tensor:
        return torch.tanh(outputs).square().sum(1)

    x, y = data()
    without, zeros = plain(loss, (x, empty)), plain(loss, (x, 0 * y))
    results = []
    for stage, test in ((without, (x[:3], empty)), (zeros, (x[:3], y[:3]))):
        run = SingleStageInfluence(stage, Dense(), 99.0, progress=False)
        path = descend(stage, SGD(0.1), epochs=1, batch_size=7, seed=0, progress=False)
        steps = Chain([Unrolled(stage, path)], progress=False).scores(test, per_test=True)
        results.append([run.scores(test).values, run.self_influence().values, steps[0].values])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


class Items(Dataset):
    """What it is told, item by item."""

    def __init__(self, item: Callable[[int], Any], length: Any = 24) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


def row(i: int) -> tuple[Tensor, Tensor]:
    return data()[0][i], data()[1][i]


def fails_at_7(i: int) -> tuple[Tensor, Tensor]:
    if i == 7:
        raise KeyError("no such file")
    return row(i)


MALFORMED = {
    "dicts": (
        Items(lambda i: {"input_ids": row(i)[0], "labels": row(i)[1]}),
        r"not a dict with \['input_ids', 'labels'\]; wrap it",
    ),
    "three parts": (Items(lambda i: (*row(i), 0)), "not 3 parts; several inputs make one tuple"),
    "one part": (Items(lambda i: row(i)[0]), "not Tensor; .* without targets the second is"),
    "a length too long": (Items(row, 30), "has 30 examples, but reading example 24 .* IndexError"),
    "an item that fails": (Items(fails_at_7), "reading example 7 fails: KeyError: 'no such file'"),
    "unequal shapes": (
        Words([2, 7, 1]), "cannot be put together into a batch of examples .* collate_fn that can"),
    "sequence first": (
        DataLoader(Words([5, 4, 3]), collate_fn=lambda items: pad_sequence([a for a, _ in items])),
        "each item of the data set must be a pair"),
    "another first dimension": (
        DataLoader(Words([5, 4, 3]), collate_fn=lambda items: (pad_sequence([a for a, _ in items]),
                                                              torch.zeros(len(items)))),
        r"of 3 examples .* make a tensor of shape \(5, 3\); its first dimension must be the exa"),
    "a list of examples": ([row(i) for i in range(24)], "24 parts .a list of examples belongs int"),
    "no inputs": (((), torch.zeros(3)), "its inputs hold no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_data_of_forms_that_cannot_be_read(name):
    given, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        plain(cross_entropy, given)


def sparse(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].to_sparse(), batch[1]


class Sizeless:
    def __getitem__(self, i: int) -> Any:
        return row(i)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (data()[0], "must be a pair .* not Tensor"),
        ({"x": 1}, "must be a pair .* not dict"),
        ("data", "must be a pair .* not str"),
        ((data()[0].numpy(), data()[1]), "not ndarray; convert it by torch.as_tensor"),
        (([[1.0, 2.0]], [0]), "not float; convert it by torch.as_tensor"),
        ((data()[0].to_sparse(), data()[1]), r"inputs are a sparse .* x\.to_dense\(\)"),
        ((data()[0].to_sparse_csr(), data()[1]), r"inputs are a sparse .* x\.to_dense\(\)"),
        ((data()[0], data()[0].to_sparse()), r"targets are a sparse .* x\.to_dense\(\)"),
        (
            DataLoader(examples(), collate_fn=lambda items: sparse(default_collate(items))),
            r"inputs are a sparse .*to_dense",
        ),
        ((torch.nested.nested_tensor(list(data()[0])), data()[1]), "nested .* x.to_padded_tensor"),
        (Sizeless(), "must say by __len__ how many examples it has"),
        (Items(row, 24.0), "must say by __len__ how many examples it has"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_are_none(given, message):
    with pytest.raises(TypeError, match=message):
        plain(cross_entropy, given)


def test_named_tuples_stay_and_other_mappings_become_dicts():
    Pair = namedtuple("Pair", ["left", "right"])

    class Mapped(dict):
        pass

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, inputs: Any) -> Tensor:
            inputs = inputs["both"] if isinstance(inputs, dict) else inputs
            return self.linear(inputs.left + inputs.right)

    x, y = data()
    want = plain(cross_entropy, (1.5 * x, y)).example_losses()
    pair = Pair(x, 0.5 * x)
    forms = [(pair, y), (Mapped(both=pair), y), Items(lambda i: (Pair(x[i], 0.5 * x[i]), y[i]))]
    for given in forms:
        torch.testing.assert_close(plain(cross_entropy, given, Sum()).example_losses(), want)


class Attributes(dict):
    """A dict that is read by attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Encoding(UserDict):
    """As tokenizers return: a mapping that is no dict, with what it was made by beside it."""

    def __init__(self, values: dict[str, Tensor], made_by: str) -> None:
        super().__init__(values)
        self.made_by = made_by

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("data", {}):
            return self.data[name]
        raise AttributeError(name)


@pytest.mark.parametrize("kind", [Attributes, lambda given: Encoding(given, "here")])
def test_mappings_stay_of_their_kind(kind):
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, inputs: Any) -> Tensor:
            assert getattr(inputs, "made_by", "here") == "here"
            return self.linear(inputs.left + inputs["right"])

    x, y = data()
    want = plain(cross_entropy, (1.5 * x, y))
    given = kind({"left": x, "right": 0.5 * x})
    stage = plain(cross_entropy, (given, y), Read())
    torch.testing.assert_close(stage.example_losses(), want.example_losses())
    torch.testing.assert_close(stage.gradient(), want.gradient())
    pairs = zip(stage.per_example_gradients(), want.per_example_gradients(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    assert type(stage.examples.tensors()[0]) is type(given)


class Sealed(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("sealed")


def test_a_mapping_of_which_no_copy_can_be_made_is_named():
    x, y = data()
    with pytest.raises(TypeError, match=r"data hold a Sealed, of which no copy .* give a dict"):
        plain(cross_entropy, (Sealed(left=x), y))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l2": "0.1"}, "l2 must be a number, not '0.1'"),
        ({"l2": True}, "l2 must be a number, not True"),
        ({"l2": torch.tensor(0.1)}, "l2 must be a number, not a Tensor"),
        ({"batch_size": 8.0}, "batch_size must be a whole number, not a float"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        ({"memory_budget": "1e9"}, "memory_budget must be a whole number"),
        ({"trained": 3}, "trained must be a pattern of parameter names or a list of such"),
        ({"trained": [linear().weight]}, "trained must be a pattern"),
        ({"shared": 3}, "shared must be a pattern"),
        ({"loss": None}, "loss must be a function, not a NoneType"),
        ({"loss": nn.CrossEntropyLoss}, "loss is the class CrossEntropyLoss; give an object made"),
        ({"regularizer": 0.1}, "regularizer must be a function, not a float"),
        ({"hands_on": "merge"}, "hands_on must be a function, not a str"),
        ({"model": nn.Linear}, "model is the class Linear; give a module made of it"),
        ({"model": lambda x: x}, "model must be a torch.nn.Module, not a function"),
        ({"weights": "one"}, "weights must hold one number for each example"),
        ({"weights": [1j] * 24}, "weights must hold one number for each example"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_other_types(changes, message):
    with pytest.raises(TypeError, match=message):
        Stage.of(**({"model": linear(), "loss": cross_entropy, "data": data()} | changes))


def test_a_class_where_a_module_of_two_should_be():
    with pytest.raises(TypeError, match="embedding is the class Linear"):
        Stage(nn.Linear, nn.Linear(3, 2), cross_entropy, data())
    with pytest.raises(TypeError, match="head is the class Linear"):
        Stage(nn.Linear(4, 3), nn.Linear, cross_entropy, data())


def test_models_and_losses_that_fail_say_where():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    with pytest.raises(
        ValueError, match=r"loss\(.*\) fails on the data.*outputs are tuple, targets"
    ):
        plain(cross_entropy, data(), Two())
    with pytest.raises(ValueError, match="but returned float"):
        plain(lambda o, t: cross_entropy(o, t).mean().item(), data())
    with pytest.raises(ValueError, match=r"model fails on inputs of shape .* \(torch.int64\)"):
        plain(cross_entropy, (data()[0].long(), data()[1]))
    with pytest.raises(ValueError, match=r"fails on inputs .* from example 18 on"):
        late = TensorDataset(*data())
        plain(cross_entropy, late, AtMost(), batch_size=6)


class AtMost(nn.Module):
    """Fails from the nineteenth example on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor) -> Tensor:
        if (x == data()[0][18]).all(1).any():
            raise RuntimeError("too long")
        return self.linear(x)


def test_lazy_layers_must_be_made_first():
    with pytest.raises(ValueError, match=r"weight has no shape yet; call the module once"):
        plain(cross_entropy, data(), nn.LazyLinear(2).double())


def test_a_model_that_cannot_be_copied_says_what_to_use_instead():
    module = nn.utils.weight_norm(nn.Linear(4, 2)).double()
    module(data()[0])
    with pytest.raises(ValueError, match=r"cannot be copied: .*torch\.nn\.utils\.parametrizations"):
        plain(cross_entropy, data(), module, check=False).to(torch.float32)
