"""How often the contract of `rnnfast.numerics` calls a right result wrong, and how often it finds a planted fault.

    python -m benchmarks.numerics --power [--draws 10000]

Layers, weights and inputs are drawn at the sizes of the test suite, on each set of instructions that this CPU has, in processes
of its own. docs/numerics.md has the figures.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import check, numerics, reference
from rnnfast.check import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SETS = {  # instructions of 2006, 2013 and 2017: what ATen and oneDNN are told to use
    "SSE4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}
CELLS = (("LSTM", "tanh"), ("GRU", "tanh"), ("RNN", "tanh"), ("RNN", "relu"))
SIZES: tuple[dict, ...] = (  # of rnnfast.check, test_nn, test_ops, test_recompute, test_cells, test_bench_providers
    {"T": 4, "B": 3, "I": 5, "H": 18, "bidirectional": True},
    {"T": 3, "B": 5, "I": 7, "H": 15},
    {"T": 4, "B": 3, "I": 5, "H": 6},
    {"T": 7, "B": 3, "I": 5, "H": 6},
    {"T": 1, "B": 3, "I": 29, "H": 31},
    {"T": 2, "B": 5, "I": 7, "H": 15, "layers": 2},
    {"T": 3, "B": 2, "I": 3, "H": 4},
    {"T": 1, "B": 1, "I": 29, "H": 31},
)
TF32 = " of TF32"  # figures of layers in which it is allowed
ENOUGH = 300  # elements of the output that are not zero, for truncation to be seen
BLOCK = 24  # draws that a process reports at once
KERNELS_EVERY = 20  # draws to one on the Triton kernels: the interpreter is slow
LARGEST = (0.01, 0.001)  # shares of the figures to which a tail is fitted
FEWEST = 20  # figures to which one can be

aten = torch.ops.aten


class _Kernel(TorchDispatchMode):
    """float32 arithmetic as the kernels do it: `store` rounds gates kept for backward, `factor` the factors of products."""

    def __init__(
        self,
        store: Callable[[Tensor], Tensor],
        tanh: Callable[[Tensor], Tensor] = lambda y: y,
        factor: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.store, self.tanh, self.factor = store, tanh, factor or store

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind, args = func.overloadpacket, list(args)
        if kind in (aten.mm, aten.addmm):
            args[-2:] = (self.factor(arg) for arg in args[-2:])
        elif kind in (aten.sigmoid_backward, aten.tanh_backward):
            args[1] = self.store(args[1])
        result = func(*args, **(kwargs or {}))
        return self.tanh(result) if kind is aten.tanh else result


def _cut(bits: int) -> Callable[[Tensor], Tensor]:
    """Truncates float32 numbers by so many bits."""
    return lambda x: (x.contiguous().view(torch.int32) >> bits << bits).view(torch.float32)


def tf32(x: Tensor) -> Tensor:
    """Rounds to the 10 bits of TF32."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) >> 13 << 13).view(torch.float32)


ROUNDED, TRUNCATED = tf32, _cut(13)  # the factors of a product in TF32: as some programs and as tensor cores take them


def _units(count: int) -> Callable[[Tensor], Tensor]:
    """Moves float32 numbers away from zero by `count` units in the last place."""
    return lambda x: (x.contiguous().view(torch.int32) + count).view(torch.float32)


