"""A scalar function of the parameters near one point: derivatives, and what differences say.

Central differences of the function are held against its gradient, those of the gradient against
a product with its Hessian. A fault are differences that settle elsewhere: kinks and rounding alone
are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from msif_lib.support.functional import graph_nodes
from msif_lib.support.parameters import Block, Parameters
from msif_lib.support.substitutes import Padding

# Steps in units of the parameters' size, in the order in which they are tried. In double precision
# the small ones keep clear of kinks, the large ones of what a model rounds to single precision.
_DOUBLE_STEPS, _SINGLE_STEPS = (1e-5, 1e-7, 1e-9, 3e-3, 3e-4), (3e-3, 1e-3, 1e-2, 3e-4)
# What differences may be off, relatively. In double precision those of clean models stay below
# 1e-9; the faults that were met are above 5e-3. In single precision, ε ≈ 1e-7, the best step leaves
# ε^(2/3) ≈ 3e-5 of a value, and more of a small slope.
_DOUBLE_TOLERANCE, _SINGLE_TOLERANCE = 1e-4, 5e-3
# Differences have settled where what they still move is this share of what they are off.
_SETTLED = 0.2
# Directions that are asked about a fault; one alone may hide it.
_WITNESSES = 4
# The share of the largest below which the parts of a gradient are held against the largest.
_SMALL = 1e-2
# No direction makes up for slopes that are smaller than this share of the largest.
_HIDDEN = 1e-3
# The share of a value below which its slopes drown in rounding.
_DROWNED = 1e-5


@dataclass(frozen=True)
class Fault:
    """A derivative along a direction, and what finite differences say of it.

    Attributes
    ----------
    order
        1: of the function; 2: of its gradient.
    error
        What the best difference is off, relatively; 0 within the tolerance.
    exact, measured
        The sizes of both.
    settled
        Whether differences settle elsewhere.
    """

    order: int
    error: float
    exact: float
    measured: float
    settled: bool


class Point:
    """A scalar function near one vector, its derivatives there and their differences.

    Parameters
    ----------
    function
        Of the flat vector.
    theta
        The vector ``(p,)``, in double or in single precision.
    parameters
        Tell which entries are whose.
    generator
        Gives directions.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        theta: Tensor,
        parameters: Parameters,
        generator: torch.Generator,
    ) -> None:
        self._function, self._parameters, self._generator = function, parameters, generator
        self._padding = Padding()
        self.theta, self._leaf = theta, theta.detach().clone().requires_grad_()
        with self._padding.recorded():
            self.total = function(self._leaf)
        self.value = self.total.detach()
        self._slope = self._differentiated(self.total, self._leaf, True)
        self.gradient = self._slope.detach()
        self._units = units(self._parameters.views(theta))
        size = _coarsest(self.total)
        self._steps = _DOUBLE_STEPS if size == 8 else _SINGLE_STEPS
        self._tolerance = _DOUBLE_TOLERANCE if size == 8 else _SINGLE_TOLERANCE
        # In half precision differences say nothing. In single precision steps are so large that
        # kinks of many activations add up to what looks like second derivatives.
        self._orders = {8: (1, 2), 4: (1,)}.get(size, ())

    @staticmethod
    def _differentiated(value: Tensor, leaf: Tensor, create_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        (gradient,) = torch.autograd.grad(
            value, leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return gradient

    @property
    def finite(self) -> bool:
        """Whether the value and its gradient are."""
        return bool(self.value.isfinite() & self.gradient.isfinite().all())

    def _sizes(self, vector: Tensor) -> Tensor:
        """The norm of each parameter's part of a derivative, in its units ``(parameters,)``."""
        parts = self._parameters.views(vector)
        return torch.stack([unit * part.norm() for unit, part in zip(self._units, parts)])

    def direction(self, block: Block | None = None) -> Tensor:
        """A random direction in some parameters, in which no slope hides behind another's."""
        sizes = self._sizes(self.gradient)
        least = sizes[sizes > 0].min() if sizes.any() else sizes.max()
        aim = torch.maximum(least, _HIDDEN * sizes.max())
        shares = (aim / sizes).nan_to_num(1.0).clamp(max=1.0)
        return self._random(self._parameters.all if block is None else block, shares)

    def _random(self, block: Block, shares: Tensor) -> Tensor:
        """A random direction in some parameters, of these shares of their units."""
        scales = [unit * share for unit, share in zip(self._units, shares.tolist())]
        parts = [torch.zeros_like(part) for part in self._parameters.views(self.gradient)]
        for number in block:
            parts[number].normal_(generator=self._generator).mul_(scales[number])
        return torch.cat([part.reshape(-1) for part in parts])

    def fault(self, order: int, block: Block, directions: int = 1) -> Fault | None:
        """What most of further directions find as well, where one of so many finds a fault.

        Parameters
        ----------
        order
            1: losses against the gradient; 2: gradients against products with the Hessian.
        block
            The parameters that directions move.
        directions
            Directions tried.
        """
        for _ in range(directions if order in self._orders else 0):
            found = self._compared(order, block)
            if found.settled:
                others = [self._compared(order, block).settled for _ in range(_WITNESSES)]
                return found if sum(others) > _WITNESSES // 2 else None
        return None

    def culprits(self, order: int, block: Block) -> Block:
        """Of the parameters with a fault, the last that has it, found by halving."""
        while len(block) > 1:
            half = len(block) // 2
            parts = block[half:], block[:half]
            found = next((part for part in parts if self._off(order, part)), None)
            if found is None:
                break
            block = found
        return block

    def _off(self, order: int, block: Block) -> bool:
        return any(self._compared(order, block).error for _ in range(_WITNESSES))

    def _compared(self, order: int, block: Block) -> Fault:
        return (self._of_losses if order == 1 else self._of_gradients)(block)

    def _of_losses(self, block: Block) -> Fault:
        v = self.direction(block)
        # As it is a sum of terms of either sign, not the slope itself.
        scale = (self.gradient * v).norm() + _DROWNED * self.value.abs()

        def at(step: float) -> Tensor:
            with self._padding.repeated(), torch.no_grad():
                return self._function(self._leaf + step * v)

        exact = self.gradient @ v
        return self._settled(1, at, self.value, exact, lambda x: float(x.abs() / scale))

    def _of_gradients(self, block: Block) -> Fault:
        v = self._random(block, torch.ones(len(self._units), device="cpu"))
        exact = torch.zeros_like(v)
        if self._slope.requires_grad:
            (exact,) = torch.autograd.grad(
                self._slope, self._leaf, v, retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
        sizes = self._sizes(exact)
        lower = torch.maximum(self._sizes(self.gradient).norm(), self.value.abs())
        scales = sizes.clamp_min(torch.maximum(_SMALL * sizes.max(), _DROWNED * lower))

        def at(step: float) -> Tensor:
            leaf = (self._leaf.detach() + step * v).requires_grad_()
            with self._padding.repeated():
                return self._differentiated(self._function(leaf), leaf)

        def measure(x: Tensor) -> float:
            return float((self._sizes(x) / scales).max())

        return self._settled(2, at, self.gradient, exact, measure)

    def _settled(
        self,
        order: int,
        at: Callable[[float], Tensor],
        here: Tensor,
        exact: Tensor,
        measure: Callable[[Tensor], float],
    ) -> Fault:
        """How central differences contradict `exact`.

        Where nothing has a size, `measure` divides zero by zero, and nothing is contradicted.
        """
        off: list[tuple[float, Tensor, float]] = []
        best, measured = float("inf"), float("nan")
        for step in self._steps:
            up, down = at(step), at(-step)
            slope = (up - down) / (2 * step)
            error = measure(slope - exact)
            if error <= self._tolerance:
                return Fault(order, 0.0, float(exact.norm()), float(slope.norm()), False)
            if error < best:
                best, measured = error, float(slope.norm())
            # At a kink the slopes to both sides differ, and so they do where rounding rules.
            if measure(up - 2 * here + down) / step <= _SETTLED * error:
                off.append((step, slope, error))
        off.sort(key=lambda one: one[0])
        settled = any(
            measure(slope - other) <= _SETTLED * min(error, its)
            for (_, slope, error), (_, other, its) in pairwise(off)
        )
        return Fault(order, best, float(exact.norm()), measured, settled)


def _coarsest(value: Tensor) -> int:
    """Bytes of the shortest floating-point numbers that a value is differentiated through."""
    met = [one for node in graph_nodes(value) for one in getattr(node, "_input_metadata", ())]
    dtypes = {one.dtype for one in met} | {value.dtype}
    return min(dtype.itemsize for dtype in dtypes if dtype.is_floating_point)


def units(parts: Sequence[Tensor]) -> list[float]:
    """The size of each parameter, the root of its mean square; that of all where it is zero."""
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    norms = torch.stack([part.detach().to(dtype).norm() for part in parts])
    roots = norms.new_tensor([max(1, part.numel()) for part in parts]).sqrt()
    overall = float(norms.norm() / roots.norm()) or 1.0
    return [size or overall for size in (norms / roots).tolist()]
