"""What `benchmarks.gpu_check` does on the GPU, each job in a process of its own that may hang or crash.

    python -m benchmarks.gpu_jobs check NUMBER...          the persistent kernels against float64, on `CHECKS`
    python -m benchmarks.gpu_jobs time FAMILY NUMBER       a family beside torch.nn, on a case of `CASES`
    python -m benchmarks.gpu_jobs stress NUMBER            many launches of the persistent kernels, on a case of `STRESS`

Prints a JSON line for each thing that is found, as soon as it is.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import torch

import rnnfast
from rnnfast.check import Case, compare, fault
from rnnfast.choice import kernel_plan
from rnnfast.commands.tune import microseconds

DEVICE = "cuda"
ROUNDS = 10
OTHER = 2048  # size of the products that keep the GPU busy
LAUNCHES = 10_000  # of a stress run, forward and backward together
CASES = [
    Case(cell, T, B, H, H, dtype, states=False)
    for cell in ("LSTM", "GRU")
    for T, B, H, dtype in (
        (512, 16, 768, torch.float16),
        (512, 64, 512, torch.bfloat16),
        (256, 32, 512, torch.float32),
        (128, 128, 1024, torch.float16),
    )
]
SIZES = (  # T, B, I, H, directions
    (20, 16, 64, 768, 1),
    (33, 5, 29, 50, 2),
    (140, 64, 32, 512, 1),  # two chunks of the input side
    (7, 200, 33, 129, 1),
    (9, 32, 16, 1024, 1),
    (5, 1, 3, 29, 2),
    (1, 17, 8, 200, 2),
)
CELLS = (("LSTM", "tanh"), ("GRU", "tanh"), ("RNN", "tanh"), ("RNN", "relu"))
CHECKS = [  # with tf32 or not; the most wanted first, because time may run out
    (Case(cell, T, B, I, H, dtype, bidirectional=directions == 2, nonlinearity=nonlinearity), tf32)
    for T, B, I, H, directions in SIZES
    for cell, nonlinearity in CELLS
    for dtype, tf32 in ((torch.float16, False), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True))
    if nonlinearity == "tanh" or H in (50, 768)
]
STRESS = [  # with other work on the GPU or not
    (Case("LSTM", 8, 16, 768, 768, torch.float16), False),
    (Case("LSTM", 8, 16, 768, 768, torch.float16), True),
    (Case("GRU", 8, 64, 512, 512, torch.bfloat16), True),
]


def check_name(case: Case, tf32: bool) -> str:
    return f"{case}{' tf32' if tf32 else ''}"


def stress_name(case: Case, beside: bool) -> str:
    return f"{case}{' beside other work' if beside else ''}"


def layer_of(case: Case, library=rnnfast, **options) -> torch.nn.Module:
    """The layer of a case, on the device."""
    if case.cell == "RNN":
        options["nonlinearity"] = case.nonlinearity
    options |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    return getattr(library, case.cell)(case.I, case.H, **options, device=DEVICE, dtype=case.dtype)


def missing(case: Case) -> list[str]:
    """Which directions the persistent kernels, which RNNFAST_KERNELS asks for, have no plan for; and why."""
    cell = case.cell.lower() if case.cell != "RNN" else f"rnn_{case.nonlinearity}"
    device = torch.empty(0, device=DEVICE).device
    found = []
    for backward in (False, True):
        choice = kernel_plan.pick(cell, case.T, case.B, case.H, case.dtype, kernel_plan.precision(), backward, True, device)
        if choice.persistent is None:
            found.append(f"{'backward' if backward else 'forward'}: {choice.reason}")
    return found


# Right or wrong


def check(number: int) -> dict:
    """A case of `CHECKS`: training and inference within the numerics contract, and the same bits twice."""
    case, tf32 = CHECKS[number]
    row = {"number": number, "case": check_name(case, tf32)}
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    without = missing(case)
    if len(without) == 2:
        return row | {"skipped": "; ".join(without)}
    for training in (True, False):
        if wrong := fault(compare(case, DEVICE, tf32=tf32, training=training)):
            return row | {"error": f"{'training' if training else 'inference'}, {wrong}"}
    layer = layer_of(case, backend="triton")
    x = torch.randn(case.T, case.B, case.I, device=DEVICE, dtype=case.dtype)
    first, second = (bits(layer, x) for _ in range(2))
    if not torch.equal(first, second):
        return row | {"error": f"{int((first != second).sum())} of {first.numel()} numbers differ from run to run"}
    return row | ({"without": "; ".join(without)} if without else {})


def bits(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output and all gradients, one after another."""
    x = x.detach().requires_grad_()
    y = layer(x)[0]
    return torch.cat([found.detach().flatten() for found in (y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()]))])


