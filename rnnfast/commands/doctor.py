"""``rnnfast doctor``: what of rnnfast works on this machine, and what to do about the rest.

It asks each question on its own, so that whatever is missing or broken here cannot keep it from the others. One of them runs a
small layer forward and backward against float64, as a program would.
"""

from __future__ import annotations

import argparse
import difflib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rnnfast import check, nn
from rnnfast.choice import gpu, obstacles, trust, tuning_file
from rnnfast.choice.decide import tensor_obstacles
from rnnfast.derive import cache
from rnnfast.explain import explain
from rnnfast.settings import SETTINGS, TUNING_FILE
from rnnfast.version import __version__

__all__ = ["main"]

OTHERS = ("RNNFAST_COMMIT",)  # variables of the benchmarks, whose value may be any text
RELATED = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "CC")  # shown if they are set
CASE = check.Case("LSTM", 6, 4, 16, 32, torch.float32)
WIDTH = 12


class Doctor:
    """Prints a line for each question, and keeps what it found.

    Attributes:
        broken: what does not work though it should, in words.
        hints: what may be meant to be otherwise, in words.
        why_not: why the kernels cannot run. Empty if they can.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.hints: list[str] = []
        self.why_not = ""
        self.device = torch.device("cpu")

    def ask(self, name: str, question: Callable[[], str]) -> None:
        """Print the answer. A question that raises an error has that as its answer, with what it warned of."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                answer = question()
            except Exception as error:
                answer = f"could not be asked: {_short(error)}"
        for each in dict.fromkeys(str(one.message).splitlines()[0] for one in warned if str(one.message)):
            answer += f"\nwarning: {each}"
        lines = _without_home(answer).splitlines() or [""]
        print(f"{name:{WIDTH}} {lines[0]}", *(f"{'':{WIDTH}} {line}" for line in lines[1:]), sep="\n", flush=True)

    def examine(self) -> None:
        """Ask everything."""
        self.ask("rnnfast", lambda: f"{__version__} in {Path(__file__).parents[1]}")
        self.ask("Python", lambda: f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")
        self.ask("PyTorch", _pytorch)
        self.ask("variables", self.variables)
        self.ask("Triton", _triton)
        self.ask("compiler", _compiler)
        self.ask("GPU", self.gpus)
        self.ask("driver", _driver)
        self.ask("cuDNN", lambda: str(torch.backends.cudnn.version() or "not in this build of PyTorch"))
        self.ask("kernels", self.kernels)
        self.ask("check", self.checked)
        self.ask("canary", self.canary)
        self.ask("tuning file", self.tuning)
        self.ask("caches", self.caches)

    def variables(self) -> str:
        """Every variable of rnnfast that is set. One with a wrong value is then taken away, so that the rest can be asked."""
        known = {setting.variable: setting for setting in SETTINGS}
        found = []
        for name in sorted(name for name in os.environ if name.startswith("RNNFAST_")):
            value, words = os.environ[name], ""
            if name in known:
                try:
                    known[name].in_environment()
                except ValueError as error:
                    words = f": WRONG, every call raises an error; {error}"
                    self.broken.append(str(error))
                    del os.environ[name]
            elif name not in OTHERS:
                near = difflib.get_close_matches(name, (*known, *OTHERS), 1)
                words = f": there is no such variable{f'; did you mean {near[0]}?' if near else ''}"
                self.hints.append(f"{name} has no effect{f', {near[0]} would have' if near else ''}")
            found.append(f"{name}={value}{words}")
        found += [f"{name}={os.environ[name]}" for name in RELATED if name in os.environ]
        return "\n".join(found) or "none is set"

    def gpus(self) -> str:
        if not torch.cuda.is_available():
            return "none is visible to PyTorch"
        self.device = torch.device("cuda", torch.cuda.current_device())
        found = []
        for index in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(index)
            kind = getattr(one, "gcnArchName", "") if torch.version.hip else f"sm_{one.major}{one.minor}"
            found.append(f"{index}: {one.name}, {kind}, {one.total_memory / 2**30:.0f} GiB")
        return "\n".join(found)

    def kernels(self) -> str:
        self.why_not = "the question could not be answered"  # which stays if it raises an error
        self.why_not = "; ".join(tensor_obstacles(torch.empty(1, device=self.device)))
        if self.why_not:
            return f"cannot run on {self.device.type} tensors: {self.why_not}"
        return f"can run on {self.device}" + (", in Triton's interpreter" if self.device.type == "cpu" else "")

    def checked(self) -> str:
        """A small layer against float64: as any call would run it, and on a GPU on the kernels, too."""
        lines = [self.one_check(None)]
        if self.device.type == "cuda" and not self.why_not:
            lines.append(self.one_check("triton"))
        return "\n".join(lines)

    def one_check(self, backend: str | None) -> str:
        title = f"{CASE} forward and backward"
        try:
            problem = check.Problem(CASE, str(self.device))
            layer: Any = problem.module(nn, backend=backend)
            title += f", on {explain(layer, problem.x).details.partition(',')[0]}"
            results = check.compare(CASE, str(self.device), backend)
        except Exception as error:
            self.broken.append(f"a small layer raises an error: {_short(error)}")
            return f"{title}: FAILED: {_short(error)}"
        fault = check.fault(results)
        if fault:
            self.broken.append(f"a small layer gives wrong results: {fault}")
            return f"{title}: WRONG: {fault}"
        worst = max(results, key=lambda result: result.share)
        return f"{title}: right, against float64 ({worst.tensor} {worst.ours:.1e}, torch.nn {worst.theirs:.1e})"

    def canary(self) -> str:
        limits = gpu.limits(self.device)
        if limits is None:
            return "checks each family of kernels on a GPU, and there is none"
        verdict = trust.verdict(limits)
        for family, fault in (verdict.faults if verdict else {}).items():
            if fault:
                self.broken.append(f"the {family} kernels failed their check on {limits.name}, and are not used: {fault}")
        return f"{trust.words(limits)} ({trust.where(limits)})"

    def tuning(self) -> str:
        limits = gpu.limits(self.device)
        if limits is None:
            return "one for each kind of GPU, and there is none"
        path = tuning_file.where(limits)
        try:
            return f"{path}: {len(tuning_file.read(path, limits))} shapes; {_writable(path.parent)}"
        except FileNotFoundError:
            return f"{path} is not there yet: rnnfast tune makes it; {_writable(path.parent)}"
        except tuning_file.Unusable as error:
            self.hints.append(f"the tuning file is not used: {error}")
            return f"{error}; it is not used"

    def caches(self) -> str:
        places: dict[str, Callable[[], Path]] = {
            "Triton's": _triton_cache,
            "rnnfast's": _own_cache,
            "cells": cache.folder,
        }
        lines = []
        for name, where in places.items():
            try:
                folder = where()
                lines.append(f"{name}: {folder}, {_writable(folder)}")
            except Exception as error:
                lines.append(f"{name}: {_short(error)}")
        return "\n".join(lines)

    def verdict(self) -> str:
        """One line: whether it works, and what to do next."""
        return " ".join([f"verdict: {self._works()}.", *(f"{hint}." for hint in self.hints)])

    def _works(self) -> str:
        if self.broken:
            return f"BROKEN: {'; '.join(dict.fromkeys(self.broken))}. Next: mend this, or report it with the lines above"
        if not self.why_not and self.device.type == "cpu":
            return "works, in Triton's interpreter, which is for tests. Next: unset TRITON_INTERPRET"
        if not self.why_not:
            return "works, and the kernels can run. Next: rnnfast.explain(model, x) says what runs in your model"
        if self.device.type == "cpu":
            triton = obstacles.triton_obstacle()
            also = f", for which {triton}" if triton else ""
            return f"works, on PyTorch's own layers. Next: rnnfast doctor on the machine with the GPU{also}"
        return f"works, but on PyTorch's own layers alone. Next: mend what keeps the kernels off: {self.why_not}"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _without_home(text: str) -> str:
    """The text without the name of the user's folder, which is nobody's business in a report."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _pytorch() -> str:
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU"
    )
    return f"{torch.__version__}, a build for {build}; {torch.get_num_threads()} threads"


def _triton() -> str:
    obstacle = obstacles.triton_obstacle()
    if obstacle:
        return obstacle
    import triton

    return f"{triton.__version__}, which rnnfast knows (3.6 to 3.9)"


def _compiler() -> str:
    """What Triton needs to build its launcher on a GPU."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    where = (shutil.which(compiler) if compiler else None) or "none"
    if obstacles.triton_obstacle():
        return f"C compiler {where}"
    from rnnfast.kernels import runtime

    header = runtime.python_header()
    return f"C compiler {where}; {header}{'' if header.is_file() else ' is not there'}; a GPU needs both"


def _driver() -> str:
    version = gpu.driver_version()
    return "no driver of CUDA was found" if version is None else f"CUDA {version // 1000}.{version % 1000 // 10}"


def _triton_cache() -> Path:
    if obstacles.triton_obstacle():
        return Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    from triton import knobs

    return Path(knobs.cache.dir)


def _own_cache() -> Path:
    """The folder of the tuning file and of the canary's verdict."""
    named = TUNING_FILE.get()
    return Path(os.path.expanduser(named)).parent if named else tuning_file.folder()


def _writable(folder: Path) -> str:
    """Whether a file can be made in a folder, which is tried in the nearest folder that is there."""
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryDirectory(dir=there):
            return "can be written"
    except OSError as error:
        return f"CANNOT be written ({error.strerror}): what would be kept there is made anew in each process"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if something is broken."""
    parser = argparse.ArgumentParser(prog="rnnfast doctor", description=(__doc__ or "").split("\n")[0])
    parser.parse_args(argv)
    doctor = Doctor()
    print("```")
    doctor.examine()
    print("```")
    print(_without_home(doctor.verdict()))
    return 1 if doctor.broken else 0
