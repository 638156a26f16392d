"""Reads and writes the file in which `rnnfast tune` keeps what it measured on a GPU.

Each GPU has one JSON file. RNNFAST_TUNING_FILE gives its path. The default is ``rnnfast/<name of the GPU>.json`` in
XDG_CACHE_HOME or ``~/.cache``. It holds one `Entry` for each `Shape` that was measured. A file that is damaged, or from another
GPU or other versions, is `Unusable`.

The file names the tiles of a plan. The planner itself then makes the plan with these tiles, or there is none. No file can
therefore cause a launch that the planner would not make.
"""

from __future__ import annotations

import json
import operator
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rnnfast.choice.gpu import driver_version
from rnnfast.choice.pipeline import grouping
from rnnfast.reference import GATES
from rnnfast.settings import TUNING_FILE

if TYPE_CHECKING:
    from rnnfast.kernels.families import Plan
    from rnnfast.kernels.persistent.limits import GpuLimits

__all__ = [
    "Entry", "Shape", "Unusable", "decode", "encode", "machine", "names", "plan_with", "read", "slug", "store", "tiles",
    "where",
]  # fmt: skip

FORMAT, SCHEMA = "rnnfast tuning", 2
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
SIZES = ("T", "B", "I", "H", "layers", "directions")
MOST_ROWS = 1 << 16  # with more batch rows, no plan is looked for
FITTED = ("steps", "H_PAD", "BLOCK_K")  # fields of a plan that follow from the batch; the file does not hold them


class Unusable(ValueError):
    """A tuning file cannot be used. `kind` is "damaged", "other GPU" or "other versions"."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


@dataclass(frozen=True)
class Shape:
    """The sizes, dtype and mode of a call of a layer.

    Attributes:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        dtype: "float16", "bfloat16" or "float32".
        precision: "ieee" or "tf32", the precision of float32 products. "half" for the other dtypes.
        T, B, I, H, layers, directions: the sizes.
        training: whether the call is forward and backward. If not, it is forward only.
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
    """The result for a shape.

    Attributes:
        shape: the shape that was measured.
        winner: "torch" if PyTorch's own layer was the fastest, else "triton".
        forward, backward: the plan of the fastest kernels of rnnfast. None means the step kernels.
        times: the time of each candidate in microseconds per time step, by the candidate's name.
        members: how many of the shape's group (`rnnfast.choice.pipeline`) run at once with these plans, forward and backward.
    """

    shape: Shape
    winner: str
    forward: Plan | None = None
    backward: Plan | None = None
    times: dict[str, float] = field(default_factory=dict, hash=False)
    members: tuple[int, int] = (1, 1)


def where(gpu: GpuLimits) -> Path:
    """The path of the tuning file of `gpu`. The file need not exist."""
    if named := TUNING_FILE.get():
        return Path(os.path.expanduser(named))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "rnnfast" / f"{slug(gpu)}.json"


def slug(gpu: GpuLimits) -> str:
    """The name of a GPU as that of a file."""
    return re.sub("[^a-z0-9]+", "-", gpu.name.lower()).strip("-")


def machine(gpu: GpuLimits) -> dict[str, dict[str, Any]]:
    """The facts on which a measurement depends: the GPU and the versions of the software."""
    import triton

    from rnnfast.version import __version__

    return {
        "gpu": {"name": gpu.name, "capability": gpu.arch or gpu.capability, "sms": gpu.sms},
        "versions": {
            "rnnfast": __version__,
            "torch": str(torch.__version__),
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        },
    }


def names(dtype: torch.dtype, precision: str) -> tuple[str, str]:
    """`Shape.dtype` and `Shape.precision` for a dtype and PyTorch's setting for float32 products."""
    return DTYPES[dtype], precision if dtype == torch.float32 else "half"


def encode(entry: Entry) -> dict[str, Any]:
    """The entry as a JSON object, which `decode` reads."""
    plans = {"forward": entry.forward, "backward": entry.backward}
    names = {side: plan and tiles(plan) for side, plan in plans.items()}
    members = {"members": list(entry.members)}
    return asdict(entry.shape) | {"winner": entry.winner} | names | members | {"us_per_step": entry.times}


