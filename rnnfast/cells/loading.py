"""Finds a cell by what a user writes at a command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from rnnfast import cells
from rnnfast.derive.definition import Cell

__all__ = ["NoCell", "load", "load_all"]

FORMS = "my_file.py:my_cell, my_package.my_module:my_cell, a name in rnnfast.cells, or library for all of those"


class NoCell(LookupError):
    """There is no such cell, in one line."""


def load_all(text: str) -> list[Cell]:
    """The cells of the library for "library", else the one that `load` finds."""
    return [getattr(cells, name) for name in cells.__all__] if text == "library" else [load(text)]


def load(text: str) -> Cell:
    """The cell that ``my_file.py:my_cell``, ``my_package.my_module:my_cell`` or a name in `rnnfast.cells` stands for.

    A file is run as a module of its name, and may import what lies beside it. What its code raises passes on.

    Raises:
        NoCell: there is none.
    """
    place, colon, name = text.rpartition(":")
    if not colon:
        if name not in cells.__all__:
            raise NoCell(f"no cell {name!r} in rnnfast.cells, which has {', '.join(cells.__all__)}; another cell is {FORMS}")
        return getattr(cells, name)
    module = _of_file(Path(place)) if place.endswith(".py") else _of_name(place)
    found = getattr(module, name, None)
    if isinstance(found, Cell):
        return found
    others = sorted(key for key, value in vars(module).items() if isinstance(value, Cell))
    what = f"is {type(found).__name__}, no cell" if hasattr(module, name) else "does not exist"
    raise NoCell(f"{name!r} in {place} {what}; its cells: {', '.join(others) or 'none'}")


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NoCell(f"no file {str(path)!r}")
    title = path.stem
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(folder)
    before = sys.modules.get(title)
    sys.modules[title] = module  # where the cell's functions, and pickle, look for what they use
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(title)
        if before is not None:
            sys.modules[title] = before
        raise
    return module


def _of_name(title: str) -> ModuleType:
    try:
        return importlib.import_module(title)
    except ModuleNotFoundError as error:
        if error.name is not None and (title == error.name or title.startswith(f"{error.name}.")):
            raise NoCell(f"no module {title!r}") from None
        raise  # the module is there, and lacks something itself
    except ValueError:  # an empty name
        raise NoCell(f"no module {title!r}: a cell is {FORMS}") from None
