"""The ground truth: leave examples out of pretraining and train both stages again.

Removal of a set S of s pretraining examples has two readings, and a truth must say which it is:

    fixed weight   (1/m) Σ_{j∉S} g_j + R_G       the others keep weight 1/m (ε = −1/m in eq. 4)
    renormalised   1/(m−s) Σ_{j∉S} g_j + R_G     a mean over the others, as a user would retrain

They differ only through the regularizer. Both stages are trained in float64 until the norm of
the gradient is below a tolerance, and the change of the test losses is measured against the
same training without any removal, so that what is left of the optimisation error cancels.

Many removals are trained together: `torch.func.vmap` over models, on shared data. At a warm
start the Hessian at the trained parameters, factorised once, preconditions a quasi-Newton
method for all of them, which then needs a handful of gradient evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from msif_lib.curvature import Hessian, LinearOperator, proximal_hessian
from msif_lib.data import Batch, Examples, Nested, concatenate, leaves, map_leaves
from msif_lib.stage import Stage, check_pair

#: Values ``(R,)`` and gradients ``(R, p)`` of R objectives at R parameter vectors ``(R, p)``;
#: the second argument says which of them are asked for.
BatchedObjective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# A warm start that has not converged after this many evaluations has left the region where the
# Hessian at the start is of use.
_PRECONDITIONED = 50
# Above this many parameters a warm start goes without the factorised Hessian.
_DENSE_PARAMETERS = 4000


@dataclass(frozen=True)
class Minimum:
    """Where :func:`minimise` ended, for R objectives.

    Attributes
    ----------
    x
        Parameter vectors ``(R, p)``.
    gradient_norms
        ``(R,)``.
    converged
        Whether each gradient norm is within the tolerance, ``(R,)``.
    evaluations
        Evaluations of value and gradient of each objective, ``(R,)``.
    """

    x: Tensor
    gradient_norms: Tensor
    converged: Tensor
    evaluations: Tensor


class Preconditioner:
    """The inverse of a dense symmetric H in absolute value: a Newton step, always descending.

    Parameters
    ----------
    matrix
        H, ``(p, p)``.
    floor
        Eigenvalues are taken in absolute value and not below this share of the largest.
    """

    def __init__(self, matrix: Tensor, floor: float = 1e-10) -> None:
        values, self._vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        self._values = values.abs().clamp_min(floor * float(values.abs().max()))

    def __call__(self, rows: Tensor) -> Tensor:
        """H⁻¹, its eigenvalues in absolute value, applied to each row of ``(R, p)``."""
        return (rows @ self._vectors / self._values) @ self._vectors.T


def minimise(
    objective: BatchedObjective,
    start: Tensor,
    tol: float,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    max_evaluations: int = 500,
    memory: int = 20,
) -> Minimum:
    """Minimise R smooth functions at once by preconditioned L-BFGS.

    Nocedal & Wright (2006), algorithms 7.4 and 7.5, with backtracking (Armijo), all objectives
    in step; those that have converged are no longer evaluated.

    Parameters
    ----------
    objective
        ``objective(x, which)`` with x ``(r, p)`` and `which` ``(r,)``, the numbers of the
        objectives asked for; returns values ``(r,)`` and gradients ``(r, p)``.
    start
        Where to begin, ``(R, p)``.
    tol
        Euclidean norm of the gradient to be reached.
    preconditioner
        Maps rows ``(r, p)`` to H₀⁻¹ rows, with H₀ ≻ 0 near the Hessian. None: a multiple of the
        identity, set from the last step.
    max_evaluations
        Evaluations allowed for each objective.
    memory
        Pairs of steps and gradient differences kept.

    Returns
    -------
    Minimum
        Where each objective ended, and whether it converged.

    Raises
    ------
    FloatingPointError
        A value or gradient at `start` is not finite.
    """
    count = len(start)
    x = start.clone()
    which = torch.arange(count)
    value, gradient = objective(x, which)
    if not (value.isfinite().all() and gradient.isfinite().all()):
        raise FloatingPointError("the objective or its gradient is not finite at the start")
    evaluations = torch.ones(count, dtype=torch.long)
    step = torch.ones(count, dtype=x.dtype, device=x.device)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    noise = 10 * torch.finfo(x.dtype).eps

    def direction(gradient: Tensor) -> Tensor:
        """−H_k ∇, by the two-loop recursion over the pairs (s, y, 1/yᵀs)."""
        q, coefficients = gradient, []
        for s, y, rho in reversed(pairs):
            a = rho * (s * q).sum(1)
            q = q - a[:, None] * y
            coefficients.append(a)
        if preconditioner is not None:
            r = preconditioner(q)
        else:
            r = scale[:, None] * q
        for (s, y, rho), a in zip(pairs, reversed(coefficients), strict=True):
            r = r + (a - rho * (y * r).sum(1))[:, None] * s
        return -r

    # Without a preconditioner the first step has length one at most.
    scale = 1 / gradient.norm(dim=1).clamp_min(1.0)
    d = direction(gradient)
    while True:
        open_ = (gradient.norm(dim=1) > tol) & (evaluations < max_evaluations)
        # A step that has shrunk to nothing has met the limit of the arithmetic.
        open_ &= step > 1e-12
        if not open_.any():
            break
        which = open_.nonzero()[:, 0]
        trial = x[which] + step[which, None] * d[which]
        new_value, new_gradient = objective(trial, which)
        evaluations[which] += 1
        slope = (gradient[which] * d[which]).sum(1)
        allowed = value[which] + 1e-4 * step[which] * slope + noise * value[which].abs()
        accepted = new_value <= allowed
        taken = which[accepted]
        step[which[~accepted]] *= 0.5

        s, y = torch.zeros_like(x), torch.zeros_like(x)
        s[taken] = trial[accepted] - x[taken]
        y[taken] = new_gradient[accepted] - gradient[taken]
        curvature = (s * y).sum(1)
        useful = curvature > noise * s.norm(dim=1) * y.norm(dim=1)
        rho = torch.where(useful, 1 / curvature, 0.0)
        pairs = [*pairs, (s, y, rho)][-memory:]
        scale = torch.where(useful, curvature / (y * y).sum(1), scale)

        x[taken], value[taken] = trial[accepted], new_value[accepted]
        gradient[taken], step[taken] = new_gradient[accepted], 1.0
        if len(taken):
            renewed = direction(gradient)
            d[taken] = renewed[taken]
    norms = gradient.norm(dim=1)
    return Minimum(x, norms, norms <= tol, evaluations)


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
    models_at_once: int = 32,
    progress: bool = True,
) -> Retraining:
    """Leave sets of examples out of pretraining, train both stages again, measure the test losses.

    Parameters
    ----------
    pretrain, finetune
        The two trained stages: for case 1 with the same embedding, for case 2 (`alpha` given)
        `finetune` holds W*.
    removals
        R sets of indices into the pretraining data; singletons for leave-one-out.
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
    models_at_once
        Models evaluated together; changes memory and speed, never a result.
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
        nothing of it; α ≤ 0; a `fraction` outside (0, 1]; `tol` ≤ 0; embeddings of the two stages
        that differ in parameter names or shapes.
    TypeError
        Removals that are indices, not sets of indices.
    """
    _check_arguments(pretrain, removals, alpha, fraction, tol)
    if models_at_once < 1 or (max_evaluations is not None and max_evaluations < 1):
        raise ValueError("models_at_once and max_evaluations must be at least 1")
    check_pair(pretrain, finetune, "finetune")
    pretrain, finetune = pretrain.to(torch.float64), finetune.to(torch.float64)
    tested = finetune.with_data(_double(test, finetune.device), "test data")
    begin = (pretrain, finetune)
    preconditioners: tuple[Preconditioner | None, ...] = (None, None)
    if cold_start:
        begin = (cold_start[0].to(torch.float64), cold_start[1].to(torch.float64))
    else:
        preconditioners = (
            _preconditioner(pretrain.vector(), lambda: Hessian(pretrain)),
            _preconditioner(
                finetune.head_vector() if alpha is None else finetune.vector(),
                lambda: _finetuning_hessian(finetune, alpha),
            ),
        )
    limit = max_evaluations or (20_000 if cold_start else 5000)

    def train(weights: Tensor) -> tuple[Tensor, Minimum, Minimum]:
        """Both trainings for pretraining weights ``(r, m)``: test losses and the two minima."""
        first = begin[0].vector().expand(len(weights), -1)
        pretrained = _minimise_from(
            _batched(_pretraining_terms(pretrain, weights)), first, tol, preconditioners[0], limit
        )
        embeddings = pretrained.x[:, : pretrain.embedding_size]
        if alpha is None:
            second = begin[1].head_vector().expand(len(weights), -1)
            terms = _head_terms(finetune, embeddings)
        else:
            second = begin[1].vector().expand(len(weights), -1)
            if cold_start:
                second = torch.cat([embeddings, second[:, finetune.embedding_size :]], 1)
            terms = _proximal_terms(finetune, embeddings, alpha)
        finetuned = _minimise_from(_batched(terms), second, tol, preconditioners[1], limit)
        x = torch.cat([embeddings, finetuned.x], 1) if alpha is None else finetuned.x
        with torch.no_grad():
            losses = [
                _for_each_model(lambda theta, b=batch: tested.losses(*tested.split(theta), *b), x)
                for batch in tested.batches()
            ]
        return torch.cat(losses, 1), pretrained, finetuned

    # Number 0 removes nothing: what every removal is measured against.
    sets: list[Sequence[int]] = [[], *removals]
    losses, norms, evaluations, converged = [], [], [], []
    with tqdm(
        total=len(sets), desc="retraining", unit=" models", disable=not progress, delay=1,
        leave=False,
    ) as bar:  # fmt: skip
        for start in range(0, len(sets), models_at_once):
            some = sets[start : start + models_at_once]
            after, first, second = train(_weights(some, pretrain, renormalise, fraction))
            losses.append(after)
            norms.append(torch.stack([first.gradient_norms, second.gradient_norms], 1))
            evaluations.append(torch.stack([first.evaluations, second.evaluations], 1))
            converged.append(first.converged & second.converged)
            bar.update(len(some))
    all_losses, all_converged = torch.cat(losses), torch.cat(converged)
    return Retraining(
        losses=all_losses[1:],
        losses_before=all_losses[0],
        converged=all_converged[1:],
        converged_before=bool(all_converged[0]),
        gradient_norms=torch.cat(norms)[1:],
        evaluations=torch.cat(evaluations)[1:],
        convention="renormalised" if renormalise else "fixed weight",
        start="cold" if cold_start else "warm",
    )


def _minimise_from(
    objective: BatchedObjective,
    start: Tensor,
    tol: float,
    preconditioner: Preconditioner | None,
    limit: int,
) -> Minimum:
    """Minimise, first with the Hessian at the start, then without for what went far from it."""
    if preconditioner is None or limit <= _PRECONDITIONED:
        return minimise(objective, start, tol, preconditioner, limit)
    near = minimise(objective, start, tol, preconditioner, _PRECONDITIONED)
    rest = (~near.converged).nonzero()[:, 0]
    if not len(rest):
        return near
    far = minimise(
        lambda x, which: objective(x, rest[which]), near.x[rest], tol, None, limit - _PRECONDITIONED
    )
    x, norms, evaluations = near.x.clone(), near.gradient_norms.clone(), near.evaluations.clone()
    x[rest], norms[rest] = far.x, far.gradient_norms
    evaluations[rest] += far.evaluations
    return Minimum(x, norms, norms <= tol, evaluations)


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


def _weights(
    removals: Sequence[Sequence[int]], stage: Stage, renormalise: bool, fraction: float
) -> Tensor:
    """The weight of each pretraining example in each objective, ``(r, m)``."""
    weights = torch.ones(len(removals), stage.size, dtype=torch.float64)
    for row, removal in enumerate(removals):
        weights[row, torch.as_tensor(removal, dtype=torch.long)] = 1 - fraction
    total = weights.sum(1, keepdim=True) if renormalise else stage.size
    return (weights / total).to(stage.device)


def _finetuning_hessian(finetune: Stage, alpha: float | None) -> LinearOperator:
    if alpha is None:
        return Hessian(finetune, block="head")
    return proximal_hessian(finetune, alpha)


def _preconditioner(
    parameters: Tensor, hessian: Callable[[], LinearOperator]
) -> Preconditioner | None:
    return Preconditioner(hessian().dense()) if len(parameters) <= _DENSE_PARAMETERS else None


def _double(test: Batch, device: torch.device) -> Batch:
    inputs, targets = map_leaves(
        lambda leaf: leaf.to(device, torch.float64 if leaf.is_floating_point() else None),
        Examples(test).tensors(),
    )
    return inputs, targets


def _check_arguments(
    pretrain: Stage,
    removals: Sequence[Sequence[int]],
    alpha: float | None,
    fraction: float,
    tol: float,
) -> None:
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be positive (or None for case 1), not {alpha}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie above 0 and at most at 1, not {fraction}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    for number, removal in enumerate(removals):
        if not hasattr(removal, "__len__") or getattr(removal, "ndim", 1) != 1:
            raise TypeError(
                "removals must be sets of indices, one a retraining; for leave-one-out give "
                "[[0], [1], ...]"
            )
        indices = [int(index) for index in removal]
        if not indices:
            raise ValueError(f"removal {number} is empty")
        if len(set(indices)) != len(indices):
            raise ValueError(f"removal {number} names an example twice")
        if min(indices) < 0 or max(indices) >= pretrain.size:
            raise ValueError(f"removal {number} names an example outside 0..{pretrain.size - 1}")
        if len(indices) == pretrain.size:
            raise ValueError(f"removal {number} leaves no pretraining example")
