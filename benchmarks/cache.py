"""Files of tensors that are kept between runs, each with its checksum. None holds code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from msif_lib.support.atomic import replacing


def keep(path: Path, values: dict[str, Any]) -> None:
    """Write tensors and plain values by name, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content + hashlib.sha256(content).digest())


def kept(path: Path) -> dict[str, Any] | None:
    """Return what was kept; None where there is nothing, or it is damaged."""
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        return None
    content, check = written[:-32], written[-32:]
    if hashlib.sha256(content).digest() != check:
        return None
    found: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return found
