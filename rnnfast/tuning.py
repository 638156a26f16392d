"""What `rnnfast tune` measured on this GPU: the file, and what it says of a call.

One JSON file a GPU: RNNFAST_TUNING_FILE, else ``rnnfast/<name of the GPU>.json`` in XDG_CACHE_HOME or ``~/.cache``. It is read
once a process, when a call first runs on that GPU, and holds one entry for each `Shape` that was measured. docs/tuning.md says
which calls an entry serves.

A file can be damaged, or be of another GPU or of other versions: then it is not used, with one `TuningWarning`. It names
tiles, not launches: what is launched is a plan of the planner's own with these tiles, or nothing, so that no file can have
anything launched that the planner would not.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rnnfast.choice.obstacles import user_level
from rnnfast.gpu import driver_version
from rnnfast.reference import GATES
from rnnfast.settings import TUNING_FILE

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits, PersistentPlan

__all__ = ["Entry", "Shape", "TuningWarning", "Unusable", "assume", "kernels", "read", "store", "table", "torch_wins", "where"]

FORMAT, SCHEMA = "rnnfast tuning", 1
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
SIZES = ("T", "B", "I", "H", "layers", "directions")
MOST_ROWS = 1 << 16  # of a batch that a persistent plan is looked for
FITTED = ("steps", "H_PAD", "BLOCK_K")  # fields of a plan that the planner fits to the batch: not part of what was chosen

_tables: dict[GpuLimits, Table] = {}


class TuningWarning(UserWarning):
    """The tuning file of this GPU is not used; the message says why."""


class Unusable(ValueError):
    """A tuning file that is not used. `kind`: "damaged", "other GPU" or "other versions"."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


@dataclass(frozen=True)
class Shape:
    """A layer and a call of it.

    Attributes:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        dtype: "float16", "bfloat16" or "float32".
        precision: of float32 products, "ieee" or "tf32"; "half" for the other dtypes.
        T, B, I, H, layers, directions: sizes.
        training: forward and backward; else forward alone.
    """

    cell: str
    dtype: str
    precision: str
    T: int
    B: int
    I: int
    H: int
    layers: int
    directions: int
    training: bool

    def __str__(self) -> str:
        dtype = "tf32" if self.precision == "tf32" else self.dtype
        extras = f" {self.layers} layers" if self.layers > 1 else ""
        extras += " 2 directions" if self.directions > 1 else ""
        mode = "training" if self.training else "inference"
        return f"{self.cell} {dtype} T={self.T} B={self.B} I={self.I} H={self.H}{extras}, {mode}"


@dataclass(frozen=True)
class Entry:
    """What was found for a shape.

    Attributes:
        shape: what was measured.
        winner: "torch" if PyTorch's own layer was the fastest, else "triton".
        forward, backward: the fastest of rnnfast's kernels: a persistent plan, or None for the step kernels.
        times: microseconds a time step of each candidate, by its name.
    """

    shape: Shape
    winner: str
    forward: PersistentPlan | None = None
    backward: PersistentPlan | None = None
    times: dict[str, float] = field(default_factory=dict, hash=False)


@dataclass
class Table:
    """The entries for one GPU, and where they come from.

    Attributes:
        entries: none where no file is used.
        path: of the file.
        unused: why it is not used, else empty.
    """

    entries: list[Entry]
    path: Path | None = None
    unused: str = ""
    found: dict[tuple, Any] = field(default_factory=dict)  # what lookups gave, by their arguments


def where(gpu: GpuLimits) -> Path:
    """The tuning file of `gpu`, there or not."""
    if named := TUNING_FILE.get():
        return Path(os.path.expanduser(named))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "rnnfast" / f"{re.sub('[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"


def machine(gpu: GpuLimits) -> dict[str, dict[str, Any]]:
    """All that a measurement stands for: the GPU, and the versions of what runs on it."""
    import triton

    from rnnfast.version import __version__

    return {
        "gpu": {"name": gpu.name, "capability": gpu.capability, "sms": gpu.sms},
        "versions": {
            "rnnfast": __version__,
            "torch": str(torch.__version__),
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        },
    }


