"""What a walk back through two trainings costs, in units of the two trainings by torch.optim.

    python -m benchmarks.chain

trains a network twice, a pretraining and a finetuning with a head of its own, by torch.optim, by
:func:`msif_lib.training.descend`, and walks both back for one functional and for fifty; then one
functional of a small convolutional network with GroupNorm. All take turns within every round, so
that a ratio is that of works measured at the same time; the record holds the medians and the
extremes of the ratios, and the seconds of the unit alone. It writes
``results/benchmarks/chain.json``; ``--quick`` writes a small one under ``build/bench/quick``.

Inputs and classes are random: time does not depend on what they show. Memory is counted in states
(parameters with the optimiser's buffers) that are alive at once, as a share of 2√T + 10.
"""

from __future__ import annotations

import argparse
import statistics
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.command import make_parser, parse, record
from benchmarks.sentences import seconds
from msif_lib import Stage, cross_entropy
from msif_lib.descent import pull_back
from msif_lib.training import SGD, AdamW, Path, descend

L2 = 1e-3
OPTIMISERS: dict[str, tuple[Any, Callable[..., torch.optim.Optimizer]]] = {
    "SGD": (
        SGD(0.05, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=L2),
    ),
    "Adam": (
        AdamW(1e-3, weight_decay=0.0),
        lambda p: torch.optim.Adam(p, 1e-3, weight_decay=L2),
    ),
}


