"""A module and its loss as functions of one flat vector of parameters.

The vector is x = (W, U): first the parameters *shared* with other stages, W, then the *own* ones,
U or Θ, each in the module's order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from msif_lib.support.arguments import check_rows, check_vector
from msif_lib.support.buffers import Held
from msif_lib.support.checks import (
    check_functions,
    check_given,
    check_memory,
    check_modes,
    check_parameters,
    check_settings,
)
from msif_lib.support.data import Nested, rows_of
from msif_lib.support.functional import PureModule, differentiable_kernels
from msif_lib.support.parameters import Block, Parameters, aliases_of, matching

Loss = Callable[[Any, Any], Tensor]
Regularizer = Callable[[dict[str, Tensor]], Tensor]
HandsOn = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _check_names(ours: str, theirs: str) -> None:
    """One name for one name, or a beginning for a beginning."""
    plain = not any(sign in name.removesuffix("*") for name in (ours, theirs) for sign in "*?[")
    if not plain or ours.endswith("*") != theirs.endswith("*"):
        raise ValueError(
            f'shared: "{ours}": "{theirs}" must be two names, or two beginnings of names with * '
            'at the end of both, as "encoder.*": "backbone.*"'
        )


class EmbeddingAndHead(nn.Module):
    """The model ``head(embedding(inputs))``.

    Raises
    ------
    ValueError
        The two have no parameters.
    TypeError
        One is no module.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        check_given(embedding=embedding, head=head)
        if not [*embedding.parameters(), *head.parameters()]:
            raise ValueError("embedding and head have no parameters at all")
        self.embedding, self.head = embedding, head
        self.training = False  # of its own; the two modules keep their modes

    def forward(self, inputs: Nested) -> Any:
        """``head(embedding(inputs))``."""
        return self.head(self.embedding(inputs))


