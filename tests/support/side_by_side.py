"""Runs the programs of a grid side by side on a CPU, so that kernels whose programs wait for each other can be tested.

Triton's interpreter runs the programs of a grid one after another. Inside `together` each has a thread, and just one of them
runs at a time: at every access of the exchange a generator with a seed picks who goes on, some programs seldom and some often.
So a schedule is a seed, and the same seed gives the same schedule again.

Memory between the programs is as weak as a GPU's may be where nothing orders one word with another:

- A store with ".cg" is seen by its program at once, and by the others word by word at random moments, in any order, perhaps
  only after its program has ended.
- Any other store is seen, by its own program too, after that program's next release (an atomic operation with sem="release"),
  or else when the launch has ended.
- A volatile load reads a random part of its words now and the rest later, with others in between.

A program that polls, that is repeats a load of the exchange, goes on only after some word that it polls has come. When nobody
can go on, `Run.stuck` says who waits, and all poll in vain until they give up. If they do not, that is a hang (`VAIN_TURNS`).
Programs that go on for ever are noticed by their accesses (`MOST_TURNS`, `MOST_LOADS`), and one that does not even load by a
clock (`PATIENCE`). Each is raised as `Hang` with the programs and their steps.
"""

from __future__ import annotations

import ctypes
import inspect
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from rnnfast.kernels.persistent import give_up

EMPTY = -1  # of rnnfast.kernels.persistent.exchange, as is the other
NOT_A_NUMBER = 0x7FFF7FFF
VAIN_TURNS = 200  # of a program since a word has become visible; a poll gives up after fewer
MOST_TURNS = 10_000  # of a program in a launch; the tests' programs take some dozens
MOST_LOADS = 10_000  # plain loads of a program in one turn
PATIENCE = 120.0  # seconds of one turn; the tests' turns take milliseconds

Index = tuple[int, int, int]
_program = threading.local()  # .index of the program that this thread runs, .schedule that it belongs to


class Hang(AssertionError):
    """No program can go on, or one goes on for ever."""


class _Stop(BaseException):
    """Ends a program's thread; not an Exception, which the interpreter would wrap."""


@dataclass(frozen=True)
class Fault:
    """A mistake to plant in one program, which the tests must catch.

    kind: "missing", the program never runs. The others at step `step`. "skipped store": it publishes nothing; "skipped word":
    all but one word; "torn store": each word in two halves, one before the other; "misplaced store": `back` bytes before the
    right place; "weak store": without ".cg"; "empty value": EMPTY where a result has the bits of EMPTY. "stale read": it reads
    the words `back` bytes before those that it should; "unchecked": it does not wait, and reads EMPTY as zero.
    within: the kernel's function that makes the mistake, if not each of them.
    """

    kind: str
    program: Index
    step: int = 0
    back: int = 0
    within: str | None = None


@dataclass
class Run:
    """What happened inside `together`: the kernel and grid of each launch, how often another program went on, how many words
    became visible only after their program had gone on; who waited when first nobody could go on; and which launch gave up."""

    grids: list[tuple[str, Index]] = field(default_factory=list)
    switches: int = 0
    late_words: int = 0
    stuck: str = ""
    gave_up: str = ""


def _step(frame) -> int | None:
    """The time step of the kernel that runs in `frame`."""
    while frame is not None and not {"step", "steps"} <= frame.f_locals.keys():
        frame = frame.f_back
    return None if frame is None else int(frame.f_locals["step"])


def _is_within(frame, function: str) -> bool:
    return frame is not None and (frame.f_code.co_name == function or _is_within(frame.f_back, function))


