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
under LoRA or the encoder under a linear probe. A head of its own begins anew: nothing is handed
back for it, and the next λ is zero on the head of the stage before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from msif_lib.curvature import AddDiagonal, CrossHessian, GaussNewton, Hessian, Scaled
from msif_lib.descent import Keep, Path, pull_back
from msif_lib.ekfac import EKFAC, Preconditioned
from msif_lib.lanczos import functions_of
from msif_lib.solvers import ConjugateGradient, Dense, MinRes, Solver, SolveReport
from msif_lib.stage import Stage
from msif_lib.support.arguments import check_each, check_limits, instance, not_negative, positive
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.operators import LinearOperator
from msif_lib.support.parameters import Block
from msif_lib.support.state import OwnState

#: Curvatures that a solve may use, by name. The cross term J_cx is exact with each.
CURVATURES: dict[str, Callable[[Stage, Block], LinearOperator]] = {
    "hessian": Hessian,
    "gauss-newton": GaussNewton,
    "ekfac": EKFAC,
}
#: What an iterative solve may be preconditioned by. Changes what it costs, never what is solved.
PRECONDITIONERS = ("gauss-newton", "ekfac")


def check_solver(name: str, solver: Solver) -> Solver:
    """Return a solver, or refuse what is none.

    Raises
    ------
    TypeError
        It is a class, or has no method ``solve``; the message begins with `name`.
    """
    if isinstance(solver, type | Tensor) or not callable(getattr(solver, "solve", None)):
        raise TypeError(f"{name} must be a solver of msif_lib.solvers, as MinRes(), not {solver!r}")
    return solver


def check_path(stage: Stage, path: Path) -> None:
    """Refuse the path of another model, or one that moved other parameters than the stage trains.

    Raises
    ------
    ValueError
        It is one; the message says what differs.
    TypeError
        One of the two is no stage or no path.
    """
    instance("stage", stage, Stage)
    instance("path", path, Path, ", from descend or Path.record")
    size, start = stage.parameters.size, path.start
    if start.dtype != stage.dtype or start.device != stage.device:
        raise ValueError(
            f"path is of a training in {start.dtype} on {start.device}, the stage is {stage.dtype} "
            f"on {stage.device}; take the stage with which it was recorded, or record it anew"
        )
    if len(path.start) != size:
        raise ValueError(
            f"path: a training of {len(path.start)} parameters is not one of this stage, "
            f"which has {size}"
        )
    moved, trained = path.moved, stage.parameters.count(stage.trained)
    if moved not in (None, trained):
        raise ValueError(
            f"path moved {moved} parameters, and the stage trains {trained}; say with trained= "
            "what the recorded training moved"
        )
    way = path.end - path.start
    for number in set(stage.parameters.all) - set(stage.trained):
        if stage.parameters.take(way, (number,)).any():
            raise ValueError(
                f"path moved {stage.names[number]}, which the stage does not train; say "
                "with trained= what the recorded training moved"
            )


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
    operators
        The link's operators by name, kept from one call to the next by who sees to it that the
        stage is the same. None: they are made anew.
    """

    hand_back: bool = True
    of: Stage | None = None
    progress: bool = False
    keep: Keep | None = None
    operators: dict[str, LinearOperator] | None = None

    def operator(self, link: Link, name: str) -> LinearOperator:
        """The operator that is this attribute of the link."""
        if self.operators is None:
            return getattr(link, name)
        if name not in self.operators:
            self.operators[name] = getattr(link, name)
        return self.operators[name]


@dataclass(frozen=True)
class PulledBack:
    """What a link gives for cotangents λ ``(p, k)`` of its stage's parameters.

    Attributes
    ----------
    handed
        dq/dc, over the shared parameters ``(p_W, k)``.
    u
        Over all parameters ``(p, k)``, zero where nothing is trained: I_i = −∇ℓ_iᵀ u. None where
        the scores are not of this form.
    scores
        I_i ``(N, k)``, where `u` is None.
    reports
        Of the solves.
    """

    handed: Tensor
    u: Tensor | None = None
    scores: Tensor | None = None
    reports: tuple[SolveReport, ...] = ()


class Link(OwnState, ABC):
    """A stage, and how its parameters came from those that it was handed.

    Attributes
    ----------
    stage
        The stage.
    """

    stage: Stage

    # Whether the trained parameters are read from the stage's modules, not from a record.
    reads_modules: ClassVar[bool] = True

    def _check_stage(self) -> None:
        if not isinstance(self.stage, Stage):
            raise TypeError(
                f"{type(self).__name__} takes a Stage first, not {type(self.stage).__name__}"
            )

    @property
    def block(self) -> Block:
        """Numbers of the parameters that this link's training moves."""
        return self.stage.trained

    @property
    def held(self) -> Block:
        """Numbers of the shared parameters that stay as they were handed."""
        return tuple(number for number in self.stage.shared if number not in self.block)

    def vector(self) -> Tensor:
        """The trained parameters x, with all others of the stage, ``(p,)``."""
        return self.stage.vector()

    def begins_at(self) -> Tensor | None:
        """The parameters ``(p,)`` from which training began, where that is known."""
        return None

    def slope(self, given: Tensor | None) -> Tensor | None:
        """The gradient ``(p_block,)`` of what was minimised, which the formulas take as zero.

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

    def settings(self) -> list[object]:
        """All that the link's answer depends on beside its stage and λ."""
        named = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return [type(self), {name: named[name] for name in sorted(named) if name != "stage"}]

    def identity(self) -> ProblemIdentity:
        """What a link is known by in results that are kept, its stage included."""
        return ProblemIdentity.of(self.settings(), self.stage.identity(self.vector()))


