"""Helpers of the examples: text, progress, Ctrl-C, safe files, options and their errors."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BITS = 1 / math.log(2)  # bits per nat


class UserError(Exception):
    """An error that the user can correct. Its message is one line, and the program exits with code 2."""


@dataclass
class Corpus:
    vocabulary: str
    train: Tensor
    heldout: Tensor
    digest: str


def python_prose() -> str:
    """The topics of Python's `help()`. Each paragraph appears once, so none is both held out and trained on."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data: give a text with --text FILE") from None
    paragraphs = (paragraph.strip("\n") for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def read_corpus(config) -> Corpus:
    """Read the text and split it. The last tenth is held out."""
    try:
        text = python_prose() if config.text is None else Path(config.text).read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the text {config.text}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{config.text} is not UTF-8 text") from None
    if "\0" in text:
        raise UserError(f"{config.text} is a binary file, not text")
    needed = max(20, (config.batch * config.length + 1) * 10 // 9)
    if len(text) < needed:
        sizes = f"--batch {config.batch} --length {config.length}"
        raise UserError(f"the text has {len(text)} characters; {sizes} need at least {needed} characters")
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([index[character] for character in text])
    split = len(text) - len(text) // 10
    return Corpus(vocabulary, tokens[:split], tokens[split:], hashlib.sha256(text.encode()).hexdigest())


def streams(tokens: Tensor, batch: int) -> Tensor:
    """Cut the text into `batch` contiguous streams, (time, batch). The last character of each is the first of the next one."""
    steps = (len(tokens) - 1) // batch
    return torch.stack([tokens[i * steps : (i + 1) * steps + 1] for i in range(batch)], dim=1)


class Workers:
    """The processes that torchrun started, or this process alone. Each has an equal share of every batch."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group()

    def parallel(self, model: torch.nn.Module) -> torch.nn.Module:
        """`model`, with its gradients averaged over all processes."""
        return torch.nn.parallel.DistributedDataParallel(model) if self.count > 1 else model

    def share(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.count, dim)[self.rank].contiguous()

    def join(self, tensor: Tensor, dim: int) -> Tensor:
        """The inverse of `share`: the shares of all processes joined along `dim`."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary file beside `path`, then rename it, so that a reader finds either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or 'is the disk full?'}") from None
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """Progress of a run: a bar on one line of a terminal, or twenty lines elsewhere."""

    def __init__(self, run) -> None:
        self.run, self.shown, self.time, self.terminal = run, run.step, time.perf_counter(), sys.stdout.isatty()

    def update(self) -> None:
        run, config, seconds = self.run, self.run.config, time.perf_counter() - self.time
        due = seconds > 0.2 if self.terminal else run.step % max(1, config.steps // 20) == 0
        if not due and run.step < config.steps:
            return
        speed = (run.step - self.shown) * config.batch * config.length / seconds
        loss = statistics.fmean(run.losses[-50:])
        line = f"step {run.step}/{config.steps}  loss {loss:.3f}, {loss * BITS:.3f} bits/character, {speed:,.0f} characters/s"
        if self.terminal:
            columns = shutil.get_terminal_size().columns - 1
            width = min(max(columns - len(line) - 3, 4), 40)
            line = f"[{'#' * (width * run.step // config.steps):.<{width}}] {line}"[:columns]
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal else "\n", flush=True)
        self.shown, self.time = run.step, time.perf_counter()

    def message(self, text: str) -> None:
        print(f"\n{text}" if self.terminal else text, flush=True)
        self.time = time.perf_counter()


@contextlib.contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the current step is finished. A second Ctrl-C interrupts at once."""
    asked = threading.Event()

    def handler(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def prepare_folder(folder: Path) -> None:
    """Make `folder`. Raises `UserError` if files cannot be written there, before time is spent on training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def positive(kind: type) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = "number"
    return parse


def usable_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device that this PyTorch can use here") from None
    return device


def example_parser(doc: str, prog: str, steps: int, out: str) -> Parser:
    """A parser with the options that the small examples share."""
    parser = Parser(description=doc.split("\n")[0], prog=prog)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=positive(int), default=steps, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", type=usable_device, default=cuda, help="(default here: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help="(default: %(default)s)")
    return parser


def pyplot_for(picture: Path):
    """matplotlib.pyplot for drawing into files. Without matplotlib, print that `picture` is not drawn and return None."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: {picture} is not drawn")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def run_main(prog: str, program: Callable[[], int | None]) -> int:
    """Run `program` and return its exit code: its own or 0, 2 after a `UserError`, 130 after Ctrl-C."""
    try:
        return program() or 0
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
