"""Links of a chain: how a stage's trained parameters depend on what it was handed.

A stage turns c, the shared parameters W that the stage before hands on, into trained parameters
x = Φ(c; w), where w are the weights of its examples. For a functional q of what comes after, a
link takes λ = dq/dx and gives dq/dc, which the stage before takes, and I_i = N dq/dw_i:

    link        x = Φ(c; w)                       solve          handed back       I_i
    Optimum     argmin_x J(x)                     H u = λ        nothing           −∇ℓ_iᵀ u
    Frozen      W = c, Θ = argmin_Θ J(c, Θ)       J_ΘΘ u = λ_Θ   λ_W − J_WΘ u      −∇_Θ ℓ_iᵀ u
    Proximal    argmin α‖W − c‖² + J(W, Θ)        K u = λ        2α u_W            −∇ℓ_iᵀ u
    Stopped     gradient flow for a time τ        u = φ(H) λ     e^(−τH⁺) λ on W   −∇ℓ_iᵀ u
    Unrolled    the steps that were taken         the adjoint of each step, backwards

The solves are on what the stage trains. What is shared and not trained stays as it was handed,
x_c = c, and hands back λ_c − J_cx u: so in `Frozen` all of W, and in every link the base weights
under LoRA or the encoder under a linear probe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from msif_lib.curvature import AddDiagonal, CrossHessian, GaussNewton, Hessian
from msif_lib.descent import Keep, Path, pull_back
from msif_lib.lanczos import functions_of
from msif_lib.solvers import MinRes, Solver, SolveReport
from msif_lib.stage import Stage
from msif_lib.support.operators import LinearOperator
from msif_lib.support.parameters import Block

#: Curvatures that a solve may use, by name.
CURVATURES: dict[str, Callable[[Stage, Block], LinearOperator]] = {
    "hessian": Hessian,
    "gauss-newton": GaussNewton,
}


def check_solver(name: str, solver: Solver) -> Solver:
    """Return a solver, or refuse what is none.

    Raises
    ------
    TypeError
        It is a class, or has no method ``solve``; the message begins with `name`.
    """
    if isinstance(solver, type) or not hasattr(solver, "solve"):
        raise TypeError(f"{name} must be a solver of msif_lib.solvers, as MinRes(), not {solver!r}")
    return solver


@dataclass(frozen=True)
class Asked:
    """What is asked of a link.

    Attributes
    ----------
    hand_back
        Whether dq/dc is wanted; a first stage saves it.
    of
        A stage with the examples to be scored, if not its own.
    progress
        Show bars for what takes more than a second.
    keep
        Where a long walk is kept, to go on from there.
    """

    hand_back: bool = True
    of: Stage | None = None
    progress: bool = False
    keep: Keep | None = None


@dataclass(frozen=True)
class PulledBack:
    """What a link gives for cotangents λ ``(p, k)`` of its stage's parameters.

    Attributes
    ----------
    handed
        dq/dc over the shared parameters, ``(p_W, k)``.
    direction
        −u over all parameters ``(p, k)``, zero where nothing is trained: I_i = ∇ℓ_iᵀ(−u). None
        where the scores are not of this form.
    scores
        I_i ``(N, k)``, where `direction` is None.
    reports
        Of the solves.
    """

    handed: Tensor
    direction: Tensor | None = None
    scores: Tensor | None = None
    reports: tuple[SolveReport, ...] = ()


class Link(ABC):
    """A stage, and how its parameters came from those that it was handed.

    Attributes
    ----------
    stage
        The stage.
    """

    # Whether the trained parameters are read from the stage's modules, not from a record.
    reads_modules: ClassVar[bool] = True

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @property
    def block(self) -> Block:
        """Numbers of the parameters that this link's training moves."""
        return self.stage.trained

    @property
    def kept(self) -> Block:
        """Numbers of the shared parameters that stay as they were handed."""
        return tuple(number for number in self.stage.shared if number not in self.block)

    def vector(self) -> Tensor:
        """The trained parameters x, with all others of the stage, ``(p,)``."""
        return self.stage.vector()

    def begins_at(self) -> Tensor | None:
        """The parameters ``(p,)`` from which training began, where that is known."""
        return None

    def slope(self, given: Tensor | None) -> Tensor | None:
        """What a training that ended at an optimum left of its gradient, ``(p_block,)``.

        Parameters
        ----------
        given
            c, ``(p_W,)``; None for a first stage.

        Returns
        -------
        Tensor or None
            None where the formulas do not assume an optimum.
        """
        return None

    @abstractmethod
    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """Take λ = dq/dx ``(p, k)``, over all parameters of the stage, through its training."""

    @abstractmethod
    def settings(self) -> tuple[object, ...]:
        """All that the link's answer depends on beside its stage and λ."""


