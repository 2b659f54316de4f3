"""A training stage: the model ``head(embedding(inputs))`` with its loss, data and regularizer.

The objective of a stage with N examples and parameters θ = (W, U) is

    G(W, U) = (1/N) Σ_i g(z_i; W, U) + R(W, U),   R = l2/2 ‖(W, U)‖²  (+ a callable of your own),

a *mean* of per-example losses, with the regularizer added once (the paper's eq. 1). W and U are
handled as flat vectors, so that every formula of :mod:`msif_lib.influence` is linear algebra.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, Dataset

from msif_lib.support.data import Batch, Examples, Nested, leaves, map_leaves
from msif_lib.support.functional import (
    GraphNotCountable,
    PureModule,
    differentiable_kernels,
    saved_bytes,
)

Loss = Callable[[Any, Any], Tensor]
Regularizer = Callable[[dict[str, Tensor]], Tensor]

# Entries of the largest block of per-example gradients held at once (64 MB in float64).
_GRADIENT_BLOCK = 2**23
# What the graph of a gradient keeps, in units of what the graph of the losses keeps.
_GRADIENT_GRAPH = 3
# Examples on which it is tried whether the loss of one depends on the others.
_PROBED = 8
# From this many directions on, contracting per-example gradients beats one forward-mode sweep a
# direction (a sweep costs about 1.7 forward passes, the gradients 2.5 to 6.6 once).
_FORWARD_MODE_DIRECTIONS = 3
# Where fewer per-example gradients than this can be held at once, contracting them does not pay.
_FEWEST_GRADIENTS = 8


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-example cross entropy.

    Parameters
    ----------
    outputs
        Logits ``(B, C, ...)``.
    targets
        Class indices ``(B, ...)``; where there are further dimensions their losses are averaged.

    Returns
    -------
    Tensor
        Losses ``(B,)``, in nats.
    """
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _flat(*modules: nn.Module) -> Tensor:
    parts = [p.detach().reshape(-1) for module in modules for p in module.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two parameters share memory; disjoint views of one flat buffer do not."""
    if a.device.type == "meta" or not (a.numel() and b.numel()):
        return a is b
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False

    def span(tensor: Tensor) -> tuple[int, int]:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        first = int(tensor.storage_offset())
        return first, first + sum(int(size - 1) * int(stride) for size, stride in steps)

    (a_first, a_last), (b_first, b_last) = span(a), span(b)
    return a_first <= b_last and b_first <= a_last


class Stage:
    """One training stage: embedding, head, per-example loss, data and regularizer.

    All parameters of both modules take part, whatever their ``requires_grad``.

    Parameters
    ----------
    embedding, head
        Modules; the model is ``head(embedding(inputs))``. Same device and dtype, evaluation
        mode where they hold BatchNorm or dropout, no parameter shared between the two.
    loss
        ``loss(outputs, targets)`` returns per-example losses ``(B,)``.
    data
        A pair ``(inputs, targets)`` of (nested) tensors, a map-style ``Dataset`` or a
        ``DataLoader``. Scores come in the order of `data`.
    l2
        Weight decay: adds l2/2 ‖parameters‖² to the objective, over embedding and head. (Where
        the embedding is fixed its share is a constant and drops out of every formula.)
    batch_size
        Examples evaluated at once, at most. Changes memory and speed, never a result.
    regularizer
        A further term: a twice differentiable scalar function of the named parameters, a dict
        with keys ``"embedding.<name>"`` and ``"head.<name>"``.
    check
        Evaluate the model once over `data` and refuse what would make scores meaningless.
    memory_budget
        Bytes of autograd graph of one batch. Where `batch_size` examples would need more, as is
        measured on the first two, batches are smaller. None: 32 MiB on a CPU, where what no
        longer fits its caches is slower too, and 2 GiB on a GPU; four times the parameters where
        that is more.

    Raises
    ------
    ValueError
        Empty or wrongly shaped data; targets outside the head's classes; non-finite inputs or
        losses (with the index of the first offending example); a data set that changes from one
        reading to the next; a loss that is not per-example;
        BatchNorm or dropout in training mode and everything else that makes the loss of one
        example depend on the others or on chance; a parameter shared between embedding and
        head; mixed devices or dtypes; a negative `l2`; a `batch_size` or `memory_budget` below 1.

    Examples
    --------
    >>> import torch
    >>> from msif_lib import Stage, cross_entropy
    >>> data = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    >>> stage = Stage(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), cross_entropy, data, l2=0.1)
    >>> stage.embedding_size, stage.head_size, stage.gradient().shape
    (8, 6, torch.Size([14]))
    """

    def __init__(
        self,
        embedding: nn.Module,
        head: nn.Module,
        loss: Loss,
        data: Batch | Dataset | DataLoader,
        l2: float = 0.0,
        batch_size: int = 1024,
        regularizer: Regularizer | None = None,
        check: bool = True,
        memory_budget: int | None = None,
    ) -> None:
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be zero or positive, not {l2}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if memory_budget is not None and memory_budget < 1:
            raise ValueError(f"memory_budget must be at least 1 byte, not {memory_budget}")
        self.embedding = embedding
        self.head = head
        self.loss = loss
        self.data = data
        self.l2 = l2
        self.batch_size = batch_size
        self.memory_budget = memory_budget
        self.regularizer = regularizer
        self.examples = Examples(data)
        self.checked = check
        self._indices: Sequence[int] = range(len(self.examples))
        self._pure_embedding, self._pure_head = PureModule(embedding), PureModule(head)
        # What was found out about the model, once for this stage and all its sections.
        self._known: dict[str, Any] = {}
        self._check_modules()
        if check:
            self._check_data()

    # --- parameters as flat vectors ---------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of examples, m or n."""
        return len(self.examples)

    @property
    def embedding_size(self) -> int:
        """Number of embedding parameters, the length of W."""
        return self._pure_embedding.size

    @property
    def head_size(self) -> int:
        """Number of head parameters, the length of U (or Θ)."""
        return self._pure_head.size

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._a_parameter.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._a_parameter.device

    def embedding_vector(self) -> Tensor:
        """W as a flat vector ``(p_W,)``, a copy."""
        return _flat(self.embedding).to(self._a_parameter)

    def head_vector(self) -> Tensor:
        """U (or Θ) as a flat vector ``(p_U,)``, a copy."""
        return _flat(self.head).to(self._a_parameter)

    def vector(self) -> Tensor:
        """(W, U) as one flat vector ``(p_W + p_U,)``, a copy."""
        return _flat(self.embedding, self.head)

    def split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The W part and the U part of a joint vector ``(p_W + p_U, ...)``, as views."""
        return vector[: self.embedding_size], vector[self.embedding_size :]

    def load_vector(self, vector: Tensor) -> None:
        """Write a joint vector ``(p_W + p_U,)`` into the two modules, in place."""
        with torch.no_grad():
            pures = (self._pure_embedding, self._pure_head)
            for pure, part in zip(pures, self.split(vector), strict=True):
                values = pure.named(part)
                for name, parameter in pure.module.named_parameters():
                    parameter.copy_(values[name])

    # --- the model as pure functions of the flat vectors ------------------------------------

    def kernels(self) -> AbstractContextManager[None]:
        """A context with kernels that have second and forward-mode derivatives.

        Each evaluation enters it by itself; entered once around many, it costs once.
        """
        return differentiable_kernels(self._pure_embedding.recurrent or self._pure_head.recurrent)

    def embed(self, w: Tensor, inputs: Nested) -> Any:
        """``embedding(inputs)`` at parameters `w` ``(p_W,)``."""
        return self._pure_embedding(w, inputs)

    def head_losses(self, h: Tensor, features: Any, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)`` at head parameters `h`, given the embedding's output."""
        return self.loss(self._pure_head(h, features), targets)

    def outputs(self, w: Tensor, h: Tensor, inputs: Nested) -> Any:
        """``head(embedding(inputs))`` at parameters `w` ``(p_W,)`` and `h` ``(p_U,)``."""
        with self.kernels():
            return self._pure_head(h, self.embed(w, inputs))

    def losses(self, w: Tensor, h: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)``, without any regularizer: g(z; W, U) of the paper."""
        with self.kernels():
            return self.loss(self.outputs(w, h, inputs), targets)

    def regularization(self, w: Tensor, h: Tensor) -> Tensor:
        """R(W, U), a scalar."""
        value = 0.5 * self.l2 * (w @ w + h @ h)
        if self.regularizer is not None:
            named = {}
            for prefix, pure, vector in (
                ("embedding", self._pure_embedding, w),
                ("head", self._pure_head, h),
            ):
                parts = pure.named(vector)
                named.update({f"{prefix}.{name}": part for name, part in parts.items()})
            value = value + self.regularizer(named)
        return value

    # --- which examples are read, and by which process --------------------------------------

    @property
    def share(self) -> Sequence[int]:
        """The examples that :meth:`batches` reads: all, or one process's part of them."""
        return self._indices

    def section(self, indices: Sequence[int]) -> Stage:
        """The same stage reading these examples alone; :attr:`size` stays that of the data.

        For results an example, such as gradients: a mean over the data needs all of them.
        """
        part = copy.copy(self)
        part._indices = indices
        return part

    @property
    def first_process(self) -> bool:
        """Whether files are written by this process, of those that share the data."""
        return True

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes that share the data; here there is but one."""
        return tensor

    def gather(self, blocks: Iterable[Tensor], *shape: int) -> Tensor:
        """Rows of this process's examples as those of all processes', in the data's order.

        Parameters
        ----------
        blocks
            Rows ``(b, *shape)`` for the examples of :attr:`share`, in order.
        shape
            The shape of a row.

        Returns
        -------
        Tensor
            ``(N, *shape)``.
        """
        return torch.cat([torch.zeros(0, *shape).to(self._a_parameter), *blocks])

    # --- sums over the data -----------------------------------------------------------------

    @property
    def chunk_size(self) -> int:
        """Examples in a batch: as many as `memory_budget` allows, at most `batch_size`."""
        if "chunk size" not in self._known:
            self._known["chunk size"] = self._chunk_size()
        return self._known["chunk size"]

    def _chunk_size(self) -> int:
        if self.batch_size == 1 or self.size < 2:
            return self.batch_size
        parameters = self.vector().nbytes
        on_cpu = self.device.type == "cpu"
        # A pass reads all parameters, so that it should not be for next to no examples.
        budget = self.memory_budget or max(2**25 if on_cpu else 2**31, 4 * parameters)
        try:
            one, two = (self._graph_bytes(count) for count in (1, 2))
        except GraphNotCountable:
            return self.batch_size
        return max(1, min(self.batch_size, budget // max(1, _GRADIENT_GRAPH * (two - one))))

    def _graph_bytes(self, count: int) -> int:
        """Bytes that the graph of the first few losses keeps."""
        inputs, targets = next(self.examples.batches(count, range(count)))
        batch = map_leaves(lambda leaf: leaf.to(self.device), (inputs, targets))
        theta = self.vector().requires_grad_()
        with torch.enable_grad(), saved_bytes() as held:
            losses = self.losses(*self.split(theta), *batch)
        assert len(losses) == count  # alive till now
        return sum(held.values())

    def batches(self) -> Iterator[Batch]:
        """The data in order, in batches, on the model's device."""
        for inputs, targets in self.examples.batches(self.chunk_size, self.share):
            yield (
                map_leaves(lambda leaf: leaf.to(self.device), inputs),
                map_leaves(lambda leaf: leaf.to(self.device), targets),
            )

    def example_losses(self) -> Tensor:
        """The losses ``(N,)`` of all examples at the stage's parameters."""
        w, h = self.embedding_vector(), self.head_vector()
        with torch.no_grad():
            return self.gather(self.losses(w, h, *batch) for batch in self.batches())

    def objective(self, vector: Tensor | None = None) -> Tensor:
        """G at a joint vector, by default at the stage's parameters: a scalar."""
        w, h = self.split(self.vector() if vector is None else vector)
        with torch.no_grad():
            total = self._a_parameter.new_zeros(())
            for batch in self.batches():
                total += self.losses(w, h, *batch).sum()
            return self.all_reduce(total) / self.size + self.regularization(w, h)

    def objective_and_gradient(self, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """G and ∇G, a scalar and ``(p_W + p_U,)``, at a joint vector or the parameters."""
        theta = (self.vector() if vector is None else vector.detach().clone()).requires_grad_()
        value, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        for batch in self.batches():
            loss = self.losses(*self.split(theta), *batch).sum() / self.size
            gradient += torch.autograd.grad(loss, theta)[0]
            value += loss.detach()
        penalty = self.regularization(*self.split(theta))
        (slope,) = torch.autograd.grad(penalty, theta)
        return self.all_reduce(value) + penalty.detach(), self.all_reduce(gradient) + slope

    def gradient(self, vector: Tensor | None = None) -> Tensor:
        """∇G ``(p_W + p_U,)`` at a joint vector, by default at the stage's parameters.

        Raises
        ------
        ValueError
            The gradient is not finite; the message names the first example at fault.
        """
        gradient = self.objective_and_gradient(vector)[1]
        if not gradient.isfinite().all():
            theta = self.vector() if vector is None else vector
            blocks = self.per_example_gradients(theta)
            bad = self.gather(~block.isfinite().all(1) for block in blocks)
            if bad.any():
                raise ValueError(
                    f"the gradient of the loss of example {int(bad.nonzero()[0])} is not finite; "
                    "look at its inputs and at the loss at the trained parameters"
                )
            raise ValueError("the gradient of the regularizer is not finite")
        return gradient

    def _loss_of_one(self, theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        """The loss of one example, without the dimension of examples."""
        one = map_leaves(lambda leaf: leaf[None], (inputs, targets))
        return self.losses(*self.split(theta), *one)[0]

    def per_example_gradients(self, vector: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the gradients of the losses in blocks ``(b, p_W + p_U)``, in the data's order."""
        theta = self.vector() if vector is None else vector

        def one_by_one(theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
            rows = []
            for index in range(leaves(targets)[0].shape[0]):
                this = map_leaves(itemgetter(index), (inputs, targets))
                at = theta.detach().requires_grad_()
                rows.append(torch.autograd.grad(self._loss_of_one(at, *this), at)[0])
            return torch.stack(rows)

        vectorised = vmap(grad(self._loss_of_one), in_dims=(None, 0, 0))
        gradients = vectorised if self.has_batching_rules else one_by_one
        block = self.gradients_at_once
        for batch in self.batches():
            count = leaves(batch)[0].shape[0]
            for start in range(0, count, block):
                chunk = slice(start, start + block)
                inputs, targets = map_leaves(itemgetter(chunk), batch)
                yield gradients(theta, inputs, targets)

    @property
    def gradients_at_once(self) -> int:
        """Per-example gradients held at once."""
        parameters = self.embedding_size + self.head_size
        return max(1, min(self.chunk_size, _GRADIENT_BLOCK // parameters))

    def directional_derivatives(self, directions: Tensor) -> Iterator[Tensor]:
        """Yield ∇g(z_i)ᵀ v for the columns v of `directions`, in the data's order.

        One forward-mode product gives the derivative of a whole batch of losses for about the
        price of two forward passes. For many directions per-example gradients are formed in
        blocks and contracted at once. The (N, p) matrix of gradients is never held.

        Parameters
        ----------
        directions
            Joint vectors ``(p_W + p_U, k)``.

        Yields
        ------
        Tensor
            Blocks ``(b, k)``.
        """
        many = directions.shape[1] > _FORWARD_MODE_DIRECTIONS
        cheap = self.gradients_at_once >= _FEWEST_GRADIENTS and self.has_batching_rules
        if (many and cheap) or not self.has_forward_mode:
            for block in self.per_example_gradients():
                yield block @ directions
            return
        theta = self.vector()
        for batch in self.batches():
            columns = [self._derivatives(theta, v, batch) for v in directions.unbind(1)]
            yield torch.stack(columns, 1)

    def _derivatives(self, theta: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """∇g(z_i)ᵀ v ``(b,)`` by forward mode.

        Where operations are small this takes a third less than torch.func.jvp.
        """
        with torch.no_grad(), forward_ad.dual_level():
            w, h = map(forward_ad.make_dual, self.split(theta), self.split(v))
            losses, derivatives = forward_ad.unpack_dual(self.losses(w, h, *batch))
            return torch.zeros_like(losses) if derivatives is None else derivatives

    @property
    def has_batching_rules(self) -> bool:
        """Whether `torch.func.vmap` takes gradients of the model; tried once, on one example.

        Of fused recurrent layers and of models that look at values, for instance, it does not.
        """
        if "batching rules" not in self._known:
            self._known["batching rules"] = self._try_batching_rules()
        return self._known["batching rules"]

    def _try_batching_rules(self) -> bool:
        inputs, targets = next(self.examples.batches(1, range(1)))
        one = map_leaves(lambda leaf: leaf.to(self.device), (inputs, targets))
        try:
            vmap(grad(self._loss_of_one), in_dims=(None, 0, 0))(self.vector(), *one)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True

    @property
    def has_forward_mode(self) -> bool:
        """Whether forward mode gives what reverse mode gives; tried once, on few examples.

        An operation may have no forward derivative; one of a user's own may even pass on zero
        without a word (``torch.library.custom_op``). Along ∇g itself the derivative is ‖∇g‖².
        """
        if "forward mode" not in self._known:
            self._known["forward mode"] = self._try_forward_mode()
        return self._known["forward mode"]

    def _try_forward_mode(self) -> bool:
        for count in (1, _PROBED):
            first = range(min(count, self.size))
            inputs, targets = next(self.examples.batches(min(count, self.chunk_size), first))
            few = map_leaves(lambda leaf: leaf.to(self.device), (inputs, targets))
            gradient = self._gradient_of(few)
            if gradient.any():
                break
        try:
            forward = self._derivatives(self.vector(), gradient, few).sum()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        # Not a dot product: in float32 over millions of entries that has three digits.
        expected = gradient.square_().sum()
        tolerance = torch.finfo(self.dtype).eps ** 0.5
        same = torch.allclose(forward, expected, rtol=tolerance, atol=0)
        return same and bool(expected > 0)  # zero would prove nothing

    def _gradient_of(self, batch: Batch) -> Tensor:
        """The gradient ``(p_W + p_U,)`` of the summed loss of a batch."""
        # Two leaves, not one: slices of one would be summed as vectors of full length.
        w, h = self.embedding_vector().requires_grad_(), self.head_vector().requires_grad_()
        with torch.enable_grad():
            loss = self.losses(w, h, *batch).sum()
        parts = torch.autograd.grad(loss, (w, h), allow_unused=True, materialize_grads=True)
        return torch.cat(parts)

    # --- other stages from this one ---------------------------------------------------------

    def with_data(
        self, data: Batch | Dataset | DataLoader, name: str = "data", check: bool = True
    ) -> Stage:
        """The same modules and loss on other data, checked as at construction.

        Raises
        ------
        ValueError
            As at construction, the message beginning with `name`.
        """
        try:
            return self._on(data, check)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _on(self, data: Batch | Dataset | DataLoader, check: bool) -> Stage:
        return Stage(
            self.embedding, self.head, self.loss, data, self.l2, self.batch_size,
            self.regularizer, check, self.memory_budget,
        )  # fmt: skip

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Stage:
        """A deep copy in another dtype or on another device; its data are read into memory."""

        def move(leaf: Tensor) -> Tensor:
            return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

        return Stage(
            copy.deepcopy(self.embedding).to(device=device, dtype=dtype),
            copy.deepcopy(self.head).to(device=device, dtype=dtype),
            self.loss,
            map_leaves(move, self.examples.tensors()),
            self.l2,
            self.batch_size,
            self.regularizer,
            check=False,
            memory_budget=self.memory_budget,
        )

    # --- checks -----------------------------------------------------------------------------

    def _check_modules(self) -> None:
        named = [
            (f"{prefix}.{name}", parameter)
            for prefix, module in (("embedding", self.embedding), ("head", self.head))
            for name, parameter in module.named_parameters()
        ]
        if not named:
            raise ValueError("embedding and head have no parameters at all")
        self._a_parameter = named[0][1].detach()
        first_name, first = named[0]
        for name, parameter in named:
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is {parameter.dtype}; parameters must be real floats")
            if parameter.dtype != first.dtype:
                raise ValueError(
                    f"mixed dtypes: {first_name} is {first.dtype}, {name} is {parameter.dtype}; "
                    "convert the modules with .to(dtype)"
                )
            if parameter.device != first.device:
                raise ValueError(
                    f"mixed devices: {first_name} is on {first.device}, {name} on "
                    f"{parameter.device}; move the modules with .to(device)"
                )
        for name, parameter in self.head.named_parameters():
            for other, theirs in self.embedding.named_parameters():
                if _overlap(parameter, theirs):
                    raise ValueError(
                        f"head.{name} shares its memory with embedding.{other}; the formulas need "
                        "W and the head to be separate parameters: untie them, or move the shared "
                        "layer into the embedding"
                    )
        for prefix, module in (("embedding", self.embedding), ("head", self.head)):
            for name, child in module.named_modules():
                where = f"{prefix}.{name}" if name else prefix
                if isinstance(child, _BatchNorm) and child.training:
                    raise ValueError(
                        f"{where} is BatchNorm in training mode, so the loss of one example "
                        f"depends on the others; call {prefix}.eval() first"
                    )
                drops = isinstance(child, _DropoutNd) and child.p > 0
                if isinstance(child, nn.RNNBase | nn.MultiheadAttention):
                    drops = drops or child.dropout > 0
                if drops and child.training:
                    raise ValueError(
                        f"{where} applies dropout in training mode, so losses depend on chance; "
                        f"call {prefix}.eval() first"
                    )

    def _check_data(self) -> None:
        if not self.share:
            return
        w, h = self.embedding_vector(), self.head_vector()
        start = self.share[0]
        self._check_repeatable()
        few = min(self.batch_size, _PROBED)
        inputs, targets = next(self.examples.batches(few, self.share[:few]))
        self._check_inputs(inputs, targets, start)
        inputs, targets = map_leaves(lambda leaf: leaf.to(self.device), (inputs, targets))
        with torch.no_grad():
            self._check_first_batch(w, h, inputs, targets, start)
        size = self.chunk_size
        with torch.no_grad():
            for inputs, targets in self.examples.batches(size, self.share):
                self._check_inputs(inputs, targets, start)
                inputs, targets = map_leaves(lambda leaf: leaf.to(self.device), (inputs, targets))
                self._check_targets(w, h, inputs, targets, start)
                losses = self.losses(w, h, inputs, targets)
                if not losses.isfinite().all():
                    first = start + int((~losses.isfinite()).nonzero()[0])
                    raise ValueError(
                        f"the loss of example {first} is not finite ({losses[first - start]}); "
                        "look at its inputs, its target and the trained parameters"
                    )
                start += len(losses)

    def _check_repeatable(self) -> None:
        """A data set must give the same example each time it is read."""
        if isinstance(self.data, list | tuple):
            return
        few = min(self.batch_size, _PROBED)
        once, again = (leaves(next(self.examples.batches(few, self.share[:few]))) for _ in range(2))
        if not all(
            a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in zip(once, again, strict=True)
        ):
            raise ValueError(
                "data gives other values each time an example is read (random augmentation?); "
                "influence needs fixed examples: switch its randomness off"
            )

    def _check_inputs(self, inputs: Nested, targets: Nested, start: int) -> None:
        in_memory = isinstance(self.data, list | tuple)
        for role, tree in (("inputs", inputs), ("targets", targets)):
            for leaf in leaves(tree):
                if in_memory and leaf.device != self.device:
                    raise ValueError(
                        f"mixed devices: {role} are on {leaf.device}, the parameters on "
                        f"{self.device}; move one of them with .to(device)"
                    )
                if not leaf.is_floating_point():
                    continue
                if leaf.dtype != self.dtype:
                    raise ValueError(
                        f"mixed dtypes: {role} are {leaf.dtype}, the parameters {self.dtype}; "
                        "convert one of them with .to(dtype)"
                    )
                bad = ~leaf.flatten(1).isfinite().all(1) if leaf.dim() > 1 else ~leaf.isfinite()
                if bad.any():
                    first = start + int(bad.nonzero()[0])
                    raise ValueError(f"the {role} of example {first} are not finite")

    def _check_first_batch(
        self, w: Tensor, h: Tensor, inputs: Nested, targets: Nested, start: int
    ) -> None:
        """Per-example losses, the same for an example in any company and at any time."""
        count = leaves(targets)[0].shape[0]
        try:
            outputs = self.outputs(w, h, inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = [tuple(leaf.shape) for leaf in leaves(inputs)]
            raise ValueError(
                f"head(embedding(inputs)) fails on inputs of shape {shapes}: {error}"
            ) from error
        self._check_classes(outputs, targets, start)
        try:
            losses = self.loss(outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"loss(outputs, targets) fails on the data: {error}") from error
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (count,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss must return one value per example, shape ({count},) for the first {count}, "
                f"but returned {shape}; "
                'most losses of torch do with reduction="none" (msif_lib.cross_entropy does)'
            )
        probe = min(count, _PROBED)

        def part(chunk: slice) -> Tensor:
            few = map_leaves(lambda leaf: leaf[chunk], (inputs, targets))
            return self.losses(w, h, *few)

        together = part(slice(0, probe))
        tolerance = torch.finfo(self.dtype).eps ** 0.5
        if not torch.allclose(
            together, part(slice(0, probe)), rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            raise ValueError(
                "the model or loss depends on chance: the same examples gave different losses "
                "twice; switch its randomness off (module.eval())"
            )
        half = probe // 2
        if half:
            apart = torch.cat([part(slice(0, half)), part(slice(half, probe))])
            if not torch.allclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise ValueError(
                    "the loss of one example depends on the others in its batch (normalisation "
                    "over the batch, or a loss that averages?); influence needs per-example losses"
                )

    def _check_targets(
        self, w: Tensor, h: Tensor, inputs: Nested, targets: Nested, start: int
    ) -> None:
        one = map_leaves(lambda leaf: leaf[:1], inputs)
        self._check_classes(self.outputs(w, h, one), targets, start)

    @staticmethod
    def _check_classes(outputs: Any, targets: Nested, start: int) -> None:
        """Class indices must lie within the outputs' second dimension."""
        if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            return
        if targets.is_floating_point() or outputs.dim() != 2 or targets.dim() != 1:
            return
        classes = outputs.shape[1]
        bad = (targets < 0) | (targets >= classes)
        if classes > 1 and bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"the target of example {start + first} is {int(targets[first])}, outside the "
                f"head's {classes} classes 0..{classes - 1}; targets that are no class indices "
                "(counts, say) belong into a floating-point tensor"
            )


def _shapes(stage: Stage) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in stage.embedding.named_parameters()}


def check_pair(pretrain: Stage, second: Stage, name: str) -> None:
    """Both stages must speak of the same W, in the same arithmetic.

    Raises
    ------
    ValueError
        Embeddings whose parameters differ in name or shape; stages of different dtype or
        device; an embedding or a second head without parameters. `name` is the second stage's.
    """
    ours: dict[str, Any]
    ours, theirs = _shapes(pretrain), _shapes(second)
    if list(ours) != list(theirs):
        odd = sorted(set(ours) ^ set(theirs)) or "in another order"
        raise ValueError(
            f"pretrain.embedding and {name}.embedding must have the same parameters; the names "
            f"differ: {odd}"
        )
    for parameter, shape in ours.items():
        if shape != theirs[parameter]:
            raise ValueError(
                f"pretrain.embedding and {name}.embedding must have the same parameters; "
                f"{parameter} is {shape} in one and {theirs[parameter]} in the other"
            )
    if not ours:
        raise ValueError("the embeddings have no parameters, so nothing connects the two stages")
    if not second.head_size:
        raise ValueError(f"{name}.head has no parameters, so finetuning has nothing to train")
    if pretrain.dtype != second.dtype:
        raise ValueError(
            f"mixed dtypes: pretrain is {pretrain.dtype}, {name} {second.dtype}; convert one "
            "with Stage.to(dtype)"
        )
    if pretrain.device != second.device:
        raise ValueError(
            f"mixed devices: pretrain is on {pretrain.device}, {name} on {second.device}; move "
            "one with Stage.to(device=...)"
        )
