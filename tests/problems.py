"""Small two-stage problems at their optima, and the exact answers for them.

Nothing of the reference comes from msif_lib: the models are written out a second time as
functions of flat vectors, derivatives are dense (torch.autograd.functional), training is SciPy's
BFGS followed by Newton's method, and the formulas are those of the paper on dense matrices.
The finite differences know no formula at all: they train both stages again with other weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import scipy.optimize
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from msif_lib import Stage, cross_entropy

F64 = torch.float64
ALPHAS = (0.07, 1.3)  # never 0.5, where a missing 2 alpha would not show
TOLERANCE = 1e-6


def relative_error(values: Tensor, exact: Tensor) -> float:
    """The largest over the columns of ||values - exact|| / ||exact||."""
    assert values.shape == exact.shape, (values.shape, exact.shape)
    difference = (values.to(exact) - exact).reshape(len(exact), -1).norm(dim=0)
    return float((difference / exact.reshape(len(exact), -1).norm(dim=0)).max())


def check(values: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    """The one check of a formula; test_wrong_variants.py shows what it catches."""
    error = relative_error(values, exact)
    assert error <= tolerance, f"relative error {error:.1e} above {tolerance:.1e}"


# --- losses, per example -------------------------------------------------------------------


def log_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, written out."""
    return outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Strictly convex in the outputs and not quadratic, so it needs no weight decay."""
    r = outputs - targets
    return (0.5 * r**2 + 0.1 * r**4).sum(1)


def quartic_penalty(named: dict[str, Tensor]) -> Tensor:
    """A regularizer of one's own: quartic, of other strength in embedding and head."""
    return sum(
        (0.02 if name.startswith("embedding") else 0.05) * (values**4).sum()
        for name, values in named.items()
    )


def linear_penalty(coefficients: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """A linear function of all parameters, in their order."""

    def penalty(named: dict[str, Tensor]) -> Tensor:
        return coefficients @ torch.cat([values.reshape(-1) for values in named.values()])

    return penalty


# --- models: a module for msif_lib, and the same as a function of flat vectors ---------------


class LinearEmbedding(nn.Module):
    """Linear in its weight, with the raw inputs passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sin(2 * x[:, :4]) @ self.weight.T, x], 1)


class AdditiveHead(nn.Module):
    """A fixed mixture of the embedding plus a linear function of the raw inputs.

    So the outputs are A(x) w + B(x) u, linear in both jointly, and the objective is convex.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(5, classes)
        self.register_buffer("mixture", mixture(classes))

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :2] @ self.mixture.T + self.linear(features[:, 2:])


def mixture(classes: int) -> Tensor:
    return torch.tensor([[1.0, 0.3], [-0.4, 0.9], [0.2, -1.1]], dtype=F64)[:classes]


class ConvolutionalEmbedding(nn.Module):
    """One tanh convolution, pooling, one tanh layer."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.AvgPool2d(2) if pool == "average" else nn.MaxPool2d(2)
        self.linear = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.pool(torch.tanh(self.convolution(x)))
        return torch.tanh(self.linear(maps.flatten(1)))


def linear_embed(w: Tensor, x: Tensor) -> Tensor:
    return torch.cat([torch.sin(2 * x[:, :4]) @ w.view(2, 4).T, x], 1)


def additive_head(classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    def head(h: Tensor, features: Tensor) -> Tensor:
        weight, bias = h[: 5 * classes].view(classes, 5), h[5 * classes :]
        return features[:, :2] @ mixture(classes).T + features[:, 2:] @ weight.T + bias

    return head


def mlp_embed(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w[:12].view(3, 4).T + w[12:])


def cnn_embed(pool: str) -> Callable[[Tensor, Tensor], Tensor]:
    def embed(w: Tensor, x: Tensor) -> Tensor:
        kernel, bias, weight, shift = w.split([18, 2, 16, 2])
        # The convolution as a product with 3x3 patches, the pooling as one over 2x2 blocks.
        patches = nn.functional.unfold(x, 3, padding=1)
        maps = torch.tanh(kernel.view(2, 9) @ patches + bias[:, None])
        blocks = maps.view(-1, 2, 2, 2, 2, 2).transpose(3, 4).reshape(-1, 8, 4)
        pooled = blocks.mean(2) if pool == "average" else blocks.max(2).values
        return torch.tanh(pooled @ weight.view(2, 8).T + shift)

    return embed


def linear_head(classes: int, width: int) -> Callable[[Tensor, Tensor], Tensor]:
    def head(h: Tensor, features: Tensor) -> Tensor:
        weight, bias = h[: classes * width].view(classes, width), h[classes * width :]
        return features @ weight.T + bias

    return head


# --- problems --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a problem is; m examples of 3 outputs in pretraining, n of 2 in finetuning."""

    family: str
    loss: str = "log"
    l2: tuple[float, float] = (0.05, 0.03)
    pool: str = "average"
    penalty: bool = False
    tilted: bool = False
    seed: int = 0
    m: int = 31
    n: int = 22


