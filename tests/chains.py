"""Chains of trainings written a second time, and what example weights do to them.

Nothing here comes from msif_lib but what :meth:`Fit.link` makes of a fit. Models are evaluated by
torch.func.functional_call; optima come from SciPy's BFGS and Newton's method, recorded trainings
from torch.optim. :meth:`Fits.differences` knows no formula: it trains again with other
weights. :meth:`Fits.exact` is the implicit function theorem on dense matrices, and reverse-mode
differentiation of steps that are written out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from problems import F64, AdditiveHead, LinearEmbedding, log_loss, retrain, train
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vjp, vmap

from msif_lib import Stage
from msif_lib.links import Frozen, Link, Optimum, Proximal, Unrolled
from msif_lib.solvers import Dense
from msif_lib.training import SGD, Path

Named = dict[str, Tensor]
EMBEDDING = {name: name for name in ("embedding.0.weight", "embedding.0.bias")}


class Net(nn.Module):
    """``head(embedding(inputs))``."""

    def __init__(self, embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


def convex_net(classes: int) -> Net:
    """Outputs linear in all parameters together: a strictly convex objective."""
    return Net(LinearEmbedding(), AdditiveHead(classes)).to(F64)


def mlp(classes: int, width: int = 3) -> Net:
    """One tanh layer and a linear head."""
    return Net(nn.Sequential(nn.Linear(5, width), nn.Tanh()), nn.Linear(width, classes)).to(F64)


def examples(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``(count, 5)`` and noisy classes of a linear rule."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=F64)
    rule = torch.randn(5, classes, generator=generator, dtype=F64)
    noise = torch.randn(count, classes, generator=generator, dtype=F64)
    return x, (x @ rule + 2 * noise).argmax(1)


def weights_of(count: int, seed: int) -> Tensor:
    """Example weights between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(count, generator=generator, dtype=F64)


