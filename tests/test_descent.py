"""Recorded trainings are those of torch.optim, and the walk back is their derivative.

The reference knows no formula: torch.optim trains a copy of the modules, again and again with one
weight or one parameter of the start changed, and central differences are taken through all of it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import check, relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import chain
from msif_lib import Chain, Stage, cross_entropy
from msif_lib import steps as steps_module
from msif_lib.descent import Batches, Path, descend, drawn_from, pull_back, run
from msif_lib.links import Unrolled
from msif_lib.optimisers import SGD, AdamW, Optimiser, State
from msif_lib.steps import Linearised

pytestmark = pytest.mark.numeric
F64 = torch.float64
N, BATCH, EPOCHS, L2 = 23, 5, 2, 0.03
STEPS = EPOCHS * -(-N // BATCH)
NOISE = 11
Made = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimiser of ours and the same of torch's.

    `coupled`: torch's weight decay is the stage's l2, which otherwise stands in the loss.
    """

    ours: Optimiser
    torch: Made
    coupled: bool = False
    schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None
    decay: float = 0.0
    dropout: float = 0.0


GROUPS = [{"params": "head.*", "lr": 0.02}, {"params": ["embedding.0.bias"], "lr": 0.3}]
DECAYS = [
    {"params": "head.*", "lr": 1e-2, "weight_decay": 0.3},
    {"params": "embedding.*.bias", "weight_decay": 0.0},
]
CASES = {
    "SGD": Case(SGD(0.2), lambda p: torch.optim.SGD(p, 0.2, weight_decay=L2), coupled=True),
    "momentum": Case(
        SGD(0.1, momentum=0.8),
        lambda p: torch.optim.SGD(p, 0.1, 0.8, weight_decay=L2),
        coupled=True,
    ),
    "Nesterov": Case(
        SGD(0.1, momentum=0.7, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.7, nesterov=True),
    ),
    "momentum, schedule": Case(
        SGD(0.15, momentum=0.8), lambda p: torch.optim.SGD(p, 0.15, 0.8), schedule=cosine
    ),
    "momentum, decoupled decay": Case(
        SGD(0.1, momentum=0.6, decoupled_decay=0.4),
        lambda p: torch.optim.SGD(p, 0.1, 0.6),
        decay=0.4,
    ),
    "Nesterov, groups, clipped": Case(
        SGD(0.1, momentum=0.7, nesterov=True, groups=GROUPS, clip=0.4),
        lambda p: torch.optim.SGD(p, 0.1, 0.7, weight_decay=L2, nesterov=True),
        coupled=True,
        schedule=cosine,
    ),
    "SGD, clipped": Case(
        SGD(0.2, clip=0.5), lambda p: torch.optim.SGD(p, 0.2, weight_decay=L2), coupled=True
    ),
    "Adam": Case(
        AdamW(2e-2, (0.8, 0.95), 1e-3, weight_decay=0),
        lambda p: torch.optim.Adam(p, 2e-2, (0.8, 0.95), 1e-3, weight_decay=L2),
        coupled=True,
    ),
    "Adam, clipped": Case(
        AdamW(2e-2, (0.8, 0.95), 1e-3, weight_decay=0, clip=0.5),
        lambda p: torch.optim.Adam(p, 2e-2, (0.8, 0.95), 1e-3, weight_decay=L2),
        coupled=True,
    ),
    "AdamW": Case(
        AdamW(2e-2, eps=1e-4, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 2e-2, eps=1e-4, weight_decay=0.2),
    ),
    "AdamW, schedule, groups, clipped": Case(
        AdamW(2e-2, (0.7, 0.9), weight_decay=0.1, groups=DECAYS, clip=0.5),
        lambda p: torch.optim.AdamW(p, 2e-2, (0.7, 0.9), weight_decay=0.1),
        schedule=cosine,
    ),
    "momentum, dropout": Case(
        SGD(0.1, momentum=0.8), lambda p: torch.optim.SGD(p, 0.1, 0.8), dropout=0.3
    ),
}


