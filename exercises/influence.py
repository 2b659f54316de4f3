"""The functions of the exercises, to be filled in.

Run ``pytest exercises`` from the project's root: each function is examined on several small
problems, and what is wrong with it is said in a sentence. A function that returns nothing counts
as not done yet.

All tensors are in double precision. m is the number of training (or pretraining) examples, p the
number of parameters. Arguments must be left as they are. More than PyTorch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Function = Callable[[Tensor], Tensor]


def hvp(objective: Function, theta: Tensor, v: Tensor) -> Tensor:
    """Return the product of a Hessian with a vector (chapter on solvers).

    Parameters
    ----------
    objective
        A function of the parameters; takes ``(p,)``, returns a scalar tensor.
    theta
        The point at which the Hessian is taken, ``(p,)``.
    v
        The vector, ``(p,)``.

    Returns
    -------
    Tensor
        H v, ``(p,)``.
    """
    ...


def conjugate_gradient(matvec: Function, b: Tensor, tol: float) -> Tensor:
    """Solve A x = b for a positive definite A, known by its products (chapter on solvers).

    Parameters
    ----------
    matvec
        Takes v, ``(p,)``, returns A v, ``(p,)``.
    b
        The right-hand side, ``(p,)``, not zero.
    tol
        The relative residual to reach: ‖b − A x‖ ≤ tol·‖b‖.

    Returns
    -------
    Tensor
        x, ``(p,)``.
    """
    ...


def influence_scores(losses: Function, test_losses: Function, l2: float, theta: Tensor) -> Tensor:
    """Return the influence of every training example on the test loss (chapter on one stage).

    The model was trained to the minimum of G(θ) = mean of the losses + l2/2·‖θ‖². The test
    functional q is the sum of the test losses.

    Parameters
    ----------
    losses
        Takes θ, ``(p,)``, returns the loss of each training example, ``(m,)``, without the
        regularizer.
    test_losses
        Takes θ, ``(p,)``, returns the loss of each test example, ``(T,)``.
    l2
        The weight decay.
    theta
        The minimiser of G, ``(p,)``.

    Returns
    -------
    Tensor
        The scores I_i = dq/dε for the objective G + ε·(loss of example i), ``(m,)``.
    """
    ...


def leave_one_out(
    losses: Function, test_losses: Function, l2: float, theta: Tensor, i: int
) -> Tensor | float:
    """Return how the test loss changes when one example is left out of training.

    The truth that the scores predict (chapter on one stage). The removal is that of fixed weight:
    the other examples keep the weight 1/m that they had in the mean.

    Parameters
    ----------
    losses, test_losses, l2, theta
        As in `influence_scores`.
    i
        The example to leave out, counted from 0.

    Returns
    -------
    Tensor or float
        q at the new minimum, minus q at theta: a single number, right to 1 %.
    """
    ...


def case1_scores(
    gradients: Tensor,
    hessian_g: Tensor,
    f_w: Tensor,
    f_theta: Tensor,
    f_w_theta: Tensor,
    f_theta_theta: Tensor,
) -> Tensor:
    """Return the scores of pretraining examples, the embedding fixed in finetuning (case 1).

    W, U and Θ have p_W, p_U and p_Θ parameters. Weight decay is part of both Hessians.

    Parameters
    ----------
    gradients
        Row i is ∇g(z_i), the gradient of one pretraining loss, ``(m, p_W + p_U)``; W comes first.
    hessian_g
        H_G, the Hessian of the pretraining objective, a mean, ``(p_W + p_U, p_W + p_U)``.
    f_w, f_theta
        Gradients of the test functional q, ``(p_W,)`` and ``(p_Θ,)``.
    f_w_theta, f_theta_theta
        Blocks F_WΘ and F_ΘΘ of the Hessian of the finetuning objective, ``(p_W, p_Θ)`` and
        ``(p_Θ, p_Θ)``.

    Returns
    -------
    Tensor
        The scores I_i, ``(m,)``.
    """
    ...


def case2_scores(
    gradients: Tensor,
    hessian_g: Tensor,
    f_w: Tensor,
    f_theta: Tensor,
    f_ww: Tensor,
    f_w_theta: Tensor,
    f_theta_theta: Tensor,
    alpha: float,
) -> Tensor:
    """Return the scores of pretraining examples, the embedding finetuned as well (case 2).

    Finetuning minimises α‖W − W̄‖² + F(W, Θ). There is no ½ before α.

    Parameters
    ----------
    gradients, hessian_g, f_w, f_theta, f_w_theta, f_theta_theta
        As in `case1_scores`; the last four at the finetuned (W*, Θ*), the first two at the
        pretrained (W̄, Ū).
    f_ww
        The block F_WW of the Hessian of F, ``(p_W, p_W)``, without the pull.
    alpha
        The weight α of the pull.

    Returns
    -------
    Tensor
        The scores I_i, ``(m,)``.
    """
    ...


def chain_scores(
    g_0: Tensor,
    h_0: Tensor,
    g_1: Tensor,
    h_1: Tensor,
    alpha: float,
    g_2: Tensor,
    f_w_theta: Tensor,
    f_theta_theta: Tensor,
    f_w: Tensor,
    f_theta: Tensor,
) -> Tensor:
    """Return the scores of the examples of three stages: optimum, proximal, frozen.

    The first stage trains W and a head U. The second is pulled towards that W with strength α,
    without a ½, and trains W and a head V. The third keeps this W and trains a head Θ.

    Parameters
    ----------
    g_0, h_0
        First stage: row i is the gradient of one loss, ``(m, p_W + p_U)``, W first; the Hessian of
        the objective, a mean, ``(p_W + p_U, p_W + p_U)``.
    g_1, h_1
        Second stage: ``(n, p_W + p_V)`` and ``(p_W + p_V, p_W + p_V)``, without the pull.
    alpha
        The weight α of the pull.
    g_2
        Third stage: row i is the gradient of one loss with respect to Θ, ``(l, p_Θ)``.
    f_w_theta, f_theta_theta
        Blocks of the Hessian of its objective, ``(p_W, p_Θ)`` and ``(p_Θ, p_Θ)``.
    f_w, f_theta
        Gradients of the test functional q, ``(p_W,)`` and ``(p_Θ,)``.

    Returns
    -------
    Tensor
        The scores I_i, those of the first stage first, ``(m + n + l,)``.
    """
    ...


def adjoint(
    gradients: Tensor,
    hessians: Tensor,
    batches: list[Tensor],
    rates: Tensor,
    momentum: float,
    decay: float,
    cotangent: Tensor,
) -> Tensor:
    """Return dq/dw_i through T steps of SGD with momentum (chapter “Through the steps”).

    Step t takes v to μv + g and x to (1 − ηδ)x − ηv, with the new v, where g is the gradient of
    (1/B) Σ w_i ℓ_i over its batch, plus a regularizer. v begins at zero, and all w_i are 1.

    Parameters
    ----------
    gradients
        ∇ℓ_i of every example at the point x_t from which step t goes, ``(T, N, p)``.
    hessians
        Of the objective of each step there, regularizer included, ``(T, p, p)``.
    batches
        The indices ``(B_t,)`` of the examples of each step, T of them.
    rates
        The learning rates η_t, ``(T,)``.
    momentum, decay
        μ and δ.
    cotangent
        The gradient of q at the end of the training, ``(p,)``.

    Returns
    -------
    Tensor
        dq/dw_i of each example, ``(N,)``.
    """
    ...
