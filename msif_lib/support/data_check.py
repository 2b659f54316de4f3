"""Every example looked at once, before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msif_lib.support.chance import Generators
from msif_lib.support.checks import IGNORED, innermost
from msif_lib.support.company import Apart, Company
from msif_lib.support.data import Batch, Nested, leaves, map_leaves
from msif_lib.support.draws import Chance
from msif_lib.support.fingerprint import digests_of
from msif_lib.support.model import Model
from msif_lib.support.reader import Reader

# Examples evaluated first, before it is known how many fit.
_FIRST = 8


class DataCheck:
    """Per-example losses, finite, repeatable, each the same in any company.

    Parameters
    ----------
    model
        The model, at its parameters, and its loss.
    reader
        Reads the data.
    classes
        Whether whole targets are indices of classes: else they are what the loss makes of them.
    """

    def __init__(self, model: Model, reader: Reader, classes: bool) -> None:
        self._model, self._reader, self._examples = model, reader, reader.examples
        self._parts = model.parameters.views(model.vector())
        self._generators = Generators(model.model, model.loss)
        self._chance = Chance(model, self._generators, self._copied)
        self._classes = classes

    def refusal(self, batch_size: int, chunk_size: Callable[[], int]) -> Exception | None:
        """What :meth:`run` raises, whatever it is: other processes must hear of it."""
        try:
            self.run(batch_size, chunk_size)
        except Exception as error:
            return error
        return None

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
        share = self._reader.share
        if not share:
            return
        with self._generators.kept(), self._model.kernels(), torch.no_grad():
            with self._model.held.watched():
                first = share[: min(batch_size, _FIRST)]
                self._pass_over(first, len(first))
                size = chunk_size()
                losses, apart = self._pass_over(share, size)
                self._chance.draw_often()
            company = Company(self._model, self._examples, size)
            company.check(share, losses, apart)
            company.check_fixed(sorted(self._examples.drawn))

    def _pass_over(self, share: Sequence[int], size: int) -> tuple[Tensor, set[int]]:
        """The losses of examples, and where among them are those whose targets lie apart."""
        losses, apart = list[Tensor](), Apart()
        for number, batch in enumerate(self._examples.batches(size, share)):
            these = share[number * size : (number + 1) * size]
            began, before = self._generators.get(), self._generators.states()
            with self._model.held.copies(len(these)), self._model.kernels():
                losses.append(self._checked_losses(batch, these))
            apart.see(batch[1], number * size)
            if self._generators.states() != before:
                self._chance.look_at(batch, began)
        return torch.cat(losses), apart.found()

    def _checked_losses(self, batch: Batch, these: Sequence[int]) -> Tensor:
        self._check_kinds(batch)
        inputs, targets = map_leaves(self._copied, batch)
        given = _versions(inputs), _versions(targets)
        outputs = self._outputs(inputs, these)
        if _versions(inputs) != given[0] or not self._unwritten(inputs, batch[0]):
            self._refuse_writing(batch[0])
        if self._classes:
            _check_classes(outputs, targets, these)
        losses = self._losses(outputs, targets, these)
        if _versions(targets) != given[1] or not self._unwritten(targets, batch[1]):
            raise ValueError(
                "loss writes into the targets that it is given, and so into your data; let it work "
                "on a copy (targets.clone(), torch.where, masked_fill)"
            )
        unclean = [_not_finite(tree, len(these), losses.device) for tree in batch]
        bad = ~losses.isfinite()
        if bad.any():
            _check_classes(outputs, targets, these)
            row = int(bad.nonzero()[0])
            raise ValueError(_fault(unclean, outputs, losses, row, these[row]))
        self._check_gradients(batch, unclean, these)
        return losses

    def _copied(self, leaf: Tensor) -> Tensor:
        """On the device, and not the user's: a model that writes into it changes no data."""
        return leaf.to(self._reader.device, copy=True)

    def _unwritten(self, tree: Nested, given: Nested) -> bool:
        """Whether copies have the values that were given: ``.data`` and NumPy count no changes."""
        pairs = zip(leaves(tree), leaves(given), strict=True)
        return all(_equal(leaf, one.to(leaf.device)) for leaf, one in pairs)

    def _check_kinds(self, batch: Batch) -> None:
        device, dtype = self._reader.device, self._model.dtype
        for role, tree in zip(("inputs", "targets"), batch, strict=True):
            for leaf in leaves(tree):
                if self._examples.in_memory and leaf.device != device:
                    raise ValueError(
                        f"mixed devices: {role} are on {leaf.device}, the parameters on "
                        f"{device}; move one of them with .to(device)"
                    )
                if leaf.is_floating_point() and leaf.dtype != dtype:
                    raise ValueError(
                        f"mixed dtypes: {role} are {leaf.dtype}, the parameters {dtype}; "
                        "convert one of them with .to(dtype)"
                    )

    def _outputs(self, inputs: Nested, these: Sequence[int]) -> Any:
        try:
            return self._model.outputs_as_they_come(self._parts, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves(inputs)}))
            raise ValueError(
                f"the model fails on inputs of shape {_shapes(inputs)} ({kinds}), from example "
                f"{these[0]} on: {type(error).__name__}: {error}"
            ) from error

    def _losses(self, outputs: Any, targets: Nested, these: Sequence[int]) -> Tensor:
        try:
            losses = self._model.loss(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _check_classes(outputs, targets, these)
            kind = _shapes(outputs) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"loss(outputs, targets) fails on the data, from example {these[0]} on: "
                f"{type(error).__name__}: {error}; outputs are {kind}, targets {_shapes(targets)}"
            ) from error
        count = len(these)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (count,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss must return one value per example, shape ({count},) for the first {count}, "
                f"but returned {shape}; "
                'most losses of torch do with reduction="none" (msif_lib.cross_entropy does)'
            )
        if not losses.is_floating_point():
            raise ValueError(f"loss must return real numbers, but returned {losses.dtype}")
        return losses

    def _check_gradients(
        self, batch: Batch, unclean: Sequence[Tensor], these: Sequence[int]
    ) -> None:
        """Entries that are not finite may be meant (a mask), if no derivative meets them."""
        bad = (unclean[0] | unclean[1]).nonzero()[:, 0].tolist()

        def finite(rows: list[int]) -> bool:
            inputs, targets = map_leaves(lambda leaf: self._copied(leaf[rows]), batch)
            theta = self._model.vector().requires_grad_()
            with torch.enable_grad():
                total = self._model.losses_at(theta, inputs, targets).sum()
                if not total.requires_grad:
                    return True
                return bool(torch.autograd.grad(total, theta)[0].isfinite().all())

        if bad and not finite(bad):
            row = next((row for row in bad if not finite([row])), bad[0])
            role = "inputs" if unclean[0][row] else "targets"
            raise ValueError(
                f"the {role} of example {these[row]} are not finite, nor is the gradient of its "
                "loss; what is not meant to count must not reach it (torch.where, masked_fill)"
            )

    def _refuse_writing(self, inputs: Nested) -> None:
        copy = map_leaves(self._copied, inputs)

        def evaluate() -> None:
            self._model.batch_outputs(self._parts, copy)

        def state() -> list[object]:
            return [_versions(copy), digests_of(copy, leaves(copy)).tolist()]

        who = innermost(self._model.model, evaluate, state) or "the model"
        raise ValueError(
            f"{who} writes into the inputs that it is given, and so into your data; use an "
            "operation that is not in place (inplace=False, x * 0.5 for x.mul_(0.5))"
        )


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())