# Times


def calls(case: Case, layer: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """One call forward in inference, and one training step (forward and backward) under a random upstream gradient."""
    x = torch.randn(case.T, case.B, case.I, device=DEVICE, dtype=case.dtype)
    dy = torch.randn(case.T, case.B, case.H, device=DEVICE, dtype=case.dtype)
    inputs = [x.clone().requires_grad_(), *layer.parameters()]

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    def training() -> object:
        return torch.autograd.grad(layer(inputs[0])[0], inputs, dy)

    return {"forward": forward, "training step": training}


def measure(case: Case) -> Iterator[dict]:
    """The times of a case, a row a mode, ours as RNNFAST_KERNELS says; then the kernels that ran. What is not right is not
    timed."""
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # as it is timed
    for training in (True, False):
        yield {"doing": "a check"}
        if wrong := fault(compare(case, DEVICE, tf32=tf32, training=training)):
            yield {"error": f"{'training' if training else 'inference'}, {wrong}"}
            return
    layers = {"rnnfast": layer_of(case, backend="triton"), "torch.nn": layer_of(case, torch.nn)}
    functions = {name: calls(case, layer) for name, layer in layers.items()}
    for mode in ("forward", "training step"):
        yield {"doing": mode}
        times: dict[str, list[float]] = {name: [] for name in layers}
        memory = {}
        for name in layers:
            for _ in range(2):  # warm-up: compiles, picks algorithms
                microseconds(functions[name][mode], case.T)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            microseconds(functions[name][mode], case.T)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        for _ in range(ROUNDS):  # side by side, so that a change of clocks meets both
            for name in layers:
                times[name].append(microseconds(functions[name][mode], case.T))
        medians = {name: statistics.median(values) for name, values in times.items()}
        yield (
            {"mode": mode, "speed_up": medians["torch.nn"] / medians["rnnfast"]}
            | {f"{name} us/step": median for name, median in medians.items()}
            | {f"{name} min-max": [min(values), max(values)] for name, values in times.items()}
            | {f"{name} peak MiB": value for name, value in memory.items()}
        )
    for mode in ("forward", "training step"):  # last, because profiling may slow what comes after
        for name in layers:
            yield {"kernels of": name, "mode": mode, "kernels": kernels(functions[name][mode])}


def kernels(call: Callable[[], object]) -> dict[str, int]:
    """The GPU kernels that a call launches, by name, and how often."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = (event.name[:160] for event in profiler.events() or () if event.device_type == DeviceType.CUDA)
    return dict(Counter(names).most_common())


# Again and again


def stress(case: Case, beside: bool) -> Iterator[dict]:
    """`LAUNCHES` launches of the persistent kernels on a few steps, each time for the same bits; how many so far, and how many
    calls gave others. `beside`: while another stream keeps the GPU busy with products."""
    if without := missing(case):
        yield {"skipped": "; ".join(without)}
        return
    layer = layer_of(case, backend="triton")
    x = torch.randn(case.T, case.B, case.I, device=DEVICE, dtype=case.dtype)
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


# The process


def rows(job: str, arguments: list[str]) -> Iterator[dict]:
    if job == "check":
        os.environ["RNNFAST_KERNELS"] = "persistent"
        for number in map(int, arguments):
            yield {"doing": number}
            yield check(number)
    elif job == "time":
        family, case = arguments[0], CASES[int(arguments[1])]
        os.environ["RNNFAST_KERNELS"] = family
        without = missing(case) if family == "persistent" else []
        if len(without) == 2:
            yield {"skipped": "; ".join(without)}
        else:
            for row in measure(case):
                yield row | ({"without": "; ".join(without)} if without else {})
    elif job == "stress":
        os.environ["RNNFAST_KERNELS"] = "persistent"
        yield from stress(*STRESS[int(arguments[0])])


def main(argv: list[str]) -> int:
    for row in rows(argv[0], argv[1:]):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
