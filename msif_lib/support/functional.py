"""Modules as functions of a flat vector of parameters, and the derivatives that they have.

Fused kernels for attention and recurrent layers lack second and forward-mode derivatives, so that
others are chosen while a module is evaluated, and what torch differentiates as another function is
exchanged (:mod:`msif_lib.support.substitutes`). Where an operation of the model has no derivative
of a kind that is needed, the error says which and what to do.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from msif_lib.support.buffers import Held
from msif_lib.support.data import Nested, rows_of
from msif_lib.support.shared import Shared
from msif_lib.support.substitutes import substituted

# The code of every backward that is marked once_differentiable.
_ONCE = once_differentiable(abs).__code__
# Kinds of devices for which torch has autocast.
AUTOCASTING = ("cpu", "cuda", "mps", "xpu")


class DerivativeError(RuntimeError):
    """A derivative that is needed is missing, or is not that of the model and its loss."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast off: it would round products to half precision in forward and backward passes."""
    rounding = [kind for kind in AUTOCASTING if torch.is_autocast_enabled(kind)]
    if not rounding:
        yield
        return
    with ExitStack() as stack:
        for kind in rounding:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def differentiable_kernels(recurrent: bool) -> Iterator[None]:
    """Kernels that have second and forward-mode derivatives, which the fused ones have not.

    Which kernels torch takes is a setting of the whole process: what other threads compute
    meanwhile is the same function, by the plain kernels too.
    """
    recurrence = _plain_recurrence() if recurrent else nullcontext()
    with full_precision(), _plain_attention(), recurrence, substituted():
        yield


@contextmanager
def _unfused_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _unfused_recurrence() -> Iterator[None]:
    # Not by their flags(), which set the precision of products as well, and warn of it.
    backends: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
    kept = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        for backend, enabled in zip(backends, kept):
            backend.enabled = enabled


_plain_attention, _plain_recurrence = Shared(_unfused_attention), Shared(_unfused_recurrence)


_COMPILED = "the module that was compiled (its _orig_mod)"
_FUNCTION = "a torch.autograd.Function of the model"
# What torch says where a derivative is missing, with the operation's name if it tells, and a mend.
_MISSING = (
    (
        r"derivative for '?(?P<name>[\w:.]*attention\w*)'? is not implemented",
        "torch.nn.functional.scaled_dot_product_attention, for which another kernel is chosen",
    ),
    (
        r"derivative for '?(?P<name>[\w:.]+)(: \w+)?'? is not implemented",
        "its formula in operations that torch differentiates twice",
    ),
    (
        r"functions with out=\.\.\. arguments don't support automatic differentiation",
        "its formula in operations that torch differentiates twice",
    ),
    (
        r"Trying to backward through (?P<name>[\w:.]+) but no autograd formula",
        "itself with a formula: register_autograd of torch.library",
    ),
    (
        r"Trying to use forward AD with (?P<name>[\w:.]+) that does not support it",
        "its formula in operations that have forward derivatives",
    ),
    (r"marked with @once_differentiable", "itself, its backward without once_differentiable"),
    (r"must implement the jvp function", "itself with a static method jvp"),
    (r"must override the setup_context", "itself with setup_context apart from forward"),
    (
        r"(?P<name>torch\.compile) with aot_autograd does not currently support double backward",
        _COMPILED,
    ),
    (r"This backward function was compiled with non-empty donated buffers", _COMPILED),
)


def _missing_derivative(name: str, mend: str) -> DerivativeError:
    return DerivativeError(
        f"{name} lacks a derivative that curvature needs (products with a Hessian differentiate "
        f"twice); replace it by {mend}"
    )


def _raised_in(error: BaseException) -> str:
    """The operation in whose backward, written in Python, torch raised the error."""
    called = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [name for name in called if name.endswith("backward")]
    return own[-1].removesuffix("backward").rstrip("._") if own else _FUNCTION


@contextmanager
def explain_missing_derivatives() -> Iterator[None]:
    """Turn torch's errors about missing derivatives into one that says what to do.

    Raises
    ------
    DerivativeError
        Within the context an operation turned out to lack a derivative; the message names it.
    """
    try:
        yield
    except DerivativeError:
        raise
    except RuntimeError as error:
        for pattern, mend in _MISSING:
            if match := re.search(pattern, str(error)):
                name = match.groupdict().get("name") or _raised_in(error)
                raise _missing_derivative(name, mend) from error
        raise


def require_second_derivatives(value: Tensor) -> None:
    """Refuse a value whose backward graph holds a Function that torch differentiates only once.

    Torch itself says nothing: it leaves that Function's share of second derivatives out.

    Raises
    ------
    DerivativeError
        A Function's backward is marked ``once_differentiable``; the message names it.
    """
    for node in graph_nodes(value):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            name = node._forward_cls.__name__
            raise _missing_derivative(name, "itself, its backward without once_differentiable")


def graph_nodes(value: Tensor) -> Iterator[Any]:
    """The operations that autograd recorded for a value, each once."""
    seen: set[Any] = set()
    nodes: list[Any] = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        yield node


class GraphNotCountable(RuntimeError):
    """What the model does, torch.func within it for one, hides the tensors that its graph saves."""


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Count the bytes that graphs recorded within the context keep, by address of their storage.

    The results must stay alive until the bytes are read: a freed address is used again.

    Raises
    ------
    GraphNotCountable
        The tensors that a graph saves cannot be seen.
    """
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would close a cycle that is never freed

    try:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            yield held
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise GraphNotCountable(str(error)) from error
        raise


class PureModule:
    """A module as a function of parameters that are given to it; their names are read once.

    Parameters
    ----------
    module
        The module; parameters that it is given later are not seen.
    numbers
        The number of each parameter among those that a call is given.
    others
        What is evaluated with it, the loss: what that holds stays as it was too.
    """

    def __init__(
        self, module: nn.Module, numbers: Mapping[nn.Parameter, int], *others: Any
    ) -> None:
        self.module = module
        self.held = Held(module, *others)
        self.recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
        # Each parameter under every name it has; a submodule used twice is named once, or
        # functional_call would not put its own parameters back.
        self._names = [
            (f"{prefix}.{name}" if prefix else name, numbers[parameter])
            for prefix, child in module.named_modules()
            for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False)
        ]

    def __call__(self, parts: Sequence[Tensor], inputs: Nested) -> Any:
        """The module's output for `inputs` with `parts` for its parameters, by their numbers.

        Buffers and attributes that the evaluation moves are copies; the module's stay.
        """
        with self.held.copies(rows_of(inputs)):
            return self.evaluate(parts, inputs)

    def evaluate(self, parts: Sequence[Tensor], inputs: Nested) -> Any:
        """The same, what it moves being the module's own."""
        values = {name: parts[number] for name, number in self._names}
        with differentiable_kernels(self.recurrent):
            return functional_call(self.module, values, (inputs,), tie_weights=False)
