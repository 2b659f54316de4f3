"""Scores on disk, so that what was interrupted goes on where it stopped.

In the folder of a call, a store of :mod:`msif_lib.support.checkpoint` with its lock, stand, for its
stage number k,

    problem.pt                 all that the call depends on; everything below bears its key
    stage-k.npy                the scores, written in steps
    stage-k.npy.progress.pt    how many examples are scored, and the SHA-256 of the file so far
    stage-k.npy.solution.pt    the solved right-hand sides and the reports of their solves
    stage-k.npy.walk.pt        how far a walk back through recorded steps has come; removed after it

A step is brought to the disk before the progress says so, and the digest is compared whenever the
file is taken up again or given back. Where a ``.npy`` file is named for the scores of the first
stage, they alone stand there, and all else in a folder beside it, ``<name>.npy.kept``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.support.arguments import place
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.notices import warn_caller
from msif_lib.support.reader import Reader

#: Batches scored between two writings to disk.
_BATCHES_A_STEP = 32
# Bytes of a file that are read at once.
_BLOCK = 2**20


class Scored(Protocol):
    """What a sweep needs of a stage."""

    @property
    def size(self) -> int:
        """Number of examples."""
        ...

    @property
    def chunk_size(self) -> int:
        """Examples in a batch."""
        ...

    @property
    def reader(self) -> Reader:
        """Who reads which examples."""
        ...

    def section(self, indices: Sequence[int]) -> Scored:
        """The same stage reading these examples alone."""
        ...

    def directional_derivatives(self, directions: Tensor) -> Iterator[Tensor]:
        """∇ℓ_iᵀ v in blocks ``(b, k)``."""
        ...


# --- where -------------------------------------------------------------------------------------


def check_out(out: str | Path) -> tuple[Path, Path]:
    """Where scores are kept: the folder, not yet made, and the file of the first stage's.

    Raises
    ------
    ValueError
        `out` is another file, or the folder that it lies in does not exist; there is a folder
        where a ``.npy`` file should be, or the reverse.
    """
    path = place("out", out)
    if not path.parent.is_dir():
        raise ValueError(f"out: the folder {path.parent} does not exist")
    if path.suffix == ".npy" and not path.is_dir():
        return path.with_name(f"{path.name}.kept"), path
    if path.is_file():
        raise ValueError(f"out must be a folder for the scores of all stages, not the file {path}")
    return path, path / "stage-0.npy"


def refuse(path: Path, damaged: bool = False) -> NoReturn:
    """Say that a file is another problem's, or that nobody can tell.

    Raises
    ------
    ValueError
        Always.
    """
    raise ValueError(
        f"out: {path} is damaged (its checksum is another), so that nothing tells which problem "
        "the files beside it belong to; remove them all, or give another path"
        if damaged
        else f"out: {path} belongs to another problem (other parameters, data, test examples, "
        "solver or settings), or a file beside it is missing; give another path, or remove them all"
    )


def unseen(path: Path) -> OSError:
    """That a process does not see what another one has written."""
    return FileNotFoundError(
        errno.ENOENT,
        f"out: {path} was written by the first of the processes that share the data, and another "
        "one does not find it; give a folder on a disk that all of them see, by the same path",
    )


class ScoresFile:
    """The ``.npy`` file of a stage's scores, filled from its beginning.

    Parameters
    ----------
    store
        Keeps how far the file has come.
    path
        The file.
    name
        Under which it keeps that.
    key
        Of the problem that the scores belong to.
    """

    def __init__(self, store: Checkpoint, path: Path, name: str, key: str) -> None:
        self.path, self._store, self._key = path, store, key
        self._name = f"{name}.progress"
        self._sha, self._header, self._row = hashlib.sha256(), b"", 0

    def take_up(self, size: int, like: Tensor) -> int:
        """The number of examples whose scores the file holds; it is made where there is none.

        Parameters
        ----------
        size
            Number of examples.
        like
            The scores of none of them ``(0, ...)``.

        Raises
        ------
        ValueError
            It belongs to another problem, or a file beside it is missing or damaged.

        Warns
        -----
        UserWarning
            The file is damaged, so that the examples are scored anew.
        """
        row = _storable(like).numpy()
        self._header = _header(row.dtype, (size, *row.shape[1:]))
        self._row = row.dtype.itemsize * int(np.prod(row.shape[1:]))
        state, there = self._store.get(self._name), self.path.exists()
        if there and self.path.is_dir():
            raise ValueError(f"out: {self.path} is a folder; remove it, or give another path")
        if there and state is None and self._store.exists(self._name):
            refuse(self._store.path(self._name), damaged=True)
        if there and (state is None or state["key"] != self._key):
            refuse(self.path)
        if there and state is not None and state["finished"]:
            if self._digest(state["finished"]) == state["sha256"]:
                return state["finished"]
            warn_caller(
                f"out: {self.path} was damaged since it was written (its checksum is another); its "
                "examples are scored anew",
                UserWarning,
            )
        self._begin(size)
        return 0

    def is_finished(self, size: int) -> bool:
        """Whether the scores of so many examples are said to be there."""
        state = self._store.get(self._name)
        return self.path.exists() and state is not None and state["finished"] == size

    def _begin(self, size: int) -> None:
        self._sha = hashlib.sha256(self._header)
        self._note(0)
        with self._store.replacing(self.path) as file:
            file.write(self._header)
            file.truncate(len(self._header) + size * self._row)

    def write(self, start: int, rows: Tensor) -> None:
        """The scores of the examples from `start` on, which is how far the file has come.

        Raises
        ------
        OSError
            The disk is full, say; what was written before stays.
        """
        content = np.ascontiguousarray(_storable(rows).numpy()).tobytes()
        # Not through a map: where the disk is full, that would kill the process without a word.
        with self._store.explained(self.path), self.path.open("r+b") as file:
            file.seek(len(self._header) + start * self._row)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._sha.update(content)
        self._note(start + len(rows))

    def _note(self, finished: int) -> None:
        digest = self._sha.hexdigest()
        self._store.put(self._name, {"key": self._key, "finished": finished, "sha256": digest})

    def _digest(self, rows: int) -> str:
        """Of so many rows and of what stands before them, read from the disk."""
        self._sha = hashlib.sha256()
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(self._header) + rows * self._row:
                return ""
            left = len(self._header) + rows * self._row
            while left:
                block = file.read(min(_BLOCK, left))
                self._sha.update(block)
                left -= len(block)
        return self._sha.hexdigest()

    def require_whole(self, size: int) -> None:
        """See that what was written is what stands on the disk.

        Raises
        ------
        OSError
            It is not.
        """
        expected = self._sha.hexdigest()
        if self._digest(size) != expected:
            raise OSError(
                f"out: {self.path} does not hold what was written to it; is the disk in order, or "
                "did something else write there? Call again"
            )

    def rows(self) -> Tensor:
        """The scores, read when looked at; changes to them stay in memory.

        Raises
        ------
        OSError
            This process does not see the file.
        """
        if not self.path.exists():
            raise unseen(self.path)
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _storable(values: Tensor) -> Tensor:
    return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu()


# --- a sweep over the examples -----------------------------------------------------------------


def sweep(stage: Scored, v: Tensor, file: ScoresFile | None, progress: bool) -> Tensor:
    """∇g(z_i)ᵀ v for every example of a stage, in the data's order.

    Parameters
    ----------
    stage
        The stage.
    v
        One direction ``(p,)`` or several as columns ``(p, k)``.
    file
        None: the values stay in memory. Else where they are written as they come; where it holds
        some of them already, only the others are computed.
    progress
        Show a bar over examples.

    Returns
    -------
    Tensor
        ``(N,)`` or ``(N, k)``; where there is a `file`, on the CPU and read from it when looked at
        (changes to it stay in memory). NumPy has no bfloat16: float32 stands for it.

    Raises
    ------
    FloatingPointError
        A value is not finite; the message names the example.
    ValueError
        The file belongs to another problem.
    OSError
        It cannot be written.
    """
    size, step = stage.size, _BATCHES_A_STEP * stage.chunk_size
    with tqdm(
        total=size, desc="scores", unit=" examples", disable=not progress, delay=1, leave=False
    ) as bar:
        if file is None:
            return _derivatives(stage, range(size), v, bar)

        def rows_from(start: int) -> Iterator[Tensor]:
            bar.update(start)
            for first in range(start, size, step):
                yield _derivatives(stage, range(first, min(first + step, size)), v, bar)

        return _filled(file, size, v[:1].new_zeros(0, *v.shape[1:]), rows_from, stage.reader)


def rows_kept(rows: Tensor, file: ScoresFile | None, reader: Reader) -> Tensor:
    """Rows as they are or, where there is a `file`, written to it and read when looked at."""
    if file is None:
        return rows
    return _filled(file, len(rows), rows[:0], lambda start: iter([rows[start:]]), reader)


def _filled(
    file: ScoresFile,
    size: int,
    like: Tensor,
    rows_from: Callable[[int], Iterator[Tensor]],
    reader: Reader,
) -> Tensor:
    """The rows of a file, those that it lacks being written, by the first process, as they come."""
    start = reader.on_first(lambda: file.take_up(size, like))
    if start < size:
        for rows in rows_from(start):
            reader.on_first(partial(file.write, start, rows))
            start += len(rows)
        reader.on_first(lambda: file.require_whole(size))
    return reader.agreed(file.rows)


def _derivatives(stage: Scored, indices: range, v: Tensor, bar: Any) -> Tensor:
    part = stage.section(indices)
    columns = v.reshape(len(v), -1)
    blocks = _counted(
        part.directional_derivatives(columns), len(indices), len(part.reader.share), bar
    )
    rows = part.reader.gather(blocks, columns[:0])
    bad = ~rows.isfinite().all(1)
    if bad.any():
        first = indices[int(bad.nonzero()[0])]
        raise FloatingPointError(f"the score of example {first} is not finite")
    return rows.reshape(len(rows), *v.shape[1:])


def _counted(blocks: Iterator[Tensor], everyone: int, own: int, bar: Any) -> Iterator[Tensor]:
    """The blocks, with the bar moved on; other processes are taken to be as fast as this one."""
    start, seen = bar.n, 0
    for block in blocks:
        seen += len(block)
        bar.update(start + seen * everyone // own - bar.n)
        yield block
    bar.update(start + everyone - bar.n)