def perceptron(options: argparse.Namespace) -> tuple[nn.Module, int, tuple[int, ...]]:
    """A tanh network, the width of its embedding, and the shape of its inputs."""
    first, second = options.widths
    layers = nn.Linear(64, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh()
    return nn.Sequential(*layers), second, (64,)


def convolutional(options: argparse.Namespace) -> tuple[nn.Module, int, tuple[int, ...]]:
    """Two convolutions with GroupNorm, on images of 12 by 12."""
    first, second = options.channels
    layers = [
        nn.Conv2d(1, first, 3, padding=1), nn.GroupNorm(2, first), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(first, second, 3, padding=1), nn.GroupNorm(2, second), nn.Tanh(),
        nn.AvgPool2d(2), nn.Flatten(),
    ]  # fmt: skip
    return nn.Sequential(*layers), 9 * second, (1, 12, 12)


class Trainings:
    """A pretraining and a finetuning of one embedding, each by torch.optim and by ours."""

    def __init__(self, kind: str, optimiser: str, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        make = {"MLP": perceptron, "CNN": convolutional}[kind]
        embedding, width, shape = make(options)
        self.epochs, self.batch = options.epochs, options.batch
        self.ours, self.torch = OPTIMISERS[optimiser]
        self.stages = [
            Stage(
                embedding, nn.Linear(width, classes), cross_entropy,
                (torch.randn(count, *shape), torch.randint(classes, (count,))), l2=L2, check=False,
            )
            for count, classes in zip(options.examples, (10, 5))
        ]  # fmt: skip
        self.start = [stage.vector() for stage in self.stages]
        self.paths: list[Path] = []

    def begin(self) -> None:
        for stage, vector in zip(self.stages, self.start):
            stage.load_vector(vector)

    def by_torch(self) -> None:
        """Both trainings as a user writes them."""
        self.begin()
        for stage in self.stages:
            inputs, targets = stage.data
            optimizer = self.torch(stage.model.parameters())
            for _ in range(self.epochs):
                for batch in torch.randperm(stage.size).split(self.batch):
                    optimizer.zero_grad()
                    F.cross_entropy(stage.model(inputs[batch]), targets[batch]).backward()
                    optimizer.step()

    def by_ours(self) -> None:
        self.begin()
        self.paths = [
            descend(stage, self.ours, self.epochs, self.batch, seed, progress=False)
            for seed, stage in enumerate(self.stages)
        ]

    def back(self, functionals: int) -> Tensor:
        """Cotangents of the end of finetuning taken back through both trainings."""
        (first, second), (path, tuned) = self.stages, self.paths
        generator = torch.Generator().manual_seed(functionals)
        cotangent = torch.randn(len(tuned.end), functionals, generator=generator)
        handed = pull_back(second, tuned, cotangent, progress=False).handed
        shared = second.parameters.take(handed, second.shared)
        cotangent = first.parameters.put(shared, first.shared)
        return pull_back(first, path, cotangent, progress=False).derivatives


def states_alive(trainings: Trainings) -> dict[str, Any]:
    """States alive at once, at most, while each path is taken and walked back."""
    counts = []
    for stage, path, start in zip(trainings.stages, trainings.paths, trainings.start):
        made: list[weakref.ref] = []
        most = 0

        class Counting(type(trainings.ours)):  # type: ignore[misc]
            def step(self, *arguments: Any) -> Any:
                nonlocal most
                state = super().step(*arguments)
                made.append(weakref.ref(state.x))  # noqa: B023
                # The start is a state that no step has made.
                most = max(most, 1 + sum(one() is not None for one in made))  # noqa: B023
                return state

        settings = {name: getattr(trainings.ours, name) for name in vars(trainings.ours)}
        stage.load_vector(path.start)
        steps = len(path.batches)
        again = descend(
            stage, Counting(**settings), trainings.epochs, trainings.batch, 0, progress=False
        )
        pull_back(stage, again, torch.ones(len(start), 1), progress=False)
        counts.append({"steps": steps, "states": most, "bound": 2 * steps**0.5 + 10})
    return {"trainings": counts, "share": max(one["states"] / one["bound"] for one in counts)}


def measure(kind: str, optimiser: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of all works to the two trainings by torch.optim."""
    trainings = Trainings(kind, optimiser, options)
    works: dict[str, Callable[[], Any]] = {
        "by torch.optim": trainings.by_torch,
        "by descend": trainings.by_ours,
        "back, 1 functional": lambda: trainings.back(1),
    }
    if kind == "MLP":
        many = options.functionals
        works[f"back, {many} functionals"] = lambda: trainings.back(many)
    trainings.by_torch()  # what is called first takes longer
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            times[name].append(seconds(work, "cpu"))
    unit = times.pop("by torch.optim")
    result: dict[str, Any] = {
        "parameters": [len(vector) for vector in trainings.start],
        "steps": sum(len(path) for path in trainings.paths),
        "batch": options.batch,
        "seconds_of_the_unit": statistics.median(unit),
        "states": states_alive(trainings),
        "ratios": {},
    }
    for name, found in times.items():
        ratios = [one / base for one, base in zip(found, unit)]
        middle = statistics.median(ratios)
        result["ratios"][name] = {"median": middle, "lowest": min(ratios), "highest": max(ratios)}
        print(f"{kind}, {optimiser}: {name:20} {middle:5.1f} times the unit", flush=True)
    return result


def chosen(arguments: list[str] | None) -> argparse.Namespace:
    """The options, and the sizes that follow from them."""
    parser = make_parser("chain", __doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50, help="examples of a step")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--functionals", type=int, default=50)
    options = parse(parser, arguments)
    if options.device != "cpu":
        parser.error("--device cuda: these costs are of small models on a CPU")
    # 560 steps of batches of 50.
    options.examples = [20 * options.batch, 8 * options.batch]
    options.widths, options.channels = [128, 48], [8, 16]
    if options.quick:
        options.rounds, options.epochs, options.functionals = 1, 2, 3
        options.examples, options.batch = [23, 11], 5
        options.widths, options.channels = [6, 4], [2, 4]
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the record."""
    options = chosen(arguments)
    values = {
        f"{kind}, {optimiser}": measure(kind, optimiser, options)
        for kind, optimiser in (("MLP", "SGD"), ("MLP", "Adam"), ("CNN", "SGD"))
    }
    return record(options, "chain", "random inputs", values)


if __name__ == "__main__":
    main()
