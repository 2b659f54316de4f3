"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# How the name of a file ends while it is written.
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part$")


@contextlib.contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A file to be written, which takes the place of `path` once it is on the disk.

    Parameters
    ----------
    path
        Its place.
    folder
        Where it is written, on the same disk; by default beside its place.
    """
    new = (folder or path.parent) / f"{path.name}.{secrets.token_hex(8)}.part"
    try:
        with new.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _onto_disk(path.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def clear(folder: Path) -> None:
    """Take away what a process that was killed left unfinished in a folder."""
    with contextlib.suppress(OSError):
        for left in folder.iterdir():
            if _UNFINISHED.search(left.name):
                left.unlink()


def _onto_disk(folder: Path) -> None:
    """The names in a folder brought to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
