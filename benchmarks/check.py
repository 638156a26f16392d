"""The regression gate: what can be known without a GPU, against committed baselines.

    make bench-check                (or python -m benchmarks.check [--parts counts cpu] [--bisect] [--update])

"counts": the machine code of a few kernels for absent GPUs (`benchmarks.static`), a baseline for each version of Triton.
"cpu": what rnnfast costs beside torch.nn on CPU tensors (`benchmarks.cpu_overhead`). Exit code 1 if a figure is worse than its
baseline by more than its tolerance, 2 if there is no baseline. --bisect finds the commit that made it so; --update writes the
figures of now as the new baselines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASELINES = Path(__file__).with_name("baselines")
SCHEMA = 1
PARTS = ("counts", "cpu")
MEASURED = ("kernels", "rnnfast")  # what a commit has to touch to change a figure
Figures = dict[str, dict[str, float | str]]  # by what they are of, by name

JOBS = (  # family, arch, cell, dtype, hidden, batch
    ("persistent", 90, "lstm", "float16", 768, 16),
    ("persistent", 90, "gru", "float16", 768, 16),
    ("persistent", 90, "lstm", "tf32", 512, 16),
    ("persistent", 80, "lstm", "float16", 512, 16),
    ("persistent", 100, "lstm", "float16", 768, 16),
    ("step", 90, "lstm", "float16", 512, 16),
    ("step", 90, "gru", "float16", 512, 16),
    ("step", 80, "lstm", "float32", 512, 16),
)

# How much more than its baseline a figure may be, as a part of it. A count is the same in every run, so it may not grow at all;
# a few instructions or registers more are no step back by themselves.
TOLERANCES = {
    "spills": 0.0,
    "stack_bytes": 0.0,
    "variants": 0.0,
    "launches": 0.0,
    "barriers": 0.0,
    "round_trips": 0.0,
    "redundancy": 0.0,
    "gathered_bytes": 0.0,
    "weights_reread_bytes": 0.0,
    "instructions": 0.01,
    "retry_instructions": 0.01,
    "predicted_us": 0.01,
    "registers": 0.05,
}


@dataclass(frozen=True)
class Worse:
    """A figure that is worse than its baseline. `allowed`: the tolerance."""

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
    """What got worse, and what got better. More is worse; a word is worse if it is another."""
    worse, better = [], []
    for row, figures in baseline.items():
        for name, before in figures.items():
            value = now.get(row, {}).get(name)
            allowed = tolerances.get(name, 0.0)
            found = Worse(row, name, before, value, allowed)
            if value is None or isinstance(before, str) or isinstance(value, str):
                if value != before:
                    worse.append(found)
            elif value > before * (1 + allowed):
                worse.append(found)
            elif value < before * (1 - allowed):
                better.append(found)
    return worse, better


def counts() -> Figures:
    """Of `JOBS`: a row for each kernel; `family` is a word, since falling back to the step kernels is a step back."""
    from benchmarks import static

    jobs = [static.Job(*rest, (batch,)) for *rest, batch in JOBS]
    found: Figures = {}
    for job in jobs:  # one at a time: two jobs may come to the same row, asked for by another family
        for row in static.build([job], 1):
            phase = "backward" if row["direction"] == "backward" else "training" if row["training"] else "inference"
            name = f"sm_{row['arch']} {row['cell']} {row['dtype']} H={row['hidden']} B={row['batch']} {job.family} {phase}"
            found[name] = {"family": row["family"]} | {figure: row[figure] for figure in TOLERANCES}
    return found


def figures_of(part: str) -> Figures:
    if part == "counts":
        return counts()
    from benchmarks import cpu_overhead

    return cpu_overhead.figures()


def tolerances_of(part: str) -> dict[str, float]:
    if part == "counts":
        return TOLERANCES
    from benchmarks import cpu_overhead

    return cpu_overhead.TOLERANCES


def baseline_path(part: str) -> Path:
    import triton

    return BASELINES / (f"triton-{triton.__version__}.json" if part == "counts" else "cpu.json")


def git(*args: str) -> str:
    """What git prints. Raises subprocess.CalledProcessError."""
    return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()


def commits_since(base: str) -> list[str]:
    """Those after `base` that could have changed a figure, "hash subject", the oldest first; and what is not committed."""
    lines = git("log", "--oneline", "--reverse", f"{base}..HEAD", "--", *MEASURED).splitlines()
    if git("status", "--porcelain", "--", *MEASURED):
        lines.append("(changes that are not committed)")
    return lines


def figures_at(commit: str, part: str) -> Figures | None:
    """The figures of the kernels and the library at `commit`, by the benchmarks of now; None if they do not go together."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "archive.tar")
        git("archive", f"--output={archive}", commit, "rnnfast", "kernels")
        with tarfile.open(archive) as tar:
            tar.extractall(folder)
        link = Path(folder, "rnnfast", "kernels")
        if not link.is_symlink():  # an older commit
            link.symlink_to("../kernels")
        os.symlink(ROOT / "benchmarks", Path(folder, "benchmarks"))
        command = [sys.executable, "-m", "benchmarks.check", "--parts", part, "--print"]
        env = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return json.loads(done.stdout)[part] if done.returncode == 0 else None


