"""Times that others have published for a known layer, and where (published.csv). This project has measured none of them.

The columns `value` and `unit` are as published: "us/step", "ms" for a call, "TFLOP/s" of a forward pass, or "times padded", the
time of a call with lengths over that of the same layer on padded input. If a source timed the recurrence without W_ih x, the
case has I = 1, where W_ih x is next to nothing.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing.cases import Case
from rnnfast.reference import GATES

_KERNELBENCH = (
    "KernelBench, results/timing (github.com/ScalingIntelligence/KernelBench, commit {}): torch.nn, forward without gradients,"
    " mean of 100 calls between CUDA events after 3 others, float32 with TF32 allowed; its README says torch 2.5.0+cu124"
)
_TORCHRL = "TorchRL's block GRU in Triton, 8 blocks and a norm, bfloat16, {}, torch not stated (github.com/pytorch/rl/pull/{})"
SOURCES = {
    # the configuration is from its notebooks; the figures were read off its plots
    "FlashRNN": "FlashRNN's speed experiments, H100 SXM, T = 1024 (arXiv 2412.07752, github.com/NX-AI/flashrnn)",
    "DeepBench": "DeepBench, README, recurrent ops in training, cuDNN (github.com/baidu-research/DeepBench, commit 106e523)",
    "Persistent RNNs": "Diamos et al. 2016, Persistent RNNs, 2.8 TFLOP/s at a batch of 4 (proceedings.mlr.press/v48/diamos16)",
    "KernelBench": _KERNELBENCH.format("7dd9cfa") + " and does not name the B200",
    "KernelBench 2025-07": _KERNELBENCH.format("3396fc0"),
    "xwang233": "cudnn-rnn-bench-62143 (github.com/xwang233/code-snippet, commit 2c053c8): torch 1.11.0a0, torch.nn before and"
    " after PyTorch pull request 62143 of 2021, forward with gradients to come, and backward; the GPU is not named",
    "pytorch#149194": "github.com/pytorch/pytorch/issues/149194 of 2025: two layers of torch.nn.LSTM, lengths from 1 to T,"
    " packed over padded; its B, I and H are not those of the case",
    "TorchRL 4160": _TORCHRL.format("mean of 30 calls", 4160),
    "TorchRL 4174": _TORCHRL.format("mean of 50 calls", 4174),
}


class Published(NamedTuple):
    """What somebody published of `case` on `gpu`: the microseconds a time step of the whole case, or `times_padded`."""

    case: Case
    gpu: str
    provider: str
    us_per_step: float | None
    times_padded: float | None
    source: str


def _published(row: dict[str, str]) -> Published:
    case, value = Case.parse(row["case"]), float(row["value"])
    flops = 2 * GATES[case.cell_name] * case.H * case.H * case.B
    us = {"us/step": value, "ms": value * 1e3 / case.T, "TFLOP/s": flops / (value * 1e6), "times padded": None}[row["unit"]]
    return Published(case, row["gpu"], row["provider"], us, value if us is None else None, SOURCES[row["source"]])


with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as _file:
    PUBLISHED = tuple(map(_published, csv.DictReader(_file)))
