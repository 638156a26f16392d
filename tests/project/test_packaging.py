"""What installs: wheel, sdist and editable, each built from a copy of this tree and used in an environment without Triton."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("benchmarks", "docs", "examples", "kernels", "release", "rnnfast", "tests")
FOLDERS = [name for name in TOPS if (ROOT / name).is_dir()]
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")

USE = """
import rnnfast
import torch

layer = rnnfast.LSTM(3, 4)
told = str(rnnfast.explain(layer, torch.zeros(5, 2, 3)))
assert "backend: torch" in told and "Triton is not installed" in told, told
output, (h_n, c_n) = layer(torch.ones(5, 2, 3))
(output.sum() + c_n.sum()).backward()
assert output.shape == (5, 2, 4) and all(weight.grad.abs().sum() > 0 for weight in layer.parameters())
layer = rnnfast.Layer(rnnfast.cells.slstm, 3, 4)
assert "backend: reference" in str(rnnfast.explain(layer, torch.zeros(5, 2, 3)))
layer(torch.ones(5, 2, 3))[0].sum().backward()
for name in ("triton", "kernels", "tests", "benchmarks", "examples", "release", "rnnfast.kernels"):
    try:
        __import__(name)
    except ImportError as error:
        needs_triton = name in ("triton", "rnnfast.kernels")
        assert error.name == ("triton" if needs_triton else name), f"{name}: {error}"
    else:
        raise AssertionError(f"{name} is on the path")
print(rnnfast.__file__)
"""


def run(*command, cwd: Path) -> str:
    """The output of a command that must succeed, away from this checkout and this environment's settings."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "RNNFAST_", "TRITON_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd)


