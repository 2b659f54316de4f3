"""Scores through the public names, against dense references and finite differences."""

from __future__ import annotations

import pytest
import torch
from problems import ALPHAS, F64, SPECS, Problem, cast, check, relative_error, retrain
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from msif_lib import (
    FixedEmbeddingInfluence,
    SingleStageInfluence,
    Stage,
    UpdatedEmbeddingInfluence,
    cross_entropy,
)
from msif_lib.curvature import Hessian
from msif_lib.solvers import ConjugateGradient, Dense, Identity, MinRes, Solver

pytestmark = pytest.mark.numeric
CASES = (None, *ALPHAS)  # None is case 1
EXACT = 1e-9  # what dense solvers must reach against the dense reference


def influence(
    problem: Problem, alpha: float | None, solver: Solver | None = None, **settings
) -> FixedEmbeddingInfluence | UpdatedEmbeddingInfluence:
    first, second = problem.stages(alpha, **settings)
    solver = solver or Dense()
    if alpha is None:
        return FixedEmbeddingInfluence(first, second, solver, progress=False)
    return UpdatedEmbeddingInfluence(first, second, alpha, solver, progress=False)


def test_the_two_ways_to_write_each_model_agree(problem):
    for alpha in (None, ALPHAS[0]):
        first, second = problem.stages(alpha)
        assert torch.allclose(
            first.example_losses(), problem.pretraining_losses(problem.pretrained.x), rtol=1e-12
        )
        w, t = problem.second(alpha)
        exact = problem.test_losses(w, t, problem.finetuning_data)
        assert torch.allclose(second.example_losses(), exact, rtol=1e-12)
        assert torch.allclose(first.objective(), problem.pretraining(problem.pretrained.x))
        assert torch.allclose(second.objective(), problem.finetuning(w, t))


def test_the_problems_could_not_hide_a_bug():
    for spec in SPECS.values():
        problem = Problem(spec)
        assert len({problem.p_w, problem.p_u, problem.p_t}) == 3
        assert spec.m != spec.n
        assert problem.p_w + max(problem.p_u, problem.p_t) < 60
    assert 0.5 not in ALPHAS
    for number in (0, 1):
        assert {spec.l2[number] > 0 for spec in SPECS.values()} == {True, False}


# --- against the dense reference ---------------------------------------------------------------


@pytest.mark.parametrize("alpha", CASES)
def test_scores_are_the_dense_formula(problem, alpha):
    exact = problem.exact(alpha)
    run = influence(problem, alpha)
    check(run.scores(problem.test_data, per_test=True).values, exact, EXACT)
    check(run.scores(problem.test_data).values, exact.sum(1), EXACT)


def test_single_stage_scores_are_the_dense_formula(problem):
    pieces = problem.pieces(None)
    exact = -pieces.g @ torch.linalg.solve(pieces.h_g, pieces.g.T)
    run = SingleStageInfluence(problem.stages()[0], Dense(), progress=False)
    x, y = problem.pretraining_data
    chosen = torch.tensor([4, 0, 9, 2, 17])
    per_test = run.scores((x[chosen], y[chosen]), per_test=True).values
    check(per_test, exact[:, chosen], EXACT)
    check(run.scores((x[chosen], y[chosen])).values, exact[:, chosen].sum(1), EXACT)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Dense(), EXACT),
        (MinRes(), 1e-6),
        (MinRes(tol=1e-12), EXACT),
        (ConjugateGradient(tol=1e-12), EXACT),
        (ConjugateGradient(squared=True, tol=1e-12), 1e-8),
    ],
    ids=lambda value: f"{value}"[:40],
)
@pytest.mark.parametrize("alpha", CASES)
def test_every_solver_gives_the_dense_formula(convex, mlp, cnn, alpha, solver, tolerance):
    for problem in (convex, mlp) if alpha else (convex, mlp, cnn):
        run = influence(problem, alpha, solver)
        scores = run.scores(problem.test_data, per_test=True)
        check(scores.values, problem.exact(alpha), tolerance)
        assert len(scores.solves) == 2
        assert all(report.converged for report in scores.solves)


