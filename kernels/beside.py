"""The steps beside a step, in the order of processing: for a reverse direction the one before t is t + 1."""

from __future__ import annotations

__all__ = ["after", "before"]


def before(t: int, T: int, reverse: bool, h, h0, c, c0, marks=None):
    """The step processed before t: its index, the tensors that hold its h and c, and whether there is any state. With marks
    there always is: those of the first step point to where it is."""
    if marks is not None or t != (T - 1 if reverse else 0):
        return t + 1 if reverse else t - 1, h, c, 1
    return 0, h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)


def after(begin: int, end: int, T: int, reverse: bool) -> tuple[int, int]:
    """The step that backward comes from to the steps begin, ..., end - 1: its index, and whether there is one."""
    t = begin - 1 if reverse else end
    return (t, 1) if 0 <= t < T else (0, 0)