def randomised(model: nn.Module, seed: int, scale: float = 0.5) -> nn.Module:
    """The module with normal random parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return model


@dataclass(frozen=True)
class Recipe:
    """A training by torch.optim, and what msif_lib calls its optimiser.

    `theirs` makes the torch optimiser of the parameters; `coupled` says that its weight decay is
    the stage's l2, which is then no part of the loss.
    """

    theirs: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ours: Any
    epochs: int = 3
    batch_size: int = 5
    coupled: bool = False
    cosine: bool = False
    seed: int = 0


class Fit:
    """One stage: a model trained to an optimum or by a recipe, from what it was handed.

    Parameters
    ----------
    model
        The module; where its parameters stand, training starts.
    data, l2, weights
        Examples, weight decay of all parameters, and weights of the examples.
    shared
        Own names of what is handed over, and the names that they have there.
    trained
        Names of the parameters that are trained, by default all.
    alpha
        Pull towards what was handed over.
    recipe
        None: trained to the optimum.
    hands_on
        From the named parameters to those that the next stage takes.
    loss
        Of each example.
    """

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        l2: float,
        weights: Tensor | None = None,
        *,
        shared: Mapping[str, str] | None = None,
        trained: Sequence[str] | None = None,
        alpha: float | None = None,
        recipe: Recipe | None = None,
        hands_on: Callable[[Named], Named] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = log_loss,
    ) -> None:
        self.model, self.data, self.l2, self.loss = model, data, l2, loss
        self.size = len(data[1])
        self.weighted = weights is not None
        self.weights = torch.ones(self.size, dtype=F64) if weights is None else weights
        self.base = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.shared = dict(shared or {})
        self.trained = list(self.base) if trained is None else list(trained)
        self.alpha, self.recipe, self.hands_on = alpha, recipe, hands_on
        self._near: Any = None
        self.rates: list[float] = []
        # Examples outside the training set, and their weights in the objective of every step.
        self.outside: tuple[tuple[Tensor, Tensor], Tensor] | None = None

    # --- flat vectors -----------------------------------------------------------------------

    def unflat(self, x: Tensor, names: Sequence[str]) -> Named:
        parts = x.split([self.base[name].numel() for name in names]) if names else ()
        return {name: part.view_as(self.base[name]) for name, part in zip(names, parts)}

    def flat(self, named: Named, names: Sequence[str]) -> Tensor:
        rows = [named[name].reshape(-1) for name in names]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=F64)

    def named(self, x: Tensor, c: Tensor) -> Named:
        """All parameters: x the trained ones, c those that were handed over."""
        return self.base | self.unflat(c, list(self.shared)) | self.unflat(x, self.trained)

    def takes(self, before: Fit, named: Named) -> Tensor:
        """c, from the parameters of the stage before."""
        given = before.hands_on(named) if before.hands_on else named
        return torch.cat([given[name].reshape(-1) for name in self.shared.values()])

    # --- training ---------------------------------------------------------------------------

    def losses(self, named: Named, data: tuple[Tensor, Tensor] | None = None) -> Tensor:
        inputs, targets = self.data if data is None else data
        return self.loss(functional_call(self.model, named, (inputs,)), targets)

    def objective(self, x: Tensor, c: Tensor, weights: Tensor) -> Tensor:
        named = self.named(x, c)
        value = weights @ self.losses(named) / self.size
        value = value + 0.5 * self.l2 * sum(part.square().sum() for part in named.values())
        if self.alpha is not None:
            handed = self.unflat(c, list(self.shared))
            pulled = [name for name in self.shared if name in self.trained]
            value = value + self.alpha * sum(
                (named[name] - handed[name]).square().sum() for name in pulled
            )
        return value

    def start(self, c: Tensor) -> Tensor:
        """Where training begins: at what was handed over, else at the model's own values."""
        return self.flat(self.base | self.unflat(c, list(self.shared)), self.trained)

    def fit(self, c: Tensor, weights: Tensor | None = None) -> Tensor:
        """X, the trained parameters."""
        weights = self.weights if weights is None else weights
        if self.recipe is not None:
            return self.run(c, weights)
        if self._near is None:
            here = functools.partial(self.objective, c=c, weights=weights)
            self._near = train(here, self.start(c))
            return self._near.x
        return retrain(lambda x: self.objective(x, c, weights), self._near)

    def own(self, rows: Tensor) -> Tensor:
        """The rows of ``(p_x, ...)`` that belong to what is trained and was not handed over."""
        sizes = [self.base[name].numel() for name in self.trained]
        parts = rows.split(sizes)
        own = [name not in self.shared and "head" in name for name in self.trained]
        return next((part for part, mine in zip(parts, own) if mine), rows[:0])

    def batches(self) -> list[Tensor]:
        assert self.recipe is not None
        generator = torch.Generator().manual_seed(self.recipe.seed)
        orders = [torch.randperm(self.size, generator=generator) for _ in range(self.recipe.epochs)]
        return [batch for order in orders for batch in order.split(self.recipe.batch_size)]

    def run(self, c: Tensor, weights: Tensor) -> Tensor:
        """The steps of torch.optim."""
        recipe, batches = self.recipe, self.batches()
        assert recipe is not None
        start = self.base | self.unflat(c, list(self.shared))
        moving = {name: nn.Parameter(start[name].detach().clone()) for name in self.trained}
        optimiser = recipe.theirs(list(moving.values()))
        schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches), eta_min=1e-3)
            if recipe.cosine
            else None
        )
        self.rates = []
        inputs, targets = self.data
        for batch in batches:
            self.rates.append(optimiser.param_groups[0]["lr"])
            named = start | moving
            losses = self.losses(named, (inputs[batch], targets[batch]))
            value = weights[batch] @ losses / len(batch)
            if not recipe.coupled:
                value = value + 0.5 * self.l2 * sum(part.square().sum() for part in named.values())
            if self.outside is not None:
                value = value + self.outside[1] @ self.losses(named, self.outside[0])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()
        return self.flat({name: part.detach() for name, part in moving.items()}, self.trained)

    # --- the same for msif_lib --------------------------------------------------------------

    def stage(self, named: Named, **settings: Any) -> Stage:
        """A stage with modules of its own at these parameters."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(named[name])
        weights = self.weights if self.weighted else None
        given = {
            "shared": self.shared or "*", "trained": self.trained, "l2": self.l2,
            "weights": weights, "hands_on": self.hands_on, **settings,
        }  # fmt: skip
        return Stage.of(model, self.loss, self.data, **given)

    def link(self, x: Tensor, c: Tensor, solver: Any = Dense(), **settings: Any) -> Link:  # noqa: B008
        """The link of this stage."""
        stage = self.stage(self.named(x, c), **settings)
        if self.recipe is not None:
            start = self.named(self.start(c), c)
            path = Path.record(
                stage, start, self.batches(), self.recipe.ours, self.rates, progress=False
            )
            return Unrolled(stage, path)
        if self.alpha is not None:
            return Proximal(stage, self.alpha, solver)
        moved = set(self.shared) & set(self.trained)
        return Frozen(stage, solver) if self.shared and not moved else Optimum(stage, solver)


class Fits:
    """A chain of fits, and test examples of the last.

    Parameters
    ----------
    fits
        In the order of training.
    test
        Test examples.
    """

    def __init__(self, fits: Sequence[Fit], test: tuple[Tensor, Tensor]) -> None:
        self.fits, self.test = list(fits), test
        self.handed: list[Tensor] = []
        self.trained: list[Tensor] = []
        c = torch.zeros(0, dtype=F64)
        for number, fit in enumerate(self.fits):
            if number:
                before = self.fits[number - 1]
                c = fit.takes(before, before.named(self.trained[-1], self.handed[-1]))
            self.handed.append(c)
            self.trained.append(fit.fit(c))

    def links(self, solver: Any = Dense(), **settings: Any) -> list[Link]:  # noqa: B008
        return [
            fit.link(x, c, solver, **settings)
            for fit, x, c in zip(self.fits, self.trained, self.handed)
        ]

    def test_losses(self, x: Tensor, c: Tensor) -> Tensor:
        last = self.fits[-1]
        return last.losses(last.named(x, c), self.test)

    def retrained(self, stage: int, weights: Tensor) -> Tensor:
        """The test losses ``(T,)`` where one stage has other weights."""
        c = self.handed[stage]
        for number in range(stage, len(self.fits)):
            fit = self.fits[number]
            if number > stage:
                before = self.fits[number - 1]
                c = fit.takes(before, before.named(x, c))  # noqa: F821
            x = fit.fit(c, weights if number == stage else None)
        return self.test_losses(x, c).detach()

    def differences(self, stage: int, chosen: Sequence[int], step: float) -> Tensor:
        """Scores ``(len(chosen), T)``: N dq/dw_i by central differences of fourth order."""
        fit, rows = self.fits[stage], []
        for example in chosen:
            losses = {}
            for k in (-2, -1, 1, 2):
                weights = fit.weights.clone()
                weights[example] += k * step
                losses[k] = self.retrained(stage, weights)
            slope = (losses[-2] - 8 * losses[-1] + 8 * losses[1] - losses[2]) / (12 * step)
            rows.append(fit.size * slope)
        return torch.stack(rows)

    def exact(self, variant: str = "") -> list[Tensor]:
        """Scores of all stages ``(N, T)``: dense implicit functions, and steps walked back.

        With a `variant` one mistake is made.
        """
        x, c = self.trained[-1], self.handed[-1]
        back_x, back_c = (jacrev(self.test_losses, argnums=n)(x, c).T for n in (0, 1))
        buffers: Tensor | None = None
        scores: list[Tensor] = []
        for number in range(len(self.fits) - 1, -1, -1):
            fit, x, c = self.fits[number], self.trained[number], self.handed[number]
            if fit.recipe is None:
                values, back_c = implicit(fit, x, c, back_x, back_c, variant)
                begun = torch.zeros_like(back_x)
            else:
                values, begun, back_c, buffers = walked(fit, c, back_x, back_c, variant, buffers)
            if variant == "the first stage's N" and number:
                values = values * self.fits[0].size / fit.size
            scores.append(values)
            if not number:
                break
            before, at = self.fits[number - 1], (self.trained[number - 1], self.handed[number - 1])
            pull = vjp(lambda x, c, b=before, f=fit: f.takes(b, b.named(x, c)), *at)[1]
            pulled = [pull(column) for column in back_c.unbind(1)]
            back_x, back_c = (torch.stack(columns, 1) for columns in zip(*pulled))
            rows = min(fit.own(begun).shape[0], before.own(back_x).shape[0])
            if variant == "the head's cotangent handed back" and rows:
                back_x = back_x.clone()
                before.own(back_x)[:rows] += fit.own(begun)[:rows]
        return scores[::-1]


def implicit(
    fit: Fit, x: Tensor, c: Tensor, back_x: Tensor, back_c: Tensor, variant: str
) -> tuple[Tensor, Tensor]:
    """Scores and dq/dc of a stage at its optimum, by the implicit function theorem."""
    u = torch.linalg.solve(hessian(fit.objective)(x, c, fit.weights), back_x)
    slopes = jacrev(lambda x: fit.losses(fit.named(x, c)))(x)
    mixed = jacrev(jacrev(fit.objective), argnums=1)(x, c, fit.weights)
    if variant == "2 alpha dropped" and fit.alpha is not None:
        mixed = mixed / (2 * fit.alpha)
    if variant == "cross term dropped" and fit.alpha is None:
        mixed = 0 * mixed
    return -slopes @ u, back_c - mixed.T @ u


def walked(
    fit: Fit, c: Tensor, back_x: Tensor, back_c: Tensor, variant: str, buffers: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, dq/d(start) of what is trained, dq/dc, and the cotangent of the first buffer.

    Each step is written out and differentiated by torch.func.vjp. A wrong `variant` takes the
    right steps and differentiates others.
    """
    ours, batches, inputs, targets = fit.recipe.ours, fit.batches(), *fit.data

    def step(t: int, wrong: str, x: Tensor, kept: Any, c: Tensor, weights: Tensor) -> Any:
        batch, rate = batches[t], fit.rates[t]

        def objective(x: Tensor) -> Tensor:
            named = fit.named(x, c)
            value = weights[batch] @ fit.losses(named, (inputs[batch], targets[batch]))
            squares = sum(part.square().sum() for part in named.values())
            return value / len(batch) + 0.5 * fit.l2 * squares

        g = torch.func.grad(objective)(x)
        if isinstance(ours, SGD):
            decay, (v, second) = ours.decoupled_decay, kept
            v = (0 if wrong == "momentum dropped" else ours.momentum) * v + g
            move = g + ours.momentum * v if ours.nesterov else v
        else:
            (b1, b2), decay, (m, s) = ours.betas, ours.weight_decay, kept
            v, second = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2
            c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
            if wrong == "bias correction dropped":
                c1 = c2 = 1.0
            move = v / c1 / ((second / c2).sqrt() + ours.eps)
        decay = 0 if wrong == "decay forgotten" else decay
        return (1 - rate * decay) * x - rate * move, (v, second)

    x = fit.start(c)
    states = [(x, (torch.zeros_like(x), torch.zeros_like(x)))]
    for t in range(len(batches)):
        states.append(step(t, "", *states[-1], c, fit.weights))
    columns, size = back_x.shape[1], len(x)
    lam, beside, derivatives = back_x.T, back_c.T, torch.zeros(columns, fit.size, dtype=F64)
    kept = torch.zeros(2, columns, size, dtype=F64)
    if variant == "buffers carried over a stage's end" and buffers is not None:
        shared = [name for name in fit.trained if name.startswith("embedding")]
        count = len(fit.flat(fit.base, shared))
        kept[0][:, :count] = buffers[:, :count]
    for t in range(len(batches) - 1, -1, -1):
        pull = vjp(functools.partial(step, t, variant), *states[t], c, fit.weights)[1]
        lam, (first, second), fixed, drawn = vmap(pull)((lam, (kept[0], kept[1])))
        kept = torch.stack([first, second])
        beside, derivatives = beside + fixed, derivatives + drawn
    scale = fit.recipe.batch_size if variant == "B for N" else fit.size
    # What is trained begins at c where it was handed over.
    start = vjp(fit.start, c)[1]
    beside = beside + torch.stack([start(row)[0] for row in lam])
    return scale * derivatives.T, lam.T, beside.T, kept[0]
