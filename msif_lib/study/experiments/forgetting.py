"""What finetuning leaves of pretraining: sensitivities to W̄, through k steps or at an optimum.

All scores of a pretraining are I_i = −bᵀ [H_G⁻¹ ∇g(z_i)]_W. What comes after pretraining enters
through b = dq/dW̄ alone: ``Chain([Optimum(pretrain)]).pull_back`` scores any b. Here b is had for a
finetuning that stops after k steps of gradient descent, by walking back through the steps, and at
an optimum from the eigenvalues of

    S = F_WW − F_WΘ F_ΘΘ⁻¹ F_ΘW,

the curvature of the finetuning objective along W with the head following.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from msif_lib.curvature import Hessian
from msif_lib.links import Unrolled
from msif_lib.solvers import Dense, Solver
from msif_lib.stage import Stage
from msif_lib.support.data import Nested
from msif_lib.training import SGD, Path, descend


@dataclass(frozen=True)
class ShortFinetuning:
    """A finetuning after some steps.

    Attributes
    ----------
    vector
        Its parameters (W_k, Θ_k) ``(p_W + p_Θ,)``.
    test_loss
        q there, the summed loss of the test examples.
    accuracy
        Share of the test examples that it gets right.
    sensitivity
        dq/dW̄ ``(p_W,)``, through all of its steps.
    """

    vector: Tensor
    test_loss: float
    accuracy: float
    sensitivity: Tensor


def finetune_in_steps(
    stage: Stage,
    test: tuple[Tensor, Tensor],
    steps: Sequence[int],
    learning_rate: float,
    alpha: float = 0.0,
) -> dict[int, ShortFinetuning]:
    """Finetune by gradient descent from (W̄, Θ_0), and differentiate the steps.

    A step is θ ← θ − η (∇F(θ) + 2α (W − W̄)), over all examples at once. The sensitivity is exact
    for what was run, converged or not.

    Parameters
    ----------
    stage
        The finetuning stage, at (W̄, Θ_0); it is left as it is. Θ_0 counts as a constant.
    test
        Test examples of the finetuning task, on the stage's device.
    steps
        Numbers of steps after which to stop, each at least 0; one descent serves them all.
    learning_rate
        η.
    alpha
        α of the pull towards W̄; 0: none.

    Returns
    -------
    dict
        By number of steps, in rising order.

    Raises
    ------
    ValueError
        No steps or a negative number of them, a learning rate that is not positive, a negative
        `alpha`.
    FloatingPointError
        The descent diverges, or its derivatives do: where η exceeds 2 over the largest curvature,
        every step enlarges what is carried back through it.
    """
    if not steps or min(steps) < 0:
        raise ValueError(f"steps must be numbers from 0 on, not {steps}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, not {learning_rate}")
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, not {alpha}")
    work, rule = _pulled(stage, alpha), SGD(learning_rate)
    diverges = f"gradient descent diverges at learning rate {learning_rate}; lower it"
    # Plain gradient descent remembers nothing, so that its path may be had in pieces.
    pieces: dict[int, Path | None] = {}
    for before, after in pairwise([0, *sorted(set(steps))]):
        pieces[after] = None
        if after > before:
            try:
                pieces[after] = descend(work, rule, after - before, work.size, 0, progress=False)
            except FloatingPointError as error:
                raise FloatingPointError(diverges) from error
    ends = {
        k: (stage.vector() if piece is None else piece.end)[: stage.parameters.size]
        for k, piece in pieces.items()
    }
    tested = {k: _test(stage, end, test) for k, end in ends.items()}
    # A column for every stop that lies at or behind a point of the path, the first stop first.
    back = work.vector().new_zeros(work.parameters.size, 0)
    for k, piece in reversed(pieces.items()):
        gradient = work.parameters.put(tested[k][2][:, None], stage.parameters.all)
        if not gradient.isfinite().all():
            raise FloatingPointError(diverges)
        back = torch.cat([gradient, back], 1)
        if piece is not None:
            back = Unrolled(work, piece).pull_back(back).handed
        if not back.isfinite().all():
            raise FloatingPointError(
                f"the derivatives of gradient descent overflow at learning rate {learning_rate}; "
                "lower it below 2 over the largest eigenvalue of the Hessian"
            )
    of_start = back[: stage.embedding_size] + back[stage.parameters.size :]
    return {
        k: ShortFinetuning(ends[k], loss, accuracy, sensitivity)
        for (k, (loss, accuracy, _)), sensitivity in zip(tested.items(), of_start.unbind(1))
    }


class _WithStart(nn.Module):
    """A model beside the embedding that it began with, whose parameters count as its own."""

    def __init__(self, model: nn.Module, start: Sequence[Tensor]) -> None:
        super().__init__()
        self.model, self.start = model, nn.ParameterList(start)

    def forward(self, inputs: Nested) -> Any:
        return self.model(inputs)


def _pulled(stage: Stage, alpha: float) -> Stage:
    """A copy of a stage with α‖W − W̄‖² besides, where W̄ is a parameter that is not trained.

    So a walk back finds what q owes to W̄ through the pull, apart from what it owes to the start.
    """
    names = [stage.names[number] for number in stage.shared]
    model = copy.deepcopy(stage.model)
    start = stage.parameters.views(stage.embedding_vector(), stage.shared)

    def regularizer(named: dict[str, Tensor]) -> Tensor:
        away = (named[f"model.{name}"] - named[f"start.{i}"] for i, name in enumerate(names))
        pull = alpha * torch.stack([part.square().sum() for part in away]).sum()
        if stage.regularizer is None:
            return pull
        return pull + stage.regularizer({name: named[f"model.{name}"] for name in stage.names})

    return Stage.of(
        _WithStart(model, start),
        stage.loss,
        stage.data,
        trained=[f"model.{stage.names[number]}" for number in stage.trained],
        l2=stage.l2,
        batch_size=stage.batch_size,
        regularizer=regularizer,
        check=False,
        memory_budget=stage.memory_budget,
        weights=stage.weights,
    )


def _test(stage: Stage, vector: Tensor, test: tuple[Tensor, Tensor]) -> tuple[float, float, Tensor]:
    """The summed loss of the test examples, the accuracy, and the gradient of the former."""
    inputs, targets = test
    theta = vector.detach().clone().requires_grad_()
    w, h = stage.split(theta)
    with torch.enable_grad():
        loss = stage.losses(w, h, inputs, targets).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    with torch.no_grad():
        right = stage.outputs(w, h, inputs).argmax(1) == targets
    return float(loss.detach()), float(right.double().mean()), gradient


@dataclass(frozen=True)
class Curvature:
    """How a finetuned stage depends on its embedding, with the head following its optimum.

    Attributes
    ----------
    eigenvalues
        σ_j of S, ascending, ``(p_W,)``.
    eigenvectors
        v_j as columns, ``(p_W, p_W)``.
    gradient
        b = f_W − F_WΘ F_ΘΘ⁻¹ f_Θ, the gradient of q along W, ``(p_W,)``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    gradient: Tensor

    def filtered(self, gain: Tensor, gradient: Tensor | None = None) -> Tensor:
        """Σ_j gain_j (bᵀv_j) v_j: a sensitivity ``(p_W,)``, or those of several gains.

        Parameters
        ----------
        gain
            What is left along each eigenvector, ``(p_W,)`` or ``(p_W, k)``.
        gradient
            Another b ``(p_W,)``.
        """
        b = self.eigenvectors.T @ (self.gradient if gradient is None else gradient)
        return self.eigenvectors @ (gain * (b if gain.dim() == 1 else b[:, None]))