@pytest.mark.parametrize("alpha", CASES)
def test_damping_is_added_in_both_solves(convex, alpha):
    """H + λI in pretraining and K + μI (or F_ΘΘ + μI) in finetuning, by their own solvers."""
    first, second = convex.stages(alpha)
    pieces = convex.pieces(alpha)
    p, t, u = convex.p_w, convex.p_t, convex.p_u
    solvers = Dense(damping=0.2), Dense(damping=0.03)
    if alpha is None:
        scores = FixedEmbeddingInfluence(first, second, *solvers).scores(convex.test_data)
        shifted = pieces.f_tt + 0.03 * torch.eye(t, dtype=F64)
        b = pieces.f_w - pieces.f_wt @ torch.linalg.solve(shifted, pieces.f_t)
    else:
        scores = UpdatedEmbeddingInfluence(first, second, alpha, *solvers).scores(convex.test_data)
        k = torch.cat(
            [
                torch.cat([pieces.f_ww + 2 * alpha * torch.eye(p, dtype=F64), pieces.f_wt], 1),
                torch.cat([pieces.f_wt.T, pieces.f_tt], 1),
            ]
        )
        f = torch.cat([pieces.f_w, pieces.f_t])
        b = 2 * alpha * torch.linalg.solve(k + 0.03 * torch.eye(p + t, dtype=F64), f)[:p]
    b = torch.cat([b, torch.zeros(u, b.shape[1], dtype=F64)])
    v = torch.linalg.solve(pieces.h_g + 0.2 * torch.eye(p + u, dtype=F64), b)
    check(scores.values, -(pieces.g @ v).sum(1), EXACT)
    assert [report.damping for report in scores.solves] == [0.03, 0.2]


@pytest.mark.parametrize("alpha", CASES)
def test_the_paper_s_squared_system_and_the_identity_baseline(mlp, alpha):
    """Eq. 16, (H² + λI) x = H b, in pretraining; and x = b, the baseline of Figure 2c."""
    first, second = mlp.stages(alpha)
    pieces = mlp.pieces(alpha)
    if alpha is None:
        b = pieces.f_w - pieces.f_wt @ torch.linalg.solve(pieces.f_tt, pieces.f_t)
    else:
        s = pieces.f_ww - pieces.f_wt @ torch.linalg.solve(pieces.f_tt, pieces.f_wt.T)
        b = pieces.f_w - pieces.f_wt @ torch.linalg.solve(pieces.f_tt, pieces.f_t)
        b = 2 * alpha * torch.linalg.solve(s + 2 * alpha * torch.eye(mlp.p_w, dtype=F64), b)
    b = torch.cat([b, torch.zeros(mlp.p_u, b.shape[1], dtype=F64)])
    h = pieces.h_g
    filtered = torch.linalg.solve(h @ h + 0.05 * torch.eye(len(h), dtype=F64), h @ b)
    squared = ConjugateGradient(squared=True, damping=0.05, tol=1e-12)
    for solver, v in ((squared, filtered), (Identity(), b)):
        if alpha is None:
            run = FixedEmbeddingInfluence(first, second, solver, Dense())
        else:
            run = UpdatedEmbeddingInfluence(first, second, alpha, solver, Dense())
        check(run.scores(mlp.test_data, per_test=True).values, -pieces.g @ v, 1e-8)


@pytest.mark.parametrize("alpha", [None, ALPHAS[1]])
def test_examples_outside_the_training_set(problem, alpha):
    exact = problem.exact(alpha, of_new=True)
    run = influence(problem, alpha)
    scores = run.scores(problem.test_data, per_test=True, of=problem.new_data)
    check(scores.values, exact, EXACT)
    check(run.scores(problem.test_data, of=problem.new_data).values, exact.sum(1), EXACT)
    check(scores.removal_effect, -exact / problem.spec.m, EXACT)


def test_self_influence(problem):
    pieces = problem.pieces(None)
    exact = -(pieces.g * torch.linalg.solve(pieces.h_g, pieces.g.T).T).sum(1)
    run = SingleStageInfluence(problem.stages()[0], Dense(), progress=False)
    check(run.self_influence().values, exact, EXACT)
    check(run.self_influence(at_once=4).values, exact, EXACT)
    check(run.self_influence([12, 3, 7]).values, exact[[12, 3, 7]], EXACT)
    assert (exact < 0).all()


# --- against finite differences through both trainings -----------------------------------------


@pytest.mark.parametrize("alpha", CASES)
def test_scores_are_what_finite_differences_say(problem, alpha):
    chosen = (0, 5, 11, problem.spec.m - 1)
    truth = problem.example_differences(chosen, alpha)
    run = influence(problem, alpha)
    check(run.scores(problem.test_data, per_test=True).values[list(chosen)], truth)
    check(run.scores(problem.test_data).values[list(chosen)], truth.sum(1))


