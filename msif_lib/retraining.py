"""The ground truth: leave examples out of a stage of a chain and train again what depends on it.

Removal of a set S of s of a stage's N examples has two readings, and a truth must say which it is:

    fixed weight   (1/N) Σ_{j∉S} w_j ℓ_j + R     the others keep their weight (ε = −1/N in eq. 4)
    renormalised   1/(N−s) Σ_{j∉S} ℓ_j + R       a mean over the others, as a user would retrain

They differ only through the regularizer. A stage of an `Optimum`, `Frozen` or `Proximal` link is
trained in float64 until the norm of the gradient is below a tolerance, that of an `Unrolled` link
takes its recorded steps, and the change of the test losses is measured against the same training
without any removal, so that what is left of the optimisation error cancels.

Many removals are trained together: `torch.func.vmap` over models, on shared data
(:mod:`msif_lib.repetition`). At a warm start the Hessian at the trained parameters, factorised
once, preconditions a quasi-Newton method for all of them (:mod:`msif_lib.support.minimise`), which
then needs a handful of gradient evaluations. Models that are trained together are one job; jobs may
run in several processes or on a cluster, and be kept in a folder as they finish.

:func:`with_weights` trains a chain again with other weights of the examples and gives the chain
that results, to be scored there: at the *centre*, where the sets that are left out lie on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.handover import HandOver
from msif_lib.influence import Chain
from msif_lib.links import Frozen, Link, Optimum, Proximal, Unrolled
from msif_lib.repetition import (
    Minimised,
    Repetition,
    Stepped,
    attained,
    check_repeatable,
    for_each_model,
    in_double,
    stepped_again,
)
from msif_lib.stage import Stage
from msif_lib.support.arguments import flag, instance, listed, not_negative, positive, share, whole
from msif_lib.support.checkpoint import Checkpoint
from msif_lib.support.checks import checked_weights
from msif_lib.support.data import Batch, Examples, map_leaves
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.jobs import as_finished
from msif_lib.support.minimise import AbsoluteInverse, Minimum, minimise
from msif_lib.support.notices import warn_caller
from msif_lib.support.state import in_own_state
from msif_lib.training import TrainingWarning

__all__ = [
    "AbsoluteInverse",
    "Minimum",
    "Retraining",
    "RetrainingSettings",
    "minimise",
    "retrain_without",
    "with_weights",
]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Retraining:
    """Test losses after leaving sets of a stage's examples out of it.

    Attributes
    ----------
    losses
        Per-example test losses after each removal, ``(R, T)``.
    losses_before
        The same without any removal, ``(T,)``.
    converged
        Whether every training of an `Optimum`, `Frozen` or `Proximal` link reached the tolerance,
        ``(R,)``; without removal, ``converged_before``. That of an `Unrolled` link has its steps,
        and counts as converged.
    gradient_norms
        Norm of each stage's gradient where its training ended, ``(R, K)``.
    evaluations
        Gradient evaluations, or steps, of each stage's training, ``(R, K)``; 0 for stages before
        the one of the removals.
    convention
        ``"fixed weight"`` or ``"renormalised"``.
    start
        ``"warm"`` or ``"cold"``.
    stage
        Number of the stage whose examples were left out.
    """

    losses: Tensor
    losses_before: Tensor
    converged: Tensor
    converged_before: bool
    gradient_norms: Tensor
    evaluations: Tensor
    convention: str
    start: str
    stage: int

    @property
    def change(self) -> Tensor:
        """q after each removal minus q before, ``(R,)``; q is the sum of the test losses."""
        return self.per_test_change.sum(1)

    @property
    def per_test_change(self) -> Tensor:
        """Change of each test loss, ``(R, T)``."""
        return self.losses - self.losses_before


@dataclass(frozen=True, eq=False)
class RetrainingSettings:
    """How retrainings are run; what is left out and measured is no part of it.

    Parameters
    ----------
    tol
        Norm of the gradient to be reached by each link that assumes an optimum; and in any case
        1e-6 of the size of one example's (their root mean square at the trained parameters).
    max_evaluations
        Gradient evaluations allowed a stage; None: 5,000 warm, 20,000 cold.
    cold_start
        None: begin at the trained parameters. Otherwise a stage for each link, whose parameters
        are where its training begins. What a stage keeps as it is handed, and the shared
        parameters of a `Proximal` link, begin as handed all the same, and an `Unrolled` link where
        its path does.
    damping
        λ ≥ 0, added to the absolute eigenvalues of the Hessians at the trained parameters, whose
        inverse preconditions a warm start for half of its evaluations instead of the first 200.
        Give some where a symmetry of the model makes a Hessian singular, as in language models:
        as the parameters move, the flat directions turn, and an undamped inverse multiplies
        whatever the gradient then has along the old ones. It should lie far below the large
        eigenvalues. It changes neither the objectives nor what counts as converged; of several
        minima it may find another one.
    first_hessian
        The Hessian of the first link at the trained parameters, over what it trains ``(p, p)``,
        for those who have it; then it is factorised whatever its size. None: a warm start computes
        it up to 4,000 parameters, and above that a sketch of the Gauss-Newton matrix.
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

    Raises
    ------
    ValueError
        `tol` ≤ 0; a negative `damping`; `max_evaluations`, `models_at_once` or `threads` below 1;
        `jobs` of 0; a `first_hessian` that is not finite, or is given to a cold start.
    """

    tol: float = 1e-9
    max_evaluations: int | None = None
    cold_start: Sequence[Stage] | None = None
    damping: float = 0.0
    first_hessian: Tensor | None = None
    models_at_once: int = 32
    jobs: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        positive("tol", self.tol)
        not_negative("damping", self.damping)
        whole("models_at_once", self.models_at_once, 1)
        whole("threads", self.threads, 1)
        if self.max_evaluations is not None:
            whole("max_evaluations", self.max_evaluations, 1)
        if self.jobs is not None and whole("jobs", self.jobs) == 0:
            raise ValueError("jobs must not be 0 (−1: one a core)")
        if self.first_hessian is not None:
            if not isinstance(self.first_hessian, Tensor):
                raise TypeError("first_hessian must be a tensor (p, p)")
            if not self.first_hessian.isfinite().all():
                raise ValueError("first_hessian is not finite")
            if self.cold_start is not None:
                raise ValueError("a cold start uses no first_hessian; leave it out")

    @property
    def limit(self) -> int:
        """Gradient evaluations allowed a stage."""
        return self.max_evaluations or (5000 if self.cold_start is None else 20_000)

    def of_results(self) -> RetrainingSettings:
        """The settings without what changes no result, or is known to a job by itself."""
        return replace(self, cold_start=None, models_at_once=1, jobs=None)


def _shows_the_call(function: Callable[P, R]) -> Callable[P, R]:
    """Show the call to those who give two stages, and what was an argument and is a link now."""
    known = signature(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        chain = args[0] if args else kwargs.get("chain")
        unknown = sorted(set(kwargs) - set(known.parameters))
        if not isinstance(chain, Chain) or unknown:
            given = f"not {unknown}" if unknown else f"not a {type(chain).__name__}"
            raise TypeError(
                f"retrain_without takes a chain of links, {given}: "
                "retrain_without(Chain([Optimum(pretrain), Frozen(finetune)]), removals, test) for "
                "case 1, Proximal(tuned, alpha) in place of Frozen for case 2; Chain is in "
                "msif_lib, links are in msif_lib.links, and how it runs is said by "
                "settings=RetrainingSettings()"
            )
        return function(*args, **kwargs)

    return checked


@in_own_state
@_shows_the_call
def retrain_without(
    chain: Chain,
    removals: Sequence[Sequence[int]],
    test: Batch,
    stage: int = 0,
    *,
    renormalise: bool = False,
    fraction: float = 1.0,
    settings: RetrainingSettings = RetrainingSettings(),
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Retraining:
    """Leave sets of examples out of a stage, train it and what follows again, measure test losses.

    Parameters
    ----------
    chain
        The trained stages and how each was trained: ``Chain([Optimum(pretrain),
        Frozen(finetune)])`` for case 1, ``Proximal(tuned, alpha)`` in place of `Frozen` for case
        2, `Unrolled` for recorded trainings. Stages before `stage` stay as they were trained.
    removals
        R sets of indices into the data of `stage`, or Boolean masks over it; singletons for
        leave-one-out.
    test
        Test examples ``(inputs, targets)`` of the last stage's task, T of them.
    stage
        Number of the stage whose examples are left out.
    renormalise
        The removal convention, see above.
    fraction
        Share of the examples' weight that is taken away. 1 removes them; as it goes to 0 the
        change divided by it becomes the derivative, so that a small fraction tells a wrong score
        from a removal that is too large a step for any first-order prediction.
    settings
        How it is run.
    checkpoint
        A folder that keeps each finished job, the training without removal and the factorised
        Hessians. A later call with the same arguments trains only what is missing; another
        call on the same stages factorises nothing. Results are known by all that they depend on
        (parameters, data and weights of the stages, the losses of all examples and the
        regularizer's value, paths, `test`, the settings, the removals of their job, torch's
        version), so that a folder may serve any number of calls, one after the other: a process
        waits, and says so, while another one works there.
    progress
        Show bars for what takes more than a second.

    Returns
    -------
    Retraining
        Losses before and after; whether each training converged.

    Raises
    ------
    TypeError
        `chain` is none; removals that are indices, not sets of indices; indices that are no whole
        numbers.
    ValueError
        A removal that is empty, repeats an index, lies outside the stage's data or leaves nothing
        of it; a mask of another length than the data; a `stage` that the chain has not; a
        `fraction` outside (0, 1]; `renormalise` for an `Unrolled` link or a stage with weights; a
        `Stopped` link that would have to be trained again; a cold start or a `first_hessian` of
        other sizes; a stage of which each process reads a share.
    FloatingPointError
        A recorded training with these weights diverged.
    """
    instance("settings", settings, RetrainingSettings)
    flag("renormalise", renormalise)
    flag("progress", progress)
    _check_chain(chain, stage, settings)
    share("fraction", fraction)
    size, name = chain.links[stage].stage.size, chain.names[stage]
    sets = [
        _indices(number, removal, size, name)
        for number, removal in enumerate(listed("removals", removals, "sets of indices"))
    ]
    if renormalise:
        _check_renormalised(chain.links[stage], name)
    trainings = _Trainings.of(chain, stage, test, renormalise, fraction, settings)
    # The first job removes nothing: what every removal is measured against.
    at_once = settings.models_at_once
    batches = [sets[start : start + at_once] for start in range(0, len(sets), at_once)]
    work: list[list[list[int]]] = [[[]], *batches]
    kept = Checkpoint(checkpoint)
    with kept.held():
        results = trainings.finished(work, kept, settings, progress)
    joined = trainings.joined(results)
    return Retraining(
        losses=joined["losses"][1:],
        losses_before=joined["losses"][0],
        converged=joined["converged"][1:],
        converged_before=bool(joined["converged"][0]),
        gradient_norms=joined["gradient_norms"][1:],
        evaluations=joined["evaluations"][1:],
        convention="renormalised" if renormalise else "fixed weight",
        start="warm" if settings.cold_start is None else "cold",
        stage=stage,
    )


@dataclass
class _Trainings:
    """The trainings from one stage on and the test, for any removals: what every job knows.

    Attributes
    ----------
    repetitions
        A training for each stage from that of the removals on.
    hand_overs
        Between these stages.
    tested
        The last stage with the test data.
    weights
        Of the examples of the first of these stages, ``(N,)``.
    renormalise, fraction
        What a removal means.
    handed
        What the stages before, which stay, hand on, ``(p_W,)``; None where there are none.
    given
        What that is known by.
    norms
        Of their gradients, one a stage.
    """

    repetitions: list[Repetition]
    hand_overs: list[HandOver]
    tested: Stage
    weights: Tensor
    renormalise: bool
    fraction: float
    handed: Tensor | None
    given: ProblemIdentity | None
    norms: list[float]

    @classmethod
    def of(
        cls,
        chain: Chain,
        stage: int,
        test: Batch,
        renormalise: bool,
        fraction: float,
        settings: RetrainingSettings,
    ) -> _Trainings:
        """Everything in float64."""
        links = [in_double(link) for link in chain.links[stage:]]
        _check_hessian(settings.first_hessian, chain.links[0])
        starts = _starts(settings, chain.links)[stage:]
        repetitions: list[Repetition] = [
            Stepped(link) if isinstance(link, Unrolled) else _minimised(link, start, settings)
            for link, start in zip(links, starts, strict=True)
        ]
        last, handed, given = links[-1].stage, None, None
        if stage:
            before = chain.links[stage - 1]
            names = chain.names[stage - 1], chain.names[stage]
            over = HandOver(before.stage, chain.links[stage].stage, names)
            handed = over.value(before.vector()).double()
            by_function = before.stage.hands_on is not None
            given = ProblemIdentity.of(
                over.identity(before.vector()), None if by_function else handed
            )
        return cls(
            repetitions=repetitions,
            hand_overs=[
                HandOver(one.stage, two.stage, names)
                for (one, two), names in zip(pairwise(links), pairwise(chain.names[stage:]))
            ],
            tested=last.with_data(_double(test, last.device), "test data"),
            weights=links[0].stage.weights,
            renormalise=renormalise,
            fraction=fraction,
            handed=handed,
            given=given,
            norms=[
                chain.gradient_norms[name] if name in chain.gradient_norms else _norm(link)
                for name, link in zip(chain.names, chain.links[:stage])
            ],
        )

    def finished(
        self,
        work: list[list[list[int]]],
        kept: Checkpoint,
        settings: RetrainingSettings,
        progress: bool,
    ) -> list[dict[str, Tensor]]:
        """The results of jobs, of which those that are kept are read and the others are done."""
        names = [""] * len(work)
        if kept.folder is not None:
            known = kept.key(self.identity(), settings.of_results(), settings.limit)
            names = [f"retraining-{fingerprint(known, removed)}" for removed in work]
        results = [kept.get(name) for name in names]
        missing = [number for number, result in enumerate(results) if result is None]
        if missing and settings.cold_start is None:
            self.precondition(kept, settings.first_hessian)
        bar = tqdm(
            total=sum(map(len, work)), desc=f"retraining{self.cost}", unit=" models",
            disable=not progress, delay=0 if self.cost else 1, leave=False,
        )  # fmt: skip
        finished = as_finished(
            self, [work[number] for number in missing], settings.jobs, settings.threads
        )
        with bar, closing(finished):
            bar.update(bar.total - sum(len(work[number]) for number in missing))
            for index, result in finished:
                number = missing[index]
                kept.put(names[number], result)
                results[number] = result
                bar.update(len(work[number]))
        return [result for result in results if result is not None]

    def joined(self, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All results as one, and what is known of the stages before, which stay."""
        found = {
            name: torch.cat([result[name] for result in results]).to(self.tested.device)
            for name in results[0]
        }
        norms, evaluations = found["gradient_norms"], found["evaluations"]
        before = norms.new_tensor(self.norms).expand(len(norms), -1)
        none = evaluations.new_zeros(len(norms), len(self.norms))
        return found | {
            "gradient_norms": torch.cat([before, norms], 1),
            "evaluations": torch.cat([none, evaluations], 1),
        }

    @property
    def cost(self) -> str:
        """What a model costs, in words, where that is known beforehand."""
        steps = [len(one.link.path) for one in self.repetitions if isinstance(one, Stepped)]
        return f", {sum(steps)} steps a model" if steps else ""

    def identity(self) -> list[object]:
        """What results depend on beside the removals and the settings."""
        handed = [
            over.identity(one.link.vector()) for over, one in zip(self.hand_overs, self.repetitions)
        ]
        return [
            [repetition.identity() for repetition in self.repetitions], handed, self.given,
            self.tested.identity(), self.renormalise, self.fraction,
        ]  # fmt: skip

    def precondition(self, kept: Checkpoint, first: Tensor | None) -> None:
        """Factorise the Hessians, or read their factors; `first` is that of the first link."""
        for number, one in enumerate(self.repetitions):
            if isinstance(one, Minimised):
                given = None if number or first is None else first.to(one.start)
                one.precondition(kept, given)

    def __call__(self, removals: list[list[int]]) -> dict[str, Tensor]:
        """Train r models: their test losses ``(r, T)``, and how each training ended."""
        count, ends = len(removals), list[Minimum]()
        handed = None if self.handed is None else self.handed.expand(count, -1).contiguous()
        for number, repetition in enumerate(self.repetitions):
            weights = repetition.link.stage.weights.expand(count, -1)
            if number == 0:
                weights = self._weights(removals)
            else:
                over = self.hand_overs[number - 1]
                handed = torch.stack([over.value(row) for row in ends[-1].x])
            ends.append(repetition(weights, handed))
        tested = self.tested
        with torch.no_grad():
            losses = [
                for_each_model(lambda theta, b=batch: tested.losses_at(theta, *b), ends[-1].x)
                for batch in tested.batches()
            ]
        result = {
            "losses": torch.cat(losses, 1),
            "gradient_norms": torch.stack([end.gradient_norms for end in ends], 1),
            "evaluations": torch.stack([end.evaluations for end in ends], 1),
            "converged": torch.stack([end.converged for end in ends]).all(0),
        }
        return {name: value.cpu() for name, value in result.items()}

    def _weights(self, removals: list[list[int]]) -> Tensor:
        """The weight of each example, before the mean over N of them, ``(r, N)``."""
        weights = self.weights.repeat(len(removals), 1)
        for row, removal in enumerate(removals):
            weights[row, removal] *= 1 - self.fraction
        if self.renormalise:
            weights *= weights.shape[1] / weights.sum(1, keepdim=True)
        return weights


