"""The jobs of `benchmarks.gpu_check` besides timing: it compiles, probes, checks many shapes and compares many launches.

`benchmarks.timing.isolated` runs these generators in a child process, which may hang or crash.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

import rnnfast
from benchmarks.timing import cases as timing
from rnnfast.check import Case, Problem, compare, fault
from rnnfast.choice import kernel_plan, tuned, tuning_file
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import canary, tune
from rnnfast.kernels.families import OF_TORCH
from rnnfast.kernels.persistent.plan import GpuLimits

DEVICE = "cuda"
OTHER = 2048  # size of the products that keep the GPU busy
LAUNCHES = 10_000  # launches of a stress run, forward and backward together
SIZES = (  # T, B, I, H, directions
    (20, 16, 64, 768, 1),
    (60, 16, 32, 128, 1),  # its weights fit one SM
    (33, 5, 29, 50, 2),
    (140, 64, 32, 512, 1),  # two chunks of the input side
    (7, 200, 33, 129, 1),
    (9, 32, 16, 1024, 1),
    (5, 1, 3, 29, 2),
    (1, 17, 8, 200, 2),
)
CELLS = (("LSTM", "tanh"), ("GRU", "tanh"), ("RNN", "tanh"), ("RNN", "relu"))
CHECKS = {  # family, case, and TF32 or not, by name, of the families that run many steps a launch; the most wanted come first
    f"{family} {case}{' tf32' if tf32 else ''}": (family, case, tf32)
    for T, B, I, H, directions in SIZES
    for family in OF_TORCH
    for cell, nonlinearity in CELLS
    for dtype, tf32 in ((torch.float16, False), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True))
    for case in (Case(cell, T, B, I, H, dtype, bidirectional=directions == 2, nonlinearity=nonlinearity),)
    if OF_TORCH[family].many_steps and (nonlinearity == "tanh" or H in (50, 768))
}
STRESS = {  # family, case, and with other work on the GPU or not, by name, of the families whose programs wait for one another
    f"{family} {case}{' beside other work' if beside else ''}": (family, case, beside)
    for family in OF_TORCH
    for case, beside in (
        (Case("LSTM", 8, 16, 768, 768, torch.float16), False),
        (Case("LSTM", 8, 16, 768, 768, torch.float16), True),
        (Case("GRU", 8, 64, 512, 512, torch.bfloat16), True),
    )
    if OF_TORCH[family].waits
}
TIMED = timing.named_set("gpu-check", "cuda")
TUNED = [  # inference and then training; of 320 steps, as `rnnfast tune` checks up to 512 against float64, which takes seconds
    Shape(cell, dtype, "half", 320, B, H, H, 1, 1, training)
    for cell, dtype, B, H in (
        ("lstm", "float16", 16, 768), ("gru", "float16", 16, 768), ("lstm", "bfloat16", 16, 768),
        ("lstm", "bfloat16", 64, 512), ("lstm", "float16", 32, 1024), ("lstm", "float16", 16, 128),
    )
    for training in (False, True)
]  # fmt: skip


# Compiling


def builds(cases: list, shapes: list[Shape], limits: GpuLimits) -> dict[str, list]:
    """Arguments of `build` by name: for `cases` on every family, and for the candidates of the `shapes` in inference, one plan
    of forward and one of backward at a time."""
    found = {}
    for case in cases:
        kind = case.cell_name, case.dtype, case.H, case.B
        found |= {f"{' '.join(map(str, kind))} {family}": [family, *kind] for family in OF_TORCH}
    for shape in shapes:
        training = replace(shape, training=True)
        forward = [entry.forward for entry in tune.candidates(shape, limits) if entry.forward]
        backward = [entry.backward for entry in tune.candidates(training, limits) if entry.backward]
        for number, plans in enumerate(itertools.zip_longest(forward, backward)):
            entries = [Entry(shape, "triton", plans[0]), Entry(training, "triton", *plans)]
            kind = shape.cell, shape.dtype, shape.H, shape.B, [tuning_file.encode(entry) for entry in entries]
            found[f"{shape} {number}"] = ["auto", *kind]
    return found


def canary_cases() -> list[timing.Case]:
    """What the canary runs."""
    dtypes = tuning_file.DTYPES | ({torch.float32: "tf32"} if kernel_plan.precision() == "tf32" else {})
    return [timing.Case(case.cell, case.T, case.B, case.I, case.H, dtype=dtypes[case.dtype]) for case in canary.CASES]


def build(limits: dict, family: str, cell: str, dtype: str, H: int, B: int, entries: Sequence[dict] = ()) -> Iterator[dict]:
    """Compile the kernels of a layer for the GPU with these limits into Triton's cache, without using the GPU.

    Args:
        limits: the fields of its `GpuLimits`.
        family: the name of one, or "auto" for what the tuning `entries` say.
        cell, dtype: names in `CELLS` and `DTYPES` of `benchmarks.timing.cases`.
        H, B: hidden size and batch.
        entries: as `tuning_file.encode` gives them.
    """
    from benchmarks.static.offline import pretend_gpu, run_layer, settings

    torch.set_num_threads(1)
    gpu, began = GpuLimits(**limits), time.monotonic()
    element, tf32 = timing.DTYPES[dtype]
    chosen = [tuning_file.decode(raw, gpu) for raw in entries]
    chosen = [replace(entry, shape=replace(entry.shape, T=1)) for entry in chosen]  # for a sequence of any length
    measured = tuned.override_tuning(gpu, chosen) if chosen else contextlib.nullcontext()
    with settings(family, tf32), pretend_gpu(gpu) as driver, measured:
        run_layer(driver, cell, element, H, 3, B)
    kernels = {launch.compiled for launch in driver.launches}
    yield {"kernels": len(kernels), "seconds": round(time.monotonic() - began, 1)}


# Probing


PROBES = ("hop", "clusters", "ceilings")


def probe(name: str) -> Iterator[dict]:
    """One of `PROBES`: figures by name."""
    from benchmarks.floor import probes

    yield {"hop": probes.hop_us, "clusters": probes.clusters, "ceilings": probes.measure}[name]()


# Checking


def missing(family: str, case: Case) -> list[str]:
    """The directions without a plan of the family, and why. RNNFAST_KERNELS asks for the family."""
    os.environ["RNNFAST_KERNELS"] = family
    cell = case.cell.lower() if case.cell != "RNN" else f"rnn_{case.nonlinearity}"
    device = torch.empty(0, device=DEVICE).device
    found = []
    for backward in (False, True):
        choice = kernel_plan.pick(cell, case.T, case.B, case.H, case.dtype, kernel_plan.precision(), backward, True, device)
        if choice.family != family:
            found.append(f"{'backward' if backward else 'forward'}: {choice.reason}")
    return found


def check(name: str) -> Iterator[dict]:
    """Check a case of `CHECKS`: training and inference meet the numerics contract, and two runs give the same bits.

    Yields the largest error over what is allowed, its share, and where that is.
    """
    family, case, tf32 = CHECKS[name]
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    without = missing(family, case)
    if len(without) == 2:
        yield {"skipped": "; ".join(without)}
        return
    row: dict = {"without": "; ".join(without)} if without else {}
    for training in (True, False):
        results = compare(case, DEVICE, tf32=tf32, training=training)
        worst = max(results, key=lambda result: result.share)
        if worst.share >= row.get("share", 0.0):
            row |= {"share": min(worst.share, 1e30), "tensor": worst.tensor, "figure": worst.figure}
        if wrong := fault(results):
            yield row | {"error": f"{'training' if training else 'inference'}, {wrong}"}
            return
    problem = Problem(case, DEVICE)
    layer, x = problem.module(rnnfast, backend="triton"), problem.x
    first, second = (bits(layer, x) for _ in range(2))
    if not torch.equal(first, second):
        row["error"] = f"{int((first != second).sum())} of {first.numel()} numbers differ from run to run"
    yield row


def bits(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output and all gradients in one tensor."""
    x = x.detach().requires_grad_()
    y = layer(x)[0]
    return torch.cat([found.detach().flatten() for found in (y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()]))])


def stress(name: str) -> Iterator[dict]:
    """A case of `STRESS`: `LAUNCHES` launches on a few steps, which must always give the same bits.

    Yields the launches so far, and how many calls gave other bits than the first. Beside other work, a second stream keeps the
    GPU busy with products.
    """
    family, case, beside = STRESS[name]
    if without := missing(family, case):
        yield {"skipped": "; ".join(without)}
        return
    problem = Problem(case, DEVICE)
    layer, x = problem.module(rnnfast, backend="triton"), problem.x
    first, wrong = bits(layer, x), torch.zeros((), dtype=torch.int64, device=DEVICE)
    other = torch.randn(OTHER, OTHER, device=DEVICE, dtype=torch.float16)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for call in range(1, LAUNCHES // 2 + 1):  # one launch forward and one backward each
        if beside:
            with torch.cuda.stream(side):
                other @ other
        wrong += (bits(layer, x) != first).any()
        if call % 250 == 0 or call == LAUNCHES // 2:
            yield {"launches": 2 * call, "other bits": wrong.item()}