class Problem:
    """A tanh network with odd sizes and weights, p_W = 20 and p_U = 15, and its trainings."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, dtype=F64)
        self.inputs, self.targets = draw(N, 4), torch.randint(3, (N,), generator=generator)
        self.weights = 0.5 + torch.rand(N, generator=generator, dtype=F64)
        self.test = draw(6, 4), torch.randint(3, (6,), generator=generator)
        dropout = [nn.Dropout(case.dropout)] if case.dropout else []
        embedding = nn.Sequential(nn.Linear(4, 4), *dropout, nn.Tanh()).double().eval()
        head = nn.Linear(4, 3).double()
        data = self.inputs, self.targets
        self.stage = Stage(embedding, head, cross_entropy, data, L2, weights=self.weights)
        self.start = 0.7 * draw(self.stage.parameters.size)
        self.noise = NOISE if case.dropout else None
        sampler = Batches(N, BATCH, seed)
        self.batches = [torch.tensor(batch) for _ in range(EPOCHS) for batch in sampler]
        self.seed = seed

    def by_torch(
        self,
        weights: Tensor | None = None,
        start: Tensor | None = None,
        more: tuple[float, int] = (0.0, 0),
        visit: Callable[[int, float, nn.Module], None] = lambda *_: None,
    ) -> Tensor:
        """The end of the training by torch.optim; `more` adds ε ℓ(z) to each step's objective."""
        weights = self.weights if weights is None else weights
        model = copy.deepcopy(self.stage.model)
        named = dict(model.named_parameters())
        with torch.no_grad():
            values = self.start if start is None else start
            for p, part in zip(named.values(), values.split([p.numel() for p in named.values()])):
                p.copy_(part.view(p.shape))
        optimizer = self.case.torch(self.groups(named))
        schedule = self.case.schedule and self.case.schedule(optimizer, len(self.batches))
        for step, batch in enumerate(self.batches):
            visit(step, optimizer.param_groups[0]["lr"], model)
            optimizer.zero_grad()
            model.train(bool(self.case.dropout))
            with drawn_from(NOISE, step):
                losses = self.losses(model, self.inputs[batch], self.targets[batch])
            loss = (weights[batch] * losses).sum() / len(batch)
            # torch adds weight decay to a gradient that is clipped already.
            late = 0.0 if self.case.coupled or self.case.ours.clip is None else L2
            if not self.case.coupled and not late:
                loss = loss + 0.5 * L2 * sum((p**2).sum() for p in named.values())
            if more[0]:
                model.eval()
                loss = loss + more[0] * self.losses(model, *self.test)[more[1]]
            loss.backward()
            if self.case.ours.clip is not None:
                nn.utils.clip_grad_norm_(named.values(), self.case.ours.clip)
            with torch.no_grad():
                for p in named.values():
                    p.grad.add_(p, alpha=late)
                    p.mul_(1 - optimizer.param_groups[0]["lr"] * self.case.decay)
            optimizer.step()
            if schedule:
                schedule.step()
        return torch.cat([p.detach().reshape(-1) for p in named.values()])

    def groups(self, named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        """The parameter groups in torch's form; the first has the optimiser's own settings."""
        groups: list[dict[str, Any]] = [{"params": []}]
        for group in self.case.ours.groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            groups.append({"params": [], **rest})
        for name, parameter in named.items():
            number = 0
            for index, group in enumerate(self.case.ours.groups):
                if name in self.members(group["params"]):
                    number = index + 1
            groups[number]["params"].append(parameter)
        return groups

    @staticmethod
    def members(patterns: str | Sequence[str]) -> list[str]:
        known = {
            "head.*": ["head.weight", "head.bias"],
            "embedding.0.bias": ["embedding.0.bias"],
            "embedding.*.bias": ["embedding.0.bias"],
        }
        wanted = [patterns] if isinstance(patterns, str) else patterns
        return [name for pattern in wanted for name in known[pattern]]

    @staticmethod
    def losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(inputs), targets, reduction="none")

    @functools.cached_property
    def rates(self) -> list[float]:
        """The learning rates that torch's schedule gave."""
        rates: list[float] = []
        self.by_torch(visit=lambda step, rate, model: rates.append(rate))
        return rates

    @functools.cached_property
    def path(self) -> Path:
        self.stage.load_vector(self.start)
        return descend(
            self.stage, self.case.ours, EPOCHS, BATCH, self.seed, self.rates, self.noise,
            progress=False,
        )  # fmt: skip

    def functionals(self, vector: Tensor) -> Tensor:
        """Three functionals of the parameters: losses of test examples, one weight's square."""
        losses = self.stage.losses(*self.stage.split(vector), *self.test)
        return torch.stack([losses.sum(), losses[0], vector[3] ** 2])

    @functools.cached_property
    def cotangent(self) -> Tensor:
        return torch.autograd.functional.jacobian(self.functionals, self.path.end).T

    def differences(self, end: Callable[[float], Tensor], h: float = 1e-5) -> Tensor:
        """The derivative of the functionals by a number, at 0."""
        return (self.functionals(end(h)) - self.functionals(end(-h))) / (2 * h)

    @functools.cached_property
    def by_weight(self) -> Tensor:
        """dq/dw_i ``(N, 3)``."""
        units = torch.eye(N, dtype=F64)
        each = [
            self.differences(lambda h, unit=unit: self.by_torch(weights=self.weights + h * unit))
            for unit in units
        ]
        return torch.stack(each)

    @functools.cached_property
    def by_start(self) -> Tensor:
        """dq/dx at the start ``(p, 3)``."""
        units = torch.eye(len(self.start), dtype=F64)
        each = [
            self.differences(lambda h, unit=unit: self.by_torch(start=self.start + h * unit))
            for unit in units
        ]
        return torch.stack(each)


@functools.cache
def problem_of(name: str, seed: int = 0) -> Problem:
    return Problem(CASES[name], seed)


def back(problem: Problem, path: Path | None = None, **settings: Any) -> Any:
    path = problem.path if path is None else path
    return pull_back(problem.stage, path, problem.cotangent, progress=False, **settings)