@in_own_state
def with_weights(
    chain: Chain,
    weights: float | Tensor,
    stage: int = 0,
    *,
    settings: RetrainingSettings = RetrainingSettings(),
    progress: bool = True,
) -> Chain:
    """Train a stage and what follows it again with other weights of its examples.

    The scores of the chain that results are derivatives *there*. So ``with_weights(chain,
    1 - share)`` is the chain at the centre of the subsets that leave out this share of the
    examples, and with a 0/1 mask it is a subset run. The mean of the scores of k subset runs is
    another centre: β_i below but for derivatives in w_i alone, and for the chance of k draws. Of a
    training by Adam take for each example the runs that keep it: where left-out examples alone
    move a coordinate its gradients are 0, and derivatives at weight 0 are of size 1/ε.

    Let each of the N examples be left out independently with probability α, so that w_i is 0 or 1
    with mean w̄ = 1 − α, and let g and Q be gradient and Hessian of q in w. The coefficient of w_i
    in the best linear prediction of q(w), which a linear datamodel estimates, is

        β_i = Cov(q, w_i)/Var(w_i) = E[q | w_i = 1] − E[q | w_i = 0]
            = g_i(w̄) + ½ (2α − 1) Q_ii + third derivatives,

    while g_i(1) = g_i(w̄) + α Σ_j Q_ij + …: of a whole row of Q one entry is left, and none at
    α = ½, where β_i is the Banzhaf value. β_i is the derivative at w̄ of the multilinear extension
    of q, which is the mean of q over the subsets (Owen 1972, "Multilinear extensions of games",
    for the extension; Wang & Jia 2023, "Data Banzhaf", for the Banzhaf value of examples, and Li &
    Yu 2023 for α ≠ ½; Ilyas et al. 2022, "Datamodels", and Saunshi et al. 2023, "Understanding
    influence functions and datamodels via harmonic analysis", for the regression). For subsets of
    one size β is defined up to a constant, and to that entry the sum of the others in its row,
    divided by N − 2, is added, times −(2α − 1).

    Parameters
    ----------
    chain
        The trained stages and how each was trained. It stays as it is.
    weights
        A number: the factor by which the present weights of the stage are multiplied. A tensor
        ``(N,)``: the weights in their place, of which some may be 0.
    stage
        Number of the stage whose examples are weighted. Stages before it stay.
    settings
        How `Optimum`, `Frozen` and `Proximal` links are trained: in float64, on one model, from
        their present parameters unless `cold_start` says otherwise. Of `jobs`, `threads` and
        `models_at_once` nothing is taken. `Unrolled` links take their recorded steps.
    progress
        Show bars for what takes more than a second.

    Returns
    -------
    Chain
        Links of the same kinds and settings in the chain's dtype, from `stage` on upon stages of
        their own. Scores are N dq/dw_i there, for examples of weight 0 as well. From weights of 1
        on, ``-values[S].sum() / N`` predicts what leaving S out does, up to a constant that sets of
        one size have in common; ``removal_effect`` is that of taking away the weights that the
        stage has now.

    Raises
    ------
    TypeError
        `chain` is none; weights that are no numbers.
    ValueError
        A factor that is not positive; weights of another shape, negative, not finite or all zero;
        a `stage` that the chain has not; a `Stopped` link that would have to be trained again; a
        cold start or a `first_hessian` of other sizes; a stage of which each process reads a share.
    FloatingPointError
        A recorded training with these weights diverged.

    Warns
    -----
    TrainingWarning
        The tolerance of the settings was not reached.
    StationarityWarning
        A stage ended far from a stationary point.
    """
    instance("chain", chain, Chain)
    instance("settings", settings, RetrainingSettings)
    flag("progress", progress)
    _check_chain(chain, stage, settings)
    _check_hessian(settings.first_hessian, chain.links[0])
    given = _new_weights(weights, chain.links[stage].stage)
    for link in chain.links[stage:]:
        check_repeatable(link)
    starts = _starts(settings, chain.links)
    links = list(chain.links[:stage])
    for number, name in enumerate(chain.names[stage:], stage):
        link = chain.links[number]
        own = link.stage.to()
        if number == stage:
            own = own.with_weights(given)
        handed = None
        if number:
            over = HandOver(links[-1].stage, own, (chain.names[number - 1], name))
            handed = over.value(links[-1].vector())
        if isinstance(link, Unrolled):
            path = stepped_again(own, link.path, handed, progress)
            own.load_vector(path.end)
            links.append(replace(link, stage=own, path=path))
            continue
        first = settings.first_hessian if number == 0 else None
        own.load_vector(_minimum(link, own, handed, starts[number], settings, first, name))
        links.append(replace(link, stage=own))
    return Chain(links, chain.stationarity_tol, chain.progress)