class Draw:
    """One layer and input at random; its contract, and results of several programs.

    `tf32`: of float32, with TF32 allowed. A CPU has none, so "torch.nn" is the equations with factors rounded to TF32.
    """

    def __init__(self, number: int, tf32: bool = False) -> None:
        self.case, self.tf32 = self.case_of(number), tf32
        self.dtype = self.case.dtype
        self.problem = check.Problem(self.case, "cpu")
        self.theirs = self.kernel(factor=ROUNDED) if tf32 else self.problem.run(self.problem.module(torch.nn))
        self.contract = numerics.Contract(self.problem.exactly, self.theirs, self.dtype, tf32)
        self.alone = copy.copy(self.contract)
        self.alone._theirs = {}
        self.random = torch.Generator().manual_seed(number)

    @staticmethod
    def case_of(number: int) -> Case:
        kinds = list(itertools.product(CELLS, DTYPES, SIZES))
        (cell, nonlinearity), dtype, size = kinds[number * 37 % len(kinds)]
        return Case(cell, dtype=dtype, nonlinearity=nonlinearity, seed=number, **size)

    def kernel(self, change: Callable = lambda module: None, store: Callable | None = None, **mode) -> dict[str, Tensor]:
        """What our kernels compute, with a fault: the module changed, or other arithmetic."""
        keep = store or (lambda x: x.to(self.dtype).float())
        module = self.problem.module(rnnfast, torch.float32, backend="reference")
        change(module)
        with _Kernel(keep, **({"factor": TRUNCATED} if self.tf32 else {}) | mode):
            found = self.problem.run(module, torch.float32)
        return {name: keep(tensor.detach()).to(self.dtype) for name, tensor in found.items()}

    def right(self, number: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if self.tf32:
            yield "TF32, factors rounded", self.theirs
            yield "TF32, factors truncated", self.kernel()
            return
        yield "torch.nn", self.theirs
        yield "equations in the dtype", self.problem.run(self.problem.module(rnnfast, self.dtype, backend="reference"))
        yield "kernels' arithmetic", self.kernel()
        if number % KERNELS_EVERY == 0:
            yield "Triton kernels", self.problem.run(self.problem.module(rnnfast, self.dtype, backend="triton"))

    def wrong(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        name = "TF32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        yield f"one wrong element, {name}", self._element()
        if self.case.T > 1:
            yield f"h of the step before the last, {name}", self._stale()
        if self.case.cell != "RNN":
            yield f"two gates swapped, {name}", self.kernel(self._swap)
        yield f"a bias added twice, {name}", self.kernel(self._twice)
        outputs = int(self.theirs["output"].count_nonzero())
        size = f"{ENOUGH} outputs or more" if outputs >= ENOUGH else f"fewer than {ENOUGH} outputs"
        if self.dtype == torch.bfloat16:
            yield f"truncated to bfloat16, {size}", self.kernel(store=_cut(16))
        if self.tf32:
            yield f"truncated to bfloat16, not TF32, {size}", self.kernel(factor=_cut(16))
        elif self.dtype == torch.float32:
            yield "TF32 for float32", self.kernel(store=tf32)
            if self.case.nonlinearity == "tanh":
                yield "tanh off by 16 units, float32", self.kernel(tanh=_units(16))

    def _element(self) -> dict[str, Tensor]:
        """One element of one tensor, off by the root mean square of the tensor."""
        found = self.kernel()
        names = list(found)
        if self.case.nonlinearity == "relu" and (self.tf32 or self.dtype != torch.float32):
            names = [name for name in names if "grad" not in name]  # nobody can judge those next to a doubtful sign
        names = [name for name in names if numerics.rms(self.contract.exact(name))]  # else nothing is added
        name = names[int(torch.randint(len(names), (), generator=self.random))]
        place = int(torch.randint(found[name].numel(), (), generator=self.random))
        found[name].view(-1)[place] += numerics.rms(self.contract.exact(name))
        return found

    def _stale(self) -> dict[str, Tensor]:
        cell, seen = reference_name(self.case), []
        right = reference.CELLS[cell]

        def step(x, h, states, given):
            seen.append((h, states[0]))
            first = len(seen) % self.case.T == 1  # each direction of each layer starts anew
            h, before = seen[-1 if first else -2]
            return right.step(x, h, (before, *states[1:]), given)

        with mock.patch.dict(reference.CELLS, {cell: replace(right, step=step)}):
            return self.kernel()

    @staticmethod
    def _twice(module: torch.nn.Module) -> None:
        for name, weight in module.named_parameters():
            if name.startswith("bias_ih"):
                weight.data.mul_(2)

    @staticmethod
    def _swap(module: torch.nn.Module) -> None:
        H = module.hidden_size
        for weight in module.parameters():
            weight.data[: 2 * H] = weight.data[: 2 * H].roll(H, 0)


def reference_name(case: Case) -> str:
    return f"rnn_{case.nonlinearity}" if case.cell == "RNN" else case.cell.lower()


def study(numbers: range) -> dict:
    """What one process found in some draws: figures of right results as parts of their limits, and faults found."""
    torch.set_num_threads(1)
    shares: dict[str, dict[str, list[float]]] = {}
    comparisons, alarms, planted, caught = Counter(), Counter(), Counter(), Counter()
    for number, allowed in itertools.product(numbers, (False, True)):
        if allowed and Draw.case_of(number).dtype != torch.float32:
            continue
        draw = Draw(number, allowed)
        for program, found in draw.right(number):
            for name, tensor in found.items():  # by the model alone: torch.nn's run can only widen the limits
                figures = draw.alone.figures(name, tensor)
                comparisons[program] += 1
                alarms[program] += not numerics.worst(figures).ok
                # beside a doubtful sign both values are right, and they lie far apart: no share of a limit that rounding sets
                for figure in () if draw.contract.expected[name].flips else figures:
                    shares.setdefault(figure.figure + TF32 * allowed, {}).setdefault(program, []).append(figure.share)
        for fault, found in draw.wrong():
            planted[fault] += 1
            caught[fault] += not numerics.worst(draw.contract.judge(found)).ok
    counts = {"comparisons": comparisons, "alarms": alarms, "planted": planted, "caught": caught}
    return {"draws": len(numbers), "shares": shares} | counts


def tail(shares: list[float], largest: float) -> float:
    """The chance of a share above 1, from an exponential fitted to the `largest` part of the shares; NaN from too few."""
    ordered = sorted(shares, reverse=True)
    count = int(len(ordered) * largest)
    if count < FEWEST:
        return math.nan
    threshold = ordered[count]
    excess = sum(ordered[:count]) / count - threshold
    return count / len(ordered) * math.exp(-(1 - threshold) / excess)


def power(draws: int) -> int:
    """Runs the study, each set of instructions in a process of its own, and prints the tables."""
    here = {name: env for name, env in SETS.items() if _has(env)}
    for name in SETS.keys() - here.keys():
        print(f"{name}: this CPU does not have it")
    each = -(-draws // len(here))
    spans = {name: (n * each, (n + 1) * each) for n, name in enumerate(here)}
    with ThreadPoolExecutor() as pool:  # a process whose output nobody reads would soon wait
        rows = pool.map(lambda name: _run(here[name], *spans[name]), here)
        found: dict[str, list[dict]] = dict(zip(here, rows, strict=True))
    return report(found)


def _run(env: dict[str, str], first: int, end: int) -> list[dict]:
    """The blocks of a study, from a process of its own."""
    command = [sys.executable, "-m", "tests.power", str(first), str(end)]
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _has(env: dict[str, str]) -> bool:
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    capability = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True).stdout.strip()
    return capability.lower() == env["ATEN_CPU_CAPABILITY"]


def report(found: dict[str, list[dict]]) -> int:
    """Prints what was found on each set of instructions; 1 if the contract does not hold what it promises."""
    failed = False
    draws = {name: sum(row["draws"] for row in rows) for name, rows in found.items()}
    print(f"Draws: {', '.join(f'{count:,} on {name}' for name, count in draws.items())}.\n")
    print("Right results, by the limits of the model alone. A comparison is of a tensor, in two or three figures.\n")
    print("| instructions | program | comparisons | called wrong |")
    print("|---|---|--:|--:|")
    totals, alarms = Counter(), Counter()
    for name, rows in found.items():
        here = {kind: sum((Counter(row[kind]) for row in rows), Counter()) for kind in ("comparisons", "alarms")}
        for program, count in here["comparisons"].items():
            print(f"| {name} | {program} | {count:,} | {here['alarms'][program]} |")
        totals += here["comparisons"]
        alarms += here["alarms"]
    print(f"| all | all | {totals.total():,} | {alarms.total()} |\n")
    print("| figure | largest share of a limit | chance beyond it, by the largest 1% | by the largest 0.1% |")
    print("|---|--:|--:|--:|")
    every = [row for rows in found.values() for row in rows]
    chances = [0.0 for _ in LARGEST]
    for figure in ("rms", "element", "bias", "rms" + TF32, "element" + TF32):
        shares = [share for row in every for part in row["shares"].get(figure, {}).values() for share in part]
        fits = [tail(shares, largest) for largest in LARGEST]
        chances = [chance + fit for chance, fit in zip(chances, fits, strict=True)]
        print(f"| {figure} | {max(shares, default=0.0):.2f} | {' | '.join(f'{fit:.0e}' for fit in fits)} |")
    print(f"| together | | {' | '.join(f'{chance:.0e}' for chance in chances)} |\n")
    failed |= alarms.total() > 0 or any(chance > 1e-6 for chance in chances)
    planted, caught = (sum((Counter(row[kind]) for row in every), Counter()) for kind in ("planted", "caught"))
    print("| planted fault | planted | caught | share |")
    print("|---|--:|--:|--:|")
    for fault in sorted(planted):
        print(f"| {fault} | {planted[fault]:,} | {caught[fault]:,} | {caught[fault] / planted[fault]:.4f} |")
        failed |= caught[fault] < 0.999 * planted[fault] and "fewer than" not in fault
    return int(failed)


if __name__ == "__main__":  # one process of the study
    first, end = map(int, sys.argv[1:])
    for begin in range(first, end, BLOCK):
        print(json.dumps(study(range(begin, min(begin + BLOCK, end)))), flush=True)
