"""What is said of other libraries, in `rnnfast.integrations.TESTED`, pyproject.toml, docs/integrations and tests, agrees."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rnnfast.integrations import TESTED

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ("integrations", "integrations-hub")  # of `make integrations`


def pinned(extra: str) -> dict[str, str]:
    """The packages of an extra that are installed in one version."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for text in project["optional-dependencies"][extra]]
    return {each.name: next(iter(each.specifier)).version for each in found if str(each.specifier).startswith("==")}


def test_the_versions_installed_are_those_tested():
    """The environments of `make integrations` have every library between them. The ordinary tests have some of them, in the
    same version."""
    found = {}
    for extra in ENVIRONMENTS:
        found |= pinned(extra)
    assert found == TESTED and list(TESTED) == sorted(TESTED)
    assert {name: version for name, version in pinned("test").items() if name in TESTED}.items() <= TESTED.items()


@pytest.mark.parametrize("package", TESTED)
def test_each_has_a_test_and_a_page_with_its_version(package):
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "integrations").glob("test_with_*.py")]
    assert any(package in canonicalize_name(text) for text in tests), f"no tests/integrations/test_with_*.py has {package}"
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "integrations").glob("*.md")]
    wanted = f"{package} {TESTED[package]}"
    assert any(wanted in text.lower() for text in pages), f"no page of docs/integrations says {wanted}"
