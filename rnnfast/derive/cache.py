"""Derived source as a module. ``triton.jit`` reads the source of its functions from a file, and so does a debugger.

The file is for them and for readers: what runs is the source that was derived in this process, whatever the file holds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from rnnfast.settings import CELL_CACHE

__all__ = ["digest", "folder", "load", "write"]


def digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def folder() -> Path:
    """The folder of RNNFAST_CELL_CACHE, else ~/.cache/rnnfast/cells."""
    chosen = CELL_CACHE.get()
    return Path(chosen) if chosen else Path.home() / ".cache" / "rnnfast" / "cells"


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    """A folder for this process, where the cache's cannot be written. It is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rnnfast-cells-")


def write(name: str, source: str) -> Path:
    """A file with this source: the one that is there, or one written at once or not at all.

    Raises:
        OSError: no file can be written, not even a temporary one.
    """
    try:
        return _written(folder(), name, source)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return _written(Path(_temporary().name), name, source)


def _written(place: Path, name: str, source: str) -> Path:
    path = place / f"{name}.py"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == source:
            return path
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="\n", dir=place, suffix=".tmp", delete=False) as file:
        file.write(source)
    try:
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
    return path


def load(name: str, source: str) -> ModuleType:
    """The module of this source. Imports Triton."""
    title = f"rnnfast_cell_{name}"
    path = write(name, source)
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # triton.jit looks up the globals of a function in its module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
