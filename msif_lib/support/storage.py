"""Long work on disk, so that what was interrupted goes on where it stopped.

Beside a file of scores ``scores.npy`` stand

    scores.npy.solution.pt      the solved right-hand sides v and the reports of their solves
    scores.npy.progress.json    the number of examples scored so far

each with a fingerprint of the problem that it belongs to, so that two problems are never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.solvers import SolveReport, SolverWarning
from msif_lib.stage import Stage
from msif_lib.support.data import map_leaves
from msif_lib.support.fingerprint import fingerprint, rounded
from msif_lib.support.notices import warn_caller

#: Batches scored between two writings to disk.
_BATCHES_A_STEP = 32
#: Examples whose losses, and which of data on disk, a stage is known by.
_KNOWN_BY = 16


# --- what a problem is known by ------------------------------------------------------------------


def stage_parts(stage: Stage) -> list[Any]:
    """What a stage is known by.

    Parameters and buffers, modules in words, l2, number of examples; of data in memory every
    example, of other data some, for to read all would cost as much as the work it could save; and,
    since code has no digest that survives a session, the losses of some examples and the
    regularizer's value, at the parameters and at a point beside them.
    """
    theta = stage.vector()
    noise = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = [stage.split(at) for at in (theta, theta + 0.1 * noise.to(theta))]
    values = [rounded(stage.regularization(w, h)) for w, h in points]
    some = []
    with torch.no_grad():
        for example in stage.examples.batches(1, range(0, stage.size, -(-stage.size // _KNOWN_BY))):
            some.append(fingerprint(example))
            inputs, targets = map_leaves(lambda leaf: leaf.to(stage.device), example)
            values += [rounded(stage.losses(w, h, inputs, targets)) for w, h in points]
    return [
        theta,
        [dict(module.named_buffers()) for module in (stage.embedding, stage.head)],
        [stage.embedding, stage.head, stage.l2],
        stage.size,
        stage.examples.tensors() if isinstance(stage.data, list | tuple) else some,
        values,
    ]


# --- files -------------------------------------------------------------------------------------


def check_path(out: str | Path) -> Path:
    """A path at which scores can be written.

    Raises
    ------
    ValueError
        It does not end in ``.npy``, or its folder does not exist.
    """
    path = Path(out)
    if path.suffix != ".npy":
        raise ValueError(f"out must be the path of a .npy file, not {path}")
    if not path.parent.is_dir():
        raise ValueError(f"out: the folder {path.parent} does not exist")
    return path


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


def solved(
    path: Path, key: str, solve: Callable[[], tuple[Tensor, list[SolveReport]]], stage: Stage
) -> tuple[Tensor, list[SolveReport]]:
    """The solution kept beside `path`, or else that of `solve`, which is then kept.

    Parameters
    ----------
    path
        The file of scores.
    key
        Fingerprint of all that the solution depends on.
    solve
        Gives the directions ``(p, k)`` and the reports of the solves.
    stage
        The stage whose process group, where it has one, has one process that writes.

    Raises
    ------
    ValueError
        What is kept there is the solution of another problem.
    """
    kept = _beside(path, ".solution.pt")
    if path.exists() and not kept.exists():
        _refuse(path)
    if kept.exists():
        known = torch.load(kept, map_location=stage.device, weights_only=True)
        if known["fingerprint"] != key:
            _refuse(kept)
        reports = [SolveReport(**report) for report in known["reports"]]
        for report in reports:
            if not report.converged and report.solver != "Identity":
                warn_caller(f"{report.solver}: {report.message}", SolverWarning)
        return known["x"], reports
    x, reports = solve()
    if stage.first_process:
        known = {"fingerprint": key, "x": x, "reports": [asdict(report) for report in reports]}
        _replace(kept, lambda new: torch.save(known, new))
    return x, reports


def sweep(stage: Stage, v: Tensor, path: Path | None, progress: bool) -> Tensor:
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
        key = fingerprint(v, stage_parts(stage))
        finished = _finished(path, key, stage)
        if not finished and stage.first_process:
            _note(path, {"fingerprint": key, "finished": 0, "size": size})
            dtype = _storable(v).numpy().dtype
            np.lib.format.open_memmap(path, "w+", dtype, (size, *v.shape[1:]))
        bar.update(finished)
        for start in range(finished, size, step):
            stop = min(start + step, size)
            rows = _derivatives(stage, range(start, stop), v, bar)
            if stage.first_process:
                _write(path, start, _storable(rows).numpy())
                _note(path, {"fingerprint": key, "finished": stop, "size": size})
    _wait(stage)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _derivatives(stage: Stage, indices: range, v: Tensor, bar: Any) -> Tensor:
    part = stage.section(indices)
    columns = v.reshape(len(v), -1)
    blocks = _counted(part.directional_derivatives(columns), len(indices), len(part.share), bar)
    rows = part.gather(blocks, columns.shape[1])
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


def _finished(path: Path, key: str, stage: Stage) -> int:
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


def _wait(stage: Stage) -> None:
    """Until every process has come here."""
    stage.all_reduce(torch.zeros(1, device=stage.device))
