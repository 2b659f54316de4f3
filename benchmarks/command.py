"""What the commands of this folder share: their options, and the record that they write."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from msif_lib.study.records import write_record

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "bench"
RESULTS = ROOT / "results" / "benchmarks"
# Options that say nothing about what was measured, or stand elsewhere in a record.
_NOT_PARAMETERS = ("out", "cache", "seed", "started")


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all commands have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="something tiny, for tests")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Read the options, check the device, set the threads, look at the clock."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.out is None:
        options.out = CACHE / "quick" if options.quick else RESULTS
    torch.set_num_threads(options.threads)
    options.started = time.perf_counter()
    return options


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, the number of its cores, and the GPU where it took part."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu}


def record(
    options: argparse.Namespace,
    name: str,
    dataset: str,
    values: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    **parameters: Any,
) -> dict[str, Any]:
    """Write the record ``<name>.json`` of one run and return it."""
    chosen = {key: value for key, value in vars(options).items() if key not in _NOT_PARAMETERS}
    return write_record(
        options.out / f"{name}.json",
        section="benchmarks",
        dataset=dataset,
        values={**values, "machine": machine(options.device)},
        parameters={**chosen, **parameters},
        seeds=[options.seed],
        wall_time=time.perf_counter() - options.started,
        device=options.device,
        dtype=dtype,
    )
