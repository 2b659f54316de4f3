"""Influence scores, and what they say of removing examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_lib.solvers import SolveReport
from msif_lib.support.arguments import flag, whole_numbers


@dataclass(frozen=True)
class Scores:
    """Influence scores of a stage's N examples.

    Attributes
    ----------
    values
        I_i = dq/dε, ``(N,)``, or ``(N, T)`` one column a test example; in units of the test
        loss. Positive: the example hurts.
    training_size
        The size N of the training set that the removal of an example is measured against.
    solves
        One report an inverse-Hessian product of this stage, in the order they were done.
    gradient_norms
        Norm of each stage's gradient, by stage: how near the models are to their optima.
    of_training_set
        Whether the scored examples are the training set itself, on one and the same functional.
    weights
        w_i of the scored examples, ``(N,)``; None: all 1.
    """

    values: Tensor
    training_size: int
    solves: tuple[SolveReport, ...]
    gradient_norms: dict[str, float]
    of_training_set: bool = True
    weights: Tensor | None = None

    @property
    def removal_effect(self) -> Tensor:
        """−w_i I_i/N: predicted change of q when z_i is taken out, all else being equal."""
        return -self._weighted() / self.training_size

    @property
    def removal_effect_renormalised(self) -> Tensor:
        """Predicted change of q when the mean is taken over the other N − 1 examples.

        Differs from :attr:`removal_effect` where there is a regularizer: the centred gradient
        ∇ℓ_i − mean_j ∇ℓ_j stands in place of ∇ℓ_i.

        Raises
        ------
        ValueError
            The scores are of other examples than the training set, or it has one example only;
            the examples have weights.
        """
        return -self._centred() / self._left(1)

    def group(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Influence of a set: the sum of its examples' (the paper's eq. 8), ``()`` or ``(T,)``."""
        return self.values[self._chosen(indices)].sum(0)

    def group_effect(self, indices: Sequence[int] | Tensor, renormalise: bool = False) -> Tensor:
        """Predicted change of q when the set is taken out.

        Parameters
        ----------
        indices
            The examples of the set, s of them.
        renormalise
            False: the others keep weight 1/N. True: the mean is over the other N − s.

        Returns
        -------
        Tensor
            ``()`` or ``(T,)``.

        Raises
        ------
        ValueError
            The set repeats an example, names one that has no score or, where renormalised,
            leaves none; renormalised, and the examples have weights.
        """
        flag("renormalise", renormalise)
        chosen = self._chosen(indices)
        if not renormalise:
            return -self._weighted()[chosen].sum(0) / self.training_size
        return -self._centred()[chosen].sum(0) / self._left(len(chosen))

    def _weighted(self) -> Tensor:
        if self.weights is None:
            return self.values
        weights = self.weights.to(self.values)
        return self.values * (weights[:, None] if self.values.dim() == 2 else weights)

    def _chosen(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The indices of a set as a tensor; a Boolean mask is turned into indices."""
        chosen, size = whole_numbers("indices", indices).to(self.values.device), len(self.values)
        if chosen.dtype == torch.bool:
            if len(chosen) != size:
                raise ValueError(f"a mask of length {len(chosen)} does not fit {size} scores")
            return chosen.nonzero()[:, 0]
        chosen = chosen.long()
        if ((chosen < -size) | (chosen >= size)).any():
            raise ValueError(f"indices name an example outside 0..{size - 1}")
        chosen = chosen % size  # −1 is the last
        if len(chosen.unique()) != len(chosen):
            raise ValueError("indices name an example twice; a set holds each example once")
        return chosen

    def _left(self, removed: int) -> int:
        """Number of training examples after a removal."""
        if removed >= self.training_size:
            raise ValueError(
                f"removing {removed} of {self.training_size} training examples leaves none to "
                "take the mean over; use the fixed-weight effect (renormalise=False)"
            )
        return self.training_size - removed

    def _centred(self) -> Tensor:
        if not self.of_training_set:
            raise ValueError(
                "the renormalised removal effect needs the scores of the whole training set on one "
                "test functional; these are of other examples (of=...) or self-influences"
            )
        if self.weights is not None:
            raise ValueError(
                "the renormalised removal effect is a mean over the others, and these examples "
                "have weights; use removal_effect, or group_effect(renormalise=False)"
            )
        return self.values - self.values.mean(0)
