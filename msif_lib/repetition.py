"""A link's training done again, for many models at once: other weights, another start.

The trainings of R models are rows. :class:`Minimised` takes the link's objective, with a row of
example weights and what the stage before handed on, to a vanishing gradient; :class:`Stepped`
takes the recorded steps. Both leave the stage's modules as they are. :func:`stepped_again` takes
the steps of one model and keeps what it takes to walk them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from msif_lib.curvature import AddDiagonal, Hessian
from msif_lib.descent import Path, run, take_steps
from msif_lib.handover import gradient_size
from msif_lib.links import Frozen, Link, Optimum, Proximal, Unrolled
from msif_lib.preconditioner import GaussNewtonPreconditioner
from msif_lib.stage import Stage
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.data import (
    Batch,
    Nested,
    concatenate,
    count_of,
    leaves,
    map_leaves,
    rebuilt,
)
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.minimise import (
    AbsoluteInverse,
    BatchedObjective,
    Minimum,
    RowPreconditioner,
    minimise_near,
)
from msif_lib.support.parameters import Block

#: Links whose training ends at an optimum.
Solved = Optimum | Frozen | Proximal

# A training has not come to its end before its gradient is this share of one example's.
_ENDED = 1e-6
# Up to this many parameters a warm start has the factorised Hessian, above it a sketch.
_DENSE_PARAMETERS = 4000


def in_double(link: Link) -> Solved | Unrolled:
    """The same link in float64, on a deep copy of its stage.

    Raises
    ------
    ValueError
        The link is an approximation, without a training that could be done again; a training
        that drew noise in another precision than float64.
    """
    check_repeatable(link)
    stage = link.stage.to(torch.float64)
    if isinstance(link, Unrolled):
        path, double = link.path, torch.float64
        if path.noise_seed is not None and path.start.dtype != double:
            raise ValueError(
                "a recorded training that draws (noise_seed=) draws other numbers in float64, in "
                f"which it would be run again, than in {path.start.dtype}: it would be another "
                "training; record it in float64, by stage.to(torch.float64)"
            )
        start, end = path.start.to(stage.device, double), path.end.to(stage.device, double)
        return Unrolled(stage, replace(path, start=start, end=end, states={}))
    if isinstance(link, Proximal):
        return Proximal(stage, link.alpha)
    assert isinstance(link, Optimum | Frozen)
    return type(link)(stage)


def check_repeatable(link: Link) -> None:
    """Refuse a link without a training that could be done again.

    Raises
    ------
    ValueError
        It is an approximation.
    """
    if not isinstance(link, Optimum | Frozen | Proximal | Unrolled):
        raise ValueError(
            f"{type(link).__name__} approximates a training of which no steps are known, so that "
            "it cannot be done again; record the training and give Unrolled(stage, path)"
        )


def attained(link: Link, tol: float) -> float:
    """The gradient norm at which a training has ended: `tol`, or less where losses are small."""
    return min(tol, _ENDED * gradient_size(link) or tol)


class Repetition(ABC):
    """A link's training, to be done again with other weights and from what is handed on.

    Attributes
    ----------
    link
        The link, in float64.
    """

    link: Link

    @abstractmethod
    def __call__(self, weights: Tensor, handed: Tensor | None) -> Minimum:
        """Train R models.

        Parameters
        ----------
        weights
            Of the examples, ``(R, N)``.
        handed
            What each model takes from the stage before, ``(R, p_W)``; None for a first stage.

        Returns
        -------
        Minimum
            Where each training ended, over all parameters of the stage ``(R, p)``.
        """

    @abstractmethod
    def identity(self) -> list[object]:
        """All that the trainings depend on beside weights, what is handed on and settings."""


@dataclass
class Minimised(Repetition):
    """Down to a vanishing gradient.

    Attributes
    ----------
    link
        An `Optimum`, `Frozen` or `Proximal` link, in float64.
    start
        Where each training begins, ``(p,)``; shared parameters that are not trained begin, and
        stay, as they are handed.
    cold
        Whether `start` is elsewhere than at the trained parameters. Then a `Proximal` training
        begins with the shared parameters that it is handed, as finetuning does.
    tol, limit
        Gradient norm to be reached, and evaluations allowed.
    damping
        Added to the eigenvalues of the preconditioner; see
        :class:`msif_lib.retraining.RetrainingSettings`.
    preconditioner
        H₀⁻¹ with H₀ near the Hessian of what is trained.
    """

    link: Solved
    start: Tensor
    cold: bool
    tol: float
    limit: int
    damping: float
    preconditioner: RowPreconditioner | None = None

    def identity(self) -> list[object]:
        """Kind, pull, where it begins, and the stage."""
        alpha = self.link.alpha if isinstance(self.link, Proximal) else None
        return [type(self.link).__name__, alpha, self.start, self.link.stage.identity()]

    def precondition(self, kept: Checkpoint, matrix: Tensor | None = None) -> None:
        """Factorise the Hessian at the trained parameters, or read its factors."""
        key = "" if kept.folder is None else kept.key(self.identity(), matrix)
        self.preconditioner = _preconditioner(kept, key, self.link, self.damping, matrix)

    def __call__(self, weights: Tensor, handed: Tensor | None) -> Minimum:
        """Minimise all objectives together."""
        parameters, block = self.link.stage.parameters, self.link.block
        vectors = self._begin(len(weights), handed)
        # A damped preconditioner is of use for longer; none is to be relied on to the end.
        near = {"near": self.limit // 2} if self.damping else {}
        found = minimise_near(
            batched(self._terms(weights / self.link.stage.size, vectors, handed)),
            _rows_of(parameters.take(vectors.T, block)),
            self.tol,
            self.preconditioner,
            self.limit,
            **near,
        )
        return replace(found, x=_rows_of(parameters.replaced(vectors.T, found.x.T, block)))

    def _begin(self, count: int, handed: Tensor | None) -> Tensor:
        """All parameters of each model before its training, ``(R, p)``."""
        vectors = self.start.expand(count, -1).contiguous()
        if handed is None:
            return vectors
        stage = self.link.stage
        taken = self.link.held
        if self.cold and isinstance(self.link, Proximal):
            taken = stage.shared
        given = stage.parameters.take(_with_shared(vectors, handed).T, taken)
        return _rows_of(stage.parameters.replaced(vectors.T, given, taken))

    def _terms(self, coefficients: Tensor, vectors: Tensor, handed: Tensor | None) -> Terms:
        """The objective of the link: that of its stage, and the pull of a proximal one."""
        link, stage = self.link, self.link.stage
        if stage.composed and not set(link.block) & set(stage.shared):
            terms = _terms_on_features(stage, link.block, coefficients, vectors)
        else:
            terms = stage_terms(stage, link.block, coefficients, vectors)
        if not isinstance(link, Proximal) or handed is None:
            return terms
        centres = _rows_of(stage.parameters.take(_with_shared(vectors, handed).T, link.block))

        def pulled(x: Tensor, which: Tensor) -> Iterator[Tensor]:
            yield (link.pull * (x - centres[which]).square()).sum(1) / 2  # α‖W_r − c_r‖²
            yield from terms(x, which)

        return pulled


@dataclass
class Stepped(Repetition):
    """The steps of a recorded training, wherever they end.

    Attributes
    ----------
    link
        The link, in float64.
    """

    link: Unrolled

    def identity(self) -> list[object]:
        """The path and the stage."""
        return [*self.link.settings(), self.link.stage.identity()]

    def __call__(self, weights: Tensor, handed: Tensor | None) -> Minimum:
        """Take the steps; how far from an optimum they end is reported, and no failure."""
        stage, path, count = self.link.stage, self.link.path, len(weights)
        start = path.start.expand(count, -1).contiguous()
        end = run(stage, path, weights, start if handed is None else _with_shared(start, handed))
        which = torch.arange(count, device=end.device)
        terms = stage_terms(stage, stage.trained, weights / stage.size, end)
        x = _rows_of(stage.parameters.take(end.T, stage.trained))
        norms = batched(terms)(x, which)[1].norm(dim=1)
        done = torch.ones(count, dtype=torch.bool, device=end.device)
        return Minimum(end, norms, done, torch.full_like(which, len(path)))


def stepped_again(stage: Stage, path: Path, handed: Tensor | None, progress: bool = True) -> Path:
    """Take the steps of a path once more, by a stage with other weights or from another start.

    Parameters
    ----------
    stage
        Model, loss, data and weights; its modules stay as they are.
    path
        Batches, learning rates, optimiser and what was drawn.
    handed
        What is taken from the stage before, ``(p_W,)``, in place of that part of the path's start;
        None: it begins where the path did.
    progress
        Show a bar for what takes more than a second.

    Returns
    -------
    Path
        The training, with states every √T steps: it can be walked back as the first can.

    Raises
    ------
    FloatingPointError
        The training diverged; the message names the step.
    """
    start = path.start if handed is None else _with_shared(path.start[None], handed[None])[0]
    return take_steps(replace(path, start=start).steps(stage), "training again", progress)


def _with_shared(vectors: Tensor, handed: Tensor) -> Tensor:
    """Rows ``(R, p)`` with the shared parameters replaced, which come first."""
    return torch.cat([handed, vectors[:, handed.shape[1] :]], 1)


def _rows_of(columns: Tensor) -> Tensor:
    return columns.T.contiguous()


# --- R objectives at once ------------------------------------------------------------------------


def for_each_model(function: Callable[..., Any], *arguments: Nested) -> Any:
    """Apply a function of one model to R of them, the first dimension of every argument.

    Vectorised by `torch.func.vmap`; one model after the other where it cannot be: recurrent layers
    have no batching rule, and a model may look at values (``.item()``). What is wrong with the
    model itself is said by that.
    """
    try:
        return vmap(lambda tensors: function(*rebuilt(arguments, tensors)))(leaves(arguments))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        count = count_of(arguments)
        each = [function(*map_leaves(itemgetter(row), arguments)) for row in range(count)]
        return concatenate([map_leaves(itemgetter(None), one) for one in each])


#: A term of R objectives: maps parameters (r, p) and the objectives' numbers (r,) to values (r,).
Terms = Callable[[Tensor, Tensor], Iterator[Tensor]]


def batched(terms: Terms) -> BatchedObjective:
    """Values and gradients of objectives given as sums of terms, one a batch of data.

    Objective r depends on row r alone, so one backward pass through their sum gives every
    gradient.
    """

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        with torch.enable_grad():
            for term in terms(x, which):
                if term.requires_grad:  # a penalty may be constant
                    gradient += torch.autograd.grad(term.sum(), x)[0]
                value += term.detach()
        return value, gradient

    return objective


def stage_terms(stage: Stage, block: Block, coefficients: Tensor, vectors: Tensor) -> Terms:
    """Σ_j c_rj ℓ_j + R as a function of a block of the parameters; c ``(R, N)``.

    The others are those of `vectors` ``(R, p)``.
    """

    def losses(batch: Batch, x: Tensor, which: Tensor) -> Tensor:
        def of_one(rows: Tensor, vector: Tensor) -> Tensor:
            return stage.batch_losses(stage.parameters.parts(vector, (block, rows)), *batch)

        return for_each_model(of_one, x, vectors[which])

    return _summed(stage, block, coefficients, vectors, stage.batches, losses)


def _terms_on_features(stage: Stage, block: Block, coefficients: Tensor, vectors: Tensor) -> Terms:
    """The same where the embedding stays, which is then evaluated once."""
    views = stage.parameters.views
    with torch.no_grad():
        embedded = [
            (for_each_model(lambda v, i=inputs: stage.features(views(v), i), vectors), targets)
            for inputs, targets in stage.batches()
        ]

    def losses(batch: Batch, x: Tensor, which: Tensor) -> Tensor:
        features, targets = batch

        def of_one(rows: Tensor, vector: Tensor, own: Nested) -> Tensor:
            parts = stage.parameters.parts(vector, (block, rows))
            return stage.feature_losses(parts, own, targets)

        return for_each_model(of_one, x, vectors[which], map_leaves(itemgetter(which), features))

    return _summed(stage, block, coefficients, vectors, lambda: embedded, losses)


def _summed(
    stage: Stage,
    block: Block,
    coefficients: Tensor,
    vectors: Tensor,
    batches: Callable[[], Iterable[Batch]],
    losses: Callable[[Batch, Tensor, Tensor], Tensor],
) -> Terms:
    """R and a weighted sum for each batch, of losses ``(r, b)`` by batch, rows and models."""

    def terms(x: Tensor, which: Tensor) -> Iterator[Tensor]:
        yield _penalties(stage, block, x, vectors[which])
        start = 0
        for batch in batches():
            found = losses(batch, x, which)
            stop = start + found.shape[1]
            yield (coefficients[which, start:stop] * found).sum(1)
            start = stop

    return terms


def _penalties(stage: Stage, block: Block, x: Tensor, vectors: Tensor) -> Tensor:
    parts = stage.parameters.parts
    return for_each_model(lambda rows, v: stage.penalty(parts(v, (block, rows))), x, vectors)


# --- preconditioners -----------------------------------------------------------------------------


def _preconditioner(
    kept: Checkpoint,
    key: str,
    link: Solved,
    damping: float,
    matrix: Tensor | None,
) -> RowPreconditioner | None:
    """The inverse of a matrix near the Hessian, kept under a name for `key`.

    The Hessian itself where it is given as a `matrix` or small enough to be factorised, else a
    sketch of the Gauss-Newton matrix.
    """
    if matrix is not None or link.stage.parameters.count(link.block) <= _DENSE_PARAMETERS:
        name = f"preconditioner-{fingerprint(key)}"
        factors = kept.get(name)
        if factors is None:
            made = AbsoluteInverse(_hessian(link).dense() if matrix is None else matrix)
            factors = {"values": made.values, "vectors": made.vectors}
            kept.put(name, factors)
        return AbsoluteInverse.from_eigenpairs(factors["values"] + damping, factors["vectors"])
    name = f"preconditioner-{fingerprint(key, damping)}"
    factors = kept.get(name)
    if factors is None:
        sketch = _hessian(link).preconditioner(damping)
        if sketch is None:
            return None
        factors = {field.name: getattr(sketch, field.name) for field in fields(sketch)}
        kept.put(name, factors)
    return _Sketched(GaussNewtonPreconditioner(**factors))


def _hessian(link: Solved) -> Hessian | AddDiagonal:
    # Of another link: an operator holds graphs once it is used, and a job is sent none.
    operator = replace(link, curvature="hessian", preconditioner="gauss-newton").operator
    assert isinstance(operator, Hessian | AddDiagonal)
    return operator


class _Sketched:
    """The sketch's P⁻¹ = S Sᵀ on rows."""

    def __init__(self, sketch: GaussNewtonPreconditioner) -> None:
        self._sketch = sketch

    def __call__(self, rows: Tensor) -> Tensor:
        return self._sketch.root(self._sketch.root_transposed(rows.T)).T
