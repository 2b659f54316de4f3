"""Second derivatives of a stage's objective as matrix-free linear operators.

All are exact sums over the whole data set, of the *mean* loss with the regularizer added once:

    H      = ∂²G/∂(W,U)²                      Hessian(stage)
    F_ΘΘ   = ∂²F/∂Θ²                          Hessian(stage, block="head")
    F_WΘ   = ∂²F/∂W∂Θ                         CrossHessian(stage)
    J'LJ   = (1/N) Σ J_iᵀ ℓ''_i J_i + R''     GaussNewton(stage)

where J_i is the Jacobian of the model's outputs and ℓ'' the Hessian of the loss in the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, jvp

from msif_lib.preconditioner import (
    FEWEST_ROWS,
    MOST_ROWS,
    GaussNewtonPreconditioner,
    gauss_newton_rows,
)
from msif_lib.stage import Stage
from msif_lib.support.arguments import check_matrix, dense, instance, positive, whole
from msif_lib.support.data import Batch
from msif_lib.support.functional import (
    GraphNotCountable,
    require_second_derivatives,
    saved_bytes,
)
from msif_lib.support.operators import LinearOperator
from msif_lib.support.parameters import Block, numbers_among
from msif_lib.support.seen import Seen
from msif_lib.support.state import in_own_state

#: The blocks of parameters that have a name.
BlockName = Literal["joint", "embedding", "head", "trained"]

# Bytes of a preconditioner's rows.
_PRECONDITIONER_MEMORY = 2**28


class _OfStage(LinearOperator):
    """An operator at the parameters that a stage had; all else of the stage must stay as it was."""

    stage: Stage
    _seen: Seen

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product A x; a ValueError where the stage changed."""
        self._seen.require(self.stage, type(self).__name__)
        return super().__matmul__(x)

    def dense(self) -> Tensor:
        """The matrix itself, kept, so that a second call is free."""
        self._seen.require(self.stage, type(self).__name__)
        return super().dense()


