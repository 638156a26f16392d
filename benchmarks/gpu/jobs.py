"""The jobs of `benchmarks.gpu_check` for the persistent kernels: it checks many shapes and compares many launches.

`benchmarks.timing.isolated` runs these generators in a child process, which may hang or crash.
"""

import os
from collections.abc import Iterator

import torch

import rnnfast
from rnnfast.check import Case, Problem, compare, fault
from rnnfast.choice import kernel_plan

DEVICE = "cuda"
OTHER = 2048  # size of the products that keep the GPU busy
LAUNCHES = 10_000  # launches of a stress run, forward and backward together
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
CHECKS = [  # with TF32 or not. The most wanted come first, because time may run out
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


def missing(case: Case) -> list[str]:
    """The directions without a persistent plan, and why. RNNFAST_KERNELS asks for the persistent kernels."""
    os.environ["RNNFAST_KERNELS"] = "persistent"
    cell = case.cell.lower() if case.cell != "RNN" else f"rnn_{case.nonlinearity}"
    device = torch.empty(0, device=DEVICE).device
    found = []
    for backward in (False, True):
        choice = kernel_plan.pick(cell, case.T, case.B, case.H, case.dtype, kernel_plan.precision(), backward, True, device)
        if choice.persistent is None:
            found.append(f"{'backward' if backward else 'forward'}: {choice.reason}")
    return found


def check(number: int) -> Iterator[dict]:
    """Check a case of `CHECKS`: training and inference meet the numerics contract, and two runs give the same bits."""
    case, tf32 = CHECKS[number]
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    without = missing(case)
    if len(without) == 2:
        yield {"skipped": "; ".join(without)}
        return
    for training in (True, False):
        if wrong := fault(compare(case, DEVICE, tf32=tf32, training=training)):
            yield {"error": f"{'training' if training else 'inference'}, {wrong}"}
            return
    problem = Problem(case, DEVICE)
    layer, x = problem.module(rnnfast, backend="triton"), problem.x
    first, second = (bits(layer, x) for _ in range(2))
    if not torch.equal(first, second):
        yield {"error": f"{int((first != second).sum())} of {first.numel()} numbers differ from run to run"}
    else:
        yield {"without": "; ".join(without)} if without else {}


def bits(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output and all gradients in one tensor."""
    x = x.detach().requires_grad_()
    y = layer(x)[0]
    return torch.cat([found.detach().flatten() for found in (y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()]))])


def stress(number: int) -> Iterator[dict]:
    """A case of `STRESS`: `LAUNCHES` launches of the persistent kernels on a few steps, which must always give the same bits.

    Yields the launches so far, and how many calls gave other bits than the first. Beside other work, a second stream keeps the
    GPU busy with products.
    """
    case, beside = STRESS[number]
    if without := missing(case):
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
