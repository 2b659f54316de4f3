"""Tests of the tests: wrong formulas that the checks of test_formulas.py must refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import ALPHAS, F64, Pieces, Problem, check
from torch import Tensor

pytestmark = pytest.mark.numeric
CHOSEN = (0, 5, 11, 20)


def _k(pieces: Pieces, alpha: float, factor: float = 2.0) -> Tensor:
    eye = torch.eye(len(pieces.f_w), dtype=F64)
    top = torch.cat([pieces.f_ww + factor * alpha * eye, pieces.f_wt], 1)
    return torch.cat([top, torch.cat([pieces.f_wt.T, pieces.f_tt], 1)])


def _assembled(
    pieces: Pieces, k: Tensor, factor: float, s: Tensor | None = None, f: Tensor | None = None
) -> Tensor:
    """Eq. 15 from parts, any of which may be wrong: -f' K^-1 [factor s; 0]."""
    s = pieces.s if s is None else s
    f = torch.cat([pieces.f_w, pieces.f_t]) if f is None else f
    padded = torch.cat([factor * s, torch.zeros(len(pieces.f_t), s.shape[1], dtype=F64)])
    return -(torch.linalg.solve(k, padded).T @ f)


def _early_w_part(pieces: Pieces) -> Tensor:
    """The W part taken before the solve, with the W block of H_G alone."""
    p = len(pieces.f_w)
    return torch.linalg.solve(pieces.h_g[:p, :p], pieces.g[:, :p].T)


def _scaled_s(pieces: Pieces, l2: float, m: int, kind: str) -> Tensor:
    """s_i with a wrong H_G or a wrong gradient; l2 is that of pretraining."""
    eye = torch.eye(len(pieces.h_g), dtype=F64)
    h, g = pieces.h_g, pieces.g
    if kind == "l2 forgotten":
        h = h - l2 * eye
    elif kind == "sum instead of mean":
        h = m * (h - l2 * eye) + l2 * eye
    return torch.linalg.solve(h, g.T)[: len(pieces.f_w)]


def _b(pieces: Pieces) -> Tensor:
    return pieces.f_w - pieces.f_wt @ torch.linalg.solve(pieces.f_tt, pieces.f_t)


def _sines(size: int, row: Tensor) -> Tensor:
    return torch.outer(torch.arange(size).to(F64).sin(), row)


CASE1 = {
    "sign flipped": lambda q, p: -p.case1(),
    "cross term dropped": lambda q, p: -(p.s.T @ p.f_w),
    "cross term added, not subtracted (algorithm 1, misread)": lambda q, p: (
        -(p.s.T @ (p.f_w + p.f_wt @ torch.linalg.solve(p.f_tt, p.f_t)))
    ),
    "identity for the head's Hessian": lambda q, p: -(p.s.T @ (p.f_w - p.f_wt @ p.f_t)),
    "W part taken before the solve": lambda q, p: -(_early_w_part(p).T @ _b(p)),
    "head's gradient in place of zeros": lambda q, p: (
        -p.g @ torch.linalg.solve(p.h_g, torch.cat([_b(p), 0.1 * _sines(q.p_u, p.f_w[0])]))
    ),
    "1/m applied": lambda q, p: p.case1() / q.spec.m,
    "1/n in place of the mean": lambda q, p: p.case1() * q.spec.m / q.spec.n,
    "sum instead of mean": lambda q, p: (
        -(_scaled_s(p, q.spec.l2[0], q.spec.m, "sum instead of mean").T @ _b(p))
    ),
    "l2 forgotten in pretraining": lambda q, p: (
        -(_scaled_s(p, q.spec.l2[0], q.spec.m, "l2 forgotten").T @ _b(p))
    ),
    "l2 forgotten in finetuning": lambda q, p: (
        -(
            p.s.T
            @ (
                p.f_w
                - p.f_wt
                # Singular: the same constant added to every class's output changes no loss.
                @ torch.linalg.pinv(
                    p.f_tt - q.spec.l2[1] * torch.eye(q.p_t, dtype=F64), hermitian=True
                )
                @ p.f_t
            )
        )
    ),
    "regularizer added to every example": lambda q, p: (
        -(torch.linalg.solve(p.h_g, (p.g + q.spec.l2[0] * q.pretrained.x).T)[: q.p_w].T @ _b(p))
    ),
    "examples in another order": lambda q, p: p.case1().roll(1, 0),
    "mean over the test set": lambda q, p: p.case1() / p.f_w.shape[1],
}


def _swapped(q: Problem, p: Pieces, alpha: float) -> Tensor:
    """Eq. 15 stacks (Theta, W), eq. 13 (W, Theta); taken together without aligning them."""
    swapped = torch.cat([p.f_t, p.f_w])
    return _assembled(p, _k(p, alpha), 2 * alpha, f=swapped)


