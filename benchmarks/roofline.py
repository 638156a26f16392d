"""Prints the least time that a case can take on a GPU, the time predicted for our fastest kernels, and published times.

    python -m benchmarks.roofline [--case LSTM-T1024-B16-I768-H768-float16-training ...] [--gpu H100] [--results FILE] [--json]

Without --case it prints the layers alone with published times and a few others. `benchmarks.floor.work.Floor` says what counts.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import NamedTuple

import jinja2

from benchmarks.floor.ceilings import STATED, Ceilings, of_results, stated
from benchmarks.floor.published import PUBLISHED
from benchmarks.floor.work import Floor, floor, work
from benchmarks.timing import results
from benchmarks.timing.cases import Case

PASSES = {"inference": [("forward", False)], "forward": [("forward", True)], "backward": [("backward", True)]}
PASSES["training"] = PASSES["forward"] + PASSES["backward"]
OTHERS = (  # cases beside the published ones, whose times nobody has published
    Case("GRU", 512, 16, 768, 768),
    Case("LSTM", 512, 64, 512, 512),
    Case("LSTM", 1024, 32, 1024, 1024),
    Case("LSTM", 256, 64, 2048, 2048),
    Case("LSTM", 10000, 1, 128, 128, mode="inference"),
)


def predict(case: Case, gpu: Ceilings) -> tuple[float, str]:
    """Microseconds a time step of `case` with the kernels that are compiled for `gpu`, and their parts in words.

    `benchmarks.static` predicts the recurrence from the machine code, one layer and direction after another. All other products
    run at the peak rate, which no program reaches. The prediction is therefore on the low side.

    Raises:
        LookupError: our kernels are not compiled for this GPU.
    """
    from benchmarks.static import table
    from benchmarks.static.offline import GPU_OF_ARCH

    archs = {name: arch for arch, name in GPU_OF_ARCH.items()} | {"H200": 90}
    if gpu.name not in archs:
        raise LookupError(f"our kernels are not compiled for {gpu.name}")
    families = ("persistent", "one_program")
    jobs = [table.Job(family, archs[gpu.name], case.cell_name, case.dtype, case.H, (case.B,)) for family in families]
    rows = sorted(table.build(jobs, 1), key=lambda row: -row["predicted_us"])
    by_pass = {(row["direction"], row["training"]): row for row in rows}  # of the fastest family
    found = [by_pass[one] for one in PASSES[case.mode]]
    todo = work(case)
    recurrence = sum(row["predicted_us"] for row in found) * case.layers * case.directions
    others = (todo.flops - todo.loop_flops) / gpu.flops_per_s[case.dtype] * 1e6 / case.T
    parts = [f"{row['family']} {row['direction']} {row['predicted_us']:.2f}" for row in found]
    return recurrence + others, ", ".join([*parts, f"other products {others:.2f}"])


class Line(NamedTuple):
    """A case on a GPU: its floor and what else is known, in microseconds a time step."""

    case: Case
    gpu: str
    floor: Floor
    predicted: float | None
    how: str  # the parts of the prediction, or why there is none
    times: dict[str, float]  # published or measured, by who and where


def line(case: Case, ceilings: Ceilings, measured: dict | None = None, compiled: bool = True) -> Line:
    times = {}
    for one in PUBLISHED:
        if one.case == case and one.us_per_step and stated(one.gpu) == STATED[ceilings.name]:
            where = "" if one.gpu == ceilings.name else f" on {one.gpu}"
            times[f"{one.provider}{where}, published"] = one.us_per_step
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


def _case(name: str) -> Case:
    try:
        return Case.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", nargs="+", type=_case, help="ids of cases")
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
        known = dict.fromkeys((p.case, p.gpu) for p in PUBLISHED if p.gpu in STATED and not p.case.model)
        pairs = [(case, STATED[gpu]) for case, gpu in known]
        pairs += [(case, ceilings) for case in OTHERS]
    lines = [line(case, gpu, measured, not args.no_prediction) for case, gpu in pairs]
    if args.json:
        rows = [one._asdict() | {"case": one.case.id, "floor": asdict(one.floor), "sources": ceilings.source} for one in lines]
        print(json.dumps(rows, indent=1))
    else:
        print(f"ceilings of {ceilings.name}: {ceilings.source}")
        templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks.floor"))
        print(templates.get_template("roofline.txt").render(lines=lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
