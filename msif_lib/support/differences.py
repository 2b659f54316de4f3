"""A scalar function of the parameters near one point: derivatives, and what differences say.

Central differences of the function are held against its gradient, those of the gradient against
a product with its Hessian. A fault are differences that settle elsewhere: kinks and rounding alone
are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from msif_lib.support.functional import graph_nodes
from msif_lib.support.parameters import Block, Parameters
from msif_lib.support.substitutes import Padding

# Steps in units of the parameters' size, in the order in which they are tried. In double precision
# the small ones keep clear of kinks, the large ones of what a model rounds to single precision.
_DOUBLE_STEPS, _SINGLE_STEPS = (1e-5, 1e-7, 1e-9, 3e-3, 3e-4), (3e-3, 1e-3, 1e-2, 3e-4)
# Along a gradient in single precision: shares of the loss that a step changes, and the share of its
# size by which it moves a parameter at most.
_CHANGES, _FARTHEST = (0.01, 0.03, 0.003, 0.001), 0.003
# What differences may be off, relatively. In double precision those of clean models stay below
# 1e-9; the faults that were met are above 5e-3. In single precision, ε ≈ 1e-7, the best step leaves
# ε^(2/3) ≈ 3e-5 of a value, and more of a small slope.
_DOUBLE_TOLERANCE, _SINGLE_TOLERANCE = 1e-4, 5e-3
# Differences have settled where what they still move is this share of what they are off.
_SETTLED = 0.2
# Directions that are asked about a fault; one alone may hide it.
_WITNESSES = 4
# A difference says nothing below so many roundings of what is subtracted.
_ROUNDINGS = 4
# The rounding of numbers of so many bytes.
_EPS = {8: torch.finfo(torch.float64).eps, 4: torch.finfo(torch.float32).eps,
        2: torch.finfo(torch.bfloat16).eps, 1: 0.25}  # fmt: skip
# Powers of two, by which a gradient is multiplied without rounding.
_SCALES = (2.0**20, 2.0**-20)
# How far multiples must stay from the largest and the smallest numbers.
_FAR = 1e10
# The step and the number of roundings by which a loss in half precision depends on a parameter.
_COARSE_STEPS, _COARSE_ROUNDINGS = (0.2, 0.1), 2
# The share of the largest below which the parts of a gradient are held against the largest.
_SMALL = 1e-2
# No direction makes up for slopes that are smaller than this share of the largest.
_HIDDEN = 1e-3
# What a multiple of a gradient may be off, for numbers that are too small to be multiplied.
_BENT = 1e-4
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
        self.digits = size = _coarsest(self.total)
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
            if found.settled and self._agreed(order, block):
                return found
        if self.digits == 4 and order == 1:
            parts = [block[len(block) * k // n : len(block) * (k + 1) // n]
                     for n in (1, 2, 4) for k in range(n)]  # fmt: skip
            for part in filter(None, dict.fromkeys(parts)):
                found = self._along_gradient(part)
                if found.settled:
                    return found
        if self.digits < 4 and order == 1:
            tries = (self._detached_coarsely(block) for _ in range(_WITNESSES))
            return next((found for found in tries if found), None)
        return None

    def bent(self) -> Block:
        """Parameters of whose gradient a multiple is not that of a multiple of the losses.

        Of a backward pass that is linear all are exact: the multiples are powers of two.
        """
        if not (self.total.requires_grad and self.digits >= 4):
            return ()
        sizes = self._sizes(self.gradient)
        lower = torch.maximum(sizes, _DROWNED * sizes.max())
        off = torch.zeros_like(sizes, dtype=torch.bool)
        known = torch.finfo(torch.float32 if self.digits == 4 else self.total.dtype)
        for scale in _SCALES:
            if not known.tiny * _FAR < float(sizes.max()) * scale < known.max / _FAR:
                continue
            (scaled,) = torch.autograd.grad(
                self.total, self._leaf, self.total.new_tensor(scale), retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            off |= self._sizes(scaled / scale - self.gradient) > _BENT * lower
        return tuple(off.nonzero().flatten().tolist())

    def culprits(self, order: int, block: Block) -> Block:
        """Of the parameters with a fault, the last that has it, found by halving."""
        while len(block) > 1:
            half = len(block) // 2
            parts = block[half:], block[:half]
            plain = order == 1 and self.digits == 4 and self._along_gradient(block).settled
            found = next((part for part in parts if self._off(order, part, plain)), None)
            if found is None:
                break
            block = found
        return block

    def _off(self, order: int, block: Block, plain: bool) -> bool:
        """Whether a block has a fault, which along the gradient is `plain` or not."""
        if plain and self._along_gradient(block).settled:
            return True
        if plain and self._sizes(self.gradient)[list(block)].all():
            return self._agreed(order, block)
        if self.digits < 4:
            return any(self._detached_coarsely(block) for _ in range(_WITNESSES))
        return any(self._compared(order, block).error for _ in range(_WITNESSES))

    def _agreed(self, order: int, block: Block) -> bool:
        """Whether most directions find a fault."""
        found = [self._compared(order, block).settled for _ in range(_WITNESSES)]
        return sum(found) > _WITNESSES // 2

    def _compared(self, order: int, block: Block) -> Fault:
        return (self._of_losses if order == 1 else self._of_gradients)(block)

    def _of_losses(self, block: Block) -> Fault:
        v = self.direction(block)
        # As it is a sum of terms of either sign, not the slope itself.
        scale = (self.gradient * v).norm() + _DROWNED * self.value.abs()
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)

        def measure(x: Tensor, slack: float = 0.0) -> float:
            return float((x.abs() - slack).clamp_min(0) / scale)

        exact = self.gradient @ v
        return self._settled(1, partial(self._at, v), self.value, exact, measure, self._steps)

    def _at(self, v: Tensor, step: float) -> Tensor:
        """The function a step away."""
        with self._padding.repeated(), torch.no_grad():
            return self._function(self._leaf + step * v)

    @cached_property
    def _usual(self) -> float:
        """The size of the function at other parameters of the same sizes, and here."""
        v = self._random(self._parameters.all, torch.ones(len(self._units), device="cpu"))
        values = [self.value]
        for sign in (1, -1):
            try:
                with self._padding.repeated(), torch.no_grad():
                    values.append(self._function(sign * v))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever the user's code says to other parameters
                continue
        return max(float(value.abs()) for value in values if value.isfinite())

    def _along_gradient(self, block: Block) -> Fault:
        """Differences in single precision where slopes are largest, by the sum of some directions.

        There terms cannot cancel, and kinks are many small ones to either side.
        """
        sizes = self._sizes(self.gradient)
        least = torch.maximum(sizes, _SMALL * sizes[list(block)].max())
        shares = [unit**2 / float(size) ** 2 if size else 0.0
                  for unit, size in zip(self._units, least)]  # fmt: skip
        off = total = 0.0
        found = none = Fault(1, 0.0, 0.0, 0.0, False)
        for _ in range(_WITNESSES):
            weights = torch.empty_like(self.gradient).uniform_(0.5, 1.5, generator=self._generator)
            parts = zip(self._parameters.views(weights), self._parameters.views(self.gradient))
            v = torch.cat([
                (weight * part * (share if number in block else 0.0)).reshape(-1)
                for number, (share, (weight, part)) in enumerate(zip(shares, parts))
            ])  # fmt: skip
            exact = self.gradient @ v
            if not exact > 0:
                return none
            moves = [float(part.norm()) / (unit * max(1, part.numel()) ** 0.5)
                     for unit, part in zip(self._units, self._parameters.views(v))]  # fmt: skip
            whole = min(float(self.value.abs() / exact), _FARTHEST / _CHANGES[0] / max(moves))
            if not whole > 0:
                return none
            steps = [share * whole for share in _CHANGES]

            def measure(x: Tensor, slack: float = 0.0, exact: Tensor = exact) -> float:
                return float((x.abs() - slack).clamp_min(0) / exact)

            one = self._settled(1, partial(self._at, v), self.value, exact, measure, steps)
            if not one.settled:
                return none
            off, total = off + one.measured - one.exact, total + one.exact
            found = one
        return replace(found, settled=abs(off) > self._tolerance * total, error=abs(off) / total)

    def _detached_coarsely(self, block: Block) -> Fault | None:
        """What no gradient reaches and large steps tell of, in half precision too."""
        parts = self._parameters.views(self.gradient)
        block = tuple(number for number in block if not parts[number].any())
        if not block or not self.finite:
            return None
        v = self._random(block, torch.ones(len(self._units), device="cpu"))
        rounding = _COARSE_ROUNDINGS * _EPS[self.digits] * float(self.value.abs())
        slopes = []
        for step in _COARSE_STEPS:
            up, down = self._at(v, step), self._at(v, -step)
            change, bend = float(up - down), float(up - 2 * self.value + down)
            if not abs(change) > max(rounding, 2 * abs(bend)):
                return None
            slopes.append(change / (2 * step))
        if abs(slopes[0] - slopes[1]) > 0.5 * abs(slopes[1]):
            return None
        return Fault(1, float("inf"), 0.0, abs(slopes[1]), True)

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

        def measure(x: Tensor, slack: float = 0.0) -> float:
            return float(((self._sizes(x) - slack).clamp_min(0) / scales).max())

        return self._settled(2, at, self.gradient, exact, measure, self._steps)

    def _settled(
        self,
        order: int,
        at: Callable[[float], Tensor],
        here: Tensor,
        exact: Tensor,
        measure: Callable[..., float],
        steps: Sequence[float],
    ) -> Fault:
        """How central differences contradict `exact`, by steps at which they rise above rounding.

        Where nothing has a size, `measure` divides zero by zero, and nothing is contradicted.
        """
        off: list[tuple[float, Tensor, float]] = []
        best, measured = float("inf"), float("nan")
        for step in steps:
            up, down = at(step), at(-step)
            slope = (up - down) / (2 * step)
            error = measure(slope - exact)
            if error <= self._tolerance:
                return Fault(order, 0.0, float(exact.norm()), float(slope.norm()), False)
            rounding = _ROUNDINGS * _EPS[self.digits] * self._usual / step
            if not measure(slope - exact, rounding) > self._tolerance:
                continue
            if error < best:
                best, measured = error, float(slope.norm())
            # At a kink the slopes to both sides differ, and so they do where rounding rules.
            if measure(up - 2 * here + down) / step <= _SETTLED * error:
                off.append((step, slope, error))
        off.sort(key=lambda one: one[0])
        if steps is not self._steps:
            off = off[:2]  # larger ones may agree on a slope that is nought, where all is saturated
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