def names(dtype: torch.dtype, precision: str) -> tuple[str, str]:
    """`Shape.dtype` and `Shape.precision`, from a dtype and PyTorch's setting for float32 products."""
    return DTYPES[dtype], precision if dtype == torch.float32 else "half"


# The file


def encode(entry: Entry) -> dict[str, Any]:
    """As JSON; `decode` reads it."""
    plans = {"forward": entry.forward, "backward": entry.backward}
    names = {side: plan and _tiles(plan) for side, plan in plans.items()}
    return asdict(entry.shape) | {"winner": entry.winner} | names | {"us_per_step": entry.times}


def decode(raw: Any, gpu: GpuLimits) -> Entry:
    """The entry that `encode` wrote; a `ValueError` for anything else, a plan that does not fit `gpu` included."""
    if not isinstance(raw, dict):
        raise ValueError("an entry is no object")
    for name in SIZES:
        if type(raw.get(name)) is not int or not 1 <= raw[name] < 2**31:
            raise ValueError(f"{name} is {raw.get(name)!r}")
    dtypes = {"float16": ("half",), "bfloat16": ("half",), "float32": ("ieee", "tf32")}
    dtype = raw.get("dtype") if isinstance(raw.get("dtype"), str) else None
    for name, choices in (
        ("cell", GATES),
        ("dtype", dtypes),
        ("precision", dtypes.get(dtype or "", ())),
        ("winner", ("torch", "triton")),
    ):
        if not isinstance(raw.get(name), str) or raw[name] not in choices:
            raise ValueError(f"{name} is {raw.get(name)!r}")
    if not isinstance(raw.get("training"), bool):
        raise ValueError(f"training is {raw.get('training')!r}")
    times = raw.get("us_per_step")
    if not isinstance(times, dict) or not all(type(t) in (int, float) and 0 < t < 1e12 for t in times.values()):
        raise ValueError(f"us_per_step is {times!r}")
    shape = Shape(**{name: raw[name] for name in Shape.__dataclass_fields__})
    plans = {side: _plan(raw.get(side), shape, shape.B, side == "backward", gpu) for side in ("forward", "backward")}
    for side, plan in plans.items():
        if plan is None and raw.get(side) is not None:
            raise ValueError(f"{side} is {raw[side]!r}, which is no plan for {shape} on this GPU")
    return Entry(shape, raw["winner"], **plans, times={name: float(time) for name, time in times.items()})


def _tiles(plan: PersistentPlan) -> dict[str, Any]:
    return {name: value for name, value in asdict(plan).items() if name not in FITTED}


def _plan(tiles: Any, shape: Shape, B: int, backward: bool, gpu: GpuLimits) -> PersistentPlan | None:
    """The planner's own plan with these tiles, if it has one for `B` rows."""
    from rnnfast.kernels.persistent.plan import persistent_plans

    if tiles is None or (backward and not shape.training) or B > MOST_ROWS:
        return None
    itemsize = 4 if shape.dtype == "float32" else 2
    plans = persistent_plans(GATES[shape.cell], B, shape.H, itemsize, shape.precision, backward, gpu, sys.maxsize)
    return next((plan for plan in plans if _tiles(plan) == tiles), None)


