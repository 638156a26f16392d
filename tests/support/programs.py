"""The examples as modules: starting Python and torch anew for every test would take most of the time."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def load(name: str) -> Iterator[ModuleType]:
    """examples/`name`.py, imported as if Python had been asked to run it."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
        sys.modules.pop("char_lm_support", None)
        sys.path.remove(str(FOLDER))


def run(module: ModuleType, capsys, *args: object) -> str:
    """What its main function prints, which must end well."""
    code = module.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.out + captured.err
    return captured.out
