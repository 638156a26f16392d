"""The programs of a page of docs/integrations, run as written."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


def run_page(name: str) -> dict[str, Any]:
    """Run the Python programs of a page one after another in one namespace, as a reader would. Returns the namespace.

    It is that of a module, `name`_page, so that the classes of a page can be pickled.
    """
    programs = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert programs, f"no program in {name}.md"
    module = sys.modules[f"{name}_page"] = ModuleType(f"{name}_page")
    for program in programs:
        exec(program, vars(module))
    return vars(module)
