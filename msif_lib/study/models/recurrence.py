"""Two LSTM chains with projected outputs, with derivatives of every order.

For each chain, with x_t the inputs' share of the gates, c the memory and h the output,

    (i, f, o, g)_t = (σ, σ, σ, tanh)(x_t + W h_{t−1})
    c_t = f_t c_{t−1} + i_t g_t,    h_t = R (o_t tanh c_t),    h_0 = c_0 = 0

(Sak et al. 2014). :func:`chains_plainly` is just this, differentiated by torch operation by
operation. :func:`chains` has its derivatives written out: both run through linear recurrences
whose coefficients are known for all steps beforehand, so that all products with a derivative of
W or R, or towards one, become one product over all steps. One step costs forward mode as many
passes over the weights as the recurrence itself, where torch makes three times as many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import Function

from msif_lib.support.functional import DerivativeError


def chains_plainly(
    shares: Tensor, weight: Tensor, projection: Tensor, clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both chains from the first step to the last.

    Parameters
    ----------
    shares
        x, of shape ``(2, L, B, 4H)`` for 2 chains, L steps, B examples and H cells.
    weight, projection
        W ``(2, 4H, P)`` and R ``(2, P, H)``.
    clip
        Bound on c and h. None for none.

    Returns
    -------
    tuple of Tensor
        h ``(2, L, B, P)``, the gates (i, f, o, g) ``(2, L, B, 4H)`` and c ``(2, L, B, H)``.
    """

    def clipped(value: Tensor) -> Tensor:
        return value if clip is None else value.clamp(-clip, clip)

    cells = projection.shape[2]
    state = shares.new_zeros(2, shares.shape[2], projection.shape[1])
    memory = shares.new_zeros(2, shares.shape[2], cells)
    states, gates, memories = [], [], []
    for share in shares.unbind(1):
        sums = torch.baddbmm(share, state, weight.mT)
        gate = torch.cat([sums[..., : 3 * cells].sigmoid(), sums[..., 3 * cells :].tanh()], -1)
        i, f, o, g = gate.chunk(4, -1)
        memory = clipped(f * memory + i * g)
        state = clipped(torch.bmm(o * memory.tanh(), projection.mT))
        states.append(state)
        gates.append(gate)
        memories.append(memory)
    return torch.stack(states, 1), torch.stack(gates, 1), torch.stack(memories, 1)


def chains(shares: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """Run both chains: h ``(2, L, B, P)``, as :func:`chains_plainly` without a bound."""
    return _Chains.apply(shares, weight, projection)[0]


def _before(values: Tensor) -> Tensor:
    """Values of the step before, zero for the first."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)


def _over_steps(values: Tensor, matrix: Tensor) -> Tensor:
    """Each chain's ``(L, B, n)`` times its ``(n, k)``, all steps at once."""
    return torch.bmm(values.flatten(1, 2), matrix).unflatten(1, values.shape[1:3])


def _towards(left: Tensor, right: Tensor) -> Tensor:
    """Σ left ⊗ right over steps and examples: ``(2, n, k)``."""
    return torch.bmm(left.flatten(1, 2).mT, right.flatten(1, 2))


def _coefficients(gates: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives within a step, for all steps.

    Of the gates in their sums (2, L, B, 4H); of c, or o tanh c for the third, in the gates; of
    o tanh c in c; and o tanh c itself.
    """
    i, _, o, g = gates.chunk(4, -1)
    squashed = memory.tanh()
    three = gates[..., : 3 * memory.shape[-1]]
    slopes = torch.cat([three * (1 - three), 1 - g * g], -1)
    factors = torch.cat([g, _before(memory), squashed, i], -1)
    return slopes, factors, o * (1 - squashed * squashed), o * squashed


def _refuse_nested_forward_mode() -> None:
    """Within a Function's jvp torch drops the tangents of an outer forward mode silently."""
    levels = functorch.get_interpreter_stack() or []
    if sum(level.key() == functorch.TransformType.Jvp for level in levels) > 1:
        raise DerivativeError(
            "chains has no forward mode over forward mode; take forward over reverse mode, or "
            "chains_plainly"
        )


class _Chains(Function):
    """The recurrence; gates and memory are outputs, so that derivatives of derivatives exist."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        shares: Tensor, weight: Tensor, projection: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return chains_plainly(shares, weight, projection)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def jvp(
        ctx: Any, d_shares: Tensor, d_weight: Tensor, d_projection: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _refuse_nested_forward_mode()
        weight, projection, states, gates, memory = ctx.saved_tensors
        slopes, factors, bend, shown = _coefficients(gates, memory)
        d_sums = d_shares + _over_steps(_before(states), d_weight.mT)
        d_outside = _over_steps(shown, d_projection.mT)
        forget = gates.chunk(4, -1)[1]
        d_state, d_memory = torch.zeros_like(states[:, 0]), torch.zeros_like(memory[:, 0])
        d_states, d_gates, d_memories = [], [], []
        for t in range(states.shape[1]):
            d_gate = slopes[:, t] * torch.baddbmm(d_sums[:, t], d_state, weight.mT)
            i, f, o, g = (factors[:, t] * d_gate).chunk(4, -1)
            d_memory = forget[:, t] * d_memory + i + f + g
            moved = o + bend[:, t] * d_memory
            d_state = torch.baddbmm(d_outside[:, t], moved, projection.mT)
            d_states.append(d_state)
            d_gates.append(d_gate)
            d_memories.append(d_memory)
        return torch.stack(d_states, 1), torch.stack(d_gates, 1), torch.stack(d_memories, 1)

    @staticmethod
    def backward(ctx: Any, *towards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, projection, states, gates, memory = ctx.saved_tensors
        to_states, to_gates, to_memory = towards
        slopes, factors, bend, shown = _coefficients(gates, memory)
        forget = gates.chunk(4, -1)[1]
        to_sum, later = torch.zeros_like(gates[:, 0]), torch.zeros_like(memory[:, 0])
        to_sums, to_outputs = [], []
        for t in reversed(range(states.shape[1])):
            to_state = torch.baddbmm(to_states[:, t], to_sum, weight)
            to_shown = torch.bmm(to_state, projection)
            to_c = to_memory[:, t] + later + to_shown * bend[:, t]
            spread = torch.cat([to_c, to_c, to_shown, to_c], -1)
            to_sum = slopes[:, t] * (to_gates[:, t] + factors[:, t] * spread)
            later = to_c * forget[:, t]
            to_sums.append(to_sum)
            to_outputs.append(to_state)
        all_sums, all_outputs = (torch.stack(x[::-1], 1) for x in (to_sums, to_outputs))
        return all_sums, _towards(all_sums, _before(states)), _towards(all_outputs, shown)
