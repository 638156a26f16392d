"""Times that others have published for a known layer on a known GPU. This project has measured none of them.

If a source timed the recurrence without W_ih x, the case has I = 1, where W_ih x is next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.timing.cases import Case
from rnnfast.reference import GATES

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True)
class Published:
    """`us_per_step`: microseconds a time step of the whole case by `provider` on `gpu`. `source`: where the figure is from."""

    case: Case
    gpu: str
    provider: str
    us_per_step: float
    source: str


def _gflops_to_us(case: Case, tflops: float) -> float:
    """Microseconds a step of a forward pass without input side, for a source that gives TFLOP/s instead of a time."""
    return 2 * GATES[case.cell_name] * case.H * case.H * case.B / (tflops * 1e6)


# the configuration is from its notebooks. The figures were read off its plots
_FLASHRNN = "FlashRNN's speed experiments, H100 SXM, T = 1024 (arXiv 2412.07752, github.com/NX-AI/flashrnn)"
_DEEPBENCH = "DeepBench, README, recurrent ops in training, cuDNN (github.com/baidu-research/DeepBench, commit 106e523)"
_BAIDU = "Diamos et al. 2016, Persistent RNNs, 2.8 TFLOP/s at a batch of 4 (proceedings.mlr.press/v48/diamos16)"


def _deepbench(cell: str, T: int, B: int, H: int, gpu: str, total_ms: float, forward_tflops: float) -> list[Published]:
    """A row of DeepBench's table, which has the total time of forward and backward, and the TFLOP/s of forward."""
    forward, training = (Case(cell, T, B, 1, H, dtype="float32", mode=mode) for mode in ("forward", "training"))
    return [
        Published(forward, gpu, "cuDNN", _gflops_to_us(forward, forward_tflops), _DEEPBENCH),
        Published(training, gpu, "cuDNN", total_ms * 1e3 / T, _DEEPBENCH),
    ]


def _flashrnn(provider: str, I: int, dtype: str, forward_us: float, training_us: float) -> list[Published]:
    case = {"cell": "LSTM", "T": 1024, "B": 16, "I": I, "H": 768, "dtype": dtype}
    return [
        Published(Case(**case, mode=mode), "H100", provider, us, _FLASHRNN)
        for mode, us in (("forward", forward_us), ("training", training_us))
    ]


_PERSISTENT = Case("RNN", 256, 4, 1, 1152, dtype="float32", mode="forward")

PUBLISHED: tuple[Published, ...] = (
    *_flashrnn("cuDNN", 768, "float16", 1.96, 5.07),
    *_flashrnn("FlashRNN fused", 1, "bfloat16", 4.76, 13.3),
    *_flashrnn("haste", 768, "float32", 18.0, 42.8),
    *_deepbench("RNN", 50, 16, 1760, "Titan X (Pascal)", 7.75, 1.20),
    *_deepbench("RNN", 50, 32, 2560, "Titan X (Maxwell)", 21.99, 1.86),
    *_deepbench("LSTM", 25, 128, 1024, "Titan Xp", 9.76, 5.17),
    *_deepbench("GRU", 1500, 32, 2816, "Titan X (Pascal)", 1790.75, 4.05),
    Published(_PERSISTENT, "Titan X (Maxwell)", "Persistent RNN", _gflops_to_us(_PERSISTENT, 2.8), _BAIDU),
)