# --- there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_trains_as_torch_does(name: str) -> None:
    problem = problem_of(name)
    path = problem.path
    assert relative_error(path.end, problem.by_torch()) < 1e-12
    assert torch.equal(path.end, problem.stage.vector())
    assert torch.equal(path.start, problem.start)
    assert path.learning_rates == tuple(problem.rates) and len(path) == len(problem.batches)
    assert all(torch.equal(a, b) for a, b in zip(path.batches, problem.batches, strict=True))
    assert {len(batch) for batch in path.batches} == {BATCH, N % BATCH}


def test_float32_trains_as_torch_does_to_its_precision() -> None:
    problem = problem_of("AdamW")
    stage = problem.stage.to(torch.float32)
    stage.load_vector(problem.start.float())
    path = descend(stage, problem.case.ours, EPOCHS, BATCH, problem.seed, progress=False)
    assert path.end.dtype == torch.float32
    assert relative_error(path.end.double(), problem.by_torch()) < 1e-5


def test_time_is_the_sum_of_rates_stretched_by_momentum() -> None:
    assert problem_of("momentum").path.time == pytest.approx(0.1 * STEPS / 0.2)
    assert problem_of("Adam").path.time == pytest.approx(2e-2 * STEPS)


# --- and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seed"),
    [*((name, 0) for name in CASES), ("Nesterov, groups, clipped", 1), ("Adam", 1), ("SGD", 2)],
)
def test_derivatives_are_those_through_the_whole_training(name: str, seed: int) -> None:
    problem = problem_of(name, seed)
    found = back(problem)
    check(found.derivatives, problem.by_weight)
    check(found.handed, problem.by_start)


def test_examples_of_another_set() -> None:
    problem = problem_of("momentum, dropout")
    others = problem.stage.with_data(problem.test)
    truth = torch.stack(
        [
            problem.differences(lambda h, z=z: problem.by_torch(more=(h, z)))
            for z in range(len(problem.test[1]))
        ]
    )
    found = back(problem, of=others)
    check(found.derivatives, truth)
    check(found.handed, back(problem).handed, 1e-12)


class LowRank(nn.Module):
    """A base that is handed on and fixed, a low-rank correction and a head that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(inputs) + self.up(self.down(inputs))))


@pytest.mark.parametrize("trained", [["down.*", "up.*", "head.*"], ["head.*"]])
@pytest.mark.parametrize("optimiser", [SGD(0.2, momentum=0.7), AdamW(2e-2, eps=1e-4)])
def test_what_is_handed_on_and_not_trained_gets_its_cotangent(
    trained: list[str], optimiser: Optimiser
) -> None:
    generator = torch.Generator().manual_seed(3)
    model = LowRank().double()
    draw = functools.partial(torch.randn, generator=generator, dtype=F64)
    data = draw(13, 4), torch.randint(3, (13,), generator=generator)

    # A regularizer that couples what is trained with what is not.
    def penalty(named: dict[str, Tensor]) -> Tensor:
        return 0.1 * (named["base.weight"].sum() * named["head.weight"]).square().sum()

    stage = Stage.of(
        model, cross_entropy, data, shared="base.*", trained=trained, l2=0.1, regularizer=penalty,
        weights=0.5 + torch.rand(13, generator=generator, dtype=F64),
    )  # fmt: skip
    start = 0.5 * draw(stage.parameters.size)
    stage.load_vector(start)
    path = descend(stage, optimiser, 2, 4, 0, progress=False)
    test = draw(5, 4), torch.randint(3, (5,), generator=generator)

    def functional(vector: Tensor) -> Tensor:
        losses = stage.losses(*stage.split(vector), *test)
        return torch.stack([losses.sum(), losses[1]])

    def end(start: Tensor, weights: Tensor) -> Tensor:
        again = copy.deepcopy(model)
        named = dict(again.named_parameters())
        order = [named[name] for name in stage.names]
        with torch.no_grad():
            for p, part in zip(order, start.split([p.numel() for p in order])):
                p.copy_(part.view(p.shape))
        moving = [p for name, p in named.items() if name in {stage.names[n] for n in stage.trained}]
        if isinstance(optimiser, SGD):
            torch_optimizer: Any = torch.optim.SGD(moving, 0.2, 0.7)
        else:
            torch_optimizer = torch.optim.AdamW(moving, 2e-2, eps=1e-4)
        for batch in path.batches:
            again.zero_grad()
            losses = Problem.losses(again, data[0][batch], data[1][batch])
            loss = weights[batch] @ losses / len(batch) + penalty(named)
            (loss + 0.05 * sum((p**2).sum() for p in named.values())).backward()
            torch_optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in order])

    assert relative_error(path.end, end(start, stage.weights)) < 1e-12
    cotangent = torch.autograd.functional.jacobian(functional, path.end).T
    found = pull_back(stage, path, cotangent, progress=False)
    h = 1e-5

    def differences(change: Callable[[float], Tensor]) -> Tensor:
        return (functional(change(h)) - functional(change(-h))) / (2 * h)

    units = torch.eye(len(start), dtype=F64)
    by_start = torch.stack(
        [differences(lambda s, u=u: end(start + s * u, stage.weights)) for u in units]
    )
    units = torch.eye(13, dtype=F64)
    by_weight = torch.stack(
        [differences(lambda s, u=u: end(start, stage.weights + s * u)) for u in units]
    )
    check(found.derivatives, by_weight)
    given = stage.parameters.take(found.handed, tuple({*stage.shared, *stage.trained}))
    check(given, stage.parameters.take(by_start, tuple({*stage.shared, *stage.trained})))
    untouched = [n for n in stage.own if n not in stage.trained]
    assert not stage.parameters.take(found.handed, untouched).any()


class NoMomentum(SGD):
    """μ dropped from what goes back."""

    def pull_back(self, state, gradient, rate, decay, cotangent):
        lambda_g, before = super().pull_back(state, gradient, rate, decay, cotangent)
        return lambda_g, before._replace(buffers=(0 * before.buffers[0],))


class NoDecay(SGD):
    """The decay forgotten."""

    def pull_back(self, state, gradient, rate, decay, cotangent):
        return super().pull_back(state, gradient, rate, 0.0, cotangent)


class PlainMomentum(SGD):
    """Nesterov's term dropped."""

    def pull_back(self, *arguments):
        plain = SGD(self.lr, self.momentum)
        return plain.pull_back(*arguments)