def decode(raw: Any, gpu: GpuLimits) -> Entry:
    """The entry that `encode` wrote.

    Raises:
        ValueError: `raw` is not such an entry, or the planner has no such plan for `gpu`.
    """
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
    members, most = raw.get("members"), grouping(shape.layers, shape.directions).members
    if not isinstance(members, list) or len(members) != 2 or not all(type(k) is int and 1 <= k <= most for k in members):
        raise ValueError(f"members is {members!r}")
    plans = {
        side: plan_with(raw.get(side), shape, shape.B, side == "backward", gpu, at_once)
        for side, at_once in zip(("forward", "backward"), members, strict=True)
    }
    for side, plan in plans.items():
        if plan is None and raw.get(side) is not None:
            raise ValueError(f"{side} is {raw[side]!r}, which is no plan for {shape} on this GPU")
    times = {name: float(time) for name, time in times.items()}
    return Entry(shape, raw["winner"], **plans, times=times, members=(members[0], members[1]))


def tiles(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in asdict(plan).items() if name not in FITTED}


def plan_with(wanted: Any, shape: Shape, B: int, backward: bool, gpu: GpuLimits, members: int = 1) -> Plan | None:
    """The plan that a planner makes for `B` rows of `members` at once with the tiles `wanted`. None if none makes it."""
    from rnnfast.kernels.families import plans_to_measure

    if wanted is None or (backward and not shape.training) or B > MOST_ROWS:
        return None
    itemsize = 4 if shape.dtype == "float32" else 2
    sizes = GATES[shape.cell], B, shape.H, itemsize, shape.precision, backward, gpu
    plans = plans_to_measure(*sizes, sys.maxsize, members)
    return next((plan for plan in plans if tiles(plan) == wanted), None)


def read(path: Path, gpu: GpuLimits, is_shipped: bool = False) -> list[Entry]:
    """The entries of a file.

    Args:
        path: of the file.
        gpu: this machine's.
        is_shipped: it comes with the package. Then, of the versions, the first two numbers of rnnfast's and Triton's count: the
            plans are this rnnfast's and the kernels that compiler's. A file of the user's is of exactly this machine.

    Raises:
        FileNotFoundError: there is no such file.
        Unusable: the file is damaged, or from another GPU or other versions.
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
    here, same = machine(gpu), operator.eq
    if is_shipped:
        here["versions"], same = {name: here["versions"][name] for name in ("rnnfast", "triton")}, _same_series
    for part, kind in (("gpu", "other GPU"), ("versions", "other versions")):
        there = data.get(part)
        if not isinstance(there, dict):
            raise Unusable("damaged", f"{path} is damaged: {part} is {there!r}")
        found = [(name, there.get(name), value) for name, value in here[part].items()]
        others = [f"{name} {its!r}, here {value!r}" for name, its, value in found if not same(its, value)]
        if others:
            raise Unusable(kind, f"{path} was measured with {kind}: {'; '.join(others)}")
    try:
        if not isinstance(data.get("entries"), list):
            raise ValueError(f"entries is {data.get('entries')!r}")
        return [decode(raw, gpu) for raw in data["entries"]]
    except ValueError as error:
        raise Unusable("damaged", f"{path} is damaged: {error}") from error


def _same_series(one: Any, other: Any) -> bool:
    """Whether two versions have their first two numbers in common; any other values: whether they are equal."""
    texts = isinstance(one, str) and isinstance(other, str)
    return one.split(".")[:2] == other.split(".")[:2] if texts else one == other


def store(entries: Iterable[Entry], path: Path, gpu: GpuLimits) -> None:
    """Add entries to the file. They replace entries of the same shape, and all entries from other versions are dropped.

    The whole file is replaced at once, or stays as it was.

    Raises:
        Unusable: the file is damaged or from another GPU.
    """
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
    write(data, path)


def write(data: dict[str, Any], path: Path) -> None:
    """Write JSON to `path`, whole or not at all. The old content stays if the disk is full or the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # so that other users can read it
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
