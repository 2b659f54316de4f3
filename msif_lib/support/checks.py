"""What would make scores meaningless, found before any work: in settings and modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from msif_lib.support.arguments import not_negative, whole
from msif_lib.support.parameters import overlapping, repeats
from msif_lib.support.substitutes import check_tables

#: The class index that losses of torch leave out.
IGNORED = -100


def check_parameters(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Real parameters of one dtype on one device, none a view of another.

    Raises
    ------
    ValueError
        None at all, or parameters of other kinds; the message names them.
    """
    if not named:
        raise ValueError("the model has no parameters at all")
    first_name, first = named[0]
    for name, parameter in named:
        if is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape yet; call the module once on some inputs, so that its lazy "
                "layers are made"
            )
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}; parameters must be real floats")
        if parameter.dtype != first.dtype:
            raise ValueError(
                f"mixed dtypes: {first_name} is {first.dtype}, {name} is {parameter.dtype}; "
                "convert the modules with .to(dtype)"
            )
        if parameter.device != first.device:
            raise ValueError(
                f"mixed devices: {first_name} is on {first.device}, {name} on "
                f"{parameter.device}; move the modules with .to(device)"
            )
    check_memory(named)


def check_memory(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """No two parameters, and no two entries of one, over the same memory.

    Raises
    ------
    ValueError
        There are; the message names them.
    """
    tensors = [parameter for _, parameter in named]
    for name, parameter in named:
        if repeats(parameter):
            raise ValueError(
                f"{name} has more entries than places in memory (expand?), so that several are one "
                "number; make the small tensor the parameter and expand it in the forward"
            )
    for number, other in overlapping(tensors, tensors):
        if other < number:
            raise ValueError(
                f"{named[number][0]} shares its memory with {named[other][0]} without being the "
                "same parameter; tie them as one torch.nn.Parameter, or untie them"
            )


def check_settings(l2: float, batch_size: int, memory_budget: int | None) -> None:
    """Settings of a stage within their ranges.

    Raises
    ------
    ValueError, TypeError
        One is not; the message names it.
    """
    not_negative("l2", l2)
    whole("batch_size", batch_size, 1)
    if memory_budget is not None:
        whole("memory_budget", memory_budget, 1, " byte")


def check_given(**modules: Any) -> None:
    """What must be modules are modules.

    Raises
    ------
    TypeError
        One is not; the message names it.
    """
    for name, module in modules.items():
        if isinstance(module, type):
            raise TypeError(f"{name} is the class {module.__name__}; give a module made of it")
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, not a {type(module).__name__}")


def check_functions(loss: Any, **optional: Any) -> None:
    """The loss is a function, and what else is given.

    Raises
    ------
    TypeError
        One is not; the message names it.
    """
    given = {name: function for name, function in optional.items() if function is not None}
    for name, function in ({"loss": loss} | given).items():
        if isinstance(function, type):
            raise TypeError(f"{name} is the class {function.__name__}; give an object made of it")
        if not callable(function):
            raise TypeError(f"{name} must be a function, not a {type(function).__name__}")


def checked_weights(weights: Tensor | None, size: int, like: Tensor) -> Tensor:
    """The weights of `size` examples, 1 where there are none, in dtype and on device of `like`.

    Raises
    ------
    ValueError
        Weights of another shape, negative or not finite; the message names the first example.
    TypeError
        They are no numbers.
    """
    if weights is None:
        return torch.ones(size, dtype=like.dtype, device=like.device)
    if getattr(weights, "dtype", None) in (torch.bool, np.dtype(bool)):
        raise TypeError("weights must hold one number for each example, not truth values")
    try:
        weights = torch.as_tensor(weights, dtype=like.dtype, device=like.device).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"weights must hold one number for each example: {error}") from error
    if tuple(weights.shape) != (size,):
        raise ValueError(
            f"weights must hold one number for each of the {size} examples, not shape "
            f"{tuple(weights.shape)}"
        )
    bad = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(f"the weight of example {first} is {weights[first]}, not zero or positive")
    return weights


def check_modes(model: nn.Module) -> None:
    """No layer by which one example's loss depends on others or on chance.

    Raises
    ------
    ValueError
        BatchNorm or dropout in training mode, an embedding that rewrites its table or scales its
        gradient; the message names the layer.
    """
    check_tables(model)
    for name, child in model.named_modules():
        prefix = name.split(".")[0] if name else "model"
        if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
            how = "in training mode" if child.training else "without running statistics"
            mend = f"call {prefix}.eval() first, or use" if child.training else "use"
            raise ValueError(
                f"{name or 'model'} is BatchNorm {how}, so the loss of one example depends on the "
                f"others; {mend} GroupNorm"
            )
        drops = isinstance(child, _DropoutNd) and child.p > 0
        if isinstance(child, nn.RNNBase | nn.MultiheadAttention):
            drops = drops or child.dropout > 0
        if drops and child.training:
            raise ValueError(
                f"{name or 'model'} applies dropout in training mode, so losses depend on chance; "
                f"call {prefix}.eval() first"
            )


def innermost(model: nn.Module, run: Callable[[], Any], state: Callable[[], Any]) -> str | None:
    """The name of the innermost module in whose forward pass a state changes; None: in none."""
    found: list[str] = []
    began: dict[str, list[Any]] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda *_: began.setdefault(name, []).append(state())

    def after(name: str) -> Callable[..., None]:
        def compare(*_: Any) -> None:
            if began[name].pop() != state():
                found.append(name or "the model")

        return compare

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name)))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None  # an inner one returns before those around it


def returned(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, Tensor]]:
    """The modules that return a tensor, by name and with it, in the order of their return."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim():
                found.append((name, output.detach().clone()))

        return look

    handles = [child.register_forward_hook(keep(name)) for name, child in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
