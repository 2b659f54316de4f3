"""SGD and AdamW as values: a step and, beside it, its adjoint.

Step t has a gradient g, a rate η and a decoupled decay δ. The adjoints go from λ_x and λ_v, the
cotangents of parameters and buffers after the step, to λ_g, that of the gradient, and to those
before the step. There λ_x still lacks ∇²J_b λ_g, for g itself depends on x.

Vectors here are rows: what has a leading dimension ``(R, p)`` holds R models, or R cotangents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msif_lib.stage import Stage
from msif_lib.support.arguments import below_one, flag, not_negative, positive

Rate = Tensor | float


class State(NamedTuple):
    """Where a training is, or the cotangent of that: parameters, buffers, steps taken.

    Attributes
    ----------
    x
        The trained parameters ``(p_T,)``, with a leading dimension where there are several.
    buffers
        The optimiser's: the momentum of SGD, the two moments of Adam. Each of the shape of `x`.
    step
        Steps taken before this state.
    """

    x: Tensor
    buffers: tuple[Tensor, ...]
    step: int


class Optimiser(ABC):
    """A rule that moves parameters by a gradient, and the adjoint of that rule."""

    lr: float
    groups: Sequence[Mapping[str, Any]]
    clip: float | None

    #: The name under which a group says its decay.
    _decay_name: str

    @property
    @abstractmethod
    def decay(self) -> float:
        """δ, the decay decoupled from the gradient: a step shrinks x by 1 − ηδ."""

    @property
    @abstractmethod
    def slowness(self) -> float:
        """How much longer a step lasts than its learning rate says: 1/(1 − μ) for momentum μ."""

    @abstractmethod
    def scaling(self, state: State) -> Tensor | float:
        """P, by which gradients are multiplied in a step from a state, ``(p_T,)`` or a number."""

    @abstractmethod
    def begin(self, x: Tensor) -> State:
        """The state before the first step from parameters `x`."""

    @abstractmethod
    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """The state after a step.

        Parameters
        ----------
        state
            The state before, for one model or with a leading dimension of models.
        gradient
            Of the batch's objective, clipped but for l2 x, of the shape of ``state.x``.
        rate, decay
            η and δ, numbers or vectors ``(p_T,)``.
        """

    @abstractmethod
    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """The adjoint of :meth:`step`, but for what depends on x through the gradient.

        Parameters
        ----------
        state, gradient, rate, decay
            As the step was given them, for one model.
        cotangent
            λ after the step, rows ``(k, p_T)``.

        Returns
        -------
        tuple
            λ_g ``(k, p_T)`` and λ before the step, to whose x-part ∇²J_b λ_g is still to be added.
        """

    def rates(self, stage: Stage) -> tuple[Rate, Rate]:
        """What the groups make of a learning rate, as a factor, and δ: numbers or ``(p_T,)``.

        Raises
        ------
        ValueError
            A group names no trained parameter, or two groups name the same one.
        """
        if not self.groups:
            return 1.0, float(self.decay)
        scale = dict.fromkeys(stage.trained, 1.0)
        decay = dict.fromkeys(stage.trained, self.decay)
        seen: dict[int, int] = {}
        for index, group in enumerate(self.groups):
            where = f'groups[{index}]["params"]'
            chosen = [n for n in stage.block(group["params"], where) if n in scale]
            if not chosen:
                raise ValueError(f"{where} names no parameter that the stage trains")
            for number in chosen:
                if number in seen:
                    raise ValueError(
                        f"groups[{seen[number]}] and groups[{index}] both name "
                        f"{stage.names[number]}; a parameter belongs to one group"
                    )
                seen[number] = index
                scale[number] = group.get("lr", self.lr) / self.lr
                decay[number] = group.get(self._decay_name, self.decay)
        counts = torch.tensor(
            [stage.parameters.count((number,)) for number in stage.trained], device="cpu"
        )

        def spread(values: dict[int, float]) -> Tensor:
            each = torch.tensor(list(values.values()), dtype=stage.dtype, device="cpu")
            return each.repeat_interleave(counts).to(stage.device)

        return spread(scale), spread(decay)

    def _check(self) -> None:
        positive("lr", self.lr)
        if self.clip is not None:
            positive("clip", self.clip, ", or None for no clipping")
        not_negative(self._decay_name, self.decay)
        groups = self.groups
        if not isinstance(groups, Sequence) or not all(isinstance(one, Mapping) for one in groups):
            raise TypeError("groups must be a list of dicts, each with 'params'")
        for index, group in enumerate(groups):
            unknown = set(group) - {"params", "lr", self._decay_name}
            if unknown or "params" not in group:
                raise ValueError(
                    f"groups[{index}] must have 'params' and may have 'lr' and "
                    f"'{self._decay_name}'; it has {sorted(group)}"
                )
            for key in ("lr", self._decay_name):
                not_negative(f"groups[{index}]['{key}']", group.get(key, 0.0))


@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent, as torch.optim.SGD.

        v' = μ v + g;   d = v', or g + μ v' (Nesterov);   x' = (1 − ηδ) x − η d

    The coupled weight decay of torch is no setting of the optimiser: it is the `l2` of the stage.

    Parameters
    ----------
    lr
        Learning rate η.
    momentum
        μ, at least 0 and below 1.
    nesterov
        Nesterov's momentum.
    decoupled_decay
        δ, which torch.optim.SGD has not: each step multiplies the parameters by 1 − ηδ first.
    groups
        Dicts with ``"params"``, a shell pattern of parameter names or a list of them, and
        ``"lr"`` or ``"decoupled_decay"`` or both: other values for these parameters. At step t a
        group's rate is ``learning_rates[t]`` times its ``lr`` over the optimiser's.
    clip
        Longest gradient, over all trained parameters, as ``torch.nn.utils.clip_grad_norm_``.

    Raises
    ------
    TypeError, ValueError
        A value that is no number or outside its range, a group with a key that is not one of these.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    decoupled_decay: float = 0.0
    groups: Sequence[Mapping[str, Any]] = ()
    clip: float | None = None
    _decay_name = "decoupled_decay"

    def __post_init__(self) -> None:
        below_one("momentum", self.momentum)
        if flag("nesterov", self.nesterov) and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        self._check()

    @property
    def decay(self) -> float:
        """δ."""
        return self.decoupled_decay

    @property
    def slowness(self) -> float:
        """1/(1 − μ)."""
        return 1 / (1 - self.momentum)

    def scaling(self, state: State) -> float:
        """1."""
        return 1.0

    def begin(self, x: Tensor) -> State:
        """Parameters with a momentum of zero."""
        return State(x, (torch.zeros_like(x),) if self.momentum else (), 0)

    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """v' = μ v + g, x' = (1 − ηδ) x − η d."""
        x, buffers, d = state.x, state.buffers, gradient
        if buffers:
            v = self.momentum * buffers[0] + gradient
            buffers, d = (v,), gradient + self.momentum * v if self.nesterov else v
        return State(_shrunk(x, rate, decay) - rate * d, buffers, state.step + 1)

    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """λ_v' = λ_v − η λ_x · (1, or μ with Nesterov), λ_g = λ_v' − (η λ_x with Nesterov)."""
        lambda_x, buffers = cotangent.x, cotangent.buffers
        if not buffers:
            lambda_g = -rate * lambda_x
        elif self.nesterov:
            lambda_v = _minus(buffers[0], self.momentum * rate, lambda_x)
            lambda_g = _minus(lambda_v, rate, lambda_x)
            buffers = (self.momentum * lambda_v,)
        else:
            lambda_g = _minus(buffers[0], rate, lambda_x)
            buffers = (self.momentum * lambda_g,)
        return lambda_g, State(_shrunk(lambda_x, rate, decay), buffers, state.step)


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay, as torch.optim.AdamW; Adam where `weight_decay` is 0.

        m' = β₁m + (1−β₁)g;   v' = β₂v + (1−β₂)g²;   c₁ = 1−β₁ᵗ, c₂ = 1−β₂ᵗ
        r = √(v'/c₂), D = r + ε, m̂ = m'/c₁;   x' = (1 − ηδ)x − η m̂/D

    The coupled weight decay of torch.optim.Adam is the `l2` of the stage.

    Parameters
    ----------
    lr
        Learning rate η.
    betas
        β₁ and β₂, each at least 0 and below 1.
    eps
        ε.
    weight_decay
        δ, decoupled: each step multiplies the parameters by 1 − ηδ first.
    groups
        Dicts with ``"params"``, a shell pattern of parameter names or a list of them, and
        ``"lr"`` or ``"weight_decay"`` or both: other values for these parameters. At step t a
        group's rate is ``learning_rates[t]`` times its ``lr`` over the optimiser's.
    clip
        Longest gradient, over all trained parameters, as ``torch.nn.utils.clip_grad_norm_``.

    Raises
    ------
    TypeError, ValueError
        A value that is no number or outside its range, a group with a key that is not one of these.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    groups: Sequence[Mapping[str, Any]] = ()
    clip: float | None = None
    _decay_name = "weight_decay"

    def __post_init__(self) -> None:
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, at least 0 and below 1, not {self.betas}")
        for index, beta in enumerate(self.betas):
            below_one(f"betas[{index}]", beta)
        positive("eps", self.eps)
        self._check()

    @property
    def decay(self) -> float:
        """δ."""
        return self.weight_decay

    @property
    def slowness(self) -> float:
        """1: a mean of gradients moves as far as a gradient."""
        return 1.0

    def scaling(self, state: State) -> Tensor:
        """1/(√v̂ + ε)."""
        return 1 / ((state.buffers[1] / (1 - self.betas[1] ** state.step)).sqrt() + self.eps)

    def begin(self, x: Tensor) -> State:
        """Parameters with both moments zero."""
        return State(x, (torch.zeros_like(x), torch.zeros_like(x)), 0)

    def _moments(self, state: State, gradient: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """m', v', c₁ and c₂ of the step from `state`."""
        (beta1, beta2), (m, v), t = self.betas, state.buffers, state.step + 1
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        return m, v, 1 - beta1**t, 1 - beta2**t

    def step(self, state: State, gradient: Tensor, rate: Rate, decay: Rate) -> State:
        """x' = (1 − ηδ)x − η m̂/D."""
        m, v, c1, c2 = self._moments(state, gradient)
        d = (m / c1) / ((v / c2).sqrt() + self.eps)
        return State(_shrunk(state.x, rate, decay) - rate * d, (m, v), state.step + 1)

    def pull_back(
        self, state: State, gradient: Tensor, rate: Rate, decay: Rate, cotangent: State
    ) -> tuple[Tensor, State]:
        """λ_m' = λ_m − (η/c₁) λ_x/D, λ_v' = λ_v + η m̂ λ_x/(2c₂D²r), λ_g by the chain rule."""
        (beta1, beta2), lambda_x = self.betas, cotangent.x
        m, v, c1, c2 = self._moments(state, gradient)
        r = (v / c2).sqrt()
        d = r + self.eps
        # Where a coordinate never had a gradient, r = 0, v' does not move and its term is 0.
        slope = torch.where(r > 0, (m / c1) / (2 * c2 * d**2 * r), 0.0)
        lambda_m = cotangent.buffers[0] - (rate / c1 / d) * lambda_x
        lambda_v = cotangent.buffers[1] + (rate * slope) * lambda_x
        lambda_g = (1 - beta1) * lambda_m + (2 * (1 - beta2) * gradient) * lambda_v
        before = _shrunk(lambda_x, rate, decay), (beta1 * lambda_m, beta2 * lambda_v)
        return lambda_g, State(*before, state.step)


def _minus(a: Tensor, rate: Rate, b: Tensor) -> Tensor:
    """a − η b, in one pass over many rows where η is a number."""
    return a - rate * b if isinstance(rate, Tensor) else torch.sub(a, b, alpha=rate)


def _shrunk(x: Tensor, rate: Rate, decay: Rate) -> Tensor:
    """(1 − ηδ) x."""
    return x if isinstance(decay, float) and decay == 0 else (1 - rate * decay) * x


def clipped(gradient: Tensor, longest: float | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gradient as ``torch.nn.utils.clip_grad_norm_`` leaves it, and the adjoint of that.

    s = c/(‖g‖ + 10⁻⁶) where that is below 1: λ_g ← s (λ_g − ‖g‖/(‖g‖ + 10⁻⁶) ĝ ĝᵀ λ_g).
    """
    if longest is None:
        return gradient, lambda rows: rows
    norm = gradient.norm(dim=-1, keepdim=True)
    padded = norm + 1e-6
    s = (longest / padded).clamp(max=1.0)

    def adjoint(rows: Tensor) -> Tensor:
        if s >= 1:
            return rows
        return s * (rows - (rows @ gradient)[:, None] * gradient / (norm * padded))

    return s * gradient, adjoint
