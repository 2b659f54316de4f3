"""The physical units: what one pass, one product and one sweep of scores cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vmap

from benchmarks.libraries.ours import stage_of
from benchmarks.problems import Problem, losses_of

# Each is timed so often, in turn; the first round warms up.
ROUNDS = 4
# Examples whose gradients are held at once by vmap(grad).
CHUNK = 250


def measure(problem: Problem, columns: int) -> dict[str, float]:
    """Seconds of each unit, the median over the rounds.

    Parameters
    ----------
    problem
        The network and its data; all of the data is one batch where it says nothing else.
    columns
        Vectors, where there are several.
    """
    from msif_lib.curvature import Hessian

    losses, theta = losses_of(problem)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(theta), columns, dtype=theta.dtype, generator=generator)
    v = vectors[:, 0].clone()
    stage = stage_of(problem)

    def mean(theta: Tensor) -> Tensor:
        return losses(theta).mean()

    def forward() -> None:
        with torch.no_grad():
            losses(theta)

    def gradient() -> None:
        leaf = theta.clone().requires_grad_()
        torch.autograd.grad(mean(leaf), leaf)

    def double_backward() -> None:
        leaf = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(mean(leaf), leaf, create_graph=True)
        torch.autograd.grad(slope @ v, leaf)

    def forward_over_reverse() -> None:
        jvp(grad(mean), (theta,), (v,))

    model = problem.model
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()))
    sizes = [shape.numel() for shape in shapes]

    def one_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(theta.split(sizes), shapes))
        outputs = functional_call(model, dict(zip(names, parts)), (x[None],))
        return F.cross_entropy(outputs, y[None])

    per_example = vmap(grad(one_loss), (None, 0, 0))

    def contracted(vectors: Tensor) -> None:
        for batch in zip(problem.inputs.split(CHUNK), problem.targets.split(CHUNK)):
            per_example(theta, *batch) @ vectors

    def backward_each() -> None:
        parameters = list(model.parameters())
        for index in range(len(problem.inputs)):
            chosen = slice(index, index + 1)
            loss = F.cross_entropy(model(problem.inputs[chosen]), problem.targets[chosen])
            parts = torch.autograd.grad(loss, parameters)
            torch.cat([part.flatten() for part in parts]) @ v

    def forward_mode(vectors: Tensor) -> None:
        for column in vectors.unbind(1):
            jvp(losses, (theta,), (column,))

    def ours(vectors: Tensor) -> None:
        for _ in stage.directional_derivatives(vectors):
            pass

    begin = time.perf_counter()
    _, linear = linearize(grad(mean), theta)
    set_up = time.perf_counter() - begin
    kept = Hessian(stage)
    single = vectors[:, :1]
    actions: dict[str, Callable[[], object]] = {
        "forward": forward,
        "forward and backward": gradient,
        "product, double backward": double_backward,
        "product, jvp of grad": forward_over_reverse,
        "product, linearised once": lambda: linear(v),
        "linearisation": lambda: linearize(grad(mean), theta),
        "product, kept graph (ours)": lambda: kept @ v,
        "kept graph (ours)": lambda: Hessian(stage),
        "products, linearised once, in a loop": lambda: [linear(v) for v in vectors.unbind(1)],
        "products, kept graph (ours)": lambda: kept @ vectors,
        "scores, a backward each": backward_each,
        "scores, jvp": lambda: forward_mode(single),
        "scores, vmap of grad": lambda: contracted(single),
        "scores, ours": lambda: ours(single),
        "scores of several, jvp in a loop": lambda: forward_mode(vectors),
        "scores of several, vmap of grad": lambda: contracted(vectors),
        "scores of several, ours": lambda: ours(vectors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    seconds["linearisation"].append(set_up)
    for number in range(ROUNDS):
        for name, action in actions.items():
            if name == "linearisation" and number > 1:
                continue  # as long as some dozens of passes
            begin = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}