def _new_weights(weights: Any, stage: Stage) -> Tensor:
    """The weights of a stage's examples, ``(N,)``, that a factor or a tensor stands for."""
    if not hasattr(weights, "__len__") and getattr(weights, "ndim", 0) == 0:
        return stage.weights * positive("weights", weights)
    found = checked_weights(weights, stage.size, stage.vector())
    if not found.any():
        raise ValueError("weights leaves no example: all are zero")
    return found


def _minimum(
    link: Link,
    own: Stage,
    handed: Tensor | None,
    start: Tensor,
    settings: RetrainingSettings,
    first: Tensor | None,
    name: str,
) -> Tensor:
    """All parameters ``(p,)`` where the training of a link with a new stage's weights ends."""
    double = in_double(link)
    assert not isinstance(double, Unrolled)
    repetition = _minimised(double, start, settings)
    if settings.cold_start is None:
        repetition.precondition(Checkpoint(None), None if first is None else first.to(start))
    given = None if handed is None else handed.double()[None]
    found = repetition(own.weights.double()[None], given)
    if not found.converged.all():
        warn_caller(
            f"with these weights the {name} stage ended at gradient norm "
            f"{float(found.gradient_norms[0]):.1e} (asked for {repetition.tol:.1e}); allow more "
            "evaluations in RetrainingSettings",
            TrainingWarning,
        )
    return found.x[0]


