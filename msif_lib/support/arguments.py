"""Numbers that a user gives, checked before any work: numbers at all, and in their range.

Python's and NumPy's numbers are taken. Truth values, text, tensors and anything else are a
TypeError, numbers outside the range (NaN is outside every one) a ValueError; both messages begin
with the argument's name.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def _not_a(kind: str, name: str, value: Any) -> TypeError:
    shown, mend = f"a {type(value).__name__}", ""
    if isinstance(value, str | bool):
        shown = repr(value)
    if isinstance(value, str):
        mend = " in quotes (YAML takes 1e-6 for text, and 1.0e-6 for a number)"
    elif isinstance(value, Tensor):
        mend = "; take the number out by .item()"
    return TypeError(f"{name} must be {kind}, not {shown}{mend}")


def real(name: str, value: Any) -> float:
    """A real number, of any size."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _not_a("a number", name, value)
    return float(value)


def positive(name: str, value: Any, note: str = "") -> float:
    """A finite number above 0; the message of another ends with `note`."""
    if not 0 < real(name, value) < math.inf:
        finite = " and finite" if value == math.inf else ""
        raise ValueError(f"{name} must be positive{finite}, not {value}{note}")
    return float(value)


def not_negative(name: str, value: Any) -> float:
    """A finite number from 0 on."""
    if not 0 <= real(name, value) < math.inf:
        raise ValueError(f"{name} must be zero or positive, not {value}")
    return float(value)


def below_one(name: str, value: Any) -> float:
    """A number from 0 on and below 1."""
    if not 0 <= real(name, value) < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
    return float(value)


def between(name: str, value: Any) -> float:
    """A number above 0 and below 1."""
    if not 0 < real(name, value) < 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")
    return float(value)


def whole(name: str, value: Any, least: int | None = None, note: str = "") -> int:
    """A whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _not_a("a whole number", name, value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}{note}")
    return int(value)


def check_limits(tol: Any, max_iterations: Any) -> None:
    """Of a method that iterates: its tolerance, relative, and its limit, each None or a number."""
    if tol is not None:
        between("tol", tol)
    if max_iterations is not None:
        whole("max_iterations", max_iterations, 1)


def indices_of(name: str, values: Any, size: int) -> Tensor:
    """Numbers of some of `size` examples ``(s,)``, from a vector of them or a Boolean mask.

    −1 is the last.

    Raises
    ------
    TypeError
        They are no whole numbers.
    ValueError
        A mask of another length, or a number outside 0..`size` − 1.
    """
    try:
        given = values if hasattr(values, "dtype") else list(values)
        chosen = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be whole numbers or a Boolean mask: {error}") from error
    if chosen.dtype == torch.bool:
        if tuple(chosen.shape) != (size,):
            raise ValueError(
                f"{name} is a mask of shape {tuple(chosen.shape)}, which does not fit {size} "
                "examples"
            )
        return chosen.nonzero()[:, 0]
    if not chosen.numel():
        return torch.zeros(0, dtype=torch.long, device="cpu")
    if chosen.dim() != 1 or chosen.is_floating_point() or chosen.is_complex():
        raise TypeError(f"{name} must be a vector of whole numbers or a Boolean mask")
    chosen = chosen.long()
    outside = chosen[(chosen < -size) | (chosen >= size)]
    if len(outside):
        raise ValueError(f"{name} names example {int(outside[0])}, outside 0..{size - 1}")
    return chosen % size
