"""Mistakes to plant in a kernel's PTX, each a change of its text, and what must notice it.

All are made in kernels that are right without. Who notices:

- a fault of `tests.ptx.memory`: "Race", "Unwritten", "OutOfBounds", "Deadlock";
- "numbers": a result outside of the numerics contract, NaN where programs gave up waiting.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from rnnfast.numerics import words, worst
from tests.ptx.gpu import simulated_gpu
from tests.ptx.group import GroupOfLayers
from tests.ptx.layer import Layer
from tests.ptx.memory import Fault

EARLY = ("Race", "Unwritten")  # what is read too early may be what nobody has written yet
SCHEDULES = 5  # seeds to try; a mistake that only some orders show must show in one of these
POLL = r"ld\.relaxed\.gpu\.global\.v"
EXCHANGE = re.compile(r"(st\.(?:global\.cg|relaxed\.gpu\.global)\.b32 \[ %rd\d+ \+ \d+ \], (?:\{ )?)(%r\d+)((?: \})?;)")


class Mistake(NamedTuple):
    """A change of `kernel`, seen on `layer`; noticed by one of `by`."""

    name: str
    layer: Layer | GroupOfLayers
    kernel: str
    change: Callable[[str], str]
    by: tuple[str, ...]


def lines_with(text: str, pattern: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines()) if re.search(pattern, line.partition("//")[0])]


def without(text: str, left_out: list[int]) -> str:
    """The text without these lines."""
    assert left_out, "nothing to leave out"
    return "\n".join(line for number, line in enumerate(text.splitlines()) if number not in left_out)


def leave_out(pattern: str, which: slice = slice(None)) -> Callable[[str], str]:
    """Of the instructions that match, `which`."""
    return lambda text: without(text, lines_with(text, pattern)[which])


def leave_out_barrier(before: str, after: str) -> Callable[[str], str]:
    """The last barrier before the first instruction that matches `before` after one that matches `after`."""

    def change(text: str) -> str:
        begin = lines_with(text, after)[0]
        end = next(number for number in lines_with(text, before) if number > begin)
        return without(text, [max(number for number in lines_with(text, r"bar\.sync") if number < end)])

    return change


def rewrite(pattern: str, into: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        text, times = re.subn(pattern, into, text)
        assert times, f"no {pattern} to rewrite"
        return text

    return change


def _poll_once(text: str) -> str:
    """The loads of the exchange before the loop, none in it."""
    lines = text.splitlines()
    loads = lines_with(text, POLL)
    again = lines.index("AGAIN:")
    return "\n".join([*lines[:again], *lines[again + 1 : loads[-1] + 1], "AGAIN:", *lines[loads[-1] + 1 :]])


def _stale_word(text: str) -> str:
    """Each step publishes what the step before it should have."""
    old = EXCHANGE.search(text)
    assert old, "no store of the exchange"
    kept = f"{old[1]}%stale0{old[3]}\n\tmov.b32 %stale0, {old[2]};"
    text = text.replace(old[0], kept)
    return text.replace(".reg .pred", ".reg .b32 %stale<1>;\n\t.reg .pred", 1)


PERSISTENT = Layer("persistent", "lstm", "float16", inference=False)
GRU = PERSISTENT._replace(cell="gru")
STEP = Layer("step", "lstm", "float16", inference=False)
ONE = Layer("one_program", "lstm", "float16", rows=8, inference=False)
DIRECTIONS = GroupOfLayers("one_program", "directions")
STACK = GroupOfLayers("persistent", "layers")
FORWARD, BACKWARD = "persistent_forward_kernel", "persistent_backward_kernel"
STEP_FORWARD, STEP_BACKWARD = "forward_step_kernel", "backward_step_kernel"
ONE_FORWARD, ONE_BACKWARD = "one_program_forward_kernel", "one_program_backward_kernel"

AFTER_SUMS = leave_out_barrier(before=r"ld\.shared", after="mma")
BEFORE_SUMS = leave_out_barrier(before=r"st\.shared", after="mma")
AFTER_COPY = leave_out_barrier(before="ldmatrix", after=r"cp\.async\.wait")
BEFORE_STATE, AFTER_STATE = (leave_out(r"bar\.sync", which) for which in (slice(-2, -1), slice(-1, None)))
# of A the first and the third, two halves of the summed axis; the second would be other rows, which may be copies
OPERANDS = rewrite(r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+), (%r\d+)", r"\1\4, \3, \2")

FIRST_WEIGHTS = rewrite(rf", {4 * DIRECTIONS.H**2 * 2}\b", ", 0")  # a member's weights lie so many bytes from those before
FIRST_MEMBER = rewrite(r"mov\.u32(\s+%r\d+), %ctaid\.z", r"mov.u32\1, 0")
NEVER_STORED = leave_out(r"st\.(global\.cg|relaxed\.gpu\.global)\.b32 \[ ")


def _without_an_end(text: str) -> str:
    """A word is never stored, and polls do not look at the clock."""
    return rewrite(r"mov\.u32 r, %globaltimer_hi", "mov.u32 r, 0")(NEVER_STORED(text))


MISTAKES = (
    Mistake("no barrier between sums and their reading", PERSISTENT, FORWARD, AFTER_SUMS, EARLY),
    Mistake("no barrier before sums overwrite an operand", PERSISTENT, FORWARD, BEFORE_SUMS, EARLY),
    Mistake("no barrier between sums and their reading, backward", PERSISTENT, BACKWARD, AFTER_SUMS, EARLY),
    Mistake("no barrier between the wait for a copy and its reading", STEP, STEP_FORWARD, AFTER_COPY, EARLY),
    Mistake("no bar.warp.sync", STEP, STEP_FORWARD, leave_out(r"bar\.warp\.sync", slice(1, 2)), EARLY),
    Mistake("no wait for cp.async", STEP, STEP_FORWARD, leave_out(r"cp\.async\.wait_group"), EARLY),
    Mistake("a poll hoisted out of its loop", PERSISTENT, FORWARD, _poll_once, ("numbers",)),
    Mistake("a poll hoisted out of its loop, backward", GRU, BACKWARD, _poll_once, ("numbers",)),
    Mistake("a poll that does not look again", PERSISTENT, FORWARD, rewrite("@!q bra.uni DONE", "bra.uni DONE"), ("numbers",)),
    Mistake("a poll by weak loads", PERSISTENT, FORWARD, rewrite(POLL, "ld.global.v"), ("Race",)),
    Mistake("a poll without an end", PERSISTENT, FORWARD, _without_an_end, ("Deadlock",)),
    Mistake("a stale word: that of the step before is stored", PERSISTENT, FORWARD, _stale_word, ("numbers",)),
    Mistake("a word that is never stored", PERSISTENT, FORWARD, NEVER_STORED, ("numbers",)),
    Mistake("two operand registers of mma swapped", PERSISTENT, FORWARD, OPERANDS, ("numbers",)),
    Mistake("two operand registers of mma swapped, backward", PERSISTENT, BACKWARD, OPERANDS, ("numbers",)),
    Mistake("two operand registers of mma swapped, step kernel", STEP, STEP_FORWARD, OPERANDS, ("numbers",)),
    Mistake("no barrier before h overwrites the one before", ONE, ONE_FORWARD, BEFORE_STATE, EARLY),
    Mistake("no barrier between h and its reading", ONE, ONE_FORWARD, AFTER_STATE, EARLY),
    Mistake("no barrier before sums overwrite those before", ONE, ONE_BACKWARD, BEFORE_STATE, EARLY),
    Mistake("no barrier between sums and their reading, one program", ONE, ONE_BACKWARD, AFTER_STATE, EARLY),
    Mistake("two operand registers of mma swapped, one program", ONE, ONE_FORWARD, OPERANDS, ("numbers",)),
    Mistake("weights of the first member for all, one program", DIRECTIONS, ONE_FORWARD, FIRST_WEIGHTS, ("numbers",)),
    Mistake(
        "weights of the first member for all, one program, backward", DIRECTIONS, ONE_BACKWARD, FIRST_WEIGHTS, ("numbers",)
    ),
    Mistake("weights of the first member for all", STACK, FORWARD, FIRST_WEIGHTS, ("numbers",)),
    Mistake("weights of the first member for all, backward", STACK, BACKWARD, FIRST_WEIGHTS, ("numbers",)),
    Mistake("every program one of the first member", STACK, FORWARD, FIRST_MEMBER, ("numbers", *EARLY)),
    Mistake("weights that are never stored to shared memory", PERSISTENT, FORWARD, leave_out(r"st\.shared", slice(1)), EARLY),
    Mistake("a step's h that is never stored", STEP, STEP_FORWARD, leave_out(r"st\.global", slice(1)), ("Unwritten",)),
    Mistake("stores without their masks", STEP, STEP_FORWARD, rewrite(r"@%p\d+ (st\.global)", r"\1"), ("OutOfBounds", "Race")),
)


def outcome(layer: Layer | GroupOfLayers, kernel: str, change: Callable[[str], str], seed: int) -> str:
    """What notices a changed kernel, and in which words; empty if nothing does."""
    with simulated_gpu(seed, {kernel: change}) as simulation:
        try:
            results = layer.run(backward="backward" in kernel)
        except Fault as fault:
            return f"{type(fault).__name__}: {fault}"
    assert kernel in simulation.ran, f"{kernel} did not run"
    wrong = words(worst(results))
    return f"numbers: {wrong}" if wrong else ""


def noticed(mistake: Mistake) -> tuple[str, int]:
    """What notices a mistake, and after how many schedules."""
    for seed in range(SCHEDULES):
        if found := outcome(mistake.layer, mistake.kernel, mistake.change, seed):
            return found, seed + 1
    return "", SCHEDULES


def barriers(layer: Layer, kernel: str) -> list[str]:
    """What notices each barrier of a kernel left out, in the order of the text."""
    found: list[str] = []
    count = 1
    while len(found) < count:

        def change(text: str, number: int = len(found)) -> str:
            nonlocal count
            count = len(lines_with(text, r"bar\.sync"))
            return leave_out(r"bar\.sync", slice(number, number + 1))(text)

        found.append(next(filter(None, (outcome(layer, kernel, change, seed) for seed in range(SCHEDULES))), ""))
    return found
