"""Training to a real optimum: influence functions assume that the gradient is zero.

Adam on mini-batches goes fast to the neighbourhood of a minimum, L-BFGS (SciPy's) on the whole
data goes down to where values no longer distinguish points, and Newton steps, their systems
solved by conjugate gradients, take the gradient norm to the tolerance. A zero gradient may still
be a saddle (a unit that weight decay has switched off sits on one), so the lowest eigenvalue of
the Hessian is looked up, and where it is negative training goes on along its eigenvector.
"""

from __future__ import annotations

import math
import pathlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from msif_lib.curvature import Hessian, proximal_hessian
from msif_lib.descent import SGD, AdamW, Batches, Path, descend
from msif_lib.solvers import ConjugateGradient, FailedSolve, SolverWarning
from msif_lib.stage import Stage
from msif_lib.support.arguments import flag, instance, positive, seed_of, whole
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.data import Nested, map_leaves
from msif_lib.support.notices import warn_caller
from msif_lib.support.operators import LinearOperator
from msif_lib.support.parameters import Block
from msif_lib.support.state import in_own_state

__all__ = [
    "SGD",
    "AdamW",
    "Batches",
    "Path",
    "TrainingReport",
    "TrainingWarning",
    "descend",
    "train",
    "train_kept",
]

_ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# Saddles left in one training, at most.
_ESCAPES = 10
# Eigenvalues that are below zero by this share of the largest in size are rounding of the search
# for them, not a saddle.
_FLAT = 1e-5
# Up to this many parameters eigenvalues come from the dense Hessian.
_SMALL = 100
# How the numbers of a report are kept as tensors.
_KINDS = {bool: torch.bool, int: torch.int64, float: torch.float64}


class TrainingWarning(UserWarning):
    """Training ended above the gradient norm asked for, or at a saddle."""


@dataclass(frozen=True)
class TrainingReport:
    """How a training ended.

    Attributes
    ----------
    gradient_norm
        Euclidean norm of the objective's gradient in the trained parameters.
    tol
        The norm asked for.
    converged
        Whether it was reached, at a point that is no saddle.
    objective
        The objective's value, regularizers and proximal term included.
    lowest_eigenvalue
        Of the objective's Hessian there: positive at a minimum, negative at a saddle.
    epochs, lbfgs_evaluations, newton_steps
        What each phase took.
    escapes
        Saddles that were left.
    """

    gradient_norm: float
    tol: float
    converged: bool
    objective: float
    lowest_eigenvalue: float
    epochs: int
    lbfgs_evaluations: int
    newton_steps: int
    escapes: int


