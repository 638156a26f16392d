"""What rnnfast adds for other libraries, one module a library. Importing rnnfast imports none of them.

`TESTED` has the version of each library that the tests in ``tests/integrations`` ran with. ``make integrations`` installs these
versions and runs these tests.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnnfast.integrations import keras, lightning, opacus, sb3, torchrl

__all__ = ["TESTED", "keras", "lightning", "load", "opacus", "sb3", "torchrl"]

TESTED: dict[str, str] = {
    "captum": "0.9.0",
    "darts": "0.48.1",
    "flair": "0.15.1",
    "gymnasium": "1.4.0",
    "keras": "3.15.1",
    "kernels": "0.17.2",
    "lightning": "2.6.6",
    "neuralforecast": "3.3.0",
    "onnx": "1.23.2",
    "onnxruntime": "1.32.0",
    "onnxscript": "0.7.2",
    "opacus": "1.6.0",
    "pytorch-forecasting": "1.8.0",
    "pytorch-lightning": "2.6.6",
    "sb3-contrib": "2.9.2",
    "skorch": "1.4.0",
    "speechbrain": "1.1.2",
    "stanza": "1.15.0",
    "tensordict": "0.14.3",
    "torchrl": "0.14.1",
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


def __getattr__(name: str) -> Any:
    """The modules in ``__all__`` import their libraries, so each is imported when it is first asked for."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
