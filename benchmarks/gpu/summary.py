"""The findings of `benchmarks.gpu_check` as Markdown, and everything in them that is not right."""

import jinja2

from benchmarks.gpu import jobs
from benchmarks.timing.cases import Case

TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks.gpu", "."))


def why_not_timed(row: dict) -> str:
    if row["status"] == "wrong":
        return f"{row['error']['tensor']} has {row['error']['worst']:.3g} times the error allowed"
    return row["note"]


def finished(rows: list[dict]) -> bool:
    """Whether the rows of a stress run are those of a whole one."""
    last = rows[-1] if rows else {}
    return "error" in last or "skipped" in last or last.get("launches", 0) >= jobs.LAUNCHES


def cells_of(name: str, found: dict) -> list[str]:
    """The line of the table for a case and provider: its times, beside torch.nn's for one of ours, or why it has none."""
    case, _, provider = name.partition(" ")
    row, base = (found["benchmark"].get(one, [None])[0] for one in (name, f"{case} torch.nn"))
    if row is None or row["status"] != "ok":
        return [case, provider, *[""] * 5, f"not timed: {why_not_timed(row) if row else 'not run'}"]
    steps = Case(**row["case"]).T
    times, theirs = (
        {one["how"]: one["p50"] for one in each["timings"] if one["l2"] == "warm"} if each else {} for each in (row, base)
    )
    cells = [f"{times[how] / steps:.2f}" if how in times else "" for how in ("eager", "cuda graph")]
    if row["ratio"]:
        graph = f"{theirs['cuda graph'] / times['cuda graph']:.2f}" if "cuda graph" in times.keys() & theirs.keys() else ""
        cells += [f"{1 / row['ratio']['p50']:.2f}", graph]
    else:
        cells += ["", ""]
    longest = [f"{one['name'][:60]} ({one['launches']}: {one['us'] / steps:.2f})" for one in row["kernels"][:2]]
    return [case, provider, *cells, f"{(row['peak_bytes'] or 0) / 2**20:.0f}", ", ".join(longest)]


def problems(found: dict, expected: dict[str, list[str]]) -> list[str]:
    """Everything that did not run or was wrong, in words. `expected`: the names of each part."""
    lines = [] if found["tests"]["exit_code"] == 0 else [f"tests: {found['tests']['closing_line']}"]
    lines += [f"canary: {found['canary']['why']}"] if found["canary"]["why"] else []
    lines += [f"canary: {family}: {fault}" for family, fault in found["canary"]["faults"].items() if fault]
    for part in ("compile", "probes", "benchmark", "tuned", "checks", "stress"):
        missing = [name for name in expected.get(part, ()) if name not in found[part]]
        lines += [f"{part}: {len(missing)} not run, the first: {missing[0]}"] if missing else []
        for name, rows in found[part].items():
            if part == "benchmark":
                wrong = [why_not_timed(row) for row in rows if row["status"] not in ("ok", "unavailable")]
            else:
                wrong = [row["error"] for row in rows if "error" in row]
                wrong += [f"{row['other bits']} calls gave other bits" for row in rows[-1:] if row.get("other bits")]
            wrong += ["not finished"] if part == "stress" and not finished(rows) else []
            lines += [f"{part}: {name}: {words}" for words in wrong]
    return lines


def table(found: dict, expected: dict[str, list[str]]) -> str:
    """The report as Markdown."""
    checked = [row | {"name": name} for name, rows in found["checks"].items() for row in rows]
    values = {
        "total": len(expected["checks"]),
        "skipped": sum("skipped" in row for row in checked),
        "right": sum("skipped" not in row and "error" not in row for row in checked),
        "shares": sorted((row for row in checked if "share" in row), key=lambda row: -row["share"])[:5],
        "problems": problems(found, expected),
        "times": [cells_of(name, found) for name in expected["benchmark"]],
    }
    return TEMPLATES.get_template("summary.md").render(found=found, **values)
