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


def tolerance(name: str, value: Any) -> float:
    """A number from 0 on; infinity tolerates all."""
    if not real(name, value) >= 0:
        raise ValueError(f"{name} must be zero or positive (infinity: no limit), not {value}")
    return float(value)


def share(name: str, value: Any) -> float:
    """A number above 0 and at most 1."""
    if not 0 < real(name, value) <= 1:
        raise ValueError(f"{name} must lie above 0 and at most at 1, not {value}")
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


def check_columns(name: str, columns: Any, like: Tensor) -> None:
    """Finite columns ``(p, k)``, at least one, of the length, dtype and device of `like` ``(p,)``.

    Raises
    ------
    ValueError
        They are something else.
    """
    size = len(like)
    if not isinstance(columns, Tensor) or columns.dim() != 2 or len(columns) != size:
        shape = tuple(columns.shape) if isinstance(columns, Tensor) else type(columns).__name__
        raise ValueError(f"{name} must hold finite columns ({size}, k), not {shape}")
    if not columns.shape[1]:
        raise ValueError(f"{name} has no columns: its shape is {tuple(columns.shape)}")
    if columns.dtype != like.dtype or columns.device != like.device:
        raise ValueError(
            f"{name} is {columns.dtype} on {columns.device}, the parameters are {like.dtype} on "
            f"{like.device}; convert it by .to(stage.vector())"
        )
    if not columns.isfinite().all():
        raise ValueError(f"{name} must hold finite columns ({size}, k)")


def check_each(name: str, values: Any, like: Tensor, above: bool = False) -> None:
    """A finite number for each entry of `like` ``(p,)``, from 0 on or `above` it.

    Raises
    ------
    ValueError
        They are something else, or of another dtype or device.
    """
    wanted = "positive" if above else "zero or positive"
    shaped = isinstance(values, Tensor) and values.shape == like.shape
    if not shaped or not bool((values.isfinite() & (values > 0 if above else values >= 0)).all()):
        raise ValueError(f"{name} must hold {len(like)} {wanted} numbers")
    if values.dtype != like.dtype or values.device != like.device:
        raise ValueError(
            f"{name} is {values.dtype} on {values.device}, the parameters are {like.dtype} on "
            f"{like.device}; convert it by .to(stage.vector())"
        )


def check_limits(tol: Any, max_iterations: Any) -> None:
    """Of a method that iterates: its tolerance, relative, and its limit, each None or a number."""
    if tol is not None:
        between("tol", tol)
    if max_iterations is not None:
        whole("max_iterations", max_iterations, 1)


def whole_numbers(name: str, values: Any) -> Tensor:
    """A vector of whole numbers or of truth values, on the CPU.

    Raises
    ------
    TypeError
        It is none.
    """
    wanted = f"{name} must be a vector of whole numbers or a Boolean mask"
    try:
        given = values if hasattr(values, "dtype") else list(values)
        found = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}: {error}") from error
    if not found.numel():
        return torch.zeros(0, dtype=torch.long, device="cpu")
    if found.dim() != 1 or found.is_floating_point() or found.is_complex():
        raise TypeError(f"{wanted}, not {found.dtype} of shape {tuple(found.shape)}")
    return found


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
    chosen = whole_numbers(name, values)
    if chosen.dtype == torch.bool:
        if tuple(chosen.shape) != (size,):
            raise ValueError(
                f"{name} is a mask of shape {tuple(chosen.shape)}, which does not fit {size} "
                "examples"
            )
        return chosen.nonzero()[:, 0]
    chosen = chosen.long()
    outside = chosen[(chosen < -size) | (chosen >= size)]
    if len(outside):
        raise ValueError(f"{name} names example {int(outside[0])}, outside 0..{size - 1}")
    return chosen % size