CASE2 = {
    "sign flipped": lambda q, p, a: -p.case2(a),
    "2 alpha missing in front": lambda q, p, a: _assembled(p, _k(p, a), 1.0),
    "alpha for 2 alpha in front": lambda q, p, a: _assembled(p, _k(p, a), a),
    "2 alpha missing in K": lambda q, p, a: _assembled(p, _k(p, a, 0.0), 2 * a),
    "alpha for 2 alpha in K": lambda q, p, a: _assembled(p, _k(p, a, 1.0), 2 * a),
    "alpha for 2 alpha in both": lambda q, p, a: _assembled(p, _k(p, a, 1.0), a),
    "cross term dropped": lambda q, p, a: _assembled(p, _k(p, a) * _block_diagonal(q), 2 * a),
    "blocks swapped": _swapped,
    "case 1 in place of case 2": lambda q, p, a: p.case1(),
    "W part taken before the solve": lambda q, p, a: _assembled(
        p, _k(p, a), 2 * a, _early_w_part(p)
    ),
    "1/m applied": lambda q, p, a: p.case2(a) / q.spec.m,
    "sum instead of mean": lambda q, p, a: _assembled(
        p, _k(p, a), 2 * a, _scaled_s(p, q.spec.l2[0], q.spec.m, "sum instead of mean")
    ),
    "l2 forgotten in pretraining": lambda q, p, a: _assembled(
        p, _k(p, a), 2 * a, _scaled_s(p, q.spec.l2[0], q.spec.m, "l2 forgotten")
    ),
    "l2 forgotten in finetuning": lambda q, p, a: _assembled(
        p, _k(p, a) - q.spec.l2[1] * torch.eye(q.p_w + q.p_t, dtype=F64), 2 * a
    ),
    "Hessian of pretraining taken at W*": lambda q, p, a: _assembled(
        p, _k(p, a), 2 * a, _s_at_tuned(q, p, a)
    ),
}


def _block_diagonal(q: Problem) -> Tensor:
    mask = torch.zeros(q.p_w + q.p_t, q.p_w + q.p_t, dtype=F64)
    mask[: q.p_w, : q.p_w] = mask[q.p_w :, q.p_w :] = 1
    return mask


def _s_at_tuned(q: Problem, p: Pieces, alpha: float) -> Tensor:
    """s_i at the finetuned embedding, where it belongs to the pretrained one."""
    theta = torch.cat([q.second(alpha)[0], q.split(q.pretrained.x)[1]])
    h = torch.autograd.functional.hessian(q.pretraining, theta)
    g = torch.autograd.functional.jacobian(q.pretraining_losses, theta)
    return torch.linalg.solve(h, g.T)[: q.p_w]


def _pearson(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.sum(1), b.sum(1))[0, 1])


def _refused(values: Tensor, q: Problem, alpha: float | None) -> None:
    """Both checks, against the dense reference and against retraining, must say no."""
    with pytest.raises(AssertionError, match="relative error"):
        check(values, q.exact(alpha))
    with pytest.raises(AssertionError, match="relative error"):
        check(values.sum(1), q.exact(alpha).sum(1))
    with pytest.raises(AssertionError, match="relative error"):
        check(values[list(CHOSEN)], q.example_differences(CHOSEN, alpha))


@pytest.mark.parametrize("name", CASE1)
def test_wrong_variants_of_case_1_are_refused(convex, mlp, cnn, name):
    for q in (convex, mlp, cnn):
        _refused(CASE1[name](q, q.pieces(None)), q, None)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", CASE2)
def test_wrong_variants_of_case_2_are_refused(convex, mlp, name, alpha):
    for q in (convex, mlp):
        _refused(CASE2[name](q, q.pieces(alpha), alpha), q, alpha)


@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_the_right_formula_passes_the_same_checks(convex, mlp, cnn, alpha):
    for q in (convex, mlp, cnn):
        check(q.exact(alpha)[list(CHOSEN)], q.example_differences(CHOSEN, alpha))


@pytest.mark.parametrize("name", ["1/m applied", "mean over the test set"])
def test_pearson_does_not_see_a_wrong_scale(mlp, name):
    wrong = CASE1[name](mlp, mlp.pieces(None))
    assert _pearson(wrong, mlp.exact(None)) > 1 - 1e-12


def test_pearson_does_not_see_a_missing_two_alpha(mlp):
    for alpha in ALPHAS:
        wrong = CASE2["2 alpha missing in front"](mlp, mlp.pieces(alpha), alpha)
        assert _pearson(wrong, mlp.exact(alpha)) > 1 - 1e-12


def test_alpha_one_half_would_hide_a_missing_two_alpha(mlp):
    pieces = mlp.pieces(ALPHAS[0])
    check(_assembled(pieces, _k(pieces, 0.5), 1.0), pieces.case2(0.5), 1e-12)


def test_pearson_hardly_sees_subtle_errors(convex, mlp, cnn):
    """Wrong formulas with r > 0.95 on some problem: the sign and the scale are the least of it."""
    found = {
        name
        for q in (convex, mlp, cnn)
        for name, variant in CASE1.items()
        if _pearson(variant(q, q.pieces(None)), q.exact(None)) > 0.95
    }
    assert {"regularizer added to every example", "l2 forgotten in finetuning"} <= found
