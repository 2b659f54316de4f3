"""What long work is known by on disk: a digest of all that it depends on."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Raised by hand, by one, with a change of the library after which the same problem and settings
# give other numbers than those that folders hold: retrainings, scores, factors. A change of wording
# or structure leaves it, and what took hours is found again.
RESULTS_VERSION = 1

# What is known by its repr, the same in every session.
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, PurePath,
    torch.dtype, torch.device, np.generic,
)  # fmt: skip


def fingerprint(*parts: object) -> str:
    """SHA-256 of nested tensors, arrays, dataclasses and plain values, the same in every session.

    `RESULTS_VERSION` and torch's version are part of every one.

    Raises
    ------
    TypeError
        A part is neither: of a function, say, nothing tells what it computes.
    """
    sha = hashlib.sha256(f"{RESULTS_VERSION} {torch.__version__};".encode())
    for leaf in _flatten(parts):
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype} {tuple(leaf.shape)};".encode())
            sha.update(bytes_of(leaf).data)
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            sha.update(f"{leaf.dtype.str} {leaf.shape};".encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, _PLAIN):
            sha.update(f"{type(leaf).__name__} {leaf!r};".encode())
        elif isinstance(leaf, type):
            sha.update(f"class {leaf.__module__}.{leaf.__qualname__};".encode())
        else:
            raise TypeError(
                f"{type(leaf).__name__} has no value that it could be known by in results that "
                "are kept; use numbers, text, tensors, or a dataclass of these"
            )
    return sha.hexdigest()


def bytes_of(values: Tensor) -> np.ndarray:
    """The bytes of a tensor in the order of its entries, whatever its dtype and its strides."""
    values = values.detach()
    if values.layout != torch.strided:
        values = values.to_dense()
    values = values.resolve_conj().resolve_neg().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy()


def words_of(module: object) -> str:
    """A module in words, without addresses in memory, which are of one session."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))


def _flatten(part: object) -> Iterator[object]:
    """The leaves of a nested structure, its keys, and how many there are on each level.

    A dataclass is known by its class, its fields and what attributes it was given beside them.
    """
    if is_dataclass(part) and not isinstance(part, type):
        yield type(part)
        named = {field.name: getattr(part, field.name) for field in fields(part)}
        yield from _flatten(named | getattr(part, "__dict__", {}))
    elif isinstance(part, Mapping):
        yield from _flatten(list(part.items()))
    elif isinstance(part, set | frozenset):
        yield from _flatten(sorted(fingerprint(one) for one in part))
    elif isinstance(part, list | tuple):
        yield len(part)
        for one in part:
            yield from _flatten(one)
    else:
        yield part


def digests_of(batch: Any, leaves: list[Tensor]) -> Tensor:
    """A digest of each example of a batch, ``(b, 2)`` whole numbers: of its own tensors alone.

    Parameters
    ----------
    batch
        Nested tensors whose first dimension is the example.
    leaves
        These tensors, at least one.
    """
    count = len(leaves[0])
    header = [_skeleton(batch), [f"{leaf.dtype} {tuple(leaf.shape[1:])}" for leaf in leaves]]
    begun = hashlib.blake2b(repr(header).encode(), digest_size=16)
    rows = [bytes_of(leaf).reshape(count, leaf.numel() * leaf.itemsize // count) for leaf in leaves]
    digests = bytearray()
    for row in zip(*rows, strict=True):
        one = begun.copy()
        for part in row:
            one.update(part.data)
        digests += one.digest()
    return torch.frombuffer(digests, dtype=torch.int64).view(count, 2)


def _skeleton(tree: Any) -> Any:
    """A nested structure without its tensors."""
    if isinstance(tree, Mapping):
        return [(key, _skeleton(value)) for key, value in tree.items()]
    return [_skeleton(value) for value in tree] if isinstance(tree, list | tuple) else None