class _Schedule:
    """One launch."""

    def __init__(self, indices: list[Index], seed: str, fault: Fault | None, run: Run):
        self.random = random.Random(seed)
        self.numpy = np.random.default_rng(self.random.getrandbits(64))
        self.fault, self.run = fault, run
        self.turn = {index: threading.Lock() for index in indices}  # held, until it is the program's turn
        for lock in self.turn.values():
            lock.acquire()
        # some programs are slow, and some are slow to be seen
        self.pace, self.haste = ({index: self.random.random() ** 3 + 1e-3 for index in indices} for _ in range(2))
        self.alive = list(indices)
        self.words: dict[Index, list] = {index: [] for index in indices}  # (addresses, values) that others do not see yet
        self.plain: dict[Index, list] = {index: [] for index in indices}  # (addresses, values, mask), neither
        self.news = dict.fromkeys(indices, 0)  # how often words that the program polls have become visible
        self.polled: dict[tuple, tuple[int, int]] = {}  # (program, load): the program's news and learnt when it was last made
        self.learnt = dict.fromkeys(indices, 0)  # how many of the program's loads may have found what they did not before
        self.span: dict[Index, tuple[int, int]] = {}  # program: the addresses that it has polled since it last waited
        self.missing: dict[Index, list[np.ndarray]] = {}  # program: where it found EMPTY since it last waited
        self.looked: dict[Index, tuple[int, bool]] = {}  # program: its news when `missing` was last looked at, whether to go on
        self.waiting: dict[Index, tuple[int, int | None]] = {}  # program: its news when it began to wait, its step
        self.turns = dict.fromkeys(indices, 0)
        self.vain = 0  # turns since a word has become visible, while nobody could go on
        self.loads = 0  # plain ones in this turn
        self.running: Index | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def announce(self, addresses: np.ndarray) -> None:
        """What lies there has changed."""
        self.vain = 0
        first, last = int(addresses.min()), int(addresses.max())
        for index, (begin, end) in self.span.items():
            self.news[index] += first <= end and begin <= last

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """These words become visible."""
        interpreter._interpreter.store(addresses, values, np.ones(len(addresses), bool))
        self.announce(addresses)

    def show(self, index: Index) -> None:
        """Some words that the program has stored become visible, at least one: of each store all, none or a part."""
        kept, sure = [], self.random.randrange(len(self.words[index]))
        for i, (addresses, values) in enumerate(self.words[index]):
            now = self.numpy.random(len(addresses)) < self.random.choice((0, self.random.random(), 1))
            now[self.random.randrange(len(now))] |= i == sure
            if now.any():
                self.write(addresses[now], values[now])
            if not now.all():
                kept.append((addresses[~now], values[~now]))
            self.run.late_words += int(now.sum())
        self.words[index] = kept

    def release(self, index: Index) -> None:
        """All that the program has stored becomes visible."""
        for addresses, values, mask in self.plain[index]:
            interpreter._interpreter.store(addresses, values, mask)
        for addresses, values in self.words[index]:
            self.write(addresses, values)
        self.plain[index], self.words[index] = [], []

    def able(self, eager: bool = False) -> list[Index]:
        """Who may go on. Who waits needs news; unless `eager`, as a rule only once no word is EMPTY that it found so: a poll
        in vain leaves no trace, so a few are enough."""
        return [index for index in self.alive if index not in self.waiting or self.has_news(index, eager)]

    def has_news(self, index: Index, eager: bool) -> bool:
        news = self.news[index]
        if eager or news == self.waiting[index][0]:
            return news > self.waiting[index][0]
        if self.looked.get(index, (-1, False))[0] != news:
            missing = np.concatenate(self.missing[index])
            everywhere, other = np.ones(len(missing), bool), np.zeros(len(missing), np.int32)
            words = interpreter._interpreter.load(missing, everywhere, other, other.dtype)
            self.looked[index] = news, not (words == EMPTY).any() or self.random.random() < 0.02
        return self.looked[index][1]

    def pick(self) -> Index | None:
        """Who goes on; None if nobody ever can. Words become visible meanwhile."""
        unseen = [index for index, words in self.words.items() if words]
        if unseen:
            index = self.random.choice(unseen)
            if self.random.random() < self.haste[index]:
                self.show(index)
        while not (able := self.able()):
            unseen = [index for index, words in self.words.items() if words]
            if unseen:
                self.show(self.random.choice(unseen))
            elif not (able := self.able(eager=True)):
                who = ", ".join(f"program {index} at step {self.waiting[index][1]}" for index in self.alive)
                stuck = f"every program waits for another: {who}"
                self.run.stuck, self.vain = self.run.stuck or stuck, self.vain + 1
                if self.vain > VAIN_TURNS * len(self.alive):
                    self.fail(Hang(stuck))
                    return None
                able = self.alive
            if able:
                break
        chosen = self.random.choices(able, [self.pace[index] for index in able])[0]
        self.turns[chosen] += 1
        if self.turns[chosen] > MOST_TURNS:
            self.fail(Hang(f"program {chosen} has had {MOST_TURNS} turns and has not ended"))
            return None
        self.run.switches += chosen != self.running
        self.running, self.loads = chosen, 0
        return chosen

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error

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
        chosen = self.pick() if self.alive and self.error is None else None
        for index in self.alive if chosen is None else [chosen]:
            if self.turn[index].locked():
                self.turn[index].release()
        if not self.alive:
            self.done.set()

    def wait_for_news(self, addresses: np.ndarray) -> None:
        """Before a load of the exchange: if the program has made it before, and no load since can have found anything new, it
        goes on only after some word that it polls has come."""
        self.switch()
        own, first = _program.index, int(addresses.min())
        load = (own, first, addresses.shape)
        news, learnt = self.polled.get(load, (-1, -1))
        if (news, learnt) == (self.news[own], self.learnt[own]):
            self.waiting[own] = (news, _step(sys._getframe()))
            self.switch()
            del self.span[own], self.missing[own]
        self.learnt[own] += news < self.news[own]
        self.polled[load] = self.news[own], self.learnt[own]
        begin, end = self.span.get(own, (first, first))
        self.span[own] = min(begin, first), max(end, int(addresses.max()))
        self.missing.setdefault(own, [np.empty(0, np.uint64)])

    def hits(self, *kinds: str) -> str | None:
        """The kind of the planted fault, if it is one of `kinds` and its time has come."""
        fault = self.fault
        if fault is None or fault.kind not in kinds or fault.program != _program.index:
            return None
        frame = sys._getframe()
        return fault.kind if fault.step == _step(frame) and _is_within(frame, fault.within or "hits") else None

    def with_own(self, addresses: np.ndarray, data: np.ndarray) -> np.ndarray:
        """`data` loaded from `addresses`, and over it the words that the running program has stored itself."""
        for own, values in self.words[_program.index]:
            order = np.argsort(own)
            place = np.minimum(np.searchsorted(own, addresses, sorter=order), len(own) - 1)
            data = np.where(own[order][place] == addresses, values[order][place], data)
        return data

    def load(self, ptrs, mask, other, policies):
        """A volatile load."""
        self.wait_for_news(ptrs.data)
        if self.hits("stale read"):
            ptrs = interpreter.TensorHandle(ptrs.data - np.uint64(self.fault.back % 2**64), ptrs.dtype)
        loaded = _plain_load(interpreter.interpreter_builder, ptrs, mask, other, *policies)
        early = self.with_own(ptrs.data, loaded.data)
        self.switch()
        late = _plain_load(interpreter.interpreter_builder, ptrs, mask, other, *policies).data
        part = self.numpy.random(late.shape) < self.random.random()
        loaded.data = np.where(mask.data, np.where(part, early, self.with_own(ptrs.data, late)), late)
        self.missing[_program.index].append(ptrs.data[loaded.data == EMPTY])
        if self.hits("unchecked"):
            loaded.data = np.where(loaded.data == EMPTY, 0, loaded.data).astype(loaded.data.dtype)
        return loaded

    def store(self, ptrs, value, mask):
        """A store with ".cg"."""
        if not mask.data.any():
            return
        self.switch()
        addresses, words = ptrs.data[mask.data], np.broadcast_to(value.data, ptrs.data.shape)[mask.data]
        kind = self.hits("skipped store", "skipped word", "torn store", "misplaced store", "weak store", "empty value")
        if _is_within(sys._getframe(), "_interpreted_poll"):
            kind = None  # the word of a program that gives up
        if kind == "skipped store":
            return
        if kind == "weak store":
            self.plain[_program.index].append((ptrs.data, value.data, mask.data))
            return
        if kind == "skipped word":
            addresses, words = addresses[1:], words[1:]
        elif kind == "misplaced store":
            addresses = addresses - np.uint64(self.fault.back % 2**64)
        elif kind == "empty value":
            words = np.where(words == NOT_A_NUMBER, EMPTY, words).astype(words.dtype)
        elif kind == "torn store":
            self.write(addresses, words | EMPTY << 16)
        if len(words):
            self.words[_program.index].append((addresses, words))


