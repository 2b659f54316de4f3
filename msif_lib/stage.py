"""A training stage: a model with its per-example loss, data, weights and regularizer.

The objective of a stage with N examples and parameters x is

    J(x) = (1/N) Σ_i w_i ℓ_i(x) + R(x),   R(x) = l2/2 ‖x‖²  (+ a callable of your own),

a *mean* of per-example losses, with the regularizer added once (the paper's eq. 1; the weights w_i
are 1 unless given). The parameters are one flat vector x = (W, U): first those *shared* with other
stages, W, then the stage's *own*, U or Θ, so that every formula is linear algebra on slices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from msif_lib.support.arguments import check_target, check_vector, indices_of
from msif_lib.support.capabilities import Capabilities
from msif_lib.support.checks import (
    IGNORED,
    check_given,
    checked_weights,
)
from msif_lib.support.data import Batch, Examples, map_leaves
from msif_lib.support.data_check import DataCheck
from msif_lib.support.identity import ProblemIdentity, held_by_each, identity_of
from msif_lib.support.model import EmbeddingAndHead, HandsOn, Loss, Model, Regularizer, copied
from msif_lib.support.parameters import Block, aliases_of, matching, numbers_among
from msif_lib.support.probe import probe, wanted
from msif_lib.support.reader import Reader
from msif_lib.support.state import OwnState

# Entries of the largest block of per-example gradients held at once (64 MB in float64).
_GRADIENT_BLOCK = 2**23


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-example cross entropy.

    Parameters
    ----------
    outputs
        Logits ``(B, C, ...)``.
    targets
        Class indices ``(B, ...)``, or probabilities ``(B, C, ...)``. Where there are further
        dimensions, the losses of an example are averaged over them. As in torch, indices of −100
        (padding, say) count for nothing: they are left out of the average.

    Returns
    -------
    Tensor
        Losses ``(B,)``, in nats; 0 for an example of which nothing counts.
    """
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    if losses.dim() == 1:
        return losses
    if targets.is_floating_point():
        return losses.flatten(1).mean(1)
    counted = (targets != IGNORED).flatten(1).sum(1)
    return losses.flatten(1).sum(1) / counted.clamp(min=1)