class CarriedSGD(SGD):
    """The buffers' cotangent carried over from the training that follows."""

    def begin(self, x):
        return State(x, (x.clone(),), 0)


class CarriedAdamW(AdamW):
    """The same of Adam's."""

    def begin(self, x):
        return State(x, (x.clone(), x.clone()), 0)


class Uncorrected(AdamW):
    """The bias corrections dropped."""

    def _moments(self, state, gradient):
        m, v, _, _ = super()._moments(state, gradient)
        return m, v, 1.0, 1.0

    def step(self, state, gradient, rate, decay):
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return AdamW(**values).step(state, gradient, rate, decay)


class UndecayedAdamW(AdamW):
    """The decoupled decay forgotten."""

    def pull_back(self, state, gradient, rate, decay, cotangent):
        return super().pull_back(state, gradient, rate, 0.0, cotangent)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("momentum", NoMomentum),
        ("momentum, decoupled decay", NoDecay),
        ("Nesterov", PlainMomentum),
        ("momentum", CarriedSGD),
        ("AdamW", CarriedAdamW),
        ("Adam", Uncorrected),
        ("AdamW", UndecayedAdamW),
    ],
)
def test_a_wrong_adjoint_is_seen(name: str, wrong: type[Optimiser]) -> None:
    problem = problem_of(name)
    ours = problem.case.ours
    values = {field.name: getattr(ours, field.name) for field in dataclasses.fields(ours)}
    found = back(problem, dataclasses.replace(problem.path, optimiser=wrong(**values)))
    assert relative_error(found.derivatives, problem.by_weight) > 1e-3
    assert relative_error(found.handed, problem.by_start) > 1e-3