def _minimised(
    link: Optimum | Frozen | Proximal, start: Tensor, settings: RetrainingSettings
) -> Minimised:
    """The training of a link in float64 down to its optimum, as the settings say."""
    cold, tol = settings.cold_start is not None, attained(link, settings.tol)
    return Minimised(link, start, cold, tol, settings.limit, settings.damping)


def _norm(link: Link) -> float:
    """Norm of the gradient where a stage's training ended."""
    slope = link.stage.gradient(link.vector())
    return float(link.stage.parameters.take(slope, link.block).norm(dtype=torch.float64))


def _starts(settings: RetrainingSettings, links: Sequence[Link]) -> list[Tensor]:
    """Where each training begins."""
    stages = [link.stage for link in links]
    begun = (
        stages
        if settings.cold_start is None
        else listed("cold_start", settings.cold_start, "stages")
    )
    for number, start in enumerate(begun):
        instance(f"cold_start[{number}]", start, Stage)
    if len(begun) != len(stages):
        raise ValueError(
            f"cold_start must hold a stage for each of the {len(stages)} links, not {len(begun)}"
        )
    for number, (start, stage) in enumerate(zip(begun, stages)):
        if start.parameters.size != stage.parameters.size:
            raise ValueError(
                f"cold_start[{number}] has {start.parameters.size} parameters, but that stage of "
                f"the chain {stage.parameters.size}"
            )
    return [start.vector().double() for start in begun]


