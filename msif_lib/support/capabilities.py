"""What a model can do, found out by trying: batching rules, forward mode, memory of its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vmap

from msif_lib.support.data import Batch, Nested, count_of, leaves, map_leaves, rebuilt
from msif_lib.support.differences import Point
from msif_lib.support.functional import GraphNotCountable, saved_bytes
from msif_lib.support.model import Model

# Examples on which forward mode is tried.
_PROBED = 8
# Examples whose gradients by vmap are held against reverse mode, and the shares of the parameters
# at which they are, one after the other where they differ: a wrong rule is wrong at all, while of
# the gradient of a loss that is saturated nothing but rounding may be left.
_COMPARED, _SHARES = 2, (1.0, 1 / 8, 1 / 64)
# From this many directions on, contracting per-example gradients beats one forward-mode sweep a
# direction (a sweep costs about 1.7 forward passes, the gradients 2.5 to 6.6 once).
_FORWARD_MODE_DIRECTIONS = 3
# Where fewer per-example gradients than this can be held at once, contracting them does not pay.
_FEWEST_GRADIENTS = 8
# What the graph of a gradient keeps, in units of what the graph of the losses keeps.
_GRADIENT_GRAPH = 3


class Capabilities:
    """What a model and its loss can do, each tried at most once, and the derivatives by it.

    Parameters
    ----------
    model
        The model, with its loss.
    first
        Gives the first so many examples, on the device.
    size
        Number of examples.

    Attributes
    ----------
    loss
        The loss that the model had; of another nothing is known.
    """

    def __init__(self, model: Model, first: Callable[[int], Batch], size: int) -> None:
        self._model, self._first, self._size, self.loss = model, first, size, model.loss
        self._losses, self._vector = model.losses_at, model.vector

    @cached_property
    def batching_rules(self) -> bool:
        """Whether `torch.func.vmap` takes gradients of the model, and those of reverse mode.

        Of fused recurrent layers and of models that look at values, for instance, it takes none;
        of an operation of a user's own the rule may be wrong (``vmap`` of an autograd.Function).
        """
        few, theta, found = self._first(min(_COMPARED, self._size)), self._vector(), []
        try:
            for share in _SHARES:
                found.append(self._agrees(share * theta, few))
                if found[-1]:
                    return True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return False not in found

    def _agrees(self, theta: Tensor, few: Batch) -> bool | None:
        """Whether gradients by vmap are those of reverse mode; None where they say nothing."""
        truth = self._one_by_one(theta, *few)
        off, size = (self._vectorised(theta, *few) - truth).norm(), truth.norm()
        if not (off.isfinite() and (off or size)):
            return None
        return bool(off <= torch.finfo(theta.dtype).eps ** 0.5 * size)

    @cached_property
    def forward_mode(self) -> bool:
        """Whether forward mode gives what reverse mode gives, on few examples.

        An operation may have no forward derivative; one of a user's own may even pass on zero
        without a word (``torch.library.custom_op``).
        """
        for count in (1, _PROBED):
            few = self._first(min(count, self._size))
            chance = torch.Generator(self._model.device).manual_seed(0)
            at = partial(self._total, few)
            point = Point(at, self._model.vector(), self._model.parameters, chance)
            if point.gradient.any():
                break
        v = point.direction()
        try:
            forward = self._forward(point.theta, v, few).sum()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        terms = point.gradient * v
        # Not held against the sum: in float32 over millions of entries that has three digits.
        tolerance = torch.finfo(v.dtype).eps ** 0.5 * terms.norm()
        # Where all are zero nothing is proved.
        return bool(terms.any() and (forward - terms.sum()).abs() <= tolerance)

    def _total(self, batch: Batch, theta: Tensor) -> Tensor:
        return self._losses(theta, *batch).sum()

    def examples_at_once(self, most: int, memory_budget: int | None) -> int:
        """Examples of a batch, at most `most`: as many as the budget of autograd graph allows.

        Parameters
        ----------
        most
            The batch size asked for.
        memory_budget
            Bytes; None: 32 MiB on a CPU, where what no longer fits its caches is slower too, and
            2 GiB on a GPU; four times the parameters where that is more, since a pass reads all
            of them, so that it should not be for next to no examples.
        """
        if most == 1 or self._size < 2:
            return most
        theta = self._vector()
        on_cpu = theta.device.type == "cpu"
        budget = memory_budget or max(2**25 if on_cpu else 2**31, 4 * theta.nbytes)
        try:
            one, two = (self._graph_bytes(count) for count in (1, 2))
        except GraphNotCountable:
            return most
        return max(1, min(most, budget // max(1, _GRADIENT_GRAPH * (two - one))))

    def _graph_bytes(self, count: int) -> int:
        """Bytes that the graph of the first few losses keeps."""
        batch = self._first(count)
        theta = self._vector().requires_grad_()
        with torch.enable_grad(), saved_bytes() as held:
            losses = self._losses(theta, *batch)
        assert len(losses) == count  # alive till now
        return sum(held.values())

    # --- derivatives of each example's loss, by what the model can do -----------------------

    def _loss_of_one(self, theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        """The loss of one example, given without the dimension of examples: a scalar."""
        return self._losses(theta, *map_leaves(itemgetter(None), (inputs, targets)))[0]

    def _forward(self, theta: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """∇ℓ(z_i)ᵀ v ``(b,)`` by forward mode.

        Where operations are small this takes a third less than torch.func.jvp.
        """
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(theta, v)
            values, derivatives = forward_ad.unpack_dual(self._losses(dual, *batch))
            return torch.zeros_like(values) if derivatives is None else derivatives

    def _vectorised(self, theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        def loss(theta: Tensor, tensors: list[Tensor]) -> Tensor:
            return self._loss_of_one(theta, *rebuilt((inputs, targets), tensors))

        return vmap(grad(loss), in_dims=(None, 0))(theta, leaves((inputs, targets)))

    def _one_by_one(self, theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        rows = []
        for index in range(count_of(inputs)):
            this = map_leaves(itemgetter(index), (inputs, targets))
            at = theta.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._loss_of_one(at, *this)
            if loss.requires_grad:
                (row,) = torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)
                rows.append(row)
            else:
                rows.append(torch.zeros_like(theta))
        return torch.stack(rows)

    def gradients(self, theta: Tensor, batches: Iterable[Batch], at_once: int) -> Iterator[Tensor]:
        """Yield the gradients of the losses in blocks ``(b, p)``, of at most so many examples."""
        gradients = self._vectorised if self.batching_rules else self._one_by_one
        for batch in batches:
            for start in range(0, count_of(batch), at_once):
                inputs, targets = map_leaves(itemgetter(slice(start, start + at_once)), batch)
                yield gradients(theta, inputs, targets)

    def directional_derivatives(
        self, theta: Tensor, directions: Tensor, batches: Iterable[Batch], at_once: int
    ) -> Iterator[Tensor]:
        """Yield ∇ℓ(z_i)ᵀ v for the columns v of ``(p, k)``, in blocks ``(b, k)``.

        One forward-mode product gives the derivative of a whole batch of losses for about the
        price of two forward passes. For many directions per-example gradients are formed in
        blocks and contracted at once. The (N, p) matrix of gradients is never held.
        """
        many = directions.shape[1] > _FORWARD_MODE_DIRECTIONS
        cheap = at_once >= _FEWEST_GRADIENTS and self.batching_rules
        if (many and cheap) or not self.forward_mode:
            for block in self.gradients(theta, batches, at_once):
                yield block @ directions
            return
        for batch in batches:
            yield torch.stack([self._forward(theta, v, batch) for v in directions.unbind(1)], 1)
