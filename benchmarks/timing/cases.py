"""What is measured. A `Case` is one layer or stack on one input in one mode; a named set is a list of cases.

A case is the same on every machine. Only the set "quick" is another list on a CPU: its shapes are smaller there.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from dataclasses import dataclass

import torch

__all__ = ["DTYPES", "MODES", "REAL", "SETS", "Case", "Unknown", "chosen", "named_set"]

CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}  # to the names that rnnfast.reference and the kernels have
DTYPES = {  # of the tensors, and whether float32 products may use TF32
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
MODES = ("inference", "forward", "backward", "training")


class Unknown(ValueError):
    """A name that does not exist. The message lists those that do."""

    def __init__(self, what: str, name: str, choices) -> None:
        super().__init__(f"unknown {what} {name!r}; there are: {', '.join(choices)}")


@dataclass(frozen=True)
class Case:
    """A layer, its input, and which part of its work is timed.

    Attributes:
        cell: "LSTM", "GRU" or "RNN" (tanh).
        T, B, I, H: time steps, batch, input size and hidden size.
        layers, directions: of the stack. directions is 1 or 2.
        dtype: a name in `DTYPES`. "tf32" is float32 whose products may use TF32, which a CPU does not have.
        mode: "inference" (no gradients), "forward" (keeps what backward needs), "backward" (alone), or "training" (forward and
            backward).
        packed: the input is a PackedSequence with lengths spread evenly from T down to about T / 4.
    """

    cell: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    directions: int = 1
    dtype: str = "float16"
    mode: str = "training"
    packed: bool = False

    def __post_init__(self) -> None:
        for field, choices in (("cell", CELLS), ("dtype", DTYPES), ("mode", MODES), ("directions", (1, 2))):
            if getattr(self, field) not in choices:
                raise Unknown(field, getattr(self, field), map(str, choices))
        for field in ("T", "B", "I", "H", "layers"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"{field} of a case must be a positive integer, got {getattr(self, field)!r}")

    @property
    def id(self) -> str:
        """The name of the case, which --only-case matches."""
        parts = [self.cell, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.layers}"] * (self.layers > 1) + ["bi"] * (self.directions == 2)
        return "-".join([*parts, self.dtype, self.mode, *["packed"] * self.packed])

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case with the id `name`. Raises ValueError for a name that is no id."""
        pattern = r"(\w+)-T(\d+)-B(\d+)-I(\d+)-H(\d+)(?:-L(\d+))?(-bi)?-(\w+)-(\w+?)(-packed)?"
        match = re.fullmatch(pattern, name)
        if not match:
            raise ValueError(f"{name!r} is no case; one looks like LSTM-T1024-B16-I768-H768-L2-bi-float16-training-packed")
        cell, *sizes, layers, bi, dtype, mode, packed = match.groups()
        return cls(cell, *map(int, sizes), int(layers or 1), 2 if bi else 1, dtype, mode, bool(packed))

    @property
    def cell_name(self) -> str:
        return CELLS[self.cell]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def tf32(self) -> bool:
        return DTYPES[self.dtype][1]

    @property
    def lengths(self) -> list[int]:
        """Lengths of the sequences of the batch, longest first. All are T if the case is not packed."""
        if not self.packed:
            return [self.T] * self.B
        return [max(1, self.T - (3 * self.T * b) // (4 * max(1, self.B - 1))) for b in range(self.B)]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def _both(*cases: Case) -> list[Case]:
    """Each case in inference and in training."""
    return [dataclasses.replace(case, mode=mode) for case in cases for mode in ("inference", "training")]


def _cudnn_best() -> list[Case]:
    """Cases of cuDNN's static persistent path: float16 LSTM, one layer and direction, H a multiple of 128 up to 1024."""
    return _both(*(Case("LSTM", 1024, B, H, H) for H in range(256, 1025, 128) for B in (8, 16, 32, 64, 128)))


def _cudnn_standard() -> list[Case]:
    """Cases that this path does not take, one reason after another."""
    half = [Case("GRU", 512, B, H, H) for H in (256, 512, 768, 1024) for B in (16, 64)]
    bfloat16 = [Case(cell, 512, 32, H, H, dtype="bfloat16") for cell in ("LSTM", "GRU") for H in (512, 1024)]
    tf32 = [Case(cell, 512, 32, H, H, dtype="tf32") for cell in ("LSTM", "GRU") for H in (256, 512)]
    ieee = [Case("LSTM", 512, 32, 512, 512, dtype="float32")]
    stacks = [Case("LSTM", 512, 32, 512, 512, layers=layers) for layers in (2, 4)]
    directions = [Case(cell, 512, 32, 512, 512, directions=2) for cell in ("LSTM", "GRU")]
    packed = [Case(cell, 512, 32, 512, 512, packed=True) for cell in ("LSTM", "GRU")]
    odd = [Case("LSTM", 333, 5, 39, 200), Case("LSTM", 512, 30, 500, 500), Case("GRU", 512, 7, 129, 257)]
    return _both(*half, *bfloat16, *tf32, *ieee, *stacks, *directions, *packed, *odd)


def _small() -> list[Case]:
    shapes = itertools.product(("LSTM", "GRU"), (16, 32, 64, 128), (1, 16, 128), ("float16", "float32"))
    return _both(*(Case(cell, 256, B, H, H, dtype=dtype) for cell, H, B, dtype in shapes))


def _large() -> list[Case]:
    shapes = itertools.product(("LSTM", "GRU"), (1536, 2048, 3072, 4096), (16, 64))
    return _both(*(Case(cell, 256, B, H, H) for cell, H, B in shapes))


def _long() -> list[Case]:
    shapes = itertools.product(("LSTM", "GRU"), (10**4, 10**5, 10**6), (1, 8))
    return _both(*(Case(cell, T, B, 128, 128) for cell, T, B in shapes))


# (name, source, case): recurrent layers of published models. T and B come from the source, or are usual for its kind of data.
# Layers of a stack that differ in size are cases of their own.
REAL: tuple[tuple[str, str, Case], ...] = (
    ("PTB large LSTM", "Zaremba, Sutskever and Vinyals 2014", Case("LSTM", 35, 20, 1500, 1500, layers=2)),
    ("AWD-LSTM, first layer", "Merity, Keskar and Socher 2017", Case("LSTM", 70, 80, 400, 1150)),
    ("AWD-LSTM, second layer", "Merity, Keskar and Socher 2017", Case("LSTM", 70, 80, 1150, 1150)),
    ("char-rnn", "Karpathy 2015, its README's example", Case("LSTM", 50, 50, 512, 512, layers=2)),
    ("GNMT encoder, upper layers", "Wu et al. 2016", Case("LSTM", 50, 128, 1024, 1024, layers=7)),
    ("DeepSpeech 0.9 LSTM", "Mozilla DeepSpeech, n_hidden 2048", Case("LSTM", 500, 24, 2048, 2048)),
    ("RNN-T encoder, first layers", "MLPerf RNN-T, 240 -> 1024", Case("LSTM", 400, 32, 240, 1024, layers=2)),
    ("Tacotron 2 encoder", "Shen et al. 2018", Case("LSTM", 150, 64, 512, 256, directions=2)),
    ("CRNN", "Shi, Bai and Yao 2015", Case("LSTM", 26, 64, 512, 256, layers=2, directions=2)),
    ("Open-Unmix", "Stoter et al. 2019", Case("LSTM", 255, 16, 512, 256, layers=3, directions=2, dtype="tf32")),
    ("InferSent", "Conneau et al. 2017", Case("LSTM", 40, 64, 300, 2048, directions=2)),
    ("R2D2", "Kapturowski et al. 2019, replayed 80 steps", Case("LSTM", 80, 64, 512, 512, dtype="tf32")),
    ("medaka", "Oxford Nanopore medaka, chunks of 10000", Case("GRU", 10000, 100, 10, 128, layers=2, directions=2)),
    ("WaveRNN", "Kalchbrenner et al. 2018, 896 units, windows of 960", Case("GRU", 960, 32, 128, 896)),
)


def _real() -> list[Case]:
    return _both(*(case for _, _, case in REAL))


def _quick() -> list[Case]:
    return [
        *_both(Case("LSTM", 1024, 16, 768, 768), Case("GRU", 512, 16, 768, 768), Case("LSTM", 512, 64, 512, 512)),
        *_both(Case("LSTM", 512, 32, 512, 512, dtype="bfloat16"), Case("GRU", 512, 32, 512, 512, dtype="tf32")),
        Case("LSTM", 512, 32, 512, 512, layers=2, directions=2),
        Case("GRU", 333, 5, 39, 200),
    ]


def _quick_cpu() -> list[Case]:
    f32 = {"dtype": "float32"}
    return [
        *_both(Case("LSTM", 1, 1, 8, 8, **f32), Case("GRU", 16, 1, 64, 64, **f32)),
        *_both(Case("LSTM", 32, 8, 128, 128, **f32), Case("GRU", 32, 8, 128, 128, **f32)),
        Case("LSTM", 64, 16, 256, 256, **f32),
        Case("RNN", 32, 5, 39, 50, layers=2, directions=2, **f32),
        Case("LSTM", 32, 8, 64, 64, packed=True, **f32),
    ]


SETS = {
    "cudnn-best": _cudnn_best,
    "cudnn-standard": _cudnn_standard,
    "small": _small,
    "large": _large,
    "long": _long,
    "real": _real,
    "quick": _quick,
}


def named_set(name: str, device: str) -> list[Case]:
    """The cases of the set `name` on "cuda" or "cpu". Raises `Unknown`."""
    if name not in SETS:
        raise Unknown("set", name, SETS)
    return _quick_cpu() if name == "quick" and device == "cpu" else SETS[name]()


def chosen(sets: list[str], device: str, only: list[str] | None = None) -> list[tuple[str, Case]]:
    """(set, case) of all cases of `sets`, each case once. With `only`: the cases whose id matches one of its patterns.

    Raises:
        Unknown: a set that does not exist, or a pattern that matches no case.
    """
    found: dict[str, tuple[str, Case]] = {}
    for name in sets:
        for case in named_set(name, device):
            found.setdefault(case.id, (name, case))
    if only is None:
        return list(found.values())
    matches = [fnmatch.filter(found, pattern) for pattern in only]
    for pattern, ids in zip(only, matches, strict=True):
        if not ids:
            raise Unknown("case", pattern, found)
    wanted = set(itertools.chain(*matches))
    return [found[name] for name in found if name in wanted]
