"""What the links of a chain gave, kept in a folder, so that an interrupted call goes on."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from msif_lib.descent import Keep
from msif_lib.links import Link, PulledBack
from msif_lib.solvers import Identity, SolveReport, SolverWarning
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.notices import warn_caller
from msif_lib.support.reader import Reader
from msif_lib.support.storage import begun, file_of, kept


def check_known(link: Link) -> None:
    """Refuse a solver of the user's own that nothing tells from another one.

    Raises
    ------
    ValueError
        It is no dataclass, so that its settings cannot be read.
    """
    solver = getattr(link, "solver", None)
    if solver is not None and not is_dataclass(solver):
        raise ValueError(
            "out: what is kept must know its solver by its settings, and "
            f"{type(solver).__name__} is no dataclass; make it one, or leave out= out"
        )


class Kept:
    """What the links gave, in a folder or beside a file, each under its key."""

    def __init__(self, out: Path, keys: Sequence[str]) -> None:
        self._out, self._keys = out, keys

    def file(self, number: int) -> Path:
        """Where the scores of a stage are written."""
        return file_of(self._out, number)

    def walk(self, number: int) -> Keep:
        """Where the walk back through a stage is kept after each part of it."""
        file = self.file(number)
        name = f"{file.name}.walk-{self._keys[number][:16]}"
        return _Walk(Checkpoint(file.parent), name)

    def _forget_walks(self, number: int) -> None:
        """Also those of other problems, which were interrupted before anything was found."""
        file = self.file(number)
        for walk in file.parent.glob(f"{glob.escape(file.name)}.walk-*.pt"):
            walk.unlink(missing_ok=True)

    def pulled(self, number: int, reader: Reader, make: Callable[[], PulledBack]) -> PulledBack:
        """What a link gave, or gives now."""

        def plain() -> dict[str, Any]:
            pulled = make()
            reports = [asdict(report) for report in pulled.reports]
            return {
                "handed": pulled.handed, "u": pulled.u, "scores": pulled.scores,
                "reports": reports,
            }  # fmt: skip

        path = self.file(number)
        solved = begun(path)
        known = kept(path, self._keys[number], plain, reader)
        if reader.first_process:
            self._forget_walks(number)  # its end is kept
        reports = tuple(SolveReport(**report) for report in known.pop("reports"))
        for report in reports:
            if solved and not report.converged and report.solver != Identity.__name__:
                warn_caller(f"{report.solver}: {report.message}", SolverWarning)
        return PulledBack(**known, reports=reports)


@dataclass(frozen=True)
class _Walk:
    checkpoint: Checkpoint
    name: str

    def get(self) -> dict[str, Tensor] | None:
        return self.checkpoint.get(self.name)

    def put(self, tensors: dict[str, Tensor]) -> None:
        self.checkpoint.put(self.name, tensors)