def _double(test: Batch, device: torch.device) -> Batch:
    inputs, targets = map_leaves(
        lambda leaf: leaf.to(device, torch.float64 if leaf.is_floating_point() else None),
        Examples(test).tensors(),
    )
    return inputs, targets


def _check_chain(chain: Chain, stage: int, settings: RetrainingSettings) -> None:
    count = len(chain.links)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < count:
        raise ValueError(
            f"stage must be the number of a stage of the chain, 0..{count - 1}, not {stage!r}"
        )
    if stage and settings.first_hessian is not None:
        raise ValueError(
            "first_hessian is of the first link, which stays as it is where examples of stage "
            f"{stage} are left out; leave it out"
        )
    if any(len(link.stage.reader.share) != link.stage.size for link in chain.links):
        raise ValueError(
            "retraining takes whole stages, not sharded ones; its jobs go to other processes by "
            "jobs= of RetrainingSettings or joblib.parallel_config"
        )


def _check_renormalised(link: Link, name: str) -> None:
    if isinstance(link, Unrolled):
        raise ValueError(
            f"renormalise: the {name} training is taken step by step, on means over batches; "
            "without some examples other batches would have been drawn, so that there is no one "
            "training over the others. Leave it out: the examples lose their weight in the batches "
            "that they are in"
        )
    if link.stage.weighted:
        raise ValueError(
            f"renormalise: the examples of the {name} stage have weights, so that there is no mean "
            "over the others; leave it out"
        )


def _check_hessian(hessian: Tensor | None, link: Link) -> None:
    size = link.stage.parameters.count(link.block)
    if hessian is not None and hessian.shape != (size, size):
        raise ValueError(
            f"first_hessian must be of shape {(size, size)}, as the first link trains {size} "
            f"parameters, not {tuple(hessian.shape)}"
        )


def _indices(number: int, removal: Any, size: int, name: str) -> list[int]:
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
                f"{name} examples"
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
        raise ValueError(f"removal {number} leaves no {name} example")
    return indices
