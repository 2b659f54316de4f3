"""How time grows with m, n, p and T, and that memory does not grow with m.

    python -m benchmarks.growth

times a product with the Hessian and the scores of all examples against

- m, the pretraining examples,
- n, the finetuning examples (products with the proximal Hessian of case 2),
- p, the parameters of a convolutional network that becomes wider,
- T, the vectors multiplied or scored at once,

in turn, several rounds, and fits an exponent to the medians on logarithmic axes. Then it computes
the scores of data sets that are read from disk, each in a process of its own, the scores going to
disk as well, and fits the slope of the peak of memory. It writes
``results/benchmarks/growth.json``; ``--quick`` writes a small one under ``build/bench/quick``. On a
GPU, with sizes that keep it busy:

    python -m benchmarks.growth --device cuda --examples 16000 --largest 256000

Images and classes are random: time does not depend on what they show.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.command import make_parser, parse, record
from benchmarks.measure import peak_megabytes
from benchmarks.problems import CLASSES, network
from benchmarks.sentences import seconds
from msif_lib import SingleStageInfluence, Stage, cross_entropy
from msif_lib.curvature import AddDiagonal, Hessian
from msif_lib.solvers import MinRes

ALPHA, L2 = 0.01, 5e-3
# Vectors scored together where T is not what varies.
COLUMNS = 16
# So much may be kept that every graph is.
ALL, NOTHING = 2**50, 0
SWEEPS = {
    "m": "examples",
    "n": "finetuning examples",
    "p": "parameters",
    "T": "vectors",
}


# --- time ----------------------------------------------------------------------------------------


def random_stage(examples: int, width: int, options: argparse.Namespace) -> Stage:
    """A network of `width` and twice as many channels, on random images of 8 by 8.

    On such small images the first layers and the last grow alike, so that the operations of a
    forward pass are proportional to the parameters.
    """
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(examples, 1, 8, 8, generator=generator)
    classes = torch.randint(CLASSES, (examples,), generator=generator)
    embedding, head = network(8, (width, 2 * width), options.seed)
    device = options.device
    data = images.to(device), classes.to(device)
    return Stage(
        embedding.to(device), head.to(device), cross_entropy, data, l2=L2, check=False,
        batch_size=options.batch,
    )  # fmt: skip


def actions(sweep: str, size: int, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The value on the axis of a sweep, and what is timed there."""
    examples = size if sweep in "mn" else options.examples
    stage = random_stage(examples, size if sweep == "p" else options.width, options)
    parameters = stage.embedding_size + stage.head_size
    generator = torch.Generator().manual_seed(options.seed)
    vectors = torch.randn(parameters, size if sweep == "T" else COLUMNS, generator=generator)
    vectors = vectors.to(options.device)
    one = vectors[:, :1].contiguous()

    def score(columns: Tensor) -> Callable[[], Any]:
        return lambda: [None for _ in stage.directional_derivatives(columns)]

    if sweep == "n":
        pull = torch.zeros_like(stage.vector())
        pull[: stage.embedding_size] = 2 * ALPHA
        kept = AddDiagonal(Hessian(stage, memory_budget=ALL), pull)
        return size, {"product with K": lambda: kept @ one}
    hessian = Hessian(stage, memory_budget=ALL)
    if sweep == "T":
        return size, {"products": lambda: hessian @ vectors, "scores": score(vectors)}
    anew = Hessian(stage, memory_budget=NOTHING)
    return {"m": examples, "p": parameters}[sweep], {
        "forward pass": stage.example_losses,
        "product": lambda: hessian @ one,
        "product, graph recorded anew": lambda: anew @ one,
        "scores of 1": score(one),
        f"scores of {COLUMNS}": score(vectors),
    }


def mean_seconds(action: Callable[[], Any], options: argparse.Namespace) -> float:
    """Seconds of a call, the mean of as many as take `shortest`; the first is not counted."""
    seconds(action, options.device)
    times = [seconds(action, options.device)]
    while sum(times) < options.shortest:
        times.append(seconds(action, options.device))
    return statistics.mean(times)


