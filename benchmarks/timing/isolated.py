"""Runs jobs in a child process, which may crash or hang. A new child then does the jobs that are left.

python -m benchmarks.timing.isolated MODULE:FUNCTION JOBS.json      (the child; `rows` starts it)
"""

import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path


def rows(
    function: str, jobs: Sequence[list], quiet: float, until: float = math.inf, env: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict]]:
    """(number of the job, row) for each dict that ``function(*job)`` yields, as they come.

    A job at which the child crashes or hangs yields {"error": how, "hung": bool} and is not tried again. If the child fails
    before its first job, every job that is left does, because the next child would fail too. A child hangs if it prints no row
    for `quiet` seconds. All is over at `until`, on `time.monotonic`'s clock. `function` is "module:name" of a generator.
    """
    from rnnfast.commands import child  # not in the child, which loads what its function needs

    left = list(range(len(jobs)))
    while left:
        doing = None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "jobs.json")
            path.write_text(json.dumps([(number, jobs[number]) for number in left]))
            try:
                command = [sys.executable, "-m", "benchmarks.timing.isolated", function, str(path)]
                with closing(child.rows(command, quiet, env, until)) as lines:
                    for line in lines:
                        if "row" in line:
                            yield line["job"], line["row"]
                        else:
                            left = left[left.index(line["job"]) :]  # the jobs before it are done
                            doing = line["job"]
                return
            except child.Failed as failed:
                error = {"error": str(failed), "hung": failed.hung}
        if doing is None:
            yield from ((number, error | {"error": f"not run: {error['error']}"}) for number in left)
            return
        left.remove(doing)
        yield doing, error


def main(function: str, path: str) -> None:
    """Do the jobs in the file `path`. Print a line when a job begins and a line for each of its rows."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the rows
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    for number, arguments in json.loads(Path(path).read_text()):
        print(json.dumps({"job": number}), file=out, flush=True)
        for row in call(*arguments):
            print(json.dumps({"job": number, "row": row}), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