def first_bad(commits: list[str], bad: Callable[[str], bool]) -> str:
    """The first of `commits` that is bad, where all after it are bad too and the last one is, in few tries."""
    low, high = 0, len(commits) - 1
    while low < high:
        middle = (low + high) // 2
        if bad(commits[middle]):
            high = middle
        else:
            low = middle + 1
    return commits[low]


def bisect(part: str, worse: list[Worse], baseline: dict) -> str:
    """Which commit first had any of the figures `worse`, in words."""
    commits = [line for line in commits_since(baseline["commit"]) if not line.startswith("(")]
    wanted = {(one.row, one.name) for one in worse}

    def bad(line: str) -> bool:
        now = figures_at(line.split()[0], part)
        if now is None:
            print(f"  {line}: cannot be counted with the benchmarks of now; taken as bad", flush=True)
            return True
        found = {(one.row, one.name) for one in compare(baseline["figures"], now, tolerances_of(part))[0]} & wanted
        print(f"  {line}: {f'{len(found)} worse' if found else 'as good as the baseline'}", flush=True)
        return bool(found)

    if not commits or not bad(commits[-1]):
        return "no commit: the changes that are not committed"
    return first_bad(commits, bad)


def check(part: str, find: bool) -> int:
    """Compare `part` with its baseline and say what is worse; the exit code."""
    path = baseline_path(part)
    if not path.exists():
        others = ", ".join(sorted(one.name for one in BASELINES.glob("*.json"))) or "none"
        print(f"{part}: no baseline {path.name}; there are: {others}. --update writes one", file=sys.stderr)
        return 2
    baseline = json.loads(path.read_text())
    if baseline.get("schema") != SCHEMA:
        print(f"{part}: {path.name} has schema version {baseline.get('schema')!r}, not {SCHEMA}", file=sys.stderr)
        return 2
    worse, better = compare(baseline["figures"], figures_of(part), tolerances_of(part))
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
        print("\n".join(f"  {line}" for line in commits_since(baseline["commit"])) or "  none")
        if find:
            print("looking for the first bad one:", flush=True)
            print(f"first bad: {bisect(part, worse, baseline)}")
    except subprocess.CalledProcessError as error:
        print(f"  git cannot say: {error.stderr.strip()}")
    return 1


def update(part: str) -> None:
    path = baseline_path(part)
    dirty = bool(git("status", "--porcelain", "--", *MEASURED))
    found = {"schema": SCHEMA, "commit": git("rev-parse", "--short=10", "HEAD"), "dirty": dirty, "figures": figures_of(part)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{part}: written {path.relative_to(ROOT)}" + (", with changes that are not committed" if dirty else ""))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check", description="Static counts and CPU cost against baselines."
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--bisect", action="store_true", help="find the first commit that made a figure worse")
    parser.add_argument("--update", action="store_true", help="write new baselines")
    parser.add_argument("--print", action="store_true", help="only print the figures, as JSON")
    args = parser.parse_args(argv)
    if args.print:
        print(json.dumps({part: figures_of(part) for part in args.parts}))
        return 0
    if args.update:
        for part in args.parts:
            update(part)
        return 0
    return max(check(part, args.bisect) for part in args.parts)


if __name__ == "__main__":
    sys.exit(main())
