"""The notebook of the quick start equals its page, and its programs run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch._dynamo

import rnnfast

pytestmark = pytest.mark.same_everywhere

DOCS = Path(__file__).parents[2] / "docs"


def test_the_notebook_is_the_page_and_runs():
    """`python docs/notebook.py docs/quick-start.md` makes it anew."""
    found = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert found is not None and found.loader is not None
    maker = importlib.util.module_from_spec(found)
    found.loader.exec_module(maker)
    stored = (DOCS / "quick-start.ipynb").read_text(encoding="utf-8")
    assert stored == maker.notebook((DOCS / "quick-start.md").read_text(encoding="utf-8"))
    programs = ["".join(cell["source"]) for cell in json.loads(stored)["cells"] if cell["cell_type"] == "code"]
    assert len(programs) >= 5
    namespace = {}
    with rnnfast.use_backend("torch"), torch._dynamo.config.patch(allow_rnn=False):
        for program in programs:
            exec(program, namespace)
