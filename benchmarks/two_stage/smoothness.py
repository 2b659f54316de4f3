"""How linear a trained model is in the weights of its pretraining examples, and what makes it so.

No derivative says what leaving examples out does where the trained model is a rough function of
their weights. Empirical metasmoothness (after Engstrom et al. 2025, "Optimizing ML training
with metagradient descent") is known from three trainings. With A(w) the parameters after
training with weights w, a direction v and a step h,

    Δ₁ = A(w + hv) − A(w),   Δ₂ = A(w + 2hv) − A(w + hv),   d = |A(w + 2hv) − A(w)|,
    S = Σ_j d_j sign(Δ₁_j) sign(Δ₂_j) / Σ_j d_j,

from −1 to 1, which is reached where each parameter goes on in the direction in which it began.
Here w + 2hv leaves out a random subset of a share of the examples and w + hv gives it weight ½, so
that S is of the very steps that the benchmark takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.two_stage.settings import SETTINGS, Problem, Recipe, Setting, perceptron, problem
from msif_lib.descent import run
from msif_lib.links import Unrolled
from msif_lib.optimisers import Rate, State
from msif_lib.retraining import with_weights
from msif_lib.training import SGD, AdamW


class Smoothness(NamedTuple):
    """Means over directions; 1 for S where all is linear, 0 for `bend`.

    Attributes
    ----------
    pretrained, finetuned
        S of the parameters after pretraining, and of those after both trainings.
    losses
        S of the losses of the functionals, in the place of parameters.
    bend
        Of these losses ‖Δ₂ − Δ₁‖/‖Δ₁ + Δ₂‖: how far they leave the line, against how far they go.
    """

    pretrained: float
    finetuned: float
    losses: float
    bend: float


def metasmoothness(of: Problem, share: float, directions: int, seed: int = 0) -> Smoothness:
    """Empirical metasmoothness towards random subsets of a share of the pretraining examples.

    Parameters
    ----------
    of
        A trained problem.
    share
        Of the examples that a direction leaves out.
    directions
        How many; each costs two trainings of both stages.
    seed
        Of the subsets.
    """
    generator = torch.Generator().manual_seed(seed)
    left_out = torch.zeros(directions, of.size, dtype=torch.float64)
    for row in left_out:
        row[torch.randperm(of.size, generator=generator)[: round(share * of.size)]] = 1
    ends = _ends(of, torch.cat([1 - left_out / 2, 1 - left_out]))
    at = [link.vector() for link in of.chain.links]
    losses = [_losses(of, vector) for vector in (at[1], *ends[1])]
    tables = [*zip(at, ends), (losses[0], torch.stack(losses[1:]))]
    found = []
    for before, after in tables:
        half, whole = after.split(directions)
        found.append((half - before, whole - half))
    bend = [
        float((second - first).norm() / (first + second).norm()) for first, second in zip(*found[2])
    ]
    s = [float(torch.stack([*map(agreement, *pair)]).mean()) for pair in found]
    return Smoothness(s[0], s[1], s[2], sum(bend) / directions)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """S of two steps Δ₁ and Δ₂, one after the other, vectors of the same length."""
    d = (first + second).abs()
    return (d * first.sign() * second.sign()).sum() / d.sum()


def _ends(of: Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    """All parameters after each training ``(R, p)``, with weights ``(R, m)`` in pretraining."""
    first, second = of.chain.links
    if not isinstance(first, Unrolled):
        chains = [with_weights(of.chain, row, progress=False) for row in weights]
        pairs = [[link.vector() for link in chain.links] for chain in chains]
        return torch.stack([one for one, _ in pairs]), torch.stack([one for _, one in pairs])
    rows, ones = len(weights), torch.ones(len(weights), of.finetune.size, dtype=weights.dtype)
    pretrained = run(of.pretrain, first.path, weights, first.path.start.repeat(rows, 1))
    start = second.path.start.repeat(rows, 1)
    shared = of.finetune.embedding_size
    start[:, :shared] = pretrained[:, :shared]
    return pretrained, run(of.finetune, second.path, ones, start)


def _losses(of: Problem, vector: Tensor) -> Tensor:
    with torch.no_grad():
        return of.finetune.losses_at(vector, *of.data.functionals)


# --- what makes training smoother ----------------------------------------------------------------


@dataclass(frozen=True)
class RootedAdam(AdamW):
    """AdamW with ε inside the root, x' = (1 − ηδ)x − η m̂/√(v̂ + ε): smooth where gradients vanish.

    Engstrom et al. (2025) train so.
    """

    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """x' = (1 − ηδ)x − η m̂/√(v̂ + ε)."""
        m, v, c1, c2 = self._moments(state, gradient)
        x = (1 - rate * decay) * state.x - rate * (m / c1) / (v / c2 + self.eps).sqrt()
        return State(x, (m, v), state.step + 1)

    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """With D = √(v̂ + ε): λ_m' = λ_m − (η/c₁) λ_x/D, λ_v' = λ_v + η m̂ λ_x/(2c₂D³)."""
        (beta1, beta2), lambda_x = self.betas, cotangent.x
        m, v, c1, c2 = self._moments(state, gradient)
        d = (v / c2 + self.eps).sqrt()
        lambda_m = cotangent.buffers[0] - (rate / c1 / d) * lambda_x
        lambda_v = cotangent.buffers[1] + (rate * (m / c1) / (2 * c2 * d**3)) * lambda_x
        lambda_g = (1 - beta1) * lambda_m + (2 * (1 - beta2) * gradient) * lambda_v
        before = (beta1 * lambda_m, beta2 * lambda_v)
        return lambda_g, State((1 - rate * decay) * lambda_x, before, state.step)


