"""The execution status page: with what each notebook was run, and which records the pages read."""

from __future__ import annotations

import ast
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msif_lib.study.records import read_record
from msif_lib.study.runner import (
    Notebook,
    executed_path,
    installed_version,
)

# Given by the runner itself.
_PLACES = ("record", "records")
_INTRODUCTION = """\
(execution-status)=
# Execution status

Every notebook of this book was executed, without an error and without a warning, before the book
was rendered: profile `{profile}`, one thread a notebook, {versions}. A notebook is executed again
when its text, its parameters, the library or one of these versions changes.
"""
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "msif")


def _defaults(notebook: Notebook) -> dict[str, Any]:
    """Return the defaults in the cell tagged ``parameters`` that are written as literals."""
    found = {}
    for cell in notebook.read().cells:
        if cell.cell_type != "code" or "parameters" not in cell.metadata.get("tags", []):
            continue
        for statement in ast.parse(cell.source).body:
            if isinstance(statement, ast.AnnAssign):
                target: ast.expr = statement.target
            elif isinstance(statement, ast.Assign):
                target = statement.targets[0]
            else:
                continue
            if isinstance(target, ast.Name) and statement.value is not None:
                try:
                    found[target.id] = ast.literal_eval(statement.value)
                except ValueError:
                    continue
    return found


def _differing(notebook: Notebook, parameters: dict[str, Any]) -> str:
    """Return the parameters that are not the notebook's own, as a table shows them."""
    defaults = _defaults(notebook)
    shown = [
        f"`{name} = {value!r}`"
        for name, value in parameters.items()
        if name not in _PLACES and (name not in defaults or defaults[name] != value)
    ]
    return ", ".join(shown) or "the defaults"


def _duration(seconds: float) -> str:
    """Return a duration with the unit that suits it."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _records_read(root: Path, notebook: Notebook) -> list[Path]:
    """Return the committed records that a notebook declares as inputs."""
    patterns = notebook.read().metadata.get("msif", {}).get("inputs", [])
    return sorted(path for pattern in patterns for path in root.glob(pattern) if _is_record(path))


def _is_record(path: Path) -> bool:
    """Return whether a file is a record of results."""
    try:
        read_record(path)
    except (ValueError, OSError):
        return False
    return True


def _record_rows(root: Path, notebooks: Sequence[Notebook]) -> list[list[str]]:
    """Return one row for each committed record that a page reads."""
    readers: dict[Path, list[str]] = {}
    for notebook in notebooks:
        for path in _records_read(root, notebook):
            readers.setdefault(path, []).append(_link(notebook))
    rows = []
    for path, pages in sorted(readers.items()):
        record = read_record(path)
        origin = record["provenance"]
        rows.append(
            [
                f"`{path.relative_to(root / 'results').as_posix()}`",
                ", ".join(pages),
                str(origin["date"])[:10],
                _duration(record["wall_time"]),
                f"{origin['device']}, {origin['dtype']}, threads: {origin['threads']}",
            ]
        )
    return rows


def _link(notebook: Notebook) -> str:
    """Return a link to a notebook's page that carries the page's title."""
    return f"{{doc}}`{notebook.section}/{notebook.name}`"


def status_page(root: Path, profile: str, notebooks: Sequence[Notebook]) -> str:
    """Return the execution status page, in MyST Markdown.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile whose executed copies the book shows; they must be current.
    notebooks
        The notebooks of the book, in its order.

    Notes
    -----
    The same executed copies and records give the same page. The versions are those installed: they
    are part of each copy's key, so that a copy that was made with others is not current.
    """
    packages = [("Python", platform.python_version())]
    packages += [(name, installed_version(name)) for name in _PACKAGES]
    versions = ", ".join(f"{name} {version}" for name, version in packages)
    rows, total = [], 0.0
    for notebook in notebooks:
        executed = json.loads(executed_path(root, profile, notebook).read_text(encoding="utf-8"))
        known = executed["metadata"]["msif"]
        total += known.get("seconds", 0.0)
        rows.append(
            [
                _link(notebook),
                _differing(notebook, known.get("parameters", {})),
                _duration(known["seconds"]) if "seconds" in known else "not recorded",
                known.get("date", "not recorded"),
            ]
        )
    rows.append(["All", "", _duration(total), ""])
    parts = [
        _INTRODUCTION.format(profile=profile, versions=versions),
        _table(["Page", "Parameters", "Time", "Executed on (UTC)"], rows),
    ]
    records = _record_rows(root, notebooks)
    if records:
        parts += [
            "## Records\n\nSome pages also show numbers that were computed before, on other data "
            "or machines, and are kept with the project, in `results/`, each with its parameters "
            "and versions. These files were there:\n",
            _table(["File", "Read by", "Date", "Time", "Device"], records),
        ]
    return "\n".join(parts)
