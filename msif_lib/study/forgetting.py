"""What finetuning leaves of pretraining: sensitivities to W̄, through k steps or at an optimum.

All scores of a pretraining are I_i = −bᵀ [H_G⁻¹ ∇g(z_i)]_W. What comes after pretraining enters
through b = dq/dW̄ alone. Here b is had for a finetuning that stops after k steps of gradient
descent, by going back through the steps, and at an optimum from the eigenvalues of

    S = F_WW − F_WΘ F_ΘΘ⁻¹ F_ΘW,

the curvature of the finetuning objective along W with the head following.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_lib.curvature import Hessian
from msif_lib.solvers import Dense, MinRes, Solver
from msif_lib.stage import Stage
from msif_lib.study.stopping import finetune_plainly, through_steps
from msif_lib.support.minimise import Descent
from msif_lib.support.storage import sweep


@dataclass(frozen=True)
class Stopped:
    """A finetuning that stopped after some steps.

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


def descend(
    stage: Stage,
    test: tuple[Tensor, Tensor],
    steps: Sequence[int],
    learning_rate: float,
    alpha: float = 0.0,
) -> dict[int, Stopped]:
    """Finetune by gradient descent from (W̄, Θ_0), and differentiate the steps.

    A step is θ ← θ − η (∇F(θ) + 2α (W − W̄)), over all examples at once. The sensitivity is exact
    for what was run, converged or not: it is carried back from step to step by one product with
    the Hessian each (reverse mode, the parameters of all steps being kept).

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
    work = stage.to(stage.dtype, stage.device)
    path = [work.vector()]
    descent = Descent(max(1, *steps), learning_rate, momentum=0.0)
    if max(steps):
        path = [*finetune_plainly(work, descent, alpha), work.vector()]
    if not path[-1].isfinite().all():
        raise FloatingPointError(
            f"gradient descent diverges at learning rate {learning_rate}; lower it"
        )
    tested = {k: _test(work, path[k], test) for k in sorted(set(steps))}
    stops = {k: gradient for k, (_, _, gradient) in tested.items()}
    of_start = through_steps(work, path, descent, stops, alpha)
    if not all(gradient.isfinite().all() for gradient in of_start.values()):
        raise FloatingPointError(
            f"the derivatives of gradient descent overflow at learning rate {learning_rate}; lower "
            "it below 2 over the largest eigenvalue of the Hessian"
        )
    return {
        k: Stopped(path[k], loss, accuracy, of_start[k][: work.embedding_size])
        for k, (loss, accuracy, _) in tested.items()
    }


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


def scores_along(
    pretrain: Stage,
    sensitivities: Tensor,
    solver: Solver = MinRes(),  # noqa: B008
) -> Tensor:
    """Scores of all pretraining examples for given sensitivities.

    Parameters
    ----------
    pretrain
        The pretraining stage at (W̄, Ū).
    sensitivities
        b = dq/dW̄, as columns ``(p_W, k)``.
    solver
        For H_G⁻¹; one solve serves all columns.

    Returns
    -------
    Tensor
        I_i = −bᵀ [H_G⁻¹ ∇g(z_i)]_W, ``(m, k)``.
    """
    padding = sensitivities.new_zeros(pretrain.head_size, sensitivities.shape[1])
    v = solver.solve(Hessian(pretrain), torch.cat([sensitivities, padding])).x
    return sweep(pretrain, -v, None, progress=False)
