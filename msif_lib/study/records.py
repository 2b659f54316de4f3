"""Result records: small JSON files of numbers, with what is needed to obtain them again."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# A record holds results for a table or a figure, not data.
MAX_LIST = 2000
MAX_TEXT = 500
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "msif")
_SECTIONS = ("section", "dataset", "values", "parameters", "seeds", "wall_time", "provenance")


def _plain(value: Any, where: str) -> Any:
    """Value as JSON has it; a named error for what a record must not hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; a record holds finite numbers")
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"{where} is a text of {len(value)} characters, more than {MAX_TEXT}")
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        if len(value) > MAX_LIST:
            raise ValueError(f"{where} has {len(value)} entries, more than {MAX_LIST}")
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which a record cannot hold")


def _versions() -> dict[str, str]:
    """Versions of the packages that make the numbers, those installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the source tree, marked where the tree differs from it."""
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def provenance(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Describe the software and the machine.

    Parameters
    ----------
    device : torch.device or str
        Where the numbers were computed.
    dtype : torch.dtype
        In which precision.

    Returns
    -------
    dict
        date (UTC, ISO 8601), commit (None outside a repository), python, packages, device, dtype,
        threads.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "device": f"{device.type}: {name}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def write_record(
    path: str | os.PathLike[str],
    section: str,
    dataset: str,
    values: Mapping[str, Any],
    parameters: Mapping[str, Any],
    seeds: Sequence[int],
    wall_time: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Write a result record.

    The file appears whole or not at all.

    Parameters
    ----------
    path : path
        The JSON file; its folder is made.
    section : str
        Section of the paper, such as ``"4.1"``.
    dataset : str
        Name of the data set.
    values : mapping
        The results: finite numbers, short texts, dataclasses such as `Estimate`, arrays, lists and
        mappings of these.
    parameters : mapping
        What the notebook was run with.
    seeds : sequence of int
        All seeds that went into the values.
    wall_time : float
        Seconds.
    device : torch.device or str
        Where the numbers were computed.
    dtype : torch.dtype
        In which precision.

    Returns
    -------
    dict
        The record.

    Raises
    ------
    ValueError
        If a number is not finite, a list longer than ``MAX_LIST`` or a text longer than
        ``MAX_TEXT``.
    TypeError
        If something is neither number, text, list nor mapping.
    """
    path = Path(path)
    record = {
        "section": section,
        "dataset": dataset,
        "values": _plain(values, "values"),
        "parameters": _plain(parameters, "parameters"),
        "seeds": _plain(list(seeds), "seeds"),
        "wall_time": _plain(float(wall_time), "wall_time"),
        "provenance": provenance(device, dtype),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes the file private; records are for everyone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return record


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a result record.

    Parameters
    ----------
    path : path
        The JSON file.

    Returns
    -------
    dict
        section, dataset, values, parameters, seeds, wall_time, provenance.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no record.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    missing = [key for key in _SECTIONS if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{path} is not a result record: it lacks {', '.join(missing)}")
    return dict(record)
