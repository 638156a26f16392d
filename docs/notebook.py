"""Makes a notebook of a page: its prose and its programs, in order.

    python docs/notebook.py docs/quick-start.md          # writes docs/quick-start.ipynb

A test holds the two equal and runs the notebook's programs.
"""

import json
import re
import sys
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)


def cells(page: str) -> list[dict]:
    """The cells: one for each program in Python, and one for all that stands between two of them."""
    found: list[tuple[str, str]] = []
    at = 0
    for fence in FENCE.finditer(page):
        if fence[1] == "python":
            found += [("markdown", page[at : fence.start()].strip()), ("code", fence[2].strip("\n"))]
            at = fence.end()
    found.append(("markdown", page[at:].strip()))
    return [cell(kind, source, f"cell-{number}") for number, (kind, source) in enumerate(found) if source]


def cell(kind: str, source: str, name: str) -> dict:
    """One cell, as the format of notebooks wants it."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": {}, "source": source.splitlines(keepends=True), **code}


def notebook(page: str) -> str:
    """The notebook, as the text of its file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells(page), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