# Without weight decay the loss is the quartic one: cross entropy does not change when all logits
# move together, so that its Hessian is singular, and a minimum may lie at infinity.
# The minimum of a network with max pooling lies as a rule at a kink, where two pixels of a block
# tie and there is no second derivative. "tilted" adds a linear regularizer (given to Stage as a
# callable) that moves the minimum to a point without ties.
SPECS = {
    "convex": Spec("convex"),
    "convex quartic": Spec("convex", "quartic", (0.0, 0.0), seed=1),
    "convex quartic, l2 in finetuning": Spec("convex", "quartic", (0.0, 0.07), seed=2),
    "convex quartic, l2 in pretraining": Spec("convex", "quartic", (0.04, 0.0), seed=3),
    "mlp": Spec("mlp", seed=4),
    "mlp quartic, l2 in finetuning": Spec("mlp", "quartic", (0.0, 0.02), seed=5, m=37),
    "mlp quartic, l2 in pretraining": Spec("mlp", "quartic", (0.03, 0.0), seed=6),
    "mlp with a penalty": Spec("mlp", l2=(0.02, 0.01), penalty=True, seed=7),
    "cnn average": Spec("cnn", seed=8),
    "cnn max": Spec("cnn", l2=(0.3, 0.2), pool="max", tilted=True, seed=18),
}


@dataclass(frozen=True)
class Optimum:
    """A strict minimum and the Hessian there."""

    x: Tensor
    hessian: Tensor


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def newton(function: Callable[[Tensor], Tensor], x: Tensor) -> Optimum:
    """Newton's method on dense Hessians until rounding stops it; strictness is asserted."""
    best = gradient(function, x)
    for _ in range(20):
        trial = x - torch.linalg.solve(hessian(function, x), best)
        new = gradient(function, trial)
        if new.norm() >= best.norm():
            break
        x, best = trial, new
    matrix = hessian(function, x)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    # Rounding of x alone leaves a gradient of about ||H|| ||x|| eps, which 2 alpha can make large.
    limit = 1e-12 * max(1.0, float(eigenvalues[-1]))
    assert best.norm() <= limit, f"not at an optimum: gradient norm {best.norm():.1e}"
    assert eigenvalues[0] > 1e-5, "not a strict minimum"
    return Optimum(x, matrix)


def train(function: Callable[[Tensor], Tensor], start: Tensor) -> Optimum:
    """SciPy's BFGS, then :func:`newton`."""

    def value_and_gradient(x):
        x = torch.tensor(x, requires_grad=True)
        value = function(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    found = scipy.optimize.minimize(
        value_and_gradient, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-7}
    )
    return newton(function, torch.tensor(found.x))


