"""The grader accepts every right variant, and names what is wrong with every wrong one."""

from __future__ import annotations

import ast
import contextlib
import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from problems import F64, Problem
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp

from msif_lib.study.course import grader
from msif_lib.study.course.exercises import EXERCISES
from msif_lib.study.course.exercises.chains import ThreeStages
from msif_lib.study.course.exercises.one_stage import LinearModel
from msif_lib.study.course.exercises.two_stages import Blocks
from msif_lib.study.course.grader import check, relative_error

ROOT = Path(__file__).parents[1]
solve = torch.linalg.solve

# exercise -> variants, and exercise -> (the name of the mistake, as the grader says it; variant)
RIGHT: dict[str, dict[str, Callable[..., Any]]] = {}
WRONG: dict[str, dict[str, tuple[str, Callable[..., Any]]]] = {}


# --- hvp -----------------------------------------------------------------------------------------


def double_backward(objective, theta, v):
    point = theta.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(point), point, create_graph=True)
    return torch.autograd.grad(gradient @ v, point)[0]


def attached(objective, theta, v):
    theta.requires_grad_()  # the idiom of many: it changes a flag, not the data
    (gradient,) = torch.autograd.grad(objective(theta), theta, create_graph=True)
    return torch.autograd.grad(gradient @ v, theta, create_graph=True)[0]


def with_backward(objective, theta, v):
    point = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(point), point, create_graph=True)
    (gradient * v).sum().backward()
    return point.grad


def central_difference(objective, theta, v, t=1e-4):
    slope = grad(objective)
    return (slope(theta + t * v) - slope(theta - t * v)) / (2 * t)


def in_place(objective, theta, v):
    v /= v.norm()
    return hessian(objective)(theta) @ v


def outer_product(objective, theta, v):
    gradient = grad(objective)(theta)
    return gradient * (gradient @ v)


def no_graph_kept(objective, theta, v):
    point = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(point), point)
    return torch.autograd.grad(gradient @ v, point)[0]


def raises_its_own(objective, theta, v):
    raise KeyError("a key that <b>is</b> not there")


RIGHT["hvp"] = {
    "double backward": double_backward,
    "not detached, on the argument itself": attached,
    "backward()": with_backward,
    "forward over reverse": lambda f, t, v: jvp(grad(f), (t,), (v,))[1],
    "reverse over reverse": lambda f, t, v: vjp(grad(f), t)[1](v)[0],
    "reverse over forward": lambda f, t, v: grad(lambda x: jvp(f, (x,), (v,))[1])(t),
    "dense": lambda f, t, v: hessian(f)(t) @ v,
    "torch's own": lambda f, t, v: torch.autograd.functional.hvp(f, t, v)[1],
    "central difference": central_difference,
    "single precision": lambda f, t, v: double_backward(f, t.float(), v.float()),
    "rounded to single precision": lambda f, t, v: double_backward(f, t, v).float(),
    "a column": lambda f, t, v: double_backward(f, t, v)[:, None],
    "a row": lambda f, t, v: double_backward(f, t, v)[None],
    "NumPy": lambda f, t, v: double_backward(f, t, v).numpy(),
    "a list": lambda f, t, v: double_backward(f, t, v).tolist(),
    "a list of tensors": lambda f, t, v: list(double_backward(f, t, v)),
}
WRONG["hvp"] = {
    "sign": ("sign", lambda f, t, v: -double_backward(f, t, v)),
    "gradient": ("gradient, not product", lambda f, t, v: grad(f)(t)),
    "theta": ("product with θ, not v", lambda f, t, v: double_backward(f, t, t)),
    "outer product": ("outer product of the gradient", outer_product),
    "at zero": ("Hessian at the wrong point", lambda f, t, v: double_backward(f, 0 * t, v)),
    "no step": (
        "difference not divided by its step",
        lambda f, t, v: grad(f)(t + v) - grad(f)(t),
    ),
    "2 missing": ("factor 2", lambda f, t, v: 2 * central_difference(f, t, v)),
    "halved": ("factor 1/2", lambda f, t, v: double_backward(f, t, v) / 2),
    "diagonal": ("diagonal only", lambda f, t, v: hessian(f)(t).diagonal() * v),
    "twice": ("H applied twice", lambda f, t, v: double_backward(f, t, double_backward(f, t, v))),
    "normalised": ("v normalised", lambda f, t, v: double_backward(f, t, v / v.norm())),
    "inverse": ("inverse product", lambda f, t, v: solve(hessian(f)(t), v)),
    "v": ("v returned", lambda f, t, v: v),
    "factor": ("wrong factor", lambda f, t, v: 0.7 * double_backward(f, t, v)),
    "coarse step": (
        "step of a wrong size, it seems",
        lambda f, t, v: central_difference(f, t, v, 0.1),
    ),
    "scalar": ("wrong shape", lambda f, t, v: grad(f)(t) @ v),
    "matrix": ("wrong shape", lambda f, t, v: hessian(f)(t)),
    "too long": ("wrong shape", lambda f, t, v: torch.cat([v, v])),
    "zero": ("zero", lambda f, t, v: 0 * v),
    "NaN": ("NaN or infinity", lambda f, t, v: double_backward(f, t, v) / 0 * 0),
    "in place": ("argument changed in place", in_place),
    "pair": ("wrong type", lambda f, t, v: (f(t), double_backward(f, t, v))),
    "text": ("wrong type", lambda f, t, v: "H v"),
    "function": ("wrong type", lambda f, t, v: double_backward),
    "no graph": ("exception", no_graph_kept),
    "own exception": ("exception", raises_its_own),
    "arguments": ("exception", lambda f, t: t),
    "lucky": ("not recognised", lambda f, t, v: double_backward(f, t, v) if len(v) == 3 else 9 * v),
    "sign of theta": (
        "product with θ, not v; sign",
        lambda f, t, v: -double_backward(f, t, t),
    ),
    "two unnamed": (
        "not recognised",
        lambda f, t, v: hessian(f)(0 * t).diagonal() * t + double_backward(f, t, v),
    ),
}


# --- conjugate gradients -------------------------------------------------------------------------


def cg(matvec, b, tol):
    x, r, d = torch.zeros_like(b), b.clone(), b.clone()
    while r.norm() > tol * b.norm():
        ad = matvec(d)
        step = (r @ r) / (d @ ad)
        x, new = x + step * d, r - step * ad
        d, r = new + (new @ new) / (r @ r) * d, new
    return x


def cg_in_place(matvec, b, tol):
    x, r = torch.zeros_like(b), b.clone()
    d, rr = r.clone(), r @ r
    target = tol**2 * rr
    for _ in range(10 * len(b)):
        if rr <= target:
            break
        ad = matvec(d)
        step = rr / d.dot(ad)
        x += step * d
        r -= step * ad
        old, rr = rr, r @ r
        d *= rr / old
        d += r
    return x


def cg_true_residual(matvec, b, tol):
    x = torch.zeros_like(b)
    r = d = b - matvec(x)
    while r.norm() / b.norm() > tol:
        x = x + (r @ d) / (d @ matvec(d)) * d
        r = b - matvec(x)
        ad = matvec(d)
        d = r - (r @ ad) / (d @ ad) * d
    return x


def cg_scipy(matvec, b, tol):
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import cg as scipy_cg

    a = LinearOperator((len(b), len(b)), lambda v: matvec(torch.as_tensor(v).ravel()).numpy())
    return scipy_cg(a, b.numpy(), rtol=tol, atol=0)[0]