def test_single_stage_scores_are_what_finite_differences_say(problem):
    """The tested model is the pretrained one itself: only the first training is repeated."""
    m, step = problem.spec.m, 1e-4
    run = SingleStageInfluence(problem.stages()[0], Dense(), progress=False)
    values = run.scores(problem.new_data).values
    for i in (0, 8):
        losses = []
        for k in (-2, -1, 1, 2):
            weights = torch.full((m,), 1 / m, dtype=F64)
            weights[i] += k * step
            theta = retrain(lambda v, c=weights: problem.pretraining(v, c), problem.pretrained)
            losses.append(problem.pretraining_losses(theta, problem.new_data).sum())
        truth = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
        check(values[i : i + 1], truth[None])


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
@pytest.mark.parametrize("removed", [[3], [0, 7, 19, 20]], ids=["one", "four"])
def test_removal_effects_are_derivatives_along_the_weights_they_name(problem, alpha, removed):
    """From weights 1/m towards those after removal, by either convention."""
    m, s = problem.spec.m, len(removed)
    fixed = torch.zeros(m, dtype=F64)
    fixed[removed] = -1 / m
    renormalised = torch.full((m,), 1 / (m - s) - 1 / m, dtype=F64)
    renormalised[removed] = -1 / m
    scores = influence(problem, alpha).scores(problem.test_data, per_test=True)
    truth = (
        problem.differences(m * fixed, alpha) / m,
        problem.differences(m * renormalised, alpha) / m,
    )
    check(scores.group_effect(removed)[None], truth[0][None])
    check(scores.group_effect(removed, renormalise=True)[None], truth[1][None])
    check(scores.group(removed)[None], -m * truth[0][None])
    if s == 1:
        check(scores.removal_effect[removed], truth[0][None])
        check(scores.removal_effect_renormalised[removed], truth[1][None])


# --- forms of data, precision -------------------------------------------------------------------


class Keyed(nn.Module):
    """Reads its input from a nested dict and puts it through a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: dict) -> Tensor:
        return self.inner(inputs["pixels"]["left"] + inputs["pixels"]["right"])


def nested(data: tuple[Tensor, Tensor]) -> tuple[dict, Tensor]:
    x, y = data
    return {"pixels": {"left": 0.25 * x, "right": 0.75 * x}, "unused": torch.arange(len(x))}, y


@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
@pytest.mark.parametrize("form", ["list", "dataset", "loader", "nested"])
def test_forms_of_data(mlp, alpha, form):
    wrap = {
        "list": list,
        "dataset": lambda data: TensorDataset(*data),
        "loader": lambda data: DataLoader(TensorDataset(*data), batch_size=3, shuffle=True),
        "nested": nested,
    }[form]
    settings = {"wrap": wrap} | ({"modules": Keyed} if form == "nested" else {})
    run = influence(mlp, alpha, **settings)
    exact = mlp.exact(alpha)
    test, new = wrap(mlp.test_data), wrap(mlp.new_data)
    check(run.scores(test, per_test=True).values, exact, EXACT)
    check(run.scores(test).values, exact.sum(1), EXACT)
    check(run.scores(test, of=new).values, mlp.exact(alpha, of_new=True).sum(1), EXACT)


def test_a_sequence_of_tokens_with_a_mask():
    """Losses of (B, C, L) logits, averaged over positions, and a pooled mask in a tuple."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (11, 4), generator=g)
    mask = torch.rand(11, 4, generator=g, dtype=F64) < 0.7
    targets = torch.randint(3, (11, 4), generator=g)

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, dtype=F64)

        def forward(self, inputs):
            tokens, mask = inputs
            return torch.tanh(self.table(tokens)) * mask[..., None]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3, dtype=F64)

        def forward(self, features):
            return self.linear(features).transpose(1, 2)

    torch.manual_seed(0)
    stage = Stage(Embed(), Head(), cross_entropy, ((tokens, mask), targets), l2=0.3, batch_size=4)
    run = SingleStageInfluence(stage, Dense(), stationarity_tol=10.0)
    scores = run.scores(((tokens[:2], mask[:2]), targets[:2]), per_test=True).values

    def losses(theta: Tensor) -> Tensor:
        table, weight, bias = theta.split([10, 6, 3])
        features = torch.tanh(table.view(5, 2)[tokens]) * mask[..., None]
        outputs = features @ weight.view(3, 2).T + bias
        chosen = outputs.gather(2, targets[..., None])[..., 0]
        return (outputs.logsumexp(2) - chosen).mean(1)

    theta = stage.vector()
    gradients = torch.autograd.functional.jacobian(losses, theta)
    matrix = torch.autograd.functional.hessian(lambda v: losses(v).mean() + 0.15 * v @ v, theta)
    check(scores, -gradients @ torch.linalg.solve(matrix, gradients[:2].T), EXACT)


