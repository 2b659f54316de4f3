"""What a module, its loss and the generators hold, left as it was by every evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from msif_lib.support.chance import Generators

# Attributes that every module has, of torch's own.
_OF_TORCH = vars(nn.Module()).keys()
# Lists within dicts within lists that are looked into.
_DEPTH = 3


class Held:
    """Buffers, plain tensors, counters, lists and dicts; evaluations that move them get copies.

    Which they move is found out at the first evaluation, at any of more examples than all before,
    and at every one while they are watched: these get copies of all, which are compared by value.
    The others get copies of what was moved, which for most modules is nothing. Likewise the
    states of generators, which only an evaluation that draws has to put back.

    Parameters
    ----------
    module
        The module that is evaluated.
    others
        What is evaluated with it: the loss, a function or a module.
    """

    def __init__(self, module: nn.Module, *others: Any) -> None:
        self._module, self._others = module, others
        self._moving: set[str] = set()
        self._known = self._watched = self._draws = False
        self._largest = 0
        self._some: list[tuple[str, Any]] = []
        self._generators: Generators | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the generators, which are those of a process."""
        return vars(self) | {"_generators": None}

    @property
    def moving(self) -> list[str]:
        """The names of the modules whose buffers or attributes an evaluation moved."""
        return [name for name, _ in self._some]

    def draws(self) -> None:
        """Let every evaluation put the states of generators back."""
        self._draws = True

    def forget(self) -> None:
        """Find out again: modes may have been switched, modules exchanged."""
        self._known = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which every evaluation finds out, and generators go on as they do."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    @contextmanager
    def copies(self, count: int = 0) -> Iterator[None]:
        """A context in which all of it may be written into, and that puts it back.

        Parameters
        ----------
        count
            Examples that are evaluated.
        """
        finds_out = self._watched or not self._known or count > self._largest
        if not (finds_out or self._some or self._draws):
            yield
            return
        parts = self._parts() if finds_out else self._some
        with ExitStack() as stack:
            if not self._watched and (finds_out or self._draws):
                stack.enter_context(self._kept_generators(finds_out))
            places = [(name, _Place(container)) for name, part in parts for container in _in(part)]
            for _, place in places:
                stack.callback(place.put_back)
            copied: dict[int, Tensor] = {}  # a buffer under two names is still one
            for _, place in places:
                place.fill(copied)
            yield
            if finds_out:
                self._moving |= {name for name, place in places if place.moved()}
                self._some = [(name, part) for name, part in parts if name in self._moving]
                self._known, self._largest = True, max(self._largest, count)

    @contextmanager
    def _kept_generators(self, finds_out: bool) -> Iterator[None]:
        if self._generators is None:
            self._generators = Generators(self._module, *self._others)
        with self._generators.kept():
            before = self._generators.states() if finds_out else []
            yield
            self._draws = self._draws or (finds_out and self._generators.states() != before)

    def _parts(self) -> list[tuple[str, Any]]:
        """Modules without their children, and other objects, by name."""
        found = [(name or "model", child) for name, child in self._module.named_modules()]
        for other in map(_object_of, self._others):
            if isinstance(other, nn.Module):
                named = other.named_modules(prefix="loss")
                found += [(name, child) for name, child in named]
            else:
                found.append(("loss", other))
        return found


def _object_of(function: Any) -> Any:
    """What a function's state is in."""
    if isinstance(function, partial):
        return _object_of(function.func)
    return function.__self__ if isinstance(function, MethodType) else function


def _in(part: Any) -> list[Any]:
    """Where a module, without its children, or an object holds what it has."""
    attributes = getattr(part, "__dict__", {})
    if not isinstance(attributes, dict):  # of a class
        return []
    found = [attributes]
    if isinstance(part, nn.Module):
        found.append(part._buffers)
    inside = [value for name, value in attributes.items() if name not in _OF_TORCH]
    for _ in range(_DEPTH):
        inside = [value for value in inside if isinstance(value, list | dict | set | deque)]
        found += inside
        inside = [one for value in inside for one in _entries(value).values()]
    return found


def _entries(container: Any) -> dict[Any, Any]:
    return dict(container if _by_keys(container) else enumerate(container))


def _by_keys(container: Any) -> bool:
    """Of a dict, and of what holds a scripted module's buffers, which is none."""
    return hasattr(container, "keys")


class _Place:
    """A dict, list, set or deque, its entries kept, and tensors exchanged for copies."""

    def __init__(self, container: Any) -> None:
        self._container, self._before = container, _entries(container)

    def fill(self, copied: dict[int, Tensor]) -> None:
        """Exchange tensors for copies; a parameter is exchanged by what evaluates."""
        self._given = dict(self._before)
        if isinstance(self._container, set):
            return
        for key, value in self._before.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                copy = copied.setdefault(id(value), value.detach().clone())
                self._container[key] = self._given[key] = copy

    def moved(self) -> bool:
        """Whether something was added, exchanged or written into."""
        now, before = _entries(self._container), self._before
        return list(now) != list(before) or any(
            now[key] is not value or (value is not before[key] and _written(value, before[key]))
            for key, value in self._given.items()
        )

    def put_back(self) -> None:
        """The entries as they were."""
        container, now = self._container, _entries(self._container)
        if list(now) == list(self._before) and all(now[k] is v for k, v in self._before.items()):
            return
        if _by_keys(container):
            for key in now.keys() - self._before.keys():
                del container[key]
            for key, value in self._before.items():
                if key not in now or now[key] is not value:
                    container[key] = value
        elif isinstance(container, set):
            container.clear()
            container.update(self._before.values())
        else:
            container.clear()
            container.extend(self._before.values())


def _written(copy: Tensor, given: Tensor) -> bool:
    """By torch's counter, or past it (``.data``, NumPy)."""
    if copy._version > 0:
        return True
    plain = copy.layout is torch.strided and not (copy.is_meta or copy.is_nested)
    return plain and not torch.equal(copy, given)
