"""What test_distributed.py runs in one process, and under torchrun in several.

``torchrun --nproc-per-node 2 tests/sharded.py FOLDER`` leaves FOLDER/rank-0.pt and rank-1.pt.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from problems import ALPHAS, SPECS, Problem
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from msif_lib import (
    Chain,
    FixedEmbeddingInfluence,
    SingleStageInfluence,
    Stage,
    UpdatedEmbeddingInfluence,
)
from msif_lib.curvature import CrossHessian, GaussNewton, Hessian
from msif_lib.ekfac import EKFAC
from msif_lib.links import Link, Optimum, Stopped
from msif_lib.scale.sharding import initialise, shard
from msif_lib.solvers import ConjugateGradient, Dense, FailedSolve, MinRes
from msif_lib.support import storage
from msif_lib.support.functional import DerivativeError
from msif_lib.support.reader import Reader
from msif_lib.training import train

storage._BATCHES_A_STEP = 2
BATCHES = (4, 5)


def loaded(data: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(TensorDataset(*data))


def results(share: Callable[[Stage], Stage], problem: Problem, folder: Path) -> dict[str, Tensor]:
    """Everything that a stage sums or lists, and all scores."""
    found: dict[str, Tensor] = {}
    first, second = (share(stage) for stage in problem.stages(batch_sizes=BATCHES))
    one = tuple(part[3:4] for part in problem.test_data)  # of two processes one has no part of it
    single = share(first.with_data(tuple(part[7:8] for part in problem.pretraining_data)))
    for name, stage in (("first", first), ("second", second), ("single", single)):
        at = stage.vector() + 0.1
        found[f"{name} losses"] = stage.example_losses()
        found[f"{name} objective"] = stage.objective(at)
        found[f"{name} value"], found[f"{name} gradient"] = stage.objective_and_gradient(at)
        v = torch.sin(torch.arange(3 * len(at), dtype=at.dtype)).view(-1, 3)
        found[f"{name} Hessian"] = Hessian(stage) @ v
        found[f"{name} Hessian, no graph kept"] = Hessian(stage, memory_budget=0) @ v
        found[f"{name} Gauss-Newton"] = GaussNewton(stage) @ v
        found[f"{name} EK-FAC"] = EKFAC(stage) @ v
        cross, (v_w, v_h) = CrossHessian(stage), stage.split(v)
        found[f"{name} cross Hessian"] = cross @ v_h
        found[f"{name} its transpose"] = cross.T @ v_w

    exactly = {"solver": MinRes(tol=1e-13), "progress": False}
    plain = {"solver": ConjugateGradient(tol=1e-13), "progress": False}
    moved = [share(stage) for stage in problem.stages(ALPHAS[0], batch_sizes=BATCHES)]
    single_stage = SingleStageInfluence(first, **exactly)
    for name, influence in {
        "case 1": FixedEmbeddingInfluence(first, second, **exactly),
        "case 1, plain": FixedEmbeddingInfluence(first, second, **plain),
        "case 2": UpdatedEmbeddingInfluence(*moved, ALPHAS[0], **exactly),
    }.items():
        test = problem.test_data
        found[name] = influence.scores(test).values
        if name == "case 1, plain":
            continue
        found[f"{name}, per test"] = influence.scores(test, per_test=True).values
        found[f"{name}, one test"] = influence.scores(one).values
        found[f"{name}, per one test"] = influence.scores(one, per_test=True).values
        found[f"{name}, loaded"] = influence.scores(
            loaded(test), of=loaded(problem.new_data)
        ).values
        out = folder / name
        found[f"{name}, on disk"] = influence.scores(test, per_test=True, out=out).values.clone()
    found["single stage"] = single_stage.scores(problem.new_data).values
    found["self-influence"] = single_stage.self_influence(at_once=7).values
    found["self-influence of some"] = single_stage.self_influence([30, 2, 17]).values
    return found


def half_a_sweep(share: Callable[[Stage], Stage], problem: Problem, out: Path) -> None:
    """Scores on disk, interrupted after two steps of four."""
    real, calls = storage._derivatives, 0

    def interrupted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    stages = (share(stage) for stage in problem.stages(batch_sizes=BATCHES))
    influence = FixedEmbeddingInfluence(*stages, MinRes(tol=1e-13), progress=False)
    storage._derivatives = interrupted
    try:
        influence.scores(problem.test_data, out=out)
    except KeyboardInterrupt:
        pass
    finally:
        storage._derivatives = real


def said(work: Callable[[], object]) -> str:
    """The error of something that must fail."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Odd(LookupError):
    """An error that cannot be pickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one}, {other}")


def failing(error: Exception) -> None:
    """What raises an error."""
    raise error


def failures(reader: Reader, chain: Callable[[], Chain], test: Any, folder: Path) -> dict[str, str]:
    """What the processes say where one of them fails."""
    rank = dist.get_rank()
    errors = {
        "a full disk": OSError(errno.ENOSPC, "no room"),
        "a solve": FailedSolve("nothing was found"),
        "an odd error": Odd("one", "other"),
        "derivatives": DerivativeError("one is missing"),
    }
    answers = {}
    for name, error in errors.items():
        at = (lambda error=error: failing(error)) if rank else (lambda: None)
        answers[f"{name}, the second"] = said(lambda at=at: reader.agreed(at))
        answers[f"{name}, the first"] = said(
            lambda error=error: reader.on_first(lambda: failing(error))
        )
    answers["found"] = repr(reader.on_first(lambda: [rank, torch.ones(2)]))
    file, place = folder / "file", folder / f"place-{rank}"
    file.touch()
    place.mkdir()
    answers["a file"] = said(lambda: chain().scores(test, out=folder if rank else file))
    # A path that leads elsewhere in the other process, as without a shared disk.
    os.chdir(place)
    answers["elsewhere"] = said(lambda: chain().scores(test, out="scores"))
    answers["elsewhere again"] = said(lambda: chain().scores(test, out="scores"))
    return answers


def refusals(problem: Problem, folder: Path) -> dict[str, str]:
    """What the processes say to bad input, which only one of them sees."""
    rank = dist.get_rank()
    x, y = problem.pretraining_data
    plain = problem.stages(batch_sizes=BATCHES)[0]

    def stage(**changes: Any) -> Stage:
        given = {"data": (x, y), "check": False, "batch_size": 4, "l2": plain.l2}
        return Stage(plain.embedding, plain.head, **({"loss": plain.loss} | given | changes))

    outside = y.clone()
    outside[28] = 3

    def kinked(outputs: Tensor, targets: Tensor) -> Tensor:
        """Finite, but not its gradient where the target is 5."""
        distance = outputs[:, 0] - outputs[:, 0].detach() + (targets != 5)
        return distance.abs().sqrt()

    def detached(outputs: Tensor, targets: Tensor) -> Tensor:
        return plain.loss(outputs.detach(), targets)

    five = y.clone().double()
    five[25] = 5
    first = shard(stage())
    answers = {
        "share": said(lambda: shard(stage(data=(x, outside)))),
        "test": said(lambda: first.with_data((x, outside), "test data")),
        "derivative": said(lambda: shard(stage(loss=(plain.loss, detached)[rank]))),
        "gradient": said(
            lambda: shard(stage(data=(x, five), loss=kinked, check="data")).gradient()
        ),
        "data": said(lambda: shard(stage(data=(x + rank, y)))),
        "fewer": said(lambda: shard(stage(data=(x[rank:], y[rank:])))),
        "group": said(lambda: [shard(stage(), group) for group in groups]),
    }
    exactly, test = {"progress": False, "stationarity_tol": float("inf")}, problem.pretraining_data
    few = tuple(part[: 4 + rank] for part in test)

    def chain(*links: Link) -> Chain:
        return Chain(links or [Optimum(first)], **exactly)

    ones = torch.ones(first.parameters.size, 1 + rank, dtype=first.dtype)
    own = MinRes(damping=0.1 * rank)
    answers |= {
        "damping": said(lambda: chain(Optimum(first, own)).scores(test)),
        "solver": said(lambda: chain(Optimum(first, (MinRes(), Dense())[rank])).scores(test)),
        "curvature": said(
            lambda: chain(Optimum(first, curvature=("hessian", "gauss-newton")[rank])).scores(test)
        ),
        "link": said(lambda: chain((Optimum(first), Stopped(first, 3.0))[rank]).scores(test)),
        "time": said(lambda: chain(Stopped(first, 3.0 + rank)).pull_back(ones[:, :1])),
        "other test": said(lambda: chain().scores(few)),
        "per_test": said(lambda: chain().scores(test, per_test=rank == 0)),
        "of": said(lambda: chain().scores(test, of=test if rank else None)),
        "cotangent": said(lambda: chain().pull_back(ones)),
        "at_once": said(lambda: chain().self_influence(at_once=3 + rank)),
        "indices": said(lambda: chain().self_influence([rank])),
        "train": said(lambda: train(first)),
    }
    answers |= failures(first.reader, chain, test, folder)
    answers["share of examples"] = str(list(first.reader.share))
    answers["to"] = str(first.to(torch.float32).reader.share)
    plain.load_vector(plain.vector() + rank)
    answers["parameters"] = said(lambda: shard(stage()))
    return answers


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "TF32|torch.jit")
    folder, problem = Path(sys.argv[1]).resolve(), Problem(SPECS["mlp"])
    device = initialise()
    groups = [dist.new_group([0])]
    answers = refusals(problem, folder)
    half_a_sweep(shard, problem, folder / "half")
    half_a_sweep(shard, problem, folder / "whole")
    half_a_sweep(shard, problem, folder / "whole")
    found = results(shard, problem, folder)
    torch.save((found, answers), folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()
