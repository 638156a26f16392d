"""What runs where: the automatic choice for some calls on GPUs that are not here, and the predictions that it rests on.

    python -m benchmarks.where [--gpu H100 ...]
    python -m benchmarks.where --stacks [--gpu H100 ...]
    python -m benchmarks.where --scans [--gpu H100 ...]
    python -m benchmarks.where --faster [--gpu H100 ...] [--cells lstm gru] [--batch 16 64]

Every time is predicted. The first table is in microseconds a time step, all layers and directions together
(`rnnfast.choice.forecast`). The GPUs count as never measured, and every family of kernels as found right by the canary.

The second table is for problems 35, 38, 39 and 41 of KernelBench's level 3: milliseconds of a call on the persistent kernels,
one member after another and in groups (`rnnfast.choice.pipeline`), and where the time of the groups goes. It has the arithmetic
of the products over all steps, which the choice leaves out.

The third table is for cells without W_hh in float16, B = 16: nanoseconds of a time step on the scan kernels, beside the floor
that the bytes set, and milliseconds of whole sequences in training, launches included, where 80 GB hold them (docs/scan.md).

The fourth table says how many times faster than cuDNN our fastest kernels are predicted to train one layer in one direction,
I = H and T = 512 (docs/results.md). Where cuDNN runs, because we are not predicted to be `MARGIN` times faster, it says so.
"""

import argparse
import itertools
import sys
from dataclasses import replace

import torch

from benchmarks.floor.ceilings import stated
from rnnfast.cells import indrnn, qrnn, sru
from rnnfast.choice import kernel_plan, pipeline, tuned
from rnnfast.choice.forecast import CALL_US
from rnnfast.choice.gpu import pretend_gpu
from rnnfast.choice.trust import families
from rnnfast.choice.tuning_file import Shape
from rnnfast.derive.registry import fused
from rnnfast.kernels.hardware import LAUNCH, PRODUCT, gigahertz
from rnnfast.kernels.persistent.limits import GPUS
from rnnfast.kernels.scan.plan import cell_bytes, predicted, scan_plan
from rnnfast.reference import CELLS, GATES
from rnnfast.settings import CANARY

PEAK_SHARE = 1 / 3  # of the data sheet's FLOPs, that products of these sizes reach; an estimate
ASSUMED = ("A100", "H100", "RTX 4090")
CALLS = (  # cell, dtype, precision, T, B, I, H, layers, directions
    ("lstm", "float16", "half", 1024, 16, 768, 768, 1, 1),
    ("lstm", "bfloat16", "half", 1024, 16, 768, 768, 1, 1),
    ("gru", "float16", "half", 1024, 16, 768, 768, 1, 1),
    ("lstm", "float16", "half", 1024, 8, 64, 64, 1, 1),
    ("lstm", "float16", "half", 1024, 16, 128, 128, 1, 1),
    ("lstm", "float32", "tf32", 2058, 62, 168, 168, 1, 1),
    ("lstm", "float32", "tf32", 512, 10, 128, 256, 6, 1),
    ("gru", "float32", "tf32", 512, 10, 128, 256, 6, 2),
    ("lstm", "bfloat16", "half", 512, 64, 512, 512, 2, 1),
    ("lstm", "float16", "half", 512, 32, 1024, 1024, 1, 1),
    ("lstm", "bfloat16", "half", 512, 64, 2048, 2048, 1, 1),
    ("lstm", "float16", "half", 8, 4, 256, 256, 1, 1),
)
SCAN_BYTES = 80e9  # of a GPU, for all that a training step keeps
SCANNED, SCAN_UNITS, SCAN_STEPS = (indrnn, qrnn, sru), (512, 1024, 2048), (1_000, 10_000, 100_000, 1_000_000)


def cell(shape: Shape, name: str) -> str:
    """What runs a call on the GPU `name`, and what our fastest kernels and cuDNN would take."""
    device, gpu = torch.device("cpu"), GPUS[name]
    with pretend_gpu(gpu), tuned.override_tuning(gpu, []), CANARY.within("trust"):
        predicted = kernel_plan.predict(shape, device, gpu, families())
        runs = "cuDNN" if kernel_plan.torch_wins(shape, device) else " and ".join(dict.fromkeys(predicted.families))
    return f"{runs}: {predicted.kernels:.2f}, {predicted.torch:.2f} {predicted.algorithm}"