def minres_scipy(matvec, b, tol):
    from scipy.sparse.linalg import LinearOperator, minres

    a = LinearOperator(
        (len(b), len(b)), lambda v: matvec(torch.as_tensor(v).ravel()).numpy(), dtype=float
    )
    return torch.tensor(minres(a, b.numpy(), rtol=tol / 1000)[0])


def cg_wrong(
    *, steps=None, absolute=False, squared=False, beta="right", returns="x", fixed_tol=None
):
    def solver(matvec, b, tol):
        tol = fixed_tol or tol
        x, r, d = torch.zeros_like(b), b.clone(), b.clone()
        done = 0
        while done != steps:
            norm = r @ r if squared else r.norm()
            if steps is None and norm <= tol * (1 if absolute else b @ b if squared else b.norm()):
                break
            ad = matvec(d)
            step = (r @ r) / (d @ ad)
            x, new = x + step * d, r - step * ad
            ratio = (new @ new) / (r @ r)
            ratio = {"right": ratio, "missing": 0, "inverted": 1 / ratio, "sign": -ratio}[beta]
            d, r, done = new + ratio * d, new, done + 1
        return {"x": x, "r": r, "-x": -x, "pair": (x, done)}[returns]

    return solver


def cg_spoils_b(matvec, b, tol):
    x, r, norm = torch.zeros_like(b), b, b.norm()
    d = r.clone()
    while r.norm() > tol * norm:
        ad, rr = matvec(d), r @ r
        x += rr / (d @ ad) * d
        r -= rr / (d @ ad) * ad
        d = r + (r @ r) / rr * d
    return x


def never_ends(matvec, b, tol):
    while True:
        matvec(b)


def column_by_column(matvec, b, tol):
    a = torch.stack([matvec(e) for e in torch.eye(len(b), dtype=b.dtype)], 1)
    return solve(a, b)


RIGHT["conjugate_gradient"] = {
    "as in the chapter": cg,
    "in place, on its own tensors": cg_in_place,
    "the residual measured anew, other formulas": cg_true_residual,
    "SciPy's": cg_scipy,
    "MINRES": minres_scipy,
    "more exact than asked": lambda a, b, tol: cg(a, b, tol / 10),
    "a column": lambda a, b, tol: cg(a, b, tol)[:, None],
    "a list": lambda a, b, tol: cg(a, b, tol).tolist(),
}
WRONG["conjugate_gradient"] = {
    "ten steps": ("unconverged solve", cg_wrong(steps=10)),
    "one step": ("unconverged solve", cg_wrong(steps=1)),
    "own tolerance": ("unconverged solve", cg_wrong(fixed_tol=1e-2)),
    "sign of the direction": ("too many products", cg_wrong(beta="sign")),
    "no stopping rule": ("does not end", never_ends),
    "absolute": ("absolute tolerance", cg_wrong(absolute=True)),
    "squared": ("unconverged solve (squared norm)", cg_wrong(squared=True)),
    "steepest descent": ("too many products", cg_wrong(beta="missing")),
    "column by column": ("too many products", column_by_column),
    "inverted": ("unconverged solve", cg_wrong(beta="inverted", steps=500)),
    "NaN": ("NaN or infinity", lambda a, b, tol: cg(a, b, tol) * torch.nan),
    "residual": ("residual returned", cg_wrong(returns="r")),
    "sign": ("sign", cg_wrong(returns="-x")),
    "pair": ("wrong type", cg_wrong(returns="pair")),
    "product": ("product, not solution", lambda a, b, tol: a(b)),
    "identity": ("right-hand side returned", lambda a, b, tol: b),
    "twice": ("solved twice", lambda a, b, tol: cg(a, cg(a, b, tol), tol)),
    "spoils b": ("argument changed in place", cg_spoils_b),
    "zero": ("residual returned", lambda a, b, tol: 0 * b),
    "single precision": ("unconverged solve", lambda a, b, tol: cg_in_place(a, b.float(), tol)),
    "minus A b": ("product, not solution; sign", lambda a, b, tol: -a(b)),
    "@": ("exception", lambda a, b, tol: a @ b),
}


# --- one stage -----------------------------------------------------------------------------------


def influence(
    losses,
    test_losses,
    l2,
    theta,
    *,
    decay=1.0,
    total=torch.mean,
    q=torch.sum,
    system=solve,
    own_decay=0.0,
    centred=False,
):
    h = hessian(lambda t: total(losses(t)) + decay * l2 / 2 * t @ t)(theta)
    g = jacrev(losses)(theta) + own_decay * l2 * theta
    g = g - g.mean(0) if centred else g
    return -g @ system(h, grad(lambda t: q(test_losses(t)))(theta))


def influence_by_cg(losses, test_losses, l2, theta, tol=1e-8):
    def objective(t):
        return losses(t).mean() + l2 / 2 * (t**2).sum()

    point = theta.clone().requires_grad_()
    (b,) = torch.autograd.grad(test_losses(point).sum(), point)
    v = cg(lambda x: double_backward(objective, theta, x), b, tol)
    return -jvp(losses, (theta,), (v,))[1]


def influence_by_loop(losses, test_losses, l2, theta):
    inverse = torch.linalg.inv(hessian(lambda t: losses(t).mean() + l2 / 2 * t @ t)(theta))
    b = grad(lambda t: test_losses(t).sum())(theta)
    found = []
    for i in range(len(losses(theta))):
        gradient = grad(lambda t, i=i: losses(t)[i])(theta)
        found.append(-b @ inverse @ gradient)
    return found


def influence_by_difference(losses, test_losses, l2, theta, epsilon=1e-4):
    """The definition: train with a little more weight."""
    found = []
    for i in range(len(losses(theta))):
        ends = [
            newton(lambda t, e=e, i=i: losses(t).mean() + e * losses(t)[i] + l2 / 2 * t @ t, theta)
            for e in (epsilon, -epsilon)
        ]
        up, down = (test_losses(end).sum() for end in ends)
        found.append(float(up - down) / (2 * epsilon))
    return found


def newton(objective, theta, steps=6):
    for _ in range(steps):
        theta = theta - solve(hessian(objective)(theta), grad(objective)(theta))
    return theta


def neumann(losses, test_losses, l2, theta, steps=4):
    """LiSSA, stopped too early."""
    h = hessian(lambda t: losses(t).mean() + l2 / 2 * t @ t)(theta)
    b = grad(lambda t: test_losses(t).sum())(theta)
    v = b
    for _ in range(steps):
        v = b + v - 0.3 * h @ v
    return -jacrev(losses)(theta) @ (0.3 * v)


def partly(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, **options)