RELEASES = tl.core.ir.MEM_SEMANTIC.RELEASE, tl.core.ir.MEM_SEMANTIC.ACQUIRE_RELEASE
_builder = interpreter.InterpreterBuilder
_plain_load, _plain_store, _plain_rmw = _builder.create_masked_load, _builder.create_masked_store, _builder.create_atomic_rmw


def _load(self, ptrs, mask, other, *policies, **named):
    """The last policy says whether it is volatile; policies by name come from TMA descriptors, which are not."""
    schedule = getattr(_program, "schedule", None)
    if schedule is not None and policies and policies[-1] and mask.data.any():
        return schedule.load(ptrs, mask, other, policies)
    if schedule is not None:
        schedule.loads += 1
        if schedule.loads > MOST_LOADS:
            step = _step(sys._getframe())
            schedule.fail(Hang(f"program {_program.index} at step {step} loads for ever and lets no other run"))
            raise _Stop
    return _plain_load(self, ptrs, mask, other, *policies, **named)


def _store(self, ptrs, value, mask, *policies):
    schedule = getattr(_program, "schedule", None)
    if schedule is None:
        _plain_store(self, ptrs, value, mask, *policies)
    elif policies[0] in ("cg", tl.core.ir.CACHE_MODIFIER.CG):  # as Triton 3.9 and 3.6 say it
        schedule.store(ptrs, value, mask)
    else:
        schedule.plain[_program.index].append((ptrs.data, value.data, mask.data))


