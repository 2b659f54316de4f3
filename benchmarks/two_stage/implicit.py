"""Rows of the implicit formulas: both stages taken to end at an optimum, whether they did or not.

    case 1   Optimum → Frozen      the embedding as pretrained        (the paper's eqs. 9 to 11)
    case 2   Optimum → Proximal    the embedding pulled towards it    (its eqs. 12 to 15)

In case 1 the blocks of the finetuning objective are taken where finetuning ended, though it moved
the embedding. α of case 2 is the setting's own at an optimum; off it, 1/(2τ) with τ the time that
finetuning took: then what finetuning leaves of the embedding in flat directions of its loss,
2α/(σ + 2α), is right where gradient flow has forgotten 1 − e⁻¹ of it. Where finetuning keeps the
embedding both cases are one.

A damping is given by its size beside the largest eigenvalue of the matrix to which it is added, one
factor for both solves. Where it is fixed, one of :data:`FACTORS` is taken, for each setting by the
rule of :mod:`benchmarks.two_stage.choices`. Little damping of an indefinite matrix is worse than
none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from benchmarks.two_stage.methods import of_classes, register
from benchmarks.two_stage.settings import Problem
from msif_lib.curvature import AddDiagonal, CrossHessian, Hessian
from msif_lib.ekfac import EKFAC
from msif_lib.links import Asked, Frozen, Optimum, Proximal, PulledBack
from msif_lib.solvers import MinRes, Operator, Solver, SolveReport, SolverWarning, automatic_damping
from msif_lib.support.operators import LinearOperator

#: Factors of the largest eigenvalue from which a damping is chosen.
FACTORS = (1e-2, 1e-1, 1.0)
# Relative residual of an iterative solve, and iterations allowed: of values that decide an order.
_TOL, _ITERATIONS = 1e-3, 500


# --- the chain -----------------------------------------------------------------------------------


def functionals(of: Problem) -> Tensor:
    """∇q of each functional at the finetuned model, ``(p, T)`` over embedding and head."""
    tested = of.finetune.with_data(of.data.functionals, "functionals", check=False)
    return torch.cat(list(tested.per_example_gradients())).T.contiguous()


def on_embedding(of: Problem, rows: Tensor) -> Tensor:
    """Columns over the embedding ``(p_W, k)`` among all parameters of pretraining, ``(p, k)``."""
    whole = rows.new_zeros(len(of.pretrain.vector()), rows.shape[1])
    whole[: len(rows)] = rows
    return whole


def through(of: Problem, first: Solved, handed: Tensor) -> Tensor:
    """dq/dw_i ``(m, T)`` of what finetuning hands back ``(p_W, T)``, through pretraining."""
    u = first.pull_back(on_embedding(of, handed), hand_back=False).u
    assert u is not None
    return -along(of, u) / of.size


def along(of: Problem, u: Tensor) -> Tensor:
    """∇ℓ_iᵀ u of the pretraining examples, ``(m, k)`` for columns ``(p, k)``."""
    return torch.cat(list(of.pretrain.directional_derivatives(u)))


def pull_of(of: Problem) -> float:
    """α of case 2."""
    path = getattr(of.chain.links[1], "path", None)
    return of.setting.alpha if path is None else 1 / (2 * path.time)


def links(
    of: Problem, case: int, curvature: str = "hessian", preconditioner: str = "gauss-newton"
) -> tuple[Optimum, Frozen | Proximal]:
    """Both links of a case, undamped."""
    stage, how = of.finetune, (MinRes(), curvature, preconditioner)
    last = Frozen(stage, *how) if case == 1 else Proximal(stage, pull_of(of), *how)
    return Optimum(of.pretrain, *how), last


# --- damping -------------------------------------------------------------------------------------


def largest(operator: LinearOperator) -> float:
    """The largest eigenvalue, to one part in a hundred."""
    if isinstance(operator, EKFAC):
        return float(operator.eigenvalues.max())
    start = torch.ones(operator.shape[0], dtype=torch.float64).numpy()
    found = eigsh(operator.to_scipy(), 1, which="LA", tol=1e-2, v0=start, return_eigenvectors=False)
    return float(found[0])


#: What is added to the diagonal of a matrix.
Damping = Callable[[LinearOperator], float]


def none(operator: LinearOperator) -> float:
    """Nothing."""
    return 0.0


def fixed(factor: float) -> Damping:
    """`factor` times the largest eigenvalue."""
    return lambda operator: factor * largest(operator)


def automatic(operator: LinearOperator) -> float:
    """By the library's rule, from an estimate of the lowest eigenvalue."""
    return automatic_damping(operator).damping


class Solved:
    """A link and how it is solved; its matrix is made once.

    Parameters
    ----------
    link
        The link, undamped.
    damping
        Of its matrix, for MINRES.
    solver
        Another solver in its place.
    """

    def __init__(
        self, link: Optimum | Frozen | Proximal, damping: Damping, solver: Solver | None = None
    ) -> None:
        self.operators: dict[str, LinearOperator] = {"operator": link.operator}
        solver = solver or MinRes(_TOL, _ITERATIONS, damping=damping(self.operators["operator"]))
        self.link = replace(link, solver=solver)

    def pull_back(self, cotangent: Tensor, hand_back: bool = True) -> PulledBack:
        """As the link's own."""
        return self.link.pull_back(cotangent, Asked(hand_back=hand_back, operators=self.operators))


