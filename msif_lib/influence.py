"""Influence through a chain of trainings: one walk back scores the examples of every stage.

How does a test functional q, the summed loss of test examples under the last model, move when
one training example z_i of some stage is given a little more weight ε in that stage's objective?

    I_i = dq/dε  of  J + ε ℓ(z_i)  at ε = 0

Removing z_i is ε = −1/N, so q changes by about −I_i/N: a positive score marks an example that
hurts the test functional. :class:`Chain` begins with λ = ∇q at the last model and takes it back
through one link after the other (:mod:`msif_lib.links`). The three names of the paper are chains:

    SingleStageInfluence       Optimum
    FixedEmbeddingInfluence    Optimum → Frozen           case 1, eqs. 9 to 11
    UpdatedEmbeddingInfluence  Optimum → Proximal         case 2, eqs. 12 to 15
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from msif_lib.handover import HandOver, check_continuity, gradient_size
from msif_lib.kept import Folder, Kept, check_known, opened
from msif_lib.links import (
    Asked,
    Frozen,
    Link,
    Optimum,
    Proximal,
    PulledBack,
    Unrolled,
    check_solver,
)
from msif_lib.scores import Scores as Scores
from msif_lib.solvers import MinRes, Solver, SolveReport
from msif_lib.stage import Stage
from msif_lib.support.agreement import require_agreement
from msif_lib.support.arguments import check_columns, flag, indices_of, listed, tolerance, whole
from msif_lib.support.data import Batch
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.notices import warn_caller
from msif_lib.support.operators import LinearOperator
from msif_lib.support.state import OwnState, warn_of_rounding
from msif_lib.support.storage import rows_kept, sweep


class StationarityWarning(UserWarning):
    """A stage is not at a stationary point of its objective, which its link assumes."""


class Chain(OwnState):
    """Trainings one after the other, each beginning with what the one before it handed on.

    Parameters
    ----------
    links
        A link of :mod:`msif_lib.links` for each stage, in the order of training.
    stationarity_tol
        A :class:`StationarityWarning` is given for a stage of an `Optimum`, `Frozen` or `Proximal`
        link whose gradient is longer than this share of one example's (their root mean square).
    progress
        Show bars for what takes more than a second.

    Raises
    ------
    ValueError
        No links; stages whose parameters do not fit each other in name, shape, dtype or device; a
        stage that did not begin or stay where the one before it ended; a first stage of which
        nothing is trained that is handed on; a gradient that is not finite.

    Warns
    -----
    StationarityWarning
        A stage is not at a stationary point.
    UserWarning
        An `Optimum` in the midst of the chain cuts it: it hands nothing back.

    Examples
    --------
    >>> import torch
    >>> from msif_lib import Chain, Stage, cross_entropy
    >>> from msif_lib.links import Unrolled
    >>> from msif_lib.training import SGD, descend
    >>> data = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    >>> first = Stage(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), cross_entropy, data)
    >>> path1 = descend(first, SGD(lr=0.1), epochs=2, batch_size=4, seed=0, progress=False)
    >>> second = Stage(first.embedding, torch.nn.Linear(2, 2), cross_entropy, data)
    >>> path2 = descend(second, SGD(lr=0.1), epochs=1, batch_size=3, seed=1, progress=False)
    >>> chain = Chain([Unrolled(first, path1), Unrolled(second, path2)], progress=False)
    >>> [scores.values.shape for scores in chain.scores(data)]
    [torch.Size([6]), torch.Size([6])]
    """

    def __init__(
        self, links: Sequence[Link], stationarity_tol: float = 1e-4, progress: bool = True
    ) -> None:
        self.links = () if isinstance(links, Link) else tuple(listed("links", links, "links"))
        if not self.links or not all(isinstance(link, Link) for link in self.links):
            raise ValueError(
                "links must be links of msif_lib.links, one a stage: [Optimum(pretrain), ...]"
            )
        tolerance("stationarity_tol", stationarity_tol)
        self.progress, self.gradient_norms = flag("progress", progress), dict[str, float]()
        for link in self.links:
            link.stage.check_module()
        require_agreement(self.links, self.names)
        stages, names = [link.stage for link in self.links], self._arguments()
        for stage in stages:
            warn_of_rounding(stage.model, stage.dtype, stage.device)
        self._hand_overs = [
            HandOver(*pair, called) for pair, called in zip(pairwise(stages), pairwise(names))
        ]
        self.stationarity_tol = stationarity_tol
        self._look(self._identities())

    def _identities(self) -> list[ProblemIdentity]:
        """What the stages are, by what their code computes now."""
        return [link.stage.identity(link.vector(), lasting=False) for link in self.links]

    def _look(self, identities: list[ProblemIdentity]) -> None:
        """See that each stage begins where the one before ended, and how near an optimum it is."""
        self._known = identities
        self._operators: list[dict[str, LinearOperator]] = [{} for _ in self.links]
        check_continuity(self.links, self._hand_overs, self._arguments())
        given: list[Tensor | None] = [
            None, *(over.value(link.vector()) for over, link in zip(self._hand_overs, self.links))
        ]  # fmt: skip
        for link, c, name in zip(self.links, given, self.names):
            slope = link.slope(c)
            if slope is not None:
                self.gradient_norms[name] = float(slope.norm(dtype=torch.float64))
                _require_stationary(link, self.gradient_norms[name], name, self.stationarity_tol)

    @property
    def names(self) -> tuple[str, ...]:
        """What messages and reports call the stages."""
        count = len(self.links)
        if count <= 2:
            return ("training",) if count == 1 else ("pretraining", "finetuning")
        return tuple(f"stage {number}" for number in range(count))

    def _arguments(self) -> tuple[str, ...]:
        """What messages about a stage's modules call it."""
        if len(self.links) != 2:
            return tuple(f"stage {number}" for number in range(len(self.links)))
        return "pretrain", "tuned" if isinstance(self.links[1], Proximal) else "finetune"

    def _check_modules(self) -> None:
        """Look again at stages that changed since they were looked at, and forget their operators.

        Once in each call: what code computes tells of a change wherever it was made, of data, a
        buffer of the loss, a closure, an attribute or a hook of the model.
        """
        for link in self.links:
            link.stage.check_module()
        identities = self._identities()
        if not all(map(ProblemIdentity.same, self._known, identities)):
            self._look(identities)

    def __getstate__(self) -> dict[str, Any]:
        """Without the operators, whose graphs stay in their process."""
        return vars(self) | {"_operators": [{} for _ in self.links]}

    def _asked(self, number: int, hand_back: bool = True, **more: Any) -> Asked:
        """What is asked of a link, with the operators that are kept of it."""
        return Asked(hand_back, progress=self.progress, operators=self._operators[number], **more)

    # --- the walk back ----------------------------------------------------------------------

    def test_gradients(self, test: Batch, per_test: bool = False) -> Tensor:
        """∇q at the last model: ``(p, 1)`` of the summed loss, or ``(p, T)`` of each loss."""
        flag("per_test", per_test)
        stage, theta = self._last().with_data(test, "test data"), self.links[-1].vector()
        if per_test:
            rows = stage.per_example_gradients(theta)
            gradients = stage.reader.gather(rows, theta[None][:0]).T
        else:
            gradients = torch.zeros_like(theta)[:, None]
            for batch in stage.batches():
                at = theta.clone().requires_grad_()
                with torch.enable_grad():
                    loss = stage.losses_at(at, *batch).sum()
                gradients += torch.autograd.grad(loss, at)[0][:, None]
            gradients = stage.reader.all_reduce(gradients)
        if not gradients.isfinite().all():
            try:
                stage.gradient(theta)  # names the example at fault
            except ValueError as error:
                raise ValueError(f"test data: {error}") from error
        return gradients

    def _last(self) -> Stage:
        return self.links[-1].stage

    def sensitivity(self, cotangent: Tensor, stage: int = 0) -> Tensor:
        """dq/dc ``(p_W, k)``: how q moves with what a stage hands on, through what came after.

        Parameters
        ----------
        cotangent
            ∇q at the last model ``(p, k)``, as :meth:`test_gradients` gives it.
        stage
            The number of the stage that hands on.

        Raises
        ------
        ValueError
            `cotangent` of another shape, or not finite; a stage that is the last, or none.
        """
        if not 0 <= whole("stage", stage) < len(self.links) - 1:
            raise ValueError(f"stage {stage} hands nothing on: there are {len(self.links)} stages")
        self._check_modules()
        require_agreement(self.links, self.names, cotangent=cotangent, stage=stage)
        cotangent = _checked(cotangent, self._last())
        for number in range(len(self.links) - 1, stage + 1, -1):
            pulled = self.links[number].pull_back(cotangent, self._asked(number))
            cotangent = self._handed_to(number - 1, pulled.handed)
        return self.links[stage + 1].pull_back(cotangent, self._asked(stage + 1)).handed

    def _handed_to(self, number: int, handed: Tensor) -> Tensor:
        return self._hand_overs[number].pull_back(handed, self.links[number].vector())

    def scores(
        self,
        test: Batch,
        per_test: bool = False,
        of: Batch | Mapping[int, Any] | None = None,
        out: str | Path | None = None,
    ) -> list[Scores]:
        """Influence of every training example of every stage on the test functional.

        Parameters
        ----------
        test
            Test examples ``(inputs, targets)`` of the last stage's task, or a data set of them.
        per_test
            False: q is the loss summed over the test examples. True: one q a test example.
        of
            By the number of a stage: examples of its task to score in place of its training set,
            which need not hold them. One pair is for the first stage.
        out
            A folder in which scores are written as they come, for data larger than memory;
            ``values`` are then read from there when looked at. What is solved and scored is kept,
            so that the same call goes on where an interrupted one stopped. Another process that
            works there is waited for. A ``.npy`` file is that of the first stage's scores, all else
            being kept in a folder beside it, ``<name>.npy.kept``.

        Returns
        -------
        list of Scores
            One a stage, in the order of training: ``values`` of shape ``(N,)``, or ``(N, T)``
            where `per_test`.

        Raises
        ------
        ValueError
            Test data or `of` that a :class:`Stage` would refuse; an `out` that is another file, in
            which nothing can be written, or that holds the scores of another problem or damaged
            records; a setting of a link that nothing tells from another.
        OSError
            The disk has no room for the scores.
        FloatingPointError
            A product or a score is not finite, or a solve found nothing.

        Warns
        -----
        SolverWarning
            A solve stopped short of its tolerance or met negative curvature.
        """
        with opened(out, self._last().reader) as folder:
            call = self._call(test, per_test, of, folder)
            return [self._scores(call, number, one) for number, one in self._back(call)][::-1]

    def pull_back(self, cotangent: Tensor) -> list[Scores]:
        """The same for functionals of the last model that are given by their gradients.

        Parameters
        ----------
        cotangent
            dq/dx at the last model, columns ``(p, k)``.

        Returns
        -------
        list of Scores
            ``values`` of shape ``(N, k)`` each.

        Raises
        ------
        ValueError
            `cotangent` of another shape, or not finite.
        """
        require_agreement(self.links, self.names, cotangent=cotangent)
        call = _Call(partial(_checked, cotangent, self._last()), True, {}, None)
        return [self._scores(call, number, pulled) for number, pulled in self._back(call)][::-1]

    def _call(
        self,
        test: Batch,
        per_test: bool,
        of: Batch | Mapping[int, Any] | None,
        folder: Folder | None,
    ) -> _Call:
        """What :meth:`scores` was asked for, checked."""
        flag("per_test", per_test)
        chosen = {} if of is None else dict(of) if isinstance(of, Mapping) else {0: of}
        if not set(chosen) <= set(range(len(self.links))):
            raise ValueError(
                f"of= names stages by their numbers, 0..{len(self.links) - 1}, not {sorted(chosen)}"
            )
        require_agreement(self.links, self.names, test=test, per_test=per_test, of=sorted(chosen))
        scored = {
            number: self.links[number].stage.with_data(
                data, "of", folder is None or not folder.begun(number)
            )
            for number, data in chosen.items()
        }
        kept = None if folder is None else _kept(self, folder, test, per_test, scored)
        return _Call(partial(self.test_gradients, test, per_test), per_test, scored, kept)

    def _back(self, call: _Call) -> Iterator[tuple[int, PulledBack]]:
        """λ = dq/dx from link to link, and what each gives; the last first."""
        self._check_modules()
        cotangent = call.gradients
        for number in range(len(self.links) - 1, -1, -1):
            link, kept = self.links[number], call.kept
            walk = None if kept is None else kept.walk(number)
            asked = self._asked(number, number > 0, of=call.scored.get(number), keep=walk)
            pulled = (
                link.pull_back(cotangent(), asked)
                if kept is None
                else kept.pulled(number, partial(_late, link, cotangent, asked))
            )
            yield number, pulled
            if number:
                cotangent = partial(self._handed_to, number - 1, pulled.handed)

    def _scores(self, call: _Call, number: int, pulled: PulledBack) -> Scores:
        """−∇ℓ_iᵀ u of the examples of a stage, or the scores that its link gave."""
        file = None if call.kept is None else call.kept.file(number)
        stage, own = self.links[number].stage, number not in call.scored

        def columns(found: Tensor) -> Tensor:
            return found if call.per_test else found[:, 0]

        if pulled.u is not None:
            scored = stage if own else call.scored[number]
            values = sweep(scored, -columns(pulled.u), file, self.progress)
        else:
            assert pulled.scores is not None
            values = rows_kept(columns(pulled.scores), file, stage.reader)
        return Scores(
            values,
            stage.size,
            pulled.reports,
            dict(self.gradient_norms),
            own,
            stage.weights.clone() if stage.weighted and own else None,
        )

    # --- one stage only ---------------------------------------------------------------------

    def self_influence(self, indices: Sequence[int] | None = None, at_once: int = 64) -> Scores:
        """Influence of each training example on its own loss, −∇ℓ_iᵀ H⁻¹ ∇ℓ_i; of one stage.

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

        Raises
        ------
        ValueError
            The chain has more than one link; `indices` outside the training set; `at_once` below
            1.
        TypeError
            `indices` or `at_once` that are no whole numbers.
        """
        if len(self.links) > 1:
            raise ValueError("self-influence is of one training: make a Chain of that link alone")
        self._check_modules()
        (link,), stage = self.links, self._last()
        at_once = whole("at_once", at_once, 1)
        require_agreement(self.links, self.names, indices=indices, at_once=at_once)
        every = range(stage.size) if indices is None else indices
        wanted = indices_of("indices", every, stage.size)
        values, reports = _of_themselves(link, wanted, at_once, self._asked(0, False))
        weights = stage.weights[wanted] if stage.weighted else None
        norms = dict(self.gradient_norms)
        return Scores(values, stage.size, tuple(reports), norms, False, weights)