def curvature(stage: Stage, test: tuple[Tensor, Tensor], solver: Solver = Dense()) -> Curvature:  # noqa: B008
    """Eigenvalues of S, dense, and the gradient b at a stage's parameters.

    Parameters
    ----------
    stage
        The finetuned stage.
    test
        Test examples of its task, on its device.
    solver
        For F_ΘΘ⁻¹.

    Returns
    -------
    Curvature
        Of the objective F, without any pull. What it takes grows with the embedding's size:
        p_W Hessian-vector products.
    """
    head = Hessian(stage, block="head")
    theta = stage.vector()
    first = torch.eye(len(theta), stage.embedding_size).to(theta)
    f_ww, cross = (Hessian(stage) @ first).split([stage.embedding_size, stage.head_size])
    f_w, f_theta = stage.split(_test(stage, stage.vector(), test)[2])
    followed = solver.solve(head, torch.cat([cross, f_theta[:, None]], 1)).x
    schur = f_ww - cross.T @ followed[:, :-1]
    values, vectors = torch.linalg.eigh((schur + schur.T) / 2)
    return Curvature(values, vectors, f_w - cross.T @ followed[:, -1])


def proximal_gain(eigenvalues: Tensor, alpha: float) -> Tensor:
    """2α/(σ + 2α): what an optimum of α‖W − W̄‖² + F keeps of W̄ along each eigenvector of S.

    Parameters
    ----------
    eigenvalues
        σ ``(p_W,)``.
    alpha
        α > 0.
    """
    return 2 * alpha / (eigenvalues + 2 * alpha)


def descent_gain(
    eigenvalues: Tensor, steps: int, learning_rate: float, alpha: float = 0.0
) -> Tensor:
    """What k steps of gradient descent keep of W̄ on a quadratic of curvature σ.

    A step takes the share η(σ + 2α) off the distance to the optimum, which itself keeps
    2α/(σ + 2α) of W̄:

        ρᵏ + 2α/(σ + 2α) (1 − ρᵏ),   ρ = 1 − η(σ + 2α).

    Parameters
    ----------
    eigenvalues
        σ ``(p_W,)``.
    steps
        k.
    learning_rate
        η.
    alpha
        α ≥ 0, that of the pull; without one ρᵏ is all there is.
    """
    left = (1 - learning_rate * (eigenvalues + 2 * alpha)) ** steps
    if not alpha:
        return left
    return left + proximal_gain(eigenvalues, alpha) * (1 - left)
