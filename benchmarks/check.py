"""The regression gate: compares figures that need no GPU with committed baselines.

    make bench-check                (or python -m benchmarks.check [--parts counts cpu] [--bisect] [--update])

"counts" are figures of the machine code of a few kernels for absent GPUs (`benchmarks.static`). Each version of Triton has its
own baseline. "cpu" is the cost of rnnfast beside torch.nn on CPU tensors (`benchmarks.cpu_overhead`).

The exit code is 1 if a figure is worse than its baseline by more than its tolerance, and 2 if there is no baseline. --bisect
finds the commit that made it worse. --update writes the current figures as the new baselines.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BASELINES = Path(__file__).with_name("baselines")
SCHEMA = 1
PARTS = ("counts", "cpu")
MEASURED = ("kernels", "rnnfast")  # a commit that touches none of these changes no figure
SKIP = 125  # the exit code with which `git bisect run` passes over a commit
Figures = dict[str, dict[str, float | str]]  # a figure by row and name

# JOBS: family, arch, cell, dtype, hidden, batch. TOLERANCES: how much more than its baseline a figure may be, as a part of it.
# A count is the same in every run, so it may not grow. A few instructions or registers more are no step back by themselves.
JOBS, TOLERANCES = json.loads((BASELINES / "gate.json").read_text()).values()


class Worse(NamedTuple):
    """A figure that differs from its baseline. `allowed`: its tolerance."""

    row: str
    name: str
    before: float | str
    now: float | str | None
    allowed: float

    def __str__(self) -> str:
        if self.now is None:
            return f"{self.row}: {self.name} was {self.before}, and is gone"
        if isinstance(self.before, str):
            return f"{self.row}: {self.name} was {self.before}, and is {self.now}"
        before, now = (f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for value in (self.before, self.now))
        by = f"{(self.now - self.before) / self.before:+.1%}" if self.before else f"{self.now - self.before:+g}"
        limit = f"{self.allowed:+.0%} is allowed" if self.allowed else "none is allowed"
        return f"{self.row}: {self.name} {before} -> {now} ({by}; {limit})"


def compare(baseline: Figures, now: Figures, tolerances: dict[str, float]) -> tuple[list[Worse], list[Worse]]:
    """The figures that got worse, and those that got better. A larger number is worse. A text that differs is worse, too."""
    worse, better = [], []
    for row, figures in baseline.items():
        for name, before in figures.items():
            value, allowed = now.get(row, {}).get(name), tolerances.get(name, 0.0)
            found = Worse(row, name, before, value, allowed)
            if value is None or isinstance(before, str) or isinstance(value, str):
                worse += [found] * (value != before)
            else:
                worse += [found] * (value > before * (1 + allowed))
                better += [found] * (value < before * (1 - allowed))
    return worse, better


def figures_of(part: str) -> tuple[Figures, dict[str, float]]:
    """The current figures, and their tolerances.

    "counts" has a row for each kernel of `JOBS`. One figure is the name of the family. A kernel that falls back to the step
    kernels therefore counts as worse.
    """
    if part == "cpu":
        from benchmarks import cpu_overhead

        return cpu_overhead.figures(), cpu_overhead.TOLERANCES
    from benchmarks.static import table

    found: Figures = {}
    for *rest, batch in JOBS:  # one at a time: two jobs may come to the same row, asked for by another family
        job = table.Job(*rest, (batch,))
        for row in table.build([job], 1):
            phase = table.PHASES[row["direction"], row["training"]]
            name = f"sm_{row['arch']} {row['cell']} {row['dtype']} H={row['hidden']} B={row['batch']} {job.family} {phase}"
            found[name] = {"family": row["family"]} | {figure: row[figure] for figure in TOLERANCES}
    return found, TOLERANCES


def baseline_path(part: str) -> Path:
    import triton

    return BASELINES / (f"triton-{triton.__version__}.json" if part == "counts" else "cpu.json")


def git(*args: str | Path, tree: Path | None = None) -> str:
    """The output of git. Raises subprocess.CalledProcessError if git fails."""
    return subprocess.run(["git", "-C", tree or ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()


def is_dirty() -> bool:
    return bool(git("status", "--porcelain", "--", *MEASURED))


def commits_since(base: str) -> list[str]:
    """The commits after `base` that could have changed a figure, as "hash subject", the oldest first."""
    return git("log", "--oneline", "--reverse", f"{base}..HEAD", "--", *MEASURED).splitlines()


def probe_command(part: str, wanted: Path) -> list[str]:
    """The command with which `git bisect run` tells good commits from bad ones."""
    return [sys.executable, "-m", "benchmarks.check", "--parts", part, "--probe", str(wanted)]


def probe(part: str, wanted: Path) -> int:
    """The exit code of a probe: 0 if the checked-out kernels and library have none of the bad figures in `wanted`, 1 if any.

    It is `SKIP` if the current benchmarks cannot count that commit.
    """
    commit = git("log", "-1", "--oneline", tree=Path.cwd())
    try:
        worse, _ = compare(json.loads(wanted.read_text()), *figures_of(part))
    except Exception as error:
        print(f"  {commit}: the benchmarks of now cannot count it ({type(error).__name__})", flush=True)
        return SKIP
    print(f"  {commit}: {f'{len(worse)} worse' if worse else 'as good as the baseline'}", flush=True)
    return 1 if worse else 0


def bisect(part: str, worse: list[Worse], baseline: dict) -> str:
    """The first commit with any of the figures `worse`, in words. `git bisect run` finds it in a separate working tree.

    The current benchmarks count the kernels and the library of each commit.
    """
    wanted: Figures = {one.row: {} for one in worse}
    for one in worse:
        wanted[one.row][one.name] = one.before
    with tempfile.TemporaryDirectory() as folder:
        tree, file = Path(folder, "tree"), Path(folder, "wanted.json")
        file.write_text(json.dumps(wanted))
        git("worktree", "add", "--detach", tree, "HEAD")
        try:
            for name, place in (("benchmarks", ROOT / "benchmarks"), ("rnnfast", tree / "rnnfast")):
                os.symlink(place, Path(folder, name))
            command, options = probe_command(part, file), {"cwd": tree, "env": os.environ | {"PYTHONPATH": folder}}
            if not commits_since(baseline["commit"]) or subprocess.run(command, **options).returncode == 0:
                return "no commit: the changes that are not committed"
            git("bisect", "start", "HEAD", baseline["commit"], "--", *MEASURED, tree=tree)
            done = subprocess.run(["git", "bisect", "run", *command], **options, stdout=subprocess.PIPE, text=True)
            print("\n".join(line for line in done.stdout.splitlines() if line.startswith("  ")))
            bad = git("log", "-1", "--oneline", "refs/bisect/bad", tree=tree)
            return bad if done.returncode == 0 else f"{bad}, or one before it that cannot be counted"
        finally:
            subprocess.run(["git", "-C", tree, "bisect", "reset"], capture_output=True)
            git("worktree", "remove", "--force", tree)


def check(part: str, find: bool) -> int:
    """Compare `part` with its baseline and print what is worse. Returns the exit code."""
    path = baseline_path(part)
    if not path.exists():
        others = ", ".join(sorted(one.name for one in BASELINES.glob("*.json") if one.name != "gate.json")) or "none"
        print(f"{part}: no baseline {path.name}; there are: {others}. --update writes one", file=sys.stderr)
        return 2
    baseline = json.loads(path.read_text())
    if baseline.get("schema") != SCHEMA:
        print(f"{part}: {path.name} has schema version {baseline.get('schema')!r}, not {SCHEMA}", file=sys.stderr)
        return 2
    worse, better = compare(baseline["figures"], *figures_of(part))
    total = sum(map(len, baseline["figures"].values()))
    print(f"{part}: {len(worse)} of {total} figures worse than {path.name}, {len(better)} better")
    for one in worse:
        print(f"  worse: {one}")
    for one in better:
        print(f"  better: {one}; --update would hold it")
    if not worse:
        return 0
    print(f"commits since the baseline ({baseline['commit']}) that touch {' or '.join(MEASURED)}:")
    try:
        lines = [*commits_since(baseline["commit"]), *["(changes that are not committed)"] * is_dirty()]
        print("\n".join(f"  {line}" for line in lines) or "  none")
        if find:
            print("looking for the first bad one:", flush=True)
            print(f"first bad: {bisect(part, worse, baseline)}")
    except subprocess.CalledProcessError as error:
        print(f"  git cannot say: {error.stderr.strip()}")
    return 1


def update(part: str) -> None:
    path, commit = baseline_path(part), git("rev-parse", "--short=10", "HEAD")
    found = {"schema": SCHEMA, "commit": commit, "dirty": is_dirty(), "figures": figures_of(part)[0]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{part}: written {path.relative_to(ROOT)}" + (", with changes that are not committed" if found["dirty"] else ""))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--bisect", action="store_true", help="find the first commit that made a figure worse")
    parser.add_argument("--update", action="store_true", help="write new baselines")
    parser.add_argument("--probe", type=Path, metavar="FILE", help="exit code 1 if a figure is worse than in this file")
    args = parser.parse_args(argv)
    if args.probe:
        return max(probe(part, args.probe) for part in args.parts)
    if args.update:
        for part in args.parts:
            update(part)
        return 0
    return max(check(part, args.bisect) for part in args.parts)


if __name__ == "__main__":
    sys.exit(main())