@dataclass(frozen=True)
class _Call:
    """What is asked of a chain: ∇q, whether by test, other examples by stage, and what is kept."""

    gradients: Callable[[], Tensor]
    per_test: bool
    scored: Mapping[int, Stage]
    kept: Kept | None


def _kept(
    chain: Chain, folder: Folder, test: Batch, per_test: bool, scored: Mapping[int, Stage]
) -> Kept:
    """Where the results of a call are kept, by all that they depend on."""
    for link in chain.links:
        check_known(link)
    tested = chain._last().with_data(test, "test data", check=False)
    columns = (tested.size,) if per_test else ()
    stages = [scored.get(number, link.stage) for number, link in enumerate(chain.links)]
    identity = ProblemIdentity.of(
        per_test,
        tested.identity(chain.links[-1].vector()),
        [link.identity() for link in chain.links],
        [over.identity(link.vector()) for over, link in zip(chain._hand_overs, chain.links)],
        {number: of.identity(chain.links[number].vector()) for number, of in scored.items()},
    )
    return Kept(folder, identity, [(one.size, *columns) for one in stages], tested.dtype)


def _checked(cotangent: Tensor, last: Stage) -> Tensor:
    """dq/dx at the last model, if it can be that."""
    check_columns("cotangent", cotangent, last.vector())
    return cotangent.detach()