@pytest.mark.parametrize("divisor", ["the batch size for a short batch", "N for B"])
def test_a_wrong_divisor_is_seen(monkeypatch: pytest.MonkeyPatch, divisor: str) -> None:
    problem = problem_of("momentum")
    right = Linearised.pull_back

    def wrong(self: Linearised, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product, mixed, by_weight = right(self, rows)
        size = by_weight.shape[1]
        return product, mixed, by_weight * size / (BATCH if divisor != "N for B" else N)

    monkeypatch.setattr(Linearised, "pull_back", wrong)
    assert relative_error(back(problem).derivatives, problem.by_weight) > 1e-3


@pytest.mark.parametrize("name", ["Nesterov, groups, clipped", "SGD, clipped", "Adam, clipped"])
def test_clipping_without_its_derivative_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, right = problem_of(name), steps_module.clipped
    back(problem)
    monkeypatch.setattr(
        steps_module,
        "clipped",
        lambda gradient, longest: (right(gradient, longest)[0], lambda x: x),
    )
    assert relative_error(back(problem).derivatives, problem.by_weight) > 1e-3


@pytest.mark.parametrize("name", ["SGD, clipped", "Adam, clipped"])
def test_weight_decay_that_is_clipped_too_is_another_training(name: str) -> None:
    problem = problem_of(name)
    ours, lengths = problem.case.ours, []
    model = copy.deepcopy(problem.stage.model)
    parameters = list(model.parameters())
    with torch.no_grad():
        for p, part in zip(parameters, problem.start.split([p.numel() for p in parameters])):
            p.copy_(part.view(p.shape))
    optimizer = problem.case.torch(parameters)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for batch in problem.batches:
        optimizer.zero_grad()
        losses = Problem.losses(model, problem.inputs[batch], problem.targets[batch])
        squares = sum((p**2).sum() for p in parameters)
        (problem.weights[batch] @ losses / len(batch) + 0.5 * L2 * squares).backward()
        lengths.append(float(nn.utils.clip_grad_norm_(parameters, ours.clip)))
        optimizer.step()
    assert max(lengths) > ours.clip
    wrong = torch.cat([p.detach().reshape(-1) for p in parameters])
    assert relative_error(problem.path.end, wrong) > 1e-4


# --- laws ----------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(seed=st.integers(0, 99), factor=st.floats(-3, 3), name=st.sampled_from(sorted(CASES)))
def test_a_walk_is_linear_and_takes_columns_one_by_one(seed: int, factor: float, name: str) -> None:
    problem = problem_of(name)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(len(problem.start), 3, dtype=F64, generator=generator)
    columns[:, 2] = columns[:, 0] + factor * columns[:, 1]
    found = pull_back(problem.stage, problem.path, columns, progress=False)
    for values in (found.derivatives, found.handed):
        check(values[:, 2], values[:, 0] + factor * values[:, 1], 1e-10)
    for index in range(2):
        one = columns[:, index : index + 1]
        single = pull_back(problem.stage, problem.path, one, progress=False)
        check(single.derivatives[:, 0], found.derivatives[:, index], 1e-10)
        check(single.handed[:, 0], found.handed[:, index], 1e-10)


@settings(max_examples=6)
@given(index=st.integers(0, N - 1), name=st.sampled_from(["momentum", "AdamW"]))
def test_an_example_of_weight_zero_is_not_there(index: int, name: str) -> None:
    problem = problem_of(name)
    weights, inputs = problem.weights.clone(), problem.inputs.clone()
    weights[index], inputs[index] = 0, 9.0
    ends, derivatives = [], []
    for given_inputs in (problem.inputs, inputs):
        stage = problem.stage.with_data((given_inputs, problem.targets)).with_weights(weights)
        stage.load_vector(problem.start)
        path = descend(stage, problem.case.ours, EPOCHS, BATCH, problem.seed, progress=False)
        ends.append(path.end)
        cotangent = problem.cotangent[:, :1]
        derivatives.append(pull_back(stage, path, cotangent, progress=False).derivatives)
    problem.stage.load_vector(problem.path.end)
    others = torch.arange(N) != index
    assert torch.equal(*ends)
    check(derivatives[1][others], derivatives[0][others], 1e-12)


# --- memory, interruption, going on --------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 15, 50, 99, 100])
def test_few_states_are_alive(steps: int) -> None:
    problem = problem_of("momentum")
    stage, made, alive = problem.stage, [], []

    class Counting(SGD):
        def step(self, *arguments):
            state = super().step(*arguments)
            made.append(weakref.ref(state.x))
            alive.append(sum(reference() is not None for reference in made))
            return state

    batches = [torch.arange(t % 7, t % 7 + 4) for t in range(steps)]
    rates = (0.1,) * steps
    plain = Path(problem.start, problem.start, batches, rates, SGD(0.1, momentum=0.8), {})
    stage.load_vector(run(stage, plain, problem.weights[None], problem.start[None])[0])
    optimiser = Counting(0.1, momentum=0.8)
    path = Path.record(stage, problem.start, batches, optimiser, progress=False)
    taken = len(made)
    assert taken == steps and max(alive) <= steps**0.5 + 5
    pull_back(stage, path, problem.cotangent, progress=False)
    stage.load_vector(problem.path.end)
    # The start is a state besides those that steps made. Each step was repeated once.
    assert len(made) == 2 * taken
    assert max(alive) + 1 <= 2 * steps**0.5 + 10


def test_an_interrupted_training_leaves_the_modules_alone() -> None:
    problem = Problem(CASES["momentum, dropout"])
    problem.stage.load_vector(problem.start)
    modes = [module.training for module in problem.stage.model.modules()]
    calls = 0

    def interrupt(inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        descend(
            problem.stage, problem.case.ours, EPOCHS, BATCH, 0, noise_seed=1, augment=interrupt,
            progress=False,
        )  # fmt: skip
    assert calls == 7 and torch.equal(problem.stage.vector(), problem.start)
    assert modes == [module.training for module in problem.stage.model.modules()]


class Kept:
    """A walk kept in memory, that ends after some puts."""

    def __init__(self, puts: int) -> None:
        self.found: dict[str, Tensor] | None = None
        self.puts = puts

    def get(self) -> dict[str, Tensor] | None:
        return self.found

    def put(self, tensors: dict[str, Tensor]) -> None:
        self.found = {name: tensor.clone() for name, tensor in tensors.items()}
        self.puts -= 1
        if self.puts == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["SGD", "momentum", "AdamW"])
def test_an_interrupted_walk_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(name)
    whole, keep = back(problem), Kept(3)
    with pytest.raises(KeyboardInterrupt):
        back(problem, keep=keep)
    walked: list[int] = []
    right = Linearised.pull_back
    monkeypatch.setattr(
        Linearised, "pull_back", lambda self, rows: walked.append(1) or right(self, rows)
    )
    rest = back(problem, keep=keep)
    assert 0 < len(walked) < len(problem.path)
    assert torch.equal(rest.derivatives, whole.derivatives)
    assert torch.equal(rest.handed, whole.handed)


# --- trainings that the user ran -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "AdamW, schedule, groups, clipped"])
def test_a_training_by_torch_is_recorded(name: str) -> None:
    problem = Problem(CASES[name], seed=2)
    stage = problem.stage
    states: dict[int, dict[str, Tensor]] = {}

    def visit(step: int, rate: float, model: nn.Module) -> None:
        states[step] = copy.deepcopy(model.state_dict())

    stage.load_vector(problem.by_torch(visit=visit))
    path = Path.record(
        stage, states[0], problem.batches, problem.case.ours, problem.rates, states, progress=False
    )
    found = pull_back(stage, path, torch.eye(len(path.end), dtype=F64), progress=False)
    assert torch.equal(path.start, problem.start)
    same = pull_back(stage, problem.path, torch.eye(len(path.end), dtype=F64), progress=False)
    check(found.derivatives, same.derivatives, 1e-9)


def test_a_loader_of_remembered_batches_is_recorded() -> None:
    problem = Problem(CASES["SGD"])
    stage, sampler = problem.stage, Batches(N, BATCH, seed=5)
    loader = DataLoader(
        TensorDataset(problem.inputs, problem.targets, problem.weights), batch_sampler=sampler
    )
    stage.load_vector(problem.start)
    start = copy.deepcopy(stage.model.state_dict())
    optimizer = torch.optim.SGD(stage.model.parameters(), 0.2, weight_decay=L2)
    for _ in range(2):
        seen = []
        for inputs, targets, weights in loader:
            optimizer.zero_grad()
            losses = Problem.losses(stage.model, inputs, targets)
            (weights @ losses / len(losses)).backward()
            optimizer.step()
            seen.append(len(inputs))
        assert sum(seen) == N and seen[-1] == N % BATCH
    path = Path.record(stage, start, sampler, SGD(0.2), progress=False)
    assert len(path) == 2 * len(sampler) == 10
    for epoch in (path.batches[:5], path.batches[5:]):
        assert sorted(torch.cat(list(epoch)).tolist()) == list(range(N))
    assert relative_error(path.end, stage.vector()) < 1e-12


def test_a_loader_of_remembered_batches_is_a_stage_s_data() -> None:
    """In the order of the data set, whatever order the batches have, and none is drawn."""
    problem = Problem(CASES["SGD"])
    sampler = Batches(N, BATCH, seed=5)
    loader = DataLoader(TensorDataset(problem.inputs, problem.targets), batch_sampler=sampler)
    stage = Stage(
        problem.stage.embedding, problem.stage.head, cross_entropy, loader, L2,
        weights=problem.weights,
    )  # fmt: skip
    assert stage.size == N and not sampler.taken
    assert torch.equal(stage.example_losses(), problem.stage.example_losses())
    path = descend(stage, SGD(0.2), EPOCHS, BATCH, 0, progress=False)
    given = Chain([Unrolled(stage, path)], progress=False).scores(problem.test)[0]
    plain = Chain([Unrolled(problem.stage, path)], progress=False).scores(problem.test)[0]
    assert torch.equal(given.values, plain.values) and not sampler.taken


def test_a_training_of_other_steps_is_refused_by_the_step() -> None:
    problem = Problem(CASES["momentum"])
    stage = problem.stage
    states: dict[int, Tensor] = {}

    def visit(step: int, rate: float, model: nn.Module) -> None:
        states[step] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    stage.load_vector(problem.by_torch(visit=visit))
    swapped = list(problem.batches)
    swapped[6], swapped[7] = swapped[7], swapped[6]
    with pytest.raises(ValueError, match=r"after step 7.*weights= and l2="):
        Path.record(stage, problem.start, swapped, problem.case.ours, states=states, progress=False)
    with pytest.raises(ValueError, match="give states="):
        Path.record(stage, problem.start, problem.batches, SGD(0.1, 0.79), progress=False)
    with pytest.raises(ValueError, match=r"lacks the parameter embedding\.0\.weight"):
        Path.record(stage, {"x": problem.start}, problem.batches, SGD(0.1), progress=False)


def test_a_walk_on_another_stage_is_refused() -> None:
    problem = Problem(CASES["momentum"])
    path, cotangent = problem.path, problem.cotangent
    with pytest.raises(ValueError, match="the same steps lead elsewhere"):
        pull_back(problem.stage.with_weights(2 * problem.weights), path, cotangent, progress=False)
    with pytest.raises(ValueError, match=r"cotangent must hold finite columns \(35, k\)"):
        pull_back(problem.stage, path, cotangent[:-1], progress=False)
    there = pull_back(problem.stage, path, cotangent, progress=False)
    problem.stage.load_vector(problem.start)  # as where a later training went on in place
    elsewhere = pull_back(problem.stage, path, cotangent, progress=False)
    assert torch.equal(elsewhere.derivatives, there.derivatives)
    assert torch.equal(elsewhere.handed, there.handed)


# --- many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_many_trainings_at_once_are_each_alone(name: str) -> None:
    problem = problem_of(name)
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(3, N, dtype=F64, generator=generator)
    start = problem.start + 0.1 * torch.randn(3, len(problem.start), dtype=F64, generator=generator)
    ends = run(problem.stage, problem.path, weights, start)
    truth = [problem.by_torch(w, s) for w, s in zip(weights, start)]
    assert relative_error(ends.T, torch.stack(truth).T) < 1e-11


def test_convolutions_are_taken_one_by_one_and_rightly() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    draw = functools.partial(torch.randn, generator=generator, dtype=F64)
    data = draw(11, 1, 4, 4), torch.randint(3, (11,), generator=generator)
    stage = Stage.of(model, cross_entropy, data, l2=0.01)
    stage.load_vector(0.4 * draw(stage.parameters.size))
    path = descend(stage, SGD(0.1, momentum=0.5), 2, 4, 0, progress=False)
    cotangent = draw(stage.parameters.size, 2)
    found = pull_back(stage, path, cotangent, progress=False)
    h = 1e-5
    steps = h * torch.cat([torch.eye(11, dtype=F64), -torch.eye(11, dtype=F64)])
    ends = run(stage, path, 1 + steps, path.start.expand(22, -1)) @ cotangent
    check(found.derivatives, (ends[:11] - ends[11:]) / (2 * h))


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmentation_and_data_sets_are_replayed(in_memory: bool) -> None:
    problem = Problem(CASES["momentum, dropout"])
    pair = problem.inputs, problem.targets
    data = pair if in_memory else TensorDataset(*pair)
    stage = problem.stage.with_data(data).with_weights(problem.weights)
    stage.load_vector(problem.start)

    def shift(inputs: Tensor) -> Tensor:
        return inputs + 0.1 * torch.randn(len(inputs), 1, dtype=F64)

    before = torch.random.get_rng_state()
    path = descend(stage, SGD(0.1), 2, BATCH, 0, noise_seed=5, augment=shift, progress=False)
    if in_memory:  # a DataLoader draws from the generator itself
        assert torch.equal(before, torch.random.get_rng_state())
    again = Path.record(
        stage, path.start, path.batches, SGD(0.1), noise_seed=5, augment=shift, progress=False
    )
    assert torch.equal(again.end, path.end)
    found = pull_back(stage, path, problem.cotangent, progress=False)
    h = 1e-5
    steps = h * torch.cat([torch.eye(N, dtype=F64), -torch.eye(N, dtype=F64)])
    ends = run(stage, path, problem.weights + steps, path.start.expand(2 * N, -1))
    ends = ends @ problem.cotangent
    check(found.derivatives, (ends[:N] - ends[N:]) / (2 * h))
    with pytest.raises(ValueError, match="do not lead from start"):
        Path.record(
            stage, path.start, path.batches, SGD(0.1), noise_seed=6, augment=shift, progress=False
        )


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(0.0), "lr must be positive"),
        (lambda: SGD(float("nan")), "lr must be positive"),
        (lambda: SGD(0.1, momentum=1.0), "momentum must be at least 0 and below 1"),
        (lambda: SGD(0.1, nesterov=True), "nesterov needs a momentum"),
        (lambda: SGD(0.1, decoupled_decay=-1), "decoupled_decay must be zero or positive"),
        (lambda: SGD(0.1, clip=0), "clip must be positive"),
        (lambda: SGD(0.1, groups=[{"lr": 1.0}]), r"groups\[0\] must have 'params'"),
        (
            lambda: SGD(0.1, groups=[{"params": "*", "weight_decay": 1.0}]),
            r"groups\[0\] must have 'params' and may have 'lr' and 'decoupled_decay'",
        ),
        (lambda: SGD(0.1, groups=[{"params": "*", "lr": -1.0}]), r"groups\[0\]\['lr'\]"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas\[1\] must be at least 0 and below 1"),
        (lambda: AdamW(eps=0.0), "eps must be positive"),
        (lambda: AdamW(weight_decay=-0.1), "weight_decay must be zero or positive"),
        (
            lambda: AdamW(groups=[{"params": "*", "weight_decay": -1.0}]),
            r"groups\[0\]\['weight_decay'\] must be zero or positive",
        ),
        (lambda: Batches(0, 3, 0), "n must be at least 1"),
        (lambda: Batches(3, 0, 0), "batch_size must be at least 1"),
    ],
)
def test_refuses_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rates": [0.1]}, f"learning_rates must be {STEPS} numbers"),
        ({"learning_rates": [-0.1] * STEPS}, r"learning_rates\[0\] must be zero or positive"),
        ({"noise_seed": -1}, "noise_seed must be from 0"),
        ({"augment": lambda inputs: inputs}, "augment draws"),
        ({"optimiser": SGD(0.1, groups=[{"params": "nothing"}])}, r'groups\[0\]\["params"\]'),
        (
            {"optimiser": SGD(0.1, groups=[{"params": "head.*"}, {"params": "*.bias"}])},
            "a parameter belongs to one group",
        ),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    problem = Problem(CASES["SGD"])
    given = {"optimiser": SGD(0.1), "epochs": EPOCHS, "batch_size": BATCH, "seed": 0, **settings}
    with pytest.raises(ValueError, match=message):
        descend(problem.stage, progress=False, **given)


