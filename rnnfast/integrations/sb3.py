"""RecurrentPPO of sb3-contrib, with each batch of sequences in one call of rnnfast's LSTM.

sb3-contrib runs its LSTM one time step after another whenever any sequence of a batch begins an episode. This is so in nearly
all batches, because RecurrentPPO begins a sequence at each episode of its buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rnnfast.accelerate import Report
from rnnfast.accelerate import accelerate as exchange_layers
from rnnfast.integrations import load

__all__ = ["accelerate", "process_sequence"]

_policies = load("sb3_contrib.common.recurrent.policies", "sb3-contrib")


def process_sequence(
    features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What ``RecurrentActorCriticPolicy._process_sequence`` computes, in one call of `lstm`.

    Args:
        features: (n T, I), the n sequences of T steps one after another.
        lstm_states: h and c before the first step, each (layers, n, H).
        episode_starts: (n T,), not 0 where an episode begins. The states before such a step are replaced by zeros.
        lstm: an `rnnfast.LSTM`, time first.

    Returns:
        The output (n T, H), and h and c after the last step.
    """
    rows = lstm_states[0].shape[1]
    sequences = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
    starts = episode_starts.reshape(rows, -1).t() != 0
    states = tuple(state.masked_fill(starts[0, :, None], 0) for state in lstm_states)
    # torch.nn's layer, which may be the faster, takes no resets. RecurrentPPO itself has none after a first step
    resets = starts if len(starts) > 1 and bool(starts[1:].any()) else None
    output, last = lstm(sequences, states, resets=resets)
    return output.transpose(0, 1).flatten(0, 1), last


def accelerate(model: Any, *, report: Callable[[Report], Any] | None = print) -> Any:
    """Let a RecurrentPPO, or its policy, run each batch of sequences in one call of rnnfast's LSTM.

    It exchanges the layers as `rnnfast.accelerate` does, so the parameters and the optimizer stay the same objects. It gives
    the policy the attribute ``_process_sequence``. A model that ``load`` made needs the call again.

    Args:
        model: a ``RecurrentPPO``, or a ``RecurrentActorCriticPolicy`` of any kind.
        report: as for `rnnfast.accelerate`.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` has no recurrent policy of sb3-contrib, or one with a ``_process_sequence`` of its own.
    """
    policy, base = getattr(model, "policy", model), _policies.RecurrentActorCriticPolicy
    if not isinstance(policy, base):
        raise TypeError(f"model should be a RecurrentPPO or its policy, got {type(policy).__name__}")
    if type(policy)._process_sequence is not base._process_sequence:
        raise TypeError(f"{type(policy).__name__} has a _process_sequence of its own, which may compute something else")
    exchange_layers(policy, report=report)
    policy._process_sequence = process_sequence
    return model
