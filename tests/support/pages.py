"""The programs of a page of docs/integrations, run as written."""

import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


def run_page(name: str) -> dict[str, Any]:
    """Run the Python programs of a page one after another in one namespace, as a reader would. Returns the namespace."""
    programs = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert programs, f"no program in {name}.md"
    namespace: dict[str, Any] = {}
    for program in programs:
        exec(program, namespace)
    return namespace