def retrain(function: Callable[[Tensor], Tensor], near: Optimum) -> Tensor:
    """The minimum of a slightly changed function: Newton's method with the Hessian kept."""
    factor = torch.linalg.cholesky(near.hessian)
    x, best = near.x, gradient(function, near.x)
    for _ in range(100):
        trial = x - torch.cholesky_solve(best[:, None], factor)[:, 0]
        new = gradient(function, trial)
        if new.norm() >= 0.9 * best.norm():
            break
        x, best = trial, new
    assert best.norm() <= 1e-12, f"not at an optimum: gradient norm {best.norm():.1e}"
    return x


@dataclass(frozen=True)
class Pieces:
    """What the formulas are made of, dense, for T test examples."""

    g: Tensor  # (m, p_W + p_U) per-example gradients, no regularizer
    h_g: Tensor  # Hessian of G
    f_w: Tensor  # (p_W, T) gradients of the test losses
    f_t: Tensor  # (p_Theta, T)
    f_ww: Tensor  # blocks of the Hessian of F
    f_wt: Tensor
    f_tt: Tensor

    @property
    def s(self) -> Tensor:
        """The W part of H_G^-1 grad g(z_i) as columns ``(p_W, m)``, taken after the solve."""
        return torch.linalg.solve(self.h_g, self.g.T)[: len(self.f_w)]

    def case1(self) -> Tensor:
        """Eqs. 9 to 11, ``(m, T)``."""
        b = self.f_w - self.f_wt @ torch.linalg.solve(self.f_tt, self.f_t)
        return -(self.s.T @ b)

    def case2(self, alpha: float) -> Tensor:
        """Eqs. 13 to 15, ``(m, T)``."""
        eye = torch.eye(len(self.f_w), dtype=F64)
        k = torch.cat(
            [
                torch.cat([self.f_ww + 2 * alpha * eye, self.f_wt], 1),
                torch.cat([self.f_wt.T, self.f_tt], 1),
            ]
        )
        zeros = torch.zeros(len(self.f_t), self.s.shape[1], dtype=F64)
        moved = torch.linalg.solve(k, torch.cat([2 * alpha * self.s, zeros]))
        return -(moved.T @ torch.cat([self.f_w, self.f_t]))

    def schur(self, alpha: float) -> Tensor:
        """The forgetting-filter form of case 2, which is not in the paper."""
        s = self.f_ww - self.f_wt @ torch.linalg.solve(self.f_tt, self.f_wt.T)
        eye = torch.eye(len(s), dtype=F64)
        b = self.f_w - self.f_wt @ torch.linalg.solve(self.f_tt, self.f_t)
        return -((2 * alpha * torch.linalg.solve(s + 2 * alpha * eye, self.s)).T @ b)


