"""What a module holds beside its parameters, left as it was by every evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Held:
    """Buffers, plain tensors and counters of a module; evaluations that move them get copies.

    Which they move is found out at the first evaluation: it gets copies of all. Later ones get
    copies of what it wrote into, which for most modules is nothing.

    Parameters
    ----------
    module
        The module that is evaluated.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._moving: list[tuple[str, nn.Module]] | None = None

    @property
    def moving(self) -> list[str]:
        """The names of the modules whose buffers or attributes the first evaluation moved."""
        return [name for name, _ in self._moving or []]

    def forget(self) -> None:
        """Find out again: modes may have been switched, modules exchanged."""
        self._moving = None

    @contextmanager
    def copies(self) -> Iterator[None]:
        """A context in which the module may write into what it holds, and that puts it back."""
        known = self._moving
        if known == []:
            yield
            return
        children = list(self._module.named_modules()) if known is None else known
        kept = [(held, dict(held)) for _, child in children for held in _places(child)]
        copied: dict[int, Tensor] = {}  # a buffer under two names is still one
        for held, before in kept:
            for key, value in before.items():
                if isinstance(value, Tensor):
                    held[key] = copied.setdefault(id(value), value.detach().clone())
        given = [dict(held) for held, _ in kept]
        try:
            yield
            if known is None:
                moved = [_moved(held, was) for (held, _), was in zip(kept, given, strict=True)]
                pairs = zip(children, moved[::2], moved[1::2], strict=True)
                self._moving = [child for child, *moves in pairs if any(moves)]
        finally:
            for held, before in kept:
                _put_back(held, before)


def _places(child: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module, without its children, holds attributes and buffers."""
    return vars(child), child._buffers


def _moved(held: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether something was added, exchanged or written into."""
    return held.keys() != given.keys() or any(
        held[key] is not value or (isinstance(value, Tensor) and value._version > 0)
        for key, value in given.items()
    )


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    for key in held.keys() - before.keys():
        del held[key]
    for key, value in before.items():
        if held.get(key) is not value:
            held[key] = value
