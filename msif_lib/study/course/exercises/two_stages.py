"""Two stages: scores with a fixed and with an updated embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from msif_lib.study.course.exercises.problem import (
    Array,
    Exercise,
    Problem,
    definite,
    solve,
    tensor,
)


@dataclass(frozen=True)
class Blocks:
    """Both stages in their second-order form, with random numbers.

    Attributes
    ----------
    g
        Gradients of the pretraining losses, ``(m, W + U)``.
    h
        Hessian of the pretraining objective, definite.
    f_w, f_t
        Gradient of the test functional.
    f_ww, f_wt, f_tt
        Blocks of the Hessian of the finetuning objective, definite.
    """

    g: Array
    h: Array
    f_w: Array
    f_t: Array
    f_ww: Array
    f_wt: Array
    f_tt: Array

    @classmethod
    def random(cls, m: int, sizes: tuple[int, int, int], seed: int) -> Blocks:
        """Return blocks for m examples and given numbers of W, U and Θ."""
        rng = np.random.default_rng(seed)
        w, u, t = sizes
        f = definite(rng, w + t, 0.1, 2.0)
        return cls(
            rng.standard_normal((m, w + u)),
            definite(rng, w + u, 0.3, 2.0),
            rng.standard_normal(w),
            rng.standard_normal(t),
            f[:w, :w],
            f[:w, w:],
            f[w:, w:],
        )

    @property
    def s(self) -> Array:
        """The motions −dW/dε of the pretrained embedding, a column an example."""
        return solve(self.h, self.g.T)[: len(self.f_w)]

    @property
    def early(self) -> Array:
        """The same with the W part taken before the solve, which is wrong."""
        w = len(self.f_w)
        return solve(self.h[:w, :w], self.g[:, :w].T)

    @property
    def b(self) -> Array:
        """The gradient of the test functional along W, the head following."""
        return self.f_w - self.f_wt @ solve(self.f_tt, self.f_t)

    @property
    def tensors(self) -> list[Tensor]:
        """What both exercises are given first."""
        return [tensor(x) for x in (self.g, self.h, self.f_w, self.f_t)]

    @property
    def shapes(self) -> dict[tuple[int, ...], str]:
        """Common wrong shapes."""
        w, p, m = len(self.f_w), len(self.h), len(self.g)
        return {
            (): "Was it summed over the examples?",
            (w,): "One number for each parameter of W is b, or a change of W.",
            (p,): "One number for each parameter is a direction; multiply the gradients with it.",
            (w, m): "That looks like s_i for each example; its product with b is wanted.",
            (m, w): "That looks like s_i for each example; its product with b is wanted.",
        }

    def _rows(self, v: Array) -> Array:
        """Return −gᵀ H_G⁻¹ v for every example."""
        return -self.g @ solve(self.h, v)

    def _padded(self, b: Array, first: bool = True) -> Array:
        zeros = np.zeros(len(self.h) - len(b))
        return np.concatenate([b, zeros] if first else [zeros, b])

    def case1(self) -> Problem:
        """Return the problem of case 1; the truth follows the change forwards."""
        d_w = -self.s
        d_t = -solve(self.f_tt, self.f_wt.T @ d_w)
        m, t = len(self.g), len(self.f_t)
        b = self.b
        wrong = {
            "missing cross term": -self.f_w @ self.s,
            "cross term with the wrong sign": -(2 * self.f_w - b) @ self.s,
            "missing F_ΘΘ⁻¹": -(self.f_w - self.f_wt @ self.f_t) @ self.s,
            "F_ΘΘ instead of its inverse": -(self.f_w - self.f_wt @ self.f_tt @ self.f_t) @ self.s,
            "only the cross term": -(b - self.f_w) @ self.s,
            "W part taken before the solve": -b @ self.early,
            "swapped blocks (U before W)": self._rows(self._padded(b, first=False)),
            "missing H_G⁻¹": -self.g[:, : len(b)] @ b,
            "H_G instead of its inverse": -self.g @ self.h @ self._padded(b),
        }
        if t == len(b):
            wrong |= self._square(lambda b: -b @ self.s)
        return Problem(
            [(*self.tensors, tensor(self.f_wt), tensor(self.f_tt))],
            self.f_w @ d_w + self.f_t @ d_t,
            "for each pretraining example",
            wrong,
            {"sign": -1.0, "1/m applied": 1 / m, "removal effect, not score": -1 / m}
            | {"missing 1/m": float(m)},
            self.shapes,
        )

    def _square(self, score: Callable[[Array], Array]) -> dict[str, Array]:
        """Return mistakes that fit only where W and Θ are of the same size."""
        f_w, f_t, f_wt, f_tt = self.f_w, self.f_t, self.f_wt, self.f_tt
        return {
            "transposed cross term": score(f_w - f_wt.T @ solve(f_tt, f_t)),
            "swapped blocks": score(f_t - f_wt.T @ solve(f_tt, f_w)),
            "swapped gradients": score(f_t - f_wt @ solve(f_tt, f_w)),
        }

    def k(self, pull: float, head: float = 0.0, cross: float = 1.0) -> Array:
        """Return the matrix K with a given pull on W and on Θ, and a factor on its cross terms."""
        w, t = len(self.f_w), len(self.f_t)
        top = [self.f_ww + pull * np.eye(w), cross * self.f_wt]
        return np.block([top, [cross * self.f_wt.T, self.f_tt + head * np.eye(t)]])

    def case2(self, alpha: float) -> Problem:
        """Return the problem of case 2; the truth follows the change forwards."""
        w, t, m = len(self.f_w), len(self.f_t), len(self.g)
        f, s, b = np.concatenate([self.f_w, self.f_t]), self.s, self.b
        two = 2 * alpha

        def score(k: Array, factor: float = two, f: Array = f, s: Array = s) -> Array:
            return -f @ solve(k, np.concatenate([factor * s, np.zeros((t, s.shape[1]))]))

        def filtered(schur: Array, b: Array = b, factor: float = two) -> Array:
            return -b @ solve(schur + two * np.eye(w), factor * s)

        schur = self.f_ww - self.f_wt @ solve(self.f_tt, self.f_wt.T)
        response = 2 * self.f_ww - schur
        # K with Θ first, beside gradients with W first.
        order = np.r_[w : w + t, :w]
        other = self.k(two)[np.ix_(order, order)]
        down = np.concatenate([np.zeros((t, m)), two * s])
        wrong = {
            "missing 2α": score(self.k(two), 1.0),
            "α instead of 2α": score(self.k(two), alpha),
            "missing 2α in K": score(self.k(0.0)),
            "α instead of 2α in K": score(self.k(alpha)),
            "α instead of 2α in both places": score(self.k(alpha), alpha),
            "4α instead of 2α in both places": score(self.k(2 * two), 2 * two),
            "missing 2α in both places": score(self.k(0.0), 1.0),
            "2α on the head as well": score(self.k(two, head=two)),
            "missing cross term": score(self.k(two, cross=0.0)),
            "missing head response (f_Θ)": score(
                self.k(two), f=np.concatenate([self.f_w, np.zeros(t)])
            ),
            "missing head response (Schur)": filtered(self.f_ww),
            "wrong sign in the Schur complement": filtered(response),
            "cross term with the wrong sign": score(self.k(two, cross=-1.0)),
            "swapped blocks in K": -f @ solve(other, np.concatenate([two * s, np.zeros((t, m))])),
            "swapped blocks (f)": score(self.k(two), f=np.concatenate([self.f_t, self.f_w])),
            "swapped blocks (right-hand side)": -f @ solve(self.k(two), down),
            "case 1, no filter": -b @ s,
            "filter applied twice": -b
            @ np.linalg.matrix_power(two * np.linalg.inv(schur + two * np.eye(w)), 2)
            @ s,
            "one minus the filter": -b @ s - filtered(schur),
            "W part taken before the solve": score(self.k(two), s=self.early),
            "missing H_G⁻¹": score(self.k(two), s=self.g[:, :w].T),
        }
        if t == w:
            k = np.block([[self.f_ww + two * np.eye(w), self.f_wt.T], [self.f_wt, self.f_tt]])
            wrong["transposed cross term"] = score(k)
        return Problem(
            [(*self.tensors, *map(tensor, (self.f_ww, self.f_wt, self.f_tt)), alpha)],
            f @ solve(self.k(two), np.concatenate([-two * s, np.zeros((t, m))])),
            "for each pretraining example",
            wrong,
            {"sign": -1.0, "1/m applied": 1 / m, "removal effect, not score": -1 / m}
            | {"missing 1/m": float(m)},
            self.shapes,
        )


# Examples, sizes of W, U and Θ, seed. All differ, so that no bug cancels.
_BLOCKS: list[tuple[int, tuple[int, int, int], int]] = [
    (9, (4, 3, 5), 400),
    (11, (3, 5, 2), 401),
    (6, (5, 2, 3), 402),
]
_SQUARE: list[tuple[int, tuple[int, int, int], int]] = [(7, (4, 4, 4), 410), (5, (3, 3, 3), 411)]
# 2α far from 1, where a missing factor could not be seen.
_ALPHAS = (0.05, 1.7, 0.3)

_TWO_STAGES = {
    "sign": "The sign is wrong. I is positive for an example that hurts: more of it raises q.",
    "1/m applied": "The scores were divided by m. I is the derivative in ε; only the predicted "
    "change on removal, −I/m, has the factor 1/m.",
    "removal effect, not score": "This is −I/m, the predicted change of q when the example is "
    "removed; the score I itself is wanted.",
    "missing 1/m": "The scores are m times too large: the Hessian given is that of the mean, which "
    "has its 1/m already.",
    "W part taken before the solve": "The W part was taken before the solve. The pretraining head "
    "moves too: solve with all of H_G, then take the W part.",
    "missing H_G⁻¹": "The inverse Hessian of pretraining is missing: these are inner products with "
    "the gradients.",
    "transposed cross term": "The cross term is transposed: F_WΘ has a row for each parameter of "
    "W and a column for each of Θ.",
}

CASE1 = Exercise(
    signature="case1_scores(gradients, hessian_g, f_w, f_theta, f_w_theta, f_theta_theta)",
    returns="I_i for each of the m pretraining examples, shape (m,).",
    hint="See the theorem “Influence with a fixed embedding” and the algorithm “Scores with a "
    "fixed embedding” in the chapter on case 1.",
    mistakes=_TWO_STAGES
    | {
        "missing cross term": "The cross term is missing: the finetuned head follows the embedding "
        "(F_WΘ F_ΘΘ⁻¹ f_Θ).",
        "cross term with the wrong sign": "The cross term has the wrong sign: it is subtracted "
        "from f_W.",
        "missing F_ΘΘ⁻¹": "The inverse of F_ΘΘ is missing from the cross term.",
        "F_ΘΘ instead of its inverse": "The cross term has F_ΘΘ where its inverse belongs.",
        "only the cross term": "f_W itself is missing: only the cross term is there.",
        "swapped blocks (U before W)": "The blocks are swapped: the zeros were put before b, but "
        "W comes first in H_G.",
        "H_G instead of its inverse": "The vector was multiplied with H_G; a system with H_G has "
        "to be solved.",
        "swapped blocks": "The blocks are swapped: W and Θ have changed places.",
        "swapped gradients": "The gradients f_W and f_Θ have changed places.",
    },
    problems=lambda: [Blocks.random(*setting).case1() for setting in _BLOCKS],
    square=lambda: [Blocks.random(*setting).case1() for setting in _SQUARE],
)

CASE2 = Exercise(
    signature=(
        "case2_scores(gradients, hessian_g, f_w, f_theta, f_ww, f_w_theta, f_theta_theta, alpha)"
    ),
    returns="I_i for each of the m pretraining examples, shape (m,).",
    hint="See the theorem “Influence with an updated embedding” and the corollary “Case 2 as "
    "filtered case 1” in the chapter on case 2.",
    mistakes=_TWO_STAGES
    | {
        "missing 2α": "The factor 2α in front of s_i is missing.",
        "α instead of 2α": "α in place of 2α in front of s_i: the pull α‖W − W̄‖² has no ½.",
        "missing 2α in K": "2α is missing from K: the pull adds it to the diagonal of F_WW.",
        "α instead of 2α in K": "α in place of 2α in K: the pull α‖W − W̄‖² has no ½.",
        "α instead of 2α in both places": "α in place of 2α, in K and in front of s_i: the pull "
        "α‖W − W̄‖² has no ½.",
        "4α instead of 2α in both places": "4α in place of 2α, in K and in front of s_i.",
        "missing 2α in both places": "2α is missing from K and in front of s_i.",
        "2α on the head as well": "2α was added to F_ΘΘ too. The pull acts on the embedding alone.",
        "missing cross term": "The cross term F_WΘ is missing: from K, or, in the Schur form, "
        "both from b and from S.",
        "missing head response (f_Θ)": "f_Θ is missing: the head follows the embedding, and q "
        "depends on it.",
        "missing head response (Schur)": "F_WW stands where its Schur complement S belongs: the "
        "head's response, −F_WΘ F_ΘΘ⁻¹ F_ΘW, is missing from the curvature.",
        "wrong sign in the Schur complement": "The Schur complement has the wrong sign: the head's "
        "response is subtracted from F_WW.",
        "cross term with the wrong sign": "The cross terms of K have the wrong sign.",
        "swapped blocks in K": "The blocks of K are swapped: Θ stands first in it, W in the rest.",
        "swapped blocks (f)": "The blocks are swapped: f_Θ stands before f_W, but K has W first.",
        "swapped blocks (right-hand side)": "The blocks are swapped: the zeros stand before "
        "2α s_i, but K has W first.",
        "case 1, no filter": "This is case 1: the forgetting filter 2α (S + 2αI)⁻¹ is missing.",
        "filter applied twice": "The filter 2α (S + 2αI)⁻¹ was applied twice.",
        "one minus the filter": "This is case 1 minus case 2: what finetuning forgets, not what it "
        "keeps.",
    },
    problems=lambda: [
        Blocks.random(*setting).case2(alpha)
        for setting, alpha in zip(_BLOCKS, _ALPHAS, strict=True)
    ],
    square=lambda: [
        Blocks.random(*setting).case2(alpha)
        for setting, alpha in zip(_SQUARE, _ALPHAS[1:], strict=True)
    ],
)
