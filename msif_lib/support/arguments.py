"""What a user gives, checked before any work: of the kind that is wanted, and in its range.

Python's and NumPy's numbers and truth values are taken. What is of another kind is a TypeError (a
text is no truth value, whatever it says), what is outside the range (NaN is outside every one) a
ValueError; both messages begin with the argument's name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
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


def flag(name: str, value: Any) -> bool:
    """True or False itself."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    shown = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
    quotes = " in quotes" if isinstance(value, str) else ""
    raise TypeError(f"{name} must be True or False, not {shown}{quotes}")


def instance(name: str, value: Any, kind: type, mend: str = "") -> Any:
    """An object of a class; the message of another ends with `mend`."""
    if not isinstance(value, kind):
        shown = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}{mend}, not {shown}")
    return value


def listed(name: str, values: Any, wanted: str) -> list[Any]:
    """The things of a list; text and a dict are none."""
    if not isinstance(values, str | bytes | Mapping):
        try:
            return list(values)
        except TypeError:  # no list, or a tensor that is one number
            pass
    raise TypeError(f"{name} must be a list of {wanted}, not a {type(values).__name__}")


def place(name: str, value: Any) -> Path:
    """A path on the disk."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, not a {type(value).__name__}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name} is {value!r}, which is no path")
    return Path(value)


def whole(name: str, value: Any, least: int | None = None, note: str = "") -> int:
    """A whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _not_a("a whole number", name, value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}{note}")
    return int(value)


def seed_of(name: str, value: Any) -> int:
    """A whole number that torch's generators take."""
    if not -(2**63) <= whole(name, value) < 2**64:
        raise ValueError(f"{name} must be from -2**63 to 2**64 - 1, not {value}")
    return int(value)


def dense(name: str, value: Any, wanted: str = "a tensor") -> Tensor:
    """A tensor whose entries all lie in memory."""
    if not isinstance(value, Tensor):
        mend = "; make it one by torch.as_tensor" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name} must be {wanted}, not a {type(value).__name__}{mend}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be {wanted}, not a sparse or nested one; see .to_dense()")
    return value


def check_vector(
    name: str, value: Any, size: int, dtype: torch.dtype | None, device: torch.device, dim: int = 1
) -> Tensor:
    """A vector ``(size,)``, or columns ``(size, k)``, of this dtype, any floats where it is None.

    Only what is known of a tensor without its entries is looked at: this is asked at every product.
    """
    shape = f"({size},)" if dim == 1 else f"({size}, k)"
    dense(name, value, f"a tensor {shape}")
    if value.dim() != dim or value.shape[0] != size:
        raise ValueError(f"{name} must be of shape {shape}, not {tuple(value.shape)}")
    if dtype is None:
        if not value.is_floating_point():
            raise TypeError(f"{name} must hold real floats, not {value.dtype}")
    elif value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{name} is {value.dtype} on {value.device}, the parameters are {dtype} on {device}; "
            "convert it by .to(stage.vector())"
        )
    return value


def check_rows(name: str, value: Any, size: int) -> Tensor:
    """A tensor ``(size, ...)``."""
    dense(name, value, f"a tensor ({size}, ...)")
    if not value.dim() or value.shape[0] != size:
        raise ValueError(f"{name} must be of shape ({size}, ...), not {tuple(value.shape)}")
    return value


def check_target(dtype: Any, device: Any) -> None:
    """Where a stage may go: a dtype of floats, a device that is there, or None.

    Raises
    ------
    TypeError, ValueError
        It is none of these.
    """
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, not {dtype!r:.60}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be one of real floats, not {dtype}")
    if device is None:
        return
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or its name, not {device!r:.60}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} is not there: {error}") from error


def check_system(operator: Any, b: Any, columns: bool = False) -> None:
    """A matrix, known by its products, and dense floats as right-hand sides.

    Raises
    ------
    TypeError
        They are none.
    ValueError
        `columns` are wanted, and `b` is none that fits the matrix.
    """
    dense("b", b, "a tensor of right-hand sides")
    if not b.is_floating_point():
        raise TypeError(f"b must hold real floats, not {b.dtype}")
    check_matrix("operator", operator)
    if isinstance(operator, Tensor) and operator.dtype != b.dtype:
        raise TypeError(f"operator is {operator.dtype}, b {b.dtype}; give both in one dtype")
    if columns and (b.dim() != 2 or tuple(operator.shape) != (len(b), len(b))):
        raise ValueError(
            f"b must hold columns (p, k) that fit the operator of shape {tuple(operator.shape)}, "
            f"not {tuple(b.shape)}"
        )


def check_matrix(name: str, matrix: Any) -> None:
    """A matrix that multiplies tensors by ``@``: an operator, or a dense tensor.

    Raises
    ------
    TypeError
        It is none.
    """
    if isinstance(matrix, Tensor):
        dense(name, matrix)
    elif isinstance(matrix, np.ndarray | type) or not (
        hasattr(matrix, "__matmul__") and isinstance(getattr(matrix, "shape", None), tuple)
    ):
        raise TypeError(
            f"{name} must be a matrix with .shape and @, as Hessian(stage) or a tensor, not a "
            f"{type(matrix).__name__}"
        )


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
    shaped = isinstance(values, Tensor) and values.shape == like.shape and not values.is_sparse
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
    if isinstance(values, str | bytes | Mapping):
        raise TypeError(f"{wanted}, not a {type(values).__name__}")
    try:
        given = values if hasattr(values, "dtype") else list(values)
        found = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}: {error}") from error
    if not found.numel() and found.dim() == 1:
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
