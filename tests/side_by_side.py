"""Runs the programs of a grid side by side on a CPU, so that kernels whose programs wait for each other can be tested.

Triton's interpreter runs the programs of a grid one after another. Inside `together` each has a thread, and just one of them
runs at a time: whenever it touches the exchange (a volatile load, or a store of 32-bit integers), a generator with a seed
picks who goes on. So a schedule is a seed, and the same seed gives the same schedule again. A tile is stored and loaded in
two random parts with others in between, because the memory model orders no word with another.

A program that read an EMPTY word goes on only after some program has stored something. When nobody can, that is a hang: it is
noticed at once, without a clock, and raised as `Hang` with each waiting program and its step.
"""

from __future__ import annotations

import inspect
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

EMPTY = -1
_program = threading.local()  # .index of the program that this thread runs, .schedule that it belongs to


class Hang(AssertionError):
    """No program can go on."""


class _Stop(BaseException):
    """Ends a program's thread; not an Exception, which the interpreter would wrap."""


@dataclass(frozen=True)
class Fault:
    """A mistake to plant, which the tests must catch.

    kind: "missing", the program never runs; "skipped store", it does not publish step `step`; "stale read", at step `step` it
    reads the words `back` bytes before those that it should; "unchecked", it does not wait at step `step`, and reads EMPTY as
    zero.
    """

    kind: str
    program: tuple[int, int, int]
    step: int = 0
    back: int = 0


def _step() -> int | None:
    """The time step that the running kernel is at, from its own variable."""
    frame = sys._getframe(1)
    while frame is not None:
        if "steps" in frame.f_locals and "step" in frame.f_locals:
            return int(frame.f_locals["step"])
        frame = frame.f_back
    return None


class _Schedule:
    def __init__(self, indices: list[tuple[int, int, int]], seed: int, fault: Fault | None):
        self.random = random.Random(seed)
        self.fault = fault
        self.turn = {index: threading.Semaphore(0) for index in indices}
        self.alive = list(indices)
        self.waiting: dict[tuple[int, int, int], tuple[int, int | None]] = {}  # program: stores it has seen, its step
        self.stores = 0
        self.error: BaseException | None = None
        self.done = threading.Event()

    def pick(self) -> tuple[int, int, int] | None:
        able = [index for index in self.alive if index not in self.waiting or self.waiting[index][0] < self.stores]
        if able:
            return self.random.choice(able)
        if self.alive and self.error is None:
            who = ", ".join(f"program {index} at step {self.waiting[index][1]}" for index in self.alive)
            self.error = Hang(f"every program waits for another: {who}")
        return None

    def switch(self) -> None:
        """Let another program run, maybe; return when it is this one's turn."""
        own = _program.index
        chosen = self.pick()
        if chosen is None:
            raise _Stop
        if chosen != own:
            self.turn[chosen].release()
            self.turn[own].acquire()
            if self.error is not None:
                raise _Stop
        self.waiting.pop(own, None)

    def leave(self) -> None:
        """This program has ended."""
        self.alive.remove(_program.index)
        if self.error is not None:
            for index in self.alive:
                self.turn[index].release()
        elif self.alive:
            chosen = self.pick()
            for index in self.alive if chosen is None else [chosen]:
                self.turn[index].release()
        if not self.alive:
            self.done.set()

    def hits(self, kind: str, step: int | None) -> bool:
        fault = self.fault
        return fault is not None and fault.kind == kind and fault.program == _program.index and fault.step == step

    def part(self, shape) -> np.ndarray:
        return np.random.default_rng(self.random.getrandbits(32)).random(shape) < self.random.random()


_plain_load = interpreter.InterpreterBuilder.create_masked_load
_plain_store = interpreter.InterpreterBuilder.create_masked_store


