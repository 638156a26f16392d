"""Compares launches by `rnnfast.kernels.runtime.Launcher` with those of Triton's JIT, on a stub of the CUDA driver.

    python -m tests.support.launches FOLDER        FOLDER holds the stub (`benchmarks.static.stub.build`)

It runs every launch both ways and compares all that reaches the driver: the compiled code, the grid, whether the grid is
cooperative, and the bytes of every parameter. It prints one line of JSON for each test.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import struct
import sys
import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.static import stub
from rnnfast.kernels import runtime
from rnnfast.kernels.runtime import Launcher

CODES = {"i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f"}


class Pair(NamedTuple):
    one: object
    other: object


@triton.jit(do_not_specialize=["t", "scale"])
def copy_kernel(first_ptr, second_ptr, pair, t, size, scale, WIDTH: tl.constexpr, ADDED: tl.constexpr):
    offsets = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(first_ptr + offsets, mask=offsets < size, other=0.0) * scale + t + ADDED
    if pair.one is not None:
        value += tl.load(pair.one + offsets, mask=offsets < size, other=0.0)
    if second_ptr is not None:
        tl.store(second_ptr + offsets, value, mask=offsets < size)


class Launches:
    """What has reached the driver: for each launch (hash of the code, grid, cooperative, values of the parameters)."""

    def __init__(self, library: ctypes.CDLL, kernels):
        self.kernels, self.seen = kernels, []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        self.callback = kind(self.watch)
        library.stub_watch(self.callback)

    def watch(self, config, function, parameters):
        grid = struct.unpack("<3I", ctypes.string_at(config, 12))
        caches = [caches for kernel in self.kernels for caches in kernel.device_caches.values()]
        found = [built for cache in caches for built in list(cache[0].values()) if built.function == function]
        if not found:  # two threads compiled it at once, and Triton keeps one of both
            self.seen.append(None)
            return
        (built,), values = found, []
        for n, kind in enumerate(_flat(built.src.signature.values())):
            code = CODES.get(kind, "<Q")
            values.append(struct.unpack(code, ctypes.string_at(parameters[n], struct.calcsize(code)))[0])
        self.seen.append((built.hash, grid, built.metadata.launch_cooperative_grid, values))

    def take(self) -> list:
        seen, self.seen = self.seen, []
        return seen


def _flat(signature):
    for kind in signature:
        if isinstance(kind, tuple):
            yield from _flat(kind)
        elif kind != "constexpr":
            yield kind


def by_triton(launcher: Launcher, grid, *args) -> None:
    launcher.kernel[grid](*args, **launcher.constants, **launcher.options)


def random_arguments(draw: random.Random):
    """Arguments of `copy_kernel` of every class: tensors at odd addresses, None, special integers, wide ones."""

    def tensor(none=True):
        if none and draw.random() < 0.3:
            return None
        return torch.zeros(80, dtype=draw.choice([torch.float16, torch.float32]))[draw.choice([0, 0, 1, 8]) :]

    t = draw.choice([0, 1, 16, 7, 2**31 - 1, 2**31, -(2**31), 2**40])
    size = draw.choice([1, 16, 64, 5, 0, 2**31, 48])
    return tensor(none=False), tensor(), Pair(tensor(), None), t, size, draw.choice([0.5, 1.0, 16.0])


def random_launches(library: ctypes.CDLL) -> dict:
    """Each launch twice by a launcher and once by Triton, and its arguments bound and launched by their addresses."""
    launches, draw, classes = Launches(library, [copy_kernel]), random.Random(0), set()
    launchers = [
        Launcher(copy_kernel, {"WIDTH": 16, "ADDED": added}, num_warps=1, **options)
        for added, options in ((0, {}), (1, {"launch_cooperative_grid": True}))
    ]
    for _ in range(150):
        launcher, grid, args = draw.choice(launchers), (draw.randint(1, 9), draw.randint(1, 3), 1), random_arguments(draw)
        by_triton(launcher, grid, *args)
        expected = launches.take()
        launcher(grid, *args)
        launcher(grid, *args)
        launch, plain = launcher.bind(grid, *args)
        launch(*plain)
        assert launches.take() == expected * 3, (args, expected)
        classes.add(expected[0][0])
    return {"launches": 150, "compiled": len(classes)}


def after_clearing(library: ctypes.CDLL) -> dict:
    """Triton's caches are emptied between two launches: the kernel is compiled anew. A hook sees each launch."""
    launches, names = Launches(library, [copy_kernel]), []
    launcher, x = Launcher(copy_kernel, {"WIDTH": 16, "ADDED": 0}, num_warps=1), torch.zeros(64)
    args = (x, x, Pair(None, None), 3, 64, 1.0)
    launcher((1, 1, 1), *args)
    copy_kernel.device_caches.clear()
    launcher((1, 1, 1), *args)
    found = launches.take()
    assert found[0] == found[1] and len(copy_kernel.device_caches[0][0]) == 1
    from triton import knobs

    def hook(metadata):
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    launcher((1, 1, 1), *args)
    launch, plain = launcher.bind((1, 1, 1), *args)
    for _ in range(2):
        launch(*plain)
    knobs.runtime.launch_enter_hook.remove(hook)
    launcher((1, 1, 1), *args)
    assert names == ["copy_kernel"] * 3 and launches.take() == [found[0]] * 4
    return {"hooked": len(names)}


