"""Who runs a call of a module: what layers (`rnnfast.nn`) and cells (`rnnfast.cells`) share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rnnfast import backends, transforms

__all__ = ["Dispatched", "computed_again"]


def computed_again(run: Callable, *args: Any, also: Iterable[Any] = (), **options: Any) -> Any:
    """``run(*args, **options)`` under PyTorch's checkpoint. That notices when a tensor is edited before backward only if it is
    an argument itself: so every tensor is, those inside others and those of `also` too."""
    count = len(args)
    tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]

    def call(*given: Any) -> Any:
        return run(*given[:count], **options)

    return checkpoint(call, *args, *tensors, *also, use_reentrant=False)


class Dispatched(torch.nn.Module):
    """A mixin: it stands before torch.nn's class among the bases, and lets that take what no backend of ours does, a call that
    torch.nn would refuse included, so that the error is torch.nn's too."""

    backend: str | None = None  # also what a module pickled by torch.nn has
    mode: Any  # the cell: that of `rnnfast.reference` in lower case

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backends.check_name(backend)
        self.backend = backend

    def _dispatch(self, input: Any, hx: Any) -> Any:
        name, source = backends.asked(self.backend)
        if name != "torch":
            obstacles = self._obstacles(input, name)
            if obstacles:
                backends.settle(name, source, obstacles)
            elif self._is_plain(input, hx) and not (name is None and self._torch_wins(input, hx)):
                return self._run(name or "triton", input, hx)
        return self._by_torch(input, hx)

    def _is_plain(self, input: Any, hx: Any) -> bool:
        """Whether the tensors of this call all fit. If not it goes to torch.nn, to be served or refused there."""
        raise NotImplementedError

    def _run(self, backend: str, input: Any, hx: Any) -> Any:
        """A plain call on "triton" or "reference"."""
        raise NotImplementedError

    def _torch_wins(self, input: Any, hx: Any) -> bool:
        """Whether PyTorch's own was measured as the fastest for this plain call."""
        return False

    def _by_torch(self, input: Any, hx: Any) -> Any:
        """torch.nn's own forward, or the equations where that has no rule for what is done to the call."""
        if self._equations_stand_in(input) and self._is_plain(input, hx):
            return self._run("reference", input, hx)
        return super().forward(input, hx)  # type: ignore[misc]

    def _equations_stand_in(self, input: Any) -> bool:
        """See `rnnfast.transforms.equations_stand_in`."""
        padded_on_cpu = isinstance(input, Tensor) and input.is_cpu
        return transforms.equations_stand_in(padded_on_cpu, self._parameters.values())

    def _obstacles(self, input: Any, name: str | None) -> tuple[str, ...]:
        """What keeps the backend `name`, or "triton" if None, from running a call that is plain; see `_is_plain`."""
        tensor = input.data if isinstance(input, PackedSequence) else input
        if name == "reference" or not isinstance(tensor, Tensor):
            return ()
        return backends.tensor_obstacles(tensor, self._parameters.values())

    def _states(self, hx: Any) -> tuple[Any, ...]:
        """hx as a tuple of states, empty if absent."""
        if hx is None:
            return ()
        return tuple(hx) if self.mode in ("LSTM", "lstm") and isinstance(hx, (tuple, list)) else (hx,)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("torch.jit.script does not know rnnfast's layers: script rnnfast.restore(model, every=True)")

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend!r}" if self.backend not in (None, "auto") else "")
