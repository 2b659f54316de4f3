"""Generators of random numbers: who draws from one, and their states left as they were."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import getclosurevars
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# What is looked through for generators: so deep, no containers longer than this, so many objects.
_DEPTH, _LONGEST, _MOST = 8, 64, 10_000


class _Generator(NamedTuple):
    """How one is read, set, and drawn from."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    draw: Callable[[], Any]


class Generators:
    """Those that code may draw from: torch's, NumPy's, Python's, and what some objects hold.

    Parameters
    ----------
    roots
        Modules, data sets, functions: looked through for generators of their own.
    """

    def __init__(self, *roots: Any) -> None:
        draw = partial(torch.rand, 1, device="cpu")
        self._all = [
            _Generator(torch.get_rng_state, torch.set_rng_state, draw),
            _Generator(np.random.get_state, np.random.set_state, np.random.random),
            _Generator(random.getstate, random.setstate, random.random),
        ]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            get, put = torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
            self._all.append(_Generator(get, put, partial(torch.rand, 1, device="cuda")))
        seen: set[int] = set()
        for root in roots:
            for thing in root.modules() if isinstance(root, nn.Module) else [root]:
                self._all += _held(thing, _DEPTH, seen)

    def states(self) -> list[bytes]:
        """The state of each, to be compared."""
        return [_bytes(generator.get()) for generator in self._all]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context after which each has the state that it had before."""
        before = [generator.get() for generator in self._all]
        try:
            yield
        finally:
            for generator, state in zip(self._all, before, strict=True):
                generator.put(state)

    def advance(self) -> None:
        """Draw from each, so that none is in the state it was in."""
        for generator in self._all:
            generator.draw()


def _bytes(state: Any) -> bytes:
    if isinstance(state, list):
        return b"".join(map(_bytes, state))
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else pickle.dumps(state)


def _held(thing: Any, depth: int, seen: set[int]) -> list[_Generator]:
    """The generators among what an object holds."""
    if depth < 0 or len(seen) > _MOST or id(thing) in seen:
        return []
    if isinstance(thing, Tensor | ModuleType | type):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Generator):
        draw = partial(torch.rand, 1, generator=thing, device=thing.device)
        return [_Generator(thing.get_state, thing.set_state, draw)]
    if isinstance(thing, np.random.Generator):
        bits = thing.bit_generator
        put = partial(setattr, bits, "state")
        return [_Generator(lambda: bits.state, put, thing.random)]
    if isinstance(thing, np.random.RandomState):
        return [_Generator(thing.get_state, thing.set_state, thing.random_sample)]
    if isinstance(thing, random.Random):
        return [_Generator(thing.getstate, thing.setstate, thing.random)]
    inside = _inside(thing)
    if len(inside) > _LONGEST:
        return []
    return [one for value in inside for one in _held(value, depth - 1, seen)]


def _inside(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType | BuiltinMethodType):
        return [thing.__self__]
    if isinstance(thing, FunctionType):
        return list(getclosurevars(thing).nonlocals.values())
    return list(getattr(thing, "__dict__", {}).values())
