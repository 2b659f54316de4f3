"""Between two stages: what the second takes from the first, by name, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from msif_lib.links import Frozen, Link, Optimum, Proximal
from msif_lib.stage import Stage
from msif_lib.support.fingerprint import fingerprint
from msif_lib.support.functional import DerivativeError
from msif_lib.support.identity import ProblemIdentity
from msif_lib.support.notices import warn_caller
from msif_lib.support.parameters import Block, aliases_of, overlapping

# Examples whose gradients give the size that a stage's own gradient is held against.
_COMPARED = 32


class HandOver:
    """What a stage takes from the one before it, by name.

    Parameters
    ----------
    before, after
        The two stages.
    names
        What messages call them.

    Raises
    ------
    ValueError
        A shared parameter that the stage before does not have, or has in another shape;
        nothing shared at all; stages of different dtype or device; nothing handed on is trained.
    DerivativeError
        No gradient of the second stage's losses reaches what it takes.
    TypeError
        `hands_on` returns something else than tensors by name.
    """

    def __init__(self, before: Stage, after: Stage, names: tuple[str, str]) -> None:
        self.before, self.after, self._called = before, after, names
        if before.dtype != after.dtype:
            raise ValueError(
                f"mixed dtypes: {names[0]} is {before.dtype}, {names[1]} {after.dtype}; convert "
                "one with Stage.to(dtype)"
            )
        if before.device != after.device:
            raise ValueError(
                f"mixed devices: {names[0]} is on {before.device}, {names[1]} on {after.device}; "
                "move one with Stage.to(device=...)"
            )
        if not after.shared:
            raise ValueError(
                "the embeddings have no parameters, so nothing connects the two stages"
            )
        if lost := set(after.unreached) & set(after.shared):
            raise DerivativeError(
                f"{names[1]} takes {after.names[min(lost)]} from {names[0]}, but no gradient of "
                "its losses reaches it: it is evaluated under torch.no_grad() or detached on the "
                "way, so that all scores would be zero; take that out of the forward. What a "
                "training keeps fixed is said by its link (Frozen), requires_grad=False or trained="
            )
        given = self._given(before.vector())
        aliases = aliases_of(before.model)  # a tied parameter may be asked for by any name
        wanted = [after.origin(number) for number in after.shared]
        self._wanted = [name if name in given else aliases.get(name, name) for name in wanted]
        self._compare(given)
        self._numbers = (
            () if before.hands_on else tuple(before.names.index(name) for name in self._wanted)
        )

    def _given(self, vector: Tensor) -> dict[str, Tensor]:
        """The named parameters that the stage before has to give."""
        named = self.before.named(self.before.parameters.views(vector))
        if not self.before.hands_on:
            return named
        # Copies: what merges in place would change the vector.
        given = self.before.hands_on({name: part.clone() for name, part in named.items()})
        if not isinstance(given, Mapping):
            raise TypeError(
                f"hands_on of {self._called[0]} must return the parameters that the next stage "
                f"takes as a dict of tensors by name, but returned {type(given).__name__}"
            )
        odd = next((name for name, one in given.items() if not isinstance(one, Tensor)), None)
        if odd is not None:
            raise TypeError(
                f"hands_on of {self._called[0]} must return tensors, but {odd!r} is a "
                f"{type(given[odd]).__name__}"
            )
        return dict(given)

    def _compare(self, given: dict[str, Tensor]) -> None:
        before, after = self._called
        same = f"{before}.embedding and {after}.embedding must have the same parameters; "
        missing = [name for name in self._wanted if name not in given]
        extra = []
        if self.before.composed and self.after.composed and not self.before.hands_on:
            ours = [self.before.names[number] for number in self.before.shared]
            extra = [name for name in ours if name not in self._wanted]
            if not missing and not extra and ours != self._wanted[: len(ours)]:
                raise ValueError(f"{same}the names differ: in another order")
        if missing or extra:
            odd = sorted(name.removeprefix("embedding.") for name in {*missing, *extra})
            raise ValueError(
                f"{same}the names differ: {odd}"
                if self.after.composed
                else f"{after} takes {missing} from {before}, which hands on {sorted(given)}; say "
                'in shared= which of them it takes, as a mapping {"own name": "name there"} where '
                "names differ"
            )
        for number, name in zip(self.after.shared, self._wanted):
            one, other = given[name].shape, self.after.parameters.tensors[number].shape
            if one != other:
                raise ValueError(
                    f"{same}{name} is {tuple(one)} in one and {tuple(other)} in the other"
                )

    def moves(self, trained: Block) -> bool:
        """Whether something that is handed on is trained by the stage before."""
        if not self.before.hands_on:
            return bool(set(self._numbers) & set(trained))
        return bool(
            self.before.parameters.take(self._pulled_any_way(self.before.vector()), trained).any()
        )

    def same_buffers(self) -> bool:
        """Whether the buffers beside what is shared (running statistics, say) are the same."""
        theirs = dict(self.before.model.named_buffers())
        return all(
            name in theirs and torch.equal(buffer, theirs[name])
            for name, buffer in self.after.shared_buffers().items()
            if name in theirs or self.after.composed
        )

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether these are the same parameters; what a function made of them, but for rounding."""
        if not self.before.hands_on:
            return torch.equal(one, other)
        rounding = 100 * torch.finfo(one.dtype).eps * other.norm()
        return bool((one - other).norm() <= rounding)

    def value(self, vector: Tensor) -> Tensor:
        """What is handed on, ``(p_W,)``, by a stage before at `vector` ``(p,)``."""
        if not self.before.hands_on:
            return self.before.parameters.take(vector, self._numbers)
        given = self._given(vector)
        return torch.cat([given[name].reshape(-1) for name in self._wanted])

    def identity(self, vector: Tensor) -> ProblemIdentity:
        """What a hand-over at `vector` is known by, in results that are kept.

        A function has no digest that survives a session: its value and a derivative stand for it.
        """
        if not self.before.hands_on:
            return ProblemIdentity.of(self._wanted, self._numbers)
        found = self.value(vector)[None], self._pulled_any_way(vector).T
        return ProblemIdentity(fingerprint(self._wanted), [one.cpu() for one in found])

    def _pulled_any_way(self, vector: Tensor) -> Tensor:
        given = self.value(vector)
        any_way = torch.linspace(1, 2, len(given), dtype=given.dtype, device=given.device)
        return self.pull_back(any_way[:, None], vector)

    def pull_back(self, handed: Tensor, vector: Tensor) -> Tensor:
        """From dq/dc ``(p_W, k)`` to the parameters of the stage before, ``(p, k)``."""
        if not self.before.hands_on:
            return self.before.parameters.put(handed, self._numbers)
        pull: Any = vjp(self.value, vector)[1]
        return torch.stack([pull(column)[0] for column in handed.unbind(1)], 1)