RIGHT["influence"] = {
    "dense": influence,
    "conjugate gradients, one forward sweep": influence_by_cg,
    "a loop, right to left": influence_by_loop,
    "differences through training": influence_by_difference,
    "least squares": partly(influence, system=lambda h, b: torch.linalg.lstsq(h, b[:, None])[0]),
    "single precision": lambda f, q, l2, t: influence(f, q, l2, t.float()),
    "a row": lambda *a: influence(*a)[None],
    "NumPy": lambda *a: influence(*a).numpy(),
}
WRONG["influence"] = {
    "sign": ("sign", lambda *a: -influence(*a)),
    "1/m": ("1/m applied", lambda *a: influence(*a) / len(a[0](a[3]))),
    "removal": ("removal effect, not score", lambda *a: -influence(*a) / len(a[0](a[3]))),
    "times m": ("missing 1/m", lambda *a: influence(*a) * len(a[0](a[3]))),
    "sum": ("sum instead of mean", partly(influence, total=torch.sum)),
    "test mean": ("mean over the test set", partly(influence, q=torch.mean)),
    "no decay": ("regularizer dropped", partly(influence, decay=0.0)),
    "decay without its half": ("weight decay doubled", partly(influence, decay=2.0)),
    "half of the decay": ("weight decay halved", partly(influence, decay=0.5)),
    "decay in each": ("regularizer in every example", partly(influence, own_decay=1.0)),
    "centred": ("regularizer in every example", partly(influence, centred=True)),
    "identity": ("identity instead of H⁻¹", partly(influence, system=lambda h, b: b)),
    "not inverted": ("H instead of H⁻¹", partly(influence, system=lambda h, b: h @ b)),
    "twice": ("inverse applied twice", partly(influence, system=lambda h, b: solve(h @ h, b))),
    "training loss": ("training loss for q", lambda f, q, l2, t: influence(f, f, l2, t)),
    "decay in q": (
        "regularizer in q",
        lambda f, q, l2, t: influence(f, lambda t: q(t) + l2 / 2 * t @ t / len(q(t)), l2, t),
    ),
    "self": (
        "self-influence",
        lambda f, q, l2, t: torch.stack(
            [influence(f, lambda t, i=i: f(t)[i], l2, t)[i] for i in range(len(f(t)))]
        ),
    ),
    "loose solve": ("unconverged solve, it seems", partly(influence_by_cg, tol=0.05)),
    "short series": ("not recognised", partly(neumann, steps=2)),
    "sign and sum": ("sum instead of mean; sign", lambda *a: -influence(*a, total=torch.sum)),
    "no decay, mean of the tests": (
        "regularizer dropped; mean over the test set",
        partly(influence, decay=0.0, q=torch.mean),
    ),
    "sum and decay in each": ("not recognised", partly(influence, total=torch.sum, own_decay=1.0)),
    "parameters": ("wrong shape", lambda f, q, l2, t: grad(lambda t: q(t).sum())(t)),
    "pairs": ("wrong shape", lambda f, q, l2, t: jacrev(f)(t) @ jacrev(q)(t).T),
    "summed": ("wrong shape", lambda *a: influence(*a).sum()),
    "NaN": ("NaN or infinity", lambda *a: influence(*a).log()),
}


def retrained(
    losses,
    test_losses,
    l2,
    theta,
    i,
    *,
    weight=lambda m: 1 / m,
    own=lambda m: 0.0,
    decay=1.0,
    q=torch.sum,
    steps=6,
):
    m = len(losses(theta))
    weights = torch.full((m,), weight(m), dtype=theta.dtype)
    weights[i] = own(m)
    end = newton(lambda t: weights @ losses(t) + decay * l2 / 2 * t @ t, theta, steps)
    return q(test_losses(end)) - q(test_losses(theta))


