"""The one measure of all answers: plain double backward in float64, from no library's code."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Small: float64 convolutions and their derivatives are bound by memory.
BATCH = 50


class Product:
    """Products with A = ∂²(mean loss)/∂θ² + shift I, in float64.

    Parameters
    ----------
    model
        The network; it is copied.
    inputs, targets
        The examples that the mean is over.
    shift
        Added to the diagonal.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, shift: float) -> None:
        self.model = copy.deepcopy(model).double()
        self.parameters = list(self.model.parameters())
        self.inputs, self.targets, self.shift = inputs.double(), targets, shift
        self._matrix: Tensor | None = None

    def __call__(self, columns: Tensor) -> Tensor:
        """A times a vector ``(p,)`` or columns ``(p, k)``, of float64."""
        vectors = columns[:, None] if columns.dim() == 1 else columns
        product = self.shift * vectors
        for x, y in zip(self.inputs.split(BATCH), self.targets.split(BATCH)):
            loss = F.cross_entropy(self.model(x), y, reduction="sum") / len(self.inputs)
            gradient = torch.autograd.grad(loss, self.parameters, create_graph=True)
            flat = torch.cat([part.flatten() for part in gradient])
            for index, v in enumerate(vectors.unbind(1)):
                parts = torch.autograd.grad(flat @ v, self.parameters, retain_graph=True)
                product[:, index] += torch.cat([part.flatten() for part in parts])
        return product[:, 0] if columns.dim() == 1 else product

    def dense(self) -> Tensor:
        """A itself."""
        if self._matrix is None:
            size = sum(p.numel() for p in self.parameters)
            matrix = self(torch.eye(size, dtype=torch.float64))
            self._matrix = (matrix + matrix.T) / 2
        return self._matrix

    def residuals(self, x: Tensor, b: Tensor) -> Tensor:
        """‖b − A x‖ / ‖b‖ a column, ``(k,)``."""
        b = b.double()
        return (b - self(x.double())).norm(dim=0) / b.norm(dim=0)


def test_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradients of single losses as columns ``(p, T)``, in float64."""
    model = copy.deepcopy(model).double()
    losses = F.cross_entropy(model(inputs.double()), targets, reduction="none")
    columns = []
    for loss in losses:
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        columns.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(columns, 1)


def example_derivatives(model: nn.Module, inputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
    """∇g_iᵀ x of every example and column, ``(m, k)``, in float64.

    With weights c the gradient of Σ c_i g_i is linear in c, and the derivative in c of its product
    with x is what is wanted: two backward passes, no forward mode.
    """
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    blocks = []
    for batch, y in zip(inputs.double().split(BATCH), targets.split(BATCH)):
        losses = F.cross_entropy(model(batch), y, reduction="none")
        weights = torch.zeros_like(losses, requires_grad=True)
        gradient = torch.autograd.grad(losses @ weights, parameters, create_graph=True)
        flat = torch.cat([part.flatten() for part in gradient])
        columns = [
            torch.autograd.grad(flat @ v, weights, retain_graph=True)[0] for v in x.unbind(1)
        ]
        blocks.append(torch.stack(columns, 1))
    return torch.cat(blocks)