def check_start(over: HandOver, before: Link, link: Link, first: str, second: str) -> None:
    """A stage must have begun, or stayed, where the one before it ended."""
    given, stage = over.value(before.vector()), link.stage
    start = link.begins_at()
    if start is not None:
        if not over.same(stage.split(start)[0], given):
            raise ValueError(
                f"the path of {second} does not start at the parameters with which {first} ended; "
                "finetune from there, or give the stage and path that it did start from"
            )
        return
    kept = stage.parameters.take(torch.cat([given, stage.head_vector()]), link.held)
    if not over.same(kept, stage.parameters.take(link.vector(), link.held)):
        raise ValueError(
            f"case 1 keeps the embedding fixed, but the parameters of {second}.embedding "
            f"differ from those of {first}.embedding; for an embedding that was updated use "
            "UpdatedEmbeddingInfluence, or a chain with Proximal, Stopped or Unrolled"
            if isinstance(link, Frozen) and stage.composed
            else f"{second} does not train {[stage.names[n] for n in link.held]}, but they differ "
            f"from those with which {first} ended; say what was trained with trained="
        )
    if isinstance(link, Frozen) and not over.same_buffers():
        raise ValueError(
            f"Frozen keeps what is shared fixed, but the buffers of {second}.embedding (running "
            f"statistics, say) differ from those of {first}.embedding"
        )


