"""Rows of several lengths and resets on the persistent kernels, their programs side by side, against the step kernels.

Whatever is padding holds NaN, in what is read, and `recurrence.UNWRITTEN`, in what is written: neither family touches it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recurrence import Layer, assert_close, steps_of, tiles
from support.side_by_side import Fault, together
from test_persistent_parts import parts

from rnnfast.kernels import marks, persistent, runtime, step

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
T, B = 4, 10  # two batch tiles, the second with masked rows
LENGTHS = [0, 2, 1, 0, 4, 2, 1, 3, 1, 2]
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.3
CASES = [
    # cell, dtype, H, and whether in reverse
    ("lstm", torch.float32, 32, False),
    ("lstm", torch.float16, 29, True),
    ("gru", torch.bfloat16, 32, True),
    ("gru", torch.float32, 29, False),
    ("rnn_tanh", torch.float16, 32, True),
]
SWEPT = [
    pytest.param(cell, dtype, H, reverse, marks=pytest.mark.sweep)
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for H in (29, 32)
    for reverse in (False, True)
]


def equal(found, theirs):
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize(("cell", "dtype", "H", "reverse"), CASES + SWEPT)
def test_marks(cell, dtype, H, reverse):
    """Lengths and resets, from given states to given states: launches of all steps, and of one and two, under two schedules,
    give the same bits, those of the step kernels within a rounding."""
    layer = Layer(cell, dtype, T, B, H, reverse=reverse, lengths=LENGTHS, resets=RESETS, dcs=True)
    found = []
    for seed, steps in enumerate((T, 3)):
        with together(seed):
            found.append(layer.both(persistent, tiles(H, block_h=16), chunk=steps))
    assert_close(found[0], layer.both(step, steps_of(H, dtype)), dtype)
    equal(*found)


OPTIONS = {
    "lengths": {"lengths": LENGTHS, "starts": False},
    "resets": {"resets": RESETS},
    "from zeros": {"lengths": LENGTHS, "resets": RESETS, "h0": False, "bias": False, "dy": False, "starts": False},
    "all empty": {"lengths": [0] * B},
    "gradients of c": {"dcs": True},
}


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("cell", ["lstm", pytest.param("gru", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_alone(options, cell, reverse):
    layer = Layer(cell, torch.float16, T, B, 32, reverse=reverse, **OPTIONS[options])
    with together(2):
        ours = layer.both(persistent, tiles(32, block_h=16), chunk=3)
    assert_close(ours, layer.both(step, steps_of(32, torch.float16)), torch.float16)


@pytest.mark.parametrize(
    ("cell", "dtype", "H", "count", "reverse"),
    [
        ("lstm", torch.float16, 64, 2, False),
        ("gru", torch.float32, 29, 4, True),
        *(
            pytest.param(cell, torch.float32, 64, count, reverse, marks=pytest.mark.sweep)
            for cell in ("lstm", "gru", "rnn_tanh")
            for count in (2, 4)
            for reverse in (False, True)
        ),
    ],
)
def test_parts(cell, dtype, H, count, reverse):
    """Programs that share their units' sums: what began anew is cut off after these are whole."""
    layer = Layer(cell, dtype, T, B, H, reverse=reverse, lengths=LENGTHS, resets=RESETS)
    forward = layer.forward(step, steps_of(H, dtype))
    with together(3):
        ours = layer.backward(persistent, parts(H, count, IN_REGISTERS=1), *forward, chunk=3)
    theirs = layer.backward(step, steps_of(H, dtype), *forward)
    assert_close(*([tensor for tensor in found if tensor is not None] for found in (ours, theirs)), dtype)


@pytest.mark.parametrize("reverse", [False, True])
def test_inference(reverse):
    """The states are bitwise those of training, from chunk to chunk too, and each row's last cell state is kept, not T."""
    layer = Layer("lstm", torch.float16, T, B, 32, reverse=reverse, lengths=LENGTHS, resets=RESETS)
    with together(4):
        h, (c,), _ = layer.forward(persistent, tiles(32, block_h=16), training=False, chunk=1)
        trained, cs, _ = layer.forward(persistent, tiles(32, block_h=16))
    assert torch.equal(h, trained)
    for b, length in enumerate(LENGTHS):
        assert length == 0 or torch.equal(c[b], cs[0 if reverse else length - 1, b])