def copied(module: nn.Module) -> nn.Module:
    """A deep copy.

    Raises
    ------
    ValueError
        The module holds what cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied: {type(error).__name__}: {error}; for weight_norm and "
            "spectral_norm use those of torch.nn.utils.parametrizations, and after pruning "
            "torch.nn.utils.prune.remove: the others keep a computed tensor as an attribute"
        ) from error


class Model:
    """A module with its per-example loss and regularizer, and which parameters are what.

    Attributes
    ----------
    parameters
        The parameters in the order of the vector.
    shared, own
        Numbers of the parameters that stand for W, and of those that stand for U or Θ.
    trained
        Numbers of those that training moves.
    unreached
        Numbers of those that it does not move and that no gradient of the losses reaches, although
        the losses depend on them; found by :func:`msif_lib.support.probe.probe`.
    """

    unreached: Block = ()
    loss: Loss
    l2: float
    batch_size: int
    regularizer: Regularizer | None
    memory_budget: int | None
    hands_on: HandsOn | None

    def _set(
        self,
        loss: Loss,
        l2: float,
        batch_size: int,
        regularizer: Regularizer | None,
        memory_budget: int | None,
        hands_on: HandsOn | None,
    ) -> None:
        """All that a stage is beside its model and its data."""
        check_settings(l2, batch_size, memory_budget)
        check_functions(loss, regularizer=regularizer, hands_on=hands_on)
        self.loss, self.l2, self.batch_size = loss, l2, batch_size
        self.regularizer, self.memory_budget, self.hands_on = regularizer, memory_budget, hands_on

    def _set_model(
        self,
        model: nn.Module,
        shared: Sequence[str],
        trained: str | Sequence[str] | None,
        mapping: Mapping[str, str] | None = None,
    ) -> None:
        """The parameters in their order: those shared first."""
        taken = dict(model.named_parameters())
        own = [name for name in taken if name not in set(shared)]
        named = [(name, taken[name]) for name in (*shared, *own)]
        check_parameters(named)
        check_modes(model)
        for ours, theirs in (mapping or {}).items():
            _check_names(ours, theirs)
        self.model, self.mapping = model, mapping
        self.parameters = Parameters(named)
        self.shared: Block = tuple(range(len(shared)))
        self.own: Block = tuple(range(len(shared), len(named)))
        self.trained: Block = (
            tuple(number for number, (_, p) in enumerate(named) if p.requires_grad)
            if trained is None
            else self.block(trained, "trained")
        )
        self._pure = PureModule(model, self.parameters.numbers, self.loss)
        self._pures = [self._pure]
        if isinstance(model, EmbeddingAndHead):
            self._pure_embedding = PureModule(model.embedding, self.parameters.numbers)
            self._pure_head = PureModule(model.head, self.parameters.numbers, self.loss)
            self._pures += [self._pure_embedding, self._pure_head]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names in the order of the flat vector."""
        return self.parameters.names

    @property
    def embedding(self) -> nn.Module:
        """The embedding, of a stage that was made from one and a head."""
        return self._two_modules().embedding

    @property
    def head(self) -> nn.Module:
        """The head, of a stage that was made from an embedding and one."""
        return self._two_modules().head

    @property
    def composed(self) -> bool:
        """Whether the model was made from an embedding and a head."""
        return isinstance(self.model, EmbeddingAndHead)

    def origin(self, number: int) -> str:
        """The name that a shared parameter has in the stage before."""
        name = self.names[number]
        aliases = [also for also, first in aliases_of(self.model).items() if first == name]
        return next((there for known in (name, *aliases) if (there := self._there(known))), name)

    def _there(self, known: str) -> str | None:
        """What the stage before calls a parameter or buffer, where the mapping says it."""
        for ours, theirs in (self.mapping or {}).items():
            if fnmatchcase(known, ours):
                return theirs[:-1] + known[len(ours) - 1 :] if ours.endswith("*") else theirs
        return None

    def shared_buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to what is shared, by their names in the stage before.

        A buffer belongs to the parameters of its module, or to all those within it, or, where it
        has none (a normalisation without weights), to the layer before.
        """
        near, found = False, {}
        for prefix, module in self.model.named_modules():
            own, inside = list(module.parameters(recurse=False)), list(module.parameters())
            if inside:
                shared = [self.parameters.numbers[p] in self.shared for p in own or inside]
                near = any(shared) if own else all(shared)
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.startswith("embedding.") if self.composed else near:
                    found[self._there(name) or name] = buffer
        return found

    def _two_modules(self) -> EmbeddingAndHead:
        if not isinstance(self.model, EmbeddingAndHead):
            raise AttributeError("a stage of a single module has no embedding and head; see .model")
        return self.model

    @property
    def embedding_size(self) -> int:
        """Number of shared parameters, the length of W."""
        return self.parameters.count(self.shared)

    @property
    def head_size(self) -> int:
        """Number of the stage's own parameters, the length of U (or Θ)."""
        return self.parameters.count(self.own)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self.parameters.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parameters.tensors[0].device

    def vector(self) -> Tensor:
        """(W, U) as one flat vector ``(p_W + p_U,)``, a copy."""
        return self.parameters.vector()

    def at(self, vector: Tensor | None) -> Tensor:
        """A joint vector that is given ``(p_W + p_U,)``, or where there is none the parameters."""
        if vector is None:
            return self.vector()
        size = self.parameters.size
        return check_vector("vector", vector, size, self.dtype, self.device).detach()

    def embedding_vector(self) -> Tensor:
        """W as a flat vector ``(p_W,)``, a copy."""
        return self.split(self.vector())[0]

    def head_vector(self) -> Tensor:
        """U (or Θ) as a flat vector ``(p_U,)``, a copy."""
        return self.split(self.vector())[1]

    def split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The W part and the U part of a joint vector ``(p_W + p_U, ...)``, as views."""
        check_rows("vector", vector, self.parameters.size)
        return vector[: self.embedding_size], vector[self.embedding_size :]

    def load_vector(self, vector: Tensor) -> None:
        """Write a joint vector ``(p_W + p_U,)`` of any floats into the modules, in place."""
        check_vector("vector", vector, self.parameters.size, None, self.device)
        self.parameters.load(vector)

    def block(self, patterns: str | Sequence[str], argument: str = "patterns") -> Block:
        """The numbers of the parameters whose names fit the shell patterns, ascending.

        Raises
        ------
        ValueError
            A pattern fits none; the message begins with `argument`.
        """
        chosen = set(matching(self.names, patterns, argument, aliases_of(self.model)))
        return tuple(number for number, name in enumerate(self.names) if name in chosen)

    # --- the model as pure functions of the parameters --------------------------------------

    def kernels(self) -> AbstractContextManager[None]:
        """A context with kernels that have second and forward-mode derivatives.

        Each evaluation enters it by itself; entered once around many, it costs once.
        """
        return differentiable_kernels(self._pure.recurrent)

    def batch_outputs(self, parts: Sequence[Tensor], inputs: Nested) -> Any:
        """The model's outputs for a batch, with `parts` for its parameters."""
        return self._pure(parts, inputs)

    def outputs_as_they_come(self, parts: Sequence[Tensor], inputs: Nested) -> Any:
        """The same, what an evaluation moves being the module's own."""
        return self._pure.evaluate(parts, inputs)

    def batch_losses(self, parts: Sequence[Tensor], inputs: Nested, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)`` of a batch, with `parts` for the model's parameters."""
        with self._pure.held.copies(rows_of(inputs)), self.kernels():
            return self.loss(self._pure.evaluate(parts, inputs), targets)

    @property
    def held(self) -> Held:
        """What evaluations of the model and its loss leave as it was."""
        return self._pure.held

    def losses_in_a_row(
        self, theta: Tensor, inputs: Nested, targets: Nested
    ) -> tuple[Tensor, Tensor]:
        """The losses ``(B,)`` of a batch and, by what that has moved in the module, once more."""
        parts = self.parameters.views(theta)
        with self._pure.held.copies(), self.kernels():
            return (
                self.loss(self._pure.evaluate(parts, inputs), targets),
                self.loss(self._pure.evaluate(parts, inputs), targets),
            )

    def features(self, parts: Sequence[Tensor], inputs: Nested) -> Any:
        """``embedding(inputs)``, of a stage made from an embedding and a head."""
        self._two_modules()
        return self._pure_embedding(parts, inputs)

    def feature_losses(self, parts: Sequence[Tensor], features: Any, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)``, given what :meth:`features` returned."""
        with self._pure_head.held.copies(rows_of(targets)), self.kernels():
            return self.loss(self._pure_head.evaluate(parts, features), targets)

    def penalty(self, parts: Sequence[Tensor]) -> Tensor:
        """R, a scalar, with `parts` for the parameters."""
        value = parts[0].new_zeros(())
        if self.l2:
            value = value + 0.5 * self.l2 * sum(part.square().sum() for part in parts)
        if self.regularizer is not None:
            value = value + self.regularizer(self.named(parts))
        return value

    def named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameters by their names."""
        return dict(zip(self.names, parts, strict=True))

    def check_module(self) -> None:
        """Refuse a module that was changed, or set to training, since the stage was made of it.

        Raises
        ------
        ValueError
            Parameters were exchanged or added, or two came to share their memory; dropout or
            BatchNorm in training mode.
        """
        if {*map(id, self.model.parameters())} != {*map(id, self.parameters.tensors)}:
            raise ValueError(
                "the module has other parameters than when the stage was made of it (a layer was "
                "exchanged or added); make the stage again"
            )
        check_memory(list(zip(self.names, self.parameters.tensors, strict=True)))
        check_modes(self.model)
        for pure in self._pures:
            pure.held.forget()

    def outputs(self, w: Tensor, h: Tensor, inputs: Nested) -> Any:
        """The model's outputs at shared parameters `w` ``(p_W,)`` and own ones `h` ``(p_U,)``."""
        return self.batch_outputs(self._parts_of(w, h), inputs)

    def losses(self, w: Tensor, h: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)``, without any regularizer: g(z; W, U) of the paper."""
        return self.batch_losses(self._parts_of(w, h), inputs, targets)

    def regularization(self, w: Tensor, h: Tensor) -> Tensor:
        """R(W, U), a scalar."""
        return self.penalty(self._parts_of(w, h))

    def _parts_of(self, w: Tensor, h: Tensor) -> list[Tensor]:
        return [*self.parameters.views(w, self.shared), *self.parameters.views(h, self.own)]

    def losses_at(self, theta: Tensor, inputs: Nested, targets: Nested) -> Tensor:
        """Per-example losses ``(B,)`` at a joint vector ``(p_W + p_U,)``."""
        return self.batch_losses(self.parameters.views(theta), inputs, targets)
