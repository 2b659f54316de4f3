"""Long work on disk, so that what was interrupted goes on where it stopped.

In the folder of a call stand, for its stage number k (or, where a file is named for the scores of
the first stage, beside that file and with its name),

    stage-k.npy                the scores
    stage-k.npy.solution.pt    the solved right-hand sides and the reports of their solves
    stage-k.npy.progress.json  the number of examples scored so far
    stage-k.npy.walk-<key>.pt  how far a walk back through recorded steps has come; removed after it

each with a fingerprint of the problem that it belongs to, so that two problems are never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.reader import Reader

#: Batches scored between two writings to disk.
_BATCHES_A_STEP = 32


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

    def identity(self) -> list[Any]:
        """What the stage is known by."""
        ...


# --- files -------------------------------------------------------------------------------------


def check_out(out: str | Path) -> Path:
    """Where scores can be kept: a folder, made if need be, or a ``.npy`` file in one.

    Raises
    ------
    ValueError
        It is another file; the folder that it lies in does not exist.
    """
    path = Path(out)
    if not path.parent.is_dir():
        raise ValueError(f"out: the folder {path.parent} does not exist")
    if path.suffix == ".npy" and not path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"out must be a folder for the scores of all stages, not the file {path}")
    path.mkdir(exist_ok=True)
    return path


def file_of(out: Path, number: int) -> Path:
    """The file of a stage's scores: ``stage-k.npy`` in a folder, or the first stage's own."""
    if out.is_dir():
        return out / f"stage-{number}.npy"
    return out.with_name(f"{out.stem}-stage-{number}.npy") if number else out


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    new = _beside(path, ".new")
    write(new)
    os.replace(new, path)


def _refuse(path: Path) -> None:
    raise ValueError(
        f"out: {path} belongs to another problem (other parameters, data, test examples, solver "
        "or settings), or a file beside it is missing; give another path, or remove them all"
    )


def begun(path: Path) -> bool:
    """Whether something is kept for a file of scores."""
    return path.exists() or _beside(path, ".solution.pt").exists()


def kept(
    path: Path, key: str, make: Callable[[], dict[str, Any]], reader: Reader
) -> dict[str, Any]:
    """The solution kept beside `path`, or else that of `make`, which is then kept.

    Parameters
    ----------
    path
        The file of scores.
    key
        Fingerprint of all that the solution depends on.
    make
        Gives tensors and plain values by name.
    reader
        Knows which process writes, of those that share the data.

    Raises
    ------
    ValueError
        What is kept there is the solution of another problem.
    """
    file = _beside(path, ".solution.pt")
    if path.exists() and not file.exists():
        _refuse(path)
    if file.exists():
        known: dict[str, Any] = torch.load(file, map_location=reader.device, weights_only=True)
        if known.pop("fingerprint") != key:
            _refuse(file)
        return known
    made = make()
    if reader.first_process:
        _replace(file, lambda new: torch.save({"fingerprint": key, **made}, new))
    return made


def sweep(stage: Scored, v: Tensor, path: Path | None, progress: bool) -> Tensor:
    """∇g(z_i)ᵀ v for every example of a stage, in the data's order.

    Parameters
    ----------
    stage
        The stage.
    v
        One direction ``(p,)`` or several as columns ``(p, k)``.
    path
        None: the values stay in memory. Else the ``.npy`` file that they are written to as they
        come; where it holds some of them already, only the others are computed.
    progress
        Show a bar over examples.

    Returns
    -------
    Tensor
        ``(N,)`` or ``(N, k)``; where there is a `path`, on the CPU and read from the file when
        looked at (changes to it stay in memory). NumPy has no bfloat16: float32 stands for it.

    Raises
    ------
    FloatingPointError
        A value is not finite; the message names the example.
    ValueError
        The file belongs to another problem.
    """
    size, step = stage.size, _BATCHES_A_STEP * stage.chunk_size
    with tqdm(
        total=size, desc="scores", unit=" examples", disable=not progress, delay=1, leave=False
    ) as bar:
        if path is None:
            return _derivatives(stage, range(size), v, bar)
        key = fingerprint(v, stage.identity())
        finished = _finished(path, key, stage)
        if not finished and stage.reader.first_process:
            _note(path, {"fingerprint": key, "finished": 0, "size": size})
            dtype = _storable(v).numpy().dtype
            np.lib.format.open_memmap(path, "w+", dtype, (size, *v.shape[1:]))
        bar.update(finished)
        for start in range(finished, size, step):
            stop = min(start + step, size)
            rows = _derivatives(stage, range(start, stop), v, bar)
            if stage.reader.first_process:
                _write(path, start, _storable(rows).numpy())
                _note(path, {"fingerprint": key, "finished": stop, "size": size})
    _wait(stage)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def rows_kept(rows: Tensor, path: Path | None, reader: Reader) -> Tensor:
    """Rows as they are or, where there is a `path`, written to it and read when looked at."""
    if path is None:
        return rows
    if reader.first_process:
        _replace(path, lambda new: _save(new, _storable(rows).numpy()))
    reader.all_reduce(torch.zeros(1, device=reader.device))
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would add an ending to a name
        np.save(file, values)


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


def _storable(values: Tensor) -> Tensor:
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu()


def _finished(path: Path, key: str, stage: Scored) -> int:
    """The number of examples whose values are in the file."""
    progress, finished = _beside(path, ".progress.json"), 0
    if path.exists():
        state: dict[str, Any] = json.loads(progress.read_text()) if progress.exists() else {}
        if state.get("fingerprint") != key:
            _refuse(path)
        finished = state["finished"]
    _wait(stage)  # nobody writes before all have read
    return finished


def _write(path: Path, start: int, rows: np.ndarray) -> None:
    # Not through the map: where the disk is full, that would kill the process without a word.
    values = np.load(path, mmap_mode="r")
    with path.open("r+b") as file:
        file.seek(values.offset + start * values.strides[0])
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _note(path: Path, state: dict[str, Any]) -> None:
    _replace(_beside(path, ".progress.json"), lambda new: new.write_text(json.dumps(state)))


def _wait(stage: Scored) -> None:
    """Until every process has come here."""
    stage.reader.all_reduce(torch.zeros(1, device=stage.reader.device))