def test_bad_numbers_do_not_hang():
    """NaN of the pattern that means empty, in the states that rows begin from and in what enters: as on the step kernels."""
    layer = Layer("gru", torch.float16, T, B, 32, lengths=LENGTHS, resets=RESETS)
    layer.marks.starts_h.view(torch.int16)[:, 4] = -1
    layer.dy.view(torch.int16)[3, 4] = -1
    with together(5):
        ours = layer.both(persistent, tiles(32, block_h=16))
    for a, b in zip(ours, layer.both(step, steps_of(32, torch.float16)), strict=True):
        torch.testing.assert_close(a, b, rtol=4e-3, atol=4e-3, equal_nan=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_nobody_runs_costs_nothing(reverse, monkeypatch):
    """A tile of rows of one step, beside one of four, multiplies once forward and at most once backward, a tile of empty rows
    never: products are counted."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, create = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: products.append(1) or create(*args))
    programs, counted = 4, []
    for length in (4, 1, 0):
        layer = Layer("rnn_tanh", torch.float32, 4, 16, 32, reverse=reverse, lengths=[4] * 8 + [length] * 8, starts=False)
        products.clear()
        with together(6):
            layer.both(persistent, tiles(32))
        counted.append(len(products) / programs)
    four, one, none = counted
    assert four == 2 * none >= 2 * 7 and 1 <= one - none <= 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_lost_store_is_caught(direction):
    """At its step, in a tile that began late; no program of the tile that has ended waits. The programs give up."""
    layer = Layer("lstm", torch.float16, T, B, 32, reverse=direction == "forward", lengths=[0] * 8 + [3, 2])
    forward = layer.forward(step, steps_of(32, torch.float16))
    fault = Fault("skipped store", (2, 0, 0), step=2)  # rows are taken from the last
    with together(7, fault) as happened:
        if direction == "forward":
            layer.forward(persistent, tiles(32))
        else:
            layer.backward(persistent, tiles(32), *forward)
    assert "at step 2" in happened.stuck and happened.gave_up


@pytest.mark.parametrize("block_b", [8, 32])
@pytest.mark.parametrize("order", [None, [3, 9, 0, 1, 8, 2, 7, 4, 6, 5]])
def test_packed_marks(block_b, order):
    """Two bits a row, in the order given, the steps of one member after those of another; a word of ones where no row of the
    tile runs."""
    steps, codes = 40, torch.randint(0, 4, (40, B), dtype=torch.int8)
    codes[7] = marks.PADDED.value
    given = None if order is None else torch.tensor(order, dtype=torch.int32)
    plan = replace(tiles(32), BLOCK_B=block_b)
    words = persistent.launch.packed(marks.Marks(codes.view(2, 20, B), given), plan).codes.view(torch.int64)
    count = -(-B // block_b)
    assert words.shape == (steps, count) and (words[7] == marks.ALL_PADDED.value).all()
    taken = codes.long()[:, list(range(B)) if order is None else order]
    for slot in range(count * block_b):
        mark = words[:, slot // block_b] >> 2 * (slot % block_b) & 3
        assert torch.equal(mark, taken[:, slot] if slot < B else torch.full((steps,), marks.PADDED.value))


@st.composite
def examples(draw):
    steps, rows = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    resets = torch.tensor(draw(st.lists(st.booleans(), min_size=steps * rows, max_size=steps * rows))).view(steps, rows)
    options = {name: draw(st.booleans()) for name in ("reverse", "h0", "bias", "dy", "dcs", "starts")}
    cell = draw(st.sampled_from(["lstm", "gru", "rnn_tanh"]))  # a relu may switch a unit by a rounding
    H, dtype = draw(st.integers(1, 40)), draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    layer = Layer(cell, dtype, steps, rows, H, lengths=lengths, resets=resets, **options)
    options = {"block_h": draw(st.sampled_from([8, 16])), "split": draw(st.sampled_from([1, 2]))}
    return layer, tiles(H, **options), draw(st.integers(1, 4)), draw(st.integers(0, 2**32))


def check_example(example):
    layer, plan, chunk, seed = example
    with together(seed):
        ours = layer.both(persistent, plan, chunk=chunk)
    assert_close(ours, layer.both(step, steps_of(layer.shape[2], layer.w.dtype)), layer.w.dtype)


@settings(max_examples=5)
@given(examples())
def test_any_marks_and_plan(example):
    check_example(example)


@pytest.mark.sweep
@settings(max_examples=200)
@given(examples())
def test_many_marks_and_plans(example):
    check_example(example)