class _Solved(Link):
    """A link whose parameters are a stationary point: one solve with the block of H."""

    def __init__(
        self,
        stage: Stage,
        solver: Solver = MinRes(),  # noqa: B008 (frozen dataclass)
        curvature: str = "hessian",
    ) -> None:
        super().__init__(stage)
        if curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {sorted(CURVATURES)}, not {curvature!r}")
        self.solver, self.curvature = check_solver("solver", solver), curvature

    @cached_property
    def operator(self) -> LinearOperator:
        """H, the curvature of what is trained."""
        return CURVATURES[self.curvature](self.stage, self.block)

    @cached_property
    def cross(self) -> CrossHessian:
        """J_cx, of what is shared and stays as handed (rows) and what is trained."""
        return CrossHessian(self.stage, self.kept, self.block)

    def slope(self, given: Tensor | None) -> Tensor:
        """∇J over what is trained."""
        return self.stage.parameters.take(self.stage.gradient(), self.block)

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """H u = λ; handed back is nothing of what is trained."""
        u, reports = self._solution(cotangent, asked)
        return self._pulled_back(cotangent, u, None, asked, reports)

    def _solution(self, cotangent: Tensor, asked: Asked) -> tuple[Tensor, tuple[SolveReport, ...]]:
        """U = H⁻¹ λ over the block, ``(p_block, k)``."""
        right = self.stage.parameters.take(cotangent, self.block)
        solution = self.solver.solve(self.operator, right, progress=asked.progress)
        return solution.x, (solution.report,)

    def _pulled_back(
        self,
        cotangent: Tensor,
        u: Tensor,
        trained: Tensor | None,
        asked: Asked,
        reports: tuple[SolveReport, ...],
    ) -> PulledBack:
        """Hand back `trained` where that moves, and λ_c − J_cx u where nothing does."""
        stage, put, take = self.stage, self.stage.parameters.put, self.stage.parameters.take
        handed = torch.zeros_like(cotangent)
        if asked.hand_back and trained is not None:
            handed = handed + put(trained, self.block)
        if asked.hand_back and self.kept:
            handed = handed + put(take(cotangent, self.kept) - self.cross @ u, self.kept)
        return PulledBack(stage.split(handed)[0], put(-u, self.block), None, reports)

    def settings(self) -> tuple[object, ...]:
        """Kind, solver, curvature."""
        return type(self).__name__, self.solver, self.curvature


class Optimum(_Solved):
    """Trained to an optimum of its objective, wherever it began: x = argmin J(x).

        H u = λ,   I_i = −∇ℓ_iᵀ u                              (Koh & Liang 2017; the paper's eq. 8)

    Parameters
    ----------
    stage
        The stage at its optimum.
    solver
        For H⁻¹.
    curvature
        ``"hessian"``, or ``"gauss-newton"`` in its place.

    Raises
    ------
    ValueError
        An unknown curvature.
    TypeError
        `solver` is none.
    """


class Frozen(_Solved):
    """The shared parameters stay as handed, the rest is at its optimum: case 1 of the paper.

        J_ΘΘ u = λ_Θ,   handed back λ_W − J_WΘ u,   I_i = −∇_Θ ℓ_iᵀ u              (eqs. 9 to 11)

    Parameters
    ----------
    stage
        The stage at (W, Θ*), with the parameters W that it was handed.
    solver
        For J_ΘΘ⁻¹.
    curvature
        ``"hessian"``, or ``"gauss-newton"`` in its place.

    Raises
    ------
    ValueError
        An unknown curvature.
    TypeError
        `solver` is none.
    """

    @property
    def block(self) -> Block:
        """Numbers of the parameters that are trained and not shared."""
        return tuple(number for number in self.stage.trained if number in self.stage.own)