class _Curved(Link):
    """A link that knows its training by the curvature of J at the end of it."""

    curvature: str

    def _check_curvature(self) -> None:
        if not isinstance(self.curvature, str) or self.curvature not in CURVATURES:
            raise ValueError(
                f"curvature must be one of {sorted(CURVATURES)}, not {self.curvature!r}"
            )

    @property
    def operator(self) -> LinearOperator:
        """H, the curvature of what is trained."""
        return CURVATURES[self.curvature](self.stage, self.block)

    @property
    def cross(self) -> LinearOperator:
        """J_cx, of what is shared and stays as handed (rows) and what is trained."""
        return CrossHessian(self.stage, self.held, self.block)

    def _on_block(self, cotangent: Tensor) -> Tensor:
        """The entries of what is trained, ``(p_block, k)``."""
        return self.stage.parameters.take(cotangent, self.block)

    def _whole(self, rows: Tensor) -> Tensor:
        """Entries of what is trained among all parameters, ``(p, k)``."""
        return self.stage.parameters.put(rows, self.block)

    def _of_held(self, cotangent: Tensor, u: Tensor, asked: Asked) -> Tensor:
        """λ_c − J_cx u on what stays as handed, zero on other shared parameters, ``(p_W, k)``."""
        if not (self.held and asked.hand_back):
            return torch.zeros_like(self.stage.split(cotangent)[0])
        cross = asked.operator(self, "cross")
        of_c = self.stage.parameters.take(cotangent, self.held) - cross @ u
        return self.stage.split(self.stage.parameters.put(of_c, self.held))[0]

    def _on_shared(self, rows: Tensor) -> Tensor:
        """Of entries of what is trained those that are shared, zero on the others, ``(p_W, k)``."""
        return self.stage.split(self._whole(rows))[0]


