"""What pyproject.toml cannot say: the links of the long description, the path of an editable install, and a refusal."""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

if not os.path.isdir(os.path.join("rnnfast", "kernels")):
    raise SystemExit(
        "rnnfast/kernels should be a link to the folder kernels/, and this copy of the sources has no links (from a zip, or on "
        "Windows). Delete the file rnnfast/kernels and copy the folder kernels into rnnfast, or clone with "
        "`git clone -c core.symlinks=true`."
    )


def long_description() -> str:
    """README.md as a package index shows it, away from the files that its links name.

    A link to a file of the project becomes one to that file at the address `Source` under ``[project.urls]`` in pyproject.toml.
    While there is no such address, the link becomes its own text and the name of the file.
    """
    source = re.search(r'^Source = "([^"]+)"', (HERE / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)

    def absolute(found: re.Match) -> str:
        mark, text, target = found.groups()
        if source is None:
            return text if mark or target.startswith("#") else f"{text} ({target})"
        kind = "raw" if mark else "blob"
        return f"{mark}[{text}]({source[1]}{target if target.startswith('#') else f'/{kind}/main/{target}'})"

    return re.sub(r"(!?)\[([^][]*)\]\((?!\w+:)([^()\s]+)\)", absolute, (HERE / "README.md").read_text(encoding="utf-8"))


def editable_path() -> dict[str, str]:
    """Where an editable install finds the package: in a folder that holds a link to it and nothing else.

    Python is told of the folder by a path, which type checkers read too. Without ``package_dir`` setuptools would hook into
    Python's imports, which they do not see. With the folder of the project as the path, tests/ and benchmarks/ would be
    packages of everyone. Where no link can be made, as on Windows without the right to, setuptools does as before.
    """
    folder = HERE / ".editable"
    folder.mkdir(exist_ok=True)
    try:
        if not (folder / "rnnfast").exists():
            (folder / "rnnfast").symlink_to(os.path.join("..", "rnnfast"), target_is_directory=True)
    except OSError:
        return {}
    return {"": folder.name}


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    package_dir=editable_path() if "editable_wheel" in sys.argv else {},
)
