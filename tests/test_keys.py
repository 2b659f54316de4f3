"""What is kept belongs to one problem: all of its data, settings and code, as they are now."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from problems import F64, check
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from msif_lib import Chain, SingleStageInfluence, Stage, cross_entropy
from msif_lib.curvature import CrossHessian, GaussNewton, Hessian
from msif_lib.influence import StationarityWarning
from msif_lib.links import Frozen, Optimum, Stopped, Unrolled
from msif_lib.solvers import Dense, MinRes
from msif_lib.support.fingerprint import fingerprint, words_of
from msif_lib.support.identity import ProblemIdentity, held_by_each
from msif_lib.training import SGD, descend, train

pytestmark = pytest.mark.numeric
N = 53


def examples() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 3, dtype=F64, generator=g), torch.randint(2, (N,), generator=g)
    y[[17, 18]] = 2  # a rare class
    return x, y


def stage_of(loss=cross_entropy, data=None, **settings) -> Stage:
    torch.manual_seed(1)
    embedding, head = nn.Linear(3, 2, dtype=F64), nn.Linear(2, 3, dtype=F64)
    embedding.register_buffer("scale", torch.ones(1, dtype=F64))
    given = {"l2": 0.1, "check": False} | settings
    return Stage(embedding, head, loss, examples() if data is None else data, **given)


def rare(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    weights = torch.tensor([1.0, 1.0, weight], dtype=F64)
    return lambda o, t: nn.functional.cross_entropy(o, t, weight=weights, reduction="none")


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensors", "data set"])
@pytest.mark.parametrize("place", [0, 1, 26, 52])
def test_any_one_example_changed_is_another_problem(form, place):
    x, y = examples()
    before = stage_of(data=(x, y) if form == "tensors" else TensorDataset(x, y)).identity()
    for part in range(2):
        changed = [x.clone(), y.clone()]
        changed[part][place] = changed[part][place].flip(0) if part == 0 else 0
        if part == 1 and y[place] == 0:
            changed[1][place] = 1
        data = tuple(changed) if form == "tensors" else TensorDataset(*changed)
        assert not before.same(stage_of(data=data).identity())


def test_a_weight_that_few_examples_have_is_seen():
    kept = stage_of(rare(1.0)).identity()
    assert kept.same(stage_of(rare(1.0)).identity())
    for weight in (20.0, 1 + 1e-7, 0.0):
        assert not kept.same(stage_of(rare(weight)).identity())


@pytest.mark.parametrize(
    "settings",
    [
        {"l2": 0.1 + 1e-12}, {"trained": "head.*"}, {"weights": torch.arange(N).to(F64)},
        {"regularizer": lambda named: named["head.bias"].square().sum()},
        {"loss": lambda o, t: (1 + 1e-6) * cross_entropy(o, t)},
    ],
)  # fmt: skip
def test_every_setting_of_a_stage_is_part_of_it(settings):
    assert not stage_of().identity().same(stage_of(**settings).identity())


def test_a_buffer_and_the_point_are_part_of_it():
    stage = stage_of()
    kept, vector = stage.identity(), stage.vector()
    assert not kept.same(stage.identity(vector + 1e-15))
    stage.embedding.scale.mul_(1 + 1e-15)
    assert not kept.same(stage.identity())


@pytest.mark.parametrize("part", ["loss", "regularizer"])
def test_a_derivative_is_part_of_it(part):
    """Of two codes with equal values, one of which loses a part of the gradient."""

    def regularizer(named: dict[str, Tensor]) -> Tensor:
        return named["head.bias"].square().sum()

    made = {"loss": cross_entropy, "regularizer": regularizer}
    whole = made[part]
    broken = made | {part: lambda *a: 0.5 * whole(*a) + 0.5 * whole(*a).detach()}
    kept = stage_of(**broken).identity()
    assert kept.same(stage_of(**broken).identity())
    assert not kept.same(stage_of(**made).identity())


def test_scores_of_a_fault_that_was_mended_are_not_given_back(tmp_path):
    stage = stage_of()
    hook = stage.embedding.register_forward_hook(lambda module, inputs, out: out.detach())
    broken = Chain([Optimum(stage, Dense(damping=1.0))], 1e9, progress=False)
    broken.scores(examples(), out=tmp_path / "out")
    hook.remove()
    for chain in (broken, Chain([Optimum(stage, Dense(damping=1.0))], 1e9, progress=False)):
        with pytest.raises(ValueError, match="belongs to another problem"):
            chain.scores(examples(), out=tmp_path / "out")


def test_each_point_is_compared_on_its_own_scale():
    """No large losses beside the parameters hide that those at them are another model's."""
    g = torch.Generator().manual_seed(4)
    losses = torch.rand(2, N, generator=g) * torch.tensor([[1.0], [3e3]])
    for row, share in ((0, 0.02), (1, 1e-4)):
        other = losses.clone()
        other[row, 7] *= 1 + share
        assert not ProblemIdentity("", [losses]).same(ProblemIdentity("", [other]))
    near = losses * (1 + 4 * torch.finfo(torch.float32).eps)
    assert ProblemIdentity("", [losses]).same(ProblemIdentity("", [near]))