class _Stationary(_Curved):
    """A link whose trained parameters are a stationary point: one solve."""

    solver: Solver
    preconditioner: str

    def __post_init__(self) -> None:
        self._check_stage()
        check_solver("solver", self.solver)
        self._check_curvature()
        if self.preconditioner not in PRECONDITIONERS:
            raise ValueError(
                f"preconditioner must be one of {[*PRECONDITIONERS]}, not {self.preconditioner!r}"
            )

    @property
    def operator(self) -> LinearOperator:
        """The matrix of the solve, with its preconditioner."""
        if self.curvature == "ekfac":
            return self._ekfac()
        matrix = self._matrix()
        by_ekfac = self.preconditioner == "ekfac"
        return Preconditioned(matrix, self._ekfac()) if by_ekfac else matrix

    def _matrix(self) -> LinearOperator:
        """H, or what stands in its place."""
        return CURVATURES[self.curvature](self.stage, self.block)

    def _ekfac(self) -> EKFAC:
        """The same by EK-FAC."""
        return EKFAC(self.stage, self.block)

    def slope(self, given: Tensor | None) -> Tensor:
        """∇J over what is trained."""
        return self._on_block(self.stage.gradient())

    def _solve(self, cotangent: Tensor, asked: Asked) -> tuple[Tensor, tuple[SolveReport, ...]]:
        right = self._on_block(cotangent)
        operator, solver = asked.operator(self, "operator"), self.solver
        direct = isinstance(solver, MinRes | ConjugateGradient | Dense)
        if isinstance(operator, EKFAC) and direct and not getattr(solver, "squared", False):
            # It has nothing below zero that automatic damping would have to lift.
            damping = 0.0 if isinstance(solver.damping, str) else solver.damping
            solution = operator.solve(right, damping)
        else:
            solution = solver.solve(operator, right, progress=asked.progress)
        return solution.x, (solution.report,)


@dataclass(frozen=True, eq=False)
class Optimum(_Stationary):
    """Trained to an optimum of its objective, wherever it began: x = argmin J(x).

        H u = λ,   I_i = −∇ℓ_iᵀ u                              (Koh & Liang 2017; the paper's eq. 8)

    Parameters
    ----------
    stage
        The stage at its optimum.
    solver
        For H⁻¹.
    curvature
        ``"hessian"``, or ``"gauss-newton"`` or ``"ekfac"`` in its place; the last is solved by
        its factors, with the solver's damping.
    preconditioner
        Of an iterative solve: ``"gauss-newton"``, by its leading rows, or ``"ekfac"``.

    Raises
    ------
    ValueError
        An unknown curvature or preconditioner.
    TypeError
        `solver` is none.
    """

    stage: Stage
    solver: Solver = MinRes()  # noqa: RUF009 (frozen dataclass)
    curvature: str = "hessian"
    preconditioner: str = "gauss-newton"

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """H u = λ; nothing is handed back of what is trained."""
        u, reports = self._solve(cotangent, asked)
        handed = self._of_held(cotangent, u, asked)
        return PulledBack(handed, self._whole(u), None, reports)


@dataclass(frozen=True, eq=False)
class Frozen(_Stationary):
    """The shared parameters stay as handed, the rest is at its optimum: case 1 of the paper.

        J_ΘΘ u = λ_Θ,   handed back λ_W − J_WΘ u,   I_i = −∇_Θ ℓ_iᵀ u              (eqs. 9 to 11)

    Parameters
    ----------
    stage
        The stage at (W, Θ*), with the parameters W that it was handed.
    solver
        For J_ΘΘ⁻¹.
    curvature
        Of J_ΘΘ, as for :class:`Optimum`. The cross term J_WΘ is exact with each.
    preconditioner
        As for :class:`Optimum`.

    Raises
    ------
    ValueError
        An unknown curvature or preconditioner.
    TypeError
        `solver` is none.
    """

    stage: Stage
    solver: Solver = MinRes()  # noqa: RUF009 (frozen dataclass)
    curvature: str = "hessian"
    preconditioner: str = "gauss-newton"

    @property
    def block(self) -> Block:
        """Numbers of the parameters of Θ that are trained; all of W stays."""
        return tuple(number for number in self.stage.trained if number in self.stage.own)

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """J_ΘΘ u = λ_Θ; handed back is λ_W − J_WΘ u."""
        u, reports = self._solve(cotangent, asked)
        handed = self._of_held(cotangent, u, asked)
        return PulledBack(handed, self._whole(u), None, reports)


