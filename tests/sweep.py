"""Every derivative of a small model against a truth that knows nothing of the library.

A case makes its model twice from one seed. One goes to the library. The other stays a plain
module, of which everything follows by differences: its losses and outputs at parameters a little
off give each example's gradient and the Jacobian of the outputs; its gradient by plain ``backward``
gives products with the Hessian, where that gradient agrees with the losses' own; and two steps of
plain gradient descent with one example's weight a little off give the influence through training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from msif_lib import Chain, Stage
from msif_lib.curvature import GaussNewton, Hessian
from msif_lib.links import Unrolled
from msif_lib.support.functional import DerivativeError
from msif_lib.training import SGD, descend

F64 = torch.float64
COUNT = 5  # examples
AT_ONCE = 3  # of them in a batch of the library; the truth evaluates all together
STEP = 1e-5  # of the differences
COARSE = 1e-3  # of differences of differences
RATE = 0.05  # of the two steps of descent
TOLERANCE = 1e-6
# Of the largest thing that a difference subtracts: what is smaller beside it is rounding.
FLOOR = 1e-3

Loss = Callable[[Any, Any], Tensor]
PLAIN = (nn.Sequential, nn.Linear, nn.Flatten, nn.Unflatten)


def log_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each example."""
    return F.cross_entropy(outputs, targets, reduction="none")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` within, torch's generator as it was afterwards."""
    kept = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(kept)


class Call(nn.Module):
    """A function of features, or of a layer and features."""

    def __init__(self, function: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Any) -> Any:
        return self.function(x) if self.layer is None else self.function(self.layer, x)


def some_inputs() -> Tensor:
    return torch.randn(COUNT, 2, dtype=F64)


def some_classes() -> Tensor:
    return torch.tensor([0, 1, 1, 0, 1])


@dataclass(frozen=True)
class Case:
    """A model with its data and loss; the head is linear, on what the embedding puts out.

    Attributes
    ----------
    name
        Begins with the public name that it is about.
    embedding
        Makes the embedding.
    loss, inputs, targets
        As a stage takes them.
    outputs
        Width of the head.
    constant
        Indices into parameters, by their names, of what is constant to torch: padding.
    called
        What a refusal may call the culprit, beside its class and its place in the embedding.
    """

    name: str
    embedding: Callable[[], nn.Module]
    loss: Loss = log_loss
    inputs: Callable[[], Any] = some_inputs
    targets: Callable[[], Any] = some_classes
    outputs: int = 2
    constant: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    called: tuple[str, ...] = ()

    def model(self) -> nn.Sequential:
        """Embedding and head, the same at every call."""
        with seeded(0):
            embedding = self.embedding()
            embedding = embedding.to(F64)
            kept = snapshot(embedding)
            with torch.no_grad():
                width = embedding(self.data()[0]).shape[-1]
            put_back(embedding, kept)
            return nn.Sequential(embedding, nn.Linear(width, self.outputs, dtype=F64))

    def data(self) -> tuple[Any, Any]:
        """Inputs and targets, the same at every call."""
        with seeded(1):
            return self.inputs(), self.targets()

    def named_by(self, message: str, model: nn.Module) -> bool:
        """Whether a refusal names what it is about, a layer, a parameter or an operation."""
        names = {self.name.split()[0].split(".")[-1], *self.called}
        names |= {f"embedding.{name}" for name, _ in model[0].named_parameters()}
        for place, module in model[0].named_modules(prefix="embedding"):
            if not isinstance(module, PLAIN):
                names |= {place, type(module).__name__} - {"embedding"}
        return any(squashed(name) in squashed(message) for name in names)


def squashed(name: str) -> str:
    """What a class, its function and the kernel of that are all called."""
    return name.lower().replace("_", "")


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers, persistent or not."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def put_back(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """Buffers as they were."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])


def slope_along(function: Callable[[float], Tensor], step: float = STEP) -> Tensor:
    """The derivative at 0, by differences of the fourth order."""
    near, far = (function(k * step) - function(-k * step) for k in (1, 2))
    return (8 * near - far) / (12 * step)


def directions(size: int) -> Tensor:
    """Two directions in which all parameters move: a fault in any of them shows in both."""
    with seeded(2):
        return torch.randn(size, 2, dtype=F64)


class Truth:
    """Derivatives of a case's losses along the directions, by differences of its plain module."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model()
        self.data, self.kept = case.data(), snapshot(self.model)
        named = dict(self.model.named_parameters())
        self.parameters = list(named.values())
        # The parameters are moved as parts of one vector.
        self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.at = self.vector.clone()
        free, trained = torch.ones_like(self.at), torch.ones_like(self.at)
        start = 0
        for name, p in named.items():
            part = slice(start, start + p.numel())
            p.data = self.vector[part].view_as(p)
            trained[part] = p.requires_grad
            p.requires_grad_()
            for rows in case.constant.get(name.removeprefix("0."), ()):
                free[part].view_as(p)[rows] = 0
            start = part.stop
        self.free, self.trained = free, trained * free
        self.outputs, self.losses = self.evaluated(self.at)
        steps = [
            (self.evaluated(self.at + STEP * v), self.evaluated(self.at - STEP * v))
            for v in (directions(len(free)) * free[:, None]).unbind(1)
        ]
        #: How outputs ``(k, N, ...)`` and losses ``(N, k)`` change along the directions.
        self.moved = [(up[0] - down[0]) / (2 * STEP) for up, down in steps]
        self.slopes = torch.stack([(up[1] - down[1]) / (2 * STEP) for up, down in steps], 1)

    def _losses(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        self.vector.copy_(vector)
        put_back(self.model, self.kept)
        inputs, targets = tree_map(torch.clone, self.data)
        outputs = self.model(inputs)
        return outputs.detach().clone(), self.case.loss(outputs, targets)

    def evaluated(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and losses of all examples."""
        with torch.no_grad():
            return self._losses(vector)

    def backward(self, vector: Tensor, weights: Tensor) -> Tensor:
        """The gradient of Σ w_i ℓ_i as torch gives it."""
        for p in self.parameters:
            p.grad = None
        (weights @ self._losses(vector)[1]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([grad.to_dense().reshape(-1).detach() for grad in grads])

    def by_differences(self, vector: Tensor, weights: Tensor) -> Tensor:
        """The same by differences of the losses."""
        axes = STEP * torch.diag(self.free)
        losses = [self.evaluated(vector + e)[1] - self.evaluated(vector - e)[1] for e in axes]
        return torch.stack(losses) @ weights / (2 * STEP)

    @cached_property
    def slope(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The gradient of Σ w_i ℓ_i: torch's where that is the one of the losses."""
        mean = torch.full_like(self.losses, 1 / len(self.losses))
        found = self.backward(self.at, mean) @ directions(len(self.at))
        right = difference(found, self.slopes.mean(0)) <= TOLERANCE
        return self.backward if right else self.by_differences

    def hessian(self) -> Tensor:
        """VᵀHV of the mean loss, V the directions."""
        mean = torch.full_like(self.losses, 1 / len(self.losses))
        step = STEP if self.slope == self.backward else COARSE

        def product(v: Tensor) -> Tensor:
            return slope_along(lambda t: self.slope(self.at + t * v, mean), step)

        v = directions(len(self.at)) * self.free[:, None]
        return v.T @ torch.stack([product(column) for column in v.unbind(1)], 1)

    def gauss_newton(self) -> Tensor:
        """(1/N) Σ (J_i V)ᵀ ℓ''_i J_i V, ℓ'' by differences of the loss's slope in the outputs."""
        targets = self.data[1]

        def slope(outputs: Tensor) -> Tensor:
            leaf = outputs.clone().requires_grad_()
            return torch.autograd.grad(self.case.loss(leaf, targets).mean(), leaf)[0]

        curved = [slope_along(lambda t, v=v: slope(self.outputs + t * v)) for v in self.moved]
        return torch.stack([torch.stack([(u * c).sum() for c in curved]) for u in self.moved])

    def influence(self) -> Tensor:
        """N dq/dw_i ``(N,)`` of the summed loss after two steps of gradient descent."""
        count = len(self.losses)

        def after(weights: Tensor) -> Tensor:
            x = self.at
            for _ in range(2):
                x = x - RATE * self.trained * self.slope(x, weights / count)
            return self.evaluated(x)[1].sum()

        ones, axes = torch.ones(count, dtype=F64), STEP * torch.eye(count, dtype=F64)
        return count * torch.stack([(after(ones + e) - after(ones - e)) / (2 * STEP) for e in axes])


def difference(found: Tensor, expected: Tensor, floor: float | Tensor = 0.0) -> float:
    """‖found − expected‖ beside ‖expected‖, or beside `floor` where that is more."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = max(float(expected.norm()), float(floor), 1e-30)
    return float((found - expected).norm()) / scale


def state(model: nn.Module, data: Any) -> list[Any]:
    """All that must be the same after the library's work as before it, comparable by ==."""
    values = [(name, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()]
    numbers = [
        *snapshot(model).values(),
        *(value for _, value in values),
        *(leaf.detach().clone() for leaf in tree_leaves(data)),
    ]
    return [
        [number.tolist() for number in numbers],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [leaf.grad is None for leaf in tree_leaves(data)],
        [module.training for module in model.modules()],
        [name for name, _ in values],
        torch.get_rng_state().tolist(),
        random.getstate(),
        [
            part if isinstance(part, int | float | str) else part.tolist()
            for part in np.random.get_state(legacy=True)  # noqa: NPY002
        ],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]


def judge(case: Case, trained: bool = False, check: bool = True) -> str:
    """Whether a case is "right" or "refused"; an AssertionError says what else was found.

    "Once differentiable" is right in what needs first derivatives, and its curvature refused. With
    `trained`, two steps of descent are looked at as well; they move the model. Without
    `check` the stage refuses nothing.
    """
    model, data = case.model(), case.data()
    before = state(model, data)
    try:
        stage = Stage(model[0], model[1], case.loss, data, batch_size=AT_ONCE, check=check)
    except (ValueError, DerivativeError) as error:
        assert state(model, data) == before, f"a refusal changed the user's objects: {error}"
        assert case.named_by(str(error), model), f"refused without a name: {error}"
        return "refused"
    truth = Truth(case)
    v = directions(len(truth.at))
    rows = torch.cat([*stage.per_example_gradients()])
    forward = torch.cat([*stage.directional_derivatives(v)])
    floor = FLOOR * float(truth.slopes.norm())
    found = {
        "losses": difference(stage.example_losses(), truth.losses),
        "gradient": difference(stage.gradient() @ v, truth.slopes.mean(0)),
        "gradients": difference(rows @ v, truth.slopes),
        "forward mode": difference(forward, truth.slopes),
    }
    curvatures = {
        "Hessian": (Hessian, truth.hessian),
        "Gauss-Newton": (GaussNewton, truth.gauss_newton),
    }
    outcome = "right"
    for name, (operator, expected) in curvatures.items():
        try:
            product = operator(stage) @ v
        except DerivativeError as error:
            assert case.named_by(str(error), model), f"{name} refused without a name: {error}"
            outcome = "once differentiable"
        else:
            found[name] = difference(v.T @ product, expected(), floor)
    assert state(model, data) == before, "the user's objects changed"
    if trained:
        path = descend(stage, SGD(RATE), epochs=2, batch_size=COUNT, seed=0, progress=False)
        scores = Chain([Unrolled(stage, path)], progress=False).scores(data)[0].values
        found["unrolled"] = difference(scores, truth.influence(), floor)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= TOLERANCE}
    assert not wrong, f"relative errors {wrong}"
    return outcome
