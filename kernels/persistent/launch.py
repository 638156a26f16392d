"""Launches of the persistent kernels: `forward` and `backward`, one launch for many time steps of all members of a group."""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.given import Given
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads, pack_kernel
from rnnfast.kernels.persistent.backward import persistent_backward_kernel
from rnnfast.kernels.persistent.clear import clear_kernel
from rnnfast.kernels.persistent.forward import persistent_forward_kernel
from rnnfast.kernels.persistent.give_up import for_launch, name_of
from rnnfast.kernels.persistent.plan import PersistentPlan
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, Repeated, as_a_gpu, emulates_bf16

__all__ = ["backward", "forward", "packed"]

CLEAR_BLOCK = 4096
PACK_STEPS = 32


def _power_of_two(gates: int) -> int:
    return 1 << (gates - 1).bit_length()


@functools.cache
def _pack(block_b: int) -> Launcher:
    return Launcher(pack_kernel, {"BLOCK_B": block_b, "BLOCK_T": PACK_STEPS})


def packed(marks: Marks, plan) -> Marks:
    """`marks` with the codes (M, T, B) of each of the plan's batch tiles in a word, (M * T, tiles * 8) bytes."""
    if marks.codes is None:
        return marks
    codes = marks.codes
    B = codes.size(-1)
    T, tiles = codes.numel() // B, -(-B // plan.BLOCK_B)
    words = codes.new_empty(T, tiles * 8)
    _pack(plan.BLOCK_B)((-(-T // PACK_STEPS), tiles, 1), codes, marks.order, words, T, B)
    return marks._replace(codes=words)


@functools.lru_cache(MOST_LAUNCHERS)
def _clear(words: int, directions: int, of_chunk: bool, backward: bool) -> Launcher:
    constants = {"WORDS": words, "DIRECTIONS": directions, "OF_CHUNK": of_chunk, "BACKWARD": backward, "BLOCK": CLEAR_BLOCK}
    return Launcher(clear_kernel, constants)


class _Exchange:
    """What the launches of a call exchange through, with the members in front: `out` itself, which is h or the gate gradients,
    or a buffer of a chunk's steps with `apart` elements a row, because something is padded or marked; and with PARTS > 1 a
    buffer of sums."""

    def __init__(self, out, width: int, apart: int, T: int, B: int, plan: PersistentPlan, group: Group, backward: bool):
        per_word = 4 // out.element_size()
        self.out, self.apart, self.B, self.members = out, apart, B, group.members
        self.buffer, self.sums, self.N = out, None, 0
        self.words = (apart or width) // per_word
        self.sum_words = B * plan.PARTS * plan.H_PAD if plan.PARTS > 1 else 0
        self.sum_shape = self.sum_words * per_word
        self.sizes = T, group.flips, B, self.sum_words
        self.lag = group.lag if backward else -group.lag
        directions = 1 if apart or backward else group.directions
        self.launcher = _clear(self.words, directions, apart > 0, backward)

    def cleared(self, begin: int, N: int) -> bool:
        """Clear it for a launch. Whether its buffers are new: they are allocated at the first of a call."""
        if new := N > self.N:
            self.N = N
            if self.apart:
                self.buffer = self.out.new_empty(self.members, N, self.B, self.apart)
            if self.sum_words:
                self.sums = self.out.new_empty(self.members, N, self.sum_shape)
            blocks = -(-N * max(self.B * self.words, self.sum_words) // CLEAR_BLOCK)
            repeated = Repeated(self.launcher, (blocks, 1, self.members), self.buffer, self.sums)
            self.clear = repeated.of(sizes=(begin, self.lag, N, *self.sizes))
        self.clear(begin, self.lag, N, *self.sizes)
        return new


def _launcher(kernel, cell: Cell, plan: PersistentPlan, grouped: bool, directions: int, H: int, dtype, precision: str, **own):
    """`own`: constants that only one of the kernels has."""
    constants = {
        "H": H,
        "G": cell.gates,
        "GATES": _power_of_two(cell.gates),
        "CARRIED": cell.carried,
        "HELD": cell.held,
        "NOISE": cell.noise,
        "PER_WORD": 4 // dtype.itemsize,
        "PRECISION": precision,
        "EMULATE_BF16": emulates_bf16(dtype),
        "GROUPED": grouped,
        "DIRECTIONS": directions,
        "PLAN": plan.tiles,
    }
    return Launcher(
        kernel,
        constants | own,
        num_warps=plan.num_warps,
        num_stages=1,  # the pipeliner ignores volatile: it would load ahead of the poll
        # a second CTA on the SM is no use: the assembler would save registers for one, and spill
        maxnreg=255,
        launch_cooperative_grid=True,  # programs wait for each other: all resident, or an error
    )


@functools.lru_cache(MOST_LAUNCHERS)
def _forward_launcher(cell: Cell, plan: PersistentPlan, saves: bool, training: bool, *sizes) -> Launcher:
    own = {"CELL": cell.forward, "SAVED": cell.saved if saves else 0, "KEEP_C": training}
    return _launcher(persistent_forward_kernel, cell, plan, *sizes, **own)


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, plan: PersistentPlan, *sizes) -> Launcher:
    own = {"CELL": cell.backward, "D": cell.grads, "SAVED": cell.saved, "DIRECT": cell.direct}
    return _launcher(persistent_backward_kernel, cell, plan, *sizes, **own)


@as_a_gpu
def forward(
    cell: Cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, *, group: Group, precision: str, plan: PersistentPlan,
    marks: Marks = Marks(), given: Given = Given(),
) -> None:  # fmt: skip
    """Run the recurrence of a group, one launch a round, or a few where the batch takes several.

    Arguments as in `rnnfast.kernels.step.forward`. The rows of a round in `h` are its exchange, unless there are marks.
    """
    T, B, H = h.size(-3), h.size(-2), w.size(-1)
    training, marked = saved is not None, marks.codes is not None
    saves = training and saved.numel() > 0
    launcher = _forward_launcher(cell, plan, saves, training, group.members > 1, group.directions, H, h.dtype, precision)
    exchange = _Exchange(h, H, plan.H_PAD if marked or plan.H_PAD != H else 0, T, B, plan, group, False)
    marks, give_up, name = packed(marks, plan), for_launch(h), name_of("forward", cell, H, h.dtype)
    has_first = int(marked or h0 is not None)
    h0, c0 = h if h0 is None else h0, c if c0 is None else c0
    launches = []
    for begin, N, x, first in rounds():
        if exchange.cleared(begin, N):
            tensors = w, bias_x, bias_h, h0, c0, marks, given, give_up, exchange.buffer, h, c, saved
            launches = [(at, Repeated(launcher, grid, *tensors)) for grid, at in plan.launches(B, group.members)]
        for b_begin, repeated in launches:
            sizes = first, begin, -group.lag, N, T, group.flips, has_first, b_begin, B, name
            repeated.of(x, sizes=sizes)(*sizes)


@as_a_gpu
def backward(
    cell: Cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, *, group: Group, precision: str, plan: PersistentPlan,
    dcs=None, marks: Marks = Marks(), d_starts: StartGrads = StartGrads(), given: Given = Given(), d_held=None,
) -> None:  # fmt: skip
    """Run the recurrence of a group backward, one launch a round, or a few where the batch takes several.

    Arguments as in `rnnfast.kernels.step.backward`. The rows of a round in `d_gates` are its exchange, unless there are marks.
    """
    T, B, H = h.size(-3), h.size(-2), w.size(-1)
    marked = marks.codes is not None
    launcher = _backward_launcher(cell, plan, group.members > 1, group.directions, H, h.dtype, precision)
    apart = cell.gates * plan.H_PAD if marked or plan.H_PAD != H else 0
    exchange = _Exchange(d_gates, cell.grads * H, apart, T, B, plan, group, True)
    marks, give_up, name = packed(marks, plan), for_launch(d_h), name_of("backward", cell, H, h.dtype)
    has_first = int(h0 is not None)
    h0, c0 = h if h0 is None else h0, c if c0 is None else c0
    launches = []
    for begin, N, dy, saved in rounds():
        if exchange.cleared(begin, N):
            tensors = (
                h, h0, c, c0, w, dcs, marks, given, give_up, exchange.buffer, exchange.sums, d_gates, d_h, d_c, d_held,
                d_starts,
            )  # fmt: skip
            launches = [(at, Repeated(launcher, grid, *tensors)) for grid, at in plan.launches(B, group.members)]
        of_chunk = int(cell.saved > 0 and saved.size(1) != T)
        for b_begin, repeated in launches:
            sizes = begin, group.lag, N, T, group.flips, of_chunk, has_first, b_begin, B, name
            repeated.of(dy, saved, sizes=sizes)(*sizes)
