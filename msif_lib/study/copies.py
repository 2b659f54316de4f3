"""What the runner keeps: executed copies and records, whole or not at all, each with its sum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat

from msif_lib.support.atomic import replacing


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    path
        Where it goes; its folder is made.
    text
        What it holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def sum_of(path: Path) -> str | None:
    """Return the SHA-256 of a file's content; None where it can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _seal(executed: dict[str, Any]) -> str:
    """Return the SHA-256 of a notebook's JSON, as it is without its seal."""
    metadata = dict(executed["metadata"])
    metadata["msif"] = {name: one for name, one in metadata["msif"].items() if name != "seal"}
    text = json.dumps({**executed, "metadata": metadata}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(executed: nbformat.NotebookNode) -> str:
    """Return the text of an executed copy, with a sum of all of it under ``msif.seal``.

    Parameters
    ----------
    executed
        The copy, with what is known of the run in its metadata under ``msif``.
    """
    content = json.loads(nbformat.writes(executed))
    content["metadata"]["msif"]["seal"] = _seal(content)
    # As nbformat writes.
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def read_known(path: Path) -> dict[str, Any] | None:
    """Return what an executed copy knows of its run; None where it is missing or damaged.

    Parameters
    ----------
    path
        A file that holds what `sealed` returned.
    """
    try:
        executed = json.loads(path.read_text(encoding="utf-8"))
        known: dict[str, Any] = executed["metadata"]["msif"]
        return known if known["seal"] == _seal(executed) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
