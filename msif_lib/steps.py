"""The steps of a training: which examples each takes, what it draws, and its objective.

Step t has a batch b of B examples with weights w_i and the objective

    J_b(x, c; w) = (1/B) Σ_{i in b} w_i ℓ_i(x, c) + R(x, c),

where x are the parameters that are trained and c those that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import BatchSampler

from msif_lib.optimisers import Optimiser, Rate, State, clipped
from msif_lib.stage import Stage
from msif_lib.support.arguments import dense, listed, not_negative, seed_of, whole
from msif_lib.support.data import Nested, map_leaves
from msif_lib.support.functional import (
    GraphNotCountable,
    explain_missing_derivatives,
    require_second_derivatives,
    saved_bytes,
)

#: Changes the inputs of a batch, drawing from torch's generator.
Augment = Callable[[Nested], Nested]


class Batches(BatchSampler):
    """Batches of an epoch in random order, which remember what they gave.

    To be given to a ``DataLoader`` as its ``batch_sampler``: each iteration is an epoch, draws
    another permutation and keeps a short last batch. Worker processes read ahead, so that
    `taken` is what a training took only once an epoch is finished.

    Parameters
    ----------
    n
        Examples.
    batch_size
        Examples of a batch.
    seed
        Of the permutations.

    Attributes
    ----------
    taken
        The indices ``(B,)`` of each batch so far.

    Raises
    ------
    ValueError
        `n` or `batch_size` below 1.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        whole("n", n, 1)
        whole("batch_size", batch_size, 1)
        self.n, self.batch_size = n, batch_size
        self._generator = torch.Generator("cpu").manual_seed(seed_of("seed", seed))
        self.taken: list[Tensor] = []

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n, generator=self._generator, device="cpu")
        for indices in order.split(min(self.batch_size, self.n)):
            self.taken.append(indices)
            yield indices.tolist()

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    @property
    def each_once(self) -> int:
        """How many examples an epoch takes, each once: what a stage must know of its loader."""
        return self.n


