"""One stage: the scores, and the truth by training again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from msif_lib.study.course.exercises.problem import (
    Array,
    Exercise,
    Problem,
    solve,
    tensor,
)


class LinearModel:
    """A linear model with weight decay, trained, with its derivatives in closed form.

    Parameters
    ----------
    kind
        ``"ridge"``, ½(xᵀθ − y)², or ``"logistic"``, log(1 + exp(xᵀθ)) − y xᵀθ.
    sizes
        Training examples, test examples, parameters.
    l2
        Weight decay.
    seed
        Of the data.
    """

    def __init__(self, kind: str, sizes: tuple[int, int, int], l2: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.kind, self.l2 = kind, l2
        (self.m, self.t, self.p) = sizes
        x = rng.standard_normal((self.m + self.t, self.p))
        y = x @ rng.standard_normal(self.p) + 0.8 * rng.standard_normal(len(x))
        y = y if kind == "ridge" else (y > 0).astype(np.float64)
        self.x, self.x_test = np.split(x, [self.m])
        self.y, self.y_test = np.split(y, [self.m])
        self.theta = self.fit(np.full(self.m, 1 / self.m))

    def fit(self, weights: Array, l2: float | None = None) -> Array:
        """Return the minimiser of Σ w_j g_j + l2/2 ‖θ‖², by Newton's method.

        Parameters
        ----------
        weights
            The weight of each example, ``(m,)``.
        l2
            The weight decay, if another than the model's.
        """
        l2 = self.l2 if l2 is None else l2
        theta = np.zeros(self.p)
        for _ in range(50):
            gradient = weights @ self.gradients(theta) + l2 * theta
            theta = theta - solve(self.hessian(theta, weights, l2), gradient)
        if not np.linalg.norm(weights @ self.gradients(theta) + l2 * theta) < 1e-10:
            raise ArithmeticError("a problem of the grader was not solved")
        return theta

    def gradients(self, theta: Array, test: bool = False) -> Array:
        """Return the gradients of the examples' losses at theta, a row each."""
        x, y = (self.x_test, self.y_test) if test else (self.x, self.y)
        o = x @ theta
        return ((o if self.kind == "ridge" else 1 / (1 + np.exp(-o))) - y)[:, None] * x

    def hessian(self, theta: Array, weights: Array, l2: float) -> Array:
        """Return the Hessian of Σ w_j g_j + l2/2 ‖θ‖² at theta."""
        p = 1 / (1 + np.exp(-self.x @ theta))
        curvature = np.ones(self.m) if self.kind == "ridge" else p * (1 - p)
        return (self.x.T * (weights * curvature)) @ self.x + l2 * np.eye(self.p)

    def q(self, theta: Array) -> float:
        """Return the summed test loss at theta."""
        o = self.x_test @ theta
        if self.kind == "ridge":
            return float(0.5 * ((o - self.y_test) ** 2).sum())
        return float((np.logaddexp(0, o) - self.y_test * o).sum())

    def losses(self, test: bool = False) -> Callable[[Tensor], Tensor]:
        """Return the losses of the examples as a PyTorch function of theta."""
        x, y = (self.x_test, self.y_test) if test else (self.x, self.y)

        def losses(theta: Tensor) -> Tensor:
            x_, y_ = tensor(x).to(theta.dtype), tensor(y).to(theta.dtype)
            o = x_ @ theta
            if self.kind == "ridge":
                return 0.5 * (o - y_) ** 2
            return torch.nn.functional.softplus(o) - y_ * o

        return losses


# Kind, examples, test examples and parameters, weight decay, seed.
_MODELS: list[tuple[str, tuple[int, int, int], float, int]] = [
    ("ridge", (9, 4, 3), 0.3, 300),
    ("logistic", (12, 7, 4), 0.15, 301),
    ("logistic", (15, 5, 2), 0.4, 302),
]