@dataclass(frozen=True, eq=False)
class Proximal(_Stationary):
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
    curvature, preconditioner
        Of J, as for :class:`Optimum`.

    Raises
    ------
    ValueError
        α ≤ 0 or infinite; an unknown curvature or preconditioner.
    TypeError
        `solver` is none.
    """

    stage: Stage
    alpha: float
    solver: Solver = MinRes()  # noqa: RUF009 (frozen dataclass)
    curvature: str = "hessian"
    preconditioner: str = "gauss-newton"

    def __post_init__(self) -> None:
        at_0 = "the finetuned model no longer depends on the pretrained embedding"
        positive("alpha", self.alpha, f": at 0 {at_0} in this formulation")
        super().__post_init__()

    @property
    def pull(self) -> Tensor:
        """2α where a shared parameter is trained, else 0, ``(p_block,)``."""
        pull = torch.zeros_like(self.stage.vector())
        pull[: self.stage.embedding_size] = 2 * self.alpha
        return self._on_block(pull)

    def _matrix(self) -> LinearOperator:
        """K = H + 2α on W."""
        return AddDiagonal(super()._matrix(), self.pull)

    def _ekfac(self) -> EKFAC:
        """K by EK-FAC: what is shared and what is not are in different layers there."""
        with_pull = super()._ekfac().scaled(torch.ones_like(self.pull), self.pull)
        assert with_pull is not None
        return with_pull

    def slope(self, given: Tensor | None) -> Tensor:
        """∇(α‖W − c‖² + J) over what is trained."""
        slope = super().slope(given)
        if given is None:
            return slope
        away = self.stage.vector()
        away[: len(given)] -= given
        return slope + self.pull * self._on_block(away)

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """K u = λ; handed back is 2α u_W."""
        u, reports = self._solve(cotangent, asked)
        handed = self._on_shared(self.pull[:, None] * u) + self._of_held(cotangent, u, asked)
        return PulledBack(handed, self._whole(u), None, reports)


@dataclass(frozen=True, eq=False)
class Stopped(_Curved):
    """Gradient descent that ended after a time τ, its path not kept: the flow of a quadratic model.

        u = φ(H) λ,   φ(σ) = (1 − e^(−τσ))/σ for σ > 0, τ for σ ≤ 0
        handed back e^(−τH⁺) λ on W,   I_i = −∇ℓ_iᵀ u

    with H at the end of training and H⁺ without its negative eigenvalues. φ is bounded, so that
    an indefinite H does no harm and no damping is needed (Bae et al. 2024 with one segment). An
    optimiser that scales gradients by P takes the flow of P^½ H P^½ + δI; :meth:`of` reads all of
    this off a path.

    Parameters
    ----------
    stage
        The stage where its training ended.
    time
        τ: for SGD with one rate the sum of the learning rates, divided by 1 − μ for momentum μ
        (``path.time``).
    curvature
        ``"hessian"``, or ``"gauss-newton"`` or ``"ekfac"`` in its place. Functions of the last are
        taken of its eigenvalues where `scale` and `decay` are constant on each layer (Bae et al.
        2024), else by Lanczos too.
    scale
        P, by which the optimiser multiplies gradients, ``(p,)`` over all parameters: for Adam
        1/(√v̂ + ε) at the end, and the factor of a parameter group's rate. None: 1.
    decay
        δ: decoupled weight decay for each unit of τ, a number or ``(p,)``; of SGD with momentum
        (1 − μ) times the optimiser's.
    tol, max_iterations
        Of Lanczos, see :func:`msif_lib.lanczos.functions_of`.

    Raises
    ------
    ValueError
        A `time` or `scale` that is not positive, a negative `decay`; an unknown curvature.
    """

    stage: Stage
    time: float
    curvature: str = "hessian"
    scale: Tensor | None = None
    decay: float | Tensor = 0.0
    tol: float | None = None
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        self._check_stage()
        self._check_curvature()
        if isinstance(self.time, Path):
            raise TypeError(
                "time must be a number, path.time; Stopped.of(stage, path) takes a path"
            )
        positive("time", self.time)
        check_limits(self.tol, self.max_iterations)
        if isinstance(self.decay, Tensor):
            check_each("decay", self.decay, self.stage.vector())
        else:
            not_negative("decay", self.decay)
        if self.scale is not None:
            check_each("scale", self.scale, self.stage.vector(), above=True)

    @classmethod
    def of(cls, stage: Stage, path: Path, curvature: str = "hessian") -> Stopped:
        """The flow of a recorded training's own optimiser: its τ, P and δ.

        Adam's P counts as a constant. Near an optimum it is one; far from it P moves with the
        weights, and the flow leaves that out.

        Raises
        ------
        ValueError
            The path is that of another model, moved other parameters than the stage trains, or
            does not end where the stage's modules are.
        """
        check_path(stage, path)
        if not torch.equal(stage.vector(), path.end):
            raise ValueError(
                "path does not end at the stage's parameters, where the curvature is taken; give a "
                "stage whose modules are where it ended: stage.load_vector(path.end)"
            )
        scale, decay = path.flow(stage)
        return cls(stage, path.time, curvature, scale, decay)

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """u = φ(H) λ; handed back is e^(−τH⁺) λ on W."""
        tau, operator = self.time, asked.operator(self, "operator")

        def phi(sigma: Tensor) -> Tensor:
            positive = sigma > 0
            safe = torch.where(positive, sigma, 1.0)
            return torch.where(positive, -torch.expm1(-tau * safe) / safe, tau)

        def flow(sigma: Tensor) -> Tensor:
            return torch.exp(-tau * sigma.clamp_min(0))

        scale, decay = self._scale_and_decay()
        root = scale.sqrt()[:, None]  # P^½: u = P^½ φ(H̃) P^½ λ, back P^−½ e^(−τH̃⁺) P^½ λ
        right, system = root * self._on_block(cotangent), f"(1 − exp(−{tau:.4g} A))/A b"
        known = operator.scaled(scale, decay) if isinstance(operator, EKFAC) else None
        if known is not None:
            (u, left), report = known.functions(right, (phi, flow), system)
        else:
            (u, left), report = functions_of(
                Scaled(operator, scale.sqrt(), decay),
                right,
                (phi, flow),
                tol=self.tol,
                max_iterations=self.max_iterations,
                system=system,
                progress=asked.progress,
            )
        u = root * u
        handed = self._on_shared(left / root) + self._of_held(cotangent, u, asked)
        return PulledBack(handed, self._whole(u), None, (report,))

    def _scale_and_decay(self) -> tuple[Tensor, Tensor]:
        """P and δ of H̃ = P^½ H P^½ + δI, on what is trained."""
        ones = torch.ones_like(self.stage.vector())
        scale = ones if self.scale is None else self.scale.to(ones)
        decay = torch.as_tensor(self.decay, dtype=ones.dtype, device=ones.device)
        return self._on_block(scale), self._on_block(ones * decay)


@dataclass(frozen=True, eq=False)
class Unrolled(Link):
    """The training that was run, step by step: exact, whether it converged or not.

    λ goes back through the steps of the path (:func:`msif_lib.descent.pull_back`). With λ_g the
    cotangent of a step's gradient, taken at the parameters x_t of that step,

        I_i = N Σ_t ∇ℓ_iᵀ λ_g / B  over the steps that drew example i,   handed back λ at the start,

    and I = Σ_t ∇ℓ(z)ᵀ λ_g for an example z outside the training set.

    Parameters
    ----------
    stage
        The stage.
    path
        Its recorded training, from :func:`msif_lib.descent.descend` or ``Path.record``.

    Raises
    ------
    ValueError
        The path is that of another model, or moved other parameters than the stage trains.
    """

    stage: Stage
    path: Path

    reads_modules: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_stage()
        check_path(self.stage, self.path)

    def vector(self) -> Tensor:
        """Where the path ends."""
        return self.path.end

    def begins_at(self) -> Tensor:
        """Where the path starts."""
        return self.path.start

    def settings(self) -> list[object]:
        """The path; what changed its inputs is a function, known by what it gives."""
        return [type(self), replace(self.path, augment=None)]

    def identity(self) -> ProblemIdentity:
        """What a link is known by in results that are kept, its stage included."""
        return ProblemIdentity.of(
            super().identity(), ProblemIdentity("", [self.path.drawn(self.stage)])
        )

    def pull_back(self, cotangent: Tensor, asked: Asked = Asked()) -> PulledBack:
        """The adjoint of each step, backwards; handed back is λ at the start."""
        back = pull_back(self.stage, self.path, cotangent, asked.of, asked.progress, asked.keep)
        handed = self.stage.split(back.handed)[0]  # its head began anew
        scores = back.derivatives * (self.stage.size if asked.of is None else 1)
        return PulledBack(handed, None, scores)
