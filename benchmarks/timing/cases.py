"""What is measured. A `Case` is one layer, stack or model on one input in one mode. A named set is a list of cases.

sets.txt has the sets. A case has the same sizes on every machine. Only the set "quick" has other, smaller cases on a CPU.
"""

import configparser
import dataclasses
import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}  # the names in rnnfast.reference and in the kernels
DTYPES = {  # the dtype of the tensors, and whether float32 products may use TF32
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
MODES = ("inference", "forward", "backward", "training")


class Model(NamedTuple):
    """What stands around the stack of a case. Its results are what `returns` says.

    This is "all" (y and the last states), "output" (y), "h_n", "c_n", or "last" (ten outputs of a linear layer on the last y).
    """

    words: str = ""
    returns: str = "all"
    states: bool = False  # whether the call gives the initial states. Otherwise they are zero
    batch_first: bool = False  # whether x and y are (B, T, ...)
    lengths: bool = False  # whether x is padded, and the call gives the lengths of its sequences


MODELS = {  # by the end of a case's id. kb35 to kb42 are problems 35 to 42 of KernelBench's level 3 (docs/benchmarks.md)
    "": Model(),
    "lengths": Model("padded, with lengths", lengths=True),
    "kb35": Model("KernelBench 35", "last", True, True),
    "kb36": Model("KernelBench 36", "h_n", True, True),
    "kb37": Model("KernelBench 37", "c_n", True, True),
    "kb38": Model("KernelBench 38", "last", True, True),
    "kb39": Model("KernelBench 39", "output", True),
    "kb40": Model("KernelBench 40", "h_n", True),
    "kb41": Model("KernelBench 41", "output", True),
    "kb42": Model("KernelBench 42", "h_n", True),
}


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
        model: a name in `MODELS`.
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
    model: str = ""

    def __post_init__(self) -> None:
        options = {"cell": CELLS, "dtype": DTYPES, "mode": MODES, "directions": (1, 2), "model": MODELS}
        for field, choices in options.items():
            if getattr(self, field) not in choices:
                raise Unknown(field, getattr(self, field), map(str, choices))
        for field in ("T", "B", "I", "H", "layers"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"{field} of a case must be a positive integer, got {getattr(self, field)!r}")
        if self.model and (self.packed or (self.around.returns == "c_n" and self.cell != "LSTM")):
            raise ValueError(f"no case has the model {self.model!r} around {'packed input' if self.packed else self.cell}")

    @property
    def id(self) -> str:
        """The name of the case, which --only-case matches."""
        parts = [self.cell, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.layers}"] * (self.layers > 1) + ["bi"] * (self.directions == 2)
        return "-".join([*parts, self.dtype, self.mode, *["packed"] * self.packed, *[self.model] * bool(self.model)])

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case with the id `name`; without I, I is H. Raises ValueError for a name that is no id."""
        pattern = r"(\w+)-T(\d+)-B(\d+)(?:-I(\d+))?-H(\d+)(?:-L(\d+))?(-bi)?-(\w+)-(\w+)(-packed)?(?:-(\w+))?"
        match = re.fullmatch(pattern, name)
        if not match:
            raise ValueError(f"{name!r} is no case; one looks like LSTM-T1024-B16-I768-H768-L2-bi-float16-training-packed")
        cell, T, B, I, H, layers, bi, dtype, mode, packed, model = match.groups()
        sizes = int(T), int(B), int(I or H), int(H), int(layers or 1), 2 if bi else 1
        return cls(cell, *sizes, dtype, mode, bool(packed), model or "")

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
    def around(self) -> Model:
        return MODELS[self.model]

    @property
    def lengths(self) -> list[int]:
        """Lengths of the sequences of the batch, longest first: spread evenly from T down to about T / 4 if the case is packed,
        to 1 if the call gives lengths, and T otherwise."""
        if self.around.lengths:
            return [self.T - (self.T - 1) * b // max(1, self.B - 1) for b in range(self.B)]
        if not self.packed:
            return [self.T] * self.B
        return [max(1, self.T - (3 * self.T * b) // (4 * max(1, self.B - 1))) for b in range(self.B)]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def _cases(pattern: str) -> list[Case]:
    """The cases that a line of sets.txt, `pattern`, describes."""
    if braces := re.search(r"\{(.*?)\}", pattern):
        parts = braces[1].split(",")
        return [case for part in parts for case in _cases(pattern.replace(braces[0], part, 1))]
    return [Case.parse(pattern)]


def _read_sets() -> dict[str, list[Case]]:
    lines = configparser.ConfigParser(allow_no_value=True, delimiters="=", inline_comment_prefixes="#")
    lines.optionxform = str  # a case keeps its capitals
    lines.read(Path(__file__).with_name("sets.txt"), encoding="utf-8")
    return {name: [case for pattern in lines[name] for case in _cases(pattern)] for name in lines.sections()}


_READ = _read_sets()
SETS = [name for name in _READ if name != "quick cpu"]


def named_set(name: str, device: str) -> list[Case]:
    """The cases of the set `name` on "cuda" or "cpu". Raises `Unknown`."""
    if name not in SETS:
        raise Unknown("set", name, SETS)
    return _READ["quick cpu" if name == "quick" and device == "cpu" else name]


def chosen(sets: list[str], device: str, only: list[str] | None = None) -> list[tuple[str, Case]]:
    """(set, case) of all cases of `sets`, each case once. With `only`: the cases whose id matches one of its patterns.

    Raises:
        Unknown: a set that does not exist, or a pattern that matches no case.
    """
    found: dict[str, tuple[str, Case]] = {}
    for name in sets:
        for case in named_set(name, device):
            found.setdefault(case.id, (name, case))
    for pattern in only or ():
        if not fnmatch.filter(found, pattern):
            raise Unknown("case", pattern, found)
    return [each for name, each in found.items() if only is None or any(fnmatch.fnmatch(name, one) for one in only)]
