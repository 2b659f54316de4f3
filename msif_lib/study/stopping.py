"""Trainings that stop before the optimum, and what a removal changes after one of that length."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from msif_lib.curvature import Hessian
from msif_lib.stage import Stage
from msif_lib.support.minimise import Descent, minimise

# Gradient evaluations of one training, at most.
_EVALUATIONS = 5000


@dataclass(frozen=True)
class Stopped:
    """Case 1 after a pretraining that stopped.

    Attributes
    ----------
    pretrain, finetune
        The stages trained with all examples; the head of `finetune` is at its optimum.
    change
        Change of the summed test loss where the same training goes without each set, ``(R,)``.
    gradient_norm
        Of the pretraining objective where it stopped.
    """

    pretrain: Stage
    finetune: Stage
    change: Tensor
    gradient_norm: float


def stop_early(
    pretrain: Stage,
    finetune: Stage,
    removals: Sequence[Sequence[int]],
    test: tuple[Tensor, Tensor],
    norms: Sequence[float],
    epochs: int = 20,
    seed: int = 0,
    tol: float = 1e-9,
    learning_rate: float = 5e-3,
    minibatch: int = 64,
) -> list[Stopped]:
    """Pretrain with all examples and without each set of them, and look where it could stop.

    As :func:`msif_lib.training.train` does, pretraining begins with epochs of Adam and goes
    on with L-BFGS. Every training sees the same mini-batches from the same initial weights; an
    example left out has weight zero. The head of case 1 is trained on each embedding to its
    optimum.

    Parameters
    ----------
    pretrain, finetune
        The stages at their initial weights, their data pairs of tensors; left as they are.
    removals
        R sets of indices into the pretraining data.
    test
        Test examples of the finetuning task.
    norms
        Norms of the gradient at which pretraining stops, falling.
    epochs
        Of Adam, whose learning rate falls to zero along a cosine.
    seed
        Of the mini-batches' order.
    tol
        Norm of the gradient to be reached by the heads.
    learning_rate, minibatch
        Of Adam.

    Returns
    -------
    list of Stopped
        The models and the truth of a training of that length: after Adam, and at each norm.
    """
    weights = torch.ones(1 + len(removals), pretrain.size, dtype=pretrain.dtype)
    for row, removal in enumerate(removals, 1):
        weights[row, list(removal)] = 0
    weights = weights.to(pretrain.device)

    def here(theta: Tensor) -> Stopped:
        w = theta[:, : pretrain.embedding_size]
        heads = _heads(finetune, w, tol)
        with torch.no_grad():
            losses = vmap(lambda w, h: finetune.losses(w, h, *test).sum())(w, heads)
        stages = copy.deepcopy((pretrain, finetune))
        stages[0].load_vector(theta[0])
        stages[1].load_vector(torch.cat([w[0], heads[0]]))
        return Stopped(*stages, losses[1:] - losses[0], float(stages[0].gradient().norm()))

    theta = _adam(pretrain, weights, epochs, seed, learning_rate, minibatch)
    stopped = [here(theta)]
    for norm in norms:
        theta = _lbfgs(pretrain, weights, theta, norm)
        stopped.append(here(theta))
    return stopped


def _adam(
    stage: Stage,
    weights: Tensor,
    epochs: int,
    seed: int,
    learning_rate: float,
    minibatch: int,
) -> Tensor:
    """Parameters ``(R, p)`` after Adam on mini-batches, for R weightings ``(R, m)`` of them."""
    inputs, targets = stage.examples.tensors()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(stage.size)), minibatch, shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    theta = stage.vector().repeat(len(weights), 1).requires_grad_()
    # Adam goes entry by entry, so rows do not touch each other.
    optimizer = torch.optim.Adam([theta], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for (indices,) in loader:
            batch = inputs[indices].to(stage.device), targets[indices].to(stage.device)
            losses = vmap(lambda row, b=batch: stage.losses(*stage.split(row), *b))(theta)
            penalty = vmap(lambda row: stage.regularization(*stage.split(row)))(theta)
            total = (weights[:, indices] * losses).mean(1) + penalty
            (theta.grad,) = torch.autograd.grad(total.sum(), theta)
            optimizer.step()
            schedule.step()
    return theta.detach()


def _lbfgs(stage: Stage, weights: Tensor, start: Tensor, norm: float) -> Tensor:
    """Parameters ``(R, p)`` where the gradient of each weighted objective has this norm."""
    inputs, targets = (part.to(stage.device) for part in stage.examples.tensors())

    def objective(theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        losses = vmap(lambda row: stage.losses(*stage.split(row), inputs, targets))(theta)
        penalty = vmap(lambda row: stage.regularization(*stage.split(row)))(theta)
        value = (weights[which] * losses).mean(1) + penalty
        return value.detach(), torch.autograd.grad(value.sum(), theta)[0]

    return minimise(objective, start, norm, max_evaluations=_EVALUATIONS).x


def _heads(stage: Stage, embeddings: Tensor, tol: float) -> Tensor:
    """The optimal head ``(R, p_Θ)`` of each embedding ``(R, p_W)``."""
    inputs, targets = (part.to(stage.device) for part in stage.examples.tensors())
    with torch.no_grad():
        features = vmap(lambda w: stage.embed(w, inputs))(embeddings)

    def objective(heads: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        heads = heads.detach().requires_grad_()
        losses = vmap(lambda h, f: stage.head_losses(h, f, targets))(heads, features[which])
        value = losses.mean(1) + vmap(stage.regularization)(embeddings[which], heads)
        return value.detach(), torch.autograd.grad(value.sum(), heads)[0]

    start = stage.head_vector().repeat(len(embeddings), 1)
    return minimise(objective, start, tol, max_evaluations=_EVALUATIONS).x


def finetune_plainly(stage: Stage, descent: Descent, alpha: float = 0.0) -> list[Tensor]:
    """Take a stage's parameters down its objective, embedding and head, in place.

    Parameters
    ----------
    stage
        The finetuning stage where case 1 has ended.
    descent
        The steps.
    alpha
        α of a pull α‖W − W̄‖² towards the embedding where it begins; 0: none.

    Returns
    -------
    list of Tensor
        Where each step began, ``(p,)`` each; the end is in `stage`.
    """
    start = x = stage.vector()
    pull, path = _pull(stage, alpha), []
    velocity = torch.zeros_like(x)
    for _ in range(descent.steps):
        path.append(x)
        gradient = stage.objective_and_gradient(x)[1] + pull * (x - start)
        velocity = descent.momentum * velocity - descent.learning_rate * gradient
        x = x + velocity
    stage.load_vector(x)
    return path


def through_steps(
    stage: Stage,
    path: Sequence[Tensor],
    descent: Descent,
    stops: Mapping[int, Tensor],
    alpha: float = 0.0,
) -> dict[int, Tensor]:
    """Gradients with respect to where a plain finetuning began, from those where it stopped.

    The chain rule backwards through the steps x ← x + v, v ← β v − η (∇F(x) + 2α (W − W̄)): one
    product with the Hessian a step, taken at the points of the path, serves all stops.

    Parameters
    ----------
    stage
        The finetuning stage; its parameters are left where the path began.
    path, descent, alpha
        As :func:`finetune_plainly` returned and was given.
    stops
        By number of steps k, from 0 to the path's length: the gradient ``(p,)`` of a function of
        the parameters after k steps.

    Returns
    -------
    dict
        By number of steps, the gradient of the same with respect to ``path[0]``, ``(p,)``, which
        is also where the pull leads.
    """
    last, rate, pull = max(stops), descent.learning_rate, _pull(stage, alpha)[:, None]
    # A column for every stop that lies at or behind the step, the latest stop first.
    of_x = of_v = of_start = stage.vector().new_zeros(len(pull), 0)
    for k in range(last, -1, -1):
        if k < last:
            stage.load_vector(path[k])
            of_step = of_x + of_v
            # Linearising pays over many products; here each Hessian is used once.
            bent = Hessian(stage, memory_budget=0) @ of_step + pull * of_step
            of_x = of_x - rate * bent
            of_v = descent.momentum * of_step
            of_start = of_start + rate * pull * of_step
        if k in stops:
            of_x = torch.cat([of_x, stops[k][:, None]], 1)
            of_v, of_start = (nn.functional.pad(rest, (0, 1)) for rest in (of_v, of_start))
    columns = (of_x + of_start).unbind(1)
    return dict(zip(sorted(stops, reverse=True), columns, strict=True))


def _pull(stage: Stage, alpha: float) -> Tensor:
    """The diagonal of the Hessian of α‖W − W̄‖², ``(p,)``."""
    pull = torch.zeros_like(stage.vector())
    pull[: stage.embedding_size] = 2 * alpha
    return pull
