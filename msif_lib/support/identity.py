"""What a problem is known by in results that are kept, and when two are the same.

Parameters, buffers, data, weights and settings have digests: two problems that differ in one bit
of them are two. Code has no digest that survives a session, so what it computes stands for it: the
losses of all examples, the regularizer, derivatives of both, what is handed on. Of these the last
bits vary with the alignment of the data in memory, the batches and the number of threads; they are
kept as numbers and compared within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msif_lib.support.chance import Generators
from msif_lib.support.data import Batch, Examples
from msif_lib.support.differences import units
from msif_lib.support.fingerprint import fingerprint, words_of
from msif_lib.support.model import Model
from msif_lib.support.reader import Reader

# How far values may lie apart that count as the same but for rounding, relative to their scale.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_LOW_PRECISION = 5e-2
# And in last digits of what the same example has at the other point: a small loss may be the
# difference of large outputs.
_LAST_DIGITS = 8
# Derivatives jump where a kink lies within rounding: they are kept, and so compared, in fewer
# digits.
_FEWER_DIGITS = {torch.float64: torch.float32}
# How far from the parameters the point beside them is, relative to their size.
_BESIDE = 0.1
# Examples that processes compare of data on disk.
_KNOWN_BY = 16


@dataclass(frozen=True)
class ProblemIdentity:
    """What a problem is known by.

    Attributes
    ----------
    exact
        The digest of all that has one.
    values
        What code computed: tensors ``(r, n)``, r values for each of n examples, say.
    """

    exact: str
    values: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, *parts: object) -> ProblemIdentity:
        """That of nested parts, identities among them."""
        values: list[Tensor] = []

        def plain(part: object) -> object:
            if isinstance(part, ProblemIdentity):
                values.extend(part.values)
                return part.exact
            if isinstance(part, dict):
                return {key: plain(value) for key, value in part.items()}
            return [plain(one) for one in part] if isinstance(part, list | tuple) else part

        exact = fingerprint([plain(part) for part in parts])
        return cls(exact, values)

    def same(self, other: ProblemIdentity) -> bool:
        """Whether two problems are the same but for rounding."""
        return (
            self.exact == other.exact
            and len(self.values) == len(other.values)
            and all(map(_close, self.values, other.values))
        )

    @property
    def key(self) -> str:
        """A digest of this and of no other, not even one that is the same but for rounding."""
        return fingerprint(self.exact, self.values)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether values ``(r, n)`` are the same but for rounding, each row on a scale of its own.

    The scale is a value's own size and the median of its row: no large loss of one example hides
    the change of another's, and none at one point a change at the other.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    share, digits = _ROUNDING.get(a.dtype, _LOW_PRECISION), _LAST_DIGITS * torch.finfo(a.dtype).eps
    finite = a.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = (torch.where(finite, one.double(), 0.0) for one in (a, b))
    sizes = a.abs()
    sizes += torch.where(sizes > 0, sizes, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
    return bool(((a - b).abs() <= share * sizes + digits * sizes.amax(0)).all())


def identity_of(
    model: Model,
    theta: Tensor,
    reader: Reader,
    batch_size: int,
    weights: Tensor,
    lasting: bool = True,
) -> ProblemIdentity:
    """What a stage is known by: everything that results depend on. Its data are read once.

    Exactly by parameters and buffers, modules in words, settings, weights and a digest of each
    example; within rounding by the losses of all examples and the regularizer's value, at the
    parameters and at a point beside them, where no other loss or model has the same, and there by a
    derivative of both.

    Parameters
    ----------
    model, reader, weights
        What a stage is made of.
    theta
        Its parameters ``(p,)``.
    batch_size
        Examples evaluated at once.
    lasting
        False: for as long as the process lasts. The losses beside the parameters stand for the
        data, which have no digest then.
    """
    beside = _beside(model, theta)
    digests = []

    def batches() -> Iterator[Batch]:
        for batch, known in reader.digested(batch_size):
            digests.append(known)
            yield batch

    described = _described(model, theta)
    with Generators(model.model, model.loss).kept():
        if not lasting:
            found = _computed(model, [beside], reader, reader.batches(batch_size))
            return ProblemIdentity(fingerprint(described, weights), found)
        found = _computed(model, [theta, beside], reader, batches())
        examples = reader.gather(digests, torch.zeros(0, 2, dtype=torch.int64, device=theta.device))
    return ProblemIdentity(fingerprint(described, weights, examples), found)


def _beside(model: Model, theta: Tensor) -> Tensor:
    """A point near the parameters ``(p,)``, in units of each, the same in every session."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(len(theta), generator=generator, dtype=torch.float64, device="cpu")
    parts = model.parameters.views(theta)
    sizes = [(part.abs() + unit).reshape(-1) for unit, part in zip(units(parts), parts)]
    return theta + _BESIDE * noise.to(theta) * torch.cat(sizes)


