"""Whether a stage's derivatives are those of the losses that it evaluates: finite differences tell.

A few examples spread over the data are looked at, beside the parameters, where nothing is right by
coincidence, and at them. Models of other dtypes are evaluated in double precision where they can.
Of what computes in single precision whatever it is given, first derivatives alone are compared: a
fault of 2 % of a gradient shows, one of 1 % mostly, smaller ones may pass. Of what is rounded to
half precision only parameters that no gradient reaches are told, from losses that change with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import NoReturn

import torch
from torch import Tensor, nn

from msif_lib.support.data import Batch, map_leaves
from msif_lib.support.differences import Fault, Point, units
from msif_lib.support.functional import (
    DerivativeError,
    explain_missing_derivatives,
    graph_nodes,
    require_second_derivatives,
)
from msif_lib.support.model import Model
from msif_lib.support.notices import warn_caller
from msif_lib.support.parameters import Block

#: Examples that are looked at.
PROBED = 8
# Examples read for a parameter that the losses of those do not depend on, at most.
_READ = 512
# How far beside the parameters, in units of their size.
_BESIDE = 0.1
_LEAVE_OUT = 'check="data" leaves this probe out'

#: A scalar function of the flat vector.
Function = Callable[[Tensor], Tensor]
#: Examples of some numbers, in batches of a size.
Read = Callable[[int, Sequence[int]], Iterator[Batch]]


class DerivativeWarning(UserWarning):
    """The losses do not depend on something that is trained."""


def wanted(check: object) -> bool:
    """Whether a stage's `check` asks for the probe.

    Raises
    ------
    ValueError
        It is neither True, False nor "data".
    """
    if not (isinstance(check, bool) or (isinstance(check, str) and check == "data")):
        raise ValueError(f'check must be True, "data" or False, not {check!r}')
    return check is True


def probe(model: Model, read: Read, size: int, at_once: int) -> None:
    """Refuse derivatives that the losses and the regularizer have not.

    Parameters
    ----------
    model
        The model.
    read
        Reads examples: ``read(batch_size, indices)``.
    size
        Number of examples.
    at_once
        Examples evaluated at once, at most.

    Raises
    ------
    DerivativeError
        Finite differences contradict a derivative; the message names a parameter, the size of
        the error and the mend.
    ValueError
        Parameters are read from elsewhere than the attributes that they are; a finite loss whose
        gradient is not; a regularizer that returns no finite scalar.

    Warns
    -----
    DerivativeWarning
        No loss depends on a parameter that is trained.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    count = min(PROBED, size, at_once)
    indices = [number * size // count for number in range(count)]
    batch = next(read(count, indices))
    idle, met = model.trained, 0
    with model.kernels(), explain_missing_derivatives():
        _require_independent_head(model, batch, generator)
        for number, point in enumerate(_points(model, _losses(model, batch, generator), generator)):
            _require_own(model, point.total, "the model or its loss")
            _compare(model, point, "the losses", not number)
            idle, met = _idle(model, point.gradient, idle), met + 1
        if met < len(("beside", "here")):
            _require_finite(model, batch, indices)
        if idle:
            few = min(size, _READ)
            _warn_of_idle(model, idle, read(at_once, range(few)), few < size and few, generator)
        if model.regularizer is not None:
            for number, point in enumerate(_points(model, _regularizer(model), generator)):
                _require_own(model, point.total, "the regularizer")
                _compare(model, point, "the regularizer", not number)


# --- what is differentiated ---------------------------------------------------------------------


def _losses(model: Model, batch: Batch, generator: torch.Generator) -> Function:
    """A random mean of the losses, so that no two examples cancel."""
    modules = [module for module in (model.model, model.loss) if isinstance(module, nn.Module)]
    known: dict[torch.dtype, Batch] = {model.dtype: batch}
    chances: list[Tensor] = []

    def moved(dtype: torch.dtype) -> Batch:
        if dtype not in known:
            inputs, targets = map_leaves(lambda leaf: _cast(leaf, dtype), batch)
            known[dtype] = inputs, targets
        return known[dtype]

    def function(theta: Tensor) -> Tensor:
        with _buffers_in(theta.dtype, modules if theta.dtype != model.dtype else ()):
            values = model.losses_at(theta, *moved(theta.dtype))
        if not chances:
            draw = torch.rand(len(values), generator=generator, device=theta.device)
            chances.append((draw + 0.5) / len(values))
        return (chances[0].to(values) * values).sum()

    return function


def _regularizer(model: Model) -> Function:
    def function(theta: Tensor) -> Tensor:
        return model.regularizer(model.named(model.parameters.views(theta)))  # type: ignore[misc]

    try:
        value = function(model.vector())
    except Exception as error:
        raise ValueError(
            f"regularizer fails on the named parameters {list(model.names)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        got = (
            f"shape {tuple(value.shape)} and {value.dtype}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(f"regularizer must return a scalar tensor, shape (), not {got}")
    if not value.isfinite():
        raise ValueError(f"regularizer is not finite ({value}) at the parameters")
    return function


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _buffers_in(dtype: torch.dtype, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Buffers and plain tensors of modules in another dtype within the context."""
    children = [child for module in modules for child in module.modules()]
    kept = [
        (held, {key: value for key, value in held.items() if isinstance(value, Tensor)})
        for child in children
        for held in (vars(child), child._buffers)
    ]
    kept = [(held, some) for held, some in kept if any(t.dtype != dtype for t in some.values())]
    try:
        for held, some in kept:
            held.update({key: _cast(value, dtype) for key, value in some.items()})
        yield
    finally:
        for held, some in kept:
            held.update(some)


def _beside(model: Model, generator: torch.Generator) -> Tensor:
    """A point near the parameters ``(p,)``: signs stay, but of what is next to zero."""
    theta = model.vector()
    noise = torch.empty_like(theta).normal_(generator=generator)
    parts = model.parameters.views(theta)
    sizes = [part.abs() + _BESIDE * unit for unit, part in zip(units(parts), parts)]
    return theta + _BESIDE * noise * torch.cat([size.reshape(-1) for size in sizes])


def _points(model: Model, function: Function, generator: torch.Generator) -> Iterator[Point]:
    """The function beside the parameters and at them, in double precision or else in its own."""
    here = model.vector()
    for theta in (_beside(model, generator), here):
        for dtype in dict.fromkeys((torch.float64, model.dtype)):
            try:
                with _all_recorded(model):
                    point = Point(function, theta.to(dtype), model.parameters, generator)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever the user's code says to another dtype or other parameters
                if theta is here and dtype == model.dtype and dtype.itemsize >= 4:
                    raise
                continue
            if point.finite:
                yield point
                break


# --- what is refused ----------------------------------------------------------------------------


def _compare(model: Model, point: Point, what: str, closely: bool) -> None:
    """Hold first derivatives against differences, and of the first point the second ones."""
    bent = point.bent() if closely else ()
    if bent:
        raise DerivativeError(
            f"the gradient of {what} in {_listed([model.names[number] for number in bent])} is not "
            f"in proportion to what is differentiated: that of a multiple of {what} is not the "
            "same multiple. A hook clips or scales it (register_hook, register_full_backward_hook; "
            f"remove it), or a backward is not linear in what it is given: mend it. {_LEAVE_OUT}"
        )
    fault = point.fault(1, _reached(model), 2 if closely else 1)
    if fault is not None and not _only_untrained(model, point):
        _refuse(model, point, fault, what)
    if not closely:
        return
    try:
        require_second_derivatives(point.total)
        fault = point.fault(2, _reached(model))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return  # a second derivative is missing; who needs it is told by its name
    if fault is not None:
        _refuse(model, point, fault, what)


def _reached(model: Model) -> Block:
    return tuple(n for n in model.parameters.all if n not in model.unreached)


def _only_untrained(model: Model, point: Point) -> bool:
    """Whether gradients fail to reach what is not trained, and are right in all that is."""
    parts, every = model.parameters.views(point.gradient), model.parameters.all
    unreached = tuple(n for n in every if n not in model.trained and not parts[n].any())
    rest = tuple(n for n in every if n not in unreached)
    if not unreached or (rest and point.fault(1, rest, 2)):
        return False
    model.unreached = unreached
    return True


def _refuse(model: Model, point: Point, fault: Fault, what: str) -> NoReturn:
    block = point.culprits(fault.order, model.parameters.all)
    fault = point.fault(fault.order, block) or fault
    names = _listed([model.names[number] for number in block])
    functions = [getattr(node, "_forward_cls", None) for node in graph_nodes(point.total)]
    own = sorted({one.__name__ for one in functions if one and one.__module__[:6] != "torch."})
    suspects = (
        f" (the model has torch.autograd.Functions of its own: {_listed(own)})" if own else ""
    )
    if fault.order == 2:
        raise DerivativeError(
            f"the second derivatives of {what} along {names} are off by {fault.error:.1%} of "
            "their size: differentiating twice gives others than finite differences of the "
            f"gradient{suspects}; an operation's backward computes with what autograd does not "
            f"see (.data, detach, NumPy, a state kept from the forward pass): write it in "
            f"torch's operations. {_LEAVE_OUT}"
        )
    if fault.exact <= 1e-6 * fault.measured:
        raise DerivativeError(
            f"{what} depend on {names}, but no gradient reaches it: it is evaluated under "
            "torch.no_grad() or detached on the way; take that out of the forward. What stays "
            "fixed in a training is said by requires_grad=False, by trained= or by the link "
            f"(Frozen). {_LEAVE_OUT}"
        )
    if fault.measured <= 1e-6 * fault.exact:
        raise DerivativeError(
            f"autograd gives {what} a derivative in {names} that they have not: nothing changes "
            f"along it{suspects}. A straight-through estimator, rounding or quantisation? Evaluate "
            f"the model without it. {_LEAVE_OUT}"
        )
    raise DerivativeError(
        f"the gradient of {what} in {names} is off by {fault.error:.1%} of its size: backward "
        f"gives {fault.exact:.6g} along a direction in which finite differences give "
        f"{fault.measured:.6g}{suspects}; something is detached on the way, or an operation's "
        f"backward is not the derivative of its forward: mend it. {_LEAVE_OUT}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_own(model: Model, total: Tensor, what: str) -> None:
    """No parameter may be reached but through the vector that is differentiated by."""
    numbers = model.parameters.numbers
    reached = {getattr(node, "variable", None) for node in graph_nodes(total)}
    strays = [model.names[numbers[p]] for p in reached if p in numbers]
    if strays:
        raise ValueError(
            f"{what} reads {_listed(sorted(strays))} from elsewhere than the attribute of its "
            "module (a Python list or dict, another module, a closure), so that derivatives miss "
            "it; read it as the attribute where it is used (torch.nn.ParameterList, ModuleList), "
            "or from the dict that a regularizer is given"
        )


@contextmanager
def _all_recorded(model: Model) -> Iterator[None]:
    """Graphs show every parameter that is read, also those that are not trained."""
    frozen = [p for p in model.parameters.tensors if not (p.requires_grad or p.is_inference())]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _require_independent_head(model: Model, batch: Batch, generator: torch.Generator) -> None:
    """The head of two modules gets all that it needs of the embedding by its inputs."""
    if not model.composed:
        return
    inputs, targets = batch
    parts = model.parameters.views(_beside(model, generator))
    try:
        with torch.no_grad():
            whole = model.batch_losses(parts, inputs, targets)
            apart = model.feature_losses(parts, model.features(parts, inputs), targets)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # beside the parameters the model is not defined
        return
    tolerance = torch.finfo(whole.dtype).eps ** 0.5
    if not torch.allclose(whole, apart, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            "the head reads parameters of the embedding without holding them, by a closure or a "
            "list; hold the module or the parameter as an attribute of the head (it stays one "
            "parameter), or make the stage of one module, by Stage.of"
        )


def _idle(model: Model, gradient: Tensor, block: Block) -> Block:
    """The parameters of which the gradient is zero."""
    parts = model.parameters.views(gradient)
    return tuple(number for number in block if not parts[number].any())


def _require_finite(model: Model, batch: Batch, indices: Sequence[int]) -> None:
    """No finite loss may have a gradient that is not, in what is trained."""
    for position, index in enumerate(indices):
        inputs, targets = map_leaves(itemgetter(slice(position, position + 1)), batch)
        leaf = model.vector().requires_grad_()
        loss = model.losses_at(leaf, inputs, targets).sum()
        if not (loss.requires_grad and loss.isfinite()):
            continue
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
        parts = model.parameters.views(gradient)
        bad = [number for number in model.trained if not parts[number].isfinite().all()]
        if bad:
            raise ValueError(
                f"the gradient of the loss of example {index} is not finite in "
                f"{_listed([model.names[number] for number in bad])}; look at its inputs and at "
                "the loss at the trained parameters"
            )


def _warn_of_idle(
    model: Model, idle: Block, batches: Iterator[Batch], few: int, generator: torch.Generator
) -> None:
    """Warn where a parameter that is trained has no part in any loss, if `few`, of so many."""
    leaf = _beside(model, generator).requires_grad_()
    for batch in batches:
        total = model.losses_at(leaf, *batch).sum()
        if total.requires_grad:
            gradient = torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)
            idle = _idle(model, gradient[0], idle)
        if not idle:
            return
    names = _listed([model.names[number] for number in idle])
    merged = any(
        getattr(child, "merged", False) is True
        for name, child in model.model.named_modules()
        if any(f"{model.names[number]}.".startswith(f"{name}.") for number in idle)
    )
    warn_caller(
        f"no loss {f'of the first {few} examples ' if few else ''}depends on {names}, which is "
        "trained: "
        + (
            "its adapter is merged into the weights; unmerge it (of peft, by unmerge_adapter())"
            if merged
            else "left out of the forward (then leave it out of trained=), or without effect, its "
            "units dead or saturated?"
        ),
        DerivativeWarning,
    )
