"""Every program in the pages and every example in the docstrings runs as written."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo

import rnnfast

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
PAGES = {path: re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL) for path in
         (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}  # fmt: skip
FOUND = [module.name for module in pkgutil.walk_packages(rnnfast.__path__, "rnnfast.")]
MODULES = ["rnnfast", *(name for name in FOUND if not re.search(r"kernels|\._|\.integrations\.", name))]


@pytest.mark.parametrize("page", [page for page, programs in PAGES.items() if programs], ids=lambda page: page.name)
def test_programs(page):
    """One after another in one namespace, as a reader would try them, on PyTorch's own layer."""
    namespace = {}
    with rnnfast.use_backend("torch"), torch._dynamo.config.patch(allow_rnn=False):
        for program in PAGES[page]:
            exec(program, namespace)


EXAMPLES = """
import doctest, importlib, sys, torch, rnnfast
given = {"torch": torch, "rnnfast": rnnfast}
found = [doctest.testmod(importlib.import_module(name), extraglobs=given) for name in sys.argv[1:]]
print(sum(tests.attempted for tests in found))
sys.exit(sum(tests.failed for tests in found) > 0)
"""


def test_examples():
    """Those of the docstrings, as a user runs them: without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "RNNFAST_"))}
    command = [sys.executable, "-c", EXAMPLES, *MODULES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 25


def test_the_tree_is_complete():
    """CONTRIBUTING.md names each module of the kernels and the library; of the library of cells, the folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", text.split("## The tree")[1].split("```")[1]))
    modules = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "rnnfast").rglob("*.py")]
    stems = {path.stem for path in modules if path.parent.name != "cells"} - {"__init__", "__main__"}
    assert stems and not stems - named, stems - named


def test_readme_is_short():
    """It stands on one screen or three; docs/ has the rest."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_there_are_some():
    """The pages are not empty of them."""
    assert len(PAGES[ROOT / "README.md"]) >= 3 and len(PAGES[ROOT / "docs" / "sequences.md"]) >= 4