def test_a_training_that_diverges_names_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, dtype=F64, generator=generator)
    stage = Stage(
        nn.Linear(3, 2).double(), nn.Linear(2, 1).double(),
        lambda outputs, targets: (outputs - targets).pow(4).sum(1), (inputs, inputs[:, :1]),
    )  # fmt: skip
    before = stage.vector()
    with pytest.raises(FloatingPointError, match=r"diverged in step \d+ of 40.*lower lr.*clip="):
        descend(stage, SGD(50.0), 10, 2, 0, progress=False)
    assert torch.equal(stage.vector(), before)


def test_batch_norm_in_training_mode_is_refused() -> None:
    inputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    embedding = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    stage = Stage(embedding, nn.Linear(3, 2), cross_entropy, (inputs, targets))
    embedding.train()
    with pytest.raises(ValueError, match=r"embedding\.1 is BatchNorm.*use GroupNorm"):
        descend(stage, SGD(0.1), 1, 2, 0, progress=False)


@pytest.mark.parametrize("kind", ["dropout", "gru", "attention"])
def test_dropout_without_a_noise_seed_is_refused_before_training(kind: str) -> None:
    inputs, targets = torch.randn(6, 3, 4), torch.tensor([0, 1, 0, 1, 0, 1])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drops = {
                "dropout": lambda: nn.Dropout(0.2),
                "gru": lambda: nn.GRU(4, 4, 2, batch_first=True, dropout=0.2),
                "attention": lambda: nn.MultiheadAttention(4, 1, dropout=0.2, batch_first=True),
            }[kind]()
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            after = self.drops(x, x, x)[0] if kind == "attention" else self.drops(x)
            return self.out((after[0] if kind == "gru" else after).mean(1))

    stage = Stage.of(Model().eval(), cross_entropy, (inputs, targets))
    stage.model.train()
    before = stage.vector()
    with pytest.raises(ValueError, match=r"drops applies dropout in training mode"):
        descend(stage, SGD(0.1), 1, 2, 0, progress=False)
    assert torch.equal(stage.vector(), before)
    descend(stage, SGD(0.1), 1, 2, 0, noise_seed=3, progress=False)
    stage.model.eval()
    descend(stage, SGD(0.1), 1, 2, 0, progress=False)