class Stage(OwnState, Model):
    """One training stage: embedding, head, per-example loss, data and regularizer.

    The embedding is what the stage shares with others, the head is its own. A parameter that
    both use is one parameter, the embedding's. :meth:`of` takes any single module.

    Parameters
    ----------
    embedding, head
        Modules; the model is ``head(embedding(inputs))``. Same device and dtype, evaluation
        mode where they hold BatchNorm or dropout.
    loss
        ``loss(outputs, targets)`` returns per-example losses ``(B,)``.
    data
        A pair ``(inputs, targets)`` of (nested) tensors, a map-style ``Dataset`` or a loader.
        Targets may be none, ``()``; entries that are meant (−inf in a mask) need not be finite.
    l2
        Weight decay: adds l2/2 ‖parameters‖² to the objective.
    batch_size
        Examples evaluated at once, at most. Changes memory and speed, never a result.
    regularizer
        A further term: a twice differentiable scalar function of the named parameters, a dict
        with keys ``"embedding.<name>"`` and ``"head.<name>"``.
    check
        Evaluate the model once over `data` and refuse what would make scores meaningless, then hold
        its derivatives against finite differences on few examples. ``"data"``: without the latter.
    memory_budget
        Bytes of autograd graph of one batch; where `batch_size` examples need more, batches are
        smaller. None: 32 MiB on a CPU, 2 GiB on a GPU, four times the parameters if that is more.
    weights
        w_i of the examples, ``(N,)``, none negative. None: all 1.
    trained
        Shell patterns of the names of the parameters that training moves. None: those that
        require a gradient.
    hands_on
        A function from the named parameters to those that the next stage takes, for what is
        handed on after a change (LoRA merged into its base). None: the parameters themselves.

    Raises
    ------
    ValueError
        Data that are empty, wrongly shaped, others when read again, or fewer than their loader's
        data set; targets outside the classes; losses or weights that are not finite; a loss that is
        not per-example, or depends on other examples, on chance or on earlier calls; a model that
        writes into its inputs; parameters that share memory, or are read from elsewhere than their
        module's attribute; mixed devices or dtypes; settings out of range, patterns that fit none.
    DerivativeError
        Derivatives that the losses or the regularizer have not.

    Examples
    --------
    >>> import torch
    >>> from msif_lib import Stage, cross_entropy
    >>> data = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    >>> stage = Stage(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), cross_entropy, data, l2=0.1)
    >>> stage.embedding_size, stage.head_size, stage.gradient().shape
    (8, 6, torch.Size([14]))
    """

    def __init__(
        self,
        embedding: nn.Module,
        head: nn.Module,
        loss: Loss,
        data: Batch | Dataset | DataLoader,
        l2: float = 0.0,
        batch_size: int = 1024,
        regularizer: Regularizer | None = None,
        check: bool | Literal["data"] = True,
        memory_budget: int | None = None,
        weights: Tensor | None = None,
        trained: str | Sequence[str] | None = None,
        hands_on: HandsOn | None = None,
    ) -> None:
        self._set(loss, l2, batch_size, regularizer, memory_budget, hands_on)
        model = EmbeddingAndHead(embedding, head)
        names = [name for name, _ in model.named_parameters()]
        self._set_model(model, [name for name in names if name.startswith("embedding.")], trained)
        self._set_data(data, weights, check)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss: Loss,
        data: Batch | Dataset | DataLoader,
        shared: str | Sequence[str] | Mapping[str, str] = "*",
        trained: str | Sequence[str] | None = None,
        l2: float = 0.0,
        batch_size: int = 1024,
        regularizer: Regularizer | None = None,
        check: bool | Literal["data"] = True,
        memory_budget: int | None = None,
        weights: Tensor | None = None,
        hands_on: HandsOn | None = None,
    ) -> Stage:
        """A stage of any single module.

        Parameters
        ----------
        model
            The module; ``loss(model(inputs), targets)`` returns per-example losses ``(B,)``.
        loss, data
            As above.
        shared
            What the stage takes from the one before it: shell patterns of parameter names, or a
            mapping from them to the names that they have there (``{"encoder.*": "backbone.*"}``
            for all that begin so). By default all. In a first stage it constrains nothing; what
            a stage hands on is what the next one's `shared` names.
        trained
            Shell patterns of the parameters that training moves. None: those that require a
            gradient. Shared and not trained, a parameter stays as the stage before has left it: the
            base weights under LoRA, the encoder under a linear probe.
        l2, batch_size, regularizer, check, memory_budget, weights, hands_on
            As above; the keys of a regularizer are the model's names.

        Raises
        ------
        ValueError
            As at construction.
        """
        check_given(model=model)
        stage = cls.__new__(cls)
        stage._set(loss, l2, batch_size, regularizer, memory_budget, hands_on)
        mapping = dict(shared) if isinstance(shared, Mapping) else None
        names = [name for name, _ in model.named_parameters()]
        patterns = list(shared) if isinstance(shared, Mapping) else shared
        stage._set_model(
            model, matching(names, patterns, "shared", aliases_of(model)), trained, mapping
        )
        stage._set_data(data, weights, check)
        return stage

    def _set_data(
        self,
        data: Batch | Dataset | DataLoader,
        weights: Tensor | None,
        check: bool | Literal["data"],
        reader: Reader | None = None,
    ) -> None:
        probing = wanted(check) and reader is None
        self._data, self.examples, self.checked = data, Examples(data), check
        self.reader = (
            Reader(self.examples, self.device) if reader is None else reader.on(self.examples)
        )
        self.weighted = weights is not None
        self.weights = checked_weights(weights, self.size, self.vector())
        self._can: Capabilities | None = None
        self._chunk: list[int] = []
        if check:
            self.check_data()
        if probing:
            self.check_derivatives()
        self.reader.require_same(partial(held_by_each, self, self.examples, self.weights))

    def check_data(self) -> None:
        """Refuse, as a ValueError, data that would make scores meaningless."""
        check = DataCheck(self, self.reader, self.loss is cross_entropy)
        self.reader.agree_on(check.refusal(self.batch_size, lambda: self.chunk_size))

    def check_derivatives(self) -> None:
        """Refuse, as a DerivativeError, derivatives that the losses or the regularizer have not."""
        self.reader.agreed(lambda: probe(self, self.read, self.size, self.chunk_size))

    @property
    def data(self) -> Batch | Dataset | DataLoader:
        """The data as given; :meth:`with_data` makes a stage of others."""
        return self._data

    @property
    def can(self) -> Capabilities:
        """What the model can do with this loss, found out once for the stage and its sections."""
        if self._can is None or self._can.loss is not self.loss:
            self._can = Capabilities(copy.copy(self), self.reader.first, self.size)
        return self._can

    @property
    def size(self) -> int:
        """Number of examples N: m in pretraining, n in finetuning."""
        return len(self.examples)

    # --- sums over the data -----------------------------------------------------------------

    def section(self, indices: Sequence[int]) -> Stage:
        """The same stage reading these examples alone, for results an example; `size` stays."""
        return self.reading(self.reader.section(indices_of("indices", indices, self.size).tolist()))

    def reading(self, reader: Reader) -> Stage:
        """The same stage, its examples read by another reader."""
        part = copy.copy(self)
        part.reader = reader
        return part

    @property
    def chunk_size(self) -> int:
        """Examples in a batch: as many as `memory_budget` allows, at most `batch_size`."""
        if not self._chunk:
            self._chunk.append(self.can.examples_at_once(self.batch_size, self.memory_budget))
        return self._chunk[0]

    def batches(self) -> Iterator[Batch]:
        """The data in order, in batches, on the model's device."""
        return self.reader.batches(self.chunk_size)

    def weighted_batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """The same with the weights ``(b,)`` of each batch's examples."""
        share = torch.as_tensor(self.reader.share, dtype=torch.long, device=self.device)
        weights = self.weights[share].split(self.chunk_size) if len(share) else ()
        return zip(self.batches(), weights, strict=True)

    def read(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """The examples of `indices` in that order, by default all, on the model's device."""
        return self.reader.read(batch_size, range(self.size) if indices is None else indices)

    def example_losses(self) -> Tensor:
        """The losses ``(N,)`` of all examples at the stage's parameters."""
        theta = self.vector()
        with torch.no_grad():
            blocks = (self.losses_at(theta, *batch) for batch in self.batches())
            return self.reader.gather(blocks, theta[:0])

    def objective(self, vector: Tensor | None = None) -> Tensor:
        """J at a joint vector, by default at the stage's parameters: a scalar."""
        parts = self.parameters.views(self.at(vector))
        with torch.no_grad():
            total = parts[0].new_zeros(())
            for batch, weights in self.weighted_batches():
                total += weights @ self.batch_losses(parts, *batch)
            return self.reader.all_reduce(total) / self.size + self.penalty(parts)

    def objective_and_gradient(self, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """J and ∇J, a scalar and ``(p_W + p_U,)``, at a joint vector or the parameters."""
        theta = self.at(vector).clone().requires_grad_()
        value, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        with torch.enable_grad():
            for batch, weights in self.weighted_batches():
                loss = weights @ self.losses_at(theta, *batch) / self.size
                gradient += torch.autograd.grad(loss, theta)[0]
                value += loss.detach()
            penalty = self.penalty(self.parameters.views(theta))
            slope = torch.zeros_like(theta)
            if penalty.requires_grad:
                slope = torch.autograd.grad(penalty, theta)[0]
        reduced = self.reader.all_reduce(value) + penalty.detach()
        return reduced, self.reader.all_reduce(gradient) + slope

    def gradient(self, vector: Tensor | None = None) -> Tensor:
        """∇J ``(p_W + p_U,)`` at a joint vector, by default at the stage's parameters.

        Raises
        ------
        ValueError
            The gradient is not finite; the message names the first example at fault.
        """
        gradient = self.objective_and_gradient(vector)[1]
        if not gradient.isfinite().all():
            blocks = (~block.isfinite().all(1) for block in self.per_example_gradients(vector))
            bad = self.reader.gather(blocks, torch.zeros(0, dtype=torch.bool, device=self.device))
            raise ValueError(
                f"the gradient of the loss of example {int(bad.nonzero()[0])} is not finite; "
                "look at its inputs and at the loss at the trained parameters"
                if bad.any()
                else "the gradient of the regularizer is not finite"
            )
        return gradient

    # --- derivatives of each example's loss -------------------------------------------------

    def per_example_gradients(self, vector: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the gradients of the losses in blocks ``(b, p_W + p_U)``, in the data's order."""
        theta = self.at(vector)
        return self.can.gradients(theta, self.batches(), self.gradients_at_once)

    @property
    def gradients_at_once(self) -> int:
        """Per-example gradients held at once."""
        return max(1, min(self.chunk_size, _GRADIENT_BLOCK // self.parameters.size))

    def directional_derivatives(
        self, directions: Tensor, vector: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield ∇ℓ(z_i)ᵀ v for the columns v of `directions`, in the data's order.

        Parameters
        ----------
        directions
            Joint vectors ``(p_W + p_U, k)``.
        vector
            Where to differentiate, ``(p_W + p_U,)``; by default at the stage's parameters.

        Yields
        ------
        Tensor
            Blocks ``(b, k)``.
        """
        theta = self.at(vector)
        check_vector("directions", directions, len(theta), self.dtype, self.device, dim=2)
        at_once = self.gradients_at_once
        return self.can.directional_derivatives(theta, directions, self.batches(), at_once)

    # --- other stages from this one ---------------------------------------------------------

    def with_data(
        self, data: Batch | Dataset | DataLoader, name: str = "data", check: bool = True
    ) -> Stage:
        """The same model and loss on other data of weight 1, checked as at construction.

        Raises
        ------
        ValueError
            As at construction, the message beginning with `name`.
        """
        other = copy.copy(self)
        try:
            other._set_data(data, None, check, self.reader)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error
        return other

    def with_weights(self, weights: Tensor) -> Stage:
        """The same stage with other weights of its examples, ``(N,)``."""
        other = copy.copy(self)
        other.weights, other.weighted = checked_weights(weights, self.size, self.vector()), True
        return other

    def with_trained(self, block: Block) -> Stage:
        """The same stage of which other parameters are trained, by their numbers."""
        other = copy.copy(self)
        other.trained = numbers_among("block", block, self.parameters.all)
        return other

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Stage:
        """A deep copy in another dtype or on another device; its data are read into memory."""
        check_target(dtype, device)
        other = copy.copy(self)
        model = copied(self.model).to(device=device, dtype=dtype)
        shared = [self.names[number] for number in self.shared]
        other._set_model(model, shared, None, self.mapping)
        other.trained = self.trained
        inputs, targets = map_leaves(partial(_moved, dtype, device), self.examples.tensors())
        reader = self.reader.moved_to(other.device)
        other._set_data((inputs, targets), self.weights if self.weighted else None, False, reader)
        return other

    def identity(self, at: Tensor | None = None, lasting: bool = True) -> ProblemIdentity:
        """What a stage is known by in results that are kept, at parameters ``(p,)`` or its own."""
        at = self.vector() if at is None else at
        return identity_of(self, at, self.reader, self.chunk_size, self.weights, lasting)


def _moved(dtype: torch.dtype | None, device: torch.device | str | None, leaf: Tensor) -> Tensor:
    return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)
