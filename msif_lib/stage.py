"""A training stage: the model ``head(embedding(inputs))`` with its loss, data and regularizer.

The objective of a stage with N examples and parameters θ = (W, U) is

    G(W, U) = (1/N) Σ_i g(z_i; W, U) + R(W, U),   R = l2/2 ‖(W, U)‖²  (+ a callable of your own),

a *mean* of per-example losses, with the regularizer added once (the paper's eq. 1). W and U are
handled as flat vectors, so that every formula of :mod:`msif_lib.influence` is linear algebra.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, Dataset

from msif_lib.data import Batch, Examples, Nested, leaves, map_leaves

Loss = Callable[[Any, Any], Tensor]
Regularizer = Callable[[dict[str, Tensor]], Tensor]

# Entries of the largest block of per-example gradients held at once (128 MB in float64).
_GRADIENT_BLOCK = 2**24
# From this many directions on, contracting per-example gradients beats one forward-mode sweep a
# direction (a sweep costs about 1.7 forward passes, the gradients 2.5 to 6.6 once).
_FORWARD_MODE_DIRECTIONS = 3


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


def _flat(module: nn.Module) -> Tensor:
    parts = [parameter.detach().reshape(-1) for parameter in module.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _named(module: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """A flat vector as the named parameters of `module` (views, so it is differentiable)."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    parts = vector.split([parameter.numel() for parameter in parameters])
    return {
        name: part.view(parameter.shape)
        for name, part, parameter in zip(names, parts, parameters, strict=True)
    }


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