# Examples of both stages of digits.
_SIZES = (600, 300)


def variants() -> Iterator[tuple[str, str, Setting]]:
    """What is changed, to what, and the setting: digits, one thing changed at a time.

    Where the batch or the rate is another, so is the number of epochs: steps times rate stay.
    """
    base = SETTINGS["digits-sgd"]
    assert base.recipes is not None

    def changed(width: int = 32, **how: Any) -> Setting:
        first, second = (
            recipe._replace(**_of(recipe, size, **how))
            for recipe, size in zip(base.recipes or (), _SIZES)
        )
        embedding = partial(perceptron, 64, width, width // 2)
        return dataclasses.replace(base, recipes=(first, second), embedding=embedding)

    for parts in (8, 4, 1):
        yield "batch", "the whole set" if parts == 1 else f"1/{parts} of all", changed(parts=parts)
    for rate in (0.025, 0.05, 0.1, 0.2):
        yield "rate", f"{rate:g}", changed(rate=rate)
    for l2 in (0.0, 5e-4, 5e-3, 5e-2):
        yield "decay", f"{l2:g}", changed(l2=l2)
    for width in (8, 32, 128):
        yield "width", f"{width} and {width // 2}", changed(width)
    for eps in (1e-8, 1e-3):
        yield "Adam, ε added to the root", f"{eps:g}", changed(optimiser=AdamW(3e-3, eps=eps))
    for eps in (1e-8, 1e-6):
        yield "Adam, ε inside the root", f"{eps:g}", changed(optimiser=RootedAdam(3e-3, eps=eps))


def _of(
    recipe: Recipe, size: int, parts: int | None = None, rate: float | None = None, **how: Any
) -> Any:
    """What of a recipe is changed: batches of 1/parts of `size` examples, a rate, or as named."""
    found, each = dict(how), -(-size // recipe.batch_size)
    steps = float(recipe.epochs * each)
    if parts is not None:
        found["batch_size"], each = -(-size // parts), parts
    if rate is not None:
        steps *= recipe.optimiser.lr / rate
        found["optimiser"] = SGD(rate, momentum=0.9)
    if isinstance(how.get("optimiser"), AdamW):
        found["l2"] = 0.0
    return found | {"epochs": max(1, round(steps / each))}


def sweep(
    seeds: Sequence[int] = (0, 1, 2), shares: Sequence[float] = (0.05, 0.5), directions: int = 8
) -> list[dict[str, Any]]:
    """What makes training smoother: a row a variant, means over seeds.

    Returns
    -------
    list of dict
        ``changed``, ``to``, ``accuracy`` on validation, and by share what
        :class:`Smoothness` holds.
    """
    rows = []
    for what, to, setting in variants():
        problems = [problem(setting, seed) for seed in seeds]
        accuracy = sum(one.accuracy[1] for one in problems) / len(seeds)
        row: dict[str, Any] = {"changed": what, "to": to, "accuracy": accuracy}
        for share in shares:
            found = [metasmoothness(one, share, directions) for one in problems]
            means = (sum(values) / len(seeds) for values in zip(*found))
            row[f"{share:g}"] = Smoothness(*means)._asdict()
        rows.append(row)
    return rows
