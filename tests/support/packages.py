"""Libraries that few have installed: their tests are skipped without them."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from rnnfast.integrations import TESTED


def needs(package: str) -> None:
    """Skip the tests of the file that calls this if the library `package` is not installed. Call it before the imports.

    The reason names the version that `make integrations` installs.
    """
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"needs {package} {TESTED[package]}: make integrations", allow_module_level=True)