def retrained_by_lbfgs(losses, test_losses, l2, theta, i):
    keep = torch.arange(len(losses(theta))) != i
    point = torch.zeros_like(theta, requires_grad=True)
    optimiser = torch.optim.LBFGS([point], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = losses(point)[keep].sum() / len(keep) + l2 / 2 * point.pow(2).sum()
        value.backward()
        return value

    optimiser.step(closure)
    return (test_losses(point) - test_losses(theta)).sum()


def retrained_by_descent(losses, test_losses, l2, theta, i, steps=600):
    point = theta.clone().requires_grad_()
    for _ in range(steps):
        each = losses(point)
        value = (each.sum() - each[i]) / len(each) + l2 / 2 * point @ point
        (slope,) = torch.autograd.grad(value, point)
        point = (point - 0.3 * slope).detach().requires_grad_()
    return (test_losses(point).sum() - test_losses(theta).sum()).item()


def retrained_by_scipy(losses, test_losses, l2, theta, i):
    from scipy.optimize import minimize

    def value(t):
        t = torch.tensor(t, requires_grad=True)
        each = losses(t)
        v = (each.sum() - each[i]) / len(each) + l2 / 2 * t @ t
        return v.item(), torch.autograd.grad(v, t)[0].numpy()

    end = minimize(value, theta.numpy(), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    return float(test_losses(torch.tensor(end)).sum()) - float(test_losses(theta).sum())


def spoils_theta(losses, test_losses, l2, theta, i):
    before = test_losses(theta).sum()
    for _ in range(500):
        f = lambda t: (losses(t).sum() - losses(t)[i]) / len(losses(t)) + l2 / 2 * t @ t  # noqa: E731
        theta -= 0.3 * grad(f)(theta)
    return test_losses(theta).sum() - before


RIGHT["retraining"] = {
    "Newton": retrained,
    "L-BFGS from zero": retrained_by_lbfgs,
    "gradient descent": retrained_by_descent,
    "SciPy": retrained_by_scipy,
    "in a list": lambda *a: [retrained(*a)],
}
WRONG["retraining"] = {
    "sign": ("sign", lambda *a: -retrained(*a)),
    "renormalised": (
        "renormalised, not fixed weight",
        partly(retrained, weight=lambda m: 1 / (m - 1)),
    ),
    "sum": ("sum instead of mean", partly(retrained, weight=lambda m: 1.0)),
    "no decay": ("regularizer dropped", partly(retrained, decay=0.0)),
    "decay without its half": ("weight decay doubled", partly(retrained, decay=2.0)),
    "half of the decay": ("weight decay halved", partly(retrained, decay=0.5)),
    "test mean": ("mean over the test set", partly(retrained, q=torch.mean)),
    "prediction": (
        "first order, not retrained",
        lambda *a: -influence(*a[:4])[a[4]] / len(a[0](a[3])),
    ),
    "prediction, wrong sign": (
        "first order, not retrained; sign",
        lambda *a: influence(*a[:4])[a[4]] / len(a[0](a[3])),
    ),
    "weighted up": ("example weighted up", partly(retrained, own=lambda m: 2 / m)),
    "not removed": ("zero", partly(retrained, own=lambda m: 1 / m)),
    "not trained": ("zero", partly(retrained, steps=0)),
    "trained a little": ("not recognised", partly(retrained_by_descent, steps=3)),
    "trained too little": (
        "unconverged training, it seems",
        partly(retrained_by_descent, steps=50),
    ),
    "one after": ("wrong example", lambda *a: retrained(*a[:4], (a[4] + 1) % len(a[0](a[3])))),
    "one before": ("wrong example (one before)", lambda *a: retrained(*a[:4], a[4] - 1)),
    "the others removed": (
        "kept only the example",
        partly(retrained, weight=lambda m: 0.0, own=lambda m: 1 / m),
    ),
    "not a change": ("loss, not its change", lambda *a: retrained(*a) + a[1](a[3]).sum()),
    "divided by m": ("1/m applied", lambda *a: retrained(*a) / len(a[0](a[3]))),
    "times m": ("missing 1/m", lambda *a: retrained(*a) * len(a[0](a[3]))),
    "per test example": ("wrong shape", partly(retrained, q=lambda x: x)),
    "in place": ("argument changed in place", spoils_theta),
    "renormalised without decay, backwards": (
        "regularizer dropped; sign",
        lambda *a: -retrained(*a, weight=lambda m: 1 / (m - 1), decay=0.0),
    ),
}


# --- two stages ----------------------------------------------------------------------------------


def case1(
    gradients,
    hessian_g,
    f_w,
    f_theta,
    f_w_theta,
    f_theta_theta,
    *,
    cross=1.0,
    head=solve,
    pad=lambda b, zeros: torch.cat([b, zeros]),
    system=solve,
    own=1.0,
):
    b = own * f_w - cross * f_w_theta @ head(f_theta_theta, f_theta)
    zeros = torch.zeros(len(hessian_g) - len(b), dtype=b.dtype)
    return -gradients @ system(hessian_g, pad(b, zeros))


def case1_right_to_left(g, h, f_w, f_t, f_wt, f_tt):
    found = []
    for gradient in g:
        s = torch.linalg.inv(h) @ gradient
        d_w = -s[: len(f_w)]
        d_t = -torch.linalg.inv(f_tt) @ f_wt.T @ d_w
        found.append(f_w @ d_w + f_t @ d_t)
    return torch.stack(found)


def case1_schur(g, h, f_w, f_t, f_wt, f_tt):
    """U eliminated from the system with H_G."""
    p = len(f_w)
    b = f_w - f_wt @ torch.cholesky_solve(f_t[:, None], torch.linalg.cholesky(f_tt))[:, 0]
    curvature = h[:p, :p] - h[:p, p:] @ solve(h[p:, p:], h[p:, :p])
    along = g[:, :p] - g[:, p:] @ solve(h[p:, p:], h[p:, :p])
    return -along @ solve(curvature, b)


def case1_cg(g, h, f_w, f_t, f_wt, f_tt, tol=1e-8):
    b = f_w - f_wt @ cg(lambda v: f_tt @ v, f_t, tol)
    b = torch.nn.functional.pad(b, (0, len(h) - len(b)))
    return -g @ cg(lambda v: h @ v, b, tol)


def early(g, h, f_w, f_t, f_wt, f_tt):
    p = len(f_w)
    return case1(g[:, :p], h[:p, :p], f_w, f_t, f_wt, f_tt)


def transposed(g, h, f_w, f_t, f_wt, f_tt):
    return case1(g, h, f_w, f_t, f_wt.T, f_tt)


def spoils_f_w(g, h, f_w, f_t, f_wt, f_tt):
    f_w -= f_wt @ solve(f_tt, f_t)
    return -(solve(h, g.T)[: len(f_w)].T @ f_w)


RIGHT["case1"] = {
    "two solves": case1,
    "m solves": case1_right_to_left,
    "Schur complement": case1_schur,
    "conjugate gradients": case1_cg,
    "single precision": lambda *a: case1(*(x.float() for x in a)),
    "a column": lambda *a: case1(*a)[:, None],
    "NumPy": lambda *a: case1(*a).numpy(),
    "not detached": lambda *a: case1(*(x.requires_grad_() for x in a)),
}
WRONG["case1"] = {
    "sign": ("sign", lambda *a: -case1(*a)),
    "1/m": ("1/m applied", lambda *a: case1(*a) / len(a[0])),
    "removal": ("removal effect, not score", lambda *a: -case1(*a) / len(a[0])),
    "times m": ("missing 1/m", lambda *a: case1(*a) * len(a[0])),
    "no cross term": ("missing cross term", partly(case1, cross=0.0)),
    "cross term added": ("cross term with the wrong sign", partly(case1, cross=-1.0)),
    "no inverse of the head": ("missing F_ΘΘ⁻¹", partly(case1, head=lambda h, x: x)),
    "head not inverted": ("F_ΘΘ instead of its inverse", partly(case1, head=torch.matmul)),
    "cross term alone": ("only the cross term", partly(case1, own=0.0)),
    "early": ("W part taken before the solve", early),
    "zeros first": (
        "swapped blocks (U before W)",
        partly(case1, pad=lambda b, zeros: torch.cat([zeros, b])),
    ),
    "identity": ("missing H_G⁻¹", partly(case1, system=lambda h, b: b)),
    "not inverted": ("H_G instead of its inverse", partly(case1, system=torch.matmul)),
    "transposed": ("transposed cross term", transposed),
    "W and Theta swapped": (
        "swapped blocks",
        lambda g, h, f_w, f_t, f_wt, f_tt: case1(g, h, f_t, f_w, f_wt.T, f_tt),
    ),
    "gradients swapped": (
        "swapped gradients",
        lambda g, h, f_w, f_t, f_wt, f_tt: case1(g, h, f_t, f_w, f_wt, f_tt),
    ),
    "no padding": ("exception", partly(case1, pad=lambda b, zeros: b)),
    "s_i": ("wrong shape", lambda g, h, f_w, *_: solve(h, g.T)[: len(f_w)]),
    "b": ("wrong shape", lambda g, h, f_w, f_t, f_wt, f_tt: f_w - f_wt @ solve(f_tt, f_t)),
    "loose solve": ("unconverged solve, it seems", partly(case1_cg, tol=0.03)),
    "in place": ("argument changed in place", spoils_f_w),
    "sign, no cross term": ("missing cross term; sign", lambda *a: -case1(*a, cross=0.0)),
    "early, no cross term": (
        "not recognised",
        lambda g, h, f_w, f_t, f_wt, f_tt: early(g, h, f_w, f_t, 0 * f_wt, f_tt),
    ),
    "not symmetric": ("NaN or infinity", lambda *a: case1(*a) / (a[2] @ a[2] * 0)),
}


def case2(
    gradients,
    hessian_g,
    f_w,
    f_theta,
    f_ww,
    f_w_theta,
    f_theta_theta,
    alpha,
    *,
    front=2.0,
    pull=2.0,
    cross=1.0,
    head_pull=0.0,
    front_is=None,
):
    p, t = len(f_w), len(f_theta)
    eye = torch.eye(p + t, dtype=f_w.dtype)
    k = torch.cat(
        [
            torch.cat([f_ww, cross * f_w_theta], 1),
            torch.cat([cross * f_w_theta.T, f_theta_theta], 1),
        ]
    )
    k = k + alpha * torch.diag(eye.new_tensor([pull] * p + [head_pull] * t))
    v = solve(k, torch.cat([f_w, f_theta]))[:p]
    b = (front * alpha if front_is is None else front_is) * v
    padded = torch.cat([b, b.new_zeros(len(hessian_g) - p)])
    return -gradients @ solve(hessian_g, padded)


def case2_filter(g, h, f_w, f_t, f_ww, f_wt, f_tt, alpha, *, schur=1.0, follow=1.0, times=1):
    s = solve(h, g.T)[: len(f_w)]
    curvature = f_ww - schur * f_wt @ solve(f_tt, f_wt.T)
    sigma, vectors = torch.linalg.eigh(curvature)
    b = f_w - follow * f_wt @ solve(f_tt, f_t)
    return -((2 * alpha / (sigma + 2 * alpha)) ** times * (b @ vectors)) @ (vectors.T @ s)


def case2_head_first(g, h, f_w, f_t, f_ww, f_wt, f_tt, alpha):
    """Θ before W, everywhere: as the paper prints (15), aligned."""
    p, t = len(f_w), len(f_t)
    k = torch.cat(
        [
            torch.cat([f_tt, f_wt.T], 1),
            torch.cat([f_wt, f_ww + 2 * alpha * torch.eye(p, dtype=f_w.dtype)], 1),
        ]
    )
    s = solve(h, g.T)[:p]
    x = solve(k, torch.cat([s.new_zeros(t, len(g)), 2 * alpha * s]))
    return -torch.cat([f_t, f_w]) @ x


def case2_stacked(kind):
    def function(g, h, f_w, f_t, f_ww, f_wt, f_tt, alpha):
        p, t = len(f_w), len(f_t)
        eye = 2 * alpha * torch.eye(p, dtype=f_w.dtype)
        k = torch.cat([torch.cat([f_ww + eye, f_wt], 1), torch.cat([f_wt.T, f_tt], 1)])
        other = torch.cat([torch.cat([f_tt, f_wt.T], 1), torch.cat([f_wt, f_ww + eye], 1)])
        s, f = 2 * alpha * solve(h, g.T)[:p], torch.cat([f_w, f_t])
        right = torch.cat([s, s.new_zeros(t, len(g))])
        if kind == "K":
            k = other
        elif kind == "f":
            f = torch.cat([f_t, f_w])
        elif kind == "right-hand side":
            right = torch.cat([s.new_zeros(t, len(g)), s])
        elif kind == "transposed":
            k = torch.cat([torch.cat([f_ww + eye, f_wt.T], 1), torch.cat([f_wt, f_tt], 1)])
        elif kind == "f_Θ":
            f = torch.cat([f_w, 0 * f_t])
        elif kind == "early":
            early = 2 * alpha * solve(h[:p, :p], g[:, :p].T)
            right = torch.cat([early, s.new_zeros(t, len(g))])
        elif kind == "H_G":
            right = torch.cat([2 * alpha * g[:, :p].T, s.new_zeros(t, len(g))])
        return -f @ solve(k, right)

    return function


RIGHT["case2"] = {
    "two solves": case2,
    "m solves": case2_stacked("right"),
    "filter": case2_filter,
    "head first": case2_head_first,
    "single precision": lambda *a: case2(*(x.float() for x in a[:-1]), a[-1]),
    "a row": lambda *a: case2(*a)[None],
    "a list": lambda *a: list(case2(*a)),
    "divided by 2α": lambda *a: case2(*a, front_is=1.0) * 2 * a[-1],
}
WRONG["case2"] = {
    "sign": ("sign", lambda *a: -case2(*a)),
    "1/m": ("1/m applied", lambda *a: case2(*a) / len(a[0])),
    "removal": ("removal effect, not score", lambda *a: -case2(*a) / len(a[0])),
    "times m": ("missing 1/m", lambda *a: case2(*a) * len(a[0])),
    "no 2α": ("missing 2α", partly(case2, front_is=1.0)),
    "α": ("α instead of 2α", partly(case2, front=1.0)),
    "no 2α in K": ("missing 2α in K", partly(case2, pull=0.0)),
    "α in K": ("α instead of 2α in K", partly(case2, pull=1.0)),
    "α in both": ("α instead of 2α in both places", partly(case2, pull=1.0, front=1.0)),
    "4α in both": ("4α instead of 2α in both places", partly(case2, pull=4.0, front=4.0)),
    "no 2α at all": ("missing 2α in both places", partly(case2, pull=0.0, front_is=1.0)),
    "all of K": ("2α on the head as well", partly(case2, head_pull=2.0)),
    "no cross term": ("missing cross term", partly(case2, cross=0.0)),
    "no cross term, in the Schur form": (
        "missing cross term",
        partly(case2_filter, schur=0.0, follow=0.0),
    ),
    "cross term, wrong sign": ("cross term with the wrong sign", partly(case2, cross=-1.0)),
    "no head response in S": ("missing head response (Schur)", partly(case2_filter, schur=0.0)),
    "no head response in b": ("missing head response (f_Θ)", case2_stacked("f_Θ")),
    "S with a plus": ("wrong sign in the Schur complement", partly(case2_filter, schur=-1.0)),
    "K swapped": ("swapped blocks in K", case2_stacked("K")),
    "f swapped": ("swapped blocks (f)", case2_stacked("f")),
    "zeros first": ("swapped blocks (right-hand side)", case2_stacked("right-hand side")),
    "transposed": ("transposed cross term", case2_stacked("transposed")),
    "case 1": ("case 1, no filter", partly(case2_filter, times=0)),
    "filtered twice": ("filter applied twice", partly(case2_filter, times=2)),
    "forgotten": (
        "one minus the filter",
        lambda *a: case2_filter(*a, times=0) - case2_filter(*a),
    ),
    "early": ("W part taken before the solve", case2_stacked("early")),
    "identity": ("missing H_G⁻¹", case2_stacked("H_G")),
    "sign, no 2α": ("missing 2α; sign", lambda *a: -case2(*a, front_is=1.0)),
    "no cross term, no 2α": ("not recognised", partly(case2, cross=0.0, front_is=1.0)),
    "no cross term, α in both": ("not recognised", partly(case2, cross=0.0, pull=1.0, front=1.0)),
    "s_i": ("wrong shape", lambda g, h, f_w, *_: solve(h, g.T)[: len(f_w)].T),
}


# --- three stages --------------------------------------------------------------------------------


def chain(
    g_0,
    h_0,
    g_1,
    h_1,
    alpha,
    g_2,
    f_wt,
    f_tt,
    f_w,
    f_t,
    *,
    cross=1.0,
    pull=2.0,
    head_pull=0.0,
    front=2.0,
    front_is=None,
    head=solve,
    middle=solve,
    first=solve,
    own=lambda k, lam, u, handed: u,
    pad=lambda vector, zeros: torch.cat([vector, zeros]),
    between=lambda handed, lam: handed,
    finish=lambda scores: torch.cat(scores),
):
    p = len(f_w)
    u_2 = head(f_tt, f_t)
    lam = f_w - cross * f_wt @ u_2
    padded = pad(lam, lam.new_zeros(len(h_1) - p))
    k = h_1 + alpha * torch.diag(lam.new_tensor([pull] * p + [head_pull] * (len(h_1) - p)))
    u_1 = middle(k, padded)
    handed = (front * alpha if front_is is None else front_is) * u_1[:p]
    direction = own(k, padded, u_1, pad(handed, lam.new_zeros(len(h_1) - p)))
    handed = between(handed, lam)
    u_0 = first(h_0, pad(handed, handed.new_zeros(len(h_0) - p)))
    return finish([-g_0 @ u_0, -g_1 @ direction, -g_2 @ u_2])


def chain_at_once(g_0, h_0, g_1, h_1, alpha, g_2, f_wt, f_tt, f_w, f_t):
    """One system for all three trainings, the chain rule as a block triangular matrix."""
    p, a, b = len(f_w), len(h_0), len(h_1)
    system = torch.block_diag(h_0, h_1, f_tt)
    at_1, at_2 = slice(a, a + p), slice(a + b, None)
    system[at_1, at_1] += 2 * alpha * torch.eye(p, dtype=f_w.dtype)
    system[at_1, :p] = -2 * alpha * torch.eye(p, dtype=f_w.dtype)
    system[at_2, at_1] = f_wt.T
    of_q = torch.cat([f_w.new_zeros(a), f_w, f_w.new_zeros(b - p), f_t])
    return -torch.block_diag(g_0, g_1, g_2) @ solve(system.T, of_q)


def chain_forwards(g_0, h_0, g_1, h_1, alpha, g_2, f_wt, f_tt, f_w, f_t):
    p = len(f_w)
    k = h_1.clone()
    k.diagonal()[:p] += 2 * alpha

    def of_w(d_w):
        return f_w @ d_w - f_t @ solve(f_tt, f_wt.T @ d_w)

    s = solve(h_0, g_0.T)[:p]
    d_w = -torch.linalg.inv(k)[:p, :p] @ (2 * alpha * s)
    return [*of_w(d_w), *of_w(-solve(k, g_1.T)[:p]), *(-f_t @ solve(f_tt, g_2.T))]


def head_handed_back(g_0, h_0, g_1, h_1, alpha, g_2, f_wt, f_tt, f_w, f_t):
    """Wants as many parameters in the first head as in the second."""
    p = len(f_w)
    pull = torch.zeros(len(h_1), dtype=f_w.dtype)
    pull[:p] = 2 * alpha
    u_2 = solve(f_tt, f_t)
    u_1 = solve(h_1 + pull.diag(), torch.cat([f_w - f_wt @ u_2, 0 * pull[p:]]))
    u_0 = solve(h_0, torch.cat([2 * alpha * u_1[:p], u_1[p:]]))
    return -torch.cat([g_0 @ u_0, g_1 @ u_1, g_2 @ u_2])


def with_f_w(*a):
    """The middle stage's own examples scored as if q stood right behind it."""
    w = len(a[8])
    return chain(*a, own=lambda k, lam, u, handed: solve(k, torch.cat([a[8], 0 * lam[w:]])))


RIGHT["chain"] = {
    "one walk back": chain,
    "one system": chain_at_once,
    "forwards": chain_forwards,
    "single precision": lambda *a: chain(*(x.float() if torch.is_tensor(x) else x for x in a)),
    "a column": lambda *a: chain(*a)[:, None],
    "NumPy": lambda *a: chain(*a).numpy(),
    "divided by 2α": lambda *a: chain(*a, front_is=1.0, between=lambda b, _: 2 * a[4] * b),
}
WRONG["chain"] = {
    "sign": ("sign", lambda *a: -chain(*a)),
    "1/N": ("1/N applied", partly(chain, finish=lambda s: torch.cat([x / len(x) for x in s]))),
    "removal": (
        "removal effect, not score",
        partly(chain, finish=lambda s: -torch.cat([x / len(x) for x in s])),
    ),
    "no cross term": ("missing cross term", partly(chain, cross=0.0)),
    "cross term added": ("cross term with the wrong sign", partly(chain, cross=-1.0)),
    "no inverse of the head": ("missing F_ΘΘ⁻¹", partly(chain, head=lambda h, x: x)),
    "no 2α": ("missing 2α", partly(chain, front_is=1.0)),
    "α": ("α instead of 2α", partly(chain, front=1.0)),
    "no 2α in K": ("missing 2α in K", partly(chain, pull=0.0)),
    "α in both": ("α instead of 2α in both places", partly(chain, pull=1.0, front=1.0)),
    "no 2α at all": ("missing 2α in both places", partly(chain, pull=0.0, front_is=1.0)),
    "all of K": ("2α on the head as well", partly(chain, head_pull=2.0)),
    "scored with what is handed back": (
        "own scores with what is handed back",
        partly(chain, own=lambda k, lam, u, handed: handed),
    ),
    "scored with its cotangent": (
        "own scores with λ, not u",
        partly(chain, own=lambda k, lam, u, handed: lam),
    ),
    "scored with another cotangent": ("own scores with f_W", with_f_w),
    "skipped": ("middle stage skipped", partly(chain, between=lambda handed, lam: lam)),
    "zeros first": (
        "zeros before W",
        partly(chain, pad=lambda vector, zeros: torch.cat([zeros, vector])),
    ),
    "K not solved": ("missing K⁻¹", partly(chain, middle=lambda h, x: x)),
    "identity": ("missing H_0⁻¹", partly(chain, first=lambda h, x: x)),
    "backwards": (
        "stages in reverse order",
        partly(chain, finish=lambda scores: torch.cat(scores[::-1])),
    ),
    "head handed back": ("head's part handed back", head_handed_back),
    "no padding": ("exception", partly(chain, pad=lambda vector, zeros: vector)),
    "first stage only": ("wrong shape", partly(chain, finish=lambda scores: scores[0])),
    "three tensors": ("wrong type", partly(chain, finish=tuple)),
    "sign, no cross term": ("missing cross term; sign", lambda *a: -chain(*a, cross=0.0)),
    "no cross term, no 2α": ("not recognised", partly(chain, cross=0.0, front_is=1.0)),
}


# --- through steps -------------------------------------------------------------------------------


def adjoint(
    gradients,
    hessians,
    batches,
    rates,
    momentum,
    decay,
    cotangent,
    *,
    keep_buffer=1.0,
    decays=1.0,
    curvature=lambda hessians, t: hessians[t],
    order=lambda steps: range(steps)[::-1],
    size=lambda batch, n: len(batch),
    chosen=lambda batch, n: batch,
    along=lambda of_g, of_x, eta: of_g,
    finish=lambda found: found,
):
    steps, n, _ = gradients.shape
    found = gradients.new_zeros(n)
    of_x, of_v = cotangent.clone(), torch.zeros_like(cotangent)
    for t in order(steps):
        batch, eta = batches[t], rates[t]
        of_g = of_v - eta * of_x
        drawn = chosen(batch, n)
        found[drawn] += gradients[t, drawn] @ of_g / size(batch, n)
        product = curvature(hessians, t) @ along(of_g, of_x, eta)
        of_x = (1 - decays * eta * decay) * of_x + product
        of_v = keep_buffer * momentum * of_g
    return finish(found)


def adjoint_by_autograd(gradients, hessians, batches, rates, momentum, decay, cotangent):
    """Steps that have these gradients and Hessians, backpropagated through."""
    weights = gradients.new_ones(len(gradients[0]), requires_grad=True)
    x = v = torch.zeros_like(cotangent)
    for g, h, batch, eta in zip(gradients, hessians, batches, rates, strict=True):
        v = momentum * v + weights[batch] @ g[batch] / len(batch) + h @ (x - x.detach())
        x = (1 - eta * decay) * x - eta * v
    return torch.autograd.grad(cotangent @ x, weights)[0]


def adjoint_forwards(gradients, hessians, batches, rates, momentum, decay, cotangent):
    found = []
    for i in range(len(gradients[0])):
        d_x = d_v = torch.zeros_like(cotangent)
        for t, batch in enumerate(batches):
            own = gradients[t, i] / len(batch) if i in batch else 0 * d_x
            d_v = momentum * d_v + hessians[t] @ d_x + own
            d_x = (1 - rates[t] * decay) * d_x - rates[t] * d_v
        found.append(cotangent @ d_x)
    return found


def adjoint_in_single_precision(gradients, hessians, batches, rates, momentum, decay, cotangent):
    g, h, r, c = (x.float() for x in (gradients, hessians, rates, cotangent))
    return adjoint(g, h, batches, r, momentum, decay, c)


def adjoint_spoils_the_cotangent(g, h, batches, rates, momentum, decay, cotangent):
    answer = adjoint(g, h, batches, rates, momentum, decay, cotangent)
    cotangent *= 1 - rates[0] * decay
    return answer


RIGHT["adjoint"] = {
    "backwards": adjoint,
    "backpropagation": adjoint_by_autograd,
    "forwards, a list": adjoint_forwards,
    "single precision": adjoint_in_single_precision,
    "a column": lambda *a: adjoint(*a)[:, None],
    "NumPy": lambda *a: adjoint(*a).numpy(),
}
WRONG["adjoint"] = {
    "sign": ("sign", lambda *a: -adjoint(*a)),
    "times N": ("score, not derivative", lambda *a: adjoint(*a) * len(a[0][0])),
    "divided by N": ("1/N applied", lambda *a: adjoint(*a) / len(a[0][0])),
    "no buffer": ("momentum dropped", partly(adjoint, keep_buffer=0.0)),
    "N": ("1/N instead of 1/B", partly(adjoint, size=lambda batch, n: n)),
    "sums": ("missing 1/B", partly(adjoint, size=lambda batch, n: 1)),
    "no decay": ("decay forgotten", partly(adjoint, decays=0.0)),
    "first step first": ("steps in the order of training", partly(adjoint, order=range)),
    "at the end": (
        "last Hessian for all steps",
        partly(adjoint, curvature=lambda hessians, t: hessians[-1]),
    ),
    "gradients alone": (
        "missing Hessians",
        partly(adjoint, curvature=lambda hessians, t: 0 * hessians[t]),
    ),
    "along λ_x": (
        "Hessian along λ_x",
        partly(adjoint, along=lambda of_g, of_x, eta: -eta * of_x),
    ),
    "batches unread": (
        "every example in every step",
        partly(adjoint, chosen=lambda batch, n: torch.arange(n)),
    ),
    "sign, no decay": ("decay forgotten; sign", lambda *a: -adjoint(*a, decays=0.0)),
    "no buffer, no decay": ("not recognised", partly(adjoint, keep_buffer=0.0, decays=0.0)),
    "summed": ("wrong shape", partly(adjoint, finish=torch.sum)),
    "in place": ("argument changed in place", adjoint_spoils_the_cotangent),
}


# --- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in RIGHT for variant in RIGHT[name]]
)
def test_a_right_variant_passes(name: str, variant: str) -> None:
    verdict = check(name, RIGHT[name][variant])
    assert verdict.passed and verdict.state == "passed" and not verdict.kind, verdict


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in WRONG for variant in WRONG[name]]
)
def test_a_wrong_variant_is_refused_with_its_name(name: str, variant: str) -> None:
    kind, function = WRONG[name][variant]
    verdict = check(name, function)
    assert not verdict.passed and verdict.state == "failed"
    assert verdict.kind == kind, verdict
    assert len(verdict.message) > 40 and "Wanted: " in verdict.message
    assert "chapter" in verdict.hint and "Traceback" not in str(verdict)


