"""A chain of three trainings: the scores of all its examples from one walk back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from msif_lib.study.course.exercises.problem import (
    Array,
    Exercise,
    Problem,
    definite,
    solve,
    tensor,
)


@dataclass(frozen=True)
class ThreeStages:
    """An optimum, a proximal stage and a frozen one in their second-order form, random numbers.

    Attributes
    ----------
    g_0, h_0
        First stage: gradients of the losses ``(m, W + U)`` and Hessian of the objective.
    g_1, h_1
        Second stage: gradients ``(n, W + V)``, Hessian without the pull.
    alpha
        The pull of the second stage towards what the first has left.
    g_2
        Third stage: gradients with respect to its head, ``(l, Θ)``.
    f_wt, f_tt
        Blocks of the Hessian of its objective, ``(W, Θ)`` and ``(Θ, Θ)``.
    f_w, f_t
        Gradient of the test functional.
    """

    g_0: Array
    h_0: Array
    g_1: Array
    h_1: Array
    alpha: float
    g_2: Array
    f_wt: Array
    f_tt: Array
    f_w: Array
    f_t: Array

    @classmethod
    def random(
        cls,
        examples: tuple[int, int, int],
        sizes: tuple[int, int, int, int],
        alpha: float,
        seed: int,
    ) -> ThreeStages:
        """Return stages of given numbers of examples, and of W and the three heads."""
        rng = np.random.default_rng(seed)
        w, u, v, t = sizes
        f = definite(rng, w + t, 0.1, 2.0)
        return cls(
            rng.standard_normal((examples[0], w + u)),
            definite(rng, w + u, 0.3, 2.0),
            rng.standard_normal((examples[1], w + v)),
            definite(rng, w + v, 0.1, 2.0),
            alpha,
            rng.standard_normal((examples[2], t)),
            f[:w, w:],
            f[w:, w:],
            rng.standard_normal(w),
            rng.standard_normal(t),
        )

    def k(self, pull: float, head: float = 0.0) -> Array:
        """Return K, the Hessian of the second stage with a pull on W, and on its head."""
        w = len(self.f_w)
        return self.h_1 + np.diag([pull] * w + [head] * (len(self.h_1) - w))

    def forwards(self) -> Array:
        """Return the scores, each example's change followed through the stages after it."""
        w, k = len(self.f_w), self.k(2 * self.alpha)
        zeros = np.zeros((len(k) - w, len(self.g_0)))
        first = -solve(self.h_0, self.g_0.T)[:w]
        first = solve(k, np.concatenate([2 * self.alpha * first, zeros]))[:w]
        second = -solve(k, self.g_1.T)[:w]
        third = -solve(self.f_tt, self.g_2.T)

        def of_w(d_w: Array) -> Array:
            d_t = -solve(self.f_tt, self.f_wt.T @ d_w)
            return np.asarray(self.f_w @ d_w + self.f_t @ d_t)

        return np.concatenate([of_w(first), of_w(second), self.f_t @ third])

    def walk(
        self,
        *,
        cross: float = 1.0,
        head: Callable[[Array, Array], Array] = solve,
        pull: float = 2.0,
        head_pull: float = 0.0,
        back: float | None = 2.0,
        zeros_first: bool = False,
        own: str = "",
        skip: bool = False,
        first: Callable[[Array, Array], Array] = solve,
        middle: Callable[[Array, Array], Array] = solve,
        sizes: bool = False,
        own_head: bool = False,
    ) -> Array:
        """Return the scores by one walk back, with mistakes if asked for."""
        w, alpha = len(self.f_w), self.alpha

        def padded(vector: Array, like: Array) -> Array:
            zeros = np.zeros(len(like) - w)
            return np.concatenate([zeros, vector] if zeros_first else [vector, zeros])

        u_2 = head(self.f_tt, self.f_t)
        handed = self.f_w - cross * self.f_wt @ u_2
        k = self.k(pull * alpha, head_pull * alpha)
        u_1 = middle(k, padded(handed, k))
        direction = {
            "": u_1,
            "handed back": padded(2 * alpha * u_1[:w], k),
            "not solved": padded(handed, k),
            "f_W": solve(k, padded(self.f_w, k)),
        }[own]
        b = u_1[:w] if back is None else back * alpha * u_1[:w]
        right = padded(handed if skip else b, self.h_0)
        if own_head:
            right = np.concatenate([b, u_1[w:]])
        u_0 = first(self.h_0, right)
        found = [-self.g_0 @ u_0, -self.g_1 @ direction, -self.g_2 @ u_2]
        if sizes:
            found = [one / len(one) for one in found]
        return np.concatenate(found)

    def problem(self) -> Problem:
        """Return the problem; the truth follows the changes forwards."""
        m, n, w = len(self.g_0), len(self.g_1), len(self.f_w)
        truth = self.forwards()
        per_size = self.walk(sizes=True)
        first, second, third = np.split(truth, [m, m + n])
        wrong = {
            "missing cross term": self.walk(cross=0.0),
            "cross term with the wrong sign": self.walk(cross=-1.0),
            "missing F_ΘΘ⁻¹": self.walk(head=lambda h, x: x),
            "missing 2α": self.walk(back=None),
            "α instead of 2α": self.walk(back=1.0),
            "missing 2α in K": self.walk(pull=0.0),
            "α instead of 2α in both places": self.walk(pull=1.0, back=1.0),
            "missing 2α in both places": self.walk(pull=0.0, back=None),
            "2α on the head as well": self.walk(head_pull=2.0),
            "own scores with what is handed back": self.walk(own="handed back"),
            "own scores with λ, not u": self.walk(own="not solved"),
            "own scores with f_W": self.walk(own="f_W"),
            "middle stage skipped": self.walk(skip=True),
            "zeros before W": self.walk(zeros_first=True),
            "missing K⁻¹": self.walk(middle=lambda h, x: x),
            "missing H_0⁻¹": self.walk(first=lambda h, x: x),
            "stages in reverse order": np.concatenate([third, second, first]),
            "1/N applied": per_size,
            "removal effect, not score": -per_size,
        }
        if len(self.h_0) == len(self.h_1):
            wrong["head's part handed back"] = self.walk(own_head=True)
        return Problem(
            [
                (
                    *map(tensor, (self.g_0, self.h_0, self.g_1, self.h_1)), self.alpha,
                    *map(tensor, (self.g_2, self.f_wt, self.f_tt, self.f_w, self.f_t)),
                )
            ],
            truth,
            "for each example of the three stages",
            wrong,
            {"sign": -1.0},
            {
                (): "Was it summed over the examples?",
                (m,): "Those seem to be the scores of the first stage alone.",
                (w,): "One number for each parameter of W is a cotangent, or a change of W.",
            },
        )  # fmt: skip