def table(names: list[str]) -> str:
    """The whole table, as Markdown: a line a call, a column a GPU."""
    lines = [f"| call | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for call, training in itertools.product(CALLS, (False, True)):
        shape = Shape(*call, training)
        lines.append(f"| {shape} | {' | '.join(cell(shape, name) for name in names)} |")
    return "\n".join(lines)


# Problem of KernelBench, and its shape in inference
STACKS = {
    35: Shape("lstm", "float32", "tf32", 512, 10, 128, 256, 6, 1, False),
    38: Shape("lstm", "float32", "tf32", 512, 10, 128, 256, 6, 2, False),
    39: Shape("gru", "float32", "tf32", 512, 10, 128, 256, 6, 1, False),
    41: Shape("gru", "float32", "tf32", 512, 10, 128, 256, 6, 2, False),
}
STACK_GPUS = ("H100", "A100", "B200")
TERMS = ("steps", "launches", "products", "gradients", "call")


def stack(shape: Shape, name: str, grouped: bool) -> tuple[dict[str, float], list[pipeline.Run]]:
    """Predicted milliseconds of a call on the persistent kernels, by `TERMS`, and how forward and backward run.

    Args:
        grouped: whether directions and layers run as groups; else each layer and direction after another.

    The terms are the time steps; the kernels' starts, clears and weights; the products of the chunks; in training those of all
    gradients after backward; and the host's part of one call, behind which it is ahead of the GPU.
    """
    gpu, passes = GPUS[name], (False, True) if shape.training else (False,)
    members, layers, calls = pipeline.grouping(shape.layers, shape.directions)
    if not grouped:
        members, layers, calls = 1, False, shape.layers * shape.directions
    gates = GATES[shape.cell]
    ceilings = stated(name)
    assert ceilings is not None
    rate = ceilings.flops_per_s[shape.precision] / 1000 * PEAK_SHARE  # FLOPs a millisecond
    step = 2 * shape.B * gates * shape.H  # FLOPs of a step of one member, an element of its input
    width = shape.directions * shape.H
    inputs = shape.directions * (shape.I + (shape.layers - 1) * width)  # elements of all members' inputs
    found, runs = dict.fromkeys(TERMS, 0.0), []
    for backward in passes:
        sizes = pipeline.Sizes(gates, shape.B, shape.H, 4, shape.precision, backward)
        run = pipeline.best("persistent", sizes, shape.T, members, layers, gpu)
        assert run is not None
        runs.append(run)
        if layers and run.members > 1:  # a round has a chunk of each layer above the first; backward's last one is for the end
            inside = run.parts * (run.rounds - 1) * run.chunk * (run.members - 1) * shape.H
            inside += 0 if backward else shape.T * shape.I
        else:
            inside = 0 if backward else shape.T * inputs
        found["steps"] += calls * run.steps / 1000
        found["launches"] += calls * (run.starts + run.weights + run.clears + run.host) / 1000
        found["products"] += calls * run.products / 1000 + step * inside / rate
        found["call"] += CALL_US[backward] / 1000
    if shape.training:  # of W_ih and W_hh, and of the inputs that backward's rounds have not made
        recurrent = shape.directions * shape.layers * shape.H
        below = shape.I if runs[1].members > 1 and layers else inputs
        clock = gigahertz(name) * 1e6
        found["gradients"] = step * shape.T * (inputs + recurrent + below) / rate + 3 * calls * (PRODUCT + LAUNCH) / clock
    return found, runs


def stacks(names: list[str]) -> str:
    """The second table, as Markdown."""
    lines = [
        f"| problem, GPU, pass | one after another | grouped | members, chunk | {' | '.join(TERMS)} |",
        f"|---|--:|--:|---|{'--:|' * len(TERMS)}",
    ]
    for name, (number, shape), training in itertools.product(names, STACKS.items(), (False, True)):
        trained = replace(shape, training=training)
        alone, _ = stack(trained, name, grouped=False)
        terms, runs = stack(trained, name, grouped=True)
        one_way = shape.directions == 1
        how = "; ".join(f"{run.members}, {run.chunk}" if one_way else f"{run.members}" for run in runs)
        words = f"{number} {'bi-' * (not one_way)}{shape.cell}, {name}, {'training' if training else 'inference'}"
        columns = [f"{sum(alone.values()):.2f}", f"{sum(terms.values()):.2f}", how, *(f"{terms[term]:.2f}" for term in TERMS)]
        lines.append(f"| {words} | {' | '.join(columns)} |")
    return "\n".join(lines)


def scans(names: list[str]) -> str:
    """The third table, as Markdown."""
    lines = [
        f"| cell, GPU, pass | H | bytes | floor | step | bound by | {' | '.join(f'T = {T}' for T in SCAN_STEPS)} |",
        f"|---|--:|--:|--:|--:|---|{'--:|' * len(SCAN_STEPS)}",
    ]
    for name, found, H, backward in itertools.product(names, SCANNED, SCAN_UNITS, (False, True)):
        gpu, cell, ceilings = GPUS[name], fused(found), stated(name)
        assert ceilings is not None
        spec, sizes = CELLS[cell], pipeline.sizes_of(cell, 16, H, 2, "half", backward)
        bytes = cell_bytes(spec.gates, spec.saved, spec.carried, 2, backward)
        floor = 16 * H * bytes / ceilings.hbm_bytes_per_s * 1e9
        plan = scan_plan(*sizes[:6], gpu, extra=sizes.extra)
        terms = vars(predicted(*sizes[:4], backward, gpu, plan.AHEAD, extra=sizes.extra))
        step = pipeline.step_us("scan", sizes, 1, gpu)
        runs = [pipeline.best("scan", sizes, T, 1, False, gpu) for T in SCAN_STEPS]
        assert step is not None
        columns = [str(H), str(bytes), f"{floor:.0f}", f"{1000 * step:.0f}", max(terms, key=lambda term: terms[term])]
        # input, output, what is saved, the carried states and the gate gradients
        kept = 16 * H * (2 * (2 + spec.saved + spec.grads) + 4 * spec.carried)
        fits = [T * kept < SCAN_BYTES for T in SCAN_STEPS]
        columns += [f"{run.us / 1000:.2f}" if fit else "-" for run, fit in zip(runs, fits, strict=True) if run is not None]
        lines.append(f"| {found.name}, {name}, {'backward' if backward else 'forward'} | {' | '.join(columns)} |")
    return "\n".join(lines)


FASTER_CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
FASTER_DTYPES = {"float16": "half", "bfloat16": "half", "float32": "tf32"}  # and the precision of their products
FASTER_UNITS, FASTER_ROWS, FASTER_STEPS = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64, 128), 512
MOST_FASTER = 10.0  # a larger ratio is not printed: so far from the published times the models say little


