"""Mistakes to plant in a kernel's PTX, each a change of its text, and what must notice it.

All are made in kernels that are right without. Who notices:

- a fault of `tests.ptx.memory`: "Race", "Unwritten", "OutOfBounds", "Deadlock";
- "numbers": a result outside of the numerics contract.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from tests.ptx.layer import Layer, run
from tests.ptx.memory import Fault

ORDER = ("Race", "Unwritten")  # a read that comes too early may find what nobody has written
SCHEDULES = 5  # seeds to try; a mistake that only some orders show must show in one of these
EXCHANGE = re.compile(r"(st\.global\.cg\.b32 \[ %rd\d+ \+ \d+ \], \{ )(%r\d+)( \};)")


class Mistake(NamedTuple):
    """A change of `kernel`, seen on `layer`; noticed by one of `by`."""

    name: str
    layer: Layer
    kernel: str
    change: Callable[[str], str]
    by: tuple[str, ...]


def lines_with(text: str, pattern: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines()) if re.search(pattern, line.partition("//")[0])]


def without(text: str, pattern: str, chosen: Callable[[list[int]], list[int]] = lambda found: found) -> str:
    """The text without the instructions that match, or without the chosen ones of these lines."""
    found = lines_with(text, pattern)
    left_out = set(chosen(found))
    assert left_out, f"no {pattern} to leave out"
    return "\n".join(line for number, line in enumerate(text.splitlines()) if number not in left_out)


def changed(text: str, pattern: str, into: str, count: int = 0) -> str:
    text, times = re.subn(pattern, into, text, count=count)
    assert times, f"no {pattern} to change"
    return text


def without_barrier(number: int) -> Callable[[str], str]:
    return lambda text: without(text, r"bar\.sync", lambda found: [found[number]])


def _poll_once(text: str) -> str:
    """The loads of the exchange before the loop, none in it: no code from the loop's test to its jump back."""
    loads = lines_with(text, r"ld\.volatile")
    again = loads[len(loads) // 2]
    test = max(number for number in lines_with(text, r"\bbra\b") if number < again)
    return without(text, "", lambda found: [number for number in found if test < number <= loads[-1]])


def _poll_unchecked(text: str) -> str:
    """What the first try loaded is taken, whatever it is: nothing jumps back to load again."""
    last = lines_with(text, r"ld\.volatile")[-1]
    return without(text, r"\bbra\.uni", lambda found: [min(number for number in found if number > last)])


def _stale_word(text: str) -> str:
    """Each step publishes what the step before it should have."""
    old = EXCHANGE.search(text)
    assert old, "no store of the exchange"
    kept = f"{old[1]}%stale0{old[3]}\n\tmov.b32 %stale0, {old[2]};"
    text = text.replace(old[0], kept)
    return text.replace(".reg .pred", ".reg .b32 %stale<1>;\n\t.reg .pred", 1)


def _mma_operand(text: str) -> str:
    """The first two registers of A changed places, in one instruction."""
    return changed(text, r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", count=1)


PERSISTENT = Layer("persistent", "lstm", "float16")
STEP = Layer("step", "lstm", "float16")
FORWARD, BACKWARD = "persistent_forward_kernel", "persistent_backward_kernel"

MISTAKES = (
    Mistake("a barrier less: between the products' sums and their reading", PERSISTENT, FORWARD, without_barrier(3), ORDER),
    Mistake("a barrier less: before the next step's sums overwrite", PERSISTENT, FORWARD, without_barrier(2), ORDER),
    Mistake("a barrier less, backward", PERSISTENT, BACKWARD, without_barrier(2), ORDER),
    Mistake("a poll hoisted: loaded once, before its loop", PERSISTENT, FORWARD, _poll_once, ("Deadlock",)),
    Mistake("a poll that does not look again", PERSISTENT, FORWARD, _poll_unchecked, ("numbers",)),
    Mistake("a poll hoisted, backward", PERSISTENT, BACKWARD, _poll_once, ("Deadlock",)),
    Mistake("a stale word: the step before's is stored", PERSISTENT, FORWARD, _stale_word, ("numbers",)),
    Mistake("a word that is never stored", PERSISTENT, FORWARD, lambda text: without(text, r"st\.global\.cg"), ("Deadlock",)),
    Mistake(
        "the exchange loaded weakly",
        PERSISTENT,
        FORWARD,
        lambda text: changed(text, r"ld\.volatile\.global", "ld.global"),
        ("Race",),
    ),
    Mistake("a wrong operand register of mma", PERSISTENT, FORWARD, _mma_operand, ("numbers",)),
    Mistake("a wrong operand register of mma, step kernel", STEP, "forward_step_kernel", _mma_operand, ("numbers",)),
    Mistake(
        "a cp.async without its wait",
        STEP,
        "forward_step_kernel",
        lambda text: without(text, r"cp\.async\.wait_group"),
        ("Race",),
    ),
    Mistake("a barrier less, step kernel", STEP, "forward_step_kernel", without_barrier(0), ORDER),
    Mistake(
        "a bar.warp.sync less, step kernel",
        STEP,
        "forward_step_kernel",
        lambda text: without(text, r"bar\.warp\.sync", lambda found: found[1:2]),
        ("Race",),
    ),
    Mistake(
        "shared memory read and never written",
        PERSISTENT,
        FORWARD,
        lambda text: without(text, r"st\.shared", lambda found: found[:1]),
        ("Unwritten",),
    ),
    Mistake(
        "a store without its mask",
        STEP,
        "forward_step_kernel",
        lambda text: changed(text, r"@%p\d+ (st\.global)", r"\1"),
        ("OutOfBounds", "Race"),
    ),
)


def outcome(layer: Layer, kernel: str, change: Callable[[str], str], seed: int) -> str:
    """What notices a changed kernel, and in which words; empty if nothing does."""
    from tests.ptx.gpu import simulated_gpu

    with simulated_gpu(seed, {kernel: change}) as simulation:
        try:
            results = run(layer, inference=False, backward="backward" in kernel)
        except Fault as fault:
            return f"{type(fault).__name__}: {fault}"
    assert kernel in simulation.ran, f"{kernel} did not run"
    wrong = [result for result in results if not result.ok]
    return f"numbers: {wrong[0].tensor} has an error of {wrong[0].error:.1e}, {wrong[0].allowed:.1e} allowed" if wrong else ""


def noticed(mistake: Mistake) -> tuple[str, int]:
    """What notices a mistake, and after how many schedules."""
    for seed in range(SCHEDULES):
        if words := outcome(mistake.layer, mistake.kernel, mistake.change, seed):
            return words, seed + 1
    return "", SCHEDULES


def barriers(layer: Layer, kernel: str) -> list[str]:
    """What notices each barrier of a kernel left out, in the order of the text."""
    found: list[str] = []
    count = 1
    while len(found) < count:

        def change(text: str, number: int = len(found)) -> str:
            nonlocal count
            count = len(lines_with(text, r"bar\.sync"))
            return without_barrier(number)(text)

        found.append(next(filter(None, (outcome(layer, kernel, change, seed) for seed in range(SCHEDULES))), ""))
    return found