def in_threads(library: ctypes.CDLL) -> dict:
    """Eight threads launch at once, the first time of each class among them: of a few classes, so that threads meet in one."""
    launches, errors = Launches(library, [copy_kernel]), []
    launcher = Launcher(copy_kernel, {"WIDTH": 32, "ADDED": 0}, num_warps=1, launch_cooperative_grid=True)

    few = [random_arguments(random.Random(seed)) for seed in range(12)]

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(20):
                launcher((seed + 1, 1, 1), *draw.choice(few))
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return {"launches": len(launches.take())}


def layers(library: ctypes.CDLL) -> dict:
    """A layer, both directions of one and a stack, on each family, forward and backward, in chunks, with a state at an odd
    address: the parameters that both ways give. Addresses of buffers that a call makes itself differ; of these the alignment is
    compared."""
    from benchmarks.static import offline
    from rnnfast import ops
    from rnnfast.choice import kernel_plan
    from rnnfast.kernels.families import OF_TORCH
    from rnnfast.kernels.persistent.plan import GPUS
    from rnnfast.reference import Weights

    launches, found = Launches(library, offline.kernels()), {}
    H, T, B = 64, 5, 3
    weights = [torch.zeros(4 * H, 2, requires_grad=True), torch.zeros(4 * H, H, requires_grad=True)]
    biases = [torch.zeros(4 * H + 1)[1:].requires_grad_() for _ in range(2)]
    x, states = torch.zeros(T, B, 2), tuple(torch.zeros(B * H + 1)[1:].view(B, H).requires_grad_() for _ in range(2))
    known = {tensor.data_ptr() for tensor in (*weights, x)}
    directions = [Weights(*weights, *biases)] * 2
    stack = [directions[0], Weights(torch.zeros(4 * H, H, requires_grad=True), weights[1], *biases)]

    def shown(launch):
        code, grid, cooperative, values = launch
        return code, grid, cooperative, [value if value < 2**32 or value in known else value % 16 for value in values]

    def run():
        y, _ = ops.layer("lstm", x, states, *weights, *biases, lengths=torch.tensor([5, 4, 2]))
        y.sum().backward()
        y, _ = ops.layer("lstm", x, None, *weights, None, None, reverse=True)
        y.sum().backward()
        ops.group("lstm", x, None, directions, flips=2).y.sum().backward()
        ops.group("lstm", x, None, stack, stacked=True).y.sum().backward()
        return [shown(launch) for launch in launches.take()]

    for family in OF_TORCH:
        os.environ["RNNFAST_KERNELS"] = family
        with kernel_plan.pretend_gpu(GPUS["H200"]):
            run()
            ours = run()
            own = Launcher.__call__, Launcher.bind
            Launcher.__call__ = by_triton
            Launcher.bind = lambda launcher, grid, *args: (functools.partial(by_triton, launcher, grid), args)
            addresses, runtime.addresses = runtime.addresses, lambda *values: values  # Triton takes the tensors
            theirs = run()
            Launcher.__call__, Launcher.bind = own
            runtime.addresses = addresses
        assert ours == theirs, (ours, theirs)
        found[family] = len(ours)
    return found


def stop(error) -> None:
    """An error in a callback from C, which Python would only print."""
    sys.__unraisablehook__(error)
    os._exit(1)


def main() -> None:
    sys.unraisablehook = stop
    library = stub.load(sys.argv[1])
    stub.pretend()
    for test in (random_launches, after_clearing, in_threads, layers):
        print(json.dumps([test.__name__, test(library)]), flush=True)


if __name__ == "__main__":
    main()
