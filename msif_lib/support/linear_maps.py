"""What enters and leaves the linear maps of a model: ``linear`` and convolutions by a parameter.

A function mode of torch sees each operation of an evaluation with its arguments. So the maps of
modules, of their subclasses and of plain calls are found alike, no hook is put on any module, and
a parameter that is used in any other way as well is known by that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Numbers of the parameters that are a map's weight and bias; None for what is no parameter.
Key = tuple[int | None, int | None]


@dataclass(frozen=True)
class Use:
    """A linear map that was evaluated: y_t = M a_t + bias at positions t.

    Attributes
    ----------
    inputs
        The a_t: a function of the number of examples that gives ``(b, T, i)``.
    outputs
        What the map returned, with its graph.
    channels
        The dimension of `outputs` that holds the entries of y_t.
    """

    inputs: Callable[[int], Tensor]
    outputs: Tensor
    channels: int

    def slopes(self, of_outputs: Tensor, count: int) -> Tensor:
        """Derivatives with respect to `outputs`, by example and position: ``(b, T, o)``."""
        return _positions(of_outputs.movedim(self.channels, -1), count)


class LinearMaps(TorchFunctionMode):
    """Records the linear maps that are evaluated with some tensors as their weights and biases.

    Parameters
    ----------
    tensors
        The tensors by their numbers.

    Attributes
    ----------
    uses
        The maps by their weights and biases, in the order of their evaluation.
    otherwise
        Numbers of tensors that something else is computed from, too.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._numbers = {id(tensor): number for number, tensor in tensors.items()}
        self._kept = tensors  # an address that is given free may be another tensor's
        self.uses: dict[Key, list[Use]] = defaultdict(list)
        self.otherwise: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute the function, and record what it is."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        met = self._numbers_of(_tensors((args, kwargs)))
        if not met or not any(one.requires_grad for one in _tensors(result)):
            return result
        read = _READERS.get(function)
        if read is None:
            self.otherwise |= met
            return result
        weight, bias, inputs, channels = read(*args, **kwargs)
        key = (self._numbers.get(id(weight)), self._numbers.get(id(bias)))
        self.otherwise |= met - self._numbers_of((weight, bias))
        if key != (None, None):
            self.uses[key].append(Use(inputs, result, channels))
        # What comes next may write into its argument: then the recorded outputs stay.
        return result.clone()

    def _numbers_of(self, given: Iterable[Tensor | None]) -> set[int]:
        return {self._numbers[id(one)] for one in given if id(one) in self._numbers}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _positions(rows: Tensor, count: int) -> Tensor:
    """Rows ``(..., d)`` by example ``(b, T, d)``: each example's stand together."""
    if math.prod(rows.shape[:-1]) % count:
        raise ValueError(f"{tuple(rows.shape)} does not hold {count} examples")
    return rows.reshape(count, -1, rows.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    inputs = input.detach()
    return weight, bias, lambda count: _positions(inputs, count), -1


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if groups != 1:  # as many maps as groups
        return None, None, None, 1
    inputs, sizes = input.detach(), weight.shape[2:]
    return weight, bias, lambda _: _windows(inputs, sizes, stride, padding, dilation), 1


def _windows(
    inputs: Tensor, sizes: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """What a convolution's kernel meets at each position, ``(b, T, i)``, as in its weight."""
    dims = len(sizes)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    reach = [apart * (size - 1) for size, apart in zip(sizes, dilations)]
    if padding == "same":
        sides = [(total // 2, total - total // 2) for total in reach]
    else:
        sides = [(side, side) for side in _each(0 if padding == "valid" else padding, dims)]
    windows = nn.functional.pad(inputs, [side for pair in reversed(sides) for side in pair])
    for dim in range(dims):
        windows = windows.unfold(2 + dim, reach[dim] + 1, strides[dim])[..., :: dilations[dim]]
    # (b, channels, positions..., kernel...)
    return windows.movedim(1, 1 + dims).flatten(1 + dims).flatten(1, dims)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A setting a dimension."""
    given = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return given * dims if len(given) == 1 else given


_READERS: dict[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    nn.functional.conv1d: _convolution,
    nn.functional.conv2d: _convolution,
    nn.functional.conv3d: _convolution,
}
