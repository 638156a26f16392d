"""Who may import whom, read from the sources: benchmarks, tests, examples -> rnnfast -> rnnfast.kernels -> Triton."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 450  # lines; a file should be read at one sitting
OUTSIDE = {"benchmarks", "examples", "release", "tests"}


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


def imports(path: Path, deferred: bool = True, types: bool = True) -> Iterator[tuple[str, int]]:
    """Each module or name that `path` imports, dotted, and its line; `deferred`: also those that importing it does not run;
    `types`: also those for type checkers alone."""
    queue: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), filename=str(path))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: relative import: write the whole name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif not types and for_types(node):
            continue
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


ORACLE = ("reference.py", "derive/definition.py", "cells/builtin.py")


@pytest.mark.parametrize("file", ORACLE)
def test_reference_stands_on_torch_alone(file):
    """The oracle and the cells that it runs import nothing of what derives or runs kernels."""
    own = [f"rnnfast.{each.removesuffix('.py').replace('/', '.')}" for each in ORACLE]

    def wrong(name):
        return not within(name, "torch", *own) and name.split(".")[0] not in sys.stdlib_module_names

    refuse(ROOT / "rnnfast" / file, wrong, "the oracle stands on torch, the standard library and the definitions of cells")


@pytest.mark.parametrize("path", sources("rnnfast"), ids=named)
def test_library_imports_neither_benchmarks_nor_tests_nor_examples(path):
    refuse(path, lambda name: within(name, *OUTSIDE, "kernels"), "rnnfast/ stands below benchmarks, tests and examples")


@pytest.mark.parametrize("path", sources("rnnfast"), ids=named)
def test_library_imports_triton_and_kernels_inside_functions_only(path):
    refuse(path, lambda name: within(name, "triton", "rnnfast.kernels"), "importing rnnfast needs no Triton", deferred=False)


@pytest.mark.parametrize("path", [path for path in sources("rnnfast") if named(path).startswith("rnnfast/nn")], ids=named)
def test_modules_know_no_triton(path):
    refuse(path, lambda name: within(name, "triton", "rnnfast.kernels"), "no Triton in the modules, they call the operators")


# From the top down, who may import whom: a module those of later lines, and of its own line as long as there is no circle. The
# flow of a call is nn -> choice -> ops -> kernels; in imports the operators stand above choice, for they ask it for plans.
FLOW = (
    ("__main__",),
    ("",),  # rnnfast itself
    ("integrations",),
    ("commands", "check", "check_cells"),
    ("accelerate", "explain", "explain_model", "functional", "inspect", "run_once"),
    ("nn",),
    ("ops",),
    ("derive",),
    ("choice",),
    ("numerics", "reference", "cells", "derive.definition", "settings", "torch_private", "torch_rules", "version"),
    ("kernels",),
)
LINES = {name: line for line, names in enumerate(FLOW) for name in names}


def arrows() -> dict[str, set[str]]:
    """The modules of rnnfast, without its name, and which of them each imports, inside functions too. rnnfast itself is ""."""
    paths = {path for path in sources("rnnfast") if not within_folder(path, "kernels")}
    modules = {path.relative_to(ROOT / "rnnfast").with_suffix("").as_posix().replace("/", "."): path for path in paths}
    modules = {name.removesuffix("__init__").rstrip("."): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = set()
        for imported, _ in imports(path, types=False):
            if within(imported, "rnnfast.kernels"):
                targets.add("kernels")
            elif within(imported, "rnnfast"):
                parts = imported.split(".")[1:]
                target = next(".".join(parts[:n]) for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules)
                targets.add(target)
        found[name] = targets - {name}
    return found


def within_folder(path: Path, name: str) -> bool:
    return name in path.relative_to(ROOT / "rnnfast").parts


def line_of(name: str) -> int:
    """The line that names the module, or else the package it is in."""
    parts = name.split(".")
    named = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in LINES), None)
    assert named is not None, f"rnnfast/{name}: say in FLOW where it stands"
    return LINES[named]


def drawn(graph: dict[str, set[str]]) -> str:
    """The graph as text, a line a module, from the top down."""
    modules = sorted(graph, key=lambda name: (line_of(name), name))
    return "\n".join(f"{line_of(name)} rnnfast{name and '.'}{name} -> {', '.join(sorted(graph[name]))}" for name in modules)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, empty if there is none."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_arrow_points_upwards():
    """The import graph of rnnfast: ``pytest -s`` prints it."""
    graph = arrows()
    print("\n" + drawn(graph))
    upward = [f"{name} -> {target}" for name, each in graph.items() for target in each if line_of(target) < line_of(name)]
    assert not upward, f"{upward} in\n{drawn(graph)}"
    assert not circle(graph), f"a circle among {circle(graph)} in\n{drawn(graph)}"


def test_the_test_of_arrows():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"] and not circle({"a": {"b"}, "b": set()})


def test_private_names_of_torch_stand_in_two_files():
    """Attributes and modules with a leading underscore, not the project's own."""
    attribute = r"\b(?:torch|_C|forward_ad|_guards|environ)\._(?!_)(?!dynamo\.config\.allow_rnn|dynamo$)\w+"
    private = re.compile(attribute + r"|from torch\S* import .*\b_\w+|from torch\S*\._\S* import")
    found = []
    for path in sources("rnnfast"):
        if named(path) in ("rnnfast/torch_private.py", "rnnfast/torch_rules.py") or within_folder(path, "kernels"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "import torch._dynamo" not in line and private.search(line):
                found.append(f"{named(path)}:{number}: {line.strip()}")
    assert not found, found


OPERATORS = (
    "schema", "products", "marks", "rounds", "recurrence", "operators", "members", "vmap", "dropout", "gradients", "layers"
)  # fmt: skip


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


@pytest.mark.parametrize(
    "path", [*sources("kernels"), *sources("rnnfast"), *sources("benchmarks"), *sources("release")], ids=named
)
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
