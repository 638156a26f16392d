"""What `benchmarks.gpu_check` has found, in a folder: read when it goes on, written at every change."""

import json
import threading
from pathlib import Path

from benchmarks.gpu import jobs, summary
from benchmarks.timing import isolated
from benchmarks.timing.providers import BASE, provider_of
from benchmarks.timing.results import BadResults
from rnnfast.choice.tuned import shipped
from rnnfast.kernels.families import OF_TORCH
from rnnfast.kernels.persistent.plan import GpuLimits

PARTS = ("compile", "probes", "benchmark", "tuned", "checks", "stress")  # of the findings: name to rows


class Report:
    """What was found, in this run and in those before it. Every change is written at once, from whatever thread."""

    def __init__(self, folder: Path, environment: dict[str, str], limits: GpuLimits) -> None:
        self.folder, self.path = folder, folder / "gpu-check.json"
        self.limits = limits
        self.table = folder / shipped(limits).name  # the tuning table, under the name by which it is shipped
        self.lock = threading.RLock()
        self.found: dict = {"environment": environment, "canary": {"faults": {}, "why": "not run"}}
        self.found |= {"tests": {"exit_code": None, "closing_line": "not run"}} | {part: {} for part in PARTS}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            differs = {name for name, value in environment.items() if before["environment"].get(name) != value} - {"time"}
            if differs:
                words = f"{self.path} was found with another {', '.join(sorted(differs))}"
                raise BadResults(f"{words}: name another folder with --out, or start anew with --again")
            self.found = before
        self.write()

    def add(self, part: str, name: str, row: dict) -> None:
        """Add a row to a part. A name has a list of rows. What there was no time for is no row."""
        if isolated.out_of_time(row):
            return
        with self.lock:
            self.found[part].setdefault(name, []).append(row)
            print(json.dumps({part: name} | row), flush=True)
            self.write()

    def update(self, part: str, values: dict) -> None:
        with self.lock:
            self.found[part] |= values
            self.write()

    @property
    def families(self) -> list[str]:
        """The families that may run: those whose programs wait for one another only if the canary found them right."""
        faults = self.found["canary"]["faults"]
        return [name for name, family in OF_TORCH.items() if not family.waits or faults.get(name) == ""]

    @property
    def expected(self) -> dict[str, list[str]]:
        """The names of each part, in their order."""
        providers = [BASE, *map(provider_of, self.families)]
        return {
            "probes": list(jobs.PROBES),
            "benchmark": [f"{case.id} {name}" for case in jobs.TIMED for name in providers],
            "tuned": [str(shape) for shape in jobs.TUNED],
            "checks": [name for name, (family, *_) in jobs.CHECKS.items() if family in self.families],
            "stress": [name for name, (family, *_) in jobs.STRESS.items() if family in self.families],
        }

    def left(self, part: str) -> list[str]:
        """What is expected of a part and not there. Rows of what was not finished go."""
        with self.lock:
            for name in [name for name, rows in self.found[part].items() if part == "stress" and not summary.finished(rows)]:
                del self.found[part][name]
            return [name for name in self.expected[part] if name not in self.found[part]]

    def write(self) -> None:
        with self.lock:
            for path, text in ((self.path, json.dumps(self.found, indent=1)), (self.path.with_suffix(".md"), self.text())):
                new = path.with_suffix(".new")  # whole or not at all: the machine may go at any moment
                new.write_text(text)
                new.replace(path)

    def text(self) -> str:
        return summary.table(self.found, self.expected)
