"""Examples in a fixed order, read in batches: tensors, map-style data sets, data loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
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
    default_collate,
)

from msif_lib.support.chance import Generators
from msif_lib.support.fingerprint import digests_of

#: A tensor, or a dict, list or tuple of such (token ids with their masks, say).
Nested = Any
Batch = tuple[Nested, Nested]

# Of a loader, what is used to read its data set.
_USED = ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context", "timeout")


def leaves(tree: Nested) -> list[Tensor]:
    """The tensors of a nested structure, depth first.

    Raises
    ------
    TypeError
        A leaf is not a tensor.
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    kind = type(tree).__name__
    raise TypeError(
        f"data must hold tensors (or dicts, lists and tuples of tensors), not {kind}"
        + ("; convert it by torch.as_tensor" if isinstance(tree, np.ndarray | float | int) else "")
    )


def count_of(batch: Nested) -> int:
    """The number of examples in a batch, of which targets may hold no tensor."""
    return leaves(batch)[0].shape[0]


def rows_of(tree: Nested) -> int:
    """The same of whatever a module is given: 0 where it begins with no tensor."""
    while not isinstance(tree, Tensor):
        values = tree.values() if isinstance(tree, Mapping) else tree
        if not isinstance(values, list | tuple | ValuesView) or not len(values):
            return 0
        tree = next(iter(values))
    return tree.shape[0] if tree.dim() else 0


def map_leaves(function: Callable[[Tensor], Tensor], tree: Nested) -> Nested:
    """The same nested structure with `function` applied to each tensor."""
    if isinstance(tree, Mapping):
        return _like(tree, {key: map_leaves(function, value) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, value) for value in tree)
    return function(tree)


def rebuilt(tree: Nested, tensors: Sequence[Tensor]) -> Nested:
    """The same nested structure with other tensors, in the order of its leaves.

    Transforms of torch.func take lists, and no mapping of a user's own kind.
    """
    rest = iter(tensors)
    return map_leaves(lambda _: next(rest), tree)