@contextmanager
def drawn_from(noise_seed: int, step: int) -> Iterator[None]:
    """A context in which step number `step`, from 0, draws its augmentation and its dropout.

    A training of one's own whose losses are evaluated within it can be recorded with
    `noise_seed`. Augmentation draws first.

    Parameters
    ----------
    noise_seed
        The recorded seed, from 0 to 2³¹ − 1.
    step
        Steps taken before this one.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed((noise_seed << 32) + step)
        yield


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout acts; layers that keep running statistics stay as they are."""
    modes = {m: m.training for m in model.modules() if not isinstance(m, _NormBase)}
    try:
        for module in modes:
            module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Steps:
    """The steps of a training, their objectives functions of the trained parameters.

    Parameters
    ----------
    stage
        Model, loss, data, weights and regularizer.
    vector
        All parameters ``(p,)``, for those that are not trained.
    batches
        The indices ``(B,)`` of the examples of each step.
    optimiser
        The rule of a step.
    learning_rates
        One a step; None repeats the optimiser's.
    noise_seed
        What dropout and augmentation draw from; None: nothing is drawn.
    augment
        What changes the inputs of each batch, if anything does.

    Attributes
    ----------
    fixed
        Numbers of the parameters that are shared and not trained.
    vectorised
        Whether many cotangents, or many models, are better taken together than one by one.

    Raises
    ------
    ValueError
        No trained parameter, no step, an index that is no example's, another number of learning
        rates than of steps, a seed outside its range, BatchNorm in training mode.
    """

    def __init__(
        self,
        stage: Stage,
        vector: Tensor,
        batches: Sequence[Tensor],
        optimiser: Optimiser,
        learning_rates: Sequence[float] | None = None,
        noise_seed: int | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.stage, self.vector, self.batches, self.optimiser = stage, vector, batches, optimiser
        self.noise_seed, self.augment = noise_seed, augment
        self._check()
        self.learning_rates = _one_a_step(learning_rates, optimiser.lr, len(batches))
        self._scale, self.decay = optimiser.rates(stage)
        self._constants = stage.parameters.views(vector.detach())
        self._shapes = [self._constants[number].shape for number in stage.trained]
        self.fixed = tuple(number for number in stage.shared if number not in stage.trained)
        self._in_memory = stage.examples.tensors() if stage.examples.in_memory else None
        # vmap makes grouped convolutions of convolutions, which take longer than one by one.
        convolves = any(isinstance(module, _ConvNd) for module in stage.model.modules())
        self.vectorised = not convolves and stage.can.batching_rules

    def _check(self) -> None:
        if not self.stage.trained:
            raise ValueError("the stage trains no parameter; say which with trained=")
        if self.noise_seed is not None and not 0 <= whole("noise_seed", self.noise_seed) < 2**31:
            raise ValueError(f"noise_seed must be from 0 to 2**31 - 1, not {self.noise_seed}")
        if self.augment is not None and self.noise_seed is None:
            raise ValueError("augment draws, so that it needs a noise_seed")
        if not len(self.batches):
            raise ValueError("batches is empty: a training takes at least one step")
        for step, indices in enumerate(self.batches):
            if indices.dim() != 1 or not len(indices):
                raise ValueError(f"batches[{step}] must be a list of indices, and not empty")
            if int(indices.min()) < 0 or int(indices.max()) >= self.stage.size:
                raise ValueError(
                    f"batches[{step}] has an index outside the {self.stage.size} examples of the "
                    "stage"
                )
        if self.noise_seed is None:
            self.stage.check_module()
        for name, module in self.stage.model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise ValueError(
                    f"{name} is BatchNorm in training mode: it mixes the examples of a batch, so "
                    "that no example has a loss of its own; use GroupNorm, or the statistics of "
                    "evaluation by .eval()"
                )

    def __len__(self) -> int:
        return len(self.batches)

    # --- what a step depends on -------------------------------------------------------------

    def rate(self, step: int) -> Rate:
        """η of a step, a number or by parameter ``(p_T,)``."""
        return self.learning_rates[step] * self._scale

    def examples(self, step: int) -> tuple[Nested, Nested]:
        """Inputs and targets of a step's batch."""
        indices = self.batches[step]
        if self._in_memory is None:
            return next(self.stage.read(len(indices), indices.tolist()))
        rows = partial(_rows, indices=indices, device=self.stage.device)
        inputs, targets = map_leaves(rows, self._in_memory)
        return inputs, targets

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of many steps."""
        with torch.enable_grad(), self.stage.kernels(), explain_missing_derivatives():
            yield

    @contextmanager
    def _noise(self, step: int) -> Iterator[None]:
        """The context of one step's losses: dropout acts where its draws are recorded."""
        if self.noise_seed is None:
            yield
        else:
            with drawn_from(self.noise_seed, step), _training_mode(self.stage.model):
                yield

    # --- the objective and its derivatives --------------------------------------------------

    def split(self, rows: Tensor) -> list[Tensor]:
        """Trained parameters ``(..., p_T)``, each in its shape ``(..., *shape)``."""
        parts = rows.split([shape.numel() for shape in self._shapes], -1)
        lead = rows.shape[:-1]
        return [part.reshape(lead + shape) for part, shape in zip(parts, self._shapes)]

    def _leaves(self, x: Tensor) -> list[Tensor]:
        return [part.detach().requires_grad_() for part in self.split(x)]

    def _objective(
        self, parts: list[Tensor], weights: Tensor, inputs: Nested, targets: Nested
    ) -> Tensor:
        """J_b without its l2 term, whose derivative needs no graph."""
        losses = self._losses(parts, inputs, targets)
        value = weights @ losses / len(losses)
        regularizer = self.stage.regularizer
        return value if regularizer is None else value + regularizer(self.stage.named(parts))

    def _losses(self, parts: list[Tensor], inputs: Nested, targets: Nested) -> Tensor:
        if self.augment is not None:
            inputs = self.augment(inputs)
        return self.stage.batch_losses(parts, inputs, targets)

    def losses(self, x: Tensor, step: int) -> Tensor:
        """ℓ_i ``(B,)`` of a step's examples with its draws, at trained parameters ``(p_T,)``."""
        parts = _replaced(self._constants, self.stage.trained, self.split(x))
        batch = self.examples(step)
        with self._noise(step):
            return self._losses(parts, *batch).detach()

    def _weights(self, step: int, weights: Tensor) -> Tensor:
        return weights[..., self.batches[step].to(weights.device)]

    def gradient(
        self, x: Tensor, step: int, vector: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """∇J_b ``(p_T,)`` without l2 x, at other c ``(p,)`` or weights ``(N,)`` if given."""
        leaves = self._leaves(x)
        constants = self._constants if vector is None else self.stage.parameters.views(vector)
        parts = _replaced(constants, self.stage.trained, leaves)
        w = self._weights(step, self.stage.weights if weights is None else weights)
        batch = self.examples(step)
        with self._noise(step):
            value = self._objective(parts, w, *batch)
        slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return _flat(slopes)

    def gradients(self, x: Tensor, vectors: Tensor, weights: Tensor, step: int) -> Tensor:
        """The same ``(R, p_T)`` of R models with c ``(R, p)`` and weights ``(R, N)``."""
        if not self.vectorised:
            each = zip(x, vectors, weights)
            return torch.stack([self.gradient(row, step, *others) for row, *others in each])
        batch = self.examples(step)

        def objective(x: Tensor, vector: Tensor, w: Tensor) -> Tensor:
            constants = self.stage.parameters.views(vector)
            parts = _replaced(constants, self.stage.trained, self.split(x))
            return self._objective(parts, w, *batch)

        with self._noise(step):
            w = self._weights(step, weights)
            return vmap(grad(objective), randomness="same")(x, vectors, w)

    def linearised(self, x: Tensor, step: int) -> tuple[Tensor, Linearised]:
        """The same, and what a cotangent of it is pulled back to by the same graph."""
        leaves = self._leaves(x)
        fixed = [self._constants[number].detach().requires_grad_() for number in self.fixed]
        weights = self._weights(step, self.stage.weights).requires_grad_()
        parts = _replaced(self._constants, self.stage.trained, leaves)
        parts = _replaced(parts, self.fixed, fixed)
        batch = self.examples(step)
        with self._noise(step):
            value = self._objective(parts, weights, *batch)
        slopes = torch.autograd.grad(
            value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        gradient = _flat([slope.detach() for slope in slopes])
        return gradient, Linearised(self, slopes, leaves, fixed, weights)

    def require_second_derivatives(self) -> None:
        """Refuse a model of which torch would leave out second derivatives without a word.

        Raises
        ------
        DerivativeError
            An operation is differentiable once only.
        """
        leaves = self._leaves(self.stage.parameters.take(self.vector, self.stage.trained))
        parts = _replaced(self._constants, self.stage.trained, leaves)
        with self.running(), self._noise(0):
            weights = self._weights(0, self.stage.weights)
            require_second_derivatives(self._objective(parts, weights, *self.examples(0)))

    def ruled(self, slopes: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the rule of a step takes, and the adjoint of the clipping in it.

        The slopes are clipped and l2 x is added after that, as torch.optim adds weight decay.
        """
        shortened, adjoint = clipped(slopes, self.optimiser.clip)
        return shortened + self.stage.l2 * x if self.stage.l2 else shortened, adjoint

    # --- the steps themselves ---------------------------------------------------------------

    def begin(self) -> State:
        """The state before the first step."""
        return self.optimiser.begin(self.stage.parameters.take(self.vector, self.stage.trained))

    def after(self, state: State, stop: int) -> Iterator[State]:
        """The states that follow `state`, up to that after `stop` steps.

        Raises
        ------
        FloatingPointError
            A step led out of the finite numbers.
        """
        while state.step < stop:
            state = self.taken(state, self.gradient(state.x, state.step))
            yield state

    def taken(self, state: State, slopes: Tensor) -> State:
        """The state after one step, given :meth:`gradient` before it.

        Raises
        ------
        FloatingPointError
            The step leads out of the finite numbers.
        """
        step = state.step
        gradient, _ = self.ruled(slopes, state.x)
        state = self.optimiser.step(state, gradient, self.rate(step), self.decay)
        if not state.x.sum().isfinite():
            raise FloatingPointError(
                f"the training diverged in step {step} of {len(self)}, counted from 0, at a "
                f"learning rate of {self.learning_rates[step]:g}: lower lr, or shorten gradients "
                "with clip= of the optimiser"
            )
        return state

    def graphs_within(self, budget: int) -> int:
        """How many graphs of a step's gradient, that of the first for one, take so many bytes."""
        try:
            with self.running(), saved_bytes() as held:
                recorded = self.linearised(self.begin().x, 0)
        except GraphNotCountable:
            return 0
        assert recorded  # alive till now
        return budget // max(1, sum(held.values()))


class Linearised:
    """The derivative of a step's gradient, transposed: from λ_g to x, to c and to the weights."""

    def __init__(
        self,
        steps: Steps,
        slopes: Sequence[Tensor],
        leaves: list[Tensor],
        fixed: list[Tensor],
        weights: Tensor,
    ) -> None:
        self._steps, self._trained = steps, len(leaves)
        self._inputs = [*leaves, *fixed, weights]
        # A slope that depends on none of these has no graph and pulls back to zero.
        self._reached = [index for index, slope in enumerate(slopes) if slope.requires_grad]
        self._slopes = [slopes[index] for index in self._reached]

    def pull_back(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∇²J_b λ_g ``(k, p_T)`` but for l2, ∂²J_b/∂c∂x λ_g ``(k, p_c)``, ∇ℓ_iᵀλ_g/B ``(k, B)``."""
        if self._steps.vectorised and len(rows) > 1:
            # Not `is_grads_batched`: the older vmap behind it takes many operations one by one.
            blocks = vmap(self._each)(self._steps.split(rows))
        else:
            each = [self._each(self._steps.split(row)) for row in rows]
            blocks = tuple(torch.stack(parts) for parts in zip(*each))
        *flat, by_weight = (block.reshape(len(rows), -1) for block in blocks)
        product, mixed = flat[: self._trained], flat[self._trained :]
        return torch.cat(product, 1), torch.cat([rows[:, :0], *mixed], 1), by_weight

    def _each(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self._slopes,
            self._inputs,
            [cotangents[index] for index in self._reached],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


def _flat(slopes: Sequence[Tensor]) -> Tensor:
    return torch.cat([slope.reshape(-1) for slope in slopes])


def _rows(leaf: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    return leaf[indices.to(leaf.device)].to(device)


def _replaced(
    parts: Sequence[Tensor], block: Sequence[int], values: Sequence[Tensor]
) -> list[Tensor]:
    """All parameters, those of a block exchanged."""
    parts = list(parts)
    for number, value in zip(block, values, strict=True):
        parts[number] = value
    return parts


def _one_a_step(rates: Sequence[float] | None, lr: float, steps: int) -> tuple[float, ...]:
    if rates is None:
        return (lr,) * steps
    if isinstance(rates, Tensor):
        rates = dense("learning_rates", rates).tolist()
    values = listed("learning_rates", rates, "numbers, one a step")
    if len(values) != steps:
        raise ValueError(f"learning_rates must be {steps} numbers, one a step, not {len(values)}")
    return tuple(not_negative(f"learning_rates[{step}]", rate) for step, rate in enumerate(values))
