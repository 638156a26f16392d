"""What a call of a layer costs the host: the microseconds before a GPU has anything to do, measured without a GPU.

    python -m benchmarks.host_cost [--rounds 60] [--json FILE]

Triton's real launcher runs on a stub of the CUDA driver (`benchmarks.static.stub`), with CPU tensors so small that PyTorch's
products cost little more than their dispatch. Each number is CPU time of the thread, the fastest of its rounds.

    step        a step of the step kernels: the difference of a long and a short call. "chunked": each step has an input side of
                its own, as with batches of 1025 rows and more; the products are not measured
    call        a call of a layer of few steps: in inference, in training (forward alone), and its backward
    round       a round of a pipeline of six layers on the persistent kernels: the difference of a long and a short call. The
                GPU runs a chunk of steps meanwhile

A ratio is to the C part of Triton's launcher for a step, and to torch.nn.LSTM on the CPU (T = 1, H = 8) for a call. Exit code 2
where there is no stub driver.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import rnnfast
from benchmarks.static import stub

TOLERANCES = {"launch_ratio": 0.4, "call_ratio": 0.4}  # of `figures`, between runs and machines
LONG, SHORT = 144, 16  # steps
ROUNDS = 60


def fastest(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Microseconds of each call, the fastest of `rounds`; the calls alternate."""
    found = [float("inf")] * len(calls)
    for _ in range(rounds):
        for n, call in enumerate(calls):
            call()  # fills the processor's caches again
            start = time.thread_time_ns()
            call()
            found[n] = min(found[n], (time.thread_time_ns() - start) / 1000)
    return found


def _forward(layer: torch.nn.Module, x: torch.Tensor, grad: bool) -> Callable[[], object]:
    def call():
        with torch.set_grad_enabled(grad):
            layer(x)

    return call


def _backward(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    y, weights = layer(x)[0], [*layer.parameters()]
    dy = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, weights, dy, retain_graph=True)


def steps(rounds: int) -> dict[str, float]:
    """Microseconds of a step of the step kernels: in inference, of forward and backward, and in chunks of one step."""
    from rnnfast.kernels import cells, step
    from rnnfast.kernels.groups import ALONE

    layer = rnnfast.LSTM(1, 16)
    long, short = (torch.zeros(T, 1, 1) for T in (LONG, SHORT))

    def each(*calls: Callable[[], object]) -> float:
        first, second = fastest(4 * rounds, *calls)
        return (first - second) / (LONG - SHORT)

    def in_single_steps(T: int) -> Callable[[], object]:
        w, cell = layer.weight_hh_l0.detach()[None], cells.CELLS["lstm"]
        chunks = [(t, 1, torch.zeros(1, 1, 64), 0) for t in range(T)]
        h, c, plan = torch.zeros(T, 1, 16), torch.zeros(1, 1, 1, 16), step.plan.step_plan(16, 4, "ieee")
        options = {"group": ALONE, "precision": "ieee", "plan": plan}
        return lambda: step.forward(cell, lambda: chunks, w, None, None, None, None, h, c, None, **options)

    found = {"inference": each(_forward(layer, long, False), _forward(layer, short, False))}
    found["forward in training"] = each(_forward(layer, long, True), _forward(layer, short, True))
    found["backward"] = each(_backward(layer, long), _backward(layer, short))
    return found | {"chunked": each(in_single_steps(LONG), in_single_steps(SHORT))}


def c_launcher(rounds: int) -> float:
    """Microseconds of the least that a launch of a step kernel can take: Triton's launcher, given addresses."""
    launched: list[tuple] = []
    from triton.backends.nvidia.driver import CudaLauncher

    launch = CudaLauncher.__call__

    def keep(self, *args):
        launched.append((self, args))
        return launch(self, *args)

    with mock.patch.object(CudaLauncher, "__call__", keep):
        _forward(rnnfast.LSTM(1, 16), torch.zeros(3, 1, 1), False)()
    launcher, args = launched[-1]

    def address(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        return tuple(map(address, value)) if type(value) is tuple else value

    args = tuple(map(address, args))
    return fastest(20 * rounds, lambda: [launcher(*args) for _ in range(20)])[0] / 20


def calls(family: str, rounds: int) -> dict[str, float]:
    """Microseconds of a call of a layer on a family of kernels: in inference, in training, and of its backward."""
    layer, x = rnnfast.LSTM(4, 64), torch.zeros(1, 2, 4, requires_grad=True)
    with mock.patch.dict(os.environ, RNNFAST_KERNELS=family):
        every = _forward(layer, x, False), _forward(layer, x, True), _backward(layer, x)
        return dict(zip(("inference", "training", "backward"), fastest(10 * rounds, *every), strict=True))


def pipeline_round(rounds: int) -> dict[str, float]:
    """Microseconds of a round of a pipeline, forward and backward: its products, its clear and its launch."""
    from rnnfast.choice import kernel_plan

    layer, pick = rnnfast.LSTM(1, 32, num_layers=6), kernel_plan.pick
    long, short = (torch.zeros(T, 1, 1) for T in (LONG, SHORT))

    def chunks_of_two(*args, **named):
        return dataclasses.replace(pick(*args, **named), members=6, chunk=2)

    def each(*calls: Callable[[], object]) -> float:
        first, second = fastest(rounds, *calls)
        return (first - second) / ((LONG - SHORT) // 2)

    with mock.patch.dict(os.environ, RNNFAST_KERNELS="persistent"), mock.patch.object(kernel_plan, "pick", chunks_of_two):
        forward = each(_forward(layer, long, True), _forward(layer, short, True))
        return {"forward": forward, "backward": each(_backward(layer, long), _backward(layer, short))}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """All of it, by what is measured and in which mode, in microseconds."""
    from rnnfast.choice import kernel_plan
    from rnnfast.kernels.families import OF_TORCH
    from rnnfast.kernels.persistent.plan import GPUS

    torch.set_num_threads(1)
    theirs = _forward(torch.nn.LSTM(8, 8), torch.zeros(1, 1, 8), False)
    found = {"torch.nn": {"call": fastest(10 * rounds, theirs)[0]}}
    with tempfile.TemporaryDirectory() as folder:
        stub.build(folder)
        stub.load(folder)
        stub.pretend()
        with kernel_plan.pretend_gpu(GPUS["H200"]):
            with mock.patch.dict(os.environ, RNNFAST_KERNELS="step"):
                found["step"] = steps(rounds)
                found["step"]["C launcher"] = c_launcher(rounds)
            found |= {f"call, {family} kernels": calls(family, rounds) for family in OF_TORCH}
            found["round"] = pipeline_round(rounds)
    return found


def figures() -> dict[str, dict[str, float]]:
    """For the regression gate: the ratios, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        subprocess.run([sys.executable, "-m", "benchmarks.host_cost", "--json", file], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(file.read_text())
    least, theirs = found["step"].pop("C launcher"), found.pop("torch.nn")["call"]
    rows = {f"step, {mode}": {"launch_ratio": us / least} for mode, us in found.pop("step").items()}
    return rows | {f"{row}, {mode}": {"call_ratio": us / theirs} for row, modes in found.items() for mode, us in modes.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the microseconds to this file")
    args = parser.parse_args(argv)
    if reason := stub.unavailable():
        print(f"unavailable: {reason}", file=sys.stderr)
        return 2
    found = measure(args.rounds)
    for row, modes in found.items():
        print(f"{row:26} " + "  ".join(f"{mode} {us:.2f} us" for mode, us in modes.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
