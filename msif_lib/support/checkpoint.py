"""The one store of results on disk: a folder, locked while a call works in it.

A record is one file: what `torch.save` writes, followed by its SHA-256, since `torch.load` does
not notice a damaged tensor; the name is part of the digest, so that no record is taken for another.
It is written by ``msif_lib.support.atomic``, so that it is there whole or not at all. Reading
verifies the digest first; nothing else than tensors and plain values is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import torch

from msif_lib.support.arguments import place
from msif_lib.support.atomic import clear, replacing
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.notices import warn_caller

_DIGEST = 32  # bytes of a SHA-256


class Checkpoint:
    """Tensors and plain values by name, in the files of a folder.

    Parameters
    ----------
    folder
        Where the files are; made if need be. None: nothing is kept and nothing is found.
    argument
        What messages call it.
    make
        False: the folder is another process's to make, lock and write to.

    Raises
    ------
    ValueError
        There is a file where the folder should be, or the folder cannot be made.
    """

    def __init__(
        self, folder: str | Path | None, argument: str = "checkpoint", make: bool = True
    ) -> None:
        self.folder = None if folder is None else place(argument, folder)
        self._argument, self._held = argument, 0
        self._read_only: ValueError | None = None
        if self.folder is None or not make:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{argument}: {self.folder} is no folder"
                + ("" if self.folder.exists() else f" and cannot be made one ({error.strerror})")
                + "; give another"
            ) from error
        # The file stays; the lock itself ends with its process.
        self._lock = filelock.FileLock(self.folder / ".lock")

    @contextlib.contextmanager
    def held(self, to_read: bool = False) -> Iterator[None]:
        """Keep other processes out of the folder, after waiting for one that is in it.

        Within one call it may be entered again.

        Parameters
        ----------
        to_read
            Where nothing can be written, and there are records, they can be read all the same;
            writing is then refused by :meth:`require_writable`.

        Raises
        ------
        ValueError
            Nothing can be written there.

        Warns
        -----
        UserWarning
            Another process is at work there, which is waited for.
        """
        if self.folder is None or self._held:
            yield
            return
        try:
            self._acquire(self.folder)
        except ValueError as error:
            if not (to_read and self.names("*")):
                raise
            # What is read is known by its checksum, so that it needs no lock.
            self._read_only = error
        if self._read_only is not None:
            yield
            return
        self._held = 1
        try:
            clear(self.folder)
            yield
        finally:
            self._held = 0
            self._lock.release()

    def _acquire(self, folder: Path) -> None:
        try:
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout:
                warn_caller(
                    f"{self._argument}: another process is at work in {folder}; this one waits "
                    "until it has finished",
                    UserWarning,
                )
                self._lock.acquire()
        except OSError as error:
            raise ValueError(
                f"{self._argument}: nothing can be written in the folder {folder} "
                f"({error.strerror}); give another, or the right to write there"
            ) from error

    def require_writable(self) -> None:
        """Refuse where the folder was entered only to read in it, for nothing can be written.

        Raises
        ------
        ValueError
            It was.
        """
        if self._read_only is not None:
            raise self._read_only

    # --- records -----------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """The file of a record."""
        assert self.folder is not None
        return self.folder / f"{name}.pt"

    def names(self, pattern: str) -> list[str]:
        """The records whose names fit a shell pattern."""
        return (
            [] if self.folder is None else [file.stem for file in self.folder.glob(f"{pattern}.pt")]
        )

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name, damaged or not."""
        return self.folder is not None and self.path(name).exists()

    def get(self, name: str) -> dict[str, Any] | None:
        """What was put under this name; None where there is nothing or the file is damaged.

        Raises
        ------
        ValueError
            There is a folder in its place, or the file cannot be read.
        """
        if self.folder is None:
            return None
        try:
            written = self.path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(
                f"{self._argument}: {self.path(name)} is no file that can be read "
                f"({error.strerror}); remove it, or give another path"
            ) from error
        content, check = written[:-_DIGEST], written[-_DIGEST:]
        if _digest(name, content) != check:
            return None
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Keep tensors and plain values under a name.

        Raises
        ------
        OSError
            The file cannot be written; what was there before still is.
        """
        if self.folder is None:
            return
        self.require_writable()
        buffer = io.BytesIO()
        torch.save(values, buffer)
        content = buffer.getbuffer()
        with self.held(), self.replacing(self.path(name)) as file:
            file.write(content)
            file.write(_digest(name, content))

    def remove(self, name: str) -> None:
        """Forget what was put under a name, if anything was."""
        if self.folder is not None:
            self.path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[BinaryIO]:
        """A file to be written in the folder, which takes the place of `path` once it is done."""
        with self.explained(path), replacing(path, self.folder) as file:
            yield file

    @contextlib.contextmanager
    def explained(self, path: Path) -> Iterator[None]:
        """Name the file, and what to do, where something cannot be written."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._argument}: {path} could not be written: {error.strerror or error}. "
                "What was finished before is kept, and the same call goes on from there",
            ) from error

    def require_room(self, size: int) -> None:
        """Refuse where so many bytes have no place on the disk.

        Raises
        ------
        OSError
            They have none.
        """
        assert self.folder is not None
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(
                errno.ENOSPC,
                f"{self._argument}: the results need {size / 1e9:.3g} GB, and {self.folder} has "
                f"{free / 1e9:.3g} GB left; give a folder on another disk",
            )

    # --- by what they depend on --------------------------------------------------------------

    def key(self, *parts: object) -> str:
        """The digest of nested parts, of which identities count as those known here already.

        What code computes varies in its last bits from one call to the next. Under the digest of
        the rest of an identity the folder holds the values that it was met with; one that is the
        same but for rounding gets the same key.
        """
        return fingerprint(_mapped(self._settled, parts))

    def _settled(self, identity: ProblemIdentity) -> str:
        if self.folder is None or not identity.values:
            return identity.key
        name = f"problem-{identity.exact}"
        known = (self.get(name) or {"values": []})["values"]
        for values in known:
            if identity.same(met := ProblemIdentity(identity.exact, values)):
                return met.key
        self.put(name, {"values": [*known, identity.values]})
        return identity.key


def _mapped(function: Callable[[ProblemIdentity], str], part: Any) -> Any:
    """Nested parts with their identities replaced."""
    if isinstance(part, ProblemIdentity):
        return function(part)
    if isinstance(part, dict):
        return {key: _mapped(function, value) for key, value in part.items()}
    return [_mapped(function, one) for one in part] if isinstance(part, list | tuple) else part


def _digest(name: str, content: bytes | memoryview) -> bytes:
    sha = hashlib.sha256(name.encode() + b"\0")
    sha.update(content)
    return sha.digest()