def case_scores(
    of: Problem, case: int, damping: Damping, solver: Solver | None = None, **how: str
) -> Tensor:
    """dq/dw_i ``(m, T)`` of a case, wherever finetuning left the embedding.

    A :class:`msif_lib.Chain` refuses a finetuning that moved what its link says it kept.
    """
    with warnings.catch_warnings():
        # That a solve stops short or meets negative curvature is what is shown.
        warnings.simplefilter("ignore", SolverWarning)
        first, last = (Solved(link, damping, solver) for link in links(of, case, **how))
        return through(of, first, last.pull_back(functionals(of)).handed)


# --- exact curvature -----------------------------------------------------------------------------


@register("case 1, no damping", effort=2)
def case_1(of: Problem) -> Tensor:
    """The paper's case 1 with exact Hessians, by MINRES to 1e-3 or 500 iterations."""
    return case_scores(of, 1, none)


@register("case 1, fixed damping", effort=1, tried=FACTORS)
def case_1_fixed(of: Problem, factor: float) -> Tensor:
    """The same, damped."""
    return case_scores(of, 1, fixed(factor))


@register("case 1, automatic damping", effort=1)
def case_1_automatic(of: Problem) -> Tensor:
    """The same, each matrix damped by what makes it definite.

    Its two factors were chosen on digits.
    """
    return case_scores(of, 1, automatic)


@register("case 2, no damping", effort=2)
def case_2(of: Problem) -> Tensor:
    """The paper's case 2 with exact Hessians, by MINRES to 1e-3 or 500 iterations."""
    return case_scores(of, 2, none)


@register("case 2, fixed damping", effort=1, tried=FACTORS)
def case_2_fixed(of: Problem, factor: float) -> Tensor:
    """The same, damped."""
    return case_scores(of, 2, fixed(factor))


@register("case 2, automatic damping", effort=1)
def case_2_automatic(of: Problem) -> Tensor:
    """The same, each matrix damped by what makes it definite.

    Its two factors were chosen on digits.
    """
    return case_scores(of, 2, automatic)


@register("case 1, Gauss–Newton", effort=1, tried=FACTORS)
def case_1_gauss_newton(of: Problem, factor: float) -> Tensor:
    """Case 1 with Gauss–Newton matrices, damped."""
    return case_scores(of, 1, fixed(factor), curvature="gauss-newton")


@register("case 2, Gauss–Newton", effort=1, tried=FACTORS)
def case_2_gauss_newton(of: Problem, factor: float) -> Tensor:
    """Case 2 with Gauss–Newton matrices, damped."""
    return case_scores(of, 2, fixed(factor), curvature="gauss-newton")


# --- EK-FAC --------------------------------------------------------------------------------------


@register("EK-FAC in both stages", only=of_classes, tried=(1e-3, *FACTORS))
def ekfac(of: Problem, factor: float) -> Tensor:
    """Multi-stage influence as Bao et al. (2025) state it, EK-FAC in both stages.

        dq/dw_i = −∇_W qᵀ (A_F + 2α + λ)⁻¹ 2α (A_G + λ)⁻¹ ∇_W ℓ_i / m

    A_F and A_G are block diagonal by layers, so that the cross term of embedding and head drops out
    of the finetuning matrix, and the head's own gradient with it; where finetuning holds the
    embedding, what is handed back keeps its exact cross term. Their code damps both inverses by
    a small constant (1e-4), which stands for the pull too; here the pull is 2α as in every row of
    case 2, and λ is chosen. Modes of ℓ'' are summed exactly, where they sample labels.
    """
    return case_scores(of, 2, fixed(factor), curvature="ekfac")


@register("EK-FAC, cross term kept", only=of_classes, tried=(1e-3, *FACTORS))
def ekfac_cross(of: Problem, factor: float) -> Tensor:
    """The same with the head's answer to the embedding.

    In the Schur form of case 2, 2α (S + 2α)⁻¹ stands before f_W − F_WΘ F_ΘΘ⁻¹ f_Θ. F_WΘ is exact
    and the other matrices are EK-FAC's; of S = F_WW − F_WΘ F_ΘΘ⁻¹ F_ΘW the first part alone is
    taken, which is no less than S and never negative.
    """
    first, last = (Solved(link, fixed(factor)) for link in links(of, 2, curvature="ekfac"))
    stage = of.finetune
    shared, own = stage.split(functionals(of))
    if not last.link.held:
        head = torch.cat([torch.zeros_like(shared), own])
        answer = last.pull_back(head).u
        assert answer is not None
        shared = shared - CrossHessian(stage) @ stage.split(answer)[1]
    cotangent = torch.cat([shared, own])
    return through(of, first, last.pull_back(cotangent).handed)