class Pooled(nn.Module):
    """Tokens through a sequence model, averaged over the mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(7, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", batch_first=True)
        self.body = {
            "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            "transformer": lambda: nn.TransformerEncoder(layer, 2),
            "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
            "gru": lambda: nn.GRU(4, 4, batch_first=True),
            "shared": lambda: nn.Linear(4, 4),
        }[kind]()
        if kind == "shared":
            self.again, self.weight = self.body, self.body.weight
            self.register_buffer("steps", torch.arange(3))

    def forward(self, inputs):
        x, mask = self.table(inputs["tokens"]), inputs["mask"]
        if self.kind == "attention":
            x = self.body(x, x, x, key_padding_mask=~mask)[0]
        elif self.kind == "transformer":
            x = self.body(x, src_key_padding_mask=~mask)
        elif self.kind == "shared":
            x = torch.tanh(self.again(torch.tanh(self.body(x)))) @ self.weight
        else:
            x = self.body(x)[0]
        weights = mask[..., None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kind", ["attention", "transformer", "lstm", "gru", "shared"])
def test_torch_s_own_sequence_modules(kind, dtype):
    """Fused kernels have no second derivatives; the stage must not meet them."""
    torch.manual_seed(0)
    modules = Pooled(kind).eval(), nn.Linear(4, 3)
    for module in modules:
        module.to(dtype).requires_grad_(False)
    before = [parameter.clone() for parameter in modules[0].parameters()]
    mask = torch.arange(4) < torch.tensor([1, 2, 3, 2, 3])[:, None]  # no sequence is full
    data = {"tokens": torch.randint(7, (5, 4)), "mask": mask}, torch.randint(3, (5,))
    stage = Stage(*modules, cross_entropy, data, batch_size=3)
    theta = stage.vector().double()
    double = stage.to(F64)
    v = torch.randn(len(theta), 1, dtype=F64)
    tolerance = 1e-6 if dtype == F64 else 1e-4

    h = 1e-5 * v[:, 0]
    bent = (double.gradient(theta + h) - double.gradient(theta - h)) / 2e-5
    check((Hessian(stage) @ v[:, 0].to(dtype)).double(), bent, tolerance)
    rows = torch.cat(list(double.per_example_gradients()))
    along = torch.cat(list(stage.directional_derivatives(v.to(dtype)))).double()
    check(along, rows @ v, 1e-10 if dtype == F64 else 1e-4)
    check(rows.mean(0), double.gradient(), 1e-10)
    after = list(modules[0].parameters())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(isinstance(parameter, nn.Parameter) for parameter in after)


# A residual of 1e-6 is asked for so that the solver does what float32 allows, and it says so.
@pytest.mark.filterwarnings("ignore::msif_lib.solvers.SolverWarning")
@pytest.mark.parametrize("alpha", [None, ALPHAS[0]])
def test_float32_is_right_within_its_precision(problem, alpha):
    """Error at most ten condition numbers of rounding; the scores stay in float32."""
    pieces = problem.pieces(alpha)
    if alpha is None:
        second = pieces.f_tt
    else:
        second = problem.tuned(alpha).hessian
    condition = max(float(torch.linalg.cond(matrix)) for matrix in (pieces.h_g, second))
    tolerance = 10 * condition * torch.finfo(torch.float32).eps
    assert tolerance < 0.01
    for solver in (Dense(), MinRes(tol=1e-6)):
        run = influence(problem, alpha, solver, dtype=torch.float32)
        scores = run.scores(cast(problem.test_data, torch.float32), per_test=True)
        assert scores.values.dtype == torch.float32
        assert relative_error(scores.values, problem.exact(alpha)) <= tolerance


def test_stage_to_converts_everything(mlp):
    first, second = mlp.stages(dtype=torch.float32)
    run = FixedEmbeddingInfluence(first.to(F64), second.to(F64), Dense())
    assert relative_error(run.scores(mlp.test_data).values, mlp.exact(None).sum(1)) < 1e-4
    assert first.dtype == torch.float32, "the stage itself is left as it was"


def test_gradient_norms_and_reports_are_in_the_scores(mlp):
    scores = influence(mlp, None).scores(mlp.test_data)
    assert set(scores.gradient_norms) == {"pretraining", "finetuning"}
    assert max(scores.gradient_norms.values()) < 1e-12
    assert [report.solver for report in scores.solves] == ["Dense", "Dense"]
    assert scores.training_size == mlp.spec.m