class _SecondDerivative(_OfStage):
    """The block ∂²J/∂a∂b of the objective's Hessian, a and b blocks of the parameters.

    A product with v is ∂/∂a (∇_b J · v), double backward (Pearlmutter 1994). ∇_b J is recorded
    with its graph once a batch, and each product costs one backward pass through that graph,
    about half of recording it anew. The graphs are kept between products where those of all
    batches fit `memory_budget` bytes; else each product records them again, a batch at a time.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Block,
        columns: Block,
        memory_budget: int | None,
        at: Tensor | None = None,
    ) -> None:
        self.stage = stage
        self.dtype, self.device = stage.dtype, stage.device
        self._blocks = rows, columns
        self._checked, self._seen = False, Seen(stage)
        self._kept: list[Tensor | None] | None = None
        if memory_budget is not None:
            whole("memory_budget", memory_budget, 0)
        else:
            memory_budget = 2**27 if self.device.type == "cpu" else 2**33
        self._at = stage.vector() if at is None else at.clone()
        # The graphs lead back to these leaves alone: where only the head is asked for, the
        # embedding is evaluated as a constant.
        take = stage.parameters.take
        self._row_leaf = take(self._at, rows).detach().requires_grad_()
        leaves = [(rows, self._row_leaf)]
        self._column_leaf = self._row_leaf
        if columns != rows:
            self._column_leaf = take(self._at, columns).detach().requires_grad_()
            leaves.append((columns, self._column_leaf))
        self._parts = stage.parameters.parts(self._at, *leaves)
        if memory_budget:
            self._kept = self._recorded(memory_budget)
        self.shape = (self._row_leaf.numel(), self._column_leaf.numel())

    @property
    def T(self) -> LinearOperator:
        """The transpose, at the same parameters."""
        rows, columns = self._blocks
        if rows == columns:
            return self
        return _SecondDerivative(self.stage, columns, rows, 0, self._at)

    def _gradient(self, term: Tensor) -> Tensor | None:
        """∇_b of one term of the objective, with its graph; None where that is constant."""
        if not term.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(
            term, self._column_leaf, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return gradient if gradient.requires_grad else None

    def _batch_gradient(self, batch: Batch, weights: Tensor) -> Tensor | None:
        losses = self.stage.batch_losses(self._parts, *batch)
        if not self._checked:
            require_second_derivatives(losses)
            self._checked = True
        return self._gradient(weights @ losses / self.stage.size)

    def _recorded(self, memory_budget: int) -> list[Tensor | None] | None:
        """∇_b J of every batch with its graph; None where they would hold more than the budget."""
        gradients: list[Tensor | None] = []
        used: dict[int, int] = {}  # batches share storage: the parameters'
        for batch, weights in self.stage.weighted_batches():
            try:
                with saved_bytes() as held:
                    gradients.append(self._batch_gradient(batch, weights))
            except GraphNotCountable:
                return None
            used |= held
            if sum(used.values()) > memory_budget:
                return None
        return gradients

    def _data_gradients(self) -> Iterator[Tensor | None]:
        """The terms of ∇_b J that depend on the data, one a batch."""
        if self._kept is None:
            yield from starmap(self._batch_gradient, self.stage.weighted_batches())
        else:
            yield from self._kept

    def _product(self, columns: Tensor) -> Tensor:
        product = columns.new_zeros(self.shape[0], columns.shape[1])

        def add(gradient: Tensor | None) -> None:
            """Add the products of one term, a backward pass through its graph each."""
            if gradient is None:
                return
            for index, v in enumerate(columns.unbind(1)):
                product[:, index] += torch.autograd.grad(
                    gradient,
                    self._row_leaf,
                    v,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )[0]

        for gradient in self._data_gradients():
            add(gradient)
        product = self.stage.reader.all_reduce(product)
        add(self._gradient(self.stage.penalty(self._parts)))
        return product


class Hessian(_SecondDerivative):
    """The Hessian of a stage's objective, or a diagonal block of it.

    Parameters
    ----------
    stage
        The stage, at whose current parameters the Hessian is taken (later changes of the
        parameters do not move it). All else that it depends on must stay as it is: products refuse
        data, weights, buffers, a loss, l2 or regularizer that changed, but nothing tells of a
        number that the model or the loss keeps otherwise (an attribute, a closure).
    block
        ``"joint"``: ∂²J/∂(W,U)² ``(p_W + p_U, p_W + p_U)``; ``"embedding"``: ∂²J/∂W²;
        ``"head"``: ∂²J/∂U²; ``"trained"``: of the parameters that the stage trains; or the
        numbers of any of its parameters.
    memory_budget
        Bytes of autograd graphs that may be kept between products, all or none; None: 128 MiB on a
        CPU, 8 GiB on a GPU.

    Raises
    ------
    ValueError
        `block` is none of these.

    Examples
    --------
    The Hessian of (1/2)(x·u)² averaged over x = 1, 2, 3 is the mean of x², plus l2:

    >>> import torch
    >>> from msif_lib import Stage
    >>> x, zero = torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3)
    >>> head = torch.nn.Linear(1, 1, bias=False)
    >>> loss = lambda outputs, targets: 0.5 * (outputs[:, 0] - targets) ** 2
    >>> stage = Stage(torch.nn.Identity(), head, loss, (x, zero), l2=0.5)
    >>> round((Hessian(stage) @ torch.ones(1)).item(), 4)  # 14/3 + 0.5
    5.1667
    """

    def __init__(
        self, stage: Stage, block: BlockName | Block = "joint", memory_budget: int | None = None
    ) -> None:
        self.block = numbers_of(stage, block)
        super().__init__(stage, self.block, self.block, memory_budget)
        self._memory_budget = memory_budget
        self._preconditioners: dict[float, GaussNewtonPreconditioner | None] = {}

    def dense(self) -> Tensor:
        """The matrix itself, kept, so that a second call is free.

        As it is symmetric, the joint one takes products through the embedding for the columns of
        W alone; the block of the head is had with the embedding's outputs as constants.
        """
        size = self.stage.embedding_size
        if self._matrix is None and self.block == self.stage.parameters.all and size:
            own, at = self.stage.own, self._at
            left = self._leading(size)
            head = _SecondDerivative(self.stage, own, own, self._memory_budget, at).dense()
            self._matrix = torch.cat([left, torch.cat([left[size:].T, head])], 1)
        return super().dense()

    def preconditioner(self, damping: float = 0.0) -> GaussNewtonPreconditioner | None:
        """P near H + `damping` I, from the leading rows of the Gauss-Newton matrix, and kept.

        None where there is none that would pay: too few rows fit the memory, the loss has no
        curvature in the outputs that could be taken apart, or the model cannot be vectorised.
        """
        if damping not in self._preconditioners:
            diagonal = torch.full_like(self._row_leaf, self.stage.l2 + damping).detach()
            self._preconditioners[damping] = self.preconditioner_with(diagonal)
        return self._preconditioners[damping]

    def preconditioner_with(self, diagonal: Tensor) -> GaussNewtonPreconditioner | None:
        """P = diag(`diagonal`) + RᵀR, the diagonal with its share of weight decay."""
        room = _PRECONDITIONER_MEMORY // diagonal.nbytes
        if room < FEWEST_ROWS or self.dtype.itemsize < 4:
            return None
        rows = gauss_newton_rows(self.stage, self._at, min(MOST_ROWS, room), self.block)
        return None if rows is None else GaussNewtonPreconditioner.from_rows(rows, diagonal)


class CrossHessian(_SecondDerivative):
    """J_WU = ∂²J/∂W∂U of shape ``(p_W, p_U)``, F_WΘ of the paper; its transpose is ``.T``.

    Parameters
    ----------
    stage
        The stage whose objective is J.
    rows, columns
        Numbers of other parameters than the shared and the stage's own.
    memory_budget
        Bytes of autograd graphs that may be kept between products, all or none; None: 128 MiB on a
        CPU, 8 GiB on a GPU.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Block | None = None,
        columns: Block | None = None,
        memory_budget: int | None = None,
    ) -> None:
        of_rows = numbers_of(stage, "embedding" if rows is None else rows)
        of_columns = numbers_of(stage, "head" if columns is None else columns)
        super().__init__(stage, of_rows, of_columns, memory_budget)


