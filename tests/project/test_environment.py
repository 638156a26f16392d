"""docs/environment.md has every environment variable that the sources read, with the values and defaults that they know."""

import re
from pathlib import Path

import pytest

from rnnfast.commands import doctor
from rnnfast.settings import SETTINGS

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
ROWS = {
    name: cells
    for cells in (line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `"))
    for name in re.findall(r"`([A-Z_]+)`", cells[0])
}
SOURCES = [path for folder in ("rnnfast", "benchmarks", "kernels", "examples") for path in (ROOT / folder).rglob("*.py")]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in (*SOURCES, ROOT / "setup.py"))
READ = re.compile(r"""environ(?:\.get|\.setdefault|\.pop)?[(\[]"([A-Z_]+)"|"([A-Z_]+)" (?:not )?in os\.environ""")
MAKE = re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_is_complete():
    ours = {name for name in re.findall(r"RNNFAST_[A-Z_]+", TEXT) if not name.endswith("_")}
    read = {one or other for one, other in READ.findall(TEXT)}
    assert ours == {name for name in ROWS if name.startswith("RNNFAST_")}
    assert {"BENCHMARK_SET", "TRITON_INTERPRET", "CC"} <= read <= ROWS.keys()
    assert MAKE and set(MAKE) <= ROWS.keys() and set(doctor.RELATED) <= ROWS.keys()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.variable)
def test_values(setting):
    values = set(re.findall(r"`([^`]+)`", ROWS[setting.variable][1]))
    assert values == set(setting.choices)


def test_doctor_knows_all():
    known = {setting.variable for setting in SETTINGS} | set(doctor.OTHERS)
    assert known == {name for name in ROWS if name.startswith("RNNFAST_")}
