"""Times that others have published for a known layer on a known GPU (published.csv). This project has measured none of them.

Some sources give TFLOP/s of a forward pass instead of a time. If a source timed the recurrence without W_ih x, the case has
I = 1, where W_ih x is next to nothing.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing.cases import Case
from rnnfast.reference import GATES

SOURCES = {
    # the configuration is from its notebooks; the figures were read off its plots
    "FlashRNN": "FlashRNN's speed experiments, H100 SXM, T = 1024 (arXiv 2412.07752, github.com/NX-AI/flashrnn)",
    "DeepBench": "DeepBench, README, recurrent ops in training, cuDNN (github.com/baidu-research/DeepBench, commit 106e523)",
    "Persistent RNNs": "Diamos et al. 2016, Persistent RNNs, 2.8 TFLOP/s at a batch of 4 (proceedings.mlr.press/v48/diamos16)",
}


class Published(NamedTuple):
    """`us_per_step`: microseconds a time step of the whole case by `provider` on `gpu`."""

    case: Case
    gpu: str
    provider: str
    us_per_step: float
    source: str


def _published(row: dict[str, str]) -> Published:
    case = Case.parse(row["case"])
    flops = 2 * GATES[case.cell_name] * case.H * case.H * case.B
    us = float(row["us_per_step"] or flops / (float(row["tflops"] or 1) * 1e6))
    return Published(case, row["gpu"], row["provider"], us, SOURCES[row["source"]])


with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as _file:
    PUBLISHED = tuple(map(_published, csv.DictReader(_file)))
