"""Who may import whom, read from the sources: benchmarks, tests, examples -> rnnfast -> rnnfast.kernels -> Triton."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 450  # lines; a file should be read at one sitting
OUTSIDE = {"benchmarks", "examples", "tests"}


def sources(folder: str) -> list[Path]:
    """The files of a folder, those of rnnfast/ without its kernels, which lie there by a link, or as a folder in an sdist."""
    kernels = ROOT / "rnnfast" / "kernels"
    if folder == "kernels":
        return sorted(kernels.rglob("*.py"))
    found = sorted(path for path in (ROOT / folder).rglob("*.py") if kernels not in path.parents)
    assert found, f"no sources in {folder}/"
    return found


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def for_types(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, deferred: bool = True) -> Iterator[tuple[str, int]]:
    """Each module or name that `path` imports, dotted, and its line; `deferred`: also those that importing it does not run."""
    queue: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), filename=str(path))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: relative import: write the whole name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif deferred or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types(node)):
            queue.extend(ast.iter_child_nodes(node))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def refuse(path: Path, wrong, rule: str, deferred: bool = True) -> None:
    found = [f"{named(path)}:{line}: {name}" for name, line in imports(path, deferred) if wrong(name)]
    assert not found, f"{rule}: {', '.join(found)}"


@pytest.mark.parametrize("path", sources("kernels"), ids=named)
def test_kernels_import_triton_the_standard_library_and_themselves(path):
    def wrong(name):
        return not within(name, "triton", "rnnfast.kernels") and name.split(".")[0] not in sys.stdlib_module_names

    refuse(path, wrong, "kernels/ imports Triton, the standard library and rnnfast.kernels only")


def test_reference_imports_torch_alone():
    def wrong(name):
        return not within(name, "torch") and name.split(".")[0] not in sys.stdlib_module_names

    refuse(ROOT / "rnnfast/reference.py", wrong, "the oracle stands on torch and the standard library")


@pytest.mark.parametrize("path", sources("rnnfast"), ids=named)
def test_library_imports_neither_benchmarks_nor_tests_nor_examples(path):
    refuse(path, lambda name: within(name, *OUTSIDE, "kernels"), "rnnfast/ stands below benchmarks, tests and examples")


@pytest.mark.parametrize("path", sources("rnnfast"), ids=named)
def test_library_imports_triton_and_kernels_inside_functions_only(path):
    refuse(path, lambda name: within(name, "triton", "rnnfast.kernels"), "importing rnnfast needs no Triton", deferred=False)


@pytest.mark.parametrize("path", [path for path in sources("rnnfast") if named(path).startswith("rnnfast/nn")], ids=named)
def test_modules_know_no_triton(path):
    refuse(path, lambda name: within(name, "triton", "rnnfast.kernels"), "no Triton in the modules, they call the operators")


def test_operators_stand_below_the_modules():
    def wrong(name):
        names = ("kernels", "choice", "ops", "reference", "torch_private")
        below = [f"rnnfast.{name}" for name in names]
        return within(name, "rnnfast") and not within(name, *below)

    paths = [path for path in sources("rnnfast") if named(path).startswith("rnnfast/ops")]
    assert paths
    for path in paths:
        refuse(path, wrong, "operators stand on kernels, their choice, reference, and what is done to a call")


OPERATORS = ("schema", "marks", "recurrence", "operators", "vmap", "gradients", "layers", "dropout")


@pytest.mark.parametrize("path", sources("rnnfast/ops"), ids=named)
def test_operators_import_downwards(path):
    """Each module of `rnnfast.ops` imports those before it in this list, and reaches no operator of ours through torch.ops but
    where it names them."""
    own = len(OPERATORS) if path.stem == "__init__" else OPERATORS.index(path.stem)
    below = [f"rnnfast.ops.{name}" for name in OPERATORS[:own]]

    def wrong(name):
        return within(name, "rnnfast.ops") and not within(name, *below)

    refuse(path, wrong, "a module of operators imports those below it")
    assert "torch.ops.rnnfast" not in path.read_text(encoding="utf-8") or path.stem == "operators"


@pytest.mark.parametrize("path", [*sources("kernels"), *sources("rnnfast"), *sources("benchmarks")], ids=named)
def test_files_stay_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{named(path)} has {lines} lines: split it"


@pytest.mark.parametrize(
    "before", ["", "sys.modules['triton'] = None"], ids=["Triton installed or not", "Triton refusing to import"]
)
def test_importing_rnnfast_imports_no_triton(before):
    program = f"""
import sys
{before}
import torch
known = set(sys.modules)
import rnnfast
new = [name for name in set(sys.modules) - known if name.split(".")[0] == "triton" or name.startswith("rnnfast.kernels")]
sys.exit(f"import rnnfast imported {{new}}" if new else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
