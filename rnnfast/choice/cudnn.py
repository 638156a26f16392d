"""A model of cuDNN's recurrent layers: which of its algorithms PyTorch picks for a call, and what a time step of it takes.

The choice of kernels compares its own predictions with this model where nothing was measured. PyTorch picks an algorithm by
rules in ``aten/src/ATen/native/cudnn/RNN.cpp`` (read at commit 00fc08aa):

    standard   a matrix product and an elementwise kernel a step: for projections, packed input, float64, and what is left
    small      "persist static small H": one thread block for a row of the batch; for few units, in every dtype
    static     "persist static": one launch for all steps; float16, one layer, one direction, sizes in multiples of 128

The times are fits to published measurements. Where they differ between machines, the model takes the fastest, so that it
promises too little of our kernels rather than too much. Sources:

    KernelBench    level 3, problems 35 to 42, results/timing: B=10, H=256, float32 with TF32, on H100s
    xwang233       code-snippet, cudnn-rnn-bench-62143 (PyTorch pull request 62143), 2021, float16, on a GPU that is not named
    FlashRNN       arXiv 2412.07752: LSTM float16, H=768, B=16, H100: 1.96 us a step forward, 5.07 with backward
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnnfast.reference import GATES

if TYPE_CHECKING:
    from rnnfast.choice.tuning_file import Shape
    from rnnfast.kernels.persistent.limits import GpuLimits

__all__ = ["ALGORITHMS", "algorithm", "call_us", "step_us"]

ALGORITHMS = ("standard", "small", "static")

# PyTorch's rules
SMALL_H = {"rnn_tanh": (384, 256), "rnn_relu": (384, 256), "lstm": (192, 128), "gru": (192, 128)}  # units: forward, backward
STATIC_SMS = 98  # fewer, and PyTorch takes no static algorithm
STATIC_H = 1024
STATIC_B = 128

# "standard", us a step: what the host takes to launch, the fastest host of KernelBench
LAUNCHES = {"lstm": 5.2, "gru": 6.9, "rnn_tanh": 5.2, "rnn_relu": 5.2}
STANDARD_BACKWARD = 1.22  # times forward: the least of xwang233's rows
STANDARD_KERNELS = 1.8  # us: two kernels one after another on the GPU, at a launch latency of 0.9 us each; an estimate

# "small", us a step: fixed + slope * B * H * H, fitted to xwang233's rows: 0.70 to 1.13 of them, 0.7 to 1.35 in backward.
# Beyond 128 units it has no backward. The GPU is taken for an A100, at 1.41 GHz, and the time to shrink with the clock.
SMALL_FORWARD = 0.5, 6.9e-6
SMALL_BEYOND_128 = 0.0, 30.5e-6
SMALL_BACKWARD = 1.2, 9.3e-6
SMALL_GHZ = 1.41

# "static", us a step: FlashRNN's one size on an H100; how it varies with B * H is an estimate
STATIC_GHZ, STATIC_SIZE = 1.98, 16 * 768
STATIC_FORWARD = 1.3, 0.66
STATIC_BACKWARD = 2.0, 1.11

CALL_US = 40.0  # of the host for one call of a layer, besides its steps; an estimate


def algorithm(shape: Shape, gpu: GpuLimits, backward: bool = False, packed: bool = False, projected: bool = False) -> str:
    """The algorithm that PyTorch picks for a call, one of `ALGORITHMS`.

    Args:
        shape: the call.
        gpu: where it runs.
        backward: for the backward pass, whose rule has other limits.
        packed: the input is a PackedSequence.
        projected: the LSTM has a projection.
    """
    if packed or projected:
        return "standard"
    if SMALL_H[shape.cell][backward] >= shape.H:
        return "small"
    multiples = shape.H % 128 == 0 and shape.I % 128 == 0 and shape.B % 8 == 0
    alone = shape.layers == 1 and shape.directions == 1
    device = gpu.sms >= STATIC_SMS and gpu.capability >= 80 and gpu.capability % 10 != 6
    rows = shape.B <= STATIC_B and (shape.cell == "lstm" or shape.B < 96 or shape.H < 896)
    if shape.dtype == "float16" and shape.cell != "gru" and shape.H <= STATIC_H and multiples and alone and device and rows:
        return "static"
    return "standard"


def step_us(shape: Shape, gpu: GpuLimits, backward: bool = False, packed: bool = False, projected: bool = False) -> float:
    """Predicted microseconds of one time step of one layer in one direction, without W_ih x. Arguments as `algorithm`."""
    from rnnfast.kernels.hardware import L2_BYTES, gigahertz

    clock = gigahertz(gpu.name)
    work = shape.B * shape.H * shape.H
    name = algorithm(shape, gpu, backward, packed, projected)
    if name == "small":
        fixed, slope = SMALL_BACKWARD if backward else SMALL_FORWARD if shape.H <= 128 else SMALL_BEYOND_128
        return (fixed + slope * work) * SMALL_GHZ / clock
    if name == "static":
        fixed, slope = STATIC_BACKWARD if backward else STATIC_FORWARD
        return (fixed + slope * shape.B * shape.H / STATIC_SIZE) * STATIC_GHZ / clock
    itemsize = 4 if shape.dtype == "float32" else 2
    weights = GATES[shape.cell] * shape.H * shape.H * itemsize
    kernels = STANDARD_KERNELS + weights / (L2_BYTES * gpu.sms * clock * 1000)
    return max(LAUNCHES[shape.cell], kernels) * (STANDARD_BACKWARD if backward else 1.0)


def call_us(shape: Shape, gpu: GpuLimits, packed: bool = False, projected: bool = False) -> float:
    """Predicted microseconds of a whole call, forward and, in training, backward, without the products over all steps."""
    passes = (False, True) if shape.training else (False,)
    steps = sum(step_us(shape, gpu, backward, packed, projected) for backward in passes)
    return CALL_US * len(passes) + shape.T * shape.layers * shape.directions * steps
