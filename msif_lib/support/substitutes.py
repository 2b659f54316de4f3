"""What is used instead of operations of torch whose derivative is another function's.

They are exchanged where torch looks them up at each call, and for as long as a model is evaluated;
other threads are meanwhile given torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from msif_lib.support.shared import Shared

# torch's own.
_EMBEDDING, _EMBEDDING_BAG = torch.embedding, torch.embedding_bag
# What rows at a padding index are held at; None: at what they are where a derivative is taken.
_padding: ContextVar[Padding | None] = ContextVar("padding", default=None)


class Padding:
    """Embeddings at a padding index, kept from one evaluation to be constants in others.

    Finite differences move every entry of a table, also those that derivatives leave out.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next: Iterator[Tensor] | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is met within the context, in order."""
        self._kept, self._next = [], None
        with self._in_force():
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Give back what was kept, in the same order."""
        self._next = iter(self._kept)
        with self._in_force():
            yield

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        token = _padding.set(self)
        try:
            yield
        finally:
            _padding.reset(token)

    def constant(self, rows: Tensor) -> Tensor:
        """What takes the place of these rows."""
        here = rows.detach()
        if self._next is None:
            self._kept.append(here)
            return here
        kept = next(self._next, here)
        return kept if kept.shape == here.shape else here  # a model that looks at values


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table, those at the padding index as constants; the gradient is dense.

    torch's own lets reverse mode alone see a constant, so that forward mode is another derivative.
    """
    _refuse_scaling(scale_grad_by_freq)
    rows = _EMBEDDING(weight, indices)
    if padding_idx < 0:
        return rows
    held = _padding.get()
    constant = rows.detach() if held is None else held.constant(rows)
    return torch.where((indices == padding_idx).unsqueeze(-1), constant, rows)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    *further: Any,
    **named: Any,
) -> Any:
    """Sums of rows; the gradient is dense. Rows at the padding index are no part of them at all."""
    _refuse_scaling(scale_grad_by_freq)
    return _EMBEDDING_BAG(weight, indices, offsets, False, mode, False, *further, **named)


_SCALED = (
    "has scale_grad_by_freq=True, by which its gradient is not that of the loss; set "
    "scale_grad_by_freq = False, before training"
)
_RENORMED = (
    "has max_norm, by which its table is rewritten whenever it is read; scale the table once and "
    "set max_norm = None"
)


def check_tables(model: nn.Module) -> None:
    """No embedding whose gradient is not that of the loss, or that rewrites its table.

    Raises
    ------
    ValueError
        One has ``scale_grad_by_freq`` or ``max_norm``; the message names the layer.
    """
    for name, child in model.named_modules():
        if isinstance(child, nn.Embedding | nn.EmbeddingBag):
            what = f"{name or 'model'} ({type(child).__name__})"
            if child.max_norm is not None:
                raise ValueError(f"{what} {_RENORMED}")
            _refuse_scaling(child.scale_grad_by_freq, what)


def _refuse_scaling(scale_grad_by_freq: bool, what: str = "an embedding") -> None:
    if scale_grad_by_freq:
        raise ValueError(f"{what} {_SCALED}")


def _embedding_renorm(*arguments: Any) -> Tensor:
    raise ValueError(f"an embedding {_RENORMED}")


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """v g/‖v‖. torch differentiates its fused kernel twice as if ‖v‖ were a constant."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _plain_call(function: Callable[..., Any], preserve: bool, *arguments: Any) -> Any:
    """In place of CheckpointFunction.apply, which gives parameters no part in derivatives."""
    return function(*arguments)


def _nothing_around(*arguments: Any, **named: Any) -> Iterator[None]:
    """In place of what recomputes a function when backward comes, by then with other parameters."""
    yield


# Where it is looked up, under which name, and what is found there instead. A name that torch has
# no more is passed over: the probe of derivatives then tells.
_SUBSTITUTES: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch, "embedding", _embedding),
    (torch, "embedding_bag", _embedding_bag),
    (torch, "embedding_renorm_", _embedding_renorm),
    (torch, "_weight_norm", _weight_norm),
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", _weight_norm),
    (torch.utils.checkpoint, "CheckpointFunction", _plain_call),
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", _nothing_around),
]
# Whether this thread evaluates a model of the library's; others go on by torch's own.
_evaluating: ContextVar[bool] = ContextVar("evaluating", default=False)


def _chosen(own: Any, substitute: Callable[..., Any]) -> Any:
    """What calls the substitute while this thread evaluates a model, else torch's own."""
    if isinstance(own, type):
        return SimpleNamespace(apply=_chosen(own.apply, substitute))  # type: ignore[attr-defined]

    def call(*arguments: Any, **named: Any) -> Any:
        return (substitute if _evaluating.get() else own)(*arguments, **named)

    return call


@contextmanager
def _exchanged() -> Iterator[None]:
    there = [one for one in _SUBSTITUTES if hasattr(*one[:2])]
    kept = [(place, name, getattr(place, name)) for place, name, _ in there]
    for (place, name, own), (*_, substitute) in zip(kept, there):
        setattr(place, name, _chosen(own, substitute))
    try:
        yield
    finally:
        for place, name, own in kept:
            setattr(place, name, own)


_in_place = Shared(_exchanged)


@contextmanager
def substituted() -> Iterator[None]:
    """A context within which those operations have the derivatives of their functions."""
    if _evaluating.get():
        yield
        return
    token = _evaluating.set(True)
    try:
        with _in_place():
            yield
    finally:
        _evaluating.reset(token)
