"""`make gpu-check` in a folder whose path has a space."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.same_everywhere,
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]

ROOT = Path(__file__).resolve().parents[2]


def test_a_path_with_a_space(tmp_path):
    """Python is told of the checkout, besides what the user named, and of the whole path of the report."""
    folder = tmp_path / "a b"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "gpu-check", f"PYTHON={python}", "OUT=o u t", "ARGS=--more"]
    env = os.environ | {"PYTHONPATH": "/else where"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [f"{folder}:/else where", "-m", "benchmarks.gpu_check", "--out", "o u t", "--more"]
    assert done.stdout.splitlines()[-len(told) :] == told