class GaussNewton(_OfStage):
    """The generalised Gauss-Newton matrix (1/N) Σ w_i J_iᵀ ℓ''_i J_i + R''.

    Positive semidefinite for a loss that is convex in the outputs, whatever the network; equal
    to the Hessian where the outputs are linear in the parameters (Schraudolph 2002).

    Parameters
    ----------
    stage
        The stage; its model must return one tensor.
    block
        As for :class:`Hessian`.

    Raises
    ------
    ValueError
        `block` is none of these.
    """

    def __init__(self, stage: Stage, block: BlockName | Block = "joint") -> None:
        self.block = numbers_of(stage, block)
        self.stage = stage
        self.dtype, self.device = stage.dtype, stage.device
        self._vector, self._seen = stage.vector(), Seen(stage)
        self._at = stage.parameters.take(self._vector, self.block)
        self.shape = (self._at.numel(), self._at.numel())

    def _parts(self, leaf: Tensor) -> list[Tensor]:
        return self.stage.parameters.parts(self._vector, (self.block, leaf))

    def _batch_products(self, batch: Batch, weights: Tensor, columns: Tensor) -> Tensor:
        """Σ w_i J_iᵀ ℓ''_i J_i v over one batch, by reverse mode alone.

        u ↦ Jᵀu is linear, and its own pull-back is J: the same J on both sides, so that the matrix
        is symmetric, also where forward mode is missing or, as of some operations, wrong.
        """
        inputs, targets = batch
        leaf = self._at.clone().requires_grad_()
        outputs = self.stage.batch_outputs(self._parts(leaf), inputs)
        at = outputs.detach().requires_grad_()
        with self.stage.kernels():
            loss = weights @ self.stage.loss(at, targets)
        (slope,) = torch.autograd.grad(loss, at, create_graph=True)
        if not (slope.requires_grad and outputs.requires_grad):  # no curvature, or no dependence
            return torch.zeros_like(columns)
        u = torch.ones_like(at, requires_grad=True)  # anywhere but 0, where some backwards bend
        (pulled,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)

        def product(v: Tensor) -> Tensor:
            (moved,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            (curved,) = torch.autograd.grad(slope, at, moved, retain_graph=True)
            return torch.autograd.grad(outputs, leaf, curved, retain_graph=True)[0]

        return torch.stack([product(v) for v in columns.unbind(1)], 1)

    def _product(self, columns: Tensor) -> Tensor:
        def penalty(leaf: Tensor) -> Tensor:
            return self.stage.penalty(self._parts(leaf))

        product = torch.zeros_like(columns)
        for batch, weights in self.stage.weighted_batches():
            product += self._batch_products(batch, weights, columns) / self.stage.size
        product = self.stage.reader.all_reduce(product)
        if self.stage.regularizer is None:
            return product + self.stage.l2 * columns
        own = [jvp(grad(penalty), (self._at,), (v,))[1] for v in columns.unbind(1)]
        return product + torch.stack(own, 1)


class AddDiagonal(LinearOperator):
    """A + diag(d): a damped Hessian, or the proximal Hessian of case 2.

    Parameters
    ----------
    operator
        A square operator A of shape ``(p, p)``.
    diagonal
        d, of shape ``(p,)``.

    Raises
    ------
    ValueError
        Shapes that do not fit, or dtypes.
    TypeError
        `operator` is none, or `diagonal` no dense tensor.
    """

    def __init__(self, operator: LinearOperator, diagonal: Tensor) -> None:
        check_matrix("operator", operator)
        dense("diagonal", diagonal)
        rows, columns = operator.shape
        if rows != columns or tuple(diagonal.shape) != (rows,):
            raise ValueError(
                f"a diagonal of shape {tuple(diagonal.shape)} does not fit an operator of shape "
                f"{operator.shape}"
            )
        if diagonal.dtype != operator.dtype:
            raise ValueError(f"diagonal is {diagonal.dtype}, the operator {operator.dtype}")
        self.operator, self.diagonal = operator, diagonal
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self._preconditioners: dict[float, GaussNewtonPreconditioner | None] = {}

    def _product(self, columns: Tensor) -> Tensor:
        return self.operator @ columns + self.diagonal[:, None] * columns

    def preconditioner(self, damping: float = 0.0) -> GaussNewtonPreconditioner | None:
        """As the operator's own, with d added to its diagonal; None where that has none."""
        if not isinstance(self.operator, Hessian):
            return None
        if damping not in self._preconditioners:
            diagonal = self.diagonal + (self.operator.stage.l2 + damping)
            self._preconditioners[damping] = self.operator.preconditioner_with(diagonal)
        return self._preconditioners[damping]

    def dense(self) -> Tensor:
        """The matrix itself; the operator's own is kept by the operator."""
        return self.operator.dense() + torch.diag(self.diagonal)


class Scaled(LinearOperator):
    """P^½ A P^½ + diag(δ): what an optimiser that multiplies gradients by P and decays sees of A.

    Parameters
    ----------
    operator
        A, symmetric ``(p, p)``.
    root, decay
        P^½ and δ, ``(p,)``.
    """

    def __init__(self, operator: LinearOperator, root: Tensor, decay: Tensor) -> None:
        self.operator, self.root, self.decay = operator, root, decay
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def _product(self, columns: Tensor) -> Tensor:
        root = self.root[:, None]
        return root * (self.operator @ (root * columns)) + self.decay[:, None] * columns


def numbers_of(stage: Stage, block: BlockName | Block) -> Block:
    """The parameters that a block's name stands for.

    Raises
    ------
    ValueError
        No block is called so, or a parameter has no such number.
    TypeError
        `stage` is none.
    """
    instance("stage", stage, Stage)
    named = {
        "joint": stage.parameters.all,
        "embedding": stage.shared,
        "head": stage.own,
        "trained": stage.trained,
    }
    if isinstance(block, str):
        if block not in named:
            raise ValueError(
                f'block must be "joint", "embedding" or "head", not {block!r} (or "trained", or '
                "numbers of parameters)"
            )
        return named[block]
    return numbers_among("block", block, stage.parameters.all)


@in_own_state
def proximal_hessian(stage: Stage, alpha: float) -> AddDiagonal:
    """K = [[F_WW + 2α I, F_WΘ], [F_ΘW, F_ΘΘ]], the Hessian of α‖W − W̄‖² + F(W, Θ).

    The matrix of the paper's eq. 15, stacked (W, Θ); the same for every W̄. Of a stage that trains
    some of its parameters only, their block.

    Parameters
    ----------
    stage
        The finetuning stage, whose objective is F.
    alpha
        α, the strength of the pull.

    Returns
    -------
    AddDiagonal
        Of shape ``(p_W + p_Θ, p_W + p_Θ)``.
    """
    instance("stage", stage, Stage)
    positive("alpha", alpha)
    pull = torch.zeros_like(stage.vector())
    pull[: stage.embedding_size] = 2 * alpha
    return AddDiagonal(Hessian(stage, "trained"), stage.parameters.take(pull, stage.trained))