def _of_themselves(
    link: Link, wanted: Tensor, at_once: int, asked: Asked
) -> tuple[Tensor, list[SolveReport]]:
    """−∇ℓ_iᵀ u_i of some examples, u_i by the link from ∇ℓ_i, and the reports of the solves."""
    stage = link.stage
    values = torch.zeros(len(wanted), dtype=stage.dtype, device=stage.device)
    reports: list[SolveReport] = []
    theta, name = link.vector(), "self-influence"
    if isinstance(link, Unrolled):
        walks = -(-len(wanted) // at_once)
        name += f", {walks} walks back through {len(link.path)} steps"
    bar = tqdm(
        range(0, len(wanted), at_once), desc=name, unit=" blocks",
        disable=not asked.progress, delay=0 if isinstance(link, Unrolled) else 1, leave=False,
    )  # fmt: skip
    for start in bar:
        some = wanted[start : start + at_once]
        part = stage.section(some.tolist())
        gradients = part.reader.gather(part.per_example_gradients(theta), theta[None][:0]).T
        pulled = link.pull_back(gradients, asked)
        reports += pulled.reports
        own = (
            -(gradients * pulled.u).sum(0)
            if pulled.u is not None
            else pulled.scores[some].diagonal()  # type: ignore[index]
        )
        values[start : start + at_once] = own
    return values, reports


def _require_stationary(link: Link, norm: float, name: str, tolerance: float) -> None:
    """Warn of a gradient of this norm where the link assumes none."""
    if norm == 0 or tolerance == float("inf"):
        return
    size = gradient_size(link)
    if norm > tolerance * size:
        compared = f", {norm / size:.1e} of one example's" if size else ""
        warn_caller(
            f"the {name} stage is not at a stationary point: its gradient norm is "
            f"{norm:.1e}{compared} (above {tolerance:.1e}), and {type(link).__name__} assumes "
            "zero; train further, or use a link that needs no optimum: Unrolled, where the "
            "training was recorded, or Stopped, where it was not",
            StationarityWarning,
        )


def _late(link: Link, cotangent: Callable[[], Tensor], asked: Asked) -> PulledBack:
    return link.pull_back(cotangent(), asked)


class _OfFirst(Chain):
    """A chain that is asked for the scores of its first stage."""

    def scores(  # type: ignore[override]
        self,
        test: Batch,
        per_test: bool = False,
        of: Batch | None = None,
        out: str | Path | None = None,
    ) -> Scores:
        """Influence of every example of the first stage, with the reports of all solves.

        Parameters
        ----------
        test, per_test, of, out
            As of :meth:`Chain.scores`.

        Returns
        -------
        Scores
            ``values`` of shape ``(m,)``, or ``(m, T)`` where `per_test`.

        Raises
        ------
        ValueError
            As of :meth:`Chain.scores`.
        FloatingPointError
            As of :meth:`Chain.scores`.
        """
        with opened(out, self._last().reader) as folder:
            call = self._call(test, per_test, of, folder)
            pulled = dict(self._back(call))
            solves = tuple(report for one in pulled.values() for report in one.reports)
            return replace(self._scores(call, 0, pulled[0]), solves=solves)


class SingleStageInfluence(_OfFirst):
    """Influence of training examples on the model they trained (Koh & Liang 2017).

        I_i = −∇qᵀ H⁻¹ ∇g(z_i)

    Parameters
    ----------
    stage
        The trained stage.
    solver
        For H⁻¹.
    stationarity_tol, progress
        As of :class:`Chain`.
    """

    def __init__(
        self,
        stage: Stage,
        solver: Solver = MinRes(),  # noqa: B008 (frozen dataclass)
        stationarity_tol: float = 1e-4,
        progress: bool = True,
    ) -> None:
        super().__init__([Optimum(stage, solver)], stationarity_tol, progress)


class FixedEmbeddingInfluence(_OfFirst):
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
    stationarity_tol, progress
        As of :class:`Chain`.

    Raises
    ------
    ValueError
        Embeddings whose parameters differ in name, shape or value, or whose buffers differ;
        and as of :class:`Chain`.
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
        first = Optimum(pretrain, solver)
        second = Frozen(
            finetune,
            check_solver("finetune_solver", solver if finetune_solver is None else finetune_solver),
        )
        super().__init__([first, second], stationarity_tol, progress)


class UpdatedEmbeddingInfluence(_OfFirst):
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
    stationarity_tol, progress
        As of :class:`Chain`.

    Raises
    ------
    ValueError
        α ≤ 0 or infinite; the same embedding module in both stages; and as of :class:`Chain`.
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
        first = Optimum(pretrain, solver)
        second = Proximal(
            tuned,
            alpha,
            check_solver("finetune_solver", solver if finetune_solver is None else finetune_solver),
        )
        super().__init__([first, second], stationarity_tol, progress)
