"""TorchRL's LSTMModule and GRUModule, with a batch of several trajectories in one call of rnnfast's layer.

A training batch has rows (environments) of T steps. ``is_init`` marks the steps at which a trajectory begins. TorchRL's default
backend "pad" copies each trajectory to a row of its own, packs the rows, and copies the results back. Here `is_init` is the
``resets`` of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnfast.accelerate import Report
from rnnfast.accelerate import accelerate as exchange_layers
from rnnfast.integrations import load
from rnnfast.nn.options import CallOptions
from rnnfast.nn.sequence import Sequence, decision

__all__ = ["GRUModule", "LSTMModule", "accelerate"]

_modules = load("torchrl.modules", "torchrl")
_dispatch = load("tensordict.nn", "tensordict").dispatch


class _OneCall:
    """A mixin before TorchRL's class: ``forward`` in recurrent mode. The layer is built as rnnfast's.

    One call runs a batch if a trajectory begins inside a row, if the states stored at these beginnings are zero, and if rnnfast
    does not leave the layer to torch.nn's code. The collector has reset the states to zero there, too. TorchRL's own code runs
    all other batches, with the ``recurrent_backend`` of the module and rnnfast's layer.
    """

    recurrent_mode: bool
    in_keys: list[Any]
    out_keys: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _exchange(self, report=None)

    @property
    def _layer(self) -> Any:
        return self.lstm if isinstance(self, LSTMModule) else self.gru  # type: ignore[attr-defined]

    @_dispatch
    def forward(self, tensordict: Any) -> Any:
        """As in TorchRL, with the same results, hidden states included: zero but at the last step of each trajectory."""
        if not (self.recurrent_mode and tensordict.ndim and tensordict.numel() and self._one_call(tensordict)):
            return super().forward(tensordict)  # type: ignore[misc]
        return tensordict

    def _one_call(self, tensordict: Any) -> bool:
        """Run the batch in one call if that is possible. Return whether it was."""
        layer, steps = self._layer, tensordict.shape[-1]

        def rows(key: Any) -> Tensor:  # time is the last dimension of the batch, and all others count rows
            tensor = tensordict.get(key)
            return tensor.reshape(-1, steps, *tensor.shape[tensordict.ndim :])

        resets = tensordict["is_init"].reshape(-1, steps).clone()
        resets[:, 0] = False  # a row begins from the states stored there
        if layer.bidirectional or not isinstance(layer, Sequence) or not bool(resets.any()):
            return False
        hx: Any = None
        keys = [key for key in self.in_keys[1 : len(self.out_keys)] if tensordict.get(key, None) is not None]
        if keys:
            stored = [rows(key) for key in keys]
            if len(keys) != len(self.out_keys) - 1 or any(_restarts_from(state, resets) for state in stored):
                return False
            states = [state[:, 0].transpose(0, 1).contiguous() for state in stored]
            hx = tuple(states) if len(states) > 1 else states[0]
        x, options = rows(self.in_keys[0]), {"resets": resets, "return_all_states": True}
        if decision(layer, x, hx, CallOptions(**options))[1].backend == "torch":
            return False
        output, _, states_of_layers = layer(x, hx, **options)
        ends = resets.roll(-1, dims=1)
        ends[:, -1] = True
        found = [torch.stack(states, dim=2) for states in zip(*states_of_layers, strict=True)]
        found = [output, *(state.masked_fill(~ends[:, :, None, None], 0) for state in found)]
        for key, tensor in zip(self.out_keys, found, strict=True):
            tensordict.set(key, tensor.reshape(*tensordict.shape, *tensor.shape[2:]))
        return True


def _restarts_from(state: Tensor, resets: Tensor) -> bool:
    """Whether a trajectory inside a row begins from a stored state (B, T, layers, H) that is not zero, or gets a gradient."""
    return state.requires_grad or bool((state.flatten(2).any(-1) & resets).any())


class LSTMModule(_OneCall, _modules.LSTMModule):
    """``torchrl.modules.LSTMModule`` on an `rnnfast.LSTM`: same arguments, keys and results."""


class GRUModule(_OneCall, _modules.GRUModule):
    """``torchrl.modules.GRUModule`` on an `rnnfast.GRU`: same arguments, keys and results."""


_OURS = {_modules.LSTMModule: LSTMModule, _modules.GRUModule: GRUModule}


def _exchange(model: Any, report: Callable[[Report], Any] | None) -> None:
    exchange_layers(model, report=report)
    for module in model.modules():
        module.__class__ = _OURS.get(type(module), type(module))
        if isinstance(module, _OneCall) and isinstance(module._layer, Sequence):
            module._layer.recompute |= module.recurrent_recompute == "full"  # type: ignore[attr-defined]


def accelerate(policy: Any, *, report: Callable[[Report], Any] | None = print) -> Any:
    """Let each LSTMModule and GRUModule in `policy` run a batch of trajectories in one call of rnnfast's layer.

    It exchanges all recurrent layers as `rnnfast.accelerate` does, and sets the class of TorchRL's modules to `LSTMModule` or
    `GRUModule` of this file. Parameters stay the same objects. Call it before a loss is built of the policy.

    Args:
        policy: any module, such as a ``TensorDictSequential``.
        report: as for `rnnfast.accelerate`.

    Returns:
        `policy`.

    Raises:
        TypeError: if `policy` is not a module.
    """
    _exchange(policy, report)
    return policy
