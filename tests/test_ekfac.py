"""EK-FAC against dense Gauss-Newton matrices, curvlinops and closed forms; links that use it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import F64, check, relative_error
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.curvature import AddDiagonal, CrossHessian, GaussNewton, Hessian
from msif_lib.ekfac import EKFAC, Preconditioned
from msif_lib.lanczos import functions_of
from msif_lib.links import Asked, Frozen, Link, Optimum, Proximal, Stopped
from msif_lib.solvers import (
    ConjugateGradient,
    Dense,
    FailedSolve,
    Identity,
    MinRes,
    SolverWarning,
)
from msif_lib.training import train

pytestmark = pytest.mark.numeric


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def classes(count: int, kinds: int, seed: int = 1) -> Tensor:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


def weights_of(count: int) -> Tensor:
    return 0.4 + draw(count, seed=5).abs()


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().flatten(1).sum(1)


def randomised(model: nn.Module, seed: int = 3) -> nn.Module:
    model = model.to(F64)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.6 * draw(*parameter.shape, seed=seed + number) + 0.1)
    return model.eval()


# --- models --------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def without_biases() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))


def written_over() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.2, inplace=True), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)),
        nn.Conv2d(1, 3, (2, 3), stride=(1, 2), padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3, padding="same", dilation=2, padding_mode="zeros"),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


def sequence_of_signals() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 10)),
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


class Tokens(nn.Module):
    """One linear layer at five tokens; `flat` forgets which example a token is of."""

    def __init__(self, flat: bool = False, tokens_first: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.flat, self.tokens_first = flat, tokens_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(len(x), 5, 4)
        if self.flat:
            hidden = torch.tanh(self.first(tokens.reshape(-1, 4))).view(len(x), 5, 3)
        elif self.tokens_first:
            hidden = torch.tanh(self.first(tokens.transpose(0, 1))).transpose(0, 1)
        else:
            hidden = torch.tanh(self.first(tokens))
        return self.last(hidden.mean(1))


class Twice(nn.Module):
    """One layer used twice, another for which weight decay is no reason to be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Mixed(nn.Module):
    """Layers, and what is none: a normalisation, a table, a scale, a tied weight, grouped maps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6)
        self.norm = nn.GroupNorm(2, 6)
        self.grouped = nn.Conv1d(6, 4, 1, groups=2)
        self.layer = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :3].abs() * 2).long().clamp(max=3)
        hidden = torch.tanh(self.norm(self.table(words).sum(1)))
        hidden = torch.tanh(self.grouped(hidden[:, :, None])[:, :, 0])
        hidden = torch.tanh(self.layer(hidden)) * self.scale
        # The table once more, as a linear map.
        return self.last(hidden) + nn.functional.linear(hidden, self.table.weight)[:, :3]


class Looking(nn.Module):
    """It looks at values, for which torch.func.vmap has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.abs().sum().item() > 0
        return self.last(torch.tanh(x * self.scale))


@dataclass
class Case:
    model: Callable[[], nn.Module]
    inputs: int
    others: tuple[str, ...] = ()
    trained: str | None = None


TABLE = ("scale", "table.weight", "norm.weight", "norm.bias", "grouped.weight", "grouped.bias")
CASES = {
    "mlp": Case(mlp, 4),
    "without biases": Case(without_biases, 4),
    "biases alone": Case(mlp, 4, trained="*bias"),
    "weights alone": Case(mlp, 4, trained="*weight"),
    "one weight": Case(mlp, 4, trained="0.weight"),
    "written over": Case(written_over, 4),
    "convolutions": Case(convolutional, 20),
    "signals": Case(sequence_of_signals, 20),
    "tokens": Case(Tokens, 20),
    "flat tokens": Case(lambda: Tokens(flat=True), 20),
    "tokens first": Case(lambda: Tokens(tokens_first=True), 20, ("first.weight", "first.bias")),
    "used twice": Case(Twice, 4),
    "mixed": Case(Mixed, 4, TABLE),
    "looking": Case(Looking, 4, ("scale",)),
}


def stage_of(case: Case, count: int = 17, l2: float = 0.03, **settings: Any) -> Stage:
    given = {"weights": weights_of(count), "trained": case.trained, "batch_size": 7} | settings
    data = draw(count, case.inputs, seed=2), classes(count, 3)
    return Stage.of(randomised(case.model()), cross_entropy, data, l2=l2, **given)


