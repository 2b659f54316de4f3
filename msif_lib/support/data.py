"""Examples in a fixed order, read in batches: tensors, map-style data sets, data loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

#: A tensor, or a dict, list or tuple of such (token ids with their masks, say).
Nested = Any
Batch = tuple[Nested, Nested]


def leaves(tree: Nested) -> list[Tensor]:
    """The tensors of a nested structure, depth first.

    Raises
    ------
    TypeError
        A leaf is not a tensor.
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    raise TypeError(
        f"data must hold tensors (or dicts, lists and tuples of tensors), not {type(tree).__name__}"
    )


def map_leaves(function: Callable[[Tensor], Tensor], tree: Nested) -> Nested:
    """The same nested structure with `function` applied to each tensor."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, value) for value in tree)
    return function(tree)


def concatenate(trees: list[Nested]) -> Nested:
    """Join equal nested structures along the first dimension of their tensors."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: concatenate([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(concatenate(list(parts)) for parts in zip(*trees, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(concatenate(list(parts)) for parts in zip(*trees, strict=True))
    return torch.cat(trees)


class Examples:
    """N examples in the order of the data given, whatever the batching.

    Parameters
    ----------
    data
        A pair ``(inputs, targets)`` of tensors (or nested tensors) whose first dimension is
        the example; a map-style ``Dataset`` of such pairs; or a ``DataLoader`` over one, of
        which the data set, the collate function and the workers are used and the shuffling is not.

    Raises
    ------
    ValueError
        No examples; inputs and targets of unequal length; an iterable-style data set; a loader
        with a sampler of its own (pass a ``torch.utils.data.Subset`` instead).
    TypeError
        Neither of the three, or leaves that are not tensors.
    """

    def __init__(self, data: Batch | Dataset | DataLoader) -> None:
        self._loader: dict[str, Any] | None = None
        if isinstance(data, list | tuple):
            self._tensors = self._checked_pair(data)
            self._size = leaves(self._tensors)[0].shape[0]
        elif isinstance(data, DataLoader) or hasattr(data, "__getitem__"):
            self._loader = self._loader_settings(data)
            self._size = len(self._loader["dataset"])
            if self._size == 0:
                raise ValueError("data is empty: the data set has no examples")
        else:
            raise TypeError(
                "data must be a pair (inputs, targets), a map-style Dataset or a DataLoader, "
                f"not {type(data).__name__}"
            )

    @staticmethod
    def _checked_pair(data: Any) -> Batch:
        if len(data) != 2:
            raise ValueError(f"data must be a pair (inputs, targets); it has {len(data)} parts")
        sizes = set()
        for leaf in leaves(data):
            if leaf.dim() == 0:
                raise ValueError(
                    "data holds a tensor without dimensions; the first dimension must be the "
                    "example, so a single example needs inputs[None] and targets[None]"
                )
            sizes.add(leaf.shape[0])
        if len(sizes) != 1:
            raise ValueError(
                "inputs and targets must have the same number of examples; their first "
                f"dimensions are {sorted(sizes)}"
            )
        if sizes == {0}:
            raise ValueError("data is empty: its first dimension is 0")
        return data[0], data[1]

    @staticmethod
    def _loader_settings(data: Any) -> dict[str, Any]:
        dataset = data.dataset if isinstance(data, DataLoader) else data
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                "data is an iterable-style data set; scores need an order: pass a map-style "
                "data set (with __getitem__ and __len__)"
            )
        if not isinstance(data, DataLoader):
            return {"dataset": data}
        plain, batches = SequentialSampler | RandomSampler, data.batch_sampler
        for sampler, known in (
            (data.sampler, plain),
            (batches, BatchSampler),
            (getattr(batches, "sampler", data.sampler), plain),
        ):
            if not isinstance(sampler, known):
                raise ValueError(
                    f"data is a DataLoader with {type(sampler).__name__} as its sampler; pass a "
                    "torch.utils.data.Subset of its data set, so that the order of scores is plain"
                )
        return {
            "dataset": data.dataset,
            "collate_fn": data.collate_fn,
            "num_workers": data.num_workers,
        }

    def __len__(self) -> int:
        return self._size

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield ``(inputs, targets)`` of at most `batch_size` examples, in order.

        Parameters
        ----------
        batch_size
            Examples in a batch; the last may have fewer.
        indices
            The examples to read, by default all. The others are not read.
        """
        if indices is None:
            indices = range(self._size)
        if self._loader is None:
            for start in range(0, len(indices), batch_size):
                chosen: Any = indices[start : start + batch_size]
                if isinstance(chosen, range) and chosen.step == 1:
                    chosen = slice(chosen.start, chosen.stop)  # a view, where a list would copy
                inputs, targets = map_leaves(itemgetter(chosen), self._tensors)
                yield inputs, targets
            return
        settings = self._loader
        if indices != range(self._size):
            settings = settings | {"dataset": Subset(settings["dataset"], indices)}
        # A generator of its own: the loader would draw its seed from the user's.
        own = torch.Generator()
        for batch in DataLoader(batch_size=batch_size, generator=own, **settings):
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise ValueError("each item of the data set must be a pair (inputs, targets)")
            yield batch[0], batch[1]

    def tensors(self) -> Batch:
        """All examples as one pair of (nested) tensors, read into memory.

        Raises
        ------
        ValueError
            The collate function pads each batch to a length of its own.
        """
        if self._loader is None:
            return self._tensors
        batches = list(self.batches(1024))
        shapes = [[tuple(leaf.shape[1:]) for leaf in leaves(batch)] for batch in batches]
        if any(other != shapes[0] for other in shapes):
            other = next(other for other in shapes if other != shapes[0])
            raise ValueError(
                "batches of data differ in shape, so that they cannot be read as one: an example "
                f"has tensors of shapes {shapes[0]} in the first and {other} in another; give the "
                "DataLoader a collate_fn that pads every batch to one length"
            )
        inputs, targets = concatenate(batches)
        return inputs, targets
