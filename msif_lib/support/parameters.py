"""A model's parameters as one flat vector: which entries are whose.

A parameter is what lies in its memory: two tensors over the same memory are one, whatever objects
they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

#: Numbers of parameters, ascending, in the order of the flat vector.
Block = tuple[int, ...]


def matching(
    names: Iterable[str],
    patterns: str | Sequence[str],
    argument: str,
    aliases: Mapping[str, str] | None = None,
) -> list[str]:
    """The names that one of the shell patterns fits, by themselves or by another name they have.

    `aliases` maps the other names of tied parameters to those in `names`.

    Raises
    ------
    ValueError
        A pattern fits no name; the message begins with `argument`.
    TypeError
        It is no pattern.
    """
    names = list(names)
    all_names = {name: name for name in names} | dict(aliases or {})
    many = isinstance(patterns, Iterable) and not isinstance(patterns, str | Tensor)
    wanted: list[str] = list(patterns) if many else [patterns]  # type: ignore[list-item]
    chosen = set()
    if not all(isinstance(one, str) for one in wanted):
        raise TypeError(
            f"{argument} must be a pattern of parameter names or a list of such, not "
            f"{patterns!r:.60}"
        )
    for pattern in wanted:
        fitting = {all_names[name] for name in all_names if fnmatchcase(name, pattern)}
        if not fitting:
            there = f"there are {names}" if names else "the model has no parameters at all"
            raise ValueError(f"{argument}: no parameter is called {pattern!r}; {there}")
        chosen |= fitting
    return [name for name in names if name in chosen]


def numbers_among(name: str, numbers: Iterable[int], among: Block) -> Block:
    """Numbers of parameters, each once and ascending.

    Raises
    ------
    ValueError
        A parameter has no such number; the message begins with `name`.
    """
    many = isinstance(numbers, Iterable) and not isinstance(numbers, Tensor | Mapping)
    chosen = tuple(numbers) if many else ()
    if not many or not all(type(number) is int and number in among for number in chosen):
        raise ValueError(f"{name}: there are parameters 0..{len(among) - 1}, not {numbers!r:.60}")
    return tuple(sorted({*chosen}))


def overlapping(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Pairs of numbers, of one of ours and one of theirs, that share memory.

    Disjoint views of one buffer share none.
    """
    among = defaultdict(list)
    for number, tensor in enumerate(theirs):
        among[_storage(tensor)].append((number, *_span(tensor)))
    pairs = []
    for number, tensor in enumerate(ours):
        first, last = _span(tensor)
        for other, their_first, their_last in among.get(_storage(tensor), ()):
            meets = first <= their_last and their_first <= last
            if meets and _meet(tensor, theirs[other]):
                pairs.append((number, other))
    return pairs


def repeats(tensor: Tensor) -> bool:
    """Whether it has more entries than places in memory, as after ``expand``."""
    first, last = _span(tensor)
    return bool(tensor.numel()) and tensor.numel() * tensor.itemsize > last - first + 1


def _storage(tensor: Tensor) -> tuple[str, int]:
    if tensor.device.type == "meta" or not tensor.numel():
        return "no memory", id(tensor)
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first and last byte in the storage."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first, reach = int(tensor.storage_offset()), sum(int(n - 1) * int(step) for n, step in steps)
    return first * tensor.itemsize, (first + reach + 1) * tensor.itemsize - 1


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an entry in common: columns of a matrix do not."""
    if a is b or a.itemsize != b.itemsize:
        return True
    marks = torch.zeros(a.untyped_storage().nbytes() // a.itemsize, dtype=torch.bool, device="cpu")
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def aliases_of(module: nn.Module) -> dict[str, str]:
    """The other names of parameters that a module holds more than once, with their first names."""
    first = {parameter: name for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if name != first[parameter]}


class Parameters:
    """Named parameters in the order of a flat vector.

    Parameters
    ----------
    named
        The parameters by name, each once.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.names = tuple(name for name, _ in named)
        self.tensors = [parameter for _, parameter in named]
        self.numbers = {parameter: number for number, parameter in enumerate(self.tensors)}
        self._shapes = [parameter.shape for parameter in self.tensors]
        self._sizes = [parameter.numel() for parameter in self.tensors]
        self._offsets = [0, *accumulate(self._sizes)]
        self.all: Block = tuple(range(len(named)))

    @cached_property
    def size(self) -> int:
        """Entries of the vector, p."""
        return self._offsets[-1]

    def count(self, block: Block) -> int:
        """Entries of a block."""
        return sum(self._sizes[number] for number in block)

    def vector(self) -> Tensor:
        """The parameters as one flat vector ``(p,)``, a copy."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.tensors])

    def load(self, vector: Tensor) -> None:
        """Write a flat vector ``(p,)`` into the parameters, in place."""
        for parameter, value in zip(self.tensors, self.views(vector), strict=True):
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.copy_(value)

    def views(self, leaf: Tensor, block: Block | None = None) -> list[Tensor]:
        """The flat vector of a block, by default of all, as parameters in their shapes."""
        numbers = self.all if block is None else block
        if not numbers:
            return []
        parts = leaf.split([self._sizes[number] for number in numbers])
        return [part.view(self._shapes[number]) for part, number in zip(parts, numbers)]

    def parts(self, vector: Tensor, *leaves: tuple[Block, Tensor]) -> list[Tensor]:
        """Every parameter in its shape: of the blocks given from their leaves, else of `vector`."""
        parts = self.views(vector)
        for block, leaf in leaves:
            for number, view in zip(block, self.views(leaf, block)):
                parts[number] = view
        return parts

    def take(self, vector: Tensor, numbers: Sequence[int]) -> Tensor:
        """The entries of some parameters of ``(p, ...)``, in the order of their numbers."""
        if tuple(numbers) == self.all:
            return vector
        rows = [vector[self._offsets[n] : self._offsets[n + 1]] for n in numbers]
        return torch.cat(rows) if rows else vector[:0]

    def put(self, rows: Tensor, numbers: Sequence[int]) -> Tensor:
        """A vector ``(p, ...)`` with these entries and zeros elsewhere; what meets is added."""
        if tuple(numbers) == self.all:
            return rows
        vector = rows.new_zeros(self.size, *rows.shape[1:])
        for number, part in self._rows(rows, numbers):
            vector[self._offsets[number] : self._offsets[number + 1]] += part
        return vector

    def replaced(self, vector: Tensor, rows: Tensor, numbers: Sequence[int]) -> Tensor:
        """The vector ``(p,)`` with the entries of some parameters replaced, a new tensor."""
        vector = vector.clone()
        for number, part in self._rows(rows, numbers):
            vector[self._offsets[number] : self._offsets[number + 1]] = part
        return vector

    def _rows(self, rows: Tensor, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for number in numbers:
            yield number, rows[start : start + self._sizes[number]]
            start += self._sizes[number]