def quietly(stage: Stage, block: Any = "trained") -> EKFAC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EKFAC(stage, block)


# --- the matrix ----------------------------------------------------------------------------------


def by_jacobians(stage: Stage) -> Tensor:
    """The Gauss-Newton matrix of what is trained, from whole Jacobians."""
    named = dict(stage.model.named_parameters())
    names = [stage.names[number] for number in stage.trained]
    x = torch.cat([named[name].detach().reshape(-1) for name in names])
    inputs, targets = stage.data

    def outputs(x: Tensor) -> Tensor:
        parts = x.split([named[name].numel() for name in names])
        own = {name: part.view_as(named[name]) for name, part in zip(names, parts)}
        return functional_call(stage.model, named | own, (inputs,))

    at, jacobians = outputs(x).detach(), jacrev(outputs)(x)
    curved = vmap(hessian(lambda one, target: cross_entropy(one[None], target[None])[0]))
    terms = torch.einsum("icp,icd,idq->ipq", jacobians, curved(at, targets), jacobians)
    weighted = torch.einsum("i,ipq->pq", stage.weights, terms) / len(targets)
    return weighted + stage.l2 * torch.eye(len(x), dtype=F64)


@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_are_the_exact_matrix_in_a_kronecker_basis(name):
    case = CASES[name]
    stage = stage_of(case)
    ekfac = quietly(stage)
    assert ekfac.others == case.others
    assert {*ekfac.layers} | {*ekfac.others} == {stage.names[number] for number in stage.trained}
    exact = by_jacobians(stage)
    q = ekfac.eigenvectors()
    eye = torch.eye(len(q), dtype=F64)
    check(q.T @ q, eye, 1e-12)
    check(ekfac.eigenvalues, (q.T @ exact @ q).diagonal(), 1e-10)
    # What it is: block diagonal, symmetric, of these eigenpairs.
    check(ekfac.dense(), q @ torch.diag(ekfac.eigenvalues) @ q.T, 1e-12)
    check(ekfac.dense(), ekfac.dense().T, 1e-12)
    # Scipy's view of it.
    b = draw(len(q), seed=8)
    check(torch.from_numpy(ekfac.to_scipy() @ b.numpy()), ekfac.dense() @ b, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "without biases", "biases alone", "one weight"])
def test_bases_are_the_eigenvectors_of_the_two_second_moments(name):
    """Q is unique but for signs where no two eigenvalues of a factor are equal."""
    stage = stage_of(CASES[name])
    ekfac, exact = quietly(stage), by_jacobians(stage)
    inputs, _ = stage.data
    model = stage.model
    hidden = torch.tanh(model[0](inputs))
    outputs = model[2](hidden).detach().requires_grad_()
    softmax = outputs.softmax(1)
    curved = torch.diag_embed(softmax) - softmax[:, :, None] * softmax[:, None]
    curved = curved * stage.weights[:, None, None]
    back = model[2].weight * (1 - hidden.square())[:, None]  # df/dy of the first layer
    blocks, at = [], 0
    for layer, a, g in (
        ("0", inputs, torch.einsum("icj,icd,idk->jk", back, curved, back)),
        ("2", hidden, curved.sum(0)),
    ):
        trained = [f"{layer}.{kind}" in ekfac.layers for kind in ("weight", "bias")]
        if not any(trained):
            continue
        ones = torch.ones(len(a), 1, dtype=F64)
        a = torch.cat([part for part, wanted in zip((a, ones), trained) if wanted], 1).detach()
        left = torch.linalg.eigh(g.detach())[1]
        right = torch.linalg.eigh(torch.einsum("i,ij,ik->jk", stage.weights, a, a))[1]
        width = a.shape[1] - trained[1]
        # From (o, i + 1) to the weight's entries, then the bias's.
        o = len(left)
        order = torch.arange(o * a.shape[1]).view(o, -1)
        order = torch.cat([order[:, :width].flatten(), order[:, width:].flatten()])
        q = torch.kron(left, right)[order]
        size = len(q)
        block = exact[at : at + size, at : at + size]
        blocks.append(q @ torch.diag((q.T @ block @ q).diagonal()) @ q.T)
        at += size
    check(ekfac.dense(), torch.block_diag(*blocks), 1e-9)


