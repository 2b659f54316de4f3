"""A close look at some examples: their losses are their own, beside whatever they are read.

An example's loss must be the same in any company and at any time. Examples spread over the data,
and some of each class, are read again by the data set's own means: a few together that lie far
apart, and alone. Their losses are compared at the parameters and at a point beside them, where
nothing is equal by coincidence (a head of zeros hides what its inputs are).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msif_lib.support.chance import Generators
from msif_lib.support.data import Batch, Examples, Nested, leaves, map_leaves
from msif_lib.support.model import Model

# Examples spread over the data, those of them read together at most, and those read alone.
_SPREAD, _TOGETHER, _ALONE = 16, 12, 4
# Readings by which what is drawn at 2 % shows for certain (but for once in 20,000).
_READINGS = 500
# How far beside the parameters, in units of their root mean square.
_BESIDE = 0.1
# Roundings that a loss may be off, in units of what the last bits of the parameters change in it.
_ROUNDINGS = 100


class Company:
    """A close look at some examples.

    Parameters
    ----------
    model
        The model and its loss.
    examples
        All examples.
    at_once
        Examples evaluated at once, at most (two, if this is one).
    """

    def __init__(self, model: Model, examples: Examples, at_once: int) -> None:
        self._model, self._examples = model, examples
        self._at_once = max(2, min(_TOGETHER, at_once))
        self._eps = torch.finfo(model.dtype).eps
        theta = model.vector()
        self._here = model.parameters.views(theta)
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64, device="cpu")
        noise = noise.to(theta)
        size = theta.square().mean().sqrt() if theta.any() else 1.0
        self._beside = model.parameters.views(theta + _BESIDE * size * noise)
        self._rounded = model.parameters.views(theta * (1 + 4 * self._eps * noise.sign()))

    def check(self, known: dict[int, Tensor]) -> None:
        """Look at the examples whose losses, read beside their neighbours, are given.

        Raises
        ------
        ValueError
            The loss of one is another in other company, or the next time; or its data are. The
            message names the example and the mend.
        """
        chosen = sorted(known)
        self.check_fixed(chosen)
        count = -(-len(chosen) // self._at_once)
        groups = [chosen[start::count] for start in range(count)]
        batches = [self._read(group) for group in groups]
        noise = self._noise(batches[0])
        self._check_twice(groups[0], batches[0], noise)
        for group, batch in zip(groups, batches, strict=True):
            losses = self._losses(self._here, batch)
            expected = torch.stack([known[index] for index in group])
            self._compare(group, batch, losses, expected, "beside its neighbours", noise)
        alone = chosen[:: -(-len(chosen) // _ALONE)]
        for parts in (self._here, self._beside):
            for group, batch in zip(groups, batches, strict=True):
                losses = self._losses(parts, batch)
                for row, index in enumerate(group):
                    if index in alone:
                        one = self._losses(parts, self._read([index]))
                        at = slice(row, row + 1)
                        self._compare([index], batch, losses[at], one, "alone", noise, group)

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

    def _losses(self, parts: Sequence[Tensor], batch: Batch) -> Tensor:
        return self._model.batch_losses(parts, *batch)

    def _noise(self, batch: Batch) -> float:
        """What the last bits of the parameters change in a loss."""
        change = self._losses(self._rounded, batch) - self._losses(self._here, batch)
        return float(change.abs().nan_to_num().max())

    def _check_twice(self, group: Sequence[int], batch: Batch, noise: float) -> None:
        """The same examples at another time, and after evaluations that move what is held."""
        once, again = (self._losses(self._here, batch) for _ in range(2))
        if not self._same(once, again, noise).all():
            raise ValueError(
                "the model or loss depends on chance: the same examples gave different losses "
                "twice; switch its randomness off (module.eval())"
            )
        moving = self._model.moving
        if not moving:
            return
        once, again = self._model.losses_in_a_row(self._beside, *batch)
        if not self._same(once, again, noise).all():
            raise ValueError(
                f"the losses depend on what earlier evaluations left in {', '.join(moving)} (a "
                f"buffer moved by a power iteration, say); call {moving[0]}.eval() first"
            )

    def _same(self, a: Tensor, b: Tensor, noise: float) -> Tensor:
        size = b.abs().nan_to_num(posinf=0.0)
        slack = self._eps**0.5 * (size + size.mean()) + _ROUNDINGS * noise
        return ((a - b).abs() <= slack) | (a == b) | (a.isnan() & b.isnan())

    def _compare(
        self,
        indices: Sequence[int],
        batch: Batch,
        losses: Tensor,
        expected: Tensor,
        where: str,
        noise: float,
        group: Sequence[int] | None = None,
    ) -> None:
        """Refuse the first example of a group whose loss is another elsewhere."""
        different = (~self._same(losses, expected, noise)).nonzero()
        if not len(different):
            return
        first = int(different[0])
        index, beside = indices[first], list(group or indices)
        raise ValueError(
            f"the loss of example {index} depends on the others in its batch: it is "
            f"{float(losses[first]):.6g} among examples {beside} and {float(expected[first]):.6g} "
            f"{where}; {self._why(index, beside.index(index), batch)}"
        )

    def _why(self, index: int, row: int, batch: Batch) -> str:
        """Whether data, model or loss are at fault, and what to do."""
        alone = self._read([index])
        shapes = [[tuple(leaf.shape[1:]) for leaf in leaves(one)] for one in (batch, alone)]
        if shapes[0] != shapes[1]:
            return (
                f"collate_fn pads its tensors to {shapes[0]} there and to {shapes[1]} alone, and "
                "what is padded counts: mask it in the model and the loss, or pad every batch to "
                "one length"
            )
        if not _same_values(map_leaves(lambda leaf: leaf[row : row + 1], batch), alone):
            return "collate_fn makes other values of it there: let it change no value"
        outputs: Any = self._model.batch_outputs(self._beside, batch[0])
        one: Any = self._model.batch_outputs(self._beside, alone[0])
        if isinstance(outputs, Tensor) and isinstance(one, Tensor):
            close = outputs[row : row + 1].shape == one.shape and torch.allclose(
                outputs[row : row + 1], one, self._eps**0.5, self._eps**0.5, equal_nan=True
            )
            if not close:
                return (
                    "the model mixes the examples of a batch (normalisation over the batch?); "
                    "influence needs per-example losses: use GroupNorm or LayerNorm, or .eval()"
                )
            shape = tuple(outputs.shape)
        else:
            shape = ()
        targets = [tuple(leaf.shape) for leaf in leaves(batch[1])]
        return (
            "the loss mixes the examples of a batch (an average over it, weights of classes that "
            f"are divided by their sum, or outputs {shape} broadcast against targets {targets}?); "
            'influence needs per-example losses: reduction="none", and equal shapes'
        )


def _same_values(one: Nested, other: Nested) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point())
        for a, b in pairs
    )


def chosen(share: Sequence[int], firsts: Sequence[int]) -> list[int]:
    """Examples to look at: spread over those read, and the first of each class."""
    return sorted({*share[:: -(-len(share) // _SPREAD)], *firsts})
