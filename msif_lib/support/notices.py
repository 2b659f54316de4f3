"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line, outside this library, that the present call goes back to."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and f"{frame.f_globals['__name__']}.".startswith("msif_lib."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
