"""The ground truth: leave examples out of pretraining and train both stages again.

Removal of a set S of s pretraining examples has two readings, and a truth must say which it is:

    fixed weight   (1/m) Σ_{j∉S} g_j + R_G       the others keep weight 1/m (ε = −1/m in eq. 4)
    renormalised   1/(m−s) Σ_{j∉S} g_j + R_G     a mean over the others, as a user would retrain

They differ only through the regularizer. Both stages are trained in float64 until the norm of
the gradient is below a tolerance, and the change of the test losses is measured against the
same training without any removal, so that what is left of the optimisation error cancels.

Many removals are trained together: `torch.func.vmap` over models, on shared data. At a warm
start the Hessian at the trained parameters, factorised once, preconditions a quasi-Newton
method for all of them (:mod:`msif_lib.support.minimise`), which then needs a handful of gradient
evaluations. Models that are trained together are one job; jobs may run in several processes or
on a cluster, and be kept in a folder as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from msif_lib.curvature import AddDiagonal, Hessian, proximal_hessian
from msif_lib.preconditioner import GaussNewtonPreconditioner
from msif_lib.stage import Stage, check_pair
from msif_lib.support.checkpoint import Checkpoint, stage_fingerprint
from msif_lib.support.data import Batch, Examples, Nested, concatenate, leaves, map_leaves
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.jobs import as_finished
from msif_lib.support.minimise import (
    AbsoluteInverse,
    BatchedObjective,
    Descent,
    Minimum,
    RowPreconditioner,
    descend,
    minimise,
    minimise_near,
)

__all__ = ["AbsoluteInverse", "Descent", "Minimum", "Retraining", "minimise", "retrain_without"]

# Up to this many parameters a warm start has the factorised Hessian, above it a sketch.
_DENSE_PARAMETERS = 4000


@dataclass(frozen=True)
class Retraining:
    """Test losses after leaving sets of pretraining examples out of both trainings.

    Attributes
    ----------
    losses
        Per-example test losses after each removal, ``(R, T)``.
    losses_before
        The same without any removal, ``(T,)``.
    converged
        Whether both trainings reached the tolerance, ``(R,)``; without removal,
        ``converged_before``.
    gradient_norms
        Gradient norms reached in pretraining and finetuning, ``(R, 2)``.
    evaluations
        Gradient evaluations of the two trainings, ``(R, 2)``.
    convention
        ``"fixed weight"`` or ``"renormalised"``.
    start
        ``"warm"`` or ``"cold"``.
    """

    losses: Tensor
    losses_before: Tensor
    converged: Tensor
    converged_before: bool
    gradient_norms: Tensor
    evaluations: Tensor
    convention: str
    start: str

    @property
    def change(self) -> Tensor:
        """q after each removal minus q before, ``(R,)``; q is the sum of the test losses."""
        return self.per_test_change.sum(1)

    @property
    def per_test_change(self) -> Tensor:
        """Change of each test loss, ``(R, T)``."""
        return self.losses - self.losses_before


def retrain_without(
    pretrain: Stage,
    finetune: Stage,
    removals: Sequence[Sequence[int]],
    test: Batch,
    alpha: float | None = None,
    renormalise: bool = False,
    fraction: float = 1.0,
    cold_start: tuple[Stage, Stage] | None = None,
    tol: float = 1e-9,
    max_evaluations: int | None = None,
    descent: Descent | None = None,
    damping: float = 0.0,
    pretrain_hessian: Tensor | None = None,
    models_at_once: int = 32,
    jobs: int | None = None,
    threads: int = 1,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Retraining:
    """Leave sets of examples out of pretraining, train both stages again, measure the test losses.

    Parameters
    ----------
    pretrain, finetune
        The two trained stages: for case 1 with the same embedding, for case 2 (`alpha` given)
        `finetune` holds W*.
    removals
        R sets of indices into the pretraining data, or Boolean masks over it; singletons for
        leave-one-out.
    test
        Test examples ``(inputs, targets)`` of the finetuning task, T of them.
    alpha
        None: the embedding stays fixed in finetuning (case 1). A number: finetuning minimises
        α‖W − W̄‖² + F(W, Θ) (case 2).
    renormalise
        The removal convention, see above.
    fraction
        Share of the examples' weight that is taken away. 1 removes them; as it goes to 0 the
        change divided by it becomes the derivative, so that a small fraction tells a wrong score
        from a removal that is too large a step for any first-order prediction.
    cold_start
        None: begin at the trained parameters. Otherwise a pair of stages whose parameters are
        where the two trainings begin (in case 2 the embedding begins at the new W̄ all the same).
    tol
        Norm of the gradient to be reached in each stage.
    max_evaluations
        Gradient evaluations allowed a stage; None: 5,000 warm, 20,000 cold.
    descent
        None: finetuning goes on to the tolerance. Otherwise it is plain, without a proximal term:
        where case 1 has ended, with a head trained on the new W̄, embedding and head take these
        steps.
    damping
        λ ≥ 0, added to the absolute eigenvalues of the Hessians at the trained parameters, whose
        inverse preconditions a warm start for half of its evaluations instead of the first 200.
        Give some where a symmetry of the model makes a Hessian singular, as in language models:
        as the parameters move, the flat directions turn, and an undamped inverse multiplies
        whatever the gradient then has along the old ones. It should lie far below the large
        eigenvalues. It changes neither the objectives nor what counts as converged; of several
        minima it may find another one.
    pretrain_hessian
        The pretraining Hessian at the trained parameters ``(p, p)``, for those who have it; then
        it is factorised whatever its size. None: a warm start computes it up to 4,000 parameters,
        and above that a sketch of the Gauss-Newton matrix.
    models_at_once
        Models trained together, one job; changes memory and speed, and of results the last bits.
    jobs
        Jobs at once, each in a process of its own (−1: one a core). None: what
        `joblib.parallel_config` says, else one after the other in this process. Inside
        ``with joblib.parallel_config(backend="dask"):`` they run on the Dask cluster of the
        present client, whatever `jobs` says; a lost worker's jobs run again on another.
        Modules and losses may be local; the modules of Python that they come from must be
        importable on the workers. Results are the same to the last bit on machines alike.
    threads
        Threads of each job. Small models want one; `jobs` × `threads` should not exceed the
        cores.
    checkpoint
        A folder that keeps each finished job, the training without removal and the factorised
        Hessians. A later call with the same arguments trains only what is missing; another
        call on the same stages factorises nothing. Results are known by a digest of all that
        they depend on (parameters and data of both stages, the values of loss and regularizer,
        `test`, the settings, the removals of their job, the code of this library), so that a
        folder may serve any number of calls.
    progress
        Show bars for what takes more than a second.

    Returns
    -------
    Retraining
        Losses before and after; whether each training converged.

    Raises
    ------
    ValueError
        A removal that is empty, repeats an index, lies outside the pretraining data or leaves
        nothing of it; a mask of another length than the data; α ≤ 0, or an α for a plain
        finetuning; a `fraction` outside (0, 1];
        `tol` ≤ 0; a negative `damping`; a `pretrain_hessian` that is of another shape, is not
        finite, or is given to a cold start; `jobs` of 0; embeddings of the two stages that differ
        in parameter names or shapes; a stage of which each process reads a share.
    TypeError
        Removals that are indices, not sets of indices; indices that are no whole numbers.
    """
    _check_settings(alpha, fraction, tol, damping)
    if alpha is not None and descent is not None:
        raise ValueError("plain finetuning (descent) has no proximal term; leave alpha out")
    if pretrain_hessian is not None:
        _check_hessian(pretrain_hessian, len(pretrain.vector()), cold_start is not None)
    if models_at_once < 1 or (max_evaluations is not None and max_evaluations < 1):
        raise ValueError("models_at_once and max_evaluations must be at least 1")
    if threads < 1 or jobs == 0:
        raise ValueError("threads must be at least 1, and jobs must not be 0 (−1: one a core)")
    sets = [_indices(number, removal, pretrain.size) for number, removal in enumerate(removals)]
    check_pair(pretrain, finetune, "finetune")
    if any(len(stage.share) != stage.size for stage in (pretrain, finetune)):
        raise ValueError(
            "retraining takes whole stages, not sharded ones; its jobs go to other processes by "
            "jobs= or joblib.parallel_config"
        )
    pretrain, finetune = pretrain.to(torch.float64), finetune.to(torch.float64)
    test = _double(test, finetune.device)
    trainings = _Trainings(
        pretrain=pretrain,
        finetune=finetune,
        tested=finetune.with_data(test, "test data"),
        starts=tuple(stage.vector().double() for stage in cold_start or (pretrain, finetune)),
        cold=cold_start is not None,
        alpha=alpha,
        renormalise=renormalise,
        fraction=fraction,
        tol=tol,
        limit=max_evaluations or (20_000 if cold_start else 5000),
        descent=descent,
        damping=damping,
        pretrain_hessian=pretrain_hessian,
    )
    # The first job removes nothing: what every removal is measured against.
    batches = [
        sets[start : start + models_at_once] for start in range(0, len(sets), models_at_once)
    ]
    work: list[list[list[int]]] = [[[]], *batches]
    kept, stages, names = Checkpoint(checkpoint), ("", ""), [""] * len(work)
    if checkpoint is not None:
        stages = stage_fingerprint(pretrain), stage_fingerprint(finetune)
        settings = stages, test, threads, trainings.settings()
        names = [f"retraining-{fingerprint(settings, removed)}" for removed in work]
    results = [kept.get(name) for name in names]
    missing = [number for number, result in enumerate(results) if result is None]
    if missing and not cold_start:
        trainings.precondition(kept, stages)
    models = sum(map(len, work))
    bar = tqdm(
        total=models, desc="retraining", unit=" models", disable=not progress, delay=1, leave=False
    )
    finished = as_finished(trainings, [work[number] for number in missing], jobs, threads)
    with bar, closing(finished):
        bar.update(models - sum(len(work[number]) for number in missing))
        for index, result in finished:
            number = missing[index]
            kept.put(names[number], result)
            results[number] = result
            bar.update(len(work[number]))
    joined = {
        name: torch.cat([result[name] for result in results if result is not None]).to(
            pretrain.device
        )
        for name in ("losses", "gradient_norms", "evaluations", "converged")
    }
    return Retraining(
        losses=joined["losses"][1:],
        losses_before=joined["losses"][0],
        converged=joined["converged"][1:],
        converged_before=bool(joined["converged"][0]),
        gradient_norms=joined["gradient_norms"][1:],
        evaluations=joined["evaluations"][1:],
        convention="renormalised" if renormalise else "fixed weight",
        start="cold" if cold_start else "warm",
    )


@dataclass
class _Trainings:
    """Both trainings and the test, for any removals: what every job needs to know."""

    pretrain: Stage
    finetune: Stage
    tested: Stage
    starts: tuple[Tensor, ...]
    cold: bool
    alpha: float | None
    renormalise: bool
    fraction: float
    tol: float
    limit: int
    descent: Descent | None
    damping: float
    pretrain_hessian: Tensor | None
    preconditioners: tuple[RowPreconditioner | None, ...] = (None, None)

    def settings(self) -> tuple[object, ...]:
        """What results depend on beside the stages, the removals and the test data."""
        return (
            self.starts, self.cold, self.alpha, self.renormalise, self.fraction, self.tol,
            self.limit, self.descent, self.damping, self.pretrain_hessian,
        )  # fmt: skip

    def precondition(self, kept: Checkpoint, stages: tuple[str, str]) -> None:
        """Factorise both Hessians at the start, or read their factors."""
        pretrain, finetune, alpha = self.pretrain, self.finetune, self.alpha
        given, damping = self.pretrain_hessian, self.damping
        size = finetune.head_size if alpha is None else len(finetune.vector())
        first = _preconditioner(
            kept,
            ("pretraining", stages[0], given),
            len(pretrain.vector()),
            lambda: Hessian(pretrain),
            damping,
            None if given is None else given.to(pretrain.vector()),
        )
        second = _preconditioner(
            kept,
            ("finetuning", stages[1], alpha),
            size,
            lambda: _finetuning_hessian(finetune, alpha),
            damping,
        )
        self.preconditioners = (first, second)
        self.pretrain_hessian = None  # the factors are all that a job needs

    def __call__(self, removals: list[list[int]]) -> dict[str, Tensor]:
        """Train r models: their test losses ``(r, T)``, and how each training ended."""
        finetune, alpha, count = self.finetune, self.alpha, len(removals)
        weights = _weights(removals, self.pretrain, self.renormalise, self.fraction)
        # A damped preconditioner is of use for longer; none is to be relied on to the end.
        near = {"near": self.limit // 2} if self.damping else {}
        first = minimise_near(
            _batched(_pretraining_terms(self.pretrain, weights)),
            self.starts[0].expand(count, -1),
            self.tol,
            self.preconditioners[0],
            self.limit,
            **near,
        )
        embeddings = first.x[:, : self.pretrain.embedding_size]
        start = self.starts[1].expand(count, -1)
        if alpha is None:
            start, terms = start[:, finetune.embedding_size :], _head_terms(finetune, embeddings)
        else:
            if self.cold:
                start = torch.cat([embeddings, start[:, finetune.embedding_size :]], 1)
            terms = _proximal_terms(finetune, embeddings, alpha)
        second = minimise_near(
            _batched(terms), start, self.tol, self.preconditioners[1], self.limit, **near
        )
        x = torch.cat([embeddings, second.x], 1) if alpha is None else second.x
        if self.descent is not None:
            # With α = 0 the proximal objective is that of plain finetuning.
            plain = _batched(_proximal_terms(finetune, embeddings, 0.0))
            end = descend(plain, x, self.tol, self.descent)
            x = end.x
            second = replace(end, evaluations=second.evaluations + end.evaluations)
        tested = self.tested
        with torch.no_grad():
            losses = [
                _for_each_model(lambda theta, b=batch: tested.losses(*tested.split(theta), *b), x)
                for batch in tested.batches()
            ]
        result = {
            "losses": torch.cat(losses, 1),
            "gradient_norms": torch.stack([first.gradient_norms, second.gradient_norms], 1),
            "evaluations": torch.stack([first.evaluations, second.evaluations], 1),
            "converged": first.converged & second.converged,
        }
        return {name: value.cpu() for name, value in result.items()}


def _for_each_model(function: Callable[..., Any], *arguments: Nested) -> Any:
    """Apply a function of one model to R of them, the first dimension of every argument.

    Vectorised by `torch.func.vmap`; one model after the other where a layer cannot be
    (recurrent ones have no batching rule).
    """
    try:
        return vmap(function)(*arguments)
    except RuntimeError as error:
        if "atching rule" not in str(error):
            raise
        count = leaves(arguments[0])[0].shape[0]
        each = [function(*map_leaves(itemgetter(row), arguments)) for row in range(count)]
        return concatenate([map_leaves(itemgetter(None), one) for one in each])


# A term of R objectives: maps parameters (r, p) and the objectives' numbers (r,) to values (r,).
_Terms = Callable[[Tensor, Tensor], Iterator[Tensor]]


def _batched(terms: _Terms) -> BatchedObjective:
    """Values and gradients of objectives given as sums of terms, one a batch of data.

    Objective r depends on row r alone, so one backward pass through their sum gives every
    gradient.
    """

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        for term in terms(x, which):
            gradient += torch.autograd.grad(term.sum(), x)[0]
            value += term.detach()
        return value, gradient

    return objective


def _pretraining_terms(stage: Stage, weights: Tensor) -> _Terms:
    """Σ_j c_rj g_j(θ_r) + R_G(θ_r), with the weights c ``(R, m)``."""

    def terms(x: Tensor, which: Tensor) -> Iterator[Tensor]:
        yield _for_each_model(lambda theta: stage.regularization(*stage.split(theta)), x)
        start = 0
        for batch in stage.batches():
            losses = _for_each_model(
                lambda theta, b=batch: stage.losses(*stage.split(theta), *b), x
            )
            stop = start + losses.shape[1]
            yield (weights[which, start:stop] * losses).sum(1)
            start = stop

    return terms


def _head_terms(stage: Stage, embeddings: Tensor) -> _Terms:
    """F(W_r, Θ_r) as a function of Θ_r; the fixed embeddings are evaluated once."""
    with torch.no_grad():
        features = [
            (_for_each_model(lambda w, i=inputs: stage.embed(w, i), embeddings), targets)
            for inputs, targets in stage.batches()
        ]

    def terms(x: Tensor, which: Tensor) -> Iterator[Tensor]:
        yield _for_each_model(stage.regularization, embeddings[which], x)
        for embedded, targets in features:
            some = map_leaves(lambda leaf: leaf[which], embedded)
            losses = _for_each_model(lambda h, f, t=targets: stage.head_losses(h, f, t), x, some)
            yield losses.sum(1) / stage.size

    return terms


def _proximal_terms(stage: Stage, embeddings: Tensor, alpha: float) -> _Terms:
    """α‖W_r − W̄_r‖² + F(W_r, Θ_r), the paper's eq. 12."""

    def terms(x: Tensor, which: Tensor) -> Iterator[Tensor]:
        away = x[:, : stage.embedding_size] - embeddings[which]
        yield alpha * (away * away).sum(1)
        yield _for_each_model(lambda theta: stage.regularization(*stage.split(theta)), x)
        for batch in stage.batches():
            losses = _for_each_model(
                lambda theta, b=batch: stage.losses(*stage.split(theta), *b), x
            )
            yield losses.sum(1) / stage.size

    return terms


