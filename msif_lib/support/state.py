"""The library's own state of torch, whatever its caller has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import isfunction
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from msif_lib.support.functional import (
    AUTOCASTING,
    explain_missing_derivatives,
    full_precision,
)
from msif_lib.support.notices import warn_caller

P = ParamSpec("P")
R = TypeVar("R")

# The transform of torch.func that is under way. Of a torch without this name nobody is told what
# becomes of a call within one.
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
# Special methods that do work, beside the public ones.
_SPECIAL = {"__init__", "__post_init__", "__call__", "__matmul__"}
# Whether this thread is within a public call already.
_within: ContextVar[bool] = ContextVar("_within", default=False)


@contextmanager
def own_state() -> Iterator[None]:
    """Gradients on, inference mode and autocast off: else terms would be missing, or rounded.

    Raises
    ------
    RuntimeError
        Called within a transform of torch.func, which would see no derivative of what is
        differentiated here; a tensor made in inference mode would have to be differentiated.
    """
    if _transform() is not None:
        raise RuntimeError(
            "called within a transform of torch.func (grad, vmap, jvp, ...), which does not reach "
            "through what differentiates by itself; call it outside, or transform stage.losses_at, "
            "stage.batch_losses and stage.penalty, which are plain functions"
        )
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(),
        explain_missing_derivatives(),
    ):
        token = _within.set(True)
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("Inference tensors cannot be saved"):
                raise
            raise RuntimeError(
                "a tensor that the model or the loss holds (a buffer, class weights) was made "
                "within torch.inference_mode(), and torch takes no derivative of what it meets; "
                "make it outside, or replace it by its .clone() made outside"
            ) from error
        finally:
            _within.reset(token)


def in_own_state(function: Callable[P, R], reads: bool = False) -> Callable[P, R]:
    """A function that runs in :func:`own_state`; of an iterator, each step, and not its caller.

    Tensors made in inference mode are copied, for no derivative may meet them. What only reads an
    attribute may do so within a transform of torch.func, of which it is given nothing.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if (_within.get() and _unchanged()) or (reads and _transform() is not None):
            result = function(*args, **kwargs)
        else:
            with own_state():
                result = function(
                    *map(_usable, args),  # type: ignore[arg-type]
                    **{name: _usable(value) for name, value in kwargs.items()},  # type: ignore[arg-type]
                )
        return _stepwise(result) if isinstance(result, Iterator) else result  # type: ignore[return-value]

    return wrapped


def _unchanged() -> bool:
    """Whether the library's own state still holds, so that a call within one need not set it."""
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not any(map(torch.is_autocast_enabled, AUTOCASTING))
        and _transform() is None
    )


def _usable(value: Any) -> Any:
    inference = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if inference else value


def _stepwise(steps: Iterator[R]) -> Iterator[R]:
    """The same iterator, the caller's state back in place between its steps."""
    while True:
        with own_state():
            try:
                value = next(steps)
            except StopIteration:
                return
        yield value


def warn_of_rounding(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Warn where single precision is multiplied with fewer digits, as torch's settings may allow.

    On a GPU torch's convolutions are so unless they are told not to.
    """
    if dtype != torch.float32:
        return
    kinds = {
        "cuda": {"torch.backends.cuda.matmul": False, "torch.backends.cudnn.conv": True},
        "cpu": {"torch.backends.mkldnn.matmul": False, "torch.backends.mkldnn.conv": True},
    }
    convolves = any(isinstance(module, _ConvNd) for module in model.modules())
    mends = [
        mend
        for name, convolutions in kinds.get(device.type, {}).items()
        if (convolves or not convolutions) and (mend := _told_not_to_round(name))
    ]
    if mends:
        warn_caller(
            "float32 is multiplied with the three digits of TF32 or bfloat16 here, which solves "
            f"cannot see: set {' and '.join(mends)}, or use float64",
            UserWarning,
        )


def _told_not_to_round(name: str) -> str:
    """How a kind of products is told not to round; empty where it does not."""
    try:
        precision = attrgetter(name.removeprefix("torch."))(torch).fp32_precision
    except AttributeError:  # an older torch, which has another setting and only for GPUs
        name = name.removesuffix(".conv")
        rounds = getattr(attrgetter(name.removeprefix("torch."))(torch), "allow_tf32", False)
        return f"{name}.allow_tf32 = False" if rounds else ""
    return f"{name}.fp32_precision = 'ieee'" if precision in ("tf32", "bf16") else ""


class OwnState:
    """Methods that a subclass makes public run in :func:`own_state`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            if name in _SPECIAL or not name.startswith("_"):
                setattr(cls, name, _held(value))


def _held(member: Any) -> Any:
    """A member of a class, its function running in the library's own state."""
    if isinstance(member, classmethod | staticmethod):
        return type(member)(in_own_state(member.__func__))
    if isinstance(member, property):
        return member.getter(in_own_state(member.fget, reads=True)) if member.fget else member
    return in_own_state(member) if isfunction(member) else member
