"""A table of every constructor option and call form of torch.nn.LSTM, GRU and RNN, on the Triton kernels and on torch.nn.

    python -m benchmarks.drop_in [--device cpu|cuda]

An entry is one call, forward and backward, with ``backend="triton"``. Its figure is the largest error of its outputs and
gradients against torch.nn in float64, divided by the error that `rnnfast.numerics` allows. A figure of at most 1 is right. A
letter means that PyTorch's own layer ran the call. The text of its warning is below the table. On a CPU, Triton's interpreter
runs the kernels.

The exit code is 0 if every figure is at most 1 and no call falls back without a warning, else 1.
"""

import argparse
import copy
import itertools
import os
import string
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rnnfast
from rnnfast import numerics

T, B, I, H = 3, 4, 29, 33  # a tensor of a few elements has its error by chance
LENGTHS = {"sorted": [3, 2, 2, 1], "unsorted": [1, 3, 2, 2]}

CELLS = {"LSTM": {}, "GRU": {}, "RNN": {}, "RNN relu": {"nonlinearity": "relu"}}
OPTIONS: dict[str, dict] = {
    "(none)": {},
    "bias=False": {"bias": False},
    "batch_first=True": {"batch_first": True},
    "bidirectional=True": {"bidirectional": True},
    "num_layers=2, dropout=1": {"num_layers": 2, "dropout": 1.0},  # the only dropout without chance
    "proj_size=5": {"proj_size": 5},
    "all of these": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False, "proj_size": 5},
    "dtype=float16": {"dtype": torch.float16},
    "dtype=bfloat16": {"dtype": torch.bfloat16},
    "dtype=float64": {"dtype": torch.float64},
}


def _packed(kind: str, layer: torch.nn.RNNBase, x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, LENGTHS[kind], batch_first=layer.batch_first, enforce_sorted=kind == "sorted")


# how a (T, B, I) or (B, T, I) input is changed, and whether there is an hx
FORMS: dict[str, tuple[Callable, bool]] = {
    "x": (lambda layer, x: x, False),
    "x, hx": (lambda layer, x: x, True),
    "(T, I), hx": (lambda layer, x: x[:, 0] if not layer.batch_first else x[0], True),
    "T = B = 1": (lambda layer, x: x[:1, :1], True),
    "strided": (lambda layer, x: torch.cat([x, x], -1).flip(0)[..., ::2], True),
    "packed": (partial(_packed, "sorted"), False),
    "packed, unsorted, hx": (partial(_packed, "unsorted"), True),
}


def _states(layer: torch.nn.RNNBase, x: Tensor | PackedSequence) -> tuple[Tensor, ...]:
    rows = B if isinstance(x, PackedSequence) else None if x.dim() == 2 else x.shape[0 if layer.batch_first else 1]
    lead = layer.num_layers * (2 if layer.bidirectional else 1)
    units = [layer.proj_size or H] + [H] * (layer.mode == "LSTM")
    return tuple(torch.randn(*(n for n in (lead, rows, unit) if n is not None)) for unit in units)


def _run(layer: torch.nn.RNNBase, x: Tensor, hx: tuple[Tensor, ...], change: Callable) -> list[Tensor]:
    """The outputs, and the gradients of the input, the states and the parameters."""
    dtype, device = layer.weight_ih_l0.dtype, layer.weight_ih_l0.device
    x, *hx = (tensor.detach().to(device, dtype).requires_grad_() for tensor in (x, *hx))
    output, last = layer(change(layer, x), tuple(hx) if len(hx) == 2 else hx[0] if hx else None)
    outputs = [output.data if isinstance(output, PackedSequence) else output, *tree_leaves(last)]
    upstream = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, [x, *hx, *layer.parameters()], upstream)
    return [*outputs, *(grad for grad in grads if grad is not None)]


class _Watch(TorchDispatchMode):
    """Notices whether the operator of the kernels is called."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = self.seen or func.namespace == "rnnfast"
        return func(*args, **(kwargs or {}))


def entry(cell: str, options: dict, form: str, device: str) -> tuple[float, str, bool]:
    """The largest error as a part of the allowed one, the words of the fallback warning, and whether the kernels ran."""
    torch.manual_seed(0)
    name, (change, given) = cell.split()[0], FORMS[form]
    theirs = getattr(torch.nn, name)(I, H, **CELLS[cell], **options, device=device)
    ours = getattr(rnnfast, name)(I, H, **CELLS[cell], **options, device=device, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, I) if theirs.batch_first else torch.randn(T, B, I)
    x = x.to(theirs.weight_ih_l0.dtype)
    hx = tuple(state.to(x.dtype) for state in _states(theirs, change(theirs, x))) if given else ()
    exact = copy.deepcopy(theirs).double()
    with warnings.catch_warnings(record=True) as caught, _Watch() as watch:
        warnings.simplefilter("always")
        found = _run(ours, x, hx, change)
    gave_way = [str(warning.message) for warning in caught if issubclass(warning.category, rnnfast.FallbackWarning)]
    plain = numerics.named(_run(theirs, x, hx, change))
    contract = numerics.Contract(lambda: numerics.named(_run(exact, x, hx, change)), plain, x.dtype)
    worst = numerics.worst(contract.judge(numerics.named(found))).share
    return worst, gave_way[0].partition("runs: ")[2] if gave_way else "", watch.seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    device = parser.parse_args(argv).device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    reasons: dict[str, str] = {}
    wrong = 0
    print(f"| options | layer | {' | '.join(FORMS)} |")
    print(f"|---|---|{'--:|' * len(FORMS)}")
    for (label, options), cell in itertools.product(OPTIONS.items(), CELLS):
        if "proj_size" in options and cell != "LSTM":
            continue  # torch.nn refuses it
        entries = []
        for form in FORMS:
            worst, reason, ran = entry(cell, options, form, device)
            if reason:
                reasons.setdefault(reason, string.ascii_lowercase[len(reasons)])
            verdict = ["WRONG "] * (worst > 1) + ["SILENT "] * (ran == bool(reason))  # neither kernels nor a warning, or both
            wrong += bool(verdict)
            entries.append("".join(verdict) + (reasons.get(reason) or f"{worst:.2f}"))
        print(f"| {label} | {cell} | {' | '.join(entries)} |", flush=True)
    print()
    for reason, letter in reasons.items():
        print(f"{letter}: {reason}")
    print(f"{wrong} wrong" if wrong else "every figure is within the contract, and nothing falls back silently")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