def test_a_checkout_has_its_kernels(tmp_path):
    """Python takes the package in the current directory before an installed one: its kernels are those beside it."""
    for name in ("rnnfast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    printed = run(sys.executable, "-c", "import rnnfast.kernels.maths as maths; print(maths.__file__)", cwd=tmp_path)
    assert Path(printed.strip()) == tmp_path / "rnnfast" / "kernels" / "maths.py"


def test_the_link_is_relative():
    """So that it holds wherever a checkout lies, and in a copy of it."""
    link = ROOT / "rnnfast" / "kernels"
    assert not link.is_symlink() or os.readlink(link) == "../kernels"


def test_sources_without_links_say_what_to_do(tree_without_links):
    """Imported or built from, they raise; with the folder copied, as the message says, both work."""
    wanted = "Delete the file rnnfast/kernels and copy the folder kernels into rnnfast"
    for program in ("import rnnfast", "from setuptools import build_meta; build_meta.build_wheel('.')"):
        done = subprocess.run([sys.executable, "-c", program], cwd=tree_without_links, capture_output=True, text=True)
        assert done.returncode == 1 and wanted in done.stderr, done.stderr
    (tree_without_links / "rnnfast" / "kernels").unlink()
    shutil.copytree(tree_without_links / "kernels", tree_without_links / "rnnfast" / "kernels")
    run(sys.executable, "-c", "import rnnfast.kernels.maths", cwd=tree_without_links)
    pip("wheel", *OFFLINE, "--wheel-dir", tree_without_links / "out", tree_without_links, cwd=tree_without_links)
    assert {name for name in names(next(tree_without_links.glob("out/*.whl"))) if ".dist-info/" not in name} == expected()


def distributions_of(name: str, without: str) -> dict[str, importlib.metadata.Distribution]:
    """The installed distribution `name` and all that it requires, but for `without`."""
    found, queue = {}, [name]
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found or name == without:
            continue
        found[name] = importlib.metadata.distribution(name)
        wanted = (Requirement(text) for text in found[name].requires or ())
        queue += [want.name for want in wanted if want.marker is None or want.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The sources alone: no build folder, no egg-info, no git."""
    copy = tmp_path_factory.mktemp("tree") / "rnnfast"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "rnnfast" / "tuned" / "h200.json").write_text("{}")  # as make gpu-check writes them
    return copy


@pytest.fixture
def tree_without_links(tree, tmp_path) -> Path:
    """The sources as a zip download has them, or git on Windows: a link is a small file that names its target."""
    copy = tmp_path / "without links"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    (copy / "rnnfast" / "kernels").unlink()
    (copy / "rnnfast" / "kernels").write_text("../kernels")
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", *OFFLINE, "--wheel-dir", out, tree, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=tree)
    return next(out.glob("*.tar.gz"))


@pytest.fixture
def clean(tmp_path) -> Path:
    """The Python of a new environment that sees torch and what torch requires, but not Triton."""
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    shared = tmp_path / "shared"
    shared.mkdir()
    for distribution in distributions_of("torch", without="triton").values():
        folder = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (shared / top).exists():
                (shared / top).symlink_to(folder / top)
    (site / "shared.pth").write_text(f"{shared}\n")
    return home / "bin" / "python"


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def expected() -> set[str]:
    """The modules of this tree under their installed names, and the tuning tables."""
    modules = {installed(path) for folder in ("rnnfast", "rnnfast/kernels") for path in (ROOT / folder).rglob("*.py")}
    tables = {installed(path) for path in (ROOT / "rnnfast" / "tuned").iterdir()}
    return modules | tables | {"rnnfast/py.typed", "rnnfast/tuned/h200.json"}


def installed(path: Path) -> str:
    """The name of a source in a wheel, and in an sdist: the kernels lie in rnnfast/ there, in a folder and not by a link."""
    name = path.relative_to(ROOT).as_posix()
    return f"rnnfast/{name}" if name.startswith("kernels/") else name


def test_wheel_holds_the_library_and_nothing_else(wheel):
    assert {name for name in names(wheel) if ".dist-info/" not in name} == expected()


def test_wheel_metadata(wheel):
    import rnnfast

    with zipfile.ZipFile(wheel) as archive:
        folder = f"rnnfast-{rnnfast.__version__}.dist-info"
        metadata = importlib.metadata.PathDistribution(zipfile.Path(archive, f"{folder}/"))
        assert metadata.version == rnnfast.__version__
        needed = [text for text in metadata.requires or () if "extra ==" not in text]
        assert needed == ["torch>=2.9"], "torch brings its own Triton: rnnfast requires none"
        assert metadata.metadata["Requires-Python"] == ">=3.10"
        assert metadata.metadata["License-Expression"] == "MIT"
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
        assert metadata.read_text("top_level.txt") == "rnnfast\n"


def test_long_description_has_no_relative_links(tree, wheel, tmp_path):
    """A package index shows README.md away from the files that it links to."""

    def description(text: str) -> str:
        return email.message_from_string(text).get_payload()

    def targets(text: str) -> set[str]:
        return {target for target in re.findall(r"\]\(([^()\s]+)\)", text) if not target.startswith("https:")}

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        built = description(archive.read(name).decode())
    local = targets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert local and not targets(built)

    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    settings = (copy / "pyproject.toml").read_text(encoding="utf-8")
    if not re.search(r"^\[project\.urls\]", settings, re.MULTILINE):
        settings = settings.replace(
            "[project.scripts]", '[project.urls]\nSource = "https://example.org/r"\n\n[project.scripts]'
        )
        (copy / "pyproject.toml").write_text(settings, encoding="utf-8")
    source = re.search(r'^Source = "([^"]+)"', settings, re.MULTILINE)[1]
    program = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    run(sys.executable, "-c", program, cwd=copy)
    text = next(tmp_path.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert f"Project-URL: Source, {source}" in text
    for target in local:
        assert f"]({source}{target if target.startswith('#') else f'/blob/main/{target}'})" in description(text), target


def test_the_address_is_said_in_one_place():
    """`Source` in pyproject.toml. docs/one-point-zero.md says where else it shows."""
    source = re.search(r'^Source = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^repository-code: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert (source and source[1]) == (cited and cited[1].strip("\"'"))


def test_versions_and_dates():
    """CITATION.cff has the version of the package, and CHANGELOG.md the date of each version that was released."""
    import rnnfast

    assert f"\nversion: {rnnfast.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])


def test_dir_shows_the_api_alone():
    import rnnfast

    public = [name for name in dir(rnnfast) if not name.startswith("__")]
    assert public == sorted(rnnfast.__all__) and "__version__" in dir(rnnfast)
    import rnnfast.numerics

    assert rnnfast.numerics is not None


def test_sdist_holds_the_sources_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if not (member.issym() or member.islnk())}
    sources = {installed(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    missing = (
        sources | {"CITATION.cff", "LICENSE", "Makefile", "README.md", "SECURITY.md", "pyproject.toml", "setup.py"}
    ) - held
    assert not missing, missing
    assert not [name for name in held if "__pycache__" in name or name.startswith((".git", "build", "out"))]
    pip("wheel", *OFFLINE, "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    assert names(next(tmp_path.glob("*.whl"))) == names(wheel)


def test_wheel_works_without_triton(wheel, clean, tmp_path):
    pip("--python", clean, "install", *OFFLINE, wheel, cwd=tmp_path)
    used = run(clean, "-c", USE, cwd=tmp_path)
    assert Path(used.strip()).is_relative_to(clean.parent.parent)


def test_editable_install_works_without_triton(tree, clean, tmp_path):
    pip("--python", clean, "install", *OFFLINE, "--editable", tree, cwd=tmp_path)
    used = run(clean, "-c", USE, cwd=tmp_path)
    assert Path(used.strip()).resolve() == tree / "rnnfast" / "__init__.py"
    where = run(clean, "-c", "import importlib.util as u; print(u.find_spec('rnnfast.kernels').origin)", cwd=tmp_path)
    assert Path(where.strip()).resolve() == tree / "kernels" / "__init__.py"
    paths = run(clean, "-c", "import sys; print(*sys.path, sep='\\n')", cwd=tmp_path).splitlines()
    assert str(tree / ".editable") in paths, "a path, which type checkers follow"
    assert {path.suffix for path in (tree / ".editable").iterdir() if path.name != "rnnfast"} <= {".egg-info"}


def test_kernels_refuse_another_name(tree):
    program = textwrap.dedent("""
        try:
            import kernels
        except ImportError as error:
            assert "import rnnfast.kernels" in str(error), error
        else:
            raise AssertionError("kernels/ imported as a package of its own")
    """)
    run(sys.executable, "-c", program, cwd=tree)