def test_the_last_digits_of_small_losses_are_rounding():
    """Cross entropy is log(1 + x), whose last digit is that of 1, however small x is."""
    x = torch.logspace(-5, -3, N)
    losses, digit = torch.stack([(1 + x).log(), 1 + x]), torch.finfo(torch.float32).eps
    for share, alike in ((2 * digit, True), (1e-4, False)):
        other = torch.stack([(1 + x + share).log(), 1 + x])
        assert not torch.equal(other, losses)
        assert ProblemIdentity("", [losses]).same(ProblemIdentity("", [other])) == alike


@pytest.mark.parametrize("address", ["0x7f3a5c0d", "0x000001F2B3C4D5E0"])
def test_no_address_is_part_of_it(address):
    """As Linux and as Windows write it."""

    class Named(nn.Module):
        def extra_repr(self) -> str:
            return f"<function f at {address}>"

    assert words_of(Named()) == "Named(<function f>)"


def test_one_gpu_of_a_machine_is_as_good_as_another(monkeypatch):
    """For what was interrupted on one; and processes hold the same stage, each on its own."""
    stage = stage_of()
    found = []
    for device in ("cuda:0", "cuda:1", "cpu"):
        monkeypatch.setattr(Stage, "device", torch.device(device))
        found.append(held_by_each(stage, stage.examples, stage.weights))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("form", ["tensors", "data set"])
def test_what_augmentation_gives_is_part_of_a_recorded_training(form):
    def shift(by: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x + by * torch.randn(len(x), 1, dtype=x.dtype)

    data = examples()
    stage = stage_of(data=data if form == "tensors" else TensorDataset(*data))
    given = {"noise_seed": 5, "augment": shift(0.1), "progress": False}
    path = descend(stage, SGD(0.1), 2, 8, 0, **given)
    before = torch.random.get_rng_state()
    known = Unrolled(stage, path).identity()
    if form == "tensors":  # a DataLoader draws from the generator itself
        assert torch.equal(before, torch.random.get_rng_state())
    assert known.same(Unrolled(stage, replace(path, augment=shift(0.1))).identity())
    for other in (shift(0.1 + 1e-6), lambda x: x, None):
        assert not known.same(Unrolled(stage, replace(path, augment=other)).identity())


def test_what_a_model_does_in_training_alone_is_part_of_a_recorded_training():
    stage = stage_of()
    by = [1.0]
    stage.embedding.register_forward_hook(
        lambda module, inputs, out: out * by[0] if module.training else out
    )
    stage.embedding.eval()
    path = descend(stage, SGD(0.1), 1, 8, 0, noise_seed=5, progress=False)
    known, of_stage = Unrolled(stage, path).identity(), stage.identity()
    assert known.same(Unrolled(stage, path).identity())
    by[0] = 1.001
    assert of_stage.same(stage.identity())
    assert not known.same(Unrolled(stage, path).identity())


def test_batches_and_padding_are_no_part_of_it():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1)[:, None] * self.weight

    class Sentences(Dataset):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.arange(1.0, 2 + index % 4, dtype=F64), index % 2

    def padded(items: list) -> tuple[Tensor, Tensor]:
        inputs = pad_sequence([x for x, _ in items], batch_first=True)
        return inputs, torch.tensor([t for _, t in items])

    def made(batch_size: int) -> Stage:
        loader = DataLoader(Sentences(), collate_fn=padded)
        return Stage.of(Sum(), cross_entropy, loader, batch_size=batch_size, check=False)

    kept = made(1).identity()
    assert all(kept.same(made(size).identity()) for size in (2, 4, 9))
    x, y = examples()
    in_memory, read = stage_of(data=(x, y)), stage_of(data=TensorDataset(x, y), batch_size=7)
    assert in_memory.identity().same(read.identity())


