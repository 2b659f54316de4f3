"""Matrices that are known by their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from msif_lib.support.arguments import dense
from msif_lib.support.state import OwnState, in_own_state

# Columns of the identity multiplied at once by dense().
_DENSE_COLUMNS = 64


class LinearOperator(OwnState, ABC):
    """A real matrix known by its products: ``A @ x`` for x of shape ``(p,)`` or ``(p, k)``.

    Attributes
    ----------
    shape
        Rows and columns.
    dtype, device
        Those of the stage's parameters; vectors must have the same.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    _matrix: Tensor | None = None

    @abstractmethod
    def _product(self, columns: Tensor) -> Tensor:
        """A times the columns ``(p, k)``; each operator's own."""

    @property
    def T(self) -> LinearOperator:
        """The transpose; a symmetric operator is its own."""
        return self

    @in_own_state
    def __matmul__(self, x: Tensor) -> Tensor:
        """The product A x.

        Parameters
        ----------
        x
            One vector ``(p,)`` or several as columns ``(p, k)``.

        Returns
        -------
        Tensor
            ``(q,)`` or ``(q, k)``.

        Raises
        ------
        ValueError
            `x` has another length, dtype or device than the operator.
        TypeError
            `x` is no dense tensor.
        """
        dense("x", x)
        if x.dim() not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ValueError(
                f"operator of shape {self.shape} cannot be applied to {tuple(x.shape)}"
            )
        if x.dtype != self.dtype or x.device.type != self.device.type:
            raise ValueError(
                f"operator is {self.dtype} on {self.device}, the vector {x.dtype} on {x.device}"
            )
        columns = x[:, None] if x.dim() == 1 else x
        product = self._product(columns.detach())
        return product[:, 0] if x.dim() == 1 else product

    @in_own_state
    def dense(self) -> Tensor:
        """The matrix itself, one product a column; kept, so that a second call is free."""
        if self._matrix is None:
            self._matrix = self._leading(self.shape[1])
        return self._matrix

    def _leading(self, count: int) -> Tensor:
        """The first columns, one product each."""
        eye = torch.eye(self.shape[1], count, dtype=self.dtype, device=self.device)
        return torch.cat([self @ columns for columns in eye.split(_DENSE_COLUMNS, 1)], 1)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """As a SciPy ``LinearOperator`` on NumPy arrays, for SciPy's solvers."""

        def product(operator: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
            def apply(x: np.ndarray) -> np.ndarray:
                vector = torch.as_tensor(np.array(x), dtype=self.dtype, device=self.device)
                return (operator @ vector).cpu().numpy()

            return apply

        forward, adjoint = product(self), product(self.T)
        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            matvec=forward,
            rmatvec=adjoint,
            matmat=forward,
            rmatmat=adjoint,
            dtype=np.dtype(str(self.dtype).removeprefix("torch.")),
        )