def _weights(removals: list[list[int]], stage: Stage, renormalise: bool, fraction: float) -> Tensor:
    """The weight of each pretraining example in each objective, ``(r, m)``."""
    weights = torch.ones(len(removals), stage.size, dtype=torch.float64)
    for row, removal in enumerate(removals):
        weights[row, removal] = 1 - fraction
    total = weights.sum(1, keepdim=True) if renormalise else stage.size
    return (weights / total).to(stage.device)


def _finetuning_hessian(finetune: Stage, alpha: float | None) -> Hessian | AddDiagonal:
    if alpha is None:
        return Hessian(finetune, block="head")
    return proximal_hessian(finetune, alpha)


def _preconditioner(
    kept: Checkpoint,
    parts: tuple[object, ...],
    size: int,
    hessian: Callable[[], Hessian | AddDiagonal],
    damping: float,
    matrix: Tensor | None = None,
) -> RowPreconditioner | None:
    """The inverse of a matrix near the Hessian, kept under a name for `parts`.

    The Hessian itself where it is given as a `matrix` or small enough to be factorised, else a
    sketch of the Gauss-Newton matrix.
    """
    if matrix is not None or size <= _DENSE_PARAMETERS:
        name = f"preconditioner-{fingerprint(*parts)}"
        factors = kept.get(name)
        if factors is None:
            made = AbsoluteInverse(hessian().dense() if matrix is None else matrix)
            factors = {"values": made.values, "vectors": made.vectors}
            kept.put(name, factors)
        return AbsoluteInverse.from_eigenpairs(factors["values"] + damping, factors["vectors"])
    name = f"preconditioner-{fingerprint(*parts, damping)}"
    factors = kept.get(name)
    if factors is None:
        sketch = hessian().preconditioner(damping)
        if sketch is None:
            return None
        factors = {field.name: getattr(sketch, field.name) for field in fields(sketch)}
        kept.put(name, factors)
    return _Sketched(GaussNewtonPreconditioner(**factors))


