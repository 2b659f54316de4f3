"""Links one by one: stopped training against matrix exponentials, curvatures, Lanczos."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import scipy.linalg
import torch
from chains import EMBEDDING, Fit, Fits, examples, mlp, randomised, weights_of
from hypothesis import given
from hypothesis import strategies as st
from problems import F64, check, log_loss, relative_error
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from msif_lib import Chain, Stage
from msif_lib.lanczos import functions_of
from msif_lib.links import Asked, Frozen, Optimum, Proximal, Stopped, Unrolled
from msif_lib.solvers import Dense, FailedSolve, SolverWarning
from msif_lib.training import SGD, AdamW, descend

pytestmark = pytest.mark.numeric

HEAD = ["head.weight", "head.bias"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- stopped: the flow of a quadratic model ------------------------------------------------------


def dense(one: Fit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H of what is trained, ∂²J/∂x∂c, ∇ℓ_i ``(N, p_x)`` and x of a fit where its model stands."""
    c = one.flat(one.base, [name for name in one.shared if name not in one.trained])
    fixed = [name for name in one.shared if name not in one.trained]

    def named(x: Tensor, c: Tensor) -> dict[str, Tensor]:
        return one.base | one.unflat(c, fixed) | one.unflat(x, one.trained)

    def objective(x: Tensor, c: Tensor) -> Tensor:
        squares = sum(part.square().sum() for part in named(x, c).values())
        return one.weights @ one.losses(named(x, c)) / one.size + 0.5 * one.l2 * squares

    x = one.flat(one.base, one.trained)
    mixed = jacrev(jacrev(objective), argnums=1)(x, c) if fixed else torch.zeros(len(x), 0).to(F64)
    slopes = jacrev(lambda x: one.losses(named(x, c)))(x)
    return hessian(objective)(x, c), mixed, slopes, x