def test_a_key_reads_the_data_once_and_leaves_the_generators():
    class Read(Dataset):
        def __init__(self) -> None:
            self.x, self.y = examples()
            self.read: list[int] = []

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.read.append(index)
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
            return self.x[index], self.y[index]

    data = Read()
    stage = stage_of(data=data, batch_size=8)
    stage.chunk_size  # noqa: B018 (found by reading two examples)
    data.read.clear()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    stage.identity()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert data.read == list(range(N))
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


class Tuned(Dense):
    """A solver of a user's own, whose attribute no field of the dataclass shows."""

    def __init__(self, factor: object) -> None:
        super().__init__()
        object.__setattr__(self, "factor", factor)


def test_attributes_of_a_solver_are_part_of_a_link():
    keys = [Optimum(stage_of(), Tuned(factor)).identity() for factor in (1.0, 2.0)]
    assert not keys[0].same(keys[1])
    assert not keys[0].same(Optimum(stage_of(), Dense()).identity())
    assert keys[0].same(Optimum(stage_of(), Tuned(1.0)).identity())


def test_a_setting_without_a_value_to_know_it_by_is_refused_before_any_work(tmp_path, monkeypatch):
    chain = SingleStageInfluence(stage_of(), Tuned(lambda x: x), 1e9, progress=False)
    monkeypatch.setattr(Dense, "_solve", None)
    with pytest.raises(ValueError, match=r"out: .* settings of its Optimum link: function has no"):
        chain.scores(examples(), out=tmp_path / "out")


def test_digests_of_every_kind_of_leaf():
    @dataclass
    class Setting:
        value: object

    leaves = [
        torch.tensor([1.0, 0.0]).to(kind)
        for kind in (torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.int8)
    ]
    leaves += [torch.zeros(0), torch.zeros(3, 0), torch.tensor(1.0), torch.eye(2).to_sparse()]
    parts = [
        *leaves,
        np.zeros(2),
        np.zeros(2, np.float32),
        np.zeros((2, 1)),
        {1, 2},
        frozenset({1}),
    ]
    parts += [Setting(part) for part in leaves[:3]] + [Dense, MinRes, Dense(), MinRes()]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    long = np.zeros(5000)
    long[2500] = 1  # NumPy shows neither
    assert fingerprint(long) != fingerprint(np.zeros(5000))
    assert fingerprint({1, 2}) == fingerprint({2, 1})
    assert fingerprint(torch.eye(3)[:, ::2]) == fingerprint(torch.eye(3)[:, ::2].clone())
    with pytest.raises(TypeError, match="function has no value"):
        fingerprint([1, lambda: 0])


# --- what is kept of a stage in memory -----------------------------------------------------------


def load_other(stage: Stage) -> None:
    stage.load_vector(0.5 * stage.vector() + 0.1)


def write_data(stage: Stage) -> None:
    stage.data[0].mul_(1.5)


def change_l2(stage: Stage) -> None:
    stage.l2 = 0.3


def change_loss(stage: Stage) -> None:
    stage.loss = rare(3.0)


def write_weights(stage: Stage) -> None:
    stage.weights[::3] = 2.0


def write_buffer(stage: Stage) -> None:
    stage.embedding.scale.fill_(2.0)


def write_loss_buffer(stage: Stage) -> None:
    stage.loss.weight[0] = 4.0


def change_loss_attribute(stage: Stage) -> None:
    stage.loss.factor = 2.0


def change_attribute(stage: Stage) -> None:
    stage.embedding.temperature = 3.0


def change_closure(stage: Stage) -> None:
    stage.regularizer.__closure__[0].cell_contents.fill_(3.0)


def write_unseen(stage: Stage) -> None:
    stage.data[0].data.mul_(1.5)


def write_through_numpy(stage: Stage) -> None:
    stage.data[1].numpy()[:9] = 2


def add_a_hook(stage: Stage) -> None:
    stage.embedding.register_forward_hook(lambda module, inputs, outputs: outputs * 1.5)


def pass_less_back(stage: Stage) -> None:
    """All values stay."""
    stage.embedding.linear.register_forward_hook(
        lambda module, inputs, outputs: 0.5 * outputs + 0.5 * outputs.detach()
    )


CHANGES = [load_other, write_data, change_l2, change_loss, write_weights, write_buffer]
#: What neither torch's counters nor the names of a stage show.
UNCOUNTED = [
    write_loss_buffer, change_loss_attribute, change_attribute, change_closure, write_unseen,
    write_through_numpy, add_a_hook, pass_less_back,
]  # fmt: skip


