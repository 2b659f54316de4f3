"""What a stage is known by, in results that are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msif_lib.support.data import Examples, map_leaves
from msif_lib.support.fingerprint import fingerprint, rounded
from msif_lib.support.model import Model

# Examples whose losses, and which of data on disk, a stage is known by.
_KNOWN_BY = 16


def identity_of(
    model: Model, theta: Tensor, examples: Examples, in_memory: bool, weights: Tensor
) -> list[Any]:
    """All that results depend on, to be hashed.

    Parameters and buffers, modules in words, settings, weights, number of examples; of data in
    memory every example, of other data some, for to read all would cost as much as the work it
    could save; and, since code has no digest that survives a session, the losses of some examples
    and the regularizer's value, at the parameters and at a point beside them.

    Parameters
    ----------
    model, examples, weights
        What a stage is made of.
    theta
        Its parameters ``(p,)``.
    in_memory
        Whether all examples are at hand.
    """
    size = len(examples)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(theta), generator=generator, dtype=torch.float64, device="cpu")
    points = [model.parameters.views(at) for at in (theta, theta + 0.1 * noise.to(theta))]
    some = []
    with torch.no_grad():
        values = [rounded(model.penalty(parts)) for parts in points]
        for example in examples.batches(1, range(0, size, -(-size // _KNOWN_BY))):
            some.append(fingerprint(example))
            here = map_leaves(lambda leaf: leaf.to(model.device), example)
            values += [rounded(model.batch_losses(parts, *here)) for parts in points]
    settings = [model.names, model.shared, model.trained, model.l2, str(model.device)]
    buffers = dict(model.model.named_buffers())
    known = examples.tensors() if in_memory else some
    return [theta, buffers, model.model, settings, weights, size, known, values]
