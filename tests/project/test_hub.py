"""The package for the kernel hub of Hugging Face, which ``make hub`` lays out. tests/integrations has their library load it."""

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from release import hub

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"rnnfast", "rnnfast.ops", "rnnfast.ops.schema"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    assert [folder.name for folder in hub.build(out)] == ["torch-cuda", "torch-cpu"]
    return out


@pytest.mark.parametrize("backend", hub.BACKENDS)
def test_layout_and_metadata(built, backend):
    folder = built / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    held = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del held["metadata.json"]
    assert held.keys() == hub.sources().keys() and {"__init__.py", "kernels/step/forward.py", "py.typed"} <= held.keys()
    digests = {path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in held.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert metadata["id"].isidentifier() and metadata["id"].startswith(f"_rnnfast_{backend}_")
    assert metadata["backend"] == {"type": backend} and metadata["name"] == "rnnfast"


def test_no_import_of_an_installed_rnnfast_is_left(built):
    for path in (built / "build" / "torch-cpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] in ("rnnfast", "kernels")], f"{path}:{node.lineno}"


def test_the_id_follows_the_sources():
    files = hub.sources()
    assert hub.package_id(files, "cpu") != hub.package_id({**files, "version.py": b""}, "cpu")


def test_imports_become_relative():
    text = 'from rnnfast import ops\n"from rnnfast"; from rnnfast.ops.schema import (\n    a,\n)\n'
    wanted = 'from .. import ops\n"from rnnfast"; from ..ops.schema import (\n    a,\n)\n'
    assert hub.relative(text, "ops/schema.py", MODULES) == wanted
    assert hub.relative("from rnnfast.ops import x", "__init__.py", MODULES) == "from .ops import x"
    label = "name = 'rnnfast.ops'"
    assert hub.relative(label, "ops/schema.py", MODULES, public=["ops"]) == label


@pytest.mark.parametrize(
    "text",
    [
        "import rnnfast",
        "def f():\n    import rnnfast.ops as ops",
        "from rnnfast.missing import x",
        "from rnnfast.ops \\\n    import x",
        "code = f'''\nfrom rnnfast.ops import {x}'''",
        "module = 'rnnfast.ops.schema'",
        "module = f'rnnfast.{name}'",
        "forward = custom_op('rnnfast::forward', run)",
        "forward = torch.ops.rnnfast.forward",
    ],
)
def test_what_cannot_be_rewritten_is_refused(text):
    with pytest.raises(hub.Refused, match=r"ops/schema.py"):
        hub.relative(text, "ops/schema.py", MODULES)


def test_runs_beside_an_installed_rnnfast(built, tmp_path):
    """Forward and backward on the interpreted kernels, a derived cell, operators, warnings and child processes of both."""
    (tmp_path / "rnnfast").symlink_to(ROOT / "rnnfast")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RNNFAST_")}
    env |= {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "RNNFAST_CELL_CACHE": str(tmp_path / "cells")}
    command = [sys.executable, str(ROOT / "tests" / "support" / "two_copies.py"), "importlib", str(built)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_rnnfast_cpu_")