def test_there_is_a_wrong_variant_for_every_mistake_that_the_grader_names() -> None:
    for name, exercise in EXERCISES.items():
        kinds = {kind for kind, _ in WRONG[name].values()}
        assert set(exercise.mistakes) <= kinds, set(exercise.mistakes) - kinds


@pytest.mark.parametrize("name", EXERCISES)
def test_no_two_mistakes_give_the_same_answers_and_none_the_right_ones(name: str) -> None:
    exercise = EXERCISES[name]
    for problems in (exercise.problems(), exercise.square()):
        if not problems:
            continue
        answers = {"": [p.truth for p in problems]}
        answers |= {k: [p.factors[k] * p.truth for p in problems] for k in problems[0].factors}
        answers |= {k: [p.wrong[k] for p in problems] for k in problems[0].wrong}
        kinds = list(answers)
        for index, one in enumerate(kinds):
            for other in kinds[index + 1 :]:
                apart = [
                    min(relative_error(x, y), relative_error(y, x))
                    for x, y in zip(answers[one], answers[other], strict=True)
                ]
                # Answers within ten tolerances are given the name of a mistake.
                assert max(apart) > 20 * exercise.tolerance, (one, other)


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("nothing", [None, ...])
def test_a_stub_is_not_done_yet(name: str, nothing: Any) -> None:
    verdict = check(name, lambda *_: nothing)
    assert verdict.state == "not done" and not verdict.passed
    assert "nothing yet" in verdict.message and not verdict.hint


