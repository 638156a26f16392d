"""Measures the ceilings of the current GPU (`benchmarks.floor.ceilings`) for a results file.

No GPU has run this yet. The kernels compile for absent GPUs, and tests run the two programs of the ping-pong side by side on a
CPU.
"""

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.timing.cases import DTYPES
from benchmarks.timing.measure import Call, stopwatch
from benchmarks.timing.problem import tf32
from rnnfast.kernels.persistent.exchange import FIRST_WAIT, clear_kernel, poll, publish
from rnnfast.kernels.persistent.give_up import for_launch

WORDS = 32  # words of a message: one for each lane of a warp
HOPS = 4096
READ_BLOCK = 4096


@triton.jit(do_not_specialize=["steps"])
def ping_pong_kernel(exchange_ptr, out_ptr, flag_ptr, told_ptr, steps, WORDS: tl.constexpr):
    """Two programs send a row of words back and forth, `steps` times, and add one each time.

    They use the exchange of the persistent kernels and do nothing else.
    """
    own = tl.program_id(0)
    words = exchange_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, WORDS)[None, :]
    mask = tl.full((1, WORDS), 1, tl.int1)
    value = tl.zeros((1, WORDS), tl.float32)
    for step in range(steps):
        row = words + tl.cast(step, tl.int64) * WORDS
        if step % 2 == own:
            value += 1
            publish(row, value, mask, 1)
        else:
            words_there = poll(row, mask, 1, 1, WORDS, 1, 1, (flag_ptr, told_ptr, 1), FIRST_WAIT, tl.minimum(step + 1, 1))
            value = words_there[0].to(tl.float32, bitcast=True)
    tl.store(out_ptr + own * WORDS + tl.arange(0, WORDS)[None, :], value)


@triton.jit(do_not_specialize=["blocks", "rounds"])
def read_kernel(source_ptr, out_ptr, blocks, rounds, BLOCK: tl.constexpr):
    """Each program reads `rounds` blocks of float32, bypassing L1, and keeps their sum. Each starts at another block."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rounds):
        offs = ((pid * 7 + i) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source_ptr + offs, cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + tl.arange(0, BLOCK), total)


def ping_pong(device: str, hops: int = HOPS) -> torch.Tensor:
    """Run the ping-pong on a fresh exchange. Returns what each program saw last: `hops`."""
    exchange = torch.empty(hops, WORDS, device=device)
    out = torch.zeros(2, WORDS, device=device)
    clear_kernel[(-(-exchange.numel() // 1024),)](exchange, exchange.numel(), BLOCK=1024)
    give_up = for_launch(out)
    ping_pong_kernel[(2,)](exchange, out, *give_up, hops, WORDS=WORDS, num_warps=1, num_stages=1, launch_cooperative_grid=True)
    return out


def _seconds(function: Callable[[], object], repeats: int = 10) -> list[float]:
    once = stopwatch(Call(lambda _: function()), "cuda")
    once()
    return [once() / 1e6 for _ in range(repeats)]


def _flops(dtype: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: torch.mm(a, b)))


def measure() -> dict:
    """The ceilings of the current CUDA device, in the form of a results file.

    - HBM: a copy of 1 GiB, read and written.
    - L2: every SM reads a quarter of L2 again and again, bypassing L1.
    - FLOPs: a product of 8192 x 8192 matrices.
    - Exchange: half a round trip of the ping-pong. A short run is subtracted from a long one, which removes the time of the
      launch and of clearing the buffer.

    The first three are the best of ten tries, the last one is the median.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    source, target = (torch.zeros(1 << 28, device="cuda") for _ in range(2))
    hbm = 2 * 4 * source.numel() / min(_seconds(lambda: target.copy_(source)))
    programs, rounds = 2 * properties.multi_processor_count, 512
    blocks = properties.L2_cache_size // 4 // (4 * READ_BLOCK)
    l2_seconds = _seconds(lambda: read_kernel[(programs,)](source, target, blocks, rounds, BLOCK=READ_BLOCK, num_warps=8))
    l2 = 4 * READ_BLOCK * programs * rounds / min(l2_seconds)
    flops = {}
    for name, (dtype, allowed) in DTYPES.items():
        with tf32(allowed):
            flops[name] = _flops(dtype)
    long, short = (statistics.median(_seconds(lambda n=n: ping_pong("cuda", n))) for n in (HOPS, HOPS // 8))
    hop = (long - short) / (HOPS - HOPS // 8)
    return {"hbm_bytes_per_s": hbm, "l2_bytes_per_s": l2, "flops_per_s": flops, "exchange_us": hop * 1e6}