def _store_all(self, ptr, value, *policies):
    """Triton 3.6 forgets the policies of a store without a mask."""
    self.create_masked_store(ptr, value, interpreter.TensorHandle(np.ones_like(ptr.data, bool), tl.int1), *policies)


def _atomic_store(self, ptr, value, mask, sem, scope):
    """Triton 3.9's; a release orders what came before it, and the word itself becomes visible later."""
    if sem in RELEASES:
        _program.schedule.release(_program.index)
    _program.schedule.store(ptr, value, mask)


def _atomic_rmw(self, operation, ptr, value, mask, sem, scope):
    """Takes place at once, in the memory that all see."""
    schedule = _program.schedule
    if sem in RELEASES:
        schedule.switch()
        schedule.release(_program.index)
        schedule.announce(ptr.data)
    else:
        schedule.wait_for_news(ptr.data)
    return _plain_rmw(self, operation, ptr, value, mask, sem, scope)


def _launch(executor, args, kwargs, seed: str, fault: Fault | None, run: Run) -> None:
    spec = inspect.getfullargspec(executor.fn)
    kwargs = {name: value for name, value in kwargs.items() if name in spec.args or name in spec.kwonlyargs}
    args, kwargs = executor._init_args_hst(args, kwargs)  # CPU tensors: these share their memory
    bound = inspect.getcallargs(executor.fn, *args, **kwargs)
    bound = {n: v if n in executor.constexprs else interpreter._implicit_cvt(v) for n, v in bound.items()}
    grid = (*executor.grid, 1, 1)[:3]
    run.grids.append((executor.fn.__name__, grid))
    interpreter.interpreter_builder.set_grid_dim(*grid)
    indices = [index for index in np.ndindex(*grid) if fault is None or (fault.kind, fault.program) != ("missing", index)]
    schedule = _Schedule(indices, seed, fault, run)

    def program(index):
        _program.index, _program.schedule = index, schedule
        schedule.turn[index].acquire()
        try:
            if schedule.error is None:
                interpreter.interpreter_builder.set_grid_idx(*index)
                with np.errstate(all="ignore"):  # what the launch has set holds for its own thread
                    executor.fn(**bound)
        except _Stop:
            pass
        except BaseException as error:
            schedule.fail(error)
        finally:
            schedule.leave()

    threads = {index: threading.Thread(target=program, args=(index,), daemon=True) for index in indices}
    for thread in threads.values():
        thread.start()
    schedule.turn[schedule.pick()].release()
    turns = None
    while not schedule.done.wait(PATIENCE):
        now = schedule.running, sum(schedule.turns.values())
        if now == turns:
            thread = threads[schedule.running]
            step = _step(sys._current_frames()[thread.ident])
            schedule.fail(Hang(f"program {schedule.running} at step {step} has not let another run for {PATIENCE} seconds"))
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
            schedule.done.wait(PATIENCE)  # in vain if it is stuck outside of Python; then it is left behind
            break
        turns = now
    if schedule.error is not None:
        raise schedule.error
    for index in indices:
        schedule.release(index)


@contextmanager
def together(seed: int, fault: Fault | None = None) -> Iterator[Run]:
    """Kernels launched inside run all their programs side by side, in the order that `seed` gives."""
    result = Run()
    # the interpreter patches the language at every call of a function, which takes longer than many functions: once is enough
    scopes: dict = {}

    def patch_once(fn):
        if fn not in scopes:
            scopes[fn] = patch_lang(fn)

    def launch(self, *args, **kwargs):
        patch_once(self.fn)
        _launch(self, args, kwargs, f"{seed}/{len(result.grids)}", fault, result)

    patch_lang = interpreter._patch_lang
    index = property(lambda self: getattr(_program, "index", None), lambda self, value: setattr(_program, "index", value))
    patches = [
        (interpreter, "_patch_lang", patch_once),
        (interpreter.GridExecutor, "__call__", launch),
        (_builder, "grid_idx", index),
        (_builder, "create_masked_load", _load),
        (_builder, "create_masked_store", _store),
        (_builder, "create_store", _store_all),
        (_builder, "create_atomic_store", _atomic_store),
        (_builder, "create_atomic_rmw", _atomic_rmw),
        # Triton 3.9 asks for both policies of an access in one, and its own interpreter forgets them
        (_builder, "get_cache_policy", lambda self, cache, eviction: cache),
        (give_up, "_words", {}),  # as in a process of its own
    ]
    own = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield result
    finally:
        result.gave_up = give_up.gave_up(torch.device("cpu"))
        for owner, name, value in own:
            delattr(owner, name) if value is None else setattr(owner, name, value)
        for scope in reversed(scopes.values()):
            scope.restore()
        interpreter.interpreter_builder.grid_idx = None