class _Sketched:
    """The sketch's P⁻¹ = S Sᵀ on rows."""

    def __init__(self, sketch: GaussNewtonPreconditioner) -> None:
        self._sketch = sketch

    def __call__(self, rows: Tensor) -> Tensor:
        return self._sketch.root(self._sketch.root_transposed(rows.T)).T


def _double(test: Batch, device: torch.device) -> Batch:
    inputs, targets = map_leaves(
        lambda leaf: leaf.to(device, torch.float64 if leaf.is_floating_point() else None),
        Examples(test).tensors(),
    )
    return inputs, targets


def _check_settings(alpha: float | None, fraction: float, tol: float, damping: float) -> None:
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be positive (or None for case 1), not {alpha}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie above 0 and at most at 1, not {fraction}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, not {damping}")


def _check_hessian(hessian: Tensor, size: int, cold: bool) -> None:
    if hessian.shape != (size, size):
        raise ValueError(
            f"pretrain_hessian must be of shape {(size, size)}, as the pretraining stage has "
            f"{size} parameters, not {tuple(hessian.shape)}"
        )
    if not hessian.isfinite().all():
        raise ValueError("pretrain_hessian is not finite")
    if cold:
        raise ValueError("a cold start uses no pretrain_hessian; leave it out")


def _indices(number: int, removal: Any, size: int) -> list[int]:
    """One removal as indices in ascending order, a Boolean mask turned into them."""
    if not hasattr(removal, "__len__") or getattr(removal, "ndim", 1) != 1:
        raise TypeError(
            "removals must be sets of indices, one a retraining; for leave-one-out give "
            "[[0], [1], ...], for a single set or mask [removal]"
        )
    try:
        chosen = torch.as_tensor(
            removal if hasattr(removal, "dtype") else list(removal), device="cpu"
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"removal {number} must hold whole numbers: {error}") from error
    if chosen.dtype == torch.bool:
        if len(chosen) != size:
            raise ValueError(
                f"removal {number} is a mask of length {len(chosen)}, which does not fit {size} "
                "pretraining examples"
            )
        chosen = chosen.nonzero()[:, 0]
    if not chosen.numel():
        raise ValueError(f"removal {number} is empty")
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dim() != 1:
        raise TypeError(f"removal {number} must hold whole numbers (or be a Boolean mask)")
    indices = sorted(chosen.tolist())
    if len(set(indices)) != len(indices):
        raise ValueError(f"removal {number} names an example twice")
    if indices[0] < 0 or indices[-1] >= size:
        raise ValueError(
            f"removal {number} names an example outside 0..{size - 1}"
            + ("; indices count from 0, negative ones mean nothing here" if indices[0] < 0 else "")
        )
    if len(indices) == size:
        raise ValueError(f"removal {number} leaves no pretraining example")
    return indices
