"""What the links of a chain gave, kept in a folder, so that an interrupted call goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msif_lib.descent import Keep
from msif_lib.links import Link, PulledBack
from msif_lib.solvers import Identity as IdentitySolver
from msif_lib.solvers import SolveReport, SolverWarning
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.notices import warn_caller
from msif_lib.support.reader import Reader
from msif_lib.support.storage import ScoresFile, check_out, refuse, unseen


def check_known(link: Link) -> None:
    """Refuse a solver or another setting of the user's own that nothing tells from another one.

    Raises
    ------
    ValueError
        The solver is no dataclass, so that its settings cannot be read; a setting is a function,
        say.
    """
    solver = getattr(link, "solver", None)
    if solver is not None and not is_dataclass(solver):
        raise ValueError(
            "out: what is kept must know its solver by its settings, and "
            f"{type(solver).__name__} is no dataclass; make it one, or leave out= out"
        )
    try:
        fingerprint(link.settings())
    except TypeError as error:
        raise ValueError(
            f"out: what is kept must know the settings of its {type(link).__name__} link: {error}"
        ) from error


@dataclass(frozen=True)
class Folder:
    """A folder of results, held by this process.

    Attributes
    ----------
    store
        Its records.
    first
        The file of the first stage's scores.
    reader
        Knows which process writes, of those that share the data.
    """

    store: Checkpoint
    first: Path
    reader: Reader

    def file(self, number: int) -> Path:
        """Where the scores of a stage are written."""
        return self.store.path(f"stage-{number}").with_suffix(".npy") if number else self.first

    def begun(self, number: int) -> bool:
        """Whether something is kept for a stage."""
        file, name = self.file(number), f"stage-{number}.npy.solution"
        return self.reader.on_first(lambda: file.exists() or self.store.exists(name))


@contextmanager
def opened(out: str | Path | None, reader: Reader) -> Iterator[Folder | None]:
    """The folder of a call, kept from other calls until it is done; None where none is named.

    Of processes that share the data the first looks there, and writes; the others read. Where
    nothing can be written the folder is opened all the same, to give back what is finished.

    Raises
    ------
    ValueError
        It is none, or nothing is there and nothing can be written.

    Warns
    -----
    UserWarning
        Another call is at work there, which is waited for; processes that share the data wait for
        the first, no longer than their process group's timeout.
    """
    if out is None:
        yield None
        return
    entered: list[Checkpoint] = []
    with ExitStack() as stack:

        def enter() -> tuple[Path, Path]:
            path, first = check_out(out)
            entered.append(Checkpoint(path, "out"))
            stack.enter_context(entered[0].held(to_read=True))
            return path, first

        path, first = reader.on_first(enter)
        store = entered[0] if entered else Checkpoint(path, "out", make=False)
        yield Folder(store, first, reader)


class Kept:
    """What the links gave, in a folder, for one problem.

    Parameters
    ----------
    folder
        The folder.
    identity
        All that the call depends on.
    shapes
        Of the scores of each stage.
    dtype
        Theirs.

    Raises
    ------
    ValueError
        The folder is another problem's, or something is missing and nothing can be written.
    OSError
        The disk has no room for the scores.
    """

    def __init__(
        self,
        folder: Folder,
        identity: ProblemIdentity,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self._folder, self._store, self._reader = folder, folder.store, folder.reader
        self._key = self._reader.on_first(partial(self._claim, identity))
        self._reader.on_first(partial(self._require_room, shapes, max(4, dtype.itemsize)))

    def _claim(self, identity: ProblemIdentity) -> str:
        """Make the folder this problem's, or see that it is; the key that it is known by there."""
        known = self._store.get("problem")
        if known is not None and ProblemIdentity(**known).same(identity):
            return ProblemIdentity(**known).key
        if self._folder.first.exists() or self._store.names("stage-*.npy.solution"):
            damaged = known is None and self._store.exists("problem")
            refuse(self._store.path("problem"), damaged)
        self._store.require_writable()
        self._forget_walks("*")
        self._store.put("problem", asdict(identity))
        return identity.key

    def _require_room(self, shapes: Sequence[tuple[int, ...]], itemsize: int) -> None:
        files = [self.file(number) for number in range(len(shapes))]
        missing = [shape for shape, file in zip(shapes, files) if not file.path.exists()]
        if missing or not all(file.is_finished(shape[0]) for shape, file in zip(shapes, files)):
            self._store.require_writable()
        self._store.require_room(sum(map(math.prod, missing)) * itemsize)

    def file(self, number: int) -> ScoresFile:
        """Where the scores of a stage are written."""
        path, name = self._folder.file(number), f"stage-{number}.npy"
        return ScoresFile(self._store, path, name, self._key)

    def walk(self, number: int) -> Keep:
        """Where the walk back through a stage is kept after each part of it."""
        name = f"stage-{number}.npy.walk-{self._key[:16]}"
        return _Walk(self._store, name, self._reader)

    def _forget_walks(self, number: int | str) -> None:
        """Also those of other problems, which were interrupted before anything was found."""
        for name in self._store.names(f"stage-{number}.npy.walk-*"):
            self._store.remove(name)

    def pulled(self, number: int, make: Callable[[], PulledBack]) -> PulledBack:
        """What a link gave, or gives now."""
        name = f"stage-{number}.npy.solution"
        if not self._reader.on_first(lambda: self._found(number, name)):
            pulled = make()
            values = {field.name: getattr(pulled, field.name) for field in fields(pulled)}
            values["reports"] = [asdict(report) for report in pulled.reports]
            self._reader.on_first(lambda: self._store.put(name, {"key": self._key, **values}))
            self._reader.on_first(lambda: self._forget_walks(number))  # its end is kept
            return pulled
        known = self._reader.agreed(lambda: self._read(name))
        reports = tuple(SolveReport(**report) for report in known.pop("reports"))
        for report in reports:
            if not report.converged and report.solver != IdentitySolver.__name__:
                warn_caller(f"{report.solver}: {report.message}", SolverWarning)
        on_device = {
            field: value.to(self._reader.device) if isinstance(value, Tensor) else value
            for field, value in known.items()
            if field != "key"
        }
        return PulledBack(**on_device, reports=reports)

    def _found(self, number: int, name: str) -> bool:
        """Whether the solution of a stage is there, and this problem's."""
        known = self._store.get(name)
        if known is None and self._store.exists(name):
            refuse(self._store.path(name), damaged=True)
        if (known is None and self._folder.file(number).exists()) or (
            known is not None and known["key"] != self._key
        ):
            refuse(self._store.path(name))
        return known is not None

    def _read(self, name: str) -> dict[str, Any]:
        """A record that the first process has found, on each."""
        known = self._store.get(name)
        if known is None:
            raise unseen(self._store.path(name))
        return known


@dataclass(frozen=True)
class _Walk:
    store: Checkpoint
    name: str
    reader: Reader

    def get(self) -> dict[str, Tensor] | None:
        found = self.reader.on_first(lambda: self.store.get(self.name))
        return found and {name: value.to(self.reader.device) for name, value in found.items()}

    def put(self, tensors: dict[str, Tensor]) -> None:
        self.reader.on_first(lambda: self.store.put(self.name, tensors))