@pytest.mark.parametrize("name", EXERCISES)
def test_an_answer_right_on_one_problem_only_is_refused(name: str) -> None:
    right = next(iter(RIGHT[name].values()))
    calls = []

    def lucky(*arguments):
        answer = torch.as_tensor(right(*arguments))
        calls.append(answer)
        return answer if len(calls) == 1 else 1.5 * answer + answer.abs().max()

    assert not check(name, lucky).passed
    assert len(calls) > 2


def test_what_an_exception_says_is_shown_with_its_line_and_without_a_traceback() -> None:
    verdict = check("hvp", raises_its_own)
    assert "KeyError" in verdict.message and "raise KeyError" in verdict.message
    advice = check("hvp", no_graph_kept).message
    assert "create_graph=True" in advice and "theta (3,)" in advice
    shapes = check("case1", WRONG["case1"]["no padding"][1]).message
    assert "hessian_g (7, 7)" in shapes
    assert "hvp(objective, theta, v)" in check("hvp", lambda f, t: t).message


def test_a_function_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader, "TIME_LIMIT", 0.2)

    def endless(objective, theta, v):
        while True:
            pass

    def stubborn(objective, theta, v):
        while True:
            with contextlib.suppress(Exception):
                endless(objective, theta, v)

    assert check("hvp", endless).kind == "does not end"
    assert check("hvp", stubborn).kind == "does not end"