@register("case 2, preconditioned by EK-FAC", only=of_classes, effort=2)
def by_ekfac(of: Problem) -> Tensor:
    """Case 2 with automatic damping, to 1e-3, its solves preconditioned by EK-FAC: another cost.

    In place of the leading rows of the Gauss–Newton matrix, by which the other exact rows are.
    """
    return case_scores(of, 2, automatic, preconditioner="ekfac")


# --- a few eigenpairs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Leading(Solver):
    """u = V Σ⁻¹ Vᵀ b with the eigenpairs that are largest in size, and nothing elsewhere.

    Of a sum H + D with a known diagonal it takes the pairs of H, and D as it is: Woodbury's formula
    for (V Σ Vᵀ + D)⁻¹. Where D is zero, the smallest of the pairs stands for what is left of H.

    Attributes
    ----------
    pairs
        How many.
    """

    pairs: int = 100

    def _solve(self, operator: Operator, b: Tensor, progress: bool) -> tuple[Tensor, SolveReport]:
        assert isinstance(operator, LinearOperator)
        every, known = self.pairs >= operator.shape[0] - 1, isinstance(operator, AddDiagonal)
        if every:
            x = torch.linalg.solve(operator.dense(), b)
        elif known:
            values, vectors = self._leading(operator.operator)
            rest = torch.where(operator.diagonal > 0, operator.diagonal, values.abs().min())
            ahead, plain = vectors / rest[:, None], b / rest[:, None]
            inner = torch.diag(1 / values) + vectors.T @ ahead
            x = plain - ahead @ torch.linalg.solve(inner, vectors.T @ plain)
        else:
            values, vectors = self._leading(operator)
            x = vectors @ ((vectors.T @ b) / values[:, None])
        left = b - operator @ x
        residuals = tuple((left.norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)).tolist())
        return x, SolveReport("Arnoldi", self._system, 0.0, 0, 0, residuals, (), every)

    def _leading(self, operator: LinearOperator) -> tuple[Tensor, Tensor]:
        """The eigenpairs ``(k,)`` and ``(p, k)`` that are largest in size."""
        start = torch.ones(operator.shape[0], dtype=torch.float64).numpy()
        found = eigsh(operator.to_scipy(), self.pairs, which="LM", tol=1e-4, v0=start)
        values, vectors = (torch.from_numpy(one.copy()) for one in found)
        return values, vectors


@register("Arnoldi", effort=2, tried=(50, 100, 200))
def arnoldi(of: Problem, pairs: float) -> Tensor:
    """Case 2 by the leading eigenpairs of each matrix (Schioppa et al. 2021), undamped.

    By ARPACK's restarted Lanczos. What is outside the span is dropped, but the pull of finetuning,
    which is known, is kept.
    """
    return case_scores(of, 2, none, Leading(int(pairs)))


# --- groups --------------------------------------------------------------------------------------


def _of_groups(of: Problem, left_out: Tensor, x: Tensor) -> Tensor:
    """(1/m) Σ_{i in U} ∇²ℓ_i x_U for a column of x and a subset U each, ``(p, M)``."""
    stage, found = of.pretrain, torch.zeros_like(x)
    for column, (chosen, v) in enumerate(zip(left_out, x.unbind(1))):
        group = stage.with_weights(chosen.to(stage.weights))
        found[:, column] = Hessian(group, stage.trained) @ v - stage.l2 * v
    return found


def group_changes(of: Problem, left_out: Tensor, damping: Damping, order: int = 2) -> Tensor:
    """Predicted changes ``(M, T)`` of subsets ``(M, m)``; see :func:`second_order_groups`."""
    first, last = (Solved(link, damping) for link in links(of, 2))
    handed = on_embedding(of, last.pull_back(functionals(of)).handed)
    gradients = torch.zeros(len(handed), len(left_out), dtype=handed.dtype)
    start = 0
    for block in of.pretrain.per_example_gradients():
        some = left_out[:, start : start + len(block)].to(block)
        gradients += (some @ block).T / of.size
        start += len(block)
    solved = first.pull_back(torch.cat([handed, gradients], 1), hand_back=False).u
    assert solved is not None
    v, moved = solved.split([handed.shape[1], len(left_out)], 1)
    changes = moved.T @ handed
    if order == 2:
        changes += _of_groups(of, left_out, moved).T @ v
    return changes


@register("second-order groups", effort=2, of_subsets=True, shares=(0.2, 0.5))
def second_order_groups(of: Problem, share: float, left_out: Tensor, given: object) -> Tensor:
    """Case 2 with second-order influence of groups (Basu, You & Feizi 2020) in pretraining.

    Without a subset U of the m examples, 1/m kept, the optimum moves by x' + ½x'' + …, where

        x' = H⁻¹ Σ_U ∇ℓ_i / m,   ½x'' = H⁻¹ (Σ_U ∇²ℓ_i / m) x'

    but for a term in third derivatives of the loss, which they leave out too. They take the mean
    over those that are left: with p = |U|/m, X = x'/(1 − p) and the mean Hessian H̄_U over U the
    same expansion is then X − p/(1 − p) (X − H⁻¹ H̄_U X), the truth here being another. What
    follows is linear: case 2, with automatic damping.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        return group_changes(of, left_out, automatic)