@in_own_state
def train(
    stage: Stage,
    tol: float = 1e-8,
    *,
    head_only: bool = False,
    towards: Tensor | None = None,
    alpha: float | None = None,
    epochs: int = 20,
    learning_rate: float = 5e-3,
    minibatch: int = 64,
    lbfgs_evaluations: int = 5000,
    newton_steps: int = 20,
    seed: int = 0,
) -> TrainingReport:
    """Train a stage in place until the norm of its gradient is at most `tol`.

    Parameters
    ----------
    stage
        The stage; training starts at the parameters of its modules and ends there. What the stage
        does not train stays.
    tol
        Gradient norm to be reached, in the loss's units. In float32 not below about 1e-5.
    head_only
        Keep what is shared fixed (the finetuning of case 1).
    towards, alpha
        Both given: add the proximal term α‖W − `towards`‖² (the finetuning of case 2, where
        `towards` is W̄ ``(p_W,)``).
    epochs, learning_rate, minibatch
        Of Adam; 0 epochs leave that phase out (a warm start).
    lbfgs_evaluations, newton_steps
        Limits of the two other phases.
    seed
        Of the mini-batches' order.

    Returns
    -------
    TrainingReport
        The gradient norm reached, and by what.

    Raises
    ------
    TypeError, ValueError
        A setting that is no number or outside its range; `towards` of another shape, dtype or
        device, without `alpha` or the reverse, or with `head_only`; no parameter that the stage
        trains.

    Warns
    -----
    TrainingWarning
        The tolerance was not reached.
    """
    _check_pull(stage, towards, alpha, head_only)
    for name, number in (("tol", tol), ("learning_rate", learning_rate)):
        positive(name, number)
    for name, count in (("epochs", epochs), ("newton_steps", newton_steps), ("seed", seed)):
        whole(name, count, 0)
    seed_of("seed", seed)
    for name, count in (("minibatch", minibatch), ("lbfgs_evaluations", lbfgs_evaluations)):
        whole(name, count, 1)
    free = tuple(n for n in stage.trained if not head_only or n in stage.own)
    if not free:
        raise ValueError("the stage trains no parameter; say which with trained=")
    start = stage.vector()
    objective = _Objective(stage, start, free, towards, alpha)

    def load(x: Tensor) -> None:
        stage.load_vector(stage.parameters.replaced(start, x, free))

    def hessian(x: Tensor) -> LinearOperator:
        load(x)
        return Hessian(stage, free) if alpha is None else proximal_hessian(stage, alpha)

    x, evaluate = stage.parameters.take(start, free), objective.value_and_gradient
    if epochs:
        x = _adam(objective, x, epochs, learning_rate, minibatch, seed)
    evaluations, steps, escapes = 0, 0, 0
    while True:
        x, used = _lbfgs(evaluate, x, tol, lbfgs_evaluations - evaluations)
        evaluations += used
        x, taken = _newton(evaluate, hessian, x, tol, newton_steps)
        steps += taken
        lowest, direction, largest = _lowest_eigenpair(hessian(x), seed)
        minimum = lowest >= -_FLAT * largest
        if minimum or escapes == _ESCAPES or evaluations >= lbfgs_evaluations:
            break
        x = _leave_saddle(evaluate, x, direction)
        escapes += 1
    load(x)
    value, gradient = evaluate(x)
    norm = _length(gradient)
    report = TrainingReport(
        gradient_norm=norm,
        tol=tol,
        converged=norm <= tol and minimum,
        objective=float(value),
        lowest_eigenvalue=lowest,
        epochs=epochs,
        lbfgs_evaluations=evaluations,
        newton_steps=steps,
        escapes=escapes,
    )
    if not report.converged:
        warn_caller(
            f"training ended at gradient norm {norm:.1e} (asked for {tol:.1e}) with a lowest "
            f"Hessian eigenvalue of {lowest:.1e} (a minimum has none below zero); allow more "
            "evaluations, add weight decay or use float64",
            TrainingWarning,
        )
    return report


def _check_pull(stage: Stage, towards: Tensor | None, alpha: float | None, head_only: bool) -> None:
    if not isinstance(stage, Stage):
        raise TypeError(f"train takes a Stage first, not a {type(stage).__name__}")
    flag("head_only", head_only)
    if len(stage.reader.share) != stage.size:
        raise ValueError(
            "train takes a whole stage, not one whose examples are shared out: train before shard()"
        )
    if (towards is None) != (alpha is None):
        raise ValueError("towards and alpha belong together: give both or neither")
    if alpha is None or towards is None:
        return
    positive("alpha", alpha)
    if head_only:
        raise ValueError("a proximal term on the embedding has no place in head_only training")
    like = stage.vector()[: stage.embedding_size]
    if not isinstance(towards, Tensor) or towards.shape != like.shape:
        raise ValueError(f"towards must be a vector {tuple(like.shape)} of what is shared")
    if towards.dtype != like.dtype or towards.device != like.device:
        raise ValueError(
            f"towards is {towards.dtype} on {towards.device}, the stage {like.dtype} on "
            f"{like.device}; convert it by .to(stage.vector())"
        )


@in_own_state
def train_kept(
    stage: Stage,
    tol: float = 1e-8,
    *,
    checkpoint: str | pathlib.Path | None = None,
    **settings: Any,
) -> TrainingReport:
    """Train a stage in place as :func:`train` does, or read what the same call came to before.

    Parameters
    ----------
    stage, tol
        As for :func:`train`.
    checkpoint
        A folder that keeps each training; None: nothing is kept. Another process that works there
        is waited for.
    settings
        What else :func:`train` takes.

    Returns
    -------
    TrainingReport
        As of :func:`train`.

    Warns
    -----
    TrainingWarning
        The tolerance was not reached, in a training that was not read.
    """
    instance("stage", stage, Stage)
    if checkpoint is None:
        return train(stage, tol, **settings)
    kept = Checkpoint(checkpoint)
    with kept.held():
        return _train_kept(stage, tol, kept, settings)


