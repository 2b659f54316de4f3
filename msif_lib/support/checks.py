"""What would make scores meaningless, found before any work: in modules, examples and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from msif_lib.support.data import Batch, Nested, leaves, map_leaves
from msif_lib.support.parameters import overlapping
from msif_lib.support.reader import Reader

# Examples on which it is tried whether the loss of one depends on the others.
_PROBED = 8


def check_parameters(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Real parameters of one dtype on one device, none a view of another.

    Raises
    ------
    ValueError
        None at all, or parameters of other kinds; the message names them.
    """
    if not named:
        raise ValueError("the model has no parameters at all")
    first_name, first = named[0]
    for name, parameter in named:
        if is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape yet; call the module once on some inputs, so that its lazy "
                "layers are made"
            )
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
    check_memory(named)


def check_memory(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """No two parameters over the same memory.

    Raises
    ------
    ValueError
        There are; the message names them.
    """
    tensors = [parameter for _, parameter in named]
    for number, other in overlapping(tensors, tensors):
        if other < number:
            raise ValueError(
                f"{named[number][0]} shares its memory with {named[other][0]} without being the "
                "same parameter; tie them as one torch.nn.Parameter, or untie them"
            )


def check_settings(l2: float, batch_size: int, memory_budget: int | None) -> None:
    """Settings of a stage within their ranges.

    Raises
    ------
    ValueError
        One is not; the message names it.
    """
    if not 0 <= l2 < float("inf"):
        raise ValueError(f"l2 must be zero or positive, not {l2}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, not {memory_budget}")


def checked_weights(weights: Tensor | None, size: int, like: Tensor) -> Tensor:
    """The weights of `size` examples, 1 where there are none, in dtype and on device of `like`.

    Raises
    ------
    ValueError
        Weights of another shape, negative or not finite; the message names the first example.
    """
    if weights is None:
        return torch.ones(size, dtype=like.dtype, device=like.device)
    weights = torch.as_tensor(weights, dtype=like.dtype, device=like.device).detach().clone()
    if tuple(weights.shape) != (size,):
        raise ValueError(
            f"weights must hold one number for each of the {size} examples, not shape "
            f"{tuple(weights.shape)}"
        )
    bad = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(f"the weight of example {first} is {weights[first]}, not zero or positive")
    return weights


def check_modes(model: nn.Module) -> None:
    """No layer by which one example's loss depends on others or on chance.

    Raises
    ------
    ValueError
        BatchNorm or dropout in training mode; the message names the layer.
    """
    for name, child in model.named_modules():
        prefix = name.split(".")[0] if name else "model"
        if isinstance(child, _BatchNorm) and child.training:
            raise ValueError(
                f"{name or 'model'} is BatchNorm in training mode, so the loss of one example "
                f"depends on the others; call {prefix}.eval() first, or use GroupNorm"
            )
        drops = isinstance(child, _DropoutNd) and child.p > 0
        if isinstance(child, nn.RNNBase | nn.MultiheadAttention):
            drops = drops or child.dropout > 0
        if drops and child.training:
            raise ValueError(
                f"{name or 'model'} applies dropout in training mode, so losses depend on chance; "
                f"call {prefix}.eval() first"
            )


class DataCheck:
    """Per-example losses, finite, repeatable, each the same in any company.

    Parameters
    ----------
    data
        The data as the user gave them.
    reader
        Reads them.
    model, loss
        ``model(inputs)`` at the stage's parameters, and the user's ``loss(outputs, targets)``.
    dtype
        Of the parameters.
    """

    def __init__(
        self,
        data: Batch | Dataset | DataLoader,
        reader: Reader,
        model: Callable[[Nested], Any],
        loss: Callable[[Any, Any], Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._in_memory = isinstance(data, list | tuple)
        self._reader, self._share = reader, reader.share
        self._model, self._loss, self._dtype = model, loss, dtype

    def run(self, batch_size: int, chunk_size: Callable[[], int]) -> None:
        """Look at every example once, at some of them more closely.

        Parameters
        ----------
        batch_size
            Examples evaluated at once, at most.
        chunk_size
            Gives those that are evaluated at once; asked for once the first few are known good.

        Raises
        ------
        ValueError
            Whatever a stage refuses; the message names the example.
        """
        if not self._share:
            return
        start, few = self._share[0], min(batch_size, _PROBED)
        if not self._in_memory:
            self._check_repeatable(few)
        examples = self._reader.examples
        inputs, targets = next(examples.batches(few, self._share[:few]))
        self._check_inputs(inputs, targets, start)
        inputs, targets = self._moved((inputs, targets))
        with torch.no_grad():
            self._check_first_batch(inputs, targets, start)
            size = chunk_size()
            for batch in examples.batches(size, self._share):
                self._check_inputs(*batch, start)
                inputs, targets = self._moved(batch)
                one = map_leaves(lambda leaf: leaf[:1], inputs)
                _check_classes(self._model(one), targets, start)
                losses = self._losses(inputs, targets)
                if not losses.isfinite().all():
                    first = start + int((~losses.isfinite()).nonzero()[0])
                    raise ValueError(
                        f"the loss of example {first} is not finite ({losses[first - start]}); "
                        "look at its inputs, its target and the trained parameters"
                    )
                start += len(losses)

    def refusal(self, batch_size: int, chunk_size: Callable[[], int]) -> Exception | None:
        """What :meth:`run` raises, whatever it is: other processes must hear of it."""
        try:
            self.run(batch_size, chunk_size)
        except Exception as error:
            return error
        return None

    def _moved(self, batch: Batch) -> Batch:
        inputs, targets = map_leaves(lambda leaf: leaf.to(self._reader.device), batch)
        return inputs, targets

    def _losses(self, inputs: Nested, targets: Nested) -> Tensor:
        return self._loss(self._model(inputs), targets)

    def _check_repeatable(self, few: int) -> None:
        """A data set must give the same example each time it is read."""
        examples = self._reader.examples
        once, again = (leaves(next(examples.batches(few, self._share[:few]))) for _ in range(2))
        if not all(
            a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in zip(once, again, strict=True)
        ):
            raise ValueError(
                "data gives other values each time an example is read (random augmentation?); "
                "influence needs fixed examples: switch its randomness off"
            )

    def _check_inputs(self, inputs: Nested, targets: Nested, start: int) -> None:
        device = self._reader.device
        for role, tree in (("inputs", inputs), ("targets", targets)):
            for leaf in leaves(tree):
                if self._in_memory and leaf.device != device:
                    raise ValueError(
                        f"mixed devices: {role} are on {leaf.device}, the parameters on "
                        f"{device}; move one of them with .to(device)"
                    )
                if not leaf.is_floating_point():
                    continue
                if leaf.dtype != self._dtype:
                    raise ValueError(
                        f"mixed dtypes: {role} are {leaf.dtype}, the parameters {self._dtype}; "
                        "convert one of them with .to(dtype)"
                    )
                bad = ~leaf.flatten(1).isfinite().all(1) if leaf.dim() > 1 else ~leaf.isfinite()
                if bad.any():
                    first = start + int(bad.nonzero()[0])
                    raise ValueError(f"the {role} of example {first} are not finite")

    def _check_first_batch(self, inputs: Nested, targets: Nested, start: int) -> None:
        """Per-example losses, the same for an example in any company and at any time."""
        count = leaves(targets)[0].shape[0]
        try:
            outputs = self._model(inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = [tuple(leaf.shape) for leaf in leaves(inputs)]
            raise ValueError(f"the model fails on inputs of shape {shapes}: {error}") from error
        _check_classes(outputs, targets, start)
        try:
            losses = self._loss(outputs, targets)
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
            return self._losses(*map_leaves(lambda leaf: leaf[chunk], (inputs, targets)))

        def same(a: Tensor, b: Tensor) -> bool:
            tolerance = torch.finfo(self._dtype).eps ** 0.5
            return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

        together = part(slice(0, probe))
        if not same(together, part(slice(0, probe))):
            raise ValueError(
                "the model or loss depends on chance: the same examples gave different losses "
                "twice; switch its randomness off (module.eval())"
            )
        half = probe // 2
        if half and not same(together, torch.cat([part(slice(0, half)), part(slice(half, probe))])):
            raise ValueError(
                "the loss of one example depends on the others in its batch (normalisation "
                "over the batch, or a loss that averages?); influence needs per-example losses"
            )


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
