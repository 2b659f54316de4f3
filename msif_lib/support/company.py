"""A close look at some examples: their losses are their own, beside whatever they are read.

An example's loss must be the same in any company and at any time. Examples spread over the data,
and some of each class, are read again by the data set's own means: a few together that lie far
apart, and alone. Their losses are compared at the parameters and at a point beside them, where
nothing is equal by coincidence (a head of zeros hides what its inputs are).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from operator import itemgetter
from typing import NoReturn

import torch
from torch import Tensor

from msif_lib.support.chance import Generators
from msif_lib.support.checks import returned
from msif_lib.support.data import Batch, Examples, Nested, leaves, map_leaves
from msif_lib.support.model import Model

# Examples spread over the data, and of some classes; those of them read together at most, and those
# read alone.
_SPREAD, _CLASSES, _TOGETHER, _ALONE = 16, 8, 12, 4
# Readings by which what is drawn at 2 % shows for certain (but for once in 20,000).
_READINGS = 500
# How far beside the parameters, in units of their root mean square.
_BESIDE = 0.1
# Roundings that a loss may be off, in units of what the last bits of the parameters change in it.
_ROUNDINGS = 100
# Roundings that may lie between two evaluations of the same, and the change of the parameters whose
# effect they are held against where sums are taken in any order.
_REPEATED, _APART = 64, 1e-2


class Company:
    """A close look at some examples.

    Parameters
    ----------
    model
        The model and its loss.
    examples
        All examples.
    size
        Examples of a batch.
    """

    def __init__(self, model: Model, examples: Examples, size: int) -> None:
        self._model, self._examples, self._size = model, examples, size
        self._eps = torch.finfo(model.dtype).eps
        theta = model.vector()
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64, device="cpu")
        noise = noise.to(theta)
        scale = theta.square().mean().sqrt() if theta.any() else 1.0
        self._points = theta, theta + _BESIDE * scale * noise
        self._signs = noise.sign()
        self._rounding = 1 + 4 * self._eps * self._signs

    def check(self, share: Sequence[int], losses: Tensor, apart: Collection[int]) -> None:
        """Look at some of the examples that were read.

        Parameters
        ----------
        share
            The examples, read in batches in this order.
        losses
            Their losses, each beside its neighbours.
        apart
            Numbers of those in `share` that shall be among them.

        Raises
        ------
        ValueError
            The loss of one is another in other company, or the next time; or its data are. The
            message names the example and the mend.
        """
        some = sorted({*range(0, len(share), -(-len(share) // _SPREAD)), *apart})
        self.check_fixed([share[number] for number in some])
        together = max(2, min(_TOGETHER, self._size))
        count = -(-len(some) // together)
        groups = [some[start::count] for start in range(count)]
        batches = [self._read([share[number] for number in group]) for group in groups]
        alone = {number: self._read([share[number]]) for number in some[:: -(-len(some) // _ALONE)]}
        for at in self._points:
            first = self._repeated(at, batches[0])
            slack = self._slack(at, batches[0], first)
            self._check_in_a_row(at, batches[0], slack)
            for group, batch in zip(groups, batches, strict=True):
                found = first if batch is batches[0] else self._losses(at, batch)
                beside = [share[number] for number in group]
                for number, loss in zip(group, found, strict=True):
                    index, start = share[number], number - number % self._size
                    if at is self._points[0] and not self._same(loss, losses[number], slack):
                        neighbours = list(share[start : start + self._size])
                        self._refuse(index, (beside, loss), (neighbours, losses[number]))
                    if number in alone:
                        (one,) = self._losses(at, alone[number])
                        if not self._same(loss, one, slack):
                            self._refuse(index, (beside, loss), ([index], one))

    def check_fixed(self, indices: Sequence[int]) -> None:
        """A data set must give the same example each time it is read.

        What is drawn rarely (erasing at 2 %) shows in no two readings of few examples. Whether
        reading draws is seen by the generators: then all are read often enough. One that seeds a
        generator by itself leaves it in one state, wherever that began, and draws nothing.

        Raises
        ------
        ValueError
            It gives another; the message names the example.
        """
        if self._examples.in_memory:
            return
        generators = Generators(*self._examples.sources)
        drawing = []
        with generators.kept():
            for index in indices:
                began, first = generators.states(), self._examples.alone(index)
                ended = generators.states()
                generators.advance()
                again, second = generators.states(), self._examples.alone(index)
                states = zip(began, ended, again, generators.states(), strict=True)
                if any(a != b and c != d and b != d for a, b, c, d in states):
                    drawing.append((index, first))
                self._require_fixed(index, first, second)
            for _ in range(-(-_READINGS // len(drawing)) if drawing else 0):
                for index, first in drawing:
                    self._require_fixed(index, first, self._examples.alone(index))

    def _require_fixed(self, index: int, first: Batch, second: Batch) -> None:
        if not _same_values(first, second):
            raise ValueError(
                f"data gives other values each time example {index} is read (random "
                "augmentation?); influence needs fixed examples: switch its randomness off, or let "
                "__getitem__ seed it by the index"
            )

    def _read(self, indices: Sequence[int]) -> Batch:
        batch = next(self._examples.batches(len(indices), indices, workers=False))
        inputs, targets = map_leaves(lambda leaf: leaf.to(self._model.device, copy=True), batch)
        return inputs, targets

    def _losses(self, at: Tensor, batch: Batch) -> Tensor:
        return self._model.losses_at(at, *batch)

    def _repeated(self, at: Tensor, batch: Batch) -> Tensor:
        """The losses of a batch, the same twice: on a CPU bit by bit but for some roundings.

        On a GPU sums are taken in any order. What that changes is held against what a change of
        the parameters does that is larger than rounding by far: chance is as large in both.
        """
        losses, again = self._losses(at, batch), self._losses(at, batch)
        if torch.equal(losses, again):
            return losses
        off = (losses - again).abs().nan_to_num()
        allowed = losses.abs().nan_to_num(posinf=0.0) + losses.abs().nan_to_num(posinf=0.0).mean()
        if at.device.type != "cpu":
            changed = self._losses(at * (1 + _APART * self._signs), batch)
            allowed = allowed + (changed - losses).abs().nan_to_num().max() / _APART
        unequal = losses.isnan() != again.isnan()
        if bool(((off > _REPEATED * self._eps * allowed) | unequal).any()):
            raise ValueError(
                "the model or loss depends on chance or on how often it was called: the same "
                "examples gave different losses twice; switch its randomness off (module.eval()), "
                "and let it count and keep nothing"
            )
        return losses

    def _slack(self, at: Tensor, batch: Batch, losses: Tensor) -> float:
        """What a loss may be off: by their size, and by what rounding makes of them.

        Where a model fits its data to the last bits, rounding is as large as the losses.
        """
        rounding = (self._losses(at * self._rounding, batch) - losses).abs().nan_to_num().max()
        size = losses.abs().nan_to_num(posinf=0.0).mean()
        return float(self._eps**0.5 * size + _ROUNDINGS * rounding)

    def _same(self, a: Tensor, b: Tensor, slack: float) -> bool:
        close = (a - b).abs() <= slack + self._eps**0.5 * b.abs()
        return bool((close | (a == b) | (a.isnan() & b.isnan())).all())

    def _check_in_a_row(self, at: Tensor, batch: Batch, slack: float) -> None:
        """The same examples after evaluations that move what is held."""
        moving = self._model.held.moving
        if moving and not self._same(*self._model.losses_in_a_row(at, *batch), slack):
            raise ValueError(
                f"the losses depend on what earlier evaluations left in {', '.join(moving)} (a "
                f"buffer moved by a power iteration, a counter); call {moving[0]}.eval() first, or "
                "let what it keeps not count"
            )

    def _refuse(
        self, index: int, one: tuple[list[int], Tensor], other: tuple[list[int], Tensor]
    ) -> NoReturn:
        """The loss of an example among some others, and among others again."""
        raise ValueError(
            f"the loss of example {index} depends on the others in its batch: it is "
            f"{float(one[1]):.6g} {_among(one[0])} and {float(other[1]):.6g} {_among(other[0])}; "
            + self._why(index, one[0], other[0])
        )

    def _why(self, index: int, *companies: list[int]) -> str:
        """Whether data, model or loss are at fault, and what to do."""
        batches = [self._read(company) for company in companies]
        rows = [
            map_leaves(itemgetter(slice(at, at + 1)), batch)
            for at, batch in zip((company.index(index) for company in companies), batches)
        ]
        one, other = ([tuple(leaf.shape[1:]) for leaf in leaves(row)] for row in rows)
        if one != other:
            return (
                f"collate_fn pads its tensors to {one} and to {other}, and what is padded counts: "
                "mask it in the model and the loss, or pad every batch to one length"
            )
        if not _same_values(*rows):
            return "collate_fn makes other values of it: let it change no value"
        parts = self._model.parameters.views(self._points[1])
        outputs = [self._model.batch_outputs(parts, batch[0]) for batch in batches]
        shapes = f"outputs and targets {[tuple(leaf.shape) for leaf in leaves(batches[0][1])]}"
        if all(isinstance(one, Tensor) for one in outputs):
            one, other = (out[company.index(index)] for out, company in zip(outputs, companies))
            slack = self._eps**0.5 * (1 + float(one.abs().nan_to_num().max()))
            if not torch.allclose(one, other, rtol=0, atol=slack, equal_nan=True):
                places = [company.index(index) for company in companies]
                where = self._mixing(parts, batches, places, slack)
                return (
                    f"the model mixes the examples of a batch{where} (normalisation over it?); "
                    "influence needs per-example losses: use GroupNorm or LayerNorm, or .eval()"
                )
            shapes = f"outputs {tuple(outputs[0].shape)}" + shapes.removeprefix("outputs")
        return (
            "the loss mixes the examples of a batch (an average over it, weights of classes "
            f"divided by their sum, or {shapes} broadcast against each other?); influence needs "
            'per-example losses: reduction="none", and equal shapes'
        )

    def _mixing(
        self, parts: Sequence[Tensor], batches: Sequence[Batch], places: Sequence[int], slack: float
    ) -> str:
        """In which module: of those whose output for the example differs the first to return."""
        model = self._model
        one, other = (
            returned(model.model, partial(model.batch_outputs, parts, inputs))
            for inputs, _ in batches
        )
        sizes = [leaves(batch)[0].shape[0] for batch in batches]
        for (name, a), (_, b) in zip(one, other):  # shorter where the model goes other ways
            if name and [len(a), len(b)] == sizes and a.shape[1:] == b.shape[1:]:
                rows = a[places[0]], b[places[1]]
                if not torch.allclose(*rows, rtol=0, atol=slack, equal_nan=True):
                    return f" in {name}"
        return ""


def _among(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return "alone"
    return f"among examples {', '.join(map(str, indices[:6]))}" + ", ..." * (len(indices) > 6)


def _same_values(one: Nested, other: Nested) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point())
        for a, b in pairs
    )


class Apart:
    """Examples whose targets lie apart, where those of neighbours may be the same.

    The first of each of some classes, and those of the least and of the largest target.
    """

    def __init__(self) -> None:
        self._classes: dict[float, int] = {}
        self._least, self._largest = (math.inf, 0), (-math.inf, 0)

    def see(self, targets: Nested, start: int) -> None:
        """Look at the targets of a batch, whose first example is number `start`."""
        if not leaves(targets):
            return
        leaf = leaves(targets)[0].cpu()
        values = (leaf.abs() if leaf.is_complex() else leaf).double().nan_to_num()
        values = values.flatten(1).sum(1) if leaf.dim() > 1 else values
        low, high = int(values.argmin()), int(values.argmax())
        self._least = min(self._least, (float(values[low]), start + low))
        self._largest = max(self._largest, (float(values[high]), start + high))
        if leaf.dim() > 1 or leaf.is_floating_point() or len(self._classes) == _CLASSES:
            return
        for kind in values.unique()[:_CLASSES].tolist():
            if len(self._classes) < _CLASSES and kind not in self._classes:
                self._classes[kind] = start + int((values == kind).nonzero()[0])

    def found(self) -> set[int]:
        """Their numbers."""
        return {self._least[1], self._largest[1], *self._classes.values()}