def _influence_problems() -> list[Problem]:
    problems = []
    for setting in _MODELS:
        a = LinearModel(*setting)
        m, t, l2, theta = a.m, a.t, a.l2, a.theta
        mean = np.full(m, 1 / m)
        g, b = a.gradients(theta), a.gradients(theta, test=True).sum(0)
        h = a.hessian(theta, mean, l2)
        bare = a.hessian(theta, mean, 0.0)
        eye = np.eye(a.p)

        def scores(h: Array, g: Array = g, b: Array = b) -> Array:
            return -g @ solve(h, b)

        problems.append(
            Problem(
                [(a.losses(), a.losses(test=True), l2, tensor(theta))],
                scores(h),
                "for each training example",
                wrong={
                    "sum instead of mean": scores(m * bare + l2 * eye),
                    "regularizer dropped": scores(bare),
                    "weight decay doubled": scores(h + l2 * eye),
                    "weight decay halved": scores(h - l2 / 2 * eye),
                    "regularizer in every example": scores(h, g + l2 * theta),
                    "identity instead of H⁻¹": -g @ b,
                    "H instead of H⁻¹": -g @ h @ b,
                    "inverse applied twice": scores(h @ h),
                    "regularizer in q": scores(h, g, b + l2 * theta),
                    "training loss for q": scores(h, g, g.sum(0)),
                    "self-influence": -np.einsum("ip,ip->i", g, solve(h, g.T).T),
                },
                factors={
                    "sign": -1.0,
                    "1/m applied": 1 / m,
                    "removal effect, not score": -1 / m,
                    "missing 1/m": float(m),
                    "mean over the test set": 1 / t,
                },
                shapes={
                    (a.p,): "One number for each parameter is the change of θ, not of q.",
                    (m, a.p): "That looks like a gradient, or a change of θ, for each example.",
                    (m, t): "That is a score for each pair; sum over the test examples.",
                    (): "Was it summed over the training examples?",
                },
            )
        )
    return problems


INFLUENCE = Exercise(
    signature="influence_scores(losses, test_losses, l2, theta)",
    returns="I_i = dq/dε for each of the m training examples, shape (m,).",
    hint="See the theorem “Influence on the parameters and on a test functional” and “Three "
    "conventions that change the numbers” in the chapter “Influence functions for one stage”.",
    mistakes={
        "sign": "The sign is wrong. I is positive for an example that hurts: more of it raises q.",
        "1/m applied": "The scores were divided by m. I is the derivative in ε; only the predicted "
        "change on removal, −I/m, has the factor 1/m.",
        "removal effect, not score": "This is −I/m, the predicted change of q when the example is "
        "removed; the score I itself is wanted.",
        "missing 1/m": "The scores are m times too large: the 1/m of the mean is missing where the "
        "Hessian is inverted.",
        "mean over the test set": "q is the sum of the test losses, not their mean.",
        "sum instead of mean": "The Hessian is that of the sum of the losses; the 1/m of the mean "
        "is missing.",
        "regularizer dropped": "The regularizer is missing from the Hessian: weight decay adds "
        "l2 to its diagonal.",
        "weight decay doubled": "The weight decay counts twice in the Hessian: the regularizer is "
        "l2/2·‖θ‖², with its ½.",
        "weight decay halved": "The weight decay counts half in the Hessian: l2/2·‖θ‖² has the "
        "second derivative l2.",
        "regularizer in every example": "The weight decay was counted into the gradient of each "
        "example; it belongs to the Hessian alone. Centred gradients give the same numbers: they "
        "answer for the renormalised removal, and here the other examples keep their weight.",
        "identity instead of H⁻¹": "These are inner products of gradients: the inverse Hessian is "
        "missing.",
        "H instead of H⁻¹": "The vector was multiplied with H; H v = b has to be solved.",
        "inverse applied twice": "The inverse Hessian was applied twice.",
        "regularizer in q": "The weight decay was counted into the test functional.",
        "training loss for q": "The gradient of q is that of the training losses; the test losses "
        "are asked about.",
        "self-influence": "The effect of each example on its own loss was computed; q is the sum "
        "of the test losses.",
    },
    problems=_influence_problems,
)


