"""Launches of the scan kernels: `forward` and `backward`, one launch for many time steps of all members of a group."""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.given import Given
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, Repeated, as_a_gpu, emulates_bf16
from rnnfast.kernels.scan.backward import scan_backward_kernel
from rnnfast.kernels.scan.forward import scan_forward_kernel
from rnnfast.kernels.scan.plan import ScanPlan

__all__ = ["backward", "forward"]


def _launcher(kernel, cell: Cell, plan: ScanPlan, H: int, grouped: bool, directions: int, dtype, **own) -> Launcher:
    """`own`: constants that only one of the kernels has."""
    constants = {
        "H": H,
        "G": cell.gates,
        "CARRIED": cell.carried,
        "HELD": cell.held,
        "NOISE": cell.noise,
        "GROUPED": grouped,
        "DIRECTIONS": directions,
        "EMULATE_BF16": emulates_bf16(dtype),
        "PLAN": plan,
    }
    return Launcher(kernel, constants | own, num_warps=plan.num_warps, num_stages=1, maxnreg=255)


@functools.lru_cache(MOST_LAUNCHERS)
def _forward_launcher(cell: Cell, saves: bool, training: bool, *kind) -> Launcher:
    own = {"CELL": cell.forward, "SAVED": cell.saved if saves else 0, "KEEP_C": training}
    return _launcher(scan_forward_kernel, cell, *kind, **own)


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, *kind) -> Launcher:
    own = {"CELL": cell.backward, "SAVED": cell.saved, "DIRECT": cell.direct}
    return _launcher(scan_backward_kernel, cell, *kind, **own)


def _checked(cell: Cell) -> None:
    assert not cell.recurrent and not cell.rows and cell.grads == cell.gates, "a cell that the scan kernels do not run"


@as_a_gpu
def forward(
    cell: Cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, *, group: Group, precision: str, plan: ScanPlan,
    marks: Marks = Marks(), given: Given = Given(),
) -> None:  # fmt: skip
    """Run the recurrence over all time steps, a launch for each of `rounds`. Arguments as in `rnnfast.kernels.step.forward`,
    but w is (M, 0, H) and bias_h None. The cell has no W_hh."""
    _checked(cell)
    *_, T, B, _ = h.shape
    H = w.size(-1)
    training = saved is not None
    saves = training and saved.numel() > 0
    launcher = _forward_launcher(cell, saves, training, plan, H, group.members > 1, group.directions, h.dtype)
    h_first, c_first, has_first = h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
    grid = plan.grid(B, H, group.members)
    repeated = Repeated(launcher, grid, bias_x, h_first, c_first, marks, given, h, c, saved)
    for begin, N, x, first in rounds():
        sizes = first, begin, -group.lag, N, T, group.flips, has_first, B
        repeated.of(x, sizes=sizes)(*sizes)


@as_a_gpu
def backward(
    cell: Cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, *, group: Group, precision: str, plan: ScanPlan, dcs=None,
    marks: Marks = Marks(), d_starts: StartGrads = StartGrads(), given: Given = Given(), d_held=None,
) -> None:  # fmt: skip
    """Run the recurrence backward, a launch for each of `rounds`. Arguments as in `rnnfast.kernels.step.backward`, but w is
    (M, 0, H). d_h is, on return, the whole gradient of h0."""
    _checked(cell)
    *_, T, B, _ = h.shape
    H = w.size(-1)
    launcher = _backward_launcher(cell, plan, H, group.members > 1, group.directions, h.dtype)
    h_first, c_first, has_first = h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
    grid = plan.grid(B, H, group.members)
    repeated = Repeated(
        launcher, grid, h, h_first, c, c_first, dcs, marks, given, d_gates, d_h, d_c, d_starts, d_held
    )  # fmt: skip
    for begin, N, dy, saved in rounds():
        sizes = begin, group.lag, N, T, group.flips, has_first, saved.size(1) if cell.saved else T, B
        repeated.of(dy, saved, sizes=sizes)(*sizes)