def _train_kept(
    stage: Stage, tol: float, kept: Checkpoint, settings: dict[str, Any]
) -> TrainingReport:
    name = f"training-{kept.key(stage.identity(), tol, settings)}"
    found = kept.get(name)
    if found is None:
        report = train(stage, tol, **settings)
        values = {
            field: torch.tensor(value, dtype=_KINDS[type(value)], device="cpu")
            for field, value in asdict(report).items()
        }
        kept.put(name, {"vector": stage.vector(), **values})
        return report
    stage.load_vector(found.pop("vector"))
    numbers: dict[str, Any] = {field: value.item() for field, value in found.items()}
    return TrainingReport(**numbers)


class _Objective:
    """What is trained, as a function of the free parameters ``(p_free,)``."""

    def __init__(
        self,
        stage: Stage,
        start: Tensor,
        free: Block,
        towards: Tensor | None,
        alpha: float | None,
    ) -> None:
        self.stage, self._start, self._free = stage, start, free
        self._towards, self._alpha = towards, alpha
        self._features: list[tuple[Any, Nested, Tensor]] | None = None
        if stage.composed and set(free) <= set(stage.own):
            # The embedding is fixed: it is evaluated once.
            parts = stage.parameters.views(start)
            with torch.no_grad():
                self._features = [
                    (stage.features(parts, inputs), targets, weights)
                    for (inputs, targets), weights in stage.weighted_batches()
                ]

    def parts(self, x: Tensor) -> list[Tensor]:
        """All parameters of the model, the free ones from `x`."""
        return self.stage.parameters.parts(self._start, (self._free, x))

    def penalty(self, parts: list[Tensor]) -> Tensor:
        """R, and the pull α‖W − towards‖²."""
        value = self.stage.penalty(parts)
        if self._towards is not None and self._alpha is not None:
            w = torch.cat([parts[number].reshape(-1) for number in self.stage.shared])
            value = value + self._alpha * (w - self._towards) @ (w - self._towards)
        return value

    def _losses(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """Weighted sums of losses, one a batch."""
        stage = self.stage
        if self._features is not None:
            for features, targets, weights in self._features:
                yield weights @ stage.feature_losses(parts, features, targets)
            return
        for batch, weights in stage.weighted_batches():
            yield weights @ stage.batch_losses(parts, *batch)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective and its gradient ``(p_free,)``, over all examples."""
        x = x.detach().requires_grad_()
        parts = self.parts(x)
        value = self.penalty(parts)
        (gradient,) = (
            torch.autograd.grad(value, x, retain_graph=True)
            if value.requires_grad
            else (torch.zeros_like(x),)
        )
        value = value.detach()
        for losses in self._losses(parts):
            term = losses / self.stage.size
            gradient = gradient + torch.autograd.grad(term, x, retain_graph=True)[0]
            value = value + term.detach()
        return value, gradient


def _adam(
    objective: _Objective,
    x: Tensor,
    epochs: int,
    learning_rate: float,
    minibatch: int,
    seed: int,
) -> Tensor:
    """Adam on shuffled mini-batches, the learning rate falling to zero along a cosine."""
    stage = objective.stage
    inputs, targets = stage.examples.tensors()
    data = torch.utils.data.TensorDataset(torch.arange(stage.size, device="cpu"))
    loader = torch.utils.data.DataLoader(
        data, minibatch, shuffle=True, generator=torch.Generator("cpu").manual_seed(seed)
    )
    adam, steps = AdamW(learning_rate, weight_decay=0.0), epochs * len(loader)
    state = adam.begin(x.detach())
    for _ in range(epochs):
        with torch.device("cpu"):  # where the loader draws, whatever the caller's default
            batches = list(loader)
        for (indices,) in batches:
            batch = map_leaves(partial(_rows, indices=indices), (inputs, targets))
            batch = map_leaves(lambda leaf: leaf.to(stage.device), batch)
            weights = stage.weights[indices.to(stage.device)]
            theta = state.x.clone().requires_grad_()
            parts = objective.parts(theta)
            losses = weights @ stage.batch_losses(parts, *batch) / len(indices)
            (gradient,) = torch.autograd.grad(losses + objective.penalty(parts), theta)
            rate = learning_rate * (1 + math.cos(math.pi * state.step / steps)) / 2
            state = adam.step(state, gradient, rate, 0.0)
    return state.x


def _rows(leaf: Tensor, indices: Tensor) -> Tensor:
    return leaf[indices.to(leaf.device)]


def _lbfgs(
    evaluate: _ValueAndGradient, x: Tensor, tol: float, evaluations: int
) -> tuple[Tensor, int]:
    """SciPy's L-BFGS, until the tolerance or until values stop distinguishing points."""

    def function(values: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(values).to(x)
        value, gradient = evaluate(point)
        return float(value), gradient.double().cpu().numpy()

    # SciPy tests the largest component; a p-vector below tol/√p in each is below tol in norm.
    result = scipy.optimize.minimize(
        function,
        x.double().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxcor": 100,
            "maxfun": evaluations,
            "maxiter": evaluations,
            "ftol": 0.0,
            "gtol": tol / len(x) ** 0.5,
        },
    )
    return torch.from_numpy(result.x).to(x), int(result.nfev)


def _length(gradient: Tensor) -> float:
    """‖·‖, of numbers whose squares single precision cannot hold too."""
    return float(gradient.norm(dtype=torch.float64))


def _lowest_eigenpair(hessian: LinearOperator, seed: int) -> tuple[float, Tensor, float]:
    """The lowest eigenvalue of a Hessian, to about 1e-3 of its largest, its vector, and that.

    The last is the largest in size.
    """
    size = hessian.shape[0]
    if size <= _SMALL:
        values, vectors = torch.linalg.eigh(hessian.dense().double())
        largest = float(values.abs().max())
        return float(values[0]), vectors[:, 0].to(hessian.dtype), largest
    start = np.random.default_rng(seed).standard_normal(size)
    settings = {"k": 1, "v0": start, "ncv": 40}
    operator = hessian.to_scipy()
    # ARPACK counts what is small beside 1 as converged: the Hessian is given in units of its size.
    length = float(np.linalg.norm((operator @ start).astype(float)) / np.linalg.norm(start))
    unit = 2.0 ** math.frexp(length)[1] if length else 1.0
    operator = operator * (1 / unit)
    largest = scipy.sparse.linalg.eigsh(
        operator, which="LA", tol=1e-2, return_eigenvectors=False, **settings
    )[0]
    # ARPACK's tolerance is relative, so the lowest is sought as the farthest from the largest.
    shifted = operator - largest * scipy.sparse.linalg.aslinearoperator(scipy.sparse.eye(size))
    values, vectors = scipy.sparse.linalg.eigsh(shifted, which="SA", tol=1e-3, **settings)
    lowest = torch.as_tensor(vectors[:, 0], dtype=hessian.dtype, device=hessian.device)
    value = float(values[0] + largest)
    return unit * value, lowest, unit * max(abs(value), abs(float(largest)))


def _leave_saddle(evaluate: _ValueAndGradient, x: Tensor, direction: Tensor) -> Tensor:
    """The lowest point met along ± a direction of negative curvature."""
    tried = [x + sign * 2.0**-k * direction for k in range(12) for sign in (1, -1)]
    return min(tried, key=lambda point: float(evaluate(point)[0]))


def _newton(
    evaluate: _ValueAndGradient,
    hessian: Callable[[Tensor], LinearOperator],
    x: Tensor,
    tol: float,
    limit: int,
) -> tuple[Tensor, int]:
    """Inexact Newton steps while each lowers the gradient norm and the Hessian is definite."""
    gradient = evaluate(x)[1]
    for step in range(limit):
        norm = _length(gradient)
        if norm <= tol:
            return x, step
        solver = ConjugateGradient(tol=min(0.1, max(0.1 * tol / norm, 1e-8)))
        with warnings.catch_warnings():
            # The report is read right here; a loose or refused step is no news to the user.
            warnings.simplefilter("ignore", SolverWarning)
            try:
                solution = solver.solve(hessian(x), -gradient)
            except FailedSolve:  # bent down in the first direction
                return x, step
        if solution.report.negative_curvature:
            return x, step
        trial = x + solution.x
        new_gradient = evaluate(trial)[1]
        if not _length(new_gradient) < norm:
            return x, step
        x, gradient = trial, new_gradient
    return x, limit
