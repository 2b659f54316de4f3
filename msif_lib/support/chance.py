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

# What is called of an object, where that is not a function.
_CALLED = "forward", "__call__", "__getitem__"
# What is looked through for generators: so deep, no containers longer than this, so many objects.
_DEPTH, _LONGEST, _MOST = 8, 64, 10_000


# Words of a Mersenne twister, and those of its state by which it draws all zeros or all ones.
_WORDS, _LEAST, _LARGEST = 624, 0, 0x12DD9BB3


class _Generator(NamedTuple):
    """How one is read, set, drawn from, and set to draw from given words of its state, if known."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    draw: Callable[[], Any]
    use: Callable[[Any, list[int]], Any] | None = None


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
            _Generator(torch.get_rng_state, torch.set_rng_state, draw, _of_torch),
            _Generator(np.random.get_state, np.random.set_state, np.random.random, _of_numpy),
            _Generator(random.getstate, random.setstate, random.random, _of_python),
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
        before = self.get()
        try:
            yield
        finally:
            self.put(before)

    def get(self) -> list[Any]:
        """The state of each, to be put back."""
        return [generator.get() for generator in self._all]

    def put(self, states: list[Any]) -> None:
        """Bring each into a state that it had."""
        for generator, state in zip(self._all, states, strict=True):
            generator.put(state)

    def advance(self) -> None:
        """Draw from each, so that none is in the state it was in."""
        for generator in self._all:
            generator.draw()

    def stir(self, choice: random.Random) -> None:
        """Bring each into another state, in which extremes are likely.

        Of a Mersenne twister every next number of 32 bits is all zeros, all ones or any, with
        equal chances: what comes of a rare draw shows soon. Others are drawn from.
        """
        for generator in self._all:
            generator.draw()
            if generator.use is not None:
                words = [
                    choice.choice((_LEAST, _LARGEST, choice.getrandbits(32))) for _ in range(_WORDS)
                ]
                generator.put(generator.use(generator.get(), words))


def _of_python(state: Any, words: list[int]) -> Any:
    return state[0], (*words, 0), None


def _of_numpy(state: Any, words: list[int]) -> Any:
    if not isinstance(state, tuple) or state[0] != "MT19937":
        return state
    return state[0], np.array(words, dtype=np.uint32), 0, 0, 0.0


def _of_torch(state: Tensor, words: list[int]) -> Tensor:
    """Its layout: a seed, how many words are left, whether it is seeded, the next, the words."""
    given = state.numpy().copy()
    if given.nbytes < 24 + 8 * _WORDS:
        return state
    given[8:12] = np.array([_WORDS], np.int32).view(np.uint8)
    given[16:24] = np.array([0], np.int64).view(np.uint8)
    given[24 : 24 + 8 * _WORDS] = np.array(words, np.uint64).view(np.uint8)
    return torch.from_numpy(given)


def _bytes(state: Any) -> bytes:
    if isinstance(state, list):
        return b"".join(map(_bytes, state))
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else pickle.dumps(state)


def _held(thing: Any, depth: int, seen: set[int]) -> list[_Generator]:
    """The generators among what an object holds."""
    if depth < 0 or len(seen) > _MOST or id(thing) in seen:
        return []
    if isinstance(thing, Tensor | ModuleType | type | random.SystemRandom):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Generator):
        draw = partial(torch.rand, 1, generator=thing, device=thing.device)
        use = _of_torch if thing.device.type == "cpu" else None
        return [_Generator(thing.get_state, thing.set_state, draw, use)]
    if isinstance(thing, np.random.Generator):
        bits = thing.bit_generator
        put = partial(setattr, bits, "state")
        return [_Generator(lambda: bits.state, put, thing.random)]
    if isinstance(thing, np.random.RandomState):
        return [_Generator(thing.get_state, thing.set_state, thing.random_sample, _of_numpy)]
    if isinstance(thing, random.Random):
        use = _of_python if type(thing) is random.Random else None
        return [_Generator(thing.getstate, thing.setstate, thing.random, use)]
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
        named = getclosurevars(thing)
        return [*named.nonlocals.values(), *filter(_draws, named.globals.values())]
    methods = [getattr(type(thing), name, None) for name in _CALLED]
    own = [one for one in methods if isinstance(one, FunctionType) and not _of_torch_itself(one)]
    return [*getattr(thing, "__dict__", {}).values(), *own]


def _draws(thing: Any) -> bool:
    """Whether what a function finds in its module is, or may hold, a generator."""
    kinds = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
    return isinstance(thing, kinds | list | tuple | dict | partial | MethodType) or (
        isinstance(thing, FunctionType) and not _of_torch_itself(thing)
    )


def _of_torch_itself(function: FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] == "torch"
