"""EK-FAC: the Gauss-Newton matrix of a stage by its diagonal in Kronecker-factored eigenbases.

For a layer with outputs y_it = M a_it at positions t (one of a linear layer, many of a
convolution or of tokens), M its weight beside its bias, and the modes u_ic of the loss's curvature
in the model's outputs, w_i ℓ''_i = Σ_c u_ic u_icᵀ, let g_ict be the derivatives of u_icᵀ f_i in
y_it. With

    A = Σ_i w_i Σ_t a_it a_itᵀ = U_A · U_Aᵀ,     B = Σ_ict g_ict g_ictᵀ = U_B · U_Bᵀ

the layer's block is Q Λ Qᵀ with Q = U_B ⊗ U_A, and Λ is the diagonal of the exact matrix in that
basis (George et al. 2018),

    Λ_jk = (1/N) Σ_ic ((U_Bᵀ G_ic U_A)_jk)²,     G_ic = Σ_t g_ict a_itᵀ.

So of all block matrices with these eigenvectors it is the nearest to the exact one. Nothing is
sampled: ℓ''_i is taken apart as it is, in as many backward passes as it has modes. Parameters that
are no layer's (of a normalisation, a table, a function) have the diagonal of the exact matrix in
the basis that they come in, Q = I, by the same rule. Weight decay adds its l2 to every eigenvalue.

The matrix is factorised once. Its products, its inverse and other functions of it cost no further
pass over data, whatever the number of right-hand sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor
from torch.func import vjp, vmap

from msif_lib.curvature import BlockName, numbers_of
from msif_lib.preconditioner import curvature_in_outputs, modes_of
from msif_lib.solvers import FailedSolve, Solution, SolveReport, SolverWarning
from msif_lib.stage import Stage
from msif_lib.support.arguments import check_vector, dense, not_negative
from msif_lib.support.data import Nested, map_leaves
from msif_lib.support.linear_maps import Key, LinearMaps, Use
from msif_lib.support.notices import warn_caller
from msif_lib.support.operators import LinearOperator
from msif_lib.support.parameters import Block, Parameters
from msif_lib.support.seen import Seen

# A layer with more inputs or outputs has factors too large to take apart.
_LARGEST_SIDE = 2**13
# Entries of the largest block of gradients of a layer held at once (64 MB in float64).
_GRADIENTS = 2**23
# As a preconditioner, no eigenvalue is below this share of the largest: what the approximation
# leaves out is not zero.
_FLOOR = 1e-4


@dataclass(frozen=True)
class _Layer:
    """A linear map whose weight, bias or both are in the block.

    Attributes
    ----------
    key
        As which its uses are recorded.
    numbers
        Of its parameters in the block, the weight before the bias.
    sides
        Outputs o and inputs i, with one for the bias.
    """

    key: Key
    numbers: Block
    sides: tuple[int, int] = (0, 0)

    def inputs(self, use: Use, count: int, dtype: torch.dtype) -> Tensor:
        """The a_it ``(b, T, i)``, with 1 for the bias."""
        whole = use.inputs(count).to(dtype)
        ones = whole.new_ones(*whole.shape[:-1], 1)
        weight, bias = (number in self.numbers for number in self.key)
        return torch.cat([part for part, has in ((whole, weight), (ones, bias)) if has], -1)


@dataclass(frozen=True)
class _Batch:
    """What one batch gives of each layer: inputs, and derivatives mode by mode."""

    layers: list[_Layer]
    maps: LinearMaps
    outputs: Tensor
    modes: Tensor
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return len(self.outputs)

    def inputs(self) -> list[Tensor]:
        """The a_it of each layer, ``(b, T, i)``; a layer used again has further positions."""
        return [
            torch.cat([layer.inputs(use, self.count, self.dtype) for use in self.uses(layer)], 1)
            for layer in self.layers
        ]

    def uses(self, layer: _Layer) -> list[Use]:
        return self.maps.uses[layer.key]

    def slopes(self) -> Iterator[list[Tensor]]:
        """The g_ict of each layer, ``(b, T, o)``, for one c after the other."""
        mass = self.modes.square().sum((0, 2))
        for c in (mass > 10 * torch.finfo(mass.dtype).eps * mass.sum()).nonzero()[:, 0].tolist():
            yield self.slopes_of(self.modes[:, c].reshape(self.outputs.shape))

    def slopes_of(self, cotangent: Tensor) -> list[Tensor]:
        """The same for a cotangent of the outputs."""
        uses = [use for layer in self.layers for use in self.uses(layer)]
        if not uses:
            return []
        found = torch.autograd.grad(
            self.outputs,
            [use.outputs for use in uses],
            cotangent,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        rows = iter([use.slopes(one, self.count) for use, one in zip(uses, found)])
        return [
            torch.cat([next(rows) for _ in self.uses(layer)], 1).to(self.dtype)
            for layer in self.layers
        ]


class _Factors:
    """The passes over a stage's data from which bases and eigenvalues come."""

    def __init__(self, stage: Stage, block: Block) -> None:
        self.stage, self.block, self.at = stage, block, stage.vector()
        self.dtype = torch.promote_types(stage.dtype, torch.float32)
        self.layers = self._layers()
        known = {number for layer in self.layers for number in layer.numbers}
        self.others: Block = tuple(number for number in block if number not in known)

    def _recorded(self, inputs: Nested) -> tuple[Tensor, LinearMaps]:
        leaf = self.stage.parameters.take(self.at, self.block).detach().requires_grad_()
        parts = self.stage.parameters.parts(self.at, (self.block, leaf))
        with LinearMaps({number: parts[number] for number in self.block}) as maps:
            outputs = self.stage.batch_outputs(parts, inputs)
        return outputs, maps

    def _layers(self) -> list[_Layer]:
        """The layers that are linear maps and nothing else, as seen on the first examples."""
        first = range(min(2, self.stage.size))
        inputs, _ = next(iter(self.stage.read(len(first), first)))
        outputs, maps = self._recorded(inputs)
        if not isinstance(outputs, Tensor) or len(outputs) != len(first):
            raise ValueError(
                "EK-FAC: the model must return one tensor with the examples as first dimension, "
                f'not {type(outputs).__name__}; wrap it, or take curvature="hessian"'
            )
        if not outputs.requires_grad:  # nothing depends on the block
            return []
        keys = list(maps.uses)
        met = [number for key in keys for number in key if number is not None]
        maps.otherwise.update(number for number in met if met.count(number) > 1)
        layers = []
        for key in keys:
            numbers = [n for n in key if n is not None and n not in maps.otherwise]
            shared = [number in self.stage.shared for number in numbers]
            # What is shared and what is the stage's own may differ by a constant: see `scaled`.
            split = [numbers] if len({*shared}) < 2 else [[number] for number in numbers]
            layers += [_Layer(key, tuple(some)) for some in split if some]
        measured = [self._measured(layer, outputs, maps) for layer in layers]
        return [layer for layer in measured if 0 < max(layer.sides) <= _LARGEST_SIDE]

    def _measured(self, layer: _Layer, outputs: Tensor, maps: LinearMaps) -> _Layer:
        """The layer with its sides; they stay zero where what it meets does not stand by example.

        That is so where no derivative of the first example's outputs belongs to the second.
        """
        count = len(outputs)
        one = _Batch([layer], maps, outputs, outputs, self.dtype)
        chance = torch.Generator().manual_seed(0)
        cotangent = torch.randn(outputs.shape, generator=chance, dtype=torch.float64).to(outputs)
        cotangent[1:] = 0
        try:
            (inputs,), (slopes,) = one.inputs(), one.slopes_of(cotangent)
        except ValueError:
            return layer
        if len(slopes) != count or slopes[1:].any():
            return layer
        return replace(layer, sides=(slopes.shape[2], inputs.shape[2]))

    def batches(self) -> Iterator[tuple[_Batch, Tensor]]:
        """All the data, evaluated, with the weights of the examples."""
        for (inputs, targets), weights in self.stage.weighted_batches():
            outputs, maps = self._recorded(inputs)
            self._require_same(maps)
            modes = self._modes(outputs, targets, weights)
            yield _Batch(self.layers, maps, outputs, modes, self.dtype), weights.to(self.dtype)

    def _require_same(self, maps: LinearMaps) -> None:
        """Refuse a model in which a layer is another thing for some examples."""
        for layer in self.layers:
            if layer.key not in maps.uses or maps.otherwise & {*layer.numbers}:
                named = ", ".join(self.stage.names[number] for number in layer.numbers)
                raise ValueError(
                    f"EK-FAC: the model uses {named} in one way for some examples and in another "
                    'for others; take curvature="gauss-newton"'
                )

    def _modes(self, outputs: Tensor, targets: Nested, weights: Tensor) -> Tensor:
        try:
            with self.stage.kernels():
                curvature = curvature_in_outputs(self.stage, outputs.detach(), targets, weights)
        except ValueError as error:
            raise ValueError(
                f'EK-FAC: {error}; take curvature="gauss-newton", which needs no such limit'
            ) from error
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what vmap says of a loss for which it has no rule
            raise ValueError(
                "EK-FAC: the loss's curvature cannot be taken by torch.func, an example at a "
                f'time ({error!s:.120}); take curvature="gauss-newton"'
            ) from error
        return modes_of(curvature.to(self.dtype)).to(outputs)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.at.device)

    def bases(self) -> list[tuple[Tensor, Tensor]]:
        """U_B ``(o, o)`` and U_A ``(i, i)`` of each layer."""
        sums = [[self._zeros(side, side) for side in layer.sides] for layer in self.layers]
        for batch, weights in self.batches():
            for (_, of_inputs), a in zip(sums, batch.inputs()):
                of_inputs += (weights[:, None, None] * a).flatten(0, 1).T @ a.flatten(0, 1)
            for slopes in batch.slopes():
                for (of_slopes, _), g in zip(sums, slopes):
                    of_slopes += g.flatten(0, 1).T @ g.flatten(0, 1)
        reduced = [[self.stage.reader.all_reduce(one) for one in pair] for pair in sums]
        return [tuple(torch.linalg.eigh((one + one.T) / 2)[1] for one in pair) for pair in reduced]

    def values(self, bases: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Λ ``(o, i)`` of each layer."""
        sums = [self._zeros(*layer.sides) for layer in self.layers]
        for batch, _ in self.batches():
            inputs = [a @ right for a, (_, right) in zip(batch.inputs(), bases)]
            for slopes in batch.slopes():
                for total, g, a, (left, _) in zip(sums, slopes, inputs, bases):
                    total += _second_moments(g @ left, a)
        return [self.stage.reader.all_reduce(total) / self.stage.size for total in sums]

    def diagonal(self) -> Tensor:
        """Of the exact matrix, on the parameters that are no layer's."""
        parameters, stage = self.stage.parameters, self.stage
        total = self._zeros(parameters.count(self.others))
        if not self.others:
            return total
        rows = self._vectorised if stage.can.batching_rules else self._one_by_one
        for batch, weights in stage.weighted_batches():
            for start in range(0, len(weights), stage.gradients_at_once):
                some = slice(start, start + stage.gradients_at_once)
                inputs, targets = map_leaves(itemgetter(some), batch)
                with torch.no_grad():
                    outputs = stage.batch_outputs(parameters.views(self.at), inputs)
                for modes in self._modes(outputs, targets, weights[some]).unbind(1):
                    found = rows(modes.reshape(outputs.shape), inputs)
                    total += found.to(self.dtype).square().sum(0)
        return stage.reader.all_reduce(total) / stage.size

    def _outputs_of_one(self, leaf: Tensor, inputs: Nested) -> Tensor:
        """The outputs of one example, given without the dimension of examples."""
        parts = self.stage.parameters.parts(self.at, (self.others, leaf))
        outputs: Tensor = self.stage.batch_outputs(parts, map_leaves(itemgetter(None), inputs))[0]
        return outputs

    def _vectorised(self, cotangents: Tensor, inputs: Nested) -> Tensor:
        """Derivatives of u_iᵀ f_i ``(b, p)`` by what is no layer's."""
        leaf = self.stage.parameters.take(self.at, self.others)

        def row(cotangent: Tensor, inputs: Nested) -> Tensor:
            return vjp(lambda leaf: self._outputs_of_one(leaf, inputs), leaf)[1](cotangent)[0]

        return vmap(row)(cotangents, inputs)

    def _one_by_one(self, cotangents: Tensor, inputs: Nested) -> Tensor:
        """The same, an example at a time, of models for which there are no batching rules."""
        rows = []
        for index, cotangent in enumerate(cotangents):
            leaf = self.stage.parameters.take(self.at, self.others).detach().requires_grad_()
            outputs = self._outputs_of_one(leaf, map_leaves(itemgetter(index), inputs))
            rows.append(torch.autograd.grad(outputs, leaf, cotangent, materialize_grads=True)[0])
        return torch.stack(rows)


def _second_moments(slopes: Tensor, inputs: Tensor) -> Tensor:
    """Σ_i (Σ_t g_it a_itᵀ)² entry by entry, ``(o, i)``."""
    if slopes.shape[1] == 1:
        return slopes[:, 0].square().T @ inputs[:, 0].square()
    at_once = max(1, _GRADIENTS // (slopes.shape[2] * inputs.shape[2]))
    pairs = zip(slopes.split(at_once), inputs.split(at_once))
    return torch.stack([(g.mT @ a).square().sum(0) for g, a in pairs]).sum(0)


class Eigenbasis:
    """Q: Kronecker products of the layers' bases, and the identity on other parameters.

    The order of coordinates is that of the layers, then of the other parameters.
    """

    def __init__(
        self,
        parameters: Parameters,
        block: Block,
        layers: list[_Layer],
        bases: list[tuple[Tensor, Tensor]],
        others: Block,
    ) -> None:
        self._sizes = {number: parameters.count((number,)) for number in block}
        self._layers, self._bases, self._others = layers, bases, others
        self.size = sum(self._sizes.values())

    def _matrices(self, columns: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of each layer its rows as ``(k, o, i)``, and the rows ``(k, p)`` of other parameters."""
        across = columns.T.contiguous()
        rows = dict(zip(self._sizes, across.split([*self._sizes.values()], 1)))
        k = columns.shape[1]
        matrices = [
            torch.cat([rows[number].reshape(k, layer.sides[0], -1) for number in layer.numbers], 2)
            for layer in self._layers
        ]
        others = [rows[number] for number in self._others]
        return matrices, torch.cat(others, 1) if others else across[:, :0]

    def coordinates(self, columns: Tensor) -> Tensor:
        """Qᵀ x for columns ``(p, k)``."""
        matrices, others = self._matrices(columns)
        turned = [
            (left.T @ (matrix @ right)).flatten(1)
            for matrix, (left, right) in zip(matrices, self._bases)
        ]
        return torch.cat([*turned, others], 1).T

    def columns(self, coordinates: Tensor) -> Tensor:
        """Q x for coordinates ``(p, k)``."""
        k = coordinates.shape[1]
        sizes = [layer.sides[0] * layer.sides[1] for layer in self._layers]
        *parts, others = coordinates.T.split([*sizes, self.size - sum(sizes)], 1)
        rows = {}
        for layer, part, (left, right) in zip(self._layers, parts, self._bases):
            matrix = left @ (part.reshape(k, *layer.sides) @ right.T)
            widths = [self._sizes[number] // layer.sides[0] for number in layer.numbers]
            for number, piece in zip(layer.numbers, matrix.split(widths, 2)):
                rows[number] = piece.flatten(1)
        widths = [self._sizes[number] for number in self._others]
        rows |= dict(zip(self._others, others.split(widths, 1) if widths else ()))
        return torch.cat([rows[number] for number in self._sizes], 1).T.contiguous()

    def of_diagonal(self, diagonal: Tensor) -> Tensor | None:
        """Qᵀ diag(d) Q ``(p,)`` where that is diagonal, d being constant on each layer."""
        matrices, others = self._matrices(diagonal[:, None])
        if not all((matrix == matrix.flatten()[0]).all() for matrix in matrices):
            return None
        return torch.cat([matrix.flatten() for matrix in (*matrices, others)])


class InEigenbasis(LinearOperator):
    """Q diag(s) Qᵀ for an orthonormal Q; products cost two changes of the basis.

    Parameters
    ----------
    basis
        Q.
    eigenvalues
        s, ``(p,)``.
    dtype
        Of the vectors that it is applied to.
    """

    def __init__(self, basis: Eigenbasis, eigenvalues: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = (basis.size,) * 2, dtype, eigenvalues.device
        self._basis, self.eigenvalues = basis, eigenvalues

    def _product(self, columns: Tensor) -> Tensor:
        coordinates = self._basis.coordinates(columns.to(self.eigenvalues))
        return self._basis.columns(self.eigenvalues[:, None] * coordinates).to(columns.dtype)


class EKFACPreconditioner:
    """P⁻¹ = S Sᵀ for P near an EK-FAC matrix, positive definite; S is symmetric.

    Parameters
    ----------
    root
        S.
    """

    def __init__(self, root: InEigenbasis) -> None:
        self._root = root

    def __str__(self) -> str:
        return "EK-FAC"

    def root(self, columns: Tensor) -> Tensor:
        """S x for columns ``(p, k)``."""
        return self._root @ columns

    def root_transposed(self, columns: Tensor) -> Tensor:
        """Sᵀ x for columns ``(p, k)``."""
        return self._root @ columns


class EKFAC(InEigenbasis):
    """The EK-FAC approximation of a stage's Gauss-Newton matrix, with weight decay added exactly.

    Symmetric and positive semidefinite; of a loss that is not convex in the outputs it takes the
    part of ℓ'' that is. Layers are what computes with a parameter by ``torch.nn.functional.linear``
    or a convolution of one group: Linear, Conv1d, Conv2d, Conv3d and what is built on them. Weight
    and bias are one layer. Other parameters have the exact matrix's diagonal.

    Parameters
    ----------
    stage
        The stage, at whose current parameters the matrix is taken; its model returns one tensor
        of at most 128 numbers an example.
    block
        As for :class:`msif_lib.curvature.Hessian`.

    Attributes
    ----------
    layers
        Names of the parameters that are in layers.
    others
        Names of those that are not, for which the diagonal stands.
    eigenvalues
        All of them ``(p,)``, in no order.

    Raises
    ------
    ValueError
        `block` is none; a regularizer of the stage's own; outputs that are not one tensor, or too
        many numbers; a loss whose curvature torch.func cannot take an example at a time; a model
        that treats examples differently.

    Warns
    -----
    UserWarning
        Some parameters are in no layer; the message names them.
    """

    def __init__(self, stage: Stage, block: BlockName | Block = "joint") -> None:
        self.block = numbers_of(stage, block)
        self.stage, self._seen = stage, Seen(stage)
        if stage.regularizer is not None:
            raise ValueError(
                "EK-FAC knows the curvature of the losses and of l2, not that of a regularizer of "
                'your own; take curvature="gauss-newton", or make the regularizer a part of l2'
            )
        factors = _Factors(stage, self.block)
        bases = factors.bases()
        basis = Eigenbasis(stage.parameters, self.block, factors.layers, bases, factors.others)
        of_layers = [values.flatten() for values in factors.values(bases)]
        values = torch.cat([*of_layers, factors.diagonal()]) + stage.l2
        super().__init__(basis, values, stage.dtype)
        self.layers = tuple(stage.names[n] for layer in factors.layers for n in layer.numbers)
        self.others = tuple(stage.names[number] for number in factors.others)
        if self.others:
            warn_caller(
                f"EK-FAC: {_listed(self.others)} are in no linear layer or convolution that is "
                "used in this way alone; of these the diagonal of the Gauss-Newton matrix is taken",
                UserWarning,
            )

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product A x; a ValueError where the stage changed."""
        self._seen.require(self.stage, "EKFAC")
        return super().__matmul__(x)

    def __str__(self) -> str:
        others = f", by its diagonal on {_listed(self.others)}" if self.others else ""
        return f"EK-FAC of the Gauss-Newton matrix{others}"

    def function(self, f: Callable[[Tensor], Tensor]) -> InEigenbasis:
        """f(A) for a function of eigenvalues, entry by entry."""
        return InEigenbasis(self._basis, f(self.eigenvalues), self.dtype)

    def eigenvectors(self) -> Tensor:
        """Q ``(p, p)``, a column for each of `eigenvalues`; for matrices that fit into memory."""
        eye = torch.eye(self.shape[0], dtype=self.eigenvalues.dtype, device=self.device)
        return self._basis.columns(eye)

    def scaled(self, scale: Tensor, shift: Tensor) -> EKFAC | None:
        """diag(s)^½ A diag(s)^½ + diag(d), for s and d ``(p,)`` that are constant on each layer.

        None where they are not: the sum then has other eigenvectors.
        """
        s, d = (self._basis.of_diagonal(one.to(self.eigenvalues)) for one in (scale, shift))
        if s is None or d is None:
            return None
        other = copy.copy(self)
        other.eigenvalues, other._matrix = s * self.eigenvalues + d, None
        return other

    def preconditioner(self, damping: float = 0.0) -> EKFACPreconditioner:
        """The inverse root of A + `damping` I, no eigenvalue below 1e-4 of the largest."""
        values = self.eigenvalues + damping
        floor = max(_FLOOR * float(values.max()), torch.finfo(values.dtype).tiny)
        return EKFACPreconditioner(self.function(lambda _: values.clamp_min(floor).rsqrt()))

    def solve(self, b: Tensor, damping: float = 0.0) -> Solution:
        """Solve (A + λI) x = b in the eigenbasis, exactly: no iterations, no pass over data.

        Parameters
        ----------
        b
            Right-hand sides ``(p,)`` or ``(p, k)``.
        damping
            λ ≥ 0.

        Returns
        -------
        Solution
            ``x`` of the shape of `b`, and the report, which says that A is EK-FAC's; residuals are
            measured in the eigenbasis.

        Raises
        ------
        ValueError
            `b` does not fit or is not finite; a negative damping; the stage changed.
        FailedSolve
            A right-hand side is in what is zero of A + λI, or the solution overflowed.

        Warns
        -----
        SolverWarning
            A + λI is singular; x is then the solution of least norm.
        """
        not_negative("damping", damping)
        self._seen.require(self.stage, "EKFAC")
        size, single = self.shape[0], dense("b", b).dim() == 1
        check_vector("b", b, size, self.dtype, self.device, dim=1 if single else 2)
        if not b.isfinite().all():
            raise ValueError("the right-hand side is not finite")
        columns = (b if b.dim() == 2 else b[:, None]).to(self.eigenvalues)
        values = self.eigenvalues + damping
        # Each is a mean of squares, exact to a share of its own size; what rounding leaves of a
        # zero is squared too. λ is added exactly.
        zero = values <= torch.finfo(values.dtype).eps ** 1.5 * values.max()
        inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))[:, None]
        right = self._basis.coordinates(columns)
        found = inverse * right
        x = self._basis.columns(found).to(self.dtype)
        left = (right - values[:, None] * found).norm(dim=0, dtype=torch.float64)
        lengths = right.norm(dim=0, dtype=torch.float64)
        relative = left / torch.where(lengths > 0, lengths, 1)
        report = self._report(damping, int(zero.sum()), relative.nan_to_num(torch.inf))
        if not x.isfinite().all() or report.residual > 1 - torch.finfo(values.dtype).eps ** 0.5:
            raise FailedSolve(
                f"EK-FAC: the solve of {report.system} failed: it overflowed, or the right-hand "
                "side is in what it takes for zero. Raise the damping or the weight decay",
                report,
            )
        if not report.converged:
            warn_caller(f"EK-FAC: {report.message}", SolverWarning)
        return Solution(x if b.dim() == 2 else x[:, 0], report)

    def functions(
        self, b: Tensor, functions: Sequence[Callable[[Tensor], Tensor]], system: str
    ) -> tuple[list[Tensor], SolveReport]:
        """The products f(A) b for several functions, of columns ``(p, k)``, and their report."""
        report = SolveReport(
            solver="EK-FAC",
            system=f"{system} with A = {self}",
            damping=0.0,
            iterations=0,
            products=0,
            residuals=(0.0,) * b.shape[1],
            history=(),
            converged=True,
        )
        self._seen.require(self.stage, "EKFAC")
        return [self.function(f) @ b for f in functions], report

    def _report(self, damping: float, zero: int, residuals: Tensor) -> SolveReport:
        system = f"(A + {damping:g} I) x = b" if damping else "A x = b"
        return SolveReport(
            solver="EK-FAC",
            system=f"{system} with A = {self}",
            damping=damping,
            iterations=0,
            products=0,
            residuals=tuple(residuals.tolist()),
            history=(),
            converged=not zero,
            lowest_eigenvalue=float(self.eigenvalues.min()),
            message=SolveReport.message
            if not zero
            else f"{system} is singular ({zero} eigenvalues are zero to rounding); returned the "
            "least-norm solution. Add damping or weight decay",
        )


class Preconditioned(LinearOperator):
    """A, with EK-FAC of it for the preconditioner of solves.

    Parameters
    ----------
    operator
        A, symmetric ``(p, p)``.
    ekfac
        What is near it.
    """

    def __init__(self, operator: LinearOperator, ekfac: EKFAC) -> None:
        self.operator, self.ekfac = operator, ekfac
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def _product(self, columns: Tensor) -> Tensor:
        return self.operator @ columns

    def dense(self) -> Tensor:
        """The matrix itself; the operator's own is kept by the operator."""
        return self.operator.dense()

    def preconditioner(self, damping: float = 0.0) -> EKFACPreconditioner:
        """The inverse root of EK-FAC + `damping` I."""
        return self.ekfac.preconditioner(damping)


def _listed(names: tuple[str, ...], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
