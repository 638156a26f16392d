"""Lays out rnnfast as a package for the kernel hub of Hugging Face: ``make hub``, or ``python -m release.hub``.

    build/hub/README.md                      what the hub shows
    build/hub/build/torch-cuda/              the package for a PyTorch with CUDA
    build/hub/build/torch-cpu/               and for one without

Both hold rnnfast and its kernels with relative imports, and ``metadata.json``. The `kernels` library loads the folder as a
package named by the ``id`` in there, which ends in a digest of the sources. rnnfast registers its operators under the name
by which it was loaded (`rnnfast.ops.schema.NAMESPACE`), so two versions, or an installed rnnfast, can be in one process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = ["BACKENDS", "Refused", "build", "package_id", "relative", "sources"]

ROOT = Path(__file__).resolve().parents[1]
NAME = "rnnfast"
BACKENDS = ("cuda", "cpu")
OLDEST_KERNELS = "0.17.0"  # the version of the library whose code the layout follows

CARD = """---
license: mit
tags:
- kernels
---

# rnnfast

LSTM, GRU and RNN layers for PyTorch on fused Triton kernels, rnnfast {version}. Nothing has been measured on a GPU yet.

```python
from kernels import get_local_kernel

rnnfast = get_local_kernel("build/hub")  # from the hub: get_kernel("OWNER/rnnfast", version=0, trust_remote_code=True)
rnnfast.accelerate(model)
```
"""


class Refused(Exception):
    """A source has a name of the package in it that cannot be made relative. The message says where, and what to write."""


def sources(root: Path = ROOT) -> dict[str, bytes]:
    """The files of the package by their paths in it, the kernels among them."""
    package = root / NAME
    folders = [(package, ""), (package / "kernels", "kernels/")]
    found = {
        f"{prefix}{path.relative_to(folder).as_posix()}": path.read_bytes()
        for folder, prefix in folders
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return dict(sorted(found.items()))


def package_id(files: dict[str, bytes], backend: str) -> str:
    """The name by which the package is loaded: unique to these sources and this backend."""
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return f"_{NAME}_{backend}_{digest.hexdigest()[:12]}"


def relative(text: str, path: str, modules: set[str], public: Collection[str] = ()) -> str:
    """The source at `path` in the package, with relative imports of the package's own modules.

    Args:
        modules: the names of all modules of the package, as "rnnfast.ops.schema".
        public: the names of its API. "rnnfast.explain" in a text is what a user calls, though there is a module of that name.

    Raises:
        Refused: there is an ``import rnnfast``, an import of no such module, or a text or name that is bound to "rnnfast".
    """
    tree = ast.parse(text)
    dots = "." * path.count("/") + "."  # up to the package itself, from where each name is the rest of the absolute one
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or not _is_ours(node.module or ""):
            continue
        assert node.module is not None
        if node.module not in modules:
            raise Refused(f"{path}:{node.lineno}: there is no module {node.module}")
        rest = node.module.removeprefix(NAME).removeprefix(".")
        line = lines[node.lineno - 1].encode()  # ast counts bytes
        before, after = line[: node.col_offset].decode(), line[node.col_offset :].decode()
        wanted = re.compile(rf"from\s+{re.escape(node.module)}\s+import\b")
        if not wanted.match(after):
            raise Refused(f"{path}:{node.lineno}: write `from {node.module} import` on one line")
        lines[node.lineno - 1] = before + wanted.sub(f"from {dots}{rest} import", after, count=1)
        node.module, node.level = rest or None, len(dots)
    done = "".join(lines)
    if done != text and ast.dump(ast.parse(done)) != ast.dump(tree):
        raise Refused(f"{path}: its imports could not be made relative")
    for line, why in _bound(tree, modules - {NAME} - {f"{NAME}.{name}" for name in public}):
        raise Refused(f"{path}:{line}: {why}")
    return done


def _is_ours(module: str) -> bool:
    return module == NAME or module.startswith(f"{NAME}.")


def _bound(tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    """The lines of what still names the package by "rnnfast" when it runs, and why that fails under another name."""
    statement = re.compile(rf"^\s*(?:from {NAME}[\w.]* import\b|import {NAME}[\w.]*\s*(?:$|#|,|as\b))", re.MULTILINE)
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docs |= {id(expr.value) for expr in node.body if isinstance(expr, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            yield node.lineno, f"write `from {NAME} import ...`, which can be made relative"
        elif isinstance(node, ast.Attribute) and node.attr == NAME and ast.unparse(node.value) == "torch.ops":
            yield node.lineno, "name the operators by NAMESPACE in rnnfast/ops/schema.py"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            if statement.search(node.value):
                yield node.lineno, "code in a text imports rnnfast: name the package by PACKAGE in rnnfast/version.py"
            elif node.value.strip(".") in modules or node.value == f"{NAME}.":
                yield node.lineno, "the name of a module in a text: name the package by PACKAGE in rnnfast/version.py"
            elif re.fullmatch(rf"{NAME}::\w*", node.value):
                yield node.lineno, "name the operators by NAMESPACE in rnnfast/ops/schema.py"


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """Write the package for each backend below `out`, which is emptied, and return their folders.

    Raises:
        Refused: a source cannot be made relative.
    """
    files = sources(root)
    modules = {_module(path) for path in files if path.endswith(".py")}
    public = _public(files["__init__.py"].decode())
    version = re.search(r'__version__ = "(.+)"', files["version.py"].decode())
    assert version is not None
    made = {
        path: relative(content.decode(), path, modules, public).encode() if path.endswith(".py") else content
        for path, content in files.items()
    }
    shutil.rmtree(out, ignore_errors=True)
    folders = []
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        for path, content in made.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        (folder / "metadata.json").write_text(json.dumps(_metadata(made, backend), indent=2) + "\n", encoding="utf-8")
        folders.append(folder)
    (out / "README.md").write_text(CARD.format(version=version[1]), encoding="utf-8")
    return folders


def _public(text: str) -> list[str]:
    """``__all__`` in this source."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise Refused("__init__.py: there is no __all__ as a list of texts")


def _module(path: str) -> str:
    return ".".join([NAME, *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


def _metadata(files: dict[str, bytes], backend: str) -> dict[str, object]:
    """What the hub wants to know. Version 0 is for what is not recommended for production yet."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source = re.search(r'^Source = "([^"]+)"', settings, re.MULTILINE)
    return {
        "id": package_id(files, backend),
        "name": NAME,
        "version": 0,
        "license": "mit",
        **({"upstream": source[1]} if source else {}),
        "kernels-minver": OLDEST_KERNELS,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in files.items()},
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m release.hub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="default: build/hub")
    try:
        folders = build(parser.parse_args(argv).out)
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    for folder in folders:
        print(f"{folder}: {json.loads((folder / 'metadata.json').read_text(encoding='utf-8'))['id']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
