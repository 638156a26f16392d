"""The least time that a case can take on a GPU, beside the prediction for the persistent kernels and what others have measured.

    python -m benchmarks.roofline [--case LSTM-T1024-B16-I768-H768-float16-training ...] [--gpu H100] [--results FILE] [--json]

Without --case: the case that cuDNN is best at, and others with published times. See `Floor` for what is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import asdict, dataclass

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.ceilings import STATED, Ceilings, of_results
from benchmarks.published import PUBLISHED
from rnnfast.reference import GATES, SAVED

__all__ = ["Floor", "Work", "floor", "parse_case", "predict", "work"]


def _cell(case: Case) -> str:
    return "rnn_tanh" if case.cell == "RNN" else case.cell.lower()


@dataclass(frozen=True)
class Work:
    """What any program has to do for one call of a case, whatever its algorithm.

    Attributes:
        flops: of the products: input side and recurrence, and in backward twice as many.
        loop_flops: of these, what has to be done step by step: W_hh h, and in backward W_hh^T times the gate gradients.
        bytes: moved between the program and the memory outside: x, y and all parameters once, in backward dy, dx and the
            parameters' gradients too. Activations kept for backward are not in it: they could be computed again.
        saved: bytes that rnnfast keeps for backward, for comparison; not a part of any floor.
        weight_bytes: of one layer's and direction's W_hh.
        chain: steps that have to follow one another: a layer can start a step behind the one below it.
        passes: 1, or 2 for forward and backward.
    """

    flops: float
    loop_flops: float
    bytes: float
    saved: float
    weight_bytes: int
    chain: int
    passes: int


def work(case: Case) -> Work:
    """Of `case`; of packed sequences only what is not padding."""
    gates, itemsize = GATES[_cell(case)], 4 if case.dtype == "float32" else 2
    rows = sum(case.lengths)
    inputs = [case.I] + [case.H * case.directions] * (case.layers - 1)
    recurrent = 2 * rows * gates * case.H * case.H * case.layers * case.directions
    input_side = sum(2 * rows * gates * case.H * width for width in inputs) * case.directions
    parameters = sum(gates * case.H * (width + case.H + 2) for width in inputs) * case.directions * itemsize
    x, y = rows * case.I * itemsize, rows * case.H * case.directions * itemsize
    forward, backward = case.mode != "backward", case.mode in ("backward", "training")
    moved = x + parameters + (y if forward else 0) + (y + x + parameters if backward else 0)
    unit = SAVED[_cell(case)] * itemsize + (4 if case.cell == "LSTM" else 0)
    return Work(
        flops=(recurrent + input_side) * (forward + 2 * backward),
        loop_flops=recurrent * (forward + backward),
        bytes=moved,
        saved=0 if case.mode == "inference" else rows * case.H * case.layers * case.directions * unit,
        weight_bytes=gates * case.H * case.H * itemsize,
        chain=case.T + case.layers - 1,
        passes=forward + backward,
    )


@dataclass(frozen=True)
class Floor:
    """The least seconds of one call that each limit allows; nothing is faster than the largest.

    compute: the FLOPs at the peak rate. hbm: the bytes that cannot have stayed in L2. l2: what the SMs have to get from one
    another and, of weights too large for all SMs together, from L2, at each step. exchange: one hop from SM to SM for each step
    of the chain, where one SM cannot hold W_hh. The terms can overlap (while one batch tile waits another computes), so the
    floor is their maximum; `no_overlap` is their sum, which a program that does one after another cannot beat.
    """

    compute: float
    hbm: float
    l2: float
    exchange: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.l2, self.exchange)

    @property
    def no_overlap(self) -> float:
        return self.compute + self.hbm + self.l2 + self.exchange

    @property
    def bound_by(self) -> str:
        return max(asdict(self), key=asdict(self).get)


def _words_per_element(gates: int, sms: int) -> float:
    """The least words that SMs hand over per element of h and step, of `sms` that share W_hh: in `rows` groups of units and
    `sms` / `rows` parts of the sum, h goes to the other groups and partial sums of each gate to the other parts."""
    return min((rows - 1) + gates * (sms / rows - 1) for rows in range(1, sms + 1))


def floor(case: Case, gpu: Ceilings, cold: bool = False) -> Floor:
    """Of one call of `case` on `gpu`; `cold`: nothing is in L2 when it begins."""
    todo, itemsize = work(case), 4 if case.dtype == "float32" else 2
    peak = gpu.flops_per_s["tf32" if case.tf32 else case.dtype]
    sms = math.ceil(todo.weight_bytes / gpu.sm_bytes)
    steps = case.T * todo.passes * case.layers * case.directions
    exchanged = _words_per_element(GATES[_cell(case)], min(sms, gpu.sms)) * sum(case.lengths) * case.H * itemsize
    reread = max(0, todo.weight_bytes - gpu.chip_bytes) * steps
    from_hbm = max(0, todo.weight_bytes - gpu.chip_bytes - gpu.l2_size) * steps
    outside = todo.bytes if cold else max(0, todo.bytes - gpu.l2_size)
    return Floor(
        compute=todo.flops / peak,
        hbm=(outside + from_hbm) / gpu.hbm_bytes_per_s,
        l2=(exchanged * todo.passes * case.layers * case.directions + reread) / gpu.l2_bytes_per_s,
        exchange=todo.chain * todo.passes * gpu.exchange_us * 1e-6 if sms > 1 else 0.0,
    )


def predict(case: Case, gpu: Ceilings) -> tuple[float, str]:
    """Microseconds a time step of `case` with the kernels that `benchmarks.static` compiles for `gpu`, and how they come about.

    The recurrence as predicted there from the machine code, one layer and direction after another; every other product at the
    peak rate, which no program reaches. So the prediction is on the low side.

    Raises:
        LookupError: a GPU for which our kernels are not compiled.
    """
    from benchmarks import static
    from benchmarks.offline import GPU_OF_ARCH

    archs = {name: arch for arch, name in GPU_OF_ARCH.items()} | {"H200": 90}
    if gpu.name not in archs:
        raise LookupError(f"our kernels are not compiled for {gpu.name}")
    dtype = "tf32" if case.tf32 else case.dtype
    rows = static.build([static.Job("persistent", archs[gpu.name], _cell(case), dtype, case.H, (case.B,))], 1)
    wanted = {"inference": [("forward", False)], "forward": [("forward", True)], "backward": [("backward", True)]}
    chosen = wanted.get(case.mode, wanted["forward"] + wanted["backward"])
    by_pass = {(row["direction"], row["training"]): row for row in rows}
    found = [by_pass[one] for one in chosen]
    todo = work(case)
    recurrence = sum(row["predicted_us"] for row in found) * case.layers * case.directions
    others = (todo.flops - todo.loop_flops) / gpu.flops_per_s[dtype] * 1e6 / case.T
    parts = [f"{row['family']} {row['direction']} {row['predicted_us']:.2f}" for row in found]
    return recurrence + others, ", ".join([*parts, f"other products {others:.2f}"])


def parse_case(name: str) -> Case:
    """The case with the id `name`, such as "LSTM-T1024-B16-I768-H768-float16-training".

    Raises:
        ValueError: a name that is no id of a case.
    """
    pattern = r"(\w+)-T(\d+)-B(\d+)-I(\d+)-H(\d+)(?:-L(\d+))?(-bi)?-(\w+)-(\w+?)(-packed)?"
    match = re.fullmatch(pattern, name)
    if not match:
        raise ValueError(f"{name!r} is no case; one looks like LSTM-T1024-B16-I768-H768-L2-bi-float16-training-packed")
    cell, T, B, I, H, layers, bi, dtype, mode, packed = match.groups()
    tf32 = dtype == "tf32"
    return Case(
        cell, int(T), int(B), int(I), int(H), int(layers or 1), 2 if bi else 1, "float32" if tf32 else dtype, tf32, mode,
        bool(packed),
    )  # fmt: skip


def _case_argument(name: str) -> Case:
    try:
        return parse_case(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Line:
    """A case on a GPU: its floor, and whatever else is known of it, in microseconds a time step."""

    case: Case
    gpu: str
    floor: Floor
    predicted: float | None
    how: str  # the prediction comes about, or why there is none
    times: dict[str, float]  # published or measured, by who and where


def line(case: Case, ceilings: Ceilings, measured: dict | None = None, compiled: bool = True) -> Line:
    times = {f"{p.provider}, published": p.us_per_step for p in PUBLISHED if (p.case, p.gpu) == (case, ceilings.name)}
    for row in measured["rows"] if measured else ():
        if results.key(row)[0] == case and row["timings"]:
            best = min(row["timings"], key=lambda timing: timing["p50"])
            times[f"{row['provider']}, measured, {best['how']}, {best['l2']} L2"] = best["p50"] / case.T
    predicted, how = None, "not asked for"
    if compiled:
        try:
            predicted, how = predict(case, ceilings)
        except LookupError as error:
            how = str(error)
    return Line(case, ceilings.name, floor(case, ceilings), predicted, how, times)


# beside the published cases, where nobody's time is known
OTHERS = (
    Case("GRU", 512, 16, 768, 768, mode="training"),
    Case("LSTM", 512, 64, 512, 512, mode="training"),
    Case("LSTM", 1024, 32, 1024, 1024, mode="training"),
    Case("LSTM", 256, 64, 2048, 2048, mode="training"),
    Case("LSTM", 10000, 1, 128, 128, mode="inference"),
)


def show(lines: list[Line]) -> None:
    for one in lines:
        per_step = 1e6 / one.case.T
        terms = ", ".join(f"{name} {seconds * per_step:.3g}" for name, seconds in asdict(one.floor).items())
        print(f"{one.case.id} on {one.gpu}, us a step")
        print(f"  floor      {one.floor.seconds * per_step:8.3g}   the largest of {terms}")
        print(f"  no overlap {one.floor.no_overlap * per_step:8.3g}   their sum")
        if one.predicted is not None:
            print(f"  predicted  {one.predicted:8.3f}   not measured: {one.how}")
        else:
            print(f"  predicted         -   {one.how}")
        for who, us in one.times.items():
            print(f"  {'measured' if 'measured' in who else 'published':10} {us:8.3f}   {who}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", type=_case_argument, help="ids of cases")
    parser.add_argument("--gpu", default="H100", choices=list(STATED))
    parser.add_argument("--results", help="a results file: its measurements, and the ceilings measured with them")
    parser.add_argument("--no-prediction", action="store_true", help="compile nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    ceilings, measured = STATED[args.gpu], None
    if args.results:
        try:
            measured = results.load(args.results)
        except (OSError, results.BadResults) as error:
            print(error, file=sys.stderr)
            return 2
        ceilings = of_results(measured) or ceilings
    if args.case or measured:
        cases = args.case or dict.fromkeys(results.key(row)[0] for row in measured["rows"])
        pairs = [(case, ceilings) for case in cases]
    else:
        pairs = [(case, STATED[gpu]) for case, gpu in dict.fromkeys((p.case, p.gpu) for p in PUBLISHED)]
        pairs += [(case, ceilings) for case in OTHERS]
    lines = [line(case, gpu, measured, not args.no_prediction) for case, gpu in pairs]
    if args.json:
        rows = [asdict(one) | {"case": one.case.id, "sources": ceilings.source} for one in lines]
        print(json.dumps(rows, indent=1))
    else:
        print(f"ceilings of {ceilings.name}: {ceilings.source}")
        show(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
