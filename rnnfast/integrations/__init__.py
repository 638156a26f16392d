"""What rnnfast adds for other libraries, one module a library. Importing rnnfast imports none of them.

`TESTED` has the version of each library that the tests in ``tests/integrations`` ran with. ``make integrations`` installs these
versions and runs these tests.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

__all__ = ["TESTED", "load"]

TESTED: dict[str, str] = {
    "darts": "0.48.1",
    "neuralforecast": "3.3.0",
    "pytorch-forecasting": "1.8.0",
}
"""The name of each library on PyPI, and the version tested."""


def load(module: str, package: str) -> ModuleType:
    """Import `module` of a library that the user wants rnnfast to work with.

    Args:
        module: the name to import.
        package: the name of the library on PyPI, a key of `TESTED`.

    Raises:
        ImportError: if the library is not installed. The message names the version tested.

    Warns:
        UserWarning: if another minor version than the tested one is installed.
    """
    tested = TESTED[package]
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; rnnfast was tested with {package} {tested}", name=module) from None
    if found.split(".")[:2] != tested.split(".")[:2]:
        warnings.warn(f"{package} {found} is installed; rnnfast was tested with {package} {tested}", stacklevel=3)
    return importlib.import_module(module)