def ratio(shape: Shape, name: str) -> tuple[float, bool]:
    """How many times faster than cuDNN our fastest kernels are predicted to be, and whether cuDNN runs nevertheless."""
    device, gpu = torch.device("cpu"), GPUS[name]
    with pretend_gpu(gpu), tuned.override_tuning(gpu, []), CANARY.within("trust"):
        predicted = kernel_plan.predict(shape, device, gpu, families())
        return predicted.torch / predicted.kernels, kernel_plan.torch_wins(shape, device)


def told(times: float) -> str:
    """A ratio with one decimal, or that it is larger than is printed."""
    return f"> {MOST_FASTER:.0f}" if times > MOST_FASTER else f"{times:.1f}"


def faster(name: str, cells: list[str], batches: list[int]) -> str:
    """The fourth table for one GPU, as Markdown: a line for each cell, dtype and B. Dtypes of equal times share a line."""
    lines = [
        f"| predicted, {name} | B | {' | '.join(f'H = {H}' for H in FASTER_UNITS)} |",
        f"|---|--:|{'--:|' * len(FASTER_UNITS)}",
    ]
    for cell, B in itertools.product(cells, batches):
        alike: dict[tuple[str, ...], list[str]] = {}
        for dtype, precision in FASTER_DTYPES.items():
            shapes = [Shape(cell, dtype, precision, FASTER_STEPS, B, H, H, 1, 1, True) for H in FASTER_UNITS]
            found = [ratio(shape, name) for shape in shapes]
            columns = tuple(f"cuDNN ({times:.2f})" if cudnn else told(times) for times, cudnn in found)
            alike.setdefault(columns, []).append(dtype)
        lines += [
            f"| {FASTER_CELLS[cell]} {', '.join(dtypes)} | {B} | {' | '.join(columns)} |" for columns, dtypes in alike.items()
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), help="GPUs to assume")
    parser.add_argument("--stacks", action="store_true", help="the problems of KernelBench, layers and directions in groups")
    parser.add_argument("--scans", action="store_true", help="cells without W_hh, on the scan kernels")
    parser.add_argument("--faster", action="store_true", help="how many times faster than cuDNN, by cell, dtype, H and B")
    parser.add_argument("--cells", nargs="+", choices=list(FASTER_CELLS), default=list(FASTER_CELLS), help="of --faster")
    parser.add_argument("--batch", nargs="+", type=int, default=list(FASTER_ROWS), metavar="B", help="of --faster")
    args = parser.parse_args(argv)
    print("Predicted, not measured.", end=" ")
    if args.faster:
        print("Training one layer in one direction, I = H, T = 512, float32 with TF32: cuDNN's time over our kernels'.\n")
        print("\n\n".join(faster(name, args.cells, args.batch) for name in args.gpu or ["H100"]))
    elif args.scans:
        print("Bytes of a unit and step, nanoseconds of a step, milliseconds of a sequence; B = 16, float16.\n")
        print(scans(args.gpu or ["H100"]))
    elif args.stacks:
        print("Milliseconds of a call.\n")
        print(stacks(args.gpu or [*STACK_GPUS]))
    else:
        print("Microseconds of a time step: what runs, our kernels, cuDNN and its algorithm.\n")
        print(table(args.gpu or [*ASSUMED]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
