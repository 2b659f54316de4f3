"""The influence functions: single stage, case 1 (embedding fixed), case 2 (embedding updated).

Each class answers how a test functional q, the summed loss of test examples, moves when one
training example z_i is given a little more weight ε in the (pre)training objective:

    I_i = dq/dε  of  G + ε g(z_i)  at ε = 0.

Removing z_i is ε = −1/m, so q changes by about −I_i/m: a positive score marks an example that
hurts the test functional. All three read

    I_i = −∇g(z_i)ᵀ H_G⁻¹ [b; 0]

and differ in b, the gradient of q with respect to the pretrained embedding, *through* whatever
training came after it. All m scores are one directional derivative of the per-example losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.curvature import AddDiagonal, CrossHessian, Hessian, LinearOperator, proximal_hessian
from msif_lib.solvers import MinRes, Solver, SolveReport
from msif_lib.stage import Stage, check_pair
from msif_lib.support.data import Batch
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.notices import warn_caller
from msif_lib.support.storage import check_path, solved, stage_parts, sweep


class StationarityWarning(UserWarning):
    """A stage is not at a stationary point of its objective, which the formulas assume."""


@dataclass(frozen=True)
class Scores:
    """Influence scores of m examples.

    Attributes
    ----------
    values
        I_i = dq/dε, ``(m,)``, or ``(m, T)`` one column a test example; in units of the test
        loss. Positive: the example hurts.
    training_size
        The size m of the training set that the removal of an example is measured against.
    solves
        One report an inverse-Hessian product, in the order they were done.
    gradient_norms
        Norm of each stage's gradient, by stage: how near the models are to their optima.
    of_training_set
        Whether the scored examples are the training set itself, on one and the same functional.
    """

    values: Tensor
    training_size: int
    solves: tuple[SolveReport, ...]
    gradient_norms: dict[str, float]
    of_training_set: bool = True

    @property
    def removal_effect(self) -> Tensor:
        """−I_i/m: predicted change of q when z_i is taken out and the others keep weight 1/m."""
        return -self.values / self.training_size

    @property
    def removal_effect_renormalised(self) -> Tensor:
        """Predicted change of q when the mean is taken over the other m − 1 examples.

        Differs from :attr:`removal_effect` where there is a regularizer: the centred gradient
        ∇g_i − mean_j ∇g_j stands in place of ∇g_i.

        Raises
        ------
        ValueError
            The scores are of other examples than the training set, or it has one example only.
        """
        return -self._centred() / self._left(1)

    def group(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Influence of a set: the sum of its examples' (the paper's eq. 8), ``()`` or ``(T,)``."""
        return self.values[self._chosen(indices)].sum(0)

    def group_effect(self, indices: Sequence[int] | Tensor, renormalise: bool = False) -> Tensor:
        """Predicted change of q when the set is taken out.

        Parameters
        ----------
        indices
            The examples of the set, s of them.
        renormalise
            False: the others keep weight 1/m. True: the mean is over the other m − s.

        Returns
        -------
        Tensor
            ``()`` or ``(T,)``.

        Raises
        ------
        ValueError
            The set repeats an example, names one that has no score or, where renormalised,
            leaves none.
        """
        chosen = self._chosen(indices)
        if not renormalise:
            return -self.values[chosen].sum(0) / self.training_size
        return -self._centred()[chosen].sum(0) / self._left(len(chosen))

    def _chosen(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The indices of a set as a tensor; a Boolean mask is turned into indices."""
        chosen, size = torch.as_tensor(indices, device=self.values.device), len(self.values)
        if not chosen.numel():
            chosen = chosen.long()
        if chosen.is_floating_point() or chosen.dim() != 1:
            raise ValueError("indices must be a vector of whole numbers or a Boolean mask")
        if chosen.dtype == torch.bool:
            if len(chosen) != size:
                raise ValueError(f"a mask of length {len(chosen)} does not fit {size} scores")
            return chosen.nonzero()[:, 0]
        chosen = chosen.long()
        if ((chosen < -size) | (chosen >= size)).any():
            raise ValueError(f"indices name an example outside 0..{size - 1}")
        chosen = chosen % size  # −1 is the last
        if len(chosen.unique()) != len(chosen):
            raise ValueError("indices name an example twice; a set holds each example once")
        return chosen

    def _left(self, removed: int) -> int:
        """Number of training examples after a removal."""
        if removed >= self.training_size:
            raise ValueError(
                f"removing {removed} of {self.training_size} training examples leaves none to "
                "take the mean over; use the fixed-weight effect (renormalise=False)"
            )
        return self.training_size - removed

    def _centred(self) -> Tensor:
        if not self.of_training_set:
            raise ValueError(
                "the renormalised removal effect needs the scores of the whole training set on one "
                "test functional; these are of other examples (of=...) or self-influences"
            )
        return self.values - self.values.mean(0)


def _check_solver(name: str, solver: Solver) -> None:
    if isinstance(solver, type) or not hasattr(solver, "solve"):
        raise TypeError(f"{name} must be a solver of msif_lib.solvers, as MinRes(), not {solver!r}")


class _Influence:
    """What the three influence functions share: checks, the last solve and the sweep."""

    _first_stage = "training"

    def __init__(self, trained: Stage, solver: Solver, stationarity_tol: float, progress: bool):
        _check_solver("solver", solver)
        self.solver = solver
        self.progress = progress
        self.gradient_norms: dict[str, float] = {}
        self._trained = trained
        self._tested = trained
        self._tol = stationarity_tol
        self._hessian: Hessian | None = None
        self._require_stationary(self._first_stage, trained.gradient())

    def _require_stationary(self, stage: str, gradient: Tensor) -> None:
        norm = float(gradient.norm())
        self.gradient_norms[stage] = norm
        if norm > self._tol:
            warn_caller(
                f"the {stage} stage is not at a stationary point: its gradient norm is "
                f"{norm:.1e}, above {self._tol:.1e}. The formulas assume zero; train further, "
                "or read the scores with that in mind",
                StationarityWarning,
            )

    def _solve(
        self, solver: Solver, operator: LinearOperator, b: Tensor, reports: list[SolveReport]
    ) -> Tensor:
        solution = solver.solve(operator, b, progress=self.progress)
        reports.append(solution.report)
        return solution.x

    def test_gradients(self, test: Batch, per_test: bool = False) -> Tensor:
        """∇q at the tested model: ``(p, 1)`` of the summed loss, or ``(p, T)`` of each loss."""
        stage = self._tested.with_data(test, "test data")
        if per_test:
            rows = stage.per_example_gradients()
            gradients = stage.gather(rows, stage.embedding_size + stage.head_size).T
        else:
            gradients = torch.zeros_like(stage.vector())[:, None]
            for batch in stage.batches():
                theta = stage.vector().requires_grad_()
                loss = stage.losses(*stage.split(theta), *batch).sum()
                gradients += torch.autograd.grad(loss, theta)[0][:, None]
            gradients = stage.all_reduce(gradients)
        if not gradients.isfinite().all():
            try:
                stage.gradient()  # names the example at fault
            except ValueError as error:
                raise ValueError(f"test data: {error}") from error
        return gradients

    def _sensitivity(self, gradients: Tensor, reports: list[SolveReport]) -> Tensor:
        """Dq/d(trained parameters) ``(p, k)``, through whatever training came after."""
        return gradients

    def _directions(self, test: Batch, per_test: bool) -> tuple[Tensor, list[SolveReport]]:
        """v = H⁻¹ dq/d(trained parameters) ``(p, k)``, and the reports of all solves."""
        reports: list[SolveReport] = []
        b = self._sensitivity(self.test_gradients(test, per_test), reports)
        if self._hessian is None:
            self._hessian = Hessian(self._trained)
        return self._solve(self.solver, self._hessian, b, reports), reports

    def _key(self, test: Batch, per_test: bool) -> str:
        """Fingerprint of all that the directions depend on."""
        tested = self._tested.with_data(test, "test data")
        settings = ("solver", "finetune_solver", "alpha")
        return fingerprint(
            type(self).__name__,
            [getattr(self, name, None) for name in settings],
            [stage_parts(stage) for stage in (self._trained, self._tested)],
            per_test,
            list(tested.examples.batches(1)),
        )

    def scores(
        self,
        test: Batch,
        per_test: bool = False,
        of: Batch | None = None,
        out: str | Path | None = None,
    ) -> Scores:
        """Influence of every training example on the test functional.

        Parameters
        ----------
        test
            Test examples ``(inputs, targets)`` of the last stage's task, or a data set of them.
        per_test
            False: q is the loss summed over the test examples. True: one q a test example.
        of
            Score these examples of the first stage's task, which need not be in its training
            set, in place of the training set.
        out
            A ``.npy`` file to which the scores are written as they come, for data larger than
            memory; ``values`` is then read from it when looked at. What is solved and scored
            is kept, so that the same call goes on where an interrupted one stopped.

        Returns
        -------
        Scores
            ``values`` of shape ``(m,)``, or ``(m, T)`` where `per_test`.

        Raises
        ------
        ValueError
            Test data or `of` that a :class:`Stage` would refuse; an `out` that is no ``.npy``
            file in an existing folder, or holds the scores of another problem.
        FloatingPointError
            A product or a score is not finite.

        Warns
        -----
        SolverWarning
            A solve stopped short of its tolerance or met negative curvature.
        """
        path = None if out is None else check_path(out)
        begun = path is not None and path.exists()
        scored = self._trained if of is None else self._trained.with_data(of, "of", not begun)
        if path is None:
            v, reports = self._directions(test, per_test)
        else:
            v, reports = solved(
                path, self._key(test, per_test), lambda: self._directions(test, per_test), scored
            )
        return Scores(
            sweep(scored, -v if per_test else -v[:, 0], path, self.progress),
            self._trained.size,
            tuple(reports),
            dict(self.gradient_norms),
            of is None,
        )


class SingleStageInfluence(_Influence):
    """Influence of training examples on the model they trained (Koh & Liang 2017).

        I_i = −∇qᵀ H⁻¹ ∇g(z_i)

    Parameters
    ----------
    stage
        The trained stage.
    solver
        For H⁻¹.
    stationarity_tol
        Gradient norm above which a :class:`StationarityWarning` is given.
    progress
        Show bars for what takes more than a second.

    Raises
    ------
    ValueError
        A gradient is not finite.

    Warns
    -----
    StationarityWarning
        The stage is not at a stationary point.
    """

    def __init__(
        self,
        stage: Stage,
        solver: Solver = MinRes(),  # noqa: B008 (frozen dataclass)
        stationarity_tol: float = 1e-4,
        progress: bool = True,
    ) -> None:
        super().__init__(stage, solver, stationarity_tol, progress)

    def self_influence(self, indices: Sequence[int] | None = None, at_once: int = 64) -> Scores:
        """Influence of each training example on its own loss, −∇g_iᵀ H⁻¹ ∇g_i.

        Never positive where H is positive definite; large in size for examples that the model
        fits only because it saw them, such as wrong labels.

        Parameters
        ----------
        indices
            Examples wanted, by default all.
        at_once
            Right-hand sides solved together.

        Returns
        -------
        Scores
            ``values`` ``(len(indices),)``, in the order of `indices`.
        """
        stage = self._trained
        wanted = torch.arange(stage.size)
        if indices is not None:
            chosen = torch.as_tensor(indices).cpu()
            wanted = wanted[chosen if chosen.numel() else chosen.long()]
        if self._hessian is None:
            self._hessian = Hessian(stage)
        values = torch.zeros(len(wanted), dtype=stage.dtype, device=stage.device)
        reports: list[SolveReport] = []
        bar = tqdm(
            range(0, len(wanted), at_once), desc="self-influence", unit=" blocks",
            disable=not self.progress, delay=1, leave=False,
        )  # fmt: skip
        for start in bar:
            some = stage.section(wanted[start : start + at_once].tolist())
            gradients = some.gather(some.per_example_gradients(), self._hessian.shape[0]).T
            v = self._solve(self.solver, self._hessian, gradients, reports)
            values[start : start + at_once] = -(gradients * v).sum(0)
        return Scores(
            values,
            stage.size,
            tuple(reports),
            dict(self.gradient_norms),
            False,
        )


class _MultiStageInfluence(_Influence):
    """Checks on a pair of stages, and the padding with zeros on the pretraining head."""

    _first_stage = "pretraining"

    def __init__(
        self,
        pretrain: Stage,
        second: Stage,
        name: str,
        solver: Solver,
        finetune_solver: Solver | None,
        stationarity_tol: float,
        progress: bool,
    ) -> None:
        check_pair(pretrain, second, name)
        _check_solver("solver", solver)
        _check_solver("finetune_solver", finetune_solver or solver)
        super().__init__(pretrain, solver, stationarity_tol, progress)
        self.pretrain = pretrain
        self.finetune_solver = finetune_solver or solver
        self._tested = second

    def embedding_sensitivity(
        self, gradients: Tensor, reports: list[SolveReport] | None = None
    ) -> Tensor:
        """b = dq/dW̄ ``(p_W, k)``: how q moves with the *pretrained* embedding.

        Parameters
        ----------
        gradients
            ∇q at the finetuned model, ``(p_W + p_Θ, k)``, as :meth:`test_gradients` gives them.
        reports
            A list to which the reports of the solves are added.
        """
        raise TypeError(f"{type(self).__name__} does not define a sensitivity")

    def _sensitivity(self, gradients: Tensor, reports: list[SolveReport]) -> Tensor:
        b = self.embedding_sensitivity(gradients, reports)
        padding = b.new_zeros(self.pretrain.head_size, b.shape[1])
        return torch.cat([b, padding])


class FixedEmbeddingInfluence(_MultiStageInfluence):
    """Case 1: the embedding stays as pretrained, the finetuning trains its head alone.

        I_i = −( f_W − F_WΘ F_ΘΘ⁻¹ f_Θ )ᵀ [ H_G⁻¹ ∇g(z_i) ]_W        (the paper's eqs. 9 to 11)

    Parameters
    ----------
    pretrain
        The pretraining stage at (W*, U*).
    finetune
        The finetuning stage at (W*, Θ*): the same embedding parameters.
    solver
        For H_G⁻¹, and for F_ΘΘ⁻¹ unless `finetune_solver` is given.
    finetune_solver
        For F_ΘΘ⁻¹.
    stationarity_tol
        Gradient norm above which a :class:`StationarityWarning` is given.
    progress
        Show bars for what takes more than a second.

    Raises
    ------
    ValueError
        Embeddings whose parameters differ in name, shape or value, or whose buffers differ;
        stages of different dtype or device; an embedding or a finetuning head without
        parameters; a gradient that is not finite.

    Warns
    -----
    StationarityWarning
        A stage is not at a stationary point.
    """

    def __init__(
        self,
        pretrain: Stage,
        finetune: Stage,
        solver: Solver = MinRes(),  # noqa: B008 (frozen dataclass)
        finetune_solver: Solver | None = None,
        stationarity_tol: float = 1e-4,
        progress: bool = True,
    ) -> None:
        super().__init__(
            pretrain, finetune, "finetune", solver, finetune_solver, stationarity_tol, progress
        )
        buffers = [dict(stage.embedding.named_buffers()) for stage in (pretrain, finetune)]
        if list(buffers[0]) != list(buffers[1]) or not all(
            torch.equal(value, buffers[1][name]) for name, value in buffers[0].items()
        ):
            raise ValueError(
                "case 1 keeps the embedding fixed, but the buffers of finetune.embedding (running "
                "statistics, say) differ from those of pretrain.embedding"
            )
        if not torch.equal(pretrain.embedding_vector(), finetune.embedding_vector()):
            raise ValueError(
                "case 1 keeps the embedding fixed, but the parameters of finetune.embedding "
                "differ from those of pretrain.embedding; for an embedding that was updated use "
                "UpdatedEmbeddingInfluence"
            )
        self.finetune = finetune
        self._require_stationary("finetuning", finetune.split(finetune.gradient())[1])
        self._head_hessian: Hessian | None = None
        self._cross_hessian: CrossHessian | None = None

    def embedding_sensitivity(
        self, gradients: Tensor, reports: list[SolveReport] | None = None
    ) -> Tensor:
        """b = f_W − F_WΘ F_ΘΘ⁻¹ f_Θ, the gradient of q along W with Θ following its optimum."""
        if self._head_hessian is None or self._cross_hessian is None:
            self._head_hessian = Hessian(self.finetune, block="head")
            self._cross_hessian = CrossHessian(self.finetune)
        f_w, f_theta = self.finetune.split(gradients)
        reports = reports if reports is not None else []
        v = self._solve(self.finetune_solver, self._head_hessian, f_theta, reports)
        return f_w - self._cross_hessian @ v


class UpdatedEmbeddingInfluence(_MultiStageInfluence):
    """Case 2: finetuning moves the embedding too.

    From W̄ it goes to the W* that minimises

        α‖W − W̄‖² + F(W, Θ)                                              (the paper's eq. 12)

        I_i = −[f_W; f_Θ]ᵀ K⁻¹ [2α I; 0] [ H_G⁻¹ ∇g(z_i) ]_W             (eqs. 13 to 15)
        K   = [[F_WW + 2α I, F_WΘ], [F_ΘW, F_ΘΘ]]

    Parameters
    ----------
    pretrain
        The pretraining stage at (W̄, Ū).
    tuned
        The finetuning stage at (W*, Θ*), with an embedding module of its own.
    alpha
        α > 0, the strength of the pull towards W̄ (there is no ½).
    solver
        For H_G⁻¹, and for K⁻¹ unless `finetune_solver` is given.
    finetune_solver
        For K⁻¹.
    stationarity_tol
        Gradient norm above which a :class:`StationarityWarning` is given.
    progress
        Show bars for what takes more than a second.

    Raises
    ------
    ValueError
        α ≤ 0 or infinite; the same embedding module in both stages; embeddings whose parameters
        differ in name or shape; stages of different dtype or device; an embedding or a
        finetuning head without parameters; a gradient that is not finite.

    Warns
    -----
    StationarityWarning
        A stage is not at a stationary point of its objective (the proximal one for `tuned`).
    """

    def __init__(
        self,
        pretrain: Stage,
        tuned: Stage,
        alpha: float,
        solver: Solver = MinRes(),  # noqa: B008 (frozen dataclass)
        finetune_solver: Solver | None = None,
        stationarity_tol: float = 1e-4,
        progress: bool = True,
    ) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(
                f"alpha must be positive, not {alpha}: at 0 the finetuned model no "
                "longer depends on the pretrained embedding in this formulation"
            )
        if pretrain.embedding is tuned.embedding:
            raise ValueError(
                "case 2 needs the embedding before and after finetuning, but both stages hold "
                "the same module; give tuned a copy (copy.deepcopy) made before finetuning"
            )
        super().__init__(
            pretrain, tuned, "tuned", solver, finetune_solver, stationarity_tol, progress
        )
        self.tuned = tuned
        self.alpha = alpha
        gradient = tuned.gradient()
        gradient_w, gradient_theta = tuned.split(gradient)
        pull = 2 * alpha * (tuned.embedding_vector() - pretrain.embedding_vector())
        self._require_stationary("finetuning", torch.cat([gradient_w + pull, gradient_theta]))
        self._proximal_hessian: AddDiagonal | None = None

    def embedding_sensitivity(
        self, gradients: Tensor, reports: list[SolveReport] | None = None
    ) -> Tensor:
        """b = 2α [K⁻¹ ∇q]_W, the gradient of q along W̄ with (W*, Θ*) following their optimum."""
        if self._proximal_hessian is None:
            self._proximal_hessian = proximal_hessian(self.tuned, self.alpha)
        reports = reports if reports is not None else []
        v = self._solve(self.finetune_solver, self._proximal_hessian, gradients, reports)
        return 2 * self.alpha * self.tuned.split(v)[0]