def _retraining_problems() -> list[Problem]:
    problems = []
    for setting in _MODELS:
        a = LinearModel(*setting)
        m, l2, theta = a.m, a.l2, a.theta
        b = a.gradients(theta, test=True).sum(0)
        h = a.hessian(theta, np.full(m, 1 / m), l2)
        # Neither the first example nor the last alone: an index one off must show.
        removed = [0, m // 2, m - 1]

        def change(
            weight: float = 1 / m,
            its_own: float = 0.0,
            shift: int = 0,
            l2: float = l2,
            a: LinearModel = a,
            removed: Sequence[int] = removed,
        ) -> Array:
            """Return the change of q when example i + shift has one weight and the rest another."""
            found = []
            for i in removed:
                weights = np.full(a.m, weight)
                weights[(i + shift) % a.m] = its_own
                found.append(a.q(a.fit(weights, l2)) - a.q(a.theta))
            return np.array(found)

        truth = change()
        first = a.gradients(theta)[removed] @ solve(h, b) / m
        problems.append(
            Problem(
                [(a.losses(), a.losses(test=True), l2, tensor(theta), i) for i in removed],
                truth,
                "for the removal",
                wrong={
                    "renormalised, not fixed weight": change(1 / (m - 1)),
                    "sum instead of mean": change(1.0),
                    "regularizer dropped": change(l2=0.0),
                    "weight decay doubled": change(l2=2 * l2),
                    "weight decay halved": change(l2=l2 / 2),
                    "first order, not retrained": first,
                    "loss, not its change": truth + a.q(theta),
                    "example weighted up": change(its_own=2 / m),
                    "wrong example": change(shift=1),
                    "wrong example (one before)": change(shift=-1),
                    "kept only the example": change(0.0, 1 / m),
                },
                factors={
                    "sign": -1.0,
                    "mean over the test set": 1 / a.t,
                    "1/m applied": 1 / m,
                    "missing 1/m": float(m),
                },
                shapes={
                    (a.p,): "That looks like parameters; the change of q is wanted.",
                    (a.t,): "That is the change for each test example; q is their sum.",
                },
            )
        )
    return problems


RETRAINING = Exercise(
    signature="leave_one_out(losses, test_losses, l2, theta, i)",
    returns="q(retrained without example i) − q(theta), a single number.",
    hint="See the two readings of removal in “Three conventions that change the numbers”, chapter "
    "“Influence functions for one stage”; fixed weight is the one meant.",
    mistakes={
        "sign": "The sign is wrong: it is q after the removal minus q before.",
        "mean over the test set": "q is the sum of the test losses, not their mean.",
        "1/m applied": "Divided by m once too often: the change itself is wanted.",
        "missing 1/m": "The change was multiplied by m.",
        "renormalised, not fixed weight": "The others were given the weight 1/(m − 1). That is the "
        "other reading of removal; here each keeps its 1/m.",
        "sum instead of mean": "The model was retrained on the sum of the losses; against the same "
        "weight decay, that is another model than the mean.",
        "regularizer dropped": "The model was retrained without its weight decay.",
        "weight decay doubled": "The weight decay is twice too strong: it is l2/2·‖θ‖².",
        "weight decay halved": "The weight decay is half of what it should be: it is l2/2·‖θ‖², "
        "whose gradient is l2·θ.",
        "first order, not retrained": "This is −I/m, the prediction. The truth needs a training "
        "without the example, to the end.",
        "zero": "Nothing changed: the example was still there, or training did not move.",
        "loss, not its change": "This is q after the removal; q before has to be subtracted.",
        "example weighted up": "The example was counted twice in place of not at all: removal is "
        "ε = −1/m, not +1/m.",
        "wrong example": "The example after the one asked for was removed: i counts from 0.",
        "wrong example (one before)": "The example before the one asked for was removed: i counts "
        "from 0.",
        "kept only the example": "Everything but the example was removed.",
    },
    problems=_retraining_problems,
    tolerance=1e-2,
    near="unconverged training",
    inexact="training ended too early would do this. Train until the gradient has vanished (1e-6 "
    "or less), in double precision.",
)
