"""The file of results: one JSON document that the runner writes row by row and the report reads.

    {"schema": 2,
     "environment": {...},          gpu or cpu, driver, versions, commit, TF32 settings, time
     "settings": {...},             how it was measured
     "ceilings": null | {"l2_bytes_per_s", "hbm_bytes_per_s", "flops_per_s": {dtype: x}, "exchange_us"},
     "rows": [row, ...]}

    row = {"case": {every field of `benchmarks.timing.cases.Case`}, "set": str, "provider": str,
           "status": one of `STATUSES`, "note": str (error text, versions),
           "error": {"worst": error / allowed error, "tensor": name} | null,
           "timings": [{"how": "eager" | "cuda graph", "l2": "warm" | "cold", "p20", "p50", "p80", "n"}],
                      microseconds a call, and how many calls were timed
           "ratio": {"to": "torch.nn", "p20", "p50", "p80"} | null,
                      time of a call over that of torch.nn right beside it; on a GPU eager with a warm L2
           "peak_bytes": int | null,  above those allocated before the call
           "saved_bytes": int | null, kept for backward besides input, parameters and output
           "compile_s": float | null, of the first call, where it compiles
           "kernels": [names]}        the GPU kernels of one call

Only a row whose status is "ok" has timings.
"""

import json
import os
from pathlib import Path

from benchmarks.timing.cases import Case
from rnnfast.choice import tuning_file

SCHEMA = 2  # 1 had TF32 as a field of the case
STATUSES = ("ok", "wrong", "error", "out of memory", "unavailable")
_EMPTY = {"note": "", "error": None, "timings": [], "ratio": None, "peak_bytes": None, "saved_bytes": None}
_EMPTY |= {"compile_s": None, "kernels": []}
_TIMING = ("how", "l2", "p20", "p50", "p80", "n")


class BadResults(ValueError):
    """A file that holds no results of this schema. The message is one line."""


def new_row(case: Case, set_name: str, provider: str, status: str, **values) -> dict:
    """A row with `values`. Fields that they do not name are empty."""
    assert status in STATUSES and not values.keys() - _EMPTY.keys(), (status, values)
    row = {"case": case.as_dict(), "set": set_name, "provider": provider, "status": status}
    return row | {name: values.get(name, default) for name, default in _EMPTY.items()}


def key(row: dict) -> tuple[Case, str]:
    """The case and the provider of a row."""
    return Case(**row["case"]), row["provider"]


def load(path: str | os.PathLike) -> dict:
    """The results in `path`.

    Raises:
        BadResults: an empty or damaged file, or one of another schema version.
        OSError: a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadResults(f"{path} holds no results: it is not text") from None
    if not text.strip():
        raise BadResults(f"{path} is empty")
    try:
        results = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadResults(f"{path} is damaged: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(results, dict) or "schema" not in results:
        raise BadResults(f"{path} holds no benchmark results: it has no schema version")
    if results["schema"] != SCHEMA:
        raise BadResults(f"{path} has schema version {results['schema']!r}, and this program reads version {SCHEMA}")
    try:
        _check(results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadResults(f"{path} is damaged: {' '.join(words.split())}") from None
    return results


def _check(results: dict) -> None:
    for name, kind in (("environment", dict), ("settings", dict), ("rows", list), ("ceilings", dict | None)):
        if not isinstance(results[name], kind):
            raise TypeError(f"{name} should be a {getattr(kind, '__name__', 'dict or null')}")
    for row in results["rows"]:
        key(row)
        if row["status"] not in STATUSES:
            raise ValueError(f"a row has status {row['status']!r}")
        for where, names in ((row, ("set", *_EMPTY)), *((timing, _TIMING) for timing in row["timings"])):
            for name in names:
                where[name]


def save(results: dict, path: str | os.PathLike) -> None:
    """Write `results` to `path`, whole or not at all. The old content stays if the disk is full or the power fails."""
    tuning_file.write(results, Path(path))
