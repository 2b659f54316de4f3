"""What long work is known by on disk: a digest of all that it depends on."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

# Raised by hand, by one, with a change of the library after which the same problem and settings
# give other numbers than those that folders hold: retrainings, scores, factors. A change of wording
# or structure leaves it, and what took hours is found again.
RESULTS_VERSION = 1


def fingerprint(*parts: object) -> str:
    """SHA-256 of nested tensors, and of all else by its ``repr``, the same in every session.

    `RESULTS_VERSION` and torch's version are part of every one.
    """
    sha = hashlib.sha256(f"{RESULTS_VERSION} {torch.__version__};".encode())
    for leaf in _flatten(parts):
        if isinstance(leaf, Tensor):
            values = leaf.detach().cpu().contiguous()
            sha.update(f"{values.dtype} {tuple(values.shape)};".encode())
            sha.update(values.flatten().view(torch.uint8).numpy().data)
        else:
            # Addresses in memory, which functions and some modules show, are of one session.
            sha.update(re.sub(r" at 0x[0-9a-f]+", "", f"{leaf!r};").encode())
    return sha.hexdigest()


def _flatten(part: object) -> Iterator[object]:
    """The leaves of a nested structure, its keys, and how many there are on each level.

    A dataclass is known by its name and all of its fields.
    """
    if is_dataclass(part) and not isinstance(part, type):
        yield type(part).__qualname__
        yield from _flatten({field.name: getattr(part, field.name) for field in fields(part)})
    elif isinstance(part, dict):
        yield from _flatten(list(part.items()))
    elif isinstance(part, list | tuple):
        yield len(part)
        for one in part:
            yield from _flatten(one)
    else:
        yield part


def rounded(values: Tensor) -> Tensor:
    """To a millionth of the largest or so: the last bits vary with the alignment in memory."""
    exponent = math.frexp(float(values.abs().max()))[1]
    step = 2.0 ** (exponent - 20)
    return torch.round(values / step) * step + 0.0  # no −0
