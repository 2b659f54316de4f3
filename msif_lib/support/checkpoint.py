"""Results kept in a folder as they come, each under a digest of all that it depends on."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Checkpoint:
    """Tensors by name in the files of a folder, each file written whole or not at all.

    A file is what `torch.save` writes, followed by its SHA-256, since `torch.load` does not
    notice a damaged tensor.

    Parameters
    ----------
    folder
        Where the files are; made if need be. None: nothing is kept and nothing is found.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What was put under this name; None where there is nothing or the file is damaged."""
        if self.folder is None:
            return None
        try:
            written = (self.folder / f"{name}.pt").read_bytes()
        except FileNotFoundError:
            return None
        content, check = written[:-32], written[-32:]
        if hashlib.sha256(content).digest() != check:
            return None
        return torch.load(io.BytesIO(content), weights_only=True)

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name: written to a file of their own, then moved into place."""
        if self.folder is None:
            return
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getbuffer()
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.write(hashlib.sha256(content).digest())
            os.replace(temporary, self.folder / f"{name}.pt")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