def test_one_linear_layer_with_squared_loss_is_the_matrix_itself():
    stage = Stage.of(
        randomised(nn.Linear(4, 3)), half_squares, (draw(9, 4), draw(9, 3)), l2=0.1,
        weights=weights_of(9), batch_size=4,
    )  # fmt: skip
    check(EKFAC(stage).dense(), GaussNewton(stage).dense(), 1e-12)
    check(EKFAC(stage).dense(), Hessian(stage).dense(), 1e-10)


def test_deep_linear_nets_have_their_exact_blocks():
    """Derivatives by a layer's outputs are the same for all examples: its block is a product."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 3))
    data = draw(11, 4), draw(11, 3, seed=1)
    stage = Stage.of(randomised(model), half_squares, data, l2=0.1, weights=weights_of(11))
    exact, found = GaussNewton(stage).dense(), EKFAC(stage).dense()
    start, off = 0, exact.clone()
    for size in (25, 12, 9):
        block = slice(start, start + size)
        check(found[block, block], exact[block, block], 1e-11)
        off[block, block] = 0
        start += size
    assert off.norm() > 0.1 * exact.norm()  # between layers there is something, which is dropped
    check(found - torch.block_diag(found[:25, :25], found[25:37, 25:37], found[37:, 37:]) + exact,
          exact, 1e-12)  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "without biases", "written over", "convolutions"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_the_matrix_of_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    stage = stage_of(CASES[name], l2=0.0, weights=None)
    model, (inputs, targets) = stage.model, stage.data
    if name == "convolutions":  # theirs knows no dilation
        model[3].dilation = (1, 1)
        stage = Stage.of(model, cross_entropy, (inputs, targets), batch_size=7)
    theirs = curvlinops.EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()),
        [(inputs[:9], targets[:9]), (inputs[9:], targets[9:])],
        fisher_type="type-2", separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    eye = torch.eye(stage.parameters.size, dtype=F64)
    check(EKFAC(stage).dense(), (theirs @ eye).detach(), 1e-9)


def test_weights_are_repetitions_and_zero_weights_are_absent():
    case = CASES["convolutions"]
    inputs, targets = draw(9, 20, seed=2), classes(9, 3)
    times = torch.tensor([1, 2, 0, 3, 1, 0, 1, 1, 2])
    model = randomised(case.model())
    weighted = Stage.of(model, cross_entropy, (inputs, targets), weights=times.to(F64))
    again = (inputs.repeat_interleave(times, 0), targets.repeat_interleave(times))
    repeated = Stage.of(model, cross_entropy, again)
    share = len(again[1]) / 9
    check(EKFAC(weighted).dense(), share * EKFAC(repeated).dense(), 1e-9)


def test_of_a_loss_that_is_not_convex_the_convex_part_is_taken():
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cos(outputs).sum(1) + (outputs * targets).sum(1)

    inputs = draw(9, 4)
    stage = Stage.of(randomised(nn.Linear(4, 2)), loss, (inputs, draw(9, 2, seed=1)))
    assert torch.linalg.eigvalsh(GaussNewton(stage).dense())[0] < -1e-3
    assert EKFAC(stage).eigenvalues.min() > -1e-12

    def part(outputs: Tensor, curved: Tensor) -> Tensor:
        return (0.5 * curved * outputs.square()).sum(1)

    curved = torch.cos(stage.model(inputs)).neg().clamp_min(0).detach()
    convex = Stage.of(stage.model, part, (inputs, curved))
    check(EKFAC(stage).dense(), EKFAC(convex).dense(), 1e-9)


def test_nothing_depends_on_the_size_of_batches_or_on_gradients_held(monkeypatch):
    whole = quietly(stage_of(CASES["mixed"], batch_size=100)).dense()
    check(quietly(stage_of(CASES["mixed"], batch_size=1)).dense(), whole, 1e-10)
    tokens = quietly(stage_of(CASES["tokens"], batch_size=100)).dense()
    monkeypatch.setattr("msif_lib.ekfac._GRADIENTS", 40)
    check(quietly(stage_of(CASES["tokens"])).dense(), tokens, 1e-10)


def test_layers_with_too_many_inputs_have_their_diagonal(monkeypatch):
    monkeypatch.setattr("msif_lib.ekfac._LARGEST_SIDE", 5)
    stage = stage_of(CASES["mlp"])
    with pytest.warns(UserWarning, match=r"EK-FAC: 2\.weight, 2\.bias are in no linear layer"):
        ekfac = EKFAC(stage)
    assert ekfac.others == ("2.weight", "2.bias")
    exact = by_jacobians(stage)
    check(ekfac.dense()[25:, 25:], torch.diag(exact.diagonal()[25:]), 1e-10)


def test_of_what_nothing_depends_on_weight_decay_is_left():
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.more = nn.Linear(2, 2)

    stage = Stage.of(
        randomised(Unused()), cross_entropy, (draw(9, 4), classes(9, 3)), l2=0.2, trained="more.*"
    )
    check(quietly(stage).dense(), 0.2 * torch.eye(6, dtype=F64), 1e-14)


def test_single_precision_stays_single_and_near():
    stage = stage_of(CASES["mixed"])
    single = quietly(stage.to(torch.float32))
    assert (single @ draw(single.shape[0], 2).float()).dtype == torch.float32
    # The eigenvectors of a factor may turn; what they span does not.
    b = draw(single.shape[0], seed=4)
    found, exact = single.solve(b.float(), 0.1).x, quietly(stage).solve(b, 0.1).x
    assert found.dtype == torch.float32
    check(found, exact, 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_model_stays_as_it_was(name):
    stage = stage_of(CASES[name])
    before = copy.deepcopy(stage.model.state_dict())
    told = [(p.requires_grad, p.grad) for p in stage.model.parameters()]
    quietly(stage)
    for module in stage.model.modules():
        assert not any(
            getattr(module, kind)
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        )
        assert not module.training
    assert all(torch.equal(before[key], value) for key, value in stage.model.state_dict().items())
    assert told == [(p.requires_grad, p.grad) for p in stage.model.parameters()]


# --- what is solved with it ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "convolutions", "mixed"])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_solutions_are_exact(name, damping):
    ekfac = quietly(stage_of(CASES[name]))
    b = draw(ekfac.shape[0], 3, seed=6)
    solution = ekfac.solve(b, damping)
    shifted = ekfac.dense() + damping * torch.eye(len(b), dtype=F64)
    check(shifted @ solution.x, b, 1e-10)
    check(solution.x, torch.linalg.solve(shifted, b), 1e-10)
    report = solution.report
    assert report.converged and report.residual < 1e-12
    assert (report.iterations, report.products, report.damping) == (0, 0, damping)
    assert "EK-FAC of the Gauss-Newton matrix" in report.system
    assert ("its diagonal on scale, table.weight, " in report.system) == (name == "mixed")
    one = ekfac.solve(b[:, 0], damping)
    assert torch.equal(one.x, solution.x[:, 0]) or relative_error(one.x, solution.x[:, 0]) < 1e-14


def test_a_singular_matrix_gives_the_least_norm_and_says_so():
    data = draw(9, 4), classes(9, 3)
    stage = Stage.of(randomised(nn.Linear(4, 3)), cross_entropy, data)
    ekfac = EKFAC(stage)  # shifting all logits changes nothing
    matrix = ekfac.dense()
    b = draw(15, seed=1)
    with pytest.warns(SolverWarning, match=r"5 eigenvalues are zero.*Add damping or weight decay"):
        solution = ekfac.solve(b)
    assert not solution.report.converged and solution.report.residual > 1e-3
    check(solution.x, torch.linalg.pinv(matrix, rtol=1e-10) @ b, 1e-8)
    same = torch.cat([torch.ones(12), torch.zeros(3)]).to(F64)  # moves all logits alike
    with pytest.raises(FailedSolve, match="the right-hand side is in what it takes for zero"):
        ekfac.solve(torch.stack([b, same], 1))
    straight = Stage.of(stage.model, lambda outputs, targets: outputs.sum(1), data)
    with pytest.raises(FailedSolve, match="in what it takes for zero"):
        EKFAC(straight).solve(b)


def test_what_cannot_be_solved_is_refused():
    ekfac = quietly(stage_of(CASES["mlp"]))
    b = draw(43)
    with pytest.raises(ValueError, match="damping"):
        ekfac.solve(b, -1.0)
    with pytest.raises(ValueError, match="b must be of shape"):
        ekfac.solve(b[:-1])
    with pytest.raises(ValueError, match="the right-hand side is not finite"):
        ekfac.solve(b * torch.nan)
    with pytest.raises(TypeError, match="b must be a tensor"):
        ekfac.solve(b.numpy())
    ekfac.stage.weights.mul_(2)
    for use in (lambda: ekfac @ b, lambda: ekfac.solve(b, 0.1)):
        with pytest.raises(ValueError, match="changed since EKFAC was made of it"):
            use()


def test_what_it_does_not_know_is_refused_by_name():
    data = draw(6, 4), classes(6, 3)
    model = randomised(mlp())

    def penalty(named: dict[str, Tensor]) -> Tensor:
        return sum(part.pow(4).sum() for part in named.values())

    with pytest.raises(ValueError, match="not that of a regularizer of your own"):
        EKFAC(Stage.of(model, cross_entropy, data, regularizer=penalty))
    many = randomised(nn.Linear(4, 129))
    with pytest.raises(ValueError, match="too many: 129, at most 128; take curvature="):
        EKFAC(Stage.of(many, cross_entropy, data))

    class Named(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    def of_named(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return cross_entropy(outputs["logits"], targets)

    with pytest.raises(ValueError, match=r"must return one tensor .* not dict"):
        EKFAC(Stage.of(randomised(Named(4, 3)), of_named, data))

    def looking(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * (1 if outputs.sum().item() < 1e9 else 2)

    with pytest.raises(ValueError, match=r"the loss's curvature cannot be taken by torch\.func"):
        EKFAC(Stage.of(model, looking, data))

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            ahead = self.layer(x)
            return (
                torch.where(x[:, :1] > 9, x @ self.layer.weight.T, ahead) if x.max() > 9 else ahead
            )

    inputs = data[0].clone()
    inputs[4, 0] = 10
    stage = Stage.of(randomised(Choosing()), cross_entropy, (inputs, data[1]), batch_size=2)
    with pytest.raises(
        ValueError, match=r"layer\.weight, layer\.bias in one way for some examples"
    ):
        EKFAC(stage)
    with pytest.raises(ValueError, match="block must be"):
        EKFAC(stage, "whole")


def test_as_its_own_preconditioner_it_needs_one_iteration():
    ekfac = quietly(stage_of(CASES["mlp"]))
    b = draw(43)
    solution = MinRes(damping=0.3, tol=1e-10).solve(ekfac, b)
    assert solution.report.iterations == 1 and solution.report.preconditioner == "EK-FAC"
    check(solution.x, ekfac.solve(b, 0.3).x, 1e-9)


# --- links ---------------------------------------------------------------------------------------


def two_layers(seed: int = 3, l2: float = 0.03, weights: bool = True, count: int = 17) -> Stage:
    """An embedding that is shared and a head of its own; one layer would hold both biases."""
    embedding, head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
    data = draw(count, 4, seed=2), classes(count, 3)
    return Stage(
        randomised(embedding, seed), randomised(head, seed + 9), cross_entropy, data, l2=l2,
        weights=weights_of(count) if weights else None, batch_size=7,
    )  # fmt: skip


def gradients(stage: Stage) -> Tensor:
    return torch.cat(list(stage.per_example_gradients()))


@pytest.mark.parametrize(
    "solver",
    [MinRes(damping=0.1), ConjugateGradient(damping=0.1), Dense(damping=0.1)],
    ids=lambda solver: type(solver).__name__,
)
def test_links_are_the_formulas_with_ekfac_in_place_of_the_hessian(solver):
    stage = two_layers()
    size, w = stage.parameters.size, stage.embedding_size
    q = draw(size, 2, seed=7)
    eye = torch.eye(size, dtype=F64)

    def check_link(link: Link, matrix: Tensor, block: slice, handed: Callable) -> None:
        back = link.pull_back(q, Asked())
        u = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=F64), q[block])
        whole = torch.zeros_like(q)
        whole[block] = u
        check(back.u, whole, 1e-9)
        exact = handed(u)
        if exact is None:
            assert not back.handed.any()
        else:
            check(back.handed, exact, 1e-9)
        (report,) = back.reports
        assert report.solver == "EK-FAC" and report.products == 0 and report.damping == 0.1

    both, alpha = EKFAC(stage).dense(), 0.07
    check_link(Optimum(stage, solver, "ekfac"), both, slice(None), lambda u: None)
    of_head = EKFAC(stage, "head").dense()
    cross = CrossHessian(stage).dense()  # exact
    check_link(Frozen(stage, solver, "ekfac"), of_head, slice(w, None), lambda u: q[:w] - cross @ u)
    pulled = both.clone()
    pulled[:w, :w] += 2 * alpha * eye[:w, :w]
    check_link(
        Proximal(stage, alpha, solver, "ekfac"), pulled, slice(None), lambda u: 2 * alpha * u[:w]
    )
    # A head's own block of EK-FAC is the same matrix as seen among all.
    check(both[w:, w:], of_head, 1e-10)
    assert relative_error(both, Hessian(stage).dense()) > 0.1


def test_a_new_functional_costs_no_evaluation_of_the_model():
    stage = two_layers()
    chain_of = {}
    evaluations = []
    stage.model.embedding[1].register_forward_hook(lambda *_: evaluations.append(1))
    for link in (Optimum(stage, MinRes(damping=0.1), "ekfac"), Stopped(stage, 3.0, "ekfac")):
        asked = Asked(operators=chain_of.setdefault(type(link), {}))
        link.pull_back(draw(stage.parameters.size, 1), asked)
        before = len(evaluations)
        assert before
        link.pull_back(draw(stage.parameters.size, 30, seed=1), asked)
        assert len(evaluations) == before


def test_automatic_damping_finds_nothing_below_zero():
    stage = two_layers()
    q = draw(stage.parameters.size, 2, seed=7)
    back = Optimum(stage, MinRes(damping="auto"), "ekfac").pull_back(q)
    check(back.u, torch.linalg.solve(EKFAC(stage).dense(), q), 1e-9)
    lowest = float(torch.linalg.eigvalsh(EKFAC(stage).dense())[0])
    assert back.reports[0].damping == 0 and back.reports[0].products == 0
    assert back.reports[0].lowest_eigenvalue == pytest.approx(lowest, rel=1e-9)


def test_other_solvers_do_what_they_do():
    stage = two_layers()
    q = draw(stage.parameters.size, 2, seed=7)
    matrix = EKFAC(stage).dense()
    plain = Optimum(stage, Identity(), "ekfac").pull_back(q)
    assert torch.equal(plain.u, q) and plain.reports[0].solver == "Identity"
    squared = ConjugateGradient(damping=0.2, squared=True, tol=1e-11)
    u = torch.linalg.solve(matrix @ matrix + 0.2 * torch.eye(len(q), dtype=F64), matrix @ q)
    check(Optimum(stage, squared, "ekfac").pull_back(q).u, u, 1e-8)


@pytest.mark.parametrize(
    "shared", ["*", "0.weight"], ids=["whole layers", "a weight, not its bias"]
)
def test_the_pull_is_exact_also_where_a_layer_is_shared_in_part(shared):
    data = draw(17, 4, seed=2), classes(17, 3)
    model = randomised(mlp())
    stage = Stage.of(model, cross_entropy, data, shared=shared, l2=0.02)
    link = Proximal(stage, 0.3, MinRes(), "ekfac")
    q = draw(stage.parameters.size, seed=3)[:, None]
    pull = torch.zeros(len(q), dtype=F64)
    pull[: stage.embedding_size] = 0.6
    matrix = EKFAC(stage).dense() + torch.diag(pull)
    check(link.pull_back(q).u, torch.linalg.solve(matrix, q), 1e-9)


def test_a_shift_that_differs_within_a_layer_is_none_of_the_basis():
    ekfac = quietly(stage_of(CASES["mixed"]))
    ones = torch.ones(ekfac.shape[0], dtype=F64)
    shift = torch.linspace(0, 1, len(ones), dtype=F64)
    assert ekfac.scaled(ones, shift) is None and ekfac.scaled(ones + shift, ones) is None
    moved = ekfac.scaled(4 * ones, ones)
    check(moved.dense(), 4 * ekfac.dense() + torch.eye(len(ones), dtype=F64), 1e-11)
    # Where there is no layer, it may differ: here on all but `layer` and `last`.
    names = ekfac.stage.names
    parts = [
        torch.rand(n) if name in ekfac.others else torch.full((n,), 0.3)
        for name, n in zip(names, (p.numel() for p in ekfac.stage.parameters.tensors))
    ]
    shift = torch.cat(parts).to(F64)
    check(ekfac.scaled(ones, shift).dense(), ekfac.dense() + torch.diag(shift), 1e-11)


def of_matrix(f: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * f(values) @ vectors.T


@pytest.mark.parametrize("l2", [0.03, 0.0])
def test_stopped_takes_functions_of_its_eigenvalues(l2):
    stage, tau = two_layers(l2=l2), 2.5
    w, p = stage.embedding_size, stage.parameters.size
    q, matrix = draw(p, 2, seed=7), EKFAC(stage).dense()

    def phi(s: Tensor) -> Tensor:
        return torch.where(s > 1e-14, -torch.expm1(-tau * s) / s.clamp_min(1e-14), tau)

    def flow(s: Tensor) -> Tensor:
        return torch.exp(-tau * s)

    back = Stopped(stage, tau, "ekfac").pull_back(q)
    check(back.u, of_matrix(phi, matrix) @ q, 1e-9)
    check(back.handed, (of_matrix(flow, matrix) @ q)[:w], 1e-9)
    assert back.reports[0].products == 0 and "EK-FAC" in back.reports[0].system

    # A scale for each layer and a decay are within the basis, one for each entry is not.
    scale = torch.cat([torch.full((w,), 0.4), torch.full((p - w,), 3.0)]).to(F64)
    for given, direct in ((scale, True), (0.3 + draw(p, seed=3).abs(), False)):
        root = given.sqrt()[:, None]
        inner = root * matrix * root.T + 0.2 * torch.eye(p, dtype=F64)
        back = Stopped(stage, tau, "ekfac", given, 0.2, tol=1e-12).pull_back(q)
        check(back.u, root * (of_matrix(phi, inner) @ (root * q)), 1e-8)
        check(back.handed, (of_matrix(flow, inner) @ (root * q) / root)[:w], 1e-8)
        assert (back.reports[0].solver == "EK-FAC") == direct


def test_a_chain_by_ekfac_is_the_chain_on_dense_matrices():
    """Both stages by EK-FAC, the cross term exact."""
    first, second = two_layers(weights=False), two_layers(seed=3, count=13)
    solver = MinRes(damping=0.05)
    links = [Optimum(first, solver, "ekfac"), Frozen(second, solver, "ekfac")]
    chain = Chain(links, progress=False, stationarity_tol=0.9)
    test = draw(4, 4, seed=21), classes(4, 3, seed=22)
    scores = chain.scores(test)
    w = first.embedding_size
    q = chain.test_gradients(test)
    eye = torch.eye(first.parameters.size, dtype=F64)
    u = torch.linalg.solve(EKFAC(second, "head").dense() + 0.05 * eye[w:, w:], q[w:])
    back = torch.cat([q[:w] - CrossHessian(second).dense() @ u, torch.zeros_like(q[w:])])
    s = torch.linalg.solve(EKFAC(first).dense() + 0.05 * eye, back)
    check(scores[0].values, -(gradients(first) @ s)[:, 0], 1e-9)
    check(scores[1].values, -(gradients(second)[:, w:] @ u)[:, 0], 1e-9)


def test_curvature_and_preconditioner_are_part_of_what_a_link_is():
    stage = two_layers()
    links = [
        Optimum(stage), Optimum(stage, curvature="ekfac"), Optimum(stage, preconditioner="ekfac"),
        Optimum(stage, curvature="gauss-newton"),
    ]  # fmt: skip
    known = [link.identity() for link in links]
    assert not any(a.same(b) for i, a in enumerate(known) for b in known[:i])
    with pytest.raises(ValueError, match=r"curvature must be one of \['ekfac', 'gauss-newton', "):
        Optimum(stage, curvature="kfac")
    with pytest.raises(ValueError, match="preconditioner must be one of"):
        Frozen(stage, preconditioner="jacobi")


# --- as a preconditioner -------------------------------------------------------------------------


def uncertain(inputs: int, width: int, l2: float) -> Stage:
    """Inputs of very different sizes, and classes that are hardly theirs."""
    x, spread = draw(300, inputs), torch.logspace(1, -1, inputs, dtype=F64)
    targets = (x @ draw(inputs, 4, seed=1) + 6 * draw(300, 4, seed=2)).argmax(1)
    embedding, head = nn.Sequential(nn.Linear(inputs, width), nn.Tanh()), nn.Linear(width, 4)
    data = x * spread, targets
    return Stage(randomised(embedding), randomised(head, 9), cross_entropy, data, l2=l2)


@pytest.mark.parametrize(
    ("kind", "share"), [(Optimum, 0.85), (Frozen, 0.3)], ids=["mlp", "its head"]
)
def test_the_exact_solve_takes_fewer_products_with_it(kind, share):
    stage = uncertain(16, 8, 0.01) if kind is Optimum else uncertain(16, 30, 1e-4)
    if kind is Optimum:
        train(stage)
    else:  # all classes about as likely, for each example
        stage.load_vector(0.1 * stage.vector())
    q = gradients(stage)[:1].T
    plain = kind(stage, MinRes(precondition=False, tol=1e-5)).pull_back(q)
    made = kind(stage, MinRes(tol=1e-5), preconditioner="ekfac").pull_back(q)
    (before,), (after,) = plain.reports, made.reports
    exact = kind(stage, Dense()).pull_back(q)
    check(made.u, exact.u, 1e-3)
    check(plain.u, exact.u, 1e-3)
    assert before.converged and after.converged and after.preconditioner == "EK-FAC"
    assert after.products < share * before.products, (after.products, before.products)


def test_preconditioned_systems_stay_what_they_are():
    stage, alpha = two_layers(), 0.07
    q = draw(stage.parameters.size, 2, seed=7)
    solver = MinRes(damping=0.3, tol=1e-11)
    for make in (
        lambda **more: Optimum(stage, solver, **more),
        lambda **more: Frozen(stage, solver, **more),
        lambda **more: Proximal(stage, alpha, solver, **more),
        lambda **more: Optimum(stage, solver, "gauss-newton", **more),
    ):
        one, other = make().pull_back(q), make(preconditioner="ekfac").pull_back(q)
        check(other.u, one.u, 1e-8)
        assert other.reports[0].preconditioner == "EK-FAC"
        operator = make(preconditioner="ekfac").operator
        assert isinstance(operator, Preconditioned)
        check(operator.dense(), make().operator.dense(), 1e-12)
    # The pull is in the preconditioner: else it would not be near K.
    near = Proximal(stage, 50.0, solver, preconditioner="ekfac").operator.preconditioner(0.3)
    matrix = AddDiagonal(Hessian(stage), Proximal(stage, 50.0).pull).dense()
    eye = torch.eye(len(q), dtype=F64)
    inside = near.root_transposed((matrix + 0.3 * eye) @ near.root(eye))
    assert (torch.linalg.eigvalsh((inside + inside.T) / 2) - 1).abs().max() < 2


def test_lanczos_sees_the_same_matrix():
    ekfac = quietly(stage_of(CASES["mlp"]))
    b = draw(43, 2)
    (found,), _ = functions_of(ekfac, b, [torch.exp], tol=1e-12)
    check(found, ekfac.function(torch.exp) @ b, 1e-9)


@pytest.mark.numeric
@pytest.mark.parametrize("share", [1e-3, 1e-1])
def test_damping_is_no_zero_in_single_precision_of_many_parameters(share):
    """With p eps near 1 a rule for eigenvalues of a p x p matrix would take all for zero."""
    torch.manual_seed(0)
    embedding = torch.nn.Sequential(torch.nn.Linear(784, 150), torch.nn.Tanh())
    data = torch.randn(60, 784), torch.randint(10, (60,))
    stage = Stage(embedding, torch.nn.Linear(150, 10), cross_entropy, data, check=False)
    operator = EKFAC(stage)
    b, damping = torch.randn(operator.shape[0]), share * float(operator.eigenvalues.max())
    x = operator.solve(b, damping).x
    assert relative_error(operator @ x + damping * x, b) < 1e-4