class Problem:
    """One two-stage problem: its data, its reference, and its stages for msif_lib."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        g = torch.Generator().manual_seed(spec.seed)
        shape = {"convex": (5,), "mlp": (4,), "cnn": (1, 4, 4)}[spec.family]
        sizes = {"convex": (8, 18, 12), "mlp": (15, 12, 8), "cnn": (38, 9, 6)}[spec.family]
        self.p_w, self.p_u, self.p_t = sizes
        if spec.family == "convex":
            self.embed, heads = linear_embed, (additive_head(3), additive_head(2))
        elif spec.family == "mlp":
            self.embed, heads = mlp_embed, (linear_head(3, 3), linear_head(2, 3))
        else:
            self.embed, heads = cnn_embed(spec.pool), (linear_head(3, 2), linear_head(2, 2))
        self.head_u, self.head_t = heads
        self.loss = log_loss if spec.loss == "log" else quartic

        # Training begins at the teacher, so that the minimum is a finite one near it.
        self._teacher = [torch.randn(p, dtype=F64, generator=g) for p in sizes]
        w, u, t = self._teacher

        def examples(count: int, head: Callable, h: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, *shape, dtype=F64, generator=g)
            outputs = head(h, self.embed(w, x))
            if spec.loss == "log":
                return x, torch.multinomial(outputs.softmax(1), 1, generator=g)[:, 0]
            return x, outputs + 0.4 * torch.randn(outputs.shape, dtype=F64, generator=g)

        self.pretraining_data = examples(spec.m, self.head_u, u)
        self.finetuning_data = examples(spec.n, self.head_t, t)
        self.test_data = examples(6, self.head_t, t)
        self.new_data = examples(4, self.head_u, u)
        self.tilts = tuple(torch.zeros(self.p_w + p, dtype=F64) for p in sizes[1:])
        if spec.tilted:
            near = torch.cat([w + 0.1 * torch.randn(self.p_w, dtype=F64, generator=g), t])
            self.tilts = (
                -gradient(self.pretraining, torch.cat([w, u])),
                -gradient(lambda v: self.finetuning(*self.split(v)), near),
            )

    # --- the objectives as functions of flat vectors ---

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta[: self.p_w], theta[self.p_w :]

    def _penalty(self, w: Tensor, h: Tensor, stage: int) -> Tensor:
        value = self.spec.l2[stage] / 2 * (w @ w + h @ h)
        value = value + self.tilts[stage] @ torch.cat([w, h])
        if self.spec.penalty:
            value = value + 0.02 * (w**4).sum() + 0.05 * (h**4).sum()
        return value

    def pretraining_losses(self, theta: Tensor, data: tuple | None = None) -> Tensor:
        x, y = data or self.pretraining_data
        w, u = self.split(theta)
        return self.loss(self.head_u(u, self.embed(w, x)), y)

    def pretraining(self, theta: Tensor, weights: Tensor | None = None) -> Tensor:
        """G, or sum_j c_j g_j + R_G for given weights c."""
        losses = self.pretraining_losses(theta)
        total = losses.mean() if weights is None else weights @ losses
        return total + self._penalty(*self.split(theta), 0)

    def test_losses(self, w: Tensor, t: Tensor, data: tuple | None = None) -> Tensor:
        x, y = data or self.test_data
        return self.loss(self.head_t(t, self.embed(w, x)), y)

    def finetuning(self, w: Tensor, t: Tensor) -> Tensor:
        losses = self.test_losses(w, t, self.finetuning_data)
        return losses.mean() + self._penalty(w, t, 1)

    def proximal(self, theta: Tensor, centre: Tensor, alpha: float) -> Tensor:
        w, t = self.split(theta)
        return alpha * (w - centre) @ (w - centre) + self.finetuning(w, t)

    # --- the optima ---

    @functools.cached_property
    def pretrained(self) -> Optimum:
        return train(self.pretraining, torch.cat(self._teacher[:2]))

    @functools.cached_property
    def w(self) -> Tensor:
        return self.split(self.pretrained.x)[0]

    @functools.cached_property
    def finetuned(self) -> Optimum:
        return train(lambda t: self.finetuning(self.w, t), self._teacher[2])

    @functools.cache  # noqa: B019 (problems live as long as the session)
    def tuned(self, alpha: float) -> Optimum:
        start = torch.cat([self.w, self.finetuned.x])
        return train(lambda theta: self.proximal(theta, self.w, alpha), start)

    def second(self, alpha: float | None) -> tuple[Tensor, Tensor]:
        """(W, Theta) after finetuning."""
        return (self.w, self.finetuned.x) if alpha is None else self.split(self.tuned(alpha).x)

    # --- the exact answers ---

    @functools.cache  # noqa: B019
    def pieces(self, alpha: float | None, of_new: bool = False) -> Pieces:
        """The dense pieces: case 1 where alpha is None, else case 2."""
        w, t = self.second(alpha)
        data = self.new_data if of_new else None
        f = jacobian(lambda v: self.test_losses(*self.split(v)), torch.cat([w, t])).T
        h_f = hessian(lambda v: self.finetuning(*self.split(v)), torch.cat([w, t]))
        p = self.p_w
        return Pieces(
            g=jacobian(lambda v: self.pretraining_losses(v, data), self.pretrained.x),
            h_g=self.pretrained.hessian,
            f_w=f[:p],
            f_t=f[p:],
            f_ww=h_f[:p, :p],
            f_wt=h_f[:p, p:],
            f_tt=h_f[p:, p:],
        )

    def exact(self, alpha: float | None, of_new: bool = False) -> Tensor:
        """Scores ``(m, T)`` by the dense formulas."""
        pieces = self.pieces(alpha, of_new)
        return pieces.case1() if alpha is None else pieces.case2(alpha)

    def differences(self, direction: Tensor, alpha: float | None, step: float = 1e-4) -> Tensor:
        """d(test losses)/dt ``(T,)`` where the pretraining weights are 1/m + t direction.

        Fourth-order central differences through both trainings.
        """
        m, losses = self.spec.m, []
        for k in (-2, -1, 1, 2):
            weights = 1 / m + k * step * direction
            theta = retrain(lambda v, c=weights: self.pretraining(v, c), self.pretrained)
            w = self.split(theta)[0]
            if alpha is None:
                t = retrain(lambda v, w=w: self.finetuning(w, v), self.finetuned)
                losses.append(self.test_losses(w, t))
            else:
                tuned = retrain(lambda v, w=w: self.proximal(v, w, alpha), self.tuned(alpha))
                losses.append(self.test_losses(*self.split(tuned)))
        return (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)

    @functools.cache  # noqa: B019
    def example_differences(self, indices: tuple[int, ...], alpha: float | None) -> Tensor:
        """Scores of some examples by finite differences, ``(len(indices), T)``."""
        eye = torch.eye(self.spec.m, dtype=F64)
        return torch.stack([self.differences(eye[i], alpha) for i in indices])

    # --- the same for msif_lib ---

    def _module(self, part: str, vector: Tensor, dtype: torch.dtype) -> nn.Module:
        width = {"mlp": 3, "cnn": 2}.get(self.spec.family, 0)
        module: nn.Module
        if part == "embedding":
            if self.spec.family == "convex":
                module = LinearEmbedding()
            elif self.spec.family == "mlp":
                module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
            else:
                module = ConvolutionalEmbedding(self.spec.pool)
        else:
            classes = {"pretraining": 3, "finetuning": 2}[part]
            convex = self.spec.family == "convex"
            module = AdditiveHead(classes) if convex else nn.Linear(width, classes)
        module = module.to(dtype)
        nn.utils.vector_to_parameters(vector.to(dtype, copy=True), module.parameters())
        return module

    def stages(
        self,
        alpha: float | None = None,
        dtype: torch.dtype = F64,
        batch_sizes: tuple[int, int] = (17, 13),
        wrap: Callable = lambda data: data,
        modules: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> tuple[Stage, Stage]:
        """Both stages at their optima; `wrap` changes the form of the data."""
        w, u = self.split(self.pretrained.x)
        after, t = self.second(alpha)
        embedding = modules(self._module("embedding", w, dtype))
        moved = embedding if alpha is None else modules(self._module("embedding", after, dtype))
        loss = cross_entropy if self.spec.loss == "log" else quartic

        def stage(embedding, head, data, number):
            penalty = quartic_penalty if self.spec.penalty else None
            if self.spec.tilted:
                penalty = linear_penalty(self.tilts[number].to(dtype))
            return Stage(
                embedding,
                head,
                loss,
                wrap(cast(data, dtype)),
                l2=self.spec.l2[number],
                batch_size=batch_sizes[number],
                regularizer=penalty,
            )

        return (
            stage(embedding, self._module("pretraining", u, dtype), self.pretraining_data, 0),
            stage(moved, self._module("finetuning", t, dtype), self.finetuning_data, 1),
        )


def cast(data: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and real-valued targets in another precision."""
    inputs, targets = (part.to(dtype) if part.is_floating_point() else part for part in data)
    return inputs, targets