def test_a_path_that_moved_other_parameters_is_refused() -> None:
    problem = Problem(CASES["SGD"])
    stage, path = problem.stage, problem.path
    head = stage.with_trained(stage.block("head.*"))
    with pytest.raises(ValueError, match="path moved 35 parameters, and the stage trains 15"):
        Unrolled(head, path)
    of_head = descend(head, SGD(0.1), 1, BATCH, 0, progress=False)
    with pytest.raises(ValueError, match="path moved 15 parameters, and the stage trains 35"):
        Unrolled(stage, of_head)
    # Of a path without states it is seen by what moved.
    with pytest.raises(ValueError, match="which the stage does not train"):
        Unrolled(head, dataclasses.replace(path, states={}))
    Unrolled(head, of_head)


# --- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_measures_what_it_says(tmp_path: pathlib.Path) -> None:
    record = chain.main(["--quick", "--out", str(tmp_path)])
    values = record["values"]
    assert (tmp_path / "chain.json").is_file()
    assert {"MLP, SGD", "MLP, Adam", "CNN, SGD"} <= set(values)
    for name in ("MLP, SGD", "MLP, Adam", "CNN, SGD"):
        found = values[name]
        assert found["steps"] == 2 * (5 + 3) and found["states"]["share"] <= 1
        assert all(ratio["lowest"] > 0 for ratio in found["ratios"].values())
    assert "back, 3 functionals" in values["MLP, Adam"]["ratios"]


def test_the_benchmark_walks_the_chain() -> None:
    options = chain.chosen(["--quick", "--out", "unused"])
    trainings = chain.Trainings("MLP", "SGD", options)
    trainings.by_ours()
    derivatives = trainings.back(2).double()
    (first, second), (path, tuned) = trainings.stages, trainings.paths
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(len(tuned.end), 2, generator=generator).double()

    def end(weights: Tensor) -> Tensor:
        stages = [stage.to(F64) for stage in (first, second)]
        pretrained = run(stages[0], path64(path), weights[None], path.start.double()[None])[0]
        shared = pretrained[: second.embedding_size]
        start = torch.cat([shared, tuned.start[second.embedding_size :].double()])
        ones = torch.ones(1, second.size, dtype=F64)
        return run(stages[1], path64(tuned), ones, start[None])[0] @ cotangent

    def path64(path: Path) -> Path:
        return dataclasses.replace(path, start=path.start.double(), end=path.end.double())

    h, units = 1e-5, torch.eye(first.size, dtype=F64)
    truth = torch.stack([(end(1 + h * u) - end(1 - h * u)) / (2 * h) for u in units])
    check(derivatives, truth, 1e-3)  # the chain runs in float32