def fit(sizes: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """The exponent of a power law through points, its standard error and 95 % interval.

    ``upper`` is the exponent through the larger half of the sizes, where a constant cost a call
    weighs less; ``steps`` are those between neighbours.
    """
    x, y = np.log(sizes), np.log(values)
    line = scipy.stats.linregress(x, y)
    half = len(x) // 2
    width = scipy.stats.t.ppf(0.975, len(x) - 2) * line.stderr
    return {
        "exponent": line.slope,
        "standard_error": line.stderr,
        "low": line.slope - width,
        "high": line.slope + width,
        "upper": scipy.stats.linregress(x[half:], y[half:]).slope,
        "steps": (np.diff(y) / np.diff(x)).tolist(),
    }


def time_growth(options: argparse.Namespace) -> dict[str, Any]:
    """All sweeps, the rounds in turn."""
    sizes = {
        "m": options.sizes, "n": options.sizes, "p": options.widths, "T": options.columns
    }  # fmt: skip
    times: dict[str, dict[str, dict[int, list[float]]]] = {sweep: {} for sweep in sizes}
    for _ in range(options.rounds):
        for sweep, values in sizes.items():
            for value in values:
                at, works = actions(sweep, value, options)
                for name, work in works.items():
                    found = times[sweep].setdefault(name, {}).setdefault(at, [])
                    found.append(mean_seconds(work, options))
    growth: dict[str, Any] = {}
    for sweep, tasks in times.items():
        growth[sweep] = {"axis": SWEEPS[sweep], "tasks": {}}
        for name, points in tasks.items():
            medians = [statistics.median(found) for found in points.values()]
            growth[sweep]["sizes"] = list(points)
            growth[sweep]["tasks"][name] = {
                "seconds": medians,
                "lowest": [min(found) for found in points.values()],
                "highest": [max(found) for found in points.values()],
                **fit(list(points), medians),
            }
            one = growth[sweep]["tasks"][name]
            print(
                f"{sweep}  {name:30} exponent {one['exponent']:.2f} "
                f"± {one['standard_error']:.2f}, upper half {one['upper']:.2f}",
                flush=True,
            )
    return growth


# --- memory --------------------------------------------------------------------------------------


class ImageFile(Dataset):
    """Images of 32-bit floats in a file, of which one at a time is in memory."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self.bytes = 4 * int(np.prod(shape))

    def __len__(self) -> int:
        return self.path.stat().st_size // self.bytes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # Opened for the one image: the pages of a map that stays open count as this process's.
        image = np.memmap(self.path, np.float32, "r", index * self.bytes, self.shape)
        return torch.from_numpy(np.array(image)), torch.tensor(index % CLASSES)


def write_images(path: Path, count: int, shape: tuple[int, ...], seed: int) -> None:
    """Random images, written in pieces."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, count, 1000):
            piece = min(1000, count - start), *shape
            file.write(rng.standard_normal(piece, dtype=np.float32).tobytes())


def peak() -> float:
    """Peak of this process's memory, in MB."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return peak_megabytes()
    # Not what getrusage says: there the peak of the parent counts as the child's.
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def measure_memory(folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak of memory of a whole computation of scores; runs in a process of its own."""
    torch.set_num_threads(options.threads)
    path = Path(folder)
    shape = (1, options.image, options.image)
    data = ImageFile(path / "images", shape)
    embedding, head = network(options.image, tuple(options.channels), options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    test = torch.randn(COLUMNS, *shape, generator=generator), torch.zeros(COLUMNS).long()
    before, begin = peak(), time.perf_counter()
    with warnings.catch_warnings():
        # Neither trained nor solved to the end: memory does not depend on it.
        warnings.simplefilter("ignore", UserWarning)
        stage = Stage(embedding, head, cross_entropy, data, l2=L2)
        solver = MinRes(tol=1e-6, max_iterations=options.iterations)
        influence = SingleStageInfluence(stage, solver, progress=False)
        scores = influence.scores(test, out=path / "scores")
    assert len(scores.values) == len(data)
    return {
        "examples": len(data),
        "data_megabytes": len(data) * data.bytes / 2**20,
        "peak_megabytes": peak(),
        "before_megabytes": before,
        "examples_at_once": stage.chunk_size,
        "seconds": time.perf_counter() - begin,
    }


def memory_growth(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of memory against m, and the slope with its standard error."""
    points = []
    for count in options.memory_sizes:
        with tempfile.TemporaryDirectory() as folder:
            shape = (1, options.image, options.image)
            write_images(Path(folder, "images"), count, shape, options.seed)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                points.append(pool.submit(measure_memory, folder, options).result())
        print(f"memory  {json.dumps(points[-1])}", flush=True)
    counts = [point["examples"] for point in points]
    line = scipy.stats.linregress(counts, [point["peak_megabytes"] for point in points])
    return {
        "points": points,
        "megabytes_an_example": line.slope,
        "standard_error": line.stderr,
        "data_megabytes_an_example": points[0]["data_megabytes"] / counts[0],
    }


# --- the command ---------------------------------------------------------------------------------


def chosen(arguments: list[str] | None) -> argparse.Namespace:
    """The options, and the sizes that follow from them."""
    parser = make_parser("growth", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--shortest", type=float, default=0.1, help="what is quicker is repeated for so long, in s"
    )
    parser.add_argument("--examples", type=int, default=2000, help="where m is not what varies")
    parser.add_argument("--largest", type=int, default=16000, help="m and n, and halves of it")
    parser.add_argument("--width", type=int, default=16, help="channels where p is not what varies")
    parser.add_argument("--batch", type=int, default=1024, help="examples at once, at most")
    options = parse(parser, arguments)
    options.sizes = [options.largest // 2**k for k in range(4, -1, -1)]
    options.widths, options.columns = [8, 16, 24, 32, 48, 64], [1, 2, 3, 4, 8, 16, 32, 64]
    # Together with the channels: even of the smallest no autograd graphs are kept.
    options.memory_sizes, options.image = [4000, 8000, 16000, 32000], 32
    options.channels, options.iterations = [16, 32], 1
    if options.quick:
        options.rounds, options.shortest, options.examples, options.width = 1, 0.0, 20, 2
        options.sizes, options.widths, options.columns = [10, 20, 40], [2, 4, 6], [1, 3, 4, 8]
        options.memory_sizes, options.image, options.channels = [20, 40], 8, [2, 3]
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the record."""
    options = chosen(arguments)
    memory = memory_growth(options)
    values = {"time": time_growth(options), "memory": memory}
    return record(options, "growth", "random images", values)


if __name__ == "__main__":
    main()