def check_carried_on(before: Link, link: Link, first: str, second: str) -> None:
    """What begins, or stays, where the stage before trained it depends on it: it must be shared."""
    stage, start = link.stage, link.begins_at()
    numbers = [n for n in stage.own if start is not None or n not in link.block]
    theirs = before.stage.parameters.views(before.vector())
    ours = stage.parameters.views(link.vector() if start is None else start)
    trained = {before.stage.names[n]: theirs[n] for n in before.block}
    for name, value in ((stage.names[n], ours[n]) for n in numbers):
        other = trained.get(name)
        # A constant, as a bias of zeros, is equal by how it was made.
        if other is None or other.shape != value.shape or bool((value == value.flatten()[0]).all()):
            continue
        if torch.equal(other, value):
            raise ValueError(
                f"{name} of {second} goes on from where {first} ended, but is not shared, so that "
                "what depends on it would be left out; say so: Stage.of(model, loss, data, "
                "shared='*'), with the module of an embedding and a head as stage.model"
            )


def check_modules(links: Sequence[Link], names: Sequence[str]) -> None:
    """No stage whose parameters are read from its modules may have had them trained later on."""
    for number, early in enumerate(links):
        if not early.reads_modules:
            continue
        theirs = early.stage.parameters.tensors
        for late, name in zip(links[number + 1 :], names[number + 1 :]):
            stage = late.stage
            trained = [stage.parameters.tensors[n] for n in late.block]
            same = [stage.names[late.block[n]] for n, _ in overlapping(trained, theirs)]
            if same:
                raise ValueError(
                    f"{type(late).__name__} trains {same[0]} of {name}, and {names[number]} and it "
                    f"hold the same module; give {name} a copy (copy.deepcopy) made before "
                    f"finetuning: {type(early).__name__} needs its parameters as they were"
                )


def gradient_size(link: Link) -> float:
    """Root mean square of the norms of some w_i ∇ℓ_i over what is trained."""
    stage = link.stage
    weighty = stage.weights.nonzero()[:, 0]
    if not len(weighty):
        return 0.0
    some = weighty[:: -(-len(weighty) // _COMPARED)]
    part = stage.section(some.tolist())
    blocks = (
        stage.parameters.take(rows.T, link.block).norm(dim=0, dtype=torch.float64)
        for rows in part.per_example_gradients()
    )
    like = stage.vector()[:0].double()
    norms = part.reader.gather(blocks, like) * stage.weights[some]
    return float((norms.square().mean() * len(weighty) / stage.size).sqrt())


def check_continuity(
    links: Sequence[Link], hand_overs: Sequence[HandOver], names: Sequence[str]
) -> None:
    """Each stage trains something, hands on what was trained, and began where the last one ended.

    Raises
    ------
    ValueError
        It is not so; the message names the stage and the mend.
    """
    for link, name in zip(links, names):
        if not link.block:
            stage, what = link.stage, "no parameter is trained"
            if isinstance(link, Frozen):
                what = "all parameters are shared" if stage.trained else what
            if stage.composed and not stage.head_size:
                what = f"{name}.head has no parameters"
            raise ValueError(
                f"{what}, so {type(link).__name__} has nothing to train in {name}; say what "
                "was trained with trained=, and what is shared with shared="
            )
    if hand_overs and not hand_overs[0].moves(links[0].block):
        raise ValueError(
            f"{names[0]}: nothing that it hands on to {names[1]} is trained (by trained=, or "
            "no gradient is required); say what was trained with trained="
        )
    if isinstance(links[0], Proximal):
        raise ValueError(
            f"{names[0]}: a first stage is handed nothing to be pulled towards; its link is "
            "Optimum, or Unrolled (a regularizer= of the stage can hold a pull of its own)"
        )
    check_modules(links, names)
    for over, pair, called in zip(hand_overs, pairwise(links), pairwise(names)):
        check_start(over, *pair, *called)
        check_carried_on(*pair, *called)
        _say_where_cut(pair[1], called[1])


def _say_where_cut(link: Link, name: str) -> None:
    """An optimum that trains all that it was handed forgets it: nothing goes further back."""
    if isinstance(link, Optimum) and not link.held:
        warn_caller(
            f"{name} is an Optimum that trains all that it was handed, and an optimum forgets "
            "where training began: the scores of every stage before it are zero. If yours did not "
            "forget, say how with Proximal or Unrolled",
            UserWarning,
        )
