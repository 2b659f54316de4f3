"""Two processes against one, and against one process with two threads.

``python -m benchmarks.sharded`` starts each of them in turn, with torchrun where there are two
processes, and writes ``results/benchmarks/sharded.json``. What the processes run is :func:`work`,
which is also how a script of one's own is made for ``torchrun --nproc-per-node 2 script.py``: join
the processes, shard each stage, and go on as in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.command import RESULTS, ROOT
from benchmarks.problems import SPECS, digits, network
from msif_lib import Stage, cross_entropy
from msif_lib.curvature import Hessian
from msif_lib.scale.sharding import initialise, shard
from msif_lib.study.records import write_record

COLUMNS = 16
# Processes and threads of each; the first is what the others are compared with.
SETTINGS = {
    "one process, one thread": (1, 1),
    "two processes, one thread each": (2, 1),
    "one process, two threads": (1, 2),
}
TIMES = ("gradient", "recording", "product", "products", "scores", "scores of many")


def work(out: Path, problem: str, products: int) -> None:
    """Time the parts of an influence computation; the first process writes the times."""
    device = initialise()
    first, processes = dist.get_rank() == 0, dist.get_world_size()
    spec = SPECS[problem]
    inputs, targets, _ = digits(spec)
    dtype = getattr(torch, spec.dtype)
    embedding, head = network(spec.image, spec.channels, spec.seed)
    data = inputs.to(device, dtype), targets.to(device)
    stage = Stage(
        embedding.to(device, dtype), head.to(device, dtype), cross_entropy, data, l2=spec.l2
    )
    if processes > 1:
        stage = shard(stage)

    times: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any], repeats: int = 1) -> Any:
        stage.reader.all_reduce(torch.zeros(1, device=device))  # all begin together
        begin = time.perf_counter()
        for _ in range(repeats):
            result = action()
        stage.reader.all_reduce(torch.zeros(1, device=device))
        times[name] = (time.perf_counter() - begin) / repeats
        return result

    def scores(v: Tensor) -> Tensor:
        return stage.reader.gather(stage.directional_derivatives(v), v[:0])

    b = stage.gradient()[:, None]
    generator = torch.Generator().manual_seed(spec.seed)
    many = torch.randn(len(b), COLUMNS, generator=generator, dtype=dtype).to(device)
    scores(b)  # once unmeasured: threads and kernels are set up
    timed("gradient", stage.gradient, products)
    hessian = timed("recording", lambda: Hessian(stage))
    answer = timed("product", lambda: hessian @ b, products)
    timed("products", lambda: hessian @ many)
    scored = timed("scores", lambda: scores(b), products)
    timed("scores of many", lambda: scores(many))
    if first:
        results = {"product": answer[:, 0].tolist(), "scores": scored[:, 0].tolist()}
        out.write_text(json.dumps({"times": times, "results": results}))
    dist.destroy_process_group()


def run(processes: int, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """The times of one setting, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "benchmarks.sharded"]
        command += ["--work", str(out), "--problem", options.problem]
        command += ["--products", str(options.products)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads(out.read_text())


def difference(results: dict[str, list[float]], reference: dict[str, list[float]]) -> float:
    """The largest relative difference, in the Euclidean norm."""
    worst = 0.0
    for name, values in reference.items():
        exact, found = (torch.tensor(part, dtype=torch.float64) for part in (values, results[name]))
        worst = max(worst, float((found - exact).norm() / exact.norm()))
    return worst


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--problem", choices=list(SPECS), default="large")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--products", type=int, default=10, help="products timed together")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work, options.problem, options.products)
        return
    begin = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for _ in range(options.repeats):
        for name, setting in SETTINGS.items():
            runs[name].append(run(*setting, options))
    alone = runs[next(iter(SETTINGS))]
    values = {}
    for name, found in runs.items():
        seconds = {part: statistics.median(one["times"][part] for one in found) for part in TIMES}
        # Ratios within a turn: a machine that is busy for a while slows all settings alike.
        speed_up = {
            part: statistics.median(
                base["times"][part] / one["times"][part]
                for base, one in zip(alone, found, strict=True)
            )
            for part in TIMES
        }
        apart = difference(found[0]["results"], alone[0]["results"])
        values[name] = {"seconds": seconds, "speed_up": speed_up, "difference": apart}
        print(name, *(f"{part} {speed_up[part]:.2f}" for part in TIMES), f"{apart:.1e}", sep="  ")
    spec = SPECS[options.problem]
    write_record(
        options.out / "sharded.json",
        section="benchmarks",
        dataset="digits",
        values={"settings": values, "examples": spec.size, "cores": os.cpu_count()},
        parameters={
            "problem": options.problem,
            "repeats": options.repeats,
            "products": options.products,
            "columns": COLUMNS,
        },
        seeds=[spec.seed],
        wall_time=time.perf_counter() - begin,
        dtype=getattr(torch, spec.dtype),
    )


if __name__ == "__main__":
    main()
