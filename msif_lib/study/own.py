"""The user's own data and models, which a notebook's parameters name as ``my_module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Parameters that may name a function of the user's.
OWN = ("dataset", "architecture")


def is_own(value: object) -> bool:
    """Return whether a parameter names a function of the user's."""
    return isinstance(value, str) and ":" in value


def own_function(argument: str, place: str) -> Callable[..., Any]:
    """Return the function that a text such as ``"my_module:load"`` names.

    Parameters
    ----------
    argument
        The parameter, for the message.
    place
        The module, as it is imported, and its function. The module is a file in the folder where
        the kernel runs, or anywhere on ``PYTHONPATH``.

    Raises
    ------
    ValueError
        If there is no such module or function, or importing the module fails.
    """
    module, _, name = place.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # of whatever kind: the user's module runs here
        raise ValueError(
            f"{argument} = {place!r}: the module {module!r} cannot be imported "
            f"({type(error).__name__}: {error}); put {module}.py into {here} or its folder on "
            "PYTHONPATH"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"{argument} = {place!r}: {module} has no function {name!r}")
    return found  # type: ignore[no-any-return]
