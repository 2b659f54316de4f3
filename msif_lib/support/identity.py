"""What a problem is known by in results that are kept, and when two are the same.

Parameters, buffers, data, weights and settings have digests: two problems that differ in one bit
of them are two. Code has no digest that survives a session, so what it computes stands for it: the
losses of all examples, the regularizer, what is handed on. Of these the last bits vary with the
alignment of the data in memory, the batches and the number of threads; they are kept as numbers and
compared within rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from msif_lib.support.chance import Generators
from msif_lib.support.data import Examples
from msif_lib.support.fingerprint import fingerprint, words_of
from msif_lib.support.model import Model
from msif_lib.support.reader import Reader

# How far values may lie apart that count as the same but for rounding, relative to their scale.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_LOW_PRECISION = 5e-2
# A point beside the parameters is this far away, relative to random numbers of size 1.
_BESIDE = 0.1
# Examples that processes compare of data on disk.
_KNOWN_BY = 16


@dataclass(frozen=True)
class Identity:
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
    def of(cls, *parts: object) -> Identity:
        """That of nested parts, identities among them."""
        values: list[Tensor] = []

        def plain(part: object) -> object:
            if isinstance(part, Identity):
                values.extend(part.values)
                return part.exact
            if isinstance(part, dict):
                return {key: plain(value) for key, value in part.items()}
            return [plain(one) for one in part] if isinstance(part, list | tuple) else part

        exact = fingerprint([plain(part) for part in parts])
        return cls(exact, values)

    def same(self, other: Identity) -> bool:
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
    """Whether values ``(r, n)`` are the same but for rounding, each column on a scale of its own.

    The scale is the column's largest value and the median of these: no large loss of one example
    hides the change of another's.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    share = _ROUNDING.get(a.dtype, _LOW_PRECISION)
    finite = a.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = (torch.where(finite, one.double(), 0.0) for one in (a, b))
    sizes = a.abs().amax(0)
    usual = sizes[sizes > 0].median() if sizes.any() else 0.0
    return bool(((a - b).abs() <= share * (sizes + usual)).all())


def identity_of(
    model: Model, theta: Tensor, reader: Reader, batch_size: int, weights: Tensor
) -> Identity:
    """What a stage is known by: everything that results depend on. Its data are read once.

    Exactly by parameters and buffers, modules in words, settings, weights and a digest of each
    example; within rounding by the losses of all examples and the regularizer's value, at the
    parameters and at a point beside them, where no other loss or model has the same.

    Parameters
    ----------
    model, reader, weights
        What a stage is made of.
    theta
        Its parameters ``(p,)``.
    batch_size
        Examples evaluated at once.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(len(theta), generator=generator, dtype=torch.float64, device="cpu")
    points = [model.parameters.views(at) for at in (theta, theta + _BESIDE * noise.to(theta))]
    digests, losses = [], []
    with torch.no_grad(), Generators(model.model, model.loss).kept():
        penalties = torch.stack([model.penalty(parts) for parts in points])
        for batch, known in reader.digested(batch_size):
            digests.append(known)
            losses.append(torch.stack([model.batch_losses(parts, *batch) for parts in points], 1))
        examples = reader.gather(digests, torch.zeros(0, 2, dtype=torch.int64, device=theta.device))
        found = reader.gather(losses, penalties.new_zeros(0, 2))
    exact = fingerprint(_described(model, theta), weights, examples)
    return Identity(exact, [found.T.cpu(), penalties[:, None].cpu()])


def _described(model: Model, theta: Tensor) -> list[object]:
    """What a model is at parameters ``(p,)``, but for what its code computes."""
    settings = [model.names, model.shared, model.trained, model.l2, str(model.device)]
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
