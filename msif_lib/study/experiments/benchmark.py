"""The records of the two-stage benchmark, as the book's pages show them.

A record under ``results/two_stage/`` holds every method's rows on one setting
(:mod:`benchmarks.two_stage`). Pages ask for one measure of one method at one share and get an
:class:`~msif_lib.evaluation.Estimate`, or None where it was not measured: dear methods were left
out of slow settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msif_lib.evaluation import Estimate
from msif_lib.study.records import read_record

#: The exact derivative: through recorded steps, and where both stages are at an optimum.
EXACT = ("unrolled → unrolled", "optimum → proximal")
#: The two readings of the truth.
SAME, OTHERS = "same seed", "other seeds"
# Data in the order in which pages show them.
_DATA = ("digits", "mnist", "cifar", "words")


@dataclass(frozen=True)
class Judged:
    """What was measured on one setting.

    Attributes
    ----------
    name
        Of the setting.
    values
        Of its record.
    seeds
        Those that were judged.
    """

    name: str
    values: Mapping[str, Any]
    seeds: Sequence[int]

    @property
    def as_usual(self) -> bool:
        """Whether it was trained by steps that end before an optimum."""
        return self.exact != EXACT[1]

    @property
    def exact(self) -> str:
        """What its exact derivative is called."""
        return next((name for name in reversed(EXACT) if name in self.methods()), EXACT[0])

    def methods(self, group: str = "row") -> list[str]:
        """The methods of a group, in the order of the record."""
        rows = self.values["rows"]
        return list(dict.fromkeys(row["method"] for row in rows if row["group"] == group))

    def row(self, method: str, share: float, reading: str = SAME) -> Mapping[str, Any] | None:
        """The row of a method at a share, of one reading of the truth."""
        asked = (method, share, reading)
        for row in self.values["rows"]:
            if (row["method"], row["share"], row["reading"]) == asked:
                return row
        return None

    def estimate(
        self, method: str, share: float, measure: str = "lds", reading: str = SAME
    ) -> Estimate | None:
        """A measure (lds, pearson, slope, error) with its interval; None if there is none."""
        found = (self.row(method, share, reading) or {}).get(measure)
        return None if found is None else Estimate(**found)

    def cost(self, method: str) -> float | None:
        """What a method took, in times of both trainings."""
        rows = (row for row in self.values["rows"] if row["method"] == method)
        return next((row["trainings"] for row in rows), None)


def read_judged(folder: Path) -> dict[str, Judged]:
    """Every setting whose record lies in a folder, those on the same data together.

    Parameters
    ----------
    folder
        Of the records. One without rows of methods is of something else and left out.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        if "ceilings" in record["values"]:
            found[path.stem] = Judged(path.stem, record["values"], record["seeds"])
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> tuple[int, str]:
    known = [number for number, data in enumerate(_DATA) if name.startswith(data)]
    return (known[0] if known else len(_DATA)), name


def methods_of(judged: Iterable[Judged], group: str = "row") -> list[str]:
    """All methods of a group, in the order in which they first appear."""
    return list(dict.fromkeys(name for one in judged for name in one.methods(group)))


def spread(estimates: Iterable[Estimate | None], digits: int = 2) -> str:
    """Lowest and highest value in words: ``.91 to .97``, one alone, or ``not measured``."""
    found = [round(one.value, digits) + 0.0 for one in estimates if one is not None]
    values = [f"{value:.{digits}f}" for value in found]
    if not values:
        return "not measured"
    low, high = min(values, key=float), max(values, key=float)
    return low if low == high else f"{low} to {high}"
