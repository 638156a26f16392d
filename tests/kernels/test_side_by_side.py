"""The tool that runs programs side by side: its memory is weak, its schedules repeat, and nothing that hangs gets past it."""

from __future__ import annotations

import threading

import pytest
import torch
import triton
import triton.language as tl
from support import side_by_side
from support.side_by_side import Hang, together

from rnnfast.kernels.runtime import mode

pytestmark = pytest.mark.skipif(mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")


@triton.jit
def message_kernel(data_ptr, flag_ptr, out_ptr, RELEASE: tl.constexpr, PLAIN: tl.constexpr):
    """Program 0 stores data, then a flag; program 1 waits for the flag, then reads the data."""
    offs = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        if PLAIN:
            tl.store(data_ptr + offs, offs + 10)
        else:
            tl.store(data_ptr + offs, offs + 10, cache_modifier=".cg")
        if RELEASE:
            tl.atomic_xchg(flag_ptr, 1, sem="release")
        else:
            tl.store(flag_ptr, 1, cache_modifier=".cg")
    else:
        while tl.load(flag_ptr, volatile=True) != 1:
            pass
        tl.store(out_ptr + offs, tl.load(data_ptr + offs, volatile=True))


def message(seed: int, release: bool = False, plain: bool = False) -> list[int]:
    data, flag, out = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with together(seed):
        message_kernel[(2,)](data, flag, out, RELEASE=release, PLAIN=plain)
    assert data.tolist() == list(range(10, 18))  # at the latest when the launch has ended
    return out.tolist()


def test_memory_is_weak():
    """Words that nothing orders are seen in any order: all, none and some of the data with the flag."""
    seen = [sum(word > 0 for word in message(seed)) for seed in range(40)]
    assert 0 in seen and 8 in seen and any(0 < count < 8 for count in seen)


@pytest.mark.parametrize("plain", [False, True])
def test_release_orders(plain):
    for seed in range(10):
        assert message(seed, release=True, plain=plain) == list(range(10, 18))


def test_plain_stores_are_not_seen():
    """No schedule makes a plain store visible by luck."""
    assert all(message(seed, plain=True) == [0] * 8 for seed in range(10))


@triton.jit
def order_kernel(count_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1))


def test_a_seed_is_a_schedule():
    def order(seed):
        count, out = torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
        with together(seed) as happened:
            order_kernel[(6,)](count, out)
        assert sorted(out.tolist()) == list(range(6)) and happened.grids == [("order_kernel", (6, 1, 1))]
        return tuple(out.tolist()), happened.switches

    assert [order(seed) for seed in range(5)] == [order(seed) for seed in range(5)]
    assert len({order(seed) for seed in range(5)}) > 1


@triton.jit
def own_words_kernel(ptr, out_ptr):
    """A program sees at once what it has stored itself."""
    offs = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(ptr + offs, offs, cache_modifier=".cg")
    tl.store(out_ptr + offs, tl.load(ptr + offs, volatile=True))


def test_own_words():
    for seed in range(5):
        words, out = torch.full((12,), -1, dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
        with together(seed):
            own_words_kernel[(3,)](words, out)
        assert out.tolist() == list(range(12))


@triton.jit
def stuck_kernel(ptr, HOW: tl.constexpr):
    """Program 1 never ends."""
    steps = 3
    for step in range(steps):
        if (tl.program_id(0) == 1) & (step == 2):
            if HOW == "polls":
                while tl.load(ptr, volatile=True) == 0:
                    pass
            elif HOW == "polls what changes":
                while tl.atomic_add(ptr, 1) >= 0:
                    pass
            elif HOW == "loads":
                while tl.load(ptr) == 0:
                    pass
            else:
                while step < steps:
                    pass


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("polls", r"every program waits for another: program \(1, 0, 0\) at step 2"),
        ("polls what changes", r"program \(1, 0, 0\) has had 50 turns and has not ended"),
        ("loads", r"program \(1, 0, 0\) at step 2 loads for ever"),
        ("computes", r"program \(1, 0, 0\) at step 2 has not let another run for 0.2 seconds"),
    ],
)
def test_what_never_ends_is_a_hang(how, message, monkeypatch):
    monkeypatch.setattr(side_by_side, "VAIN_TURNS", 10)
    monkeypatch.setattr(side_by_side, "MOST_TURNS", 50)
    monkeypatch.setattr(side_by_side, "MOST_LOADS", 500)
    monkeypatch.setattr(side_by_side, "PATIENCE", 0.2)
    before = threading.active_count()
    with together(0), pytest.raises(Hang, match=message):
        stuck_kernel[(3,)](torch.zeros(1, dtype=torch.int32), HOW=how)
    assert threading.active_count() == before


@triton.jit
def failing_kernel(ptr):
    if tl.program_id(0) == 1:
        tl.static_assert(False, "planted")
    while tl.load(ptr, volatile=True) == 0:
        pass


def test_an_error_of_a_program_is_raised():
    """As it is, not as the hang of those that wait for the program; and their threads end."""
    before = threading.active_count()
    with together(0), pytest.raises(AssertionError, match="planted"):
        failing_kernel[(3,)](torch.zeros(1, dtype=torch.int32))
    assert threading.active_count() == before
