"""Settings of the whole process that several threads may need at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock


class Shared:
    """A context that the first thread to ask enters, and that the last to go leaves.

    Had each its own, one would bring back what another still needs otherwise, and the last might
    leave behind what it found in the midst of another's.

    Parameters
    ----------
    context
        Makes the context.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context, self._lock = context, Lock()
        self._asking, self._entered = 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context, in force until the last thread is out of it."""
        with self._lock:
            if not self._asking:
                self._entered.enter_context(self._context())
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
                if not self._asking:
                    self._entered.close()
