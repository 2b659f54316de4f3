"""Who reads which examples: this process all of them, or each process its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from msif_lib.support.data import Batch, Examples, map_leaves

R = TypeVar("R")


class Reader:
    """All examples, read by one process; :mod:`msif_lib.scale.sharding` has one for more.

    Parameters
    ----------
    examples
        The examples.
    device
        Where batches are moved.
    indices
        The examples that are read, by default all.
    """

    def __init__(
        self, examples: Examples, device: torch.device, indices: Sequence[int] | None = None
    ) -> None:
        self.examples, self.device = examples, device
        self.indices = range(len(examples)) if indices is None else indices

    @property
    def share(self) -> Sequence[int]:
        """The examples that this process reads."""
        return self.indices

    def section(self, indices: Sequence[int]) -> Reader:
        """A reader of these examples alone."""
        return Reader(self.examples, self.device, indices)

    def on(self, examples: Examples) -> Reader:
        """A reader of other examples, shared out in the same way."""
        return Reader(examples, self.device)

    def moved_to(self, device: torch.device) -> Reader:
        """The same reader, batches being moved to another device."""
        return Reader(self.examples, device, self.indices)

    def read(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """Examples in the order of `indices`, in batches, on the device."""
        for inputs, targets in self.examples.batches(batch_size, indices):
            yield map_leaves(self._moved, inputs), map_leaves(self._moved, targets)

    def _moved(self, leaf: Tensor) -> Tensor:
        """A tensor on the device, of which derivatives can be taken: none of inference mode."""
        return leaf.to(self.device, copy=leaf.is_inference())

    def first(self, count: int) -> Batch:
        """The first examples of all, on the device."""
        return next(self.read(count, range(count)))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The examples of this process in order, in batches, on the device."""
        return self.read(batch_size, self.share)

    def digested(self, batch_size: int) -> Iterator[tuple[Batch, Tensor]]:
        """The same with a digest ``(b, 2)`` of each example, on the device."""
        for batch, digests in self.examples.digested(batch_size, self.share):
            inputs, targets = map_leaves(self._moved, batch)
            yield (inputs, targets), digests.to(self.device)

    def on_first(self, work: Callable[[], R]) -> R:
        """What the first process finds by some work that it does alone, on every process.

        What it raises, all raise.
        """
        return work()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes that share the data; here there is but one."""
        return tensor

    def gather(self, blocks: Iterable[Tensor], like: Tensor) -> Tensor:
        """Rows of this process's examples as those of all processes', in the data's order.

        Parameters
        ----------
        blocks
            Rows ``(b, ...)`` for the examples of :attr:`share`, in order.
        like
            An empty block ``(0, ...)``, for a process without examples.

        Returns
        -------
        Tensor
            ``(N, ...)``.
        """
        return torch.cat([like, *blocks])

    def agree_on(self, refusal: Exception | None) -> None:
        """Raise on every process what any raised; here there is but one."""
        if refusal is not None:
            raise refusal

    def agreed(self, work: Callable[[], R]) -> R:
        """What some work gives that every process does; what it raises on any, it raises on all."""
        result, refusal = None, None
        try:
            result = work()
        except Exception as error:
            refusal = error
        self.agree_on(refusal)
        return cast(R, result)

    def require_alike(self, given: Callable[[], dict[str, str]]) -> None:
        """Refuse where processes that share the data were given other digests, by name."""

    def require_same(self, digest: Callable[[], str]) -> None:
        """Refuse where processes that share the data hold different stages; here there is one."""