class Proximal(_Solved):
    """Pulled towards what it was handed: argmin α‖W − c‖² + J(W, Θ), case 2 of the paper.

        K u = λ,   K = H + 2α on W,   handed back 2α u_W,   I_i = −∇ℓ_iᵀ u        (eqs. 12 to 15)

    Parameters
    ----------
    stage
        The stage at its (W*, Θ*), with modules of its own.
    alpha
        α > 0, the strength of the pull (there is no ½).
    solver
        For K⁻¹.
    curvature
        Of J: ``"hessian"``, or ``"gauss-newton"`` in its place.

    Raises
    ------
    ValueError
        α ≤ 0 or infinite; an unknown curvature.
    TypeError
        `solver` is none.
    """

    def __init__(
        self,
        stage: Stage,
        alpha: float,
        solver: Solver = MinRes(),  # noqa: B008 (frozen dataclass)
        curvature: str = "hessian",
    ) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(
                f"alpha must be positive, not {alpha}: at 0 the finetuned model no "
                "longer depends on the pretrained embedding in this formulation"
            )
        self.alpha = alpha
        super().__init__(stage, solver, curvature)

    @cached_property
    def pull(self) -> Tensor:
        """2α where a shared parameter is trained, else 0, ``(p_block,)``."""
        pull = torch.zeros_like(self.stage.vector())
        pull[: self.stage.embedding_size] = 2 * self.alpha
        return self.stage.parameters.take(pull, self.block)

    @cached_property
    def operator(self) -> LinearOperator:
        """K = H + 2α on W."""
        return AddDiagonal(CURVATURES[self.curvature](self.stage, self.block), self.pull)

    def slope(self, given: Tensor | None) -> Tensor:
        """∇(α‖W − c‖² + J) over what is trained."""
        slope = super().slope(given)
        if given is None:
            return slope
        away = self.stage.vector()
        away[: len(given)] -= given
        return slope + self.pull * self.stage.parameters.take(away, self.block)

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """K u = λ; handed back is 2α u_W."""
        u, reports = self._solution(cotangent, asked)
        return self._pulled_back(cotangent, u, self.pull[:, None] * u, asked, reports)

    def settings(self) -> tuple[object, ...]:
        """Kind, solver, curvature, α."""
        return *super().settings(), self.alpha