def flowed(
    matrix: Tensor, sources: Tensor, tau: float, scale: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """How the end of a flow moves with its start ``(p, p)`` and with constant forces ``(p, s)``.

    dx/dt = −P (A x + force) − δ x, with one exponential of the system extended by its forces.
    """
    p, s = sources.shape
    extended = torch.zeros(p + s, p + s, dtype=F64)
    extended[:p, :p] = -scale[:, None] * matrix - decay * torch.eye(p, dtype=F64)
    extended[:p, p:] = -scale[:, None] * sources
    exponential = torch.from_numpy(scipy.linalg.expm((tau * extended).numpy()))
    return exponential[:p, :p], exponential[:p, p:]


def without_negative(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0) @ vectors.T


def one_fit(trained: list[str] | None, l2: float, seed: int) -> Fit:
    model = randomised(mlp(3), seed)
    return Fit(
        model, examples(17, 3, seed), l2, weights_of(17, seed), shared=EMBEDDING, trained=trained
    )


@pytest.mark.parametrize(
    "trained", [None, ["embedding.0.bias", *HEAD], HEAD], ids=["all", "bias and head", "head"]
)
@pytest.mark.parametrize(("l2", "definite"), [(2.0, True), (0.0, False)])
@pytest.mark.parametrize("tau", [0.7, 30.0])
def test_both_rows_of_stopped_are_matrix_exponentials(trained, l2, definite, tau):
    one = one_fit(trained, l2, 3)
    matrix, mixed, slopes, x = dense(one)
    lowest = torch.linalg.eigvalsh(matrix)[0]
    # Of the head alone the objective is convex: there nothing is below zero.
    assert (lowest > 0.1) if definite else (lowest < (-1e-3 if trained != HEAD else 1e-9))
    curved = matrix if definite else without_negative(matrix)
    by_start, by_force = flowed(
        curved, torch.cat([slopes.T / 17, mixed], 1), tau, torch.ones(len(x)), 0.0
    )

    stage = one.stage(one.base)
    cotangent = draw(stage.parameters.size, 3, seed=1)
    link = Stopped(stage, tau, tol=1e-13)
    back = link.pull_back(cotangent, Asked())
    take = stage.parameters.take
    along = take(cotangent, stage.trained)
    own = [n for n in stage.trained if n not in stage.shared]
    put = stage.parameters.put
    exact = put(by_start.T @ along, stage.trained)
    exact = exact - put(take(exact, own), own)
    kept = tuple(n for n in stage.shared if n not in stage.trained)
    exact = exact + put(take(cotangent, kept) + by_force[:, 17:].T @ along, kept)
    check(back.handed, stage.split(exact)[0], 1e-9)
    scores = Chain([link], progress=False).pull_back(cotangent)[0].values
    check(scores, 17 * by_force[:, :17].T @ along, 1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("l2", [0.5, 0.0])
def test_stopped_with_a_scale_and_decay_is_the_flow_of_a_frozen_adam(l2, decay):
    one, tau = one_fit(None, l2, 4), 2.5
    matrix, _, slopes, x = dense(one)
    scale = 0.2 + 3 * draw(len(x), seed=2).abs()
    root = scale.sqrt()
    lowest = torch.linalg.eigvalsh(root[:, None] * matrix * root)[0] + decay
    if lowest < 0:  # the flow without the part that grows
        inner = without_negative(root[:, None] * matrix * root + decay * torch.eye(len(x)))
        matrix = (inner - decay * torch.eye(len(x))) / root[:, None] / root
    by_start, by_force = flowed(matrix, slopes.T / 17, tau, scale, decay)
    stage = one.stage(one.base)
    cotangent = draw(len(x), 2, seed=1)
    link = Stopped(stage, tau, scale=scale, decay=decay, tol=1e-13)
    back = link.pull_back(cotangent, Asked())
    check(back.handed, stage.split(by_start.T @ cotangent)[0], 1e-7)
    values = Chain([link], progress=False).pull_back(cotangent)[0].values
    check(values, 17 * by_force.T @ cotangent, 1e-7)
    # Wrong variants: the roots of P swapped, P or the decay left out.
    wrong = Stopped(stage, tau, scale=1 / scale, decay=decay, tol=1e-13).pull_back(cotangent)
    assert relative_error(wrong.handed, back.handed) > 1e-2
    wrong = Stopped(stage, tau, decay=decay, tol=1e-13).pull_back(cotangent)
    assert relative_error(wrong.handed, back.handed) > 1e-2


def preconditioned(
    matrix: Tensor, scale: Tensor, decay: float, rate: float, steps: int
) -> tuple[Tensor, Tensor]:
    """The steps x' = (1 − ηδ) x − η P (A x + force) themselves: by the start, and by the force."""
    eye = torch.eye(len(matrix), dtype=F64)
    by_start, by_force = eye, torch.zeros_like(eye)
    for _ in range(steps):
        by_force = by_force - rate * (scale[:, None] * (matrix @ by_force + eye) + decay * by_force)
        by_start = by_start - rate * (scale[:, None] * (matrix @ by_start) + decay * by_start)
    return by_start, by_force


def test_descent_with_a_frozen_p_goes_to_the_flow_as_its_steps_become_small():
    one, tau, decay = one_fit(None, 0.5, 4), 2.0, 0.3
    matrix, _, slopes, x = dense(one)
    scale, cotangent = 0.2 + draw(len(x), seed=2).abs(), draw(len(x), 2, seed=1)
    stage = one.stage(one.base)
    link = Stopped(stage, tau, scale=scale, decay=decay, tol=1e-12)
    handed = link.pull_back(cotangent).handed
    values = Chain([link], progress=False).pull_back(cotangent)[0].values
    errors = []
    for steps in (400, 800, 1600):
        by_start, by_force = preconditioned(matrix, scale, decay, tau / steps, steps)
        errors.append(
            (
                relative_error(handed, stage.split(by_start.T @ cotangent)[0]),
                relative_error(values, slopes @ (by_force.T @ cotangent)),
            )
        )
    for coarse, fine in pairwise(errors):
        assert all(1.9 < a / b < 2.1 for a, b in zip(coarse, fine))
    assert max(errors[-1]) < 5e-3


class Linear(nn.Module):
    """Two linear maps whose sum is the output, so that a linear loss is linear in both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 2, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x) + self.head(x.cos())


def tilted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Linear in the outputs: each example's gradient is the same all along a training."""
    return outputs[:, 0] * (targets - 1) + outputs[:, 1] * targets


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_small_steps_of_sgd_on_a_quadratic_are_stopped_training(momentum):
    form = draw(22, 22, seed=5)
    form = form @ form.T / 22 + 0.1 * torch.eye(22, dtype=F64)

    def bowl(named: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([part.reshape(-1) for part in named.values()])
        return 0.5 * flat @ form @ flat

    tau, errors = 3.0, []
    for steps in (60, 120, 240):
        chains = []
        first = Stage.of(
            randomised(Linear().to(F64), 1), tilted, examples(11, 2, 1), "embedding.*", l2=0.1,
            regularizer=bowl, weights=weights_of(11, 1),
        )  # fmt: skip
        rate = tau * (1 - momentum) / steps
        optimiser = SGD(lr=rate, momentum=momentum)
        path1 = descend(first, optimiser, epochs=steps, batch_size=11, seed=0, progress=False)
        model = randomised(Linear().to(F64), 2)
        model.embedding.load_state_dict(first.model.embedding.state_dict())
        second = Stage.of(model, tilted, examples(8, 2, 2), "embedding.*", l2=0.2, regularizer=bowl)
        path2 = descend(second, optimiser, epochs=steps, batch_size=8, seed=0, progress=False)
        assert path1.time == pytest.approx(tau)
        test = examples(4, 2, 3)
        for links in (
            [Unrolled(first, path1), Unrolled(second, path2)],
            [Stopped(first, path1.time), Stopped(second, path2.time)],
        ):
            given = Chain(links, progress=False).scores(test)
            chains.append([one.values for one in given])
        errors.append([relative_error(a, b) for a, b in zip(*chains)])
    for coarse, fine in pairwise(errors):
        assert all(1.8 < a / b < 2.3 for a, b in zip(coarse, fine)), errors
    assert max(errors[-1]) < 0.05


def at_its_optimum(
    model: nn.Module, data: tuple[Tensor, Tensor], l2: float, weights: Tensor | None = None
) -> Stage:
    """A quadratic objective whose optimum is where the model stands."""
    form = draw(22, 22, seed=5)
    form = form @ form.T / 22 + 0.1 * torch.eye(22, dtype=F64)
    plain = Stage.of(model, tilted, data, "embedding.*", l2=l2, weights=weights)
    at, slope = plain.vector(), plain.gradient()

    def bowl(named: dict[str, Tensor]) -> Tensor:
        away = torch.cat([part.reshape(-1) for part in named.values()]) - at
        return 0.5 * away @ form @ away - slope @ away

    return Stage.of(model, tilted, data, "embedding.*", l2=l2, weights=weights, regularizer=bowl)


def grouped(rate: float, **decays: float) -> list[dict]:
    embedding = {"params": "embedding.*", "lr": 0.3 * rate, **decays}
    return [embedding, {"params": "head.bias", "lr": 2 * rate}]


# Of a rate: the optimiser, and how far from the steps the flow and that of plain gradients are.
FLOWS = {
    "sgd": (lambda rate: SGD(rate), 0.01, 0.01),
    "momentum": (lambda rate: SGD(0.4 * rate, momentum=0.6), 0.01, 0.01),
    "groups": (lambda rate: SGD(rate, groups=grouped(rate)), 0.01, 0.1),
    "momentum, groups, decays": (
        lambda rate: SGD(
            0.4 * rate, 0.6, decoupled_decay=0.3, groups=grouped(0.4 * rate, decoupled_decay=0.5)
        ),
        0.02, 0.1,
    ),
    "adamw": (lambda rate: AdamW(rate, (0.9, 0.995), 1e-6, 0.2), 0.06, 0.4),
    "adamw, groups": (
        lambda rate: AdamW(rate, (0.9, 0.995), 1e-6, 0.2, grouped(rate, weight_decay=0.5)),
        0.08, 0.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_of_a_path_s_own_optimiser_is_near_its_small_steps(name):
    """Near an optimum, v of Adam settled by the differences between batches."""
    make, near, plain = FLOWS[name]
    adam = "adam" in name
    tau, steps = (0.3, 600) if adam else (2.0, 200)
    optimiser = make(tau / steps)
    first = at_its_optimum(
        randomised(Linear().to(F64), 1), examples(12, 2, 1), 0.1, weights_of(12, 1)
    )
    settings = {"batch_size": 4 if adam else 12, "progress": False}
    epochs = steps // 3 if adam else steps
    path1 = descend(first, optimiser, epochs=epochs, seed=0, **settings)
    model = randomised(Linear().to(F64), 2)
    model.embedding.load_state_dict(first.model.embedding.state_dict())
    second = at_its_optimum(model, examples(8, 2, 2), 0.2)
    path2 = descend(second, optimiser, epochs=epochs, seed=1, **settings)

    def scores_of(*links):
        return [one.values for one in Chain(links, progress=False).scores(examples(4, 2, 3))]

    exact = scores_of(Unrolled(first, path1), Unrolled(second, path2))
    flow = scores_of(Stopped.of(first, path1), Stopped.of(second, path2))
    assert max(map(relative_error, flow, exact)) < near
    of_time = scores_of(Stopped(first, path1.time), Stopped(second, path2.time))
    worst = min(map(relative_error, of_time, exact))
    assert worst > plain if plain > near else worst < near


def test_the_scale_and_decay_of_a_path_are_its_optimiser_s():
    one = one_fit(None, 0.1, 0)
    stage = one.stage(one.base)
    groups = [{"params": "embedding.*", "lr": 0.02, "weight_decay": 0.5}]
    optimiser = AdamW(0.01, (0.8, 0.9), 1e-3, 0.1, groups)
    path = descend(stage, optimiser, epochs=3, batch_size=5, seed=0, progress=False)
    model = randomised(mlp(3), 0)
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in zip(stage.names, stage.parameters.views(path.start), strict=True):
            names[name].copy_(part)
    shared = [p for name, p in names.items() if name.startswith("embedding.")]
    rest = [p for name, p in names.items() if not name.startswith("embedding.")]
    theirs = torch.optim.AdamW(
        [{"params": shared, "lr": 0.02, "weight_decay": 0.5}, {"params": rest}],
        0.01, (0.8, 0.9), 1e-3, 0.1,
    )  # fmt: skip
    for batch in path.batches:
        theirs.zero_grad()
        losses = log_loss(model(one.data[0][batch]), one.data[1][batch])
        squares = sum(p.square().sum() for p in model.parameters())
        (one.weights[batch] @ losses / len(batch) + 0.05 * squares).backward()
        theirs.step()
    link = Stopped.of(stage, path)
    assert link.time == path.time == pytest.approx(0.01 * len(path))
    for name, scale, decay in zip(
        stage.names,
        stage.parameters.views(link.scale),
        stage.parameters.views(link.decay),
        strict=True,
    ):
        v = theirs.state[names[name]]["exp_avg_sq"] / (1 - 0.9 ** len(path))
        factor, delta = (2.0, 1.0) if name.startswith("embedding.") else (1.0, 0.1)
        check(scale, factor / (v.sqrt() + 1e-3), 1e-9)
        check(decay, torch.full_like(decay, delta), 1e-12)


def test_the_path_of_a_flow_is_its_stage_s():
    one = one_fit(None, 0.1, 0)
    stage = one.stage(one.base)
    path = descend(stage, SGD(0.1), epochs=1, batch_size=5, seed=0, progress=False)
    head = stage.with_trained(stage.block("head.*"))
    with pytest.raises(ValueError, match="path moved 30 parameters, and the stage trains 12"):
        Stopped.of(head, path)
    stage.load_vector(path.start)
    with pytest.raises(ValueError, match=r"path does not end at .*load_vector\(path.end\)"):
        Stopped.of(stage, path)
    stage.load_vector(path.end)
    assert Stopped.of(stage, path).time == path.time


def test_stopped_late_on_a_definite_hessian_is_the_optimum():
    fits = Fits([Fit(randomised(mlp(3), 0), examples(19, 3, 0), 0.2)], examples(6, 3, 9))
    (optimum,) = fits.links()
    (exact,) = Chain([optimum], progress=False).scores(fits.test, per_test=True)
    lowest = float(torch.linalg.eigvalsh(dense_at(fits))[0])
    errors = []
    for tau in (4 / lowest, 8 / lowest, 1e3 / lowest):
        link = Stopped(optimum.stage, tau, tol=1e-13)
        (given,) = Chain([link], progress=False).scores(fits.test, per_test=True)
        errors.append(relative_error(given.values, exact.values))
        assert errors[-1] < 3 * math.exp(-tau * lowest) + 1e-9
    assert errors[0] > errors[1] > errors[2]


def dense_at(fits: Fits) -> Tensor:
    one = fits.fits[0]
    return hessian(one.objective)(fits.trained[0], fits.handed[0], one.weights)


def test_what_stopped_is_told_must_make_sense():
    stage = one_fit(None, 0.1, 0).stage(one_fit(None, 0.1, 0).base)
    for time in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="time must be positive"):
            Stopped(stage, time)
    with pytest.raises(ValueError, match="decay must be zero or positive"):
        Stopped(stage, 1.0, decay=-0.1)
    for scale in (torch.ones(3), torch.zeros_like(stage.vector())):
        with pytest.raises(ValueError, match="scale must hold 30 positive numbers"):
            Stopped(stage, 1.0, scale=scale)
    for link, settings in ((Optimum, {}), (Frozen, {}), (Proximal, {"alpha": 0.1})):
        with pytest.raises(ValueError, match="curvature must be one of"):
            link(stage, curvature="fisher", **settings)


def test_a_first_stage_is_not_pulled():
    one = one_fit(None, 0.1, 0)
    first, second = one.stage(one.base), one.stage(one.base)
    with pytest.raises(ValueError, match=r"stage 0: a first stage is handed nothing .*Optimum"):
        Chain([Proximal(first, 0.1)], progress=False)
    with pytest.raises(ValueError, match=r"pretrain: a first stage is handed nothing"):
        Chain([Proximal(first, 0.1), Proximal(second, 0.1)], progress=False)


# --- Gauss-Newton in place of H ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["optimum", "frozen", "proximal", "stopped"])
def test_the_curvature_of_every_link_may_be_gauss_newton(kind):
    one = one_fit(HEAD if kind == "frozen" else None, 0.3, 6)
    matrix, _, slopes, x = dense(one)

    def outputs(x: Tensor) -> Tensor:
        return functional_call(one.model, one.base | one.unflat(x, one.trained), (one.data[0],))

    jacobian, at = jacrev(outputs)(x), outputs(x)
    inner = torch.stack(
        [hessian(lambda o, t=t: log_loss(o[None], t[None])[0])(o) for o, t in zip(at, one.data[1])]
    )
    gauss = torch.einsum("ncp,ncd,ndq,n->pq", jacobian, inner, jacobian, one.weights / 17)
    gauss = gauss + 0.3 * torch.eye(len(x), dtype=F64)
    if kind == "frozen":  # a linear head: there is no difference
        check(gauss, matrix, 1e-12)
    else:
        assert relative_error(gauss, matrix) > 1e-2
    stage = one.stage(one.base)
    cotangent = draw(stage.parameters.size, 2, seed=1)
    along = stage.parameters.take(cotangent, stage.trained)
    alpha, tau = 0.07, 3.0
    shared = torch.zeros(len(x), dtype=F64)
    shared[: len(x) - 12 if kind == "proximal" else 0] = 2 * alpha
    link = {
        "optimum": lambda: Optimum(stage, Dense(), "gauss-newton"),
        "frozen": lambda: Frozen(stage, Dense(), "gauss-newton"),
        "proximal": lambda: Proximal(stage, alpha, Dense(), "gauss-newton"),
        "stopped": lambda: Stopped(stage, tau, "gauss-newton", tol=1e-13),
    }[kind]()
    if kind == "stopped":
        u = -flowed(gauss, torch.eye(len(x), dtype=F64), tau, torch.ones(len(x)), 0.0)[1] @ along
    else:
        u = torch.linalg.solve(gauss + torch.diag(shared), along)
    links = [link]
    if kind == "proximal":  # which is no first link
        links = [Stopped(one.stage(one.base), tau), link]
    values = Chain(links, math.inf, progress=False).pull_back(cotangent)[-1].values
    check(values, -slopes @ u, 1e-9)


# --- Lanczos -------------------------------------------------------------------------------------


class Matrix:
    """A dense symmetric matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.products = matrix, tuple(matrix.shape), 0

    def __matmul__(self, columns: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ columns


def with_spectrum(values: Tensor, seed: int) -> Tensor:
    vectors = torch.linalg.qr(draw(len(values), len(values), seed=seed)).Q
    return vectors * values.to(F64) @ vectors.T


def exponential(sigma: Tensor) -> Tensor:
    return torch.exp(-sigma.clamp_min(0))


def rational(sigma: Tensor) -> Tensor:
    return 1 / (1 + sigma.square())


def applied(matrix: Tensor, f, b: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (f(values)[:, None] * (vectors.T @ b))


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 4), st.floats(-2, 2))
def test_lanczos_is_the_dense_function(seed, size, count, shift):
    matrix = with_spectrum(3 * draw(size, seed=seed) + shift, seed + 1)
    b = draw(size, count, seed=seed + 2)
    results, report = functions_of(Matrix(matrix), b, (exponential, rational))
    for result, f in zip(results, (exponential, rational)):
        check(result, applied(matrix, f, b), 1e-7)
    assert report.converged
    assert all(math.isfinite(r) for r in (*report.residuals, *report.history))


@given(
    st.integers(0, 10**6), st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=1, max_size=25)
)
def test_repeated_eigenvalues_exhaust_the_krylov_space(seed, values):
    matrix = with_spectrum(torch.tensor(values), seed)
    b, operator = draw(len(values), 3, seed=seed + 2), Matrix(matrix)
    b[:, 1] = 0
    b[:, 2] = torch.linalg.eigh(matrix)[1][:, 0]  # an eigenvector: a space of one dimension
    (result,), report = functions_of(operator, b, (exponential,))
    exact = applied(matrix, exponential, b)
    check(result[:, [0, 2]], exact[:, [0, 2]], 1e-9)
    assert (result[:, 1] == 0).all()
    assert report.converged
    assert operator.products == report.iterations <= len(set(values)) + 1
    assert not any(math.isnan(r) for r in (*report.residuals, *report.history))


@given(st.integers(0, 10**6), st.floats(-8, 8))
def test_columns_have_nothing_to_do_with_each_other(seed, magnitude):
    matrix, b = with_spectrum(draw(12, seed=seed), seed), draw(12, 3, seed=seed + 1)
    scaled = b * torch.tensor([1.0, 10.0**magnitude, 0.0], dtype=F64)
    (together,), _ = functions_of(Matrix(matrix), scaled, (exponential,), tol=1e-12)
    for column in range(3):
        (alone,), _ = functions_of(Matrix(matrix), scaled[:, [column]], (exponential,), tol=1e-12)
        assert torch.allclose(together[:, [column]], alone, rtol=1e-9, atol=0)


def test_lanczos_takes_a_matrix_of_any_size_and_scale():
    for scale in (1e-12, 1e9):
        matrix = scale * with_spectrum(draw(20, seed=1).abs(), 2)
        b = draw(20, 2, seed=3)

        def f(sigma: Tensor, scale=scale) -> Tensor:
            return exponential(sigma / scale)

        (result,), report = functions_of(Matrix(matrix), b, (f,))
        check(result, applied(matrix, f, b), 1e-7)
        assert report.converged
    (result,), _ = functions_of(Matrix(torch.zeros(5, 5).to(F64)), draw(5, 2), (exponential,))
    check(result, draw(5, 2), 1e-14)


def test_lanczos_in_single_precision():
    matrix, b = with_spectrum(draw(40, seed=1), 2), draw(40, 2, seed=3)
    (result,), report = functions_of(Matrix(matrix.float()), b.float(), (exponential,))
    assert result.dtype == torch.float32
    check(result, applied(matrix, exponential, b), 1e-3)
    assert report.converged


def test_lanczos_in_half_precision_reckons_in_single():
    matrix, b = with_spectrum(draw(10, seed=1), 2), draw(10, 2, seed=3)
    (result,), _ = functions_of(Matrix(matrix.bfloat16()), b.bfloat16(), (exponential,), tol=1e-2)
    assert result.dtype == torch.bfloat16
    check(result, applied(matrix, exponential, b), 0.05)


def test_lanczos_that_stops_short_says_so():
    matrix, b = with_spectrum(30 * draw(60, seed=1), 2), draw(60, 1, seed=3)
    with pytest.warns(SolverWarning, match="limit of 7 steps.*allow more steps"):
        _, report = functions_of(Matrix(matrix), b, (exponential,), max_iterations=7)
    assert not report.converged
    assert report.iterations == 7
    assert report.residuals[0] > 1e-8


def test_a_function_that_leaves_nothing_or_no_number_is_a_failed_solve():
    matrix, b = with_spectrum(draw(6, seed=1), 2), draw(6, 2, seed=3)
    for f in (torch.zeros_like, lambda sigma: sigma * math.nan):
        with pytest.raises(FailedSolve, match="came out as zero or left the finite numbers"):
            functions_of(Matrix(matrix), b, (f,))
    with pytest.raises(FailedSolve, match="a product with A is not finite"):
        functions_of(Matrix(matrix * math.inf), b, (exponential,))
    (nothing,), _ = functions_of(Matrix(matrix), 0 * b, (exponential,))
    assert (nothing == 0).all()


def test_the_report_of_stopped_stands_in_the_scores():
    stage = one_fit(None, 0.1, 0).stage(one_fit(None, 0.1, 0).base)
    (given,) = Chain([Stopped(stage, 3.0)], progress=False).scores(examples(4, 3, 1))
    (report,) = given.solves
    assert (report.solver, report.converged) == ("Lanczos", True)
    assert "exp(−3 A)" in report.system
    assert not given.gradient_norms