def test_a_function_that_exits_does_not_end_the_notebook() -> None:
    verdict = check("hvp", lambda objective, theta, v: sys.exit(1))
    assert verdict.kind == "exception" and "SystemExit" in verdict.message


def test_the_verdict_is_legible_everywhere() -> None:
    for verdict in (check("hvp", f) for f in (double_backward, raises_its_own, lambda *_: None)):
        shown = verdict._repr_html_()
        # A foreground of its own with the background, and words besides the colour.
        assert "background:" in shown and ";color:" in shown and 'role="note"' in shown
        assert "<b>is</b>" not in shown and "<b>is</b>" not in verdict._repr_markdown_()
        assert "right" in shown or "not done yet" in shown
        assert str(verdict) == repr(verdict) and verdict.title in str(verdict)


def test_the_examples_of_the_docstring_run() -> None:
    options = doctest.ELLIPSIS
    assert doctest.testmod(grader, optionflags=options) == doctest.TestResults(0, 2)


def test_bad_calls_of_the_grader_are_refused() -> None:
    with pytest.raises(ValueError, match="known: hvp, conjugate_gradient"):
        check("hpv", double_backward)
    with pytest.raises(TypeError, match="not its result"):
        check("hvp", None)  # type: ignore[arg-type]


# --- the truths, held against other ones ---------------------------------------------------------


@pytest.mark.parametrize("name", ["influence", "hvp"])
def test_the_derivatives_of_the_problems_are_those_of_pytorch(name: str) -> None:
    reference = {"influence": influence_by_difference, "hvp": central_difference}[name]
    for problem in EXERCISES[name].problems():
        found = np.asarray(reference(*problem.calls[0]))
        assert relative_error(found, problem.truth) < 1e-5


def test_the_truth_of_ridge_regression_is_that_of_the_normal_equations() -> None:
    model = LinearModel("ridge", (9, 4, 3), 0.3, 300)
    rest = np.arange(9) != 4
    x, y = model.x[rest], model.y[rest]
    theta = np.linalg.solve(x.T @ x / 9 + 0.3 * np.eye(3), x.T @ y / 9)
    change = 0.5 * ((model.x_test @ theta - model.y_test) ** 2).sum() - model.q(model.theta)
    assert EXERCISES["retraining"].problems()[0].truth[1] == pytest.approx(change, rel=1e-10)


@pytest.mark.parametrize("alpha", [None, 0.2])
def test_the_truth_of_two_stages_is_that_of_trained_ones(
    convex: Problem, alpha: float | None
) -> None:
    pieces = convex.pieces(alpha)
    f_w, f_t = pieces.f_w.sum(1), pieces.f_t.sum(1)
    blocks = Blocks(
        *(x.numpy() for x in (pieces.g, pieces.h_g, f_w, f_t, pieces.f_ww, pieces.f_wt)),
        pieces.f_tt.numpy(),
    )
    problem = blocks.case1() if alpha is None else blocks.case2(alpha)
    exact: Tensor = convex.exact(alpha).sum(1)
    assert exact.dtype == F64
    assert relative_error(problem.truth, exact.numpy()) < 1e-6


