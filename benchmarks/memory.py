"""Counts the bytes that a layer keeps for backward, with saved-tensor hooks: rnnfast's kernels beside torch.nn.

    python -m benchmarks.memory [--T 512] [--B 64] [--H 512] [--dtype float16]

Each storage counts once. Input, parameters and output exist anyway and have columns of their own.

Without a GPU, rnnfast's bytes come from the shapes that its operators declare, on tensors without data. A test compares these
with the results of the kernels. torch.nn's bytes are those of its CPU layer. cuDNN keeps its values in a buffer called reserve
space, whose size only cuDNN reports. It is therefore measured on a GPU only.
"""

import argparse
import sys
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnfast
from benchmarks.timing.cases import Case
from benchmarks.timing.problem import Problem, Ready, of_module
from benchmarks.timing.providers import named_provider
from rnnfast import ops
from rnnfast.nn import base, stack
from rnnfast.ops import recurrence

DTYPES = ("float16", "bfloat16", "float32")


def kept_by_kernels(case: Case, recompute: bool = False) -> dict[str, int]:
    """`benchmarks.timing.measure.kept` for rnnfast's kernels on `case`, from the declared shapes only.

    A call takes the way of eager mode, which keeps the weights themselves. Tensors without data would take the way of the
    operator, which keeps those of a group as one tensor.
    """
    eager = mock.patch.multiple(recurrence, is_eager=lambda *_: True, forward=ops.forward)
    with FakeTensorMode(), eager:
        problem = Problem(case, "cpu")
        layer = problem.module(getattr(rnnfast, case.cell), recompute=recompute)
        cell, weights = base.cell_of(layer), list(layer.parameters())
        members = stack.members_of(layer, weights)
        forward = lambda x: stack.run("kernels", layer, cell, members, x, (), None, recompute)  # noqa: E731
        return problem.kept(Ready(forward, weights))


def line(name: str, case: Case, kept: dict[str, int], base: int | None) -> str:
    count = case.T * case.B * case.H * case.layers * case.directions
    cells = [f"{kept[part] / 2**20:.1f}" for part in ("inputs", "parameters", "outputs", "activations")]
    cells += [f"{kept['activations'] / count:.2f}", f"{kept['activations'] / base:.2f}" if base else ""]
    return f"| {case.cell} {case.dtype} | {name} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    for name, size in (("T", 512), ("B", 64), ("H", 512)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU"], choices=("LSTM", "GRU", "RNN"))
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU (cuDNN's layer needs a GPU)"
    sizes = f"T={args.T} B={args.B} I=H={args.H}, {args.layers} layers, {args.directions} directions"
    print(f"{sizes}, training; torch.nn on {where}.")
    print("MiB kept for backward; activations also in bytes a unit and time step, and over torch.nn's.\n")
    print("| case | | input | parameters | output | activations | bytes/unit/step | ratio |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for dtype in args.dtype:
        for cell in args.cells:
            case = Case(cell, args.T, args.B, args.H, args.H, args.layers, args.directions, dtype)
            problem = Problem(case, device)
            theirs = problem.kept(named_provider("torch.nn").ready(problem))
            print(line("torch.nn", case, theirs, None))
            for recompute in (False, True):
                if device == "cuda":
                    layer = problem.module(getattr(rnnfast, cell), backend="triton", recompute=recompute)
                    ours = problem.kept(of_module(layer))
                else:
                    ours = kept_by_kernels(case, recompute)
                print(line(f"rnnfast's kernels{', recompute' * recompute}", case, ours, theirs["activations"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