def _versions(tree: Nested) -> list[int]:
    """What changes where something writes into a tensor."""
    return [leaf._version for leaf in leaves(tree)]


def _shapes(tree: Nested) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in leaves(tree)]


def _not_finite(tree: Nested, count: int, device: torch.device) -> Tensor:
    """Which examples of a batch ``(b,)`` have an entry that is not finite."""
    bad = torch.zeros(count, dtype=torch.bool, device=device)
    for leaf in leaves(tree):
        if leaf.is_floating_point():
            entries = ~leaf.isfinite().to(device)
            bad |= entries.flatten(1).any(1) if leaf.dim() > 1 else entries
    return bad


def _fault(unclean: Sequence[Tensor], outputs: Any, losses: Tensor, row: int, example: int) -> str:
    """Which of inputs, targets, outputs or loss is not finite."""
    loss = f"loss ({float(losses[row])})"
    for role, bad in zip(("inputs", "targets"), unclean, strict=True):
        if bad[row]:
            return f"the {role} of example {example} are not finite, nor is its {loss}"
    if isinstance(outputs, Tensor) and not outputs[row].isfinite().all():
        return (
            f"the model's outputs for example {example} are not finite, nor is its {loss}; look at "
            "the trained parameters"
        )
    return (
        f"the loss of example {example} is not finite ({losses[row]}), while its inputs, its "
        "target and the model's outputs are; look at the loss at that target"
    )


def _check_classes(outputs: Any, targets: Nested, these: Sequence[int]) -> None:
    """Class indices must lie within the outputs' second dimension, but for those left out."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return
    if not _is_whole(targets) or outputs.dim() != targets.dim() + 1:
        return
    if outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return
    classes = outputs.shape[1]
    bad = ((targets < 0) & (targets != IGNORED)) | (targets >= classes)
    if classes > 1 and bad.any():
        first = bad.nonzero()[0]
        value, example = int(targets[tuple(first)]), these[int(first[0])]
        raise ValueError(
            f"the target of example {example} is {value}, outside the head's {classes} classes "
            f"0..{classes - 1}; targets that are no class indices (counts, say) belong into a "
            "floating-point tensor"
        )