@pytest.mark.parametrize("seed", [520, 521])
def test_the_truth_of_three_stages_is_that_of_trained_ones(seed: int) -> None:
    w, a = 3, ThreeStages.random((5, 4, 6), (3, 2, 4, 3), 0.3, seed)
    rng = np.random.default_rng(0)
    slopes = [rng.standard_normal(len(h)) for h in (a.h_0, a.h_1, a.f_tt)]

    def q(epsilon: float, stage: int, example: int) -> float:
        """Minimise three quadratics in a row, one example's weight changed."""
        linear = [slope.copy() for slope in slopes]
        linear[stage] += epsilon * (a.g_0, a.g_1, a.g_2)[stage][example]
        x_0 = -np.linalg.solve(a.h_0, linear[0])
        linear[1][:w] -= 2 * a.alpha * x_0[:w]
        x_1 = -np.linalg.solve(a.k(2 * a.alpha), linear[1])
        theta = -np.linalg.solve(a.f_tt, linear[2] + a.f_wt.T @ x_1[:w])
        return float(a.f_w @ x_1[:w] + a.f_t @ theta)

    differences = [
        (q(1e-3, stage, i) - q(-1e-3, stage, i)) / 2e-3
        for stage, gradients in enumerate((a.g_0, a.g_1, a.g_2))
        for i in range(len(gradients))
    ]
    assert relative_error(np.array(differences), a.problem().truth) < 1e-9


# --- the cells of the chapters -------------------------------------------------------------------


def cells_with_a_check() -> list[tuple[str, str, str]]:
    """Chapter, tag and source of every cell that calls the grader."""
    found = []
    for path in sorted((ROOT / "book" / "chapters").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and 'check("' in cell.source:
                (tag,) = {"exercise", "solution"} & set(cell.metadata.tags)
                found.append((path.stem, tag, cell.source))
    return found


def test_the_chapters_ask_for_every_function_and_solve_it() -> None:
    cells = cells_with_a_check()
    names: dict[str, Any] = {"torch": torch}
    # As in the notebooks: what one solution imports the next one has.
    for _, tag, source in cells:
        body, call = source.rsplit("\n", 1)
        name, function = re.fullmatch(r'check\("(\w+)", (\w+)\)', call).groups()
        exec(body, names)
        verdict = check(name, names[function])
        assert verdict.state == {"exercise": "not done", "solution": "passed"}[tag], verdict
        assert function == EXERCISES[name].signature.split("(")[0]
        if tag == "exercise":
            assert names[function].__doc__
    assert {tag for _, tag, _ in cells} == {"exercise", "solution"}
    asked = [
        re.findall(r'check\("(\w+)"', source)[0] for _, tag, source in cells if tag == "exercise"
    ]
    assert sorted(asked) == sorted(EXERCISES)


# --- the exercises as a student runs them --------------------------------------------------------


SOLUTIONS = """
import torch
from torch.func import grad, hessian, jacrev, jvp


def hvp(objective, theta, v):
    return jvp(grad(objective), (theta,), (v,))[1]


def conjugate_gradient(matvec, b, tol):
    x, r, d = torch.zeros_like(b), b, b
    while r.norm() > tol * b.norm():
        ad = matvec(d)
        a = (r @ r) / (d @ ad)
        x, new = x + a * d, r - a * ad
        d, r = new + (new @ new) / (r @ r) * d, new
    return x


def influence_scores(losses, test_losses, l2, theta):
    h = hessian(lambda t: losses(t).mean() + l2 / 2 * t @ t)(theta)
    v = torch.linalg.solve(h, grad(lambda t: test_losses(t).sum())(theta))
    return -jacrev(losses)(theta) @ v


def leave_one_out(losses, test_losses, l2, theta, i):
    def objective(t):
        each = losses(t)
        return (each.sum() - each[i]) / len(each) + l2 / 2 * t @ t

    new = theta
    for _ in range(20):
        new = new - torch.linalg.solve(hessian(objective)(new), grad(objective)(new))
    return test_losses(new).sum() - test_losses(theta).sum()


def case1_scores(gradients, hessian_g, f_w, f_theta, f_w_theta, f_theta_theta):
    b = f_w - f_w_theta @ torch.linalg.solve(f_theta_theta, f_theta)
    s = torch.linalg.solve(hessian_g, gradients.T)[: len(b)]
    return -b @ s


def case2_scores(
    gradients, hessian_g, f_w, f_theta, f_ww, f_w_theta, f_theta_theta, alpha
):
    b = f_w - f_w_theta @ torch.linalg.solve(f_theta_theta, f_theta)
    schur = f_ww - f_w_theta @ torch.linalg.solve(f_theta_theta, f_w_theta.T)
    pull = 2 * alpha * torch.eye(len(b), dtype=b.dtype)
    s = torch.linalg.solve(hessian_g, gradients.T)[: len(b)]
    return -b @ torch.linalg.solve(schur + pull, 2 * alpha * s)


def chain_scores(g_0, h_0, g_1, h_1, alpha, g_2, f_w_theta, f_theta_theta, f_w, f_theta):
    p = len(f_w)
    u_2 = torch.linalg.solve(f_theta_theta, f_theta)
    handed = torch.zeros(len(h_1), dtype=f_w.dtype)
    handed[:p] = f_w - f_w_theta @ u_2
    pull = torch.zeros_like(handed)
    pull[:p] = 2 * alpha
    u_1 = torch.linalg.solve(h_1 + pull.diag(), handed)
    first = torch.zeros(len(h_0), dtype=f_w.dtype)
    first[:p] = (pull * u_1)[:p]
    return -torch.cat([g_0 @ torch.linalg.solve(h_0, first), g_1 @ u_1, g_2 @ u_2])


def adjoint(gradients, hessians, batches, rates, momentum, decay, cotangent):
    found = torch.zeros_like(gradients[0, :, 0])
    of_x, of_v = cotangent, torch.zeros_like(cotangent)
    for t in reversed(range(len(rates))):
        batch, eta = batches[t], rates[t]
        of_g = of_v - eta * of_x
        found[batch] += gradients[t, batch] @ of_g / len(batch)
        of_x = (1 - eta * decay) * of_x + hessians[t] @ of_g
        of_v = momentum * of_g
    return found
"""


def run_exercises(folder: Path) -> str:
    """Return what ``pytest exercises`` prints for a student's copy."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return process.stdout + process.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The exercises as they were given out, whatever the reader has written into them since."""
    folder = Path(shutil.copytree(ROOT / "exercises", tmp_path / "exercises"))
    tree = ast.parse((folder / "influence.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = node.body[:1]  # the docstring
    (folder / "influence.py").write_text(ast.unparse(tree))
    return folder


def test_untouched_exercises_are_skipped(copy: Path) -> None:
    text = run_exercises(copy)
    assert re.search(rf"\b{len(EXERCISES)} skipped\b", text) and "not done yet" in text, text
    assert "failed" not in text


def test_right_solutions_pass(copy: Path) -> None:
    (copy / "influence.py").write_text(SOLUTIONS)
    text = run_exercises(copy)
    assert re.search(rf"\b{len(EXERCISES)} passed\b", text), text


def test_a_wrong_solution_is_told_what_is_wrong(copy: Path) -> None:
    (copy / "influence.py").write_text(
        SOLUTIONS.replace("return -b @ s\n", "return b @ s / len(gradients)\n")
    )
    text = run_exercises(copy)
    assert re.search(rf"\b1 failed, {len(EXERCISES) - 1} passed\b", text), text
    assert "case1: not right yet (removal effect, not score)" in text
    assert "Traceback" not in text and "def test_exercise" not in text


def test_the_stubs_and_the_tests_name_the_same_functions() -> None:
    text = (ROOT / "exercises" / "influence.py").read_text()
    tests = (ROOT / "exercises" / "test_exercises.py").read_text()
    for name, exercise in EXERCISES.items():
        function = exercise.signature.split("(")[0]
        (arguments,) = re.findall(rf"def {function}\(\s*(.*?)\s*\) ->", text, re.S)
        assert [part.split(":")[0].strip() for part in arguments.split(",") if part.strip()] == (
            exercise.arguments
        )
        assert f'"{name}": "{function}"' in tests