class Scaled(nn.Module):
    """A layer whose outputs depend on a buffer and on a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(3, 2, dtype=F64), 1.0
        self.register_buffer("scale", torch.ones(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.scale * self.temperature).tanh()


class Weighted(nn.Module):
    """A loss with a buffer and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.register_buffer("weight", torch.ones(3, dtype=F64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, targets, self.weight, reduction="none")
        return self.factor * losses


class Triple(torch.autograd.Function):
    """The identity, with thrice the gradient and without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def pulled(strength: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda named: strength * named["head.weight"].square().sum()


def movable() -> Stage:
    torch.manual_seed(2)
    modules = Scaled(), nn.Linear(2, 3, dtype=F64)
    pull = pulled(torch.ones((), dtype=F64))
    return Stage(*modules, Weighted(), examples(), l2=0.1, regularizer=pull)


@pytest.mark.parametrize("change", CHANGES + UNCOUNTED)
@pytest.mark.parametrize(
    "settings", [(Dense(damping=1.0), "hessian"), (MinRes(damping=1.0), "gauss-newton")]
)
@pytest.mark.filterwarnings("ignore::msif_lib.influence.StationarityWarning")
def test_a_chain_is_of_the_stage_as_it_is_now(change, settings):
    stage, test = movable(), examples()
    chain = Chain([Optimum(stage, *settings)], progress=False)
    (before,) = chain.scores(test)
    change(stage)
    (found,) = chain.scores(test)
    (fresh,) = Chain([Optimum(stage, *settings)], progress=False).scores(test)
    assert not torch.allclose(found.values, before.values, rtol=1e-3)
    check(found.values, fresh.values, 1e-9)
    assert found.gradient_norms == fresh.gradient_norms != before.gradient_norms


def test_a_chain_keeps_the_operators_of_a_stage_that_stays(monkeypatch):
    chain = Chain([Optimum(movable(), Dense(damping=1.0))], 1e9, progress=False)
    (whole,) = chain.scores(examples())
    monkeypatch.setattr(Hessian, "_product", None)
    assert torch.equal(chain.scores(examples())[0].values, whole.values)
    assert not copy.deepcopy(chain)._operators[0], "graphs stay in their process"


def test_a_stage_says_what_it_can_do_with_the_loss_that_it_has():
    """The derivative of a clamp of one's own has no forward mode."""
    stage = movable()
    few = stage.with_weights(stage.weights)
    v = torch.randn(stage.parameters.size, 1, dtype=F64)
    assert stage.can.forward_mode
    stage.loss = lambda o, t: Triple.apply(cross_entropy(o, t))
    tripled, plain = (torch.cat([*one.directional_derivatives(v)]) for one in (stage, few))
    check(tripled, 3 * plain, 1e-12)
    assert not stage.can.forward_mode and few.can.forward_mode


def test_the_data_of_a_stage_are_read_only():
    with pytest.raises(AttributeError, match="data"):
        stage_of().data = examples()


@pytest.mark.parametrize("change", [*CHANGES[1:], write_loss_buffer])
@pytest.mark.parametrize("made", [Hessian, GaussNewton, CrossHessian])
def test_an_operator_refuses_a_stage_that_changed(change, made):
    stage = movable()
    operators = [made(stage), made(stage)]
    v = torch.ones(operators[0].shape[1], dtype=F64)
    operators[1].dense()
    change(stage)
    with pytest.raises(ValueError, match=f"changed since {made.__name__} was made .*make it again"):
        operators[0] @ v
    with pytest.raises(ValueError, match="make it again"):
        operators[1].dense()
    assert torch.isfinite(made(stage) @ v).all()


def test_an_operator_stays_where_its_stage_was():
    stage = movable()
    kept, v = Hessian(stage), torch.ones(stage.parameters.size, dtype=F64)
    before = kept @ v
    load_other(stage)
    assert torch.equal(kept @ v, before)


def test_a_chain_says_where_stages_no_longer_meet():
    first = movable()
    second = Stage(copy.deepcopy(first.embedding), nn.Linear(2, 3, dtype=F64), cross_entropy,
                   examples(), l2=0.1)  # fmt: skip
    chain = Chain([Stopped(first, 1.0), Frozen(second, Dense(damping=1.0))], 1e9, progress=False)
    chain.scores(examples())
    load_other(first)
    with pytest.raises(ValueError, match="case 1 keeps the embedding fixed"):
        chain.scores(examples())


def test_a_stage_that_left_its_optimum_is_warned_of():
    stage = movable()
    train(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain = Chain([Optimum(stage, Dense())], progress=False)
        chain.scores(examples())
    load_other(stage)
    with pytest.warns(StationarityWarning, match="not at a stationary point"):
        chain.scores(examples())