# Examples of the stages; sizes of W and of the three heads; α, with 2α far from 1; seed.
_Setting = tuple[tuple[int, int, int], tuple[int, int, int, int], float, int]
_STAGES: list[_Setting] = [
    ((9, 6, 7), (4, 3, 2, 5), 0.05, 500),
    ((5, 11, 4), (3, 5, 4, 2), 1.7, 501),
    ((8, 7, 10), (5, 2, 4, 3), 0.3, 502),
]
_SQUARE: list[_Setting] = [
    ((6, 6, 6), (3, 3, 3, 3), 0.3, 510),
    ((5, 5, 5), (2, 2, 2, 2), 1.7, 511),
]

CHAIN = Exercise(
    signature="chain_scores(g_0, h_0, g_1, h_1, alpha, g_2, f_w_theta, f_theta_theta, f_w, "
    "f_theta)",
    returns="I_i for every example of the three stages, those of the first stage first, shape "
    "(m + n + l,).",
    hint="See the theorem “Pull-back of an optimum” and the table “Three rows” in the chapter on "
    "a chain of trainings.",
    mistakes={
        "sign": "The sign is wrong. I is positive for an example that hurts: more of it raises q.",
        "missing cross term": "The cross term F_WΘ u is missing from what the last stage hands "
        "back: its head follows the embedding.",
        "cross term with the wrong sign": "The cross term has the wrong sign: handed back is "
        "f_W − F_WΘ u.",
        "missing F_ΘΘ⁻¹": "The solve with F_ΘΘ is missing from the last stage.",
        "missing 2α": "The factor 2α is missing from what the middle stage hands back.",
        "α instead of 2α": "α in place of 2α in what the middle stage hands back: the pull "
        "α‖W − c‖² has no ½.",
        "missing 2α in K": "2α is missing from K: the pull adds it to the diagonal of h_1 on W.",
        "α instead of 2α in both places": "α in place of 2α, in K and in what is handed back: the "
        "pull α‖W − c‖² has no ½.",
        "missing 2α in both places": "2α is missing from K and from what is handed back.",
        "2α on the head as well": "2α was added on the head of the middle stage too. The pull acts "
        "on W alone.",
        "own scores with what is handed back": "The examples of the middle stage were scored with "
        "what the stage hands back, 2α u_W. Their own direction is u, head included.",
        "own scores with λ, not u": "The examples of the middle stage were scored with its λ; the "
        "solve K u = λ comes first.",
        "own scores with f_W": "The examples of the middle stage were scored as if q stood right "
        "behind it: its λ is what the last stage hands back, f_W − F_WΘ u, not f_W.",
        "middle stage skipped": "The first stage was given what the last one hands back; it has to "
        "go through the middle stage before.",
        "zeros before W": "The zeros of the heads were put before W, but W comes first.",
        "missing K⁻¹": "The solve with K is missing from the middle stage.",
        "missing H_0⁻¹": "The solve with the Hessian of the first stage is missing.",
        "stages in reverse order": "The stages stand in the order of the walk; wanted is the order "
        "of training, the first stage first.",
        "1/N applied": "The scores of each stage were divided by its size. I is the derivative in "
        "ε; only the predicted change on removal, −I/N, has the factor 1/N.",
        "removal effect, not score": "This is −I/N, the predicted change of q when the example is "
        "removed; the score I itself is wanted.",
        "head's part handed back": "The head of the middle stage was handed back as well. A head "
        "starts anew in every stage: zeros stand there.",
    },
    problems=lambda: [ThreeStages.random(*setting).problem() for setting in _STAGES],
    square=lambda: [ThreeStages.random(*setting).problem() for setting in _SQUARE],
)