def _load(self, ptrs, mask, other, *policies):
    schedule = getattr(_program, "schedule", None)
    is_volatile = policies[-1]
    if schedule is None or not is_volatile:
        return _plain_load(self, ptrs, mask, other, *policies)
    step = _step()
    if schedule.hits("stale read", step):
        ptrs = interpreter.TensorHandle(ptrs.data - np.uint64(schedule.fault.back), ptrs.dtype)
    schedule.switch()
    seen = schedule.stores
    words = _plain_load(self, ptrs, mask, other, *policies)
    schedule.switch()
    later = _plain_load(self, ptrs, mask, other, *policies)
    words.data = np.where(schedule.part(words.data.shape), words.data, later.data)
    if schedule.hits("unchecked", step):
        words.data = np.where(words.data == EMPTY, 0, words.data).astype(np.int32)
    if (words.data == EMPTY).any():
        schedule.waiting[_program.index] = (seen, step)
    return words


def _store(self, ptrs, value, mask, *policies):
    schedule = getattr(_program, "schedule", None)
    if schedule is None or value.data.dtype != np.int32:
        return _plain_store(self, ptrs, value, mask, *policies)
    if schedule.hits("skipped store", _step()):
        return None
    schedule.switch()
    first = schedule.part(mask.data.shape)
    _plain_store(self, ptrs, value, interpreter.TensorHandle(mask.data & first, mask.dtype), *policies)
    schedule.stores += 1
    schedule.switch()
    _plain_store(self, ptrs, value, interpreter.TensorHandle(mask.data & ~first, mask.dtype), *policies)
    schedule.stores += 1
    return None


@contextmanager
def together(seed: int, fault: Fault | None = None) -> Iterator[None]:
    """Kernels launched inside run all their programs side by side, in the order that `seed` gives."""

    def run(self, *args, **kwargs):
        spec = inspect.getfullargspec(self.fn)
        kwargs = {name: value for name, value in kwargs.items() if name in spec.args or name in spec.kwonlyargs}
        args, kwargs = self._init_args_hst(args, kwargs)  # CPU tensors: these share their memory
        bound = inspect.getcallargs(self.fn, *args, **kwargs)
        bound = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in bound.items()}
        grid = (*self.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        indices = [index for index in np.ndindex(*grid) if fault is None or (fault.kind, fault.program) != ("missing", index)]
        schedule = _Schedule(indices, seed, fault)

        def program(index):
            _program.index, _program.schedule = index, schedule
            schedule.turn[index].acquire()
            try:
                if schedule.error is None:
                    interpreter.interpreter_builder.set_grid_idx(*index)
                    self.fn(**bound)
            except _Stop:
                pass
            except BaseException as error:
                schedule.error = schedule.error or error
            finally:
                schedule.leave()

        threads = [threading.Thread(target=program, args=(index,), daemon=True) for index in indices]
        for thread in threads:
            thread.start()
        schedule.turn[schedule.pick()].release()
        schedule.done.wait()
        for thread in threads:
            thread.join()
        if schedule.error is not None:
            raise schedule.error

    def patched(self, *args, **kwargs):
        scope = patch_lang(self.fn)
        # a device function patches its own modules at every call, and for good: once is enough
        patched_modules = set()

        def patch_once(fn):
            modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
            if modules not in patched_modules:
                patched_modules.add(modules)
                patch_lang(fn)

        interpreter._patch_lang = patch_once
        try:
            run(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch_lang
            scope.restore()

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    patch_lang, serial = interpreter._patch_lang, executor.__call__
    index = property(lambda self: getattr(_program, "index", None), lambda self, value: setattr(_program, "index", value))
    builder.grid_idx, builder.create_masked_load, builder.create_masked_store = index, _load, _store
    executor.__call__ = patched
    try:
        yield
    finally:
        executor.__call__ = serial
        builder.create_masked_load, builder.create_masked_store = _plain_load, _plain_store
        del builder.grid_idx
        interpreter.interpreter_builder.grid_idx = None