def concatenate(trees: list[Nested]) -> Nested:
    """Join equal nested structures along the first dimension of their tensors."""
    first = trees[0]
    if isinstance(first, Mapping):
        return _like(first, {key: concatenate([tree[key] for tree in trees]) for key in first})
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(concatenate(list(parts)) for parts in zip(*trees, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(concatenate(list(parts)) for parts in zip(*trees, strict=True))
    return torch.cat(trees)


def _like(tree: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """The values in a mapping of the same kind, which a model may read by attributes, say."""
    if type(tree) is dict:
        return values
    try:
        mapping: Any = copy.copy(tree)
        for key, value in values.items():
            mapping[key] = value
    except Exception as error:
        raise TypeError(
            f"data hold a {type(tree).__name__}, of which no copy with other tensors can be made "
            f"({type(error).__name__}: {error}); give a dict"
        ) from error
    return mapping


@dataclass
class _Digesting:
    """A collate function that gives the digest of each item beside the batch."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> tuple[Batch, Tensor]:
        alone = (_pair(self.collate([item]), [0]) for item in items)
        digests = torch.cat([digests_of(one, leaves(one)) for one in alone])
        return _pair(self.collate(items), range(len(items))), digests


class Examples:
    """N examples in the order of the data given, whatever the batching.

    What is read carries no gradient, and generators are in the state that they were in.

    Parameters
    ----------
    data
        A pair ``(inputs, targets)`` of tensors (or nested tensors) whose first dimension is
        the example; a map-style ``Dataset`` of such pairs; or a ``DataLoader`` over one, of
        which the data set, the collate function and the workers are used and the shuffling is not.
        Targets may be none: ``()``, ``{}``, or None, which is read as ``()``.

    Attributes
    ----------
    drawn
        The examples in whose reading, so far, a generator was moved.

    Raises
    ------
    ValueError
        No examples; inputs and targets of unequal length; an iterable-style data set; a loader
        that gives other examples than its data set holds, each once (a sampler of its own,
        ``drop_last``, an ``__iter__`` of its own).
    TypeError
        Neither of the three, or leaves that are not tensors.
    """

    def __init__(self, data: Batch | Dataset | DataLoader) -> None:
        self._loader: dict[str, Any] | None = None
        self._generators: Generators | None = None  # looked for once: a data set may hold much
        self.drawn: set[int] = set()
        if isinstance(data, list | tuple):
            self._tensors = self._checked_pair(data)
            self._size = count_of(self._tensors)
        elif isinstance(data, DataLoader | Dataset) or (
            hasattr(data, "__getitem__")
            and not isinstance(data, Tensor | np.ndarray | Mapping | str)
        ):
            self._loader = _loader_settings(data)
            self._size = _size_of(self._loader["dataset"])
        else:
            raise TypeError(
                "data must be a pair (inputs, targets), a map-style Dataset or a DataLoader, "
                f"not {type(data).__name__}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the generators, which are those of a process."""
        return vars(self) | {"_generators": None}

    @property
    def in_memory(self) -> bool:
        """Whether the examples are tensors at hand."""
        return self._loader is None

    @property
    def sources(self) -> list[Any]:
        """The data set and what reads it, where the examples are not at hand."""
        return list((self._loader or {}).values())

    @staticmethod
    def _checked_pair(data: Any) -> Batch:
        if len(data) != 2:
            raise ValueError(
                f"data must be a pair (inputs, targets); it has {len(data)} parts (a list of "
                "examples belongs into a torch.utils.data.Dataset)"
            )
        inputs, targets = _detached(data)
        if not leaves(inputs):
            raise ValueError("data must be a pair (inputs, targets); its inputs hold no tensor")
        sizes = set()
        for leaf in leaves((inputs, targets)):
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
        return inputs, targets

    def __len__(self) -> int:
        return self._size

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None, workers: bool = True
    ) -> Iterator[Batch]:
        """Yield ``(inputs, targets)`` of at most `batch_size` examples, in order.

        Parameters
        ----------
        batch_size
            Examples in a batch; the last may have fewer.
        indices
            The examples to read, by default all. The others are not read.
        workers
            Whether a loader's workers read them: for few examples they cost more than they save.

        Raises
        ------
        ValueError
            The data set fails on an example, or gives something else than a pair whose tensors
            have one row an example; the message names it.
        """
        if indices is None:
            indices = range(self._size)
        if self._loader is not None:
            yield from self._loaded(batch_size, indices, workers)
            return
        for start in range(0, len(indices), batch_size):
            chosen: Any = indices[start : start + batch_size]
            if isinstance(chosen, range) and chosen.step == 1:
                chosen = slice(chosen.start, chosen.stop)  # a view, where a list would copy
            inputs, targets = map_leaves(itemgetter(chosen), self._tensors)
            yield inputs, targets

    def _loaded(self, batch_size: int, indices: Sequence[int], workers: bool) -> Iterator[Batch]:
        """Batches of a data set, by torch's loader."""
        settings = dict(self._loader or {})
        dataset = settings.pop("dataset")
        if not workers:
            settings |= {"num_workers": 0, "multiprocessing_context": None, "timeout": 0}
        generators = self._generators = self._generators or Generators(*self.sources)
        # A generator of its own: the loader would draw its seed from the user's.
        own = torch.Generator("cpu")
        loader = iter(
            DataLoader(Subset(dataset, indices), batch_size, generator=own, **settings)  # type: ignore[arg-type]
        )
        for start in range(0, len(indices), batch_size):
            some = indices[start : start + batch_size]
            with generators.kept():
                before = generators.states()
                try:
                    batch = next(loader)
                except Exception as error:
                    raise _failed(dataset, some, error) from error
                if generators.states() != before:
                    self.drawn.update(some)
            yield _pair(batch, some)

    def digested(self, batch_size: int, indices: Sequence[int]) -> Iterator[tuple[Batch, Tensor]]:
        """The same batches with a digest ``(b, 2)`` of each example, every one read once.

        An item of a data set is collated by itself for it, so that neither the batch that it comes
        in nor what it is padded to there is part of its digest.
        """
        if self._loader is None:
            for batch in self.batches(batch_size, indices):
                yield batch, digests_of(batch, leaves(batch))
            return
        other = copy.copy(self)
        collate = self._loader.get("collate_fn") or default_collate
        other._loader = self._loader | {"collate_fn": _Digesting(collate)}
        yield from other.batches(batch_size, indices)

    def alone(self, index: int) -> Batch:
        """One example of a data set, read with all that this does to generators."""
        settings = self._loader or {}
        collate = settings.get("collate_fn") or default_collate
        return _pair(collate([settings["dataset"][index]]), [index])

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


def _detached(data: Any) -> Batch:
    """The pair without gradients, no targets being an empty tuple."""
    inputs, targets = data[0], () if data[1] is None else data[1]
    for role, tree in (("inputs", inputs), ("targets", targets)):
        for leaf in leaves(tree):  # refuses what is no tensor
            if leaf.is_nested or leaf.layout is not torch.strided:
                kind = "nested" if leaf.is_nested else f"sparse ({leaf.layout})"
                mend = (
                    "padded: x.to_padded_tensor(0.0)" if leaf.is_nested else "dense: x.to_dense()"
                )
                raise TypeError(
                    f"{role} are a {kind} tensor; make it {mend}, at once or, where memory is "
                    "short, in a Dataset that gives dense examples"
                )
    return map_leaves(Tensor.detach, inputs), map_leaves(Tensor.detach, targets)


def _size_of(dataset: Any) -> int:
    try:
        size = len(dataset)
    except TypeError as error:
        raise TypeError(
            f"data must say by __len__ how many examples it has, as a map-style data set: {error}"
        ) from error
    if size == 0:
        raise ValueError("data is empty: the data set has no examples")
    return size


def _loader_settings(data: Any) -> dict[str, Any]:
    """The data set, and how a loader reads it; refused where the loader gives other examples."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "data is an iterable-style data set; scores need an order: pass a map-style "
            "data set (with __getitem__ and __len__)"
        )
    if not isinstance(data, DataLoader):
        return {"dataset": data}
    if type(data).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"data is a {type(data).__name__} with an __iter__ of its own, whose changes would be "
            "lost: only data set and collate_fn are read; put them into the data set or collate_fn"
        )
    _check_samplers(data)
    return {"dataset": dataset} | {name: getattr(data, name) for name in _USED}


def _check_samplers(data: DataLoader) -> None:
    """A loader must give each example of its data set once, in whatever order."""
    mend = "pass a torch.utils.data.Subset of its data set, so that the order of scores is plain"
    batches: Any = data.batch_sampler
    plain = SequentialSampler.__iter__, RandomSampler.__iter__
    if batches is None:
        raise ValueError("data is a DataLoader with batch_size=None; give it a batch_size")
    if getattr(batches, "each_once", None) == _size_of(data.dataset):
        return
    for sampler, known in (
        (data.sampler, plain),
        (batches, (BatchSampler.__iter__,)),
        (getattr(batches, "sampler", data.sampler), plain),
    ):
        if getattr(type(sampler), "__iter__", None) not in known:
            name = type(sampler).__name__
            raise ValueError(f"data is a DataLoader with {name} as its sampler; {mend}")
    sampler, size = batches.sampler, _size_of(data.dataset)
    again = getattr(sampler, "replacement", False)
    if again or len(sampler) != size or len(sampler.data_source) != size:
        how = "with replacement" if again else f"{len(sampler)} a pass"
        raise ValueError(
            f"data is a DataLoader whose sampler takes other examples than the {size} of its data "
            f"set, each once ({how}); {mend}"
        )
    lost = size % batches.batch_size if batches.drop_last else 0
    if lost:
        raise ValueError(
            f"data is a DataLoader with drop_last=True, which leaves {lost} of {size} examples "
            f"out; make it with drop_last=False, or {mend}"
        )


def _failed(dataset: Any, indices: Sequence[int], error: Exception) -> Exception:
    """What is wrong with a batch, by reading its examples one by one."""
    for index in indices:
        try:
            dataset[index]
        except Exception as reason:
            kind = type(reason).__name__
            return ValueError(
                f"data says that it has {_size_of(dataset)} examples, but reading example {index} "
                f"fails: {kind}: {reason}"
            )
    return ValueError(
        f"data cannot be put together into a batch of examples {_few(indices)}: "
        f"{type(error).__name__}: {error}; give a DataLoader with a collate_fn that can"
    )


def _few(indices: Sequence[int]) -> str:
    return str(list(indices)) if len(indices) < 5 else f"{indices[0]} to {indices[-1]}"


def _pair(batch: Any, indices: Sequence[int]) -> Batch:
    """A batch of a loader as a pair, each of its tensors with one row an example."""
    if isinstance(batch, Mapping):
        raise ValueError(
            "each item of the data set must be a pair (inputs, targets), not a dict with "
            f"{sorted(map(str, batch))}; wrap it, for one as ({{name: item[name] for name in "
            "inputs}}, item[target]), in a Dataset or in the collate_fn of a DataLoader"
        )
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        parts = f"{len(batch)} parts" if isinstance(batch, list | tuple) else type(batch).__name__
        raise ValueError(
            f"each item of the data set must be a pair (inputs, targets), not {parts}; several "
            "inputs make one tuple or dict, and without targets the second is ()"
        )
    pair = _detached(batch)
    for leaf in leaves(pair):
        if leaf.dim() == 0 or leaf.shape[0] != len(indices):
            raise ValueError(
                f"of {len(indices)} examples the data set and its collate_fn make a tensor of "
                f"shape {tuple(leaf.shape)}; its first dimension must be the example"
            )
    return pair