class Stopped(_Solved):
    """Gradient descent that ended after a time τ, its path not kept: the flow of a quadratic model.

        u = φ(H) λ,   φ(σ) = (1 − e^(−τσ))/σ for σ > 0, τ for σ ≤ 0
        handed back e^(−τH⁺) λ on W,   I_i = −∇ℓ_iᵀ u

    with H at the end of training and H⁺ without its negative eigenvalues. φ is bounded, so that
    an indefinite H does no harm and no damping is needed (Bae et al. 2024 with one segment).

    Parameters
    ----------
    stage
        The stage where its training ended.
    time
        τ, the sum of the learning rates, divided by 1 − μ for momentum μ: ``path.time``.
    curvature
        ``"hessian"``, or ``"gauss-newton"`` in its place.
    scale
        P, by which the optimiser multiplies gradients, ``(p,)`` over all parameters: for Adam
        1/(√v̂ + ε) at the end. The flow is then that of P^½ H P^½. None: 1.
    decay
        Decoupled weight decay δ, added to P^½ H P^½.
    tol, max_iterations
        Of Lanczos, see :func:`msif_lib.lanczos.functions_of`.

    Raises
    ------
    ValueError
        A `time` or `scale` that is not positive, a negative `decay`; an unknown curvature.
    """

    def __init__(
        self,
        stage: Stage,
        time: float,
        curvature: str = "hessian",
        scale: Tensor | None = None,
        decay: float = 0.0,
        tol: float | None = None,
        max_iterations: int | None = None,
    ) -> None:
        if not 0 < time < float("inf"):
            raise ValueError(f"time must be positive and finite, not {time}")
        if not 0 <= decay < float("inf"):
            raise ValueError(f"decay must be zero or positive, not {decay}")
        super().__init__(stage, curvature=curvature)
        scale = torch.ones_like(stage.vector()) if scale is None else scale
        if scale.shape != stage.vector().shape or not (scale > 0).all():
            raise ValueError(f"scale must hold {stage.parameters.size} positive numbers")
        self.time, self.scale, self.decay, self.tol = time, scale, decay, tol
        self.max_iterations = max_iterations

    def slope(self, given: Tensor | None) -> None:  # type: ignore[override]
        """None: nothing is assumed of the gradient."""
        return

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """Apply φ(H) for u and e^(−τH⁺) for what is handed back."""
        tau, take = self.time, self.stage.parameters.take
        root = take(self.scale, self.block).sqrt()[:, None]  # P^½

        def phi(sigma: Tensor) -> Tensor:
            positive = sigma > 0
            safe = torch.where(positive, sigma, 1.0)
            return torch.where(positive, -torch.expm1(-tau * safe) / safe, tau)

        def flow(sigma: Tensor) -> Tensor:
            return torch.exp(-tau * sigma.clamp_min(0))

        (u, trained), report = functions_of(
            _Scaled(self.operator, root, self.decay),
            root * take(cotangent, self.block),
            (phi, flow),
            tol=self.tol,
            max_iterations=self.max_iterations,
            system=f"(1 − exp(−{tau:.4g} A))/A b",
            progress=asked.progress,
        )
        return self._pulled_back(cotangent, root * u, trained / root, asked, (report,))

    def settings(self) -> tuple[object, ...]:
        """Kind, curvature, τ, P, δ, and how far Lanczos goes."""
        return (
            type(self).__name__, self.curvature, self.time, self.scale, self.decay, self.tol,
            self.max_iterations,
        )  # fmt: skip


class _Scaled:
    """P^½ H P^½ + δI."""

    def __init__(self, operator: LinearOperator, root: Tensor, decay: float) -> None:
        self._operator, self._root, self._decay = operator, root, decay
        self.shape = operator.shape

    def __matmul__(self, columns: Tensor) -> Tensor:
        product = self._root * (self._operator @ (self._root * columns))
        return product + self._decay * columns


class Unrolled(Link):
    """The training that was run, step by step: exact, whether it converged or not.

    λ goes back through the steps of the path, as :func:`msif_lib.descent.pull_back` says.

    Parameters
    ----------
    stage
        The stage.
    path
        Its recorded training, from :func:`msif_lib.descent.descend` or ``Path.record``.

    Raises
    ------
    ValueError
        The path is that of another model.
    """

    reads_modules = False

    def __init__(self, stage: Stage, path: Path) -> None:
        super().__init__(stage)
        if len(path.start) != stage.parameters.size:
            raise ValueError(
                f"path: a training of {len(path.start)} parameters is not one of this stage, which "
                f"has {stage.parameters.size}"
            )
        self.path = path

    def vector(self) -> Tensor:
        """Where the path ends."""
        return self.path.end

    def begins_at(self) -> Tensor:
        """Where the path starts."""
        return self.path.start

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """The adjoint recursion; handed back is λ at the start."""
        back = pull_back(self.stage, self.path, cotangent, asked.of, asked.progress, asked.keep)
        # An example of the training set is drawn with weight 1/B, another has weight 1 a step.
        scores = back.derivatives * (self.stage.size if asked.of is None else 1)
        return PulledBack(self.stage.split(back.handed)[0], None, scores)

    def settings(self) -> tuple[object, ...]:
        """Kind and path."""
        path = self.path
        return (
            type(self).__name__, path.start, path.end, list(path.batches), path.learning_rates,
            path.optimiser, path.noise_seed, path.augment,
        )  # fmt: skip