def _computed(
    model: Model, points: list[Tensor], reader: Reader, batches: Iterable[Batch]
) -> list[Tensor]:
    """What code computes at some points ``(p,)``, and its derivatives at the last of them.

    Returns
    -------
    list of Tensor
        The losses ``(r, N)`` and the penalty ``(r, 1)`` at r points; of the losses' sum, each times
        a random number, and of the penalty the derivative by each parameter ``(2, K)``, in one
        random direction.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    size, last = len(reader.examples), points[-1].detach().clone().requires_grad_()
    chance = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
    direction = torch.randn(len(last), generator=generator, dtype=torch.float64, device="cpu")
    chance, direction = chance[torch.as_tensor(reader.share)].to(last), direction.to(last)

    def slopes(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return found.new_zeros(len(model.names))
        (gradient,) = torch.autograd.grad(value, last, allow_unused=True, materialize_grads=True)
        parts = model.parameters.views(gradient * direction)
        return torch.stack([part.sum(dtype=torch.float64) for part in parts])

    def at_each(function: Callable[..., Tensor], *given: Any) -> Tensor:
        with torch.no_grad():
            others = [function(point, *given) for point in points[:-1]]
        with torch.enable_grad():
            return torch.stack([*others, function(last, *given)])

    losses, start = [], 0
    found = torch.zeros(2, len(model.names), dtype=torch.float64, device=last.device)
    for batch in batches:
        here = at_each(model.losses_at, *batch)
        found[0] += slopes(chance[start : start + here.shape[1]] @ here[-1])
        losses.append(here.detach().T)
        start += here.shape[1]
    found[0] = reader.all_reduce(found[0])
    penalties = at_each(lambda point: model.penalty(model.parameters.views(point)))
    found[1] = slopes(penalties[-1])
    kept = found.to(_FEWER_DIGITS.get(last.dtype, torch.bfloat16))
    losses_of_all = reader.gather(losses, penalties.detach().new_zeros(0, len(points)))
    return [losses_of_all.T.cpu(), penalties.detach()[:, None].cpu(), kept.cpu()]


def _described(model: Model, theta: Tensor) -> list[object]:
    """What a model is at parameters ``(p,)``, but for what its code computes."""
    settings = [model.names, model.shared, model.trained, model.l2, model.device.type]
    return [theta, dict(model.model.named_buffers()), words_of(model.model), settings]


def held_by_each(model: Model, examples: Examples, weights: Tensor) -> str:
    """A digest of what every process that shares the data must hold, found by each for itself.

    Of data in memory all examples, of others some, for the point of shares is that nobody reads
    all.
    """
    size = len(examples)
    some = range(0, size, 1 if examples.in_memory else -(-size // _KNOWN_BY))
    digests = [digests for _, digests in examples.digested(size, some)]
    return fingerprint(_described(model, model.vector()), weights, size, digests)