def read(path: Path, gpu: GpuLimits) -> list[Entry]:
    """The entries of a file.

    Raises:
        FileNotFoundError: if there is none.
        Unusable: if it is damaged, or of another GPU or other versions.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable("damaged", f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise Unusable("damaged", f"{path} is no tuning file of rnnfast")
    if data.get("schema") != SCHEMA:
        raise Unusable("other versions", f"{path} has schema {data.get('schema')!r}, and this rnnfast reads {SCHEMA}")
    here = machine(gpu)
    for part, kind in (("gpu", "other GPU"), ("versions", "other versions")):
        there = data.get(part)
        if not isinstance(there, dict):
            raise Unusable("damaged", f"{path} is damaged: {part} is {there!r}")
        others = [
            f"{name} {there.get(name)!r}, here {value!r}" for name, value in here[part].items() if there.get(name) != value
        ]
        if others:
            raise Unusable(kind, f"{path} was measured with {kind}: {'; '.join(others)}")
    try:
        if not isinstance(data.get("entries"), list):
            raise ValueError(f"entries is {data.get('entries')!r}")
        return [decode(raw, gpu) for raw in data["entries"]]
    except ValueError as error:
        raise Unusable("damaged", f"{path} is damaged: {error}") from error


def store(entries: Iterable[Entry], path: Path, gpu: GpuLimits) -> None:
    """Add entries to the file, in place of those of the same shapes: the whole file is replaced at once, or stays as it was.
    What it held of other versions goes; `Unusable` for a file that is damaged or another GPU's."""
    try:
        known = read(path, gpu)
    except FileNotFoundError:
        known = []
    except Unusable as error:
        if error.kind != "other versions":
            raise
        known = []
    merged = {entry.shape: entry for entry in (*known, *entries)}
    data = {"format": FORMAT, "schema": SCHEMA, **machine(gpu), "entries": [encode(entry) for entry in merged.values()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # others may share it
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


# What it says of a call


def table(gpu: GpuLimits) -> Table:
    """What is known of `gpu`, read when first asked for."""
    if gpu not in _tables:
        path = where(gpu)
        try:
            _tables[gpu] = Table(read(path, gpu), path)
        except FileNotFoundError:
            _tables[gpu] = Table([], path, f"there is no {path}")
        except Unusable as error:
            _tables[gpu] = Table([], path, str(error))
            warnings.warn(f"{error}; it is not used", TuningWarning, stacklevel=user_level())
    return _tables[gpu]


@contextmanager
def assume(gpu: GpuLimits, entries: list[Entry]) -> Iterator[None]:
    """Within the ``with`` block these entries, and no file, say what runs on `gpu`."""
    before = _tables.get(gpu)
    _tables[gpu] = Table(entries)
    try:
        yield
    finally:
        del _tables[gpu]
        if before is not None:
            _tables[gpu] = before


def _long_enough(T: int, shape: Shape) -> bool:
    """Whether what was measured at `shape.T` holds for `T`: the time a step tells little of a much shorter sequence."""
    return T.bit_length() >= shape.T.bit_length() - 2


def _distance(T: int, shape: Shape) -> int:
    return abs(T.bit_length() - shape.T.bit_length())


def torch_wins(gpu: GpuLimits, shape: Shape) -> bool:
    """Whether PyTorch's own layer was the fastest for this very shape, but for T."""
    known = table(gpu)
    if not known.entries:
        return False
    key = replace(shape, T=1), shape.T.bit_length()
    if key not in known.found:
        near = [e for e in known.entries if replace(e.shape, T=shape.T) == shape and _long_enough(shape.T, e.shape)]
        near.sort(key=lambda entry: _distance(shape.T, entry.shape))
        known.found[key] = bool(near) and near[0].winner == "torch"
    return known.found[key]


def kernels(gpu: GpuLimits, cell: str, T: int, B: int, H: int, dtype: str, precision: str, training: bool) -> Entry | None:
    """The entry that says on which kernels a recurrence runs, its plans made for `B` rows; None where nothing was measured.

    The recurrence is the same for any input size, layer and direction. Of the entries for half to twice as many rows the
    nearest counts. Arguments as in `Shape`.
    """
    known = table(gpu)
    if not known.entries:
        return None
    key = (cell, T.bit_length(), B, H, dtype, precision, training)
    if key not in known.found:
        wanted = (cell, dtype, precision, H, training)
        near = []
        for entry in known.entries:
            shape = entry.shape
            same = (shape.cell, shape.dtype, shape.precision, shape.H, shape.training) == wanted
            if same and B <= 2 * shape.B and shape.B <= 2 * B and _long_enough(T, shape):
                distance = (abs(math.log(B / shape.B)), _distance(T, shape), shape.layers, shape.directions, shape.I)
                near.append((distance, entry))
        known.found[key] = _for_rows(min(near, key=lambda pair: pair[0])[1], B, gpu) if near else None
    return known.found[key]


def _for_rows(entry: Entry, B: int, gpu: GpuLimits) -> Entry:
    plans = [
        plan and _plan(_tiles(plan), entry.shape, B, backward, gpu)
        for plan, backward in ((entry.forward, False), (entry.backward, True))
    ]
    return replace(entry, forward=plans[0], backward=plans[1])
