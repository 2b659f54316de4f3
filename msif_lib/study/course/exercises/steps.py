"""A training that was stopped: derivatives through its steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from msif_lib.study.course.exercises.problem import Array, Exercise, Problem, definite, tensor


@dataclass(frozen=True)
class Training:
    """T steps of SGD with momentum, with random numbers for all that the walk back needs.

    Attributes
    ----------
    gradients
        ∇ℓ_i at x_t of every example, ``(T, N, p)``.
    hessians
        Of the objectives of the batches, ``(T, p, p)``.
    batches
        Indices of the examples of each step, of unequal number.
    rates
        η_t, ``(T,)``.
    momentum, decay
        μ and δ.
    cotangent
        ∇q at the end, ``(p,)``.
    """

    gradients: Array
    hessians: Array
    batches: list[list[int]]
    rates: Array
    momentum: float
    decay: float
    cotangent: Array

    @classmethod
    def random(
        cls, sizes: tuple[int, int, int], momentum: float, decay: float, seed: int
    ) -> Training:
        """Return a training with given numbers of steps, examples and parameters."""
        rng = np.random.default_rng(seed)
        steps, n, p = sizes
        # A batch of one, of two, of three examples and so on, none of all.
        batches = [rng.permutation(n)[: 1 + t % (n - 1)].tolist() for t in range(steps)]
        return cls(
            rng.standard_normal((steps, n, p)),
            np.stack([definite(rng, p, -0.3, 1.5) for _ in range(steps)]),
            batches,
            rng.uniform(0.2, 0.6, steps),
            momentum,
            decay,
            rng.standard_normal(p),
        )

    def forwards(self) -> Array:
        """dq/dw of every example, the derivatives of x and v carried forwards."""
        steps, n, p = self.gradients.shape
        d_x, d_v = np.zeros((p, n)), np.zeros((p, n))
        for t in range(steps):
            drawn = np.zeros(n)
            drawn[self.batches[t]] = 1 / len(self.batches[t])
            d_v = self.momentum * d_v + self.hessians[t] @ d_x + self.gradients[t].T * drawn
            d_x = (1 - self.rates[t] * self.decay) * d_x - self.rates[t] * d_v
        return np.asarray(self.cotangent @ d_x)

    def backwards(
        self,
        order: Iterable[int] | None = None,
        hessians: Array | None = None,
        momentum: float | None = None,
        decay: float | None = None,
        along: str = "g",
        batch: str = "its own",
        everyone: bool = False,
    ) -> Array:
        """The walk back, with one thing or another done wrongly."""
        steps, n, p = self.gradients.shape
        mu = self.momentum if momentum is None else momentum
        delta = self.decay if decay is None else decay
        h = self.hessians if hessians is None else hessians
        found, of_x, of_v = np.zeros(n), self.cotangent, np.zeros(p)
        for t in reversed(range(steps)) if order is None else order:
            drawn, eta = self.batches[t], self.rates[t]
            of_g = of_v - eta * of_x
            size = {"its own": len(drawn), "all": n, "none": 1}[batch]
            chosen = list(range(n)) if everyone else drawn
            found[chosen] += self.gradients[t, chosen] @ of_g / size
            of_x = (1 - eta * delta) * of_x + h[t] @ (of_g if along == "g" else -eta * of_x)
            of_v = mu * of_g
        return found

    def problem(self) -> Problem:
        """Return the problem; the truth goes forwards."""
        steps, n, p = self.gradients.shape
        last = np.repeat(self.hessians[-1:], steps, 0)
        wrong = {
            "momentum dropped": self.backwards(momentum=0.0),
            "1/N instead of 1/B": self.backwards(batch="all"),
            "missing 1/B": self.backwards(batch="none"),
            "decay forgotten": self.backwards(decay=0.0),
            "steps in the order of training": self.backwards(range(steps)),
            "last Hessian for all steps": self.backwards(hessians=last),
            "missing Hessians": self.backwards(hessians=0 * last),
            "Hessian along λ_x": self.backwards(along="x"),
            "every example in every step": self.backwards(everyone=True),
        }
        given = map(tensor, (self.gradients, self.hessians))
        indices = [torch.tensor(batch) for batch in self.batches]
        rest = tensor(self.rates), self.momentum, self.decay, tensor(self.cotangent)
        return Problem(
            [(*given, indices, *rest)],
            self.forwards(),
            "for each example",
            wrong,
            {"sign": -1.0, "score, not derivative": float(n), "1/N applied": 1 / n},
            {
                (): "Was it summed over the examples?",
                (p,): "One number for each parameter is λ_x; multiply the gradients with λ_g.",
                (steps,): "One number for each step: an example's steps are to be added up.",
                (steps, n): "That has a row for each step: an example's steps are to be added up.",
            },
        )


# Steps, examples, parameters; μ, δ; seed. No two agree, so that no bug cancels.
_TRAININGS: list[tuple[tuple[int, int, int], float, float, int]] = [
    ((6, 5, 4), 0.9, 0.4, 500),
    ((9, 4, 3), 0.6, 0.7, 501),
    ((5, 7, 6), 0.8, 0.5, 502),
]

ADJOINT = Exercise(
    signature="adjoint(gradients, hessians, batches, rates, momentum, decay, cotangent)",
    returns="dq/dw_i of each of the N examples, shape (N,).",
    hint="See the theorem “The adjoint of SGD with momentum” in the chapter “Through the steps”.",
    mistakes={
        "sign": "The sign is wrong: dq/dw_i is positive where more weight of the example raises "
        "q. The change on removal is −dq/dw_i.",
        "score, not derivative": "This is the score I_i = N dq/dw_i; the derivative by the weight "
        "is wanted.",
        "1/N applied": "The derivatives were divided by N. A weight enters a step with 1/B, and "
        "with nothing else.",
        "momentum dropped": "The buffer is missing: λ_v carries μ λ_g from each step to the one "
        "before it.",
        "1/N instead of 1/B": "A step's gradient is a mean over its batch: divide by the B "
        "examples of the step, not by N.",
        "missing 1/B": "The 1/B of each step is missing: its gradient is a mean over the batch.",
        "decay forgotten": "The decay is missing: a step multiplies x, and so λ_x, by 1 − ηδ.",
        "steps in the order of training": "The steps were walked in the order of training. λ is "
        "known at the end: begin with the last step.",
        "last Hessian for all steps": "The last step's Hessian was used for all: each step has "
        "that of its own x_t and batch.",
        "missing Hessians": "The Hessians are missing: x_t moves the gradient of its step, and "
        "all steps after it.",
        "Hessian along λ_x": "The Hessian was multiplied with −η λ_x. It takes λ_g, in which the "
        "buffer has its part too.",
        "every example in every step": "Every example was counted in every step: only those of "
        "the batch enter its gradient.",
    },
    problems=lambda: [Training.random(*setting).problem() for setting in _TRAININGS],
    near="term missing",
    inexact="a small term that is missing would do this.",
)