@contextmanager
def _differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Kernels that have second and forward-mode derivatives, which the fused ones have not."""
    recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


def _call(module: nn.Module, vector: Tensor, inputs: Nested) -> Any:
    values: dict[str, Tensor] = {}
    if vector.numel():
        # Under each name of a parameter that has several; a submodule used twice is named once,
        # or functional_call would not put its own parameters back.
        named = _named(module, vector)
        by_parameter = {parameter: named[name] for name, parameter in module.named_parameters()}
        for prefix, child in module.named_modules():
            for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
                values[f"{prefix}.{name}" if prefix else name] = by_parameter[parameter]
    with _differentiable_kernels(module):
        return functional_call(module, values, (inputs,), tie_weights=False)


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
        Examples evaluated at once. Changes memory and speed, never a result.
    regularizer
        A further term: a twice differentiable scalar function of the named parameters, a dict
        with keys ``"embedding.<name>"`` and ``"head.<name>"``.
    check
        Evaluate the model once over `data` and refuse what would make scores meaningless.

    Raises
    ------
    ValueError
        Empty or wrongly shaped data; targets outside the head's classes; non-finite inputs or
        losses (with the index of the first offending example); a data set that changes from one
        reading to the next; a loss that is not per-example;
        BatchNorm or dropout in training mode and everything else that makes the loss of one
        example depend on the others or on chance; a parameter shared between embedding and
        head; mixed devices or dtypes; a negative `l2`; a `batch_size` below 1.

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
    ) -> None:
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be zero or positive, not {l2}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.embedding = embedding
        self.head = head
        self.loss = loss
        self.data = data
        self.l2 = l2
        self.batch_size = batch_size
        self.regularizer = regularizer
        self.examples = Examples(data)
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
        return sum(parameter.numel() for parameter in self.embedding.parameters())

    @property
    def head_size(self) -> int:
        """Number of head parameters, the length of U (or Θ)."""
        return sum(parameter.numel() for parameter in self.head.parameters())

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
        return torch.cat([self.embedding_vector(), self.head_vector()])

    def split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The W part and the U part of a joint vector ``(p_W + p_U, ...)``, as views."""
        return vector[: self.embedding_size], vector[self.embedding_size :]

    def load_vector(self, vector: Tensor) -> None:
        """Write a joint vector ``(p_W + p_U,)`` into the two modules, in place."""
        with torch.no_grad():
            for module, part in zip((self.embedding, self.head), self.split(vector), strict=True):
                if part.numel():
                    values = _named(module, part)
                    for name, parameter in module.named_parameters():
                        parameter.copy_(values[name])

    # --- the model as pure functions of the flat vectors ------------------------------------

    def embed(self, w: Tensor, inputs: Nested) -> Any:
        """``embedding(inputs)`` at parameters `w` ``(p_W,)``."""
        return _call(self.embedding, w, inputs)

    def head_losses(self, h: Tensor, features: Any, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)`` at head parameters `h`, given the embedding's output."""
        return self.loss(_call(self.head, h, features), targets)

    def outputs(self, w: Tensor, h: Tensor, inputs: Nested) -> Any:
        """``head(embedding(inputs))`` at parameters `w` ``(p_W,)`` and `h` ``(p_U,)``."""
        return _call(self.head, h, self.embed(w, inputs))

    def losses(self, w: Tensor, h: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)``, without any regularizer: g(z; W, U) of the paper."""
        return self.loss(self.outputs(w, h, inputs), targets)

    def regularization(self, w: Tensor, h: Tensor) -> Tensor:
        """R(W, U), a scalar."""
        value = 0.5 * self.l2 * (w @ w + h @ h)
        if self.regularizer is not None:
            named = {}
            for prefix, module, vector in (
                ("embedding", self.embedding, w),
                ("head", self.head, h),
            ):
                if vector.numel():
                    parts = _named(module, vector)
                    named.update({f"{prefix}.{name}": part for name, part in parts.items()})
            value = value + self.regularizer(named)
        return value

    # --- sums over the data -----------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """The data in order, in batches, on the model's device."""
        for inputs, targets in self.examples.batches(self.batch_size):
            yield (
                map_leaves(lambda leaf: leaf.to(self.device), inputs),
                map_leaves(lambda leaf: leaf.to(self.device), targets),
            )

    def example_losses(self) -> Tensor:
        """The losses ``(N,)`` of all examples at the stage's parameters."""
        w, h = self.embedding_vector(), self.head_vector()
        with torch.no_grad():
            return torch.cat([self.losses(w, h, *batch) for batch in self.batches()])

    def objective(self, vector: Tensor | None = None) -> Tensor:
        """G at a joint vector, by default at the stage's parameters: a scalar."""
        w, h = self.split(self.vector() if vector is None else vector)
        with torch.no_grad():
            total = sum(self.losses(w, h, *batch).sum() for batch in self.batches())
            return total / self.size + self.regularization(w, h)

    def objective_and_gradient(self, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """G and ∇G, a scalar and ``(p_W + p_U,)``, at a joint vector or the parameters."""
        theta = (self.vector() if vector is None else vector.detach().clone()).requires_grad_()
        w, h = self.split(theta)
        value = self.regularization(w, h)
        (gradient,) = torch.autograd.grad(value, theta)
        value = value.detach()
        for batch in self.batches():
            w, h = self.split(theta)
            loss = self.losses(w, h, *batch).sum() / self.size
            gradient = gradient + torch.autograd.grad(loss, theta)[0]
            value = value + loss.detach()
        return value, gradient

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
            index = 0
            for block in self.per_example_gradients(theta):
                bad = ~block.isfinite().all(1)
                if bad.any():
                    first = index + int(bad.nonzero()[0])
                    raise ValueError(
                        f"the gradient of the loss of example {first} is not finite; look at its "
                        "inputs and at the loss at the trained parameters"
                    )
                index += len(block)
            raise ValueError("the gradient of the regularizer is not finite")
        return gradient

    def per_example_gradients(self, vector: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the gradients of the losses in blocks ``(b, p_W + p_U)``, in the data's order."""
        theta = self.vector() if vector is None else vector

        def loss(theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
            one = map_leaves(lambda leaf: leaf[None], (inputs, targets))
            return self.losses(*self.split(theta), *one)[0]

        def one_by_one(theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
            rows = []
            for index in range(leaves(targets)[0].shape[0]):
                this = map_leaves(itemgetter(index), (inputs, targets))
                rows.append(grad(loss)(theta, *this))
            return torch.stack(rows)

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        block = max(1, min(self.batch_size, _GRADIENT_BLOCK // len(theta)))
        for batch in self.batches():
            count = leaves(batch)[0].shape[0]
            for start in range(0, count, block):
                chunk = slice(start, start + block)
                inputs, targets = map_leaves(itemgetter(chunk), batch)
                try:
                    rows = gradients(theta, inputs, targets)
                except RuntimeError:  # the model cannot be vmapped (recurrent layers, say)
                    gradients = one_by_one
                    rows = gradients(theta, inputs, targets)
                yield rows

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
        if directions.shape[1] > _FORWARD_MODE_DIRECTIONS:
            for block in self.per_example_gradients():
                yield block @ directions
            return
        theta = self.vector()
        for batch in self.batches():

            def losses(theta: Tensor, batch: Batch = batch) -> Tensor:
                return self.losses(*self.split(theta), *batch)

            columns = [jvp(losses, (theta,), (v,))[1] for v in directions.unbind(1)]
            yield torch.stack(columns, 1)

    # --- other stages from this one ---------------------------------------------------------

    def with_data(self, data: Batch | Dataset | DataLoader, name: str = "data") -> Stage:
        """The same modules and loss on other data, checked as at construction.

        Raises
        ------
        ValueError
            As at construction, the message beginning with `name`.
        """
        try:
            return Stage(
                self.embedding, self.head, self.loss, data, self.l2, self.batch_size,
                self.regularizer,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error

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
        w, h = self.embedding_vector(), self.head_vector()
        start = 0
        self._check_repeatable()
        with torch.no_grad():
            for inputs, targets in self.examples.batches(self.batch_size):
                self._check_inputs(inputs, targets, start)
                inputs, targets = map_leaves(lambda leaf: leaf.to(self.device), (inputs, targets))
                if start == 0:
                    self._check_first_batch(w, h, inputs, targets)
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
        once, again = (leaves(next(self.examples.batches(min(8, self.size)))) for _ in range(2))
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

    def _check_first_batch(self, w: Tensor, h: Tensor, inputs: Nested, targets: Nested) -> None:
        """Per-example losses, the same for an example in any company and at any time."""
        count = leaves(targets)[0].shape[0]
        try:
            outputs = self.outputs(w, h, inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = [tuple(leaf.shape) for leaf in leaves(inputs)]
            raise ValueError(
                f"head(embedding(inputs)) fails on inputs of shape {shapes}: {error}"
            ) from error
        self._check_classes(outputs, targets, 0)
        try:
            losses = self.loss(outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"loss(outputs, targets) fails on the data: {error}") from error
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (count,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss must return one value per example, shape ({count},), but returned {shape}; "
                'most losses of torch do with reduction="none" (msif_lib.cross_entropy does)'
            )
        probe = min(count, 8)

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
