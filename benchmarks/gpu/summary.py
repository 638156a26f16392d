"""The findings of `benchmarks.gpu_check` as Markdown, and everything in them that is not right."""

import jinja2

from benchmarks.gpu.jobs import CHECKS
from benchmarks.timing.cases import Case

TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks.gpu", "."))


def why_not_timed(row: dict) -> str:
    if row["status"] == "wrong":
        return f"{row['error']['tensor']} has {row['error']['worst']:.3g} times the error allowed"
    return row["note"]


def cells_of(name: str, found: dict) -> list[str]:
    """The line of the table for a case and provider: its times beside torch.nn's, or why it has none."""
    case, _, provider = name.partition(" ")
    row, base = (found["benchmark"].get(one, [None])[0] for one in (name, f"{case} torch.nn"))
    if row is None or row["status"] != "ok":
        return [f"{case}, not timed: {why_not_timed(row) if row else 'not run'}", provider, *[""] * 6]
    steps, timed = Case(**row["case"]).T, [row, base if base and base["status"] == "ok" else None]
    times = [f"{each['timings'][0]['p50'] / steps:.2f}" if each else "" for each in timed]
    memory = [f"{each['peak_bytes'] / 2**20:.0f}" if each else "" for each in timed]
    kernels = " ".join(base["kernels"]).lower() if base else ""  # their names say whether cuDNN kept the weights on chip
    path = ("persistent" if "persist" in kernels else "standard") if kernels else "not seen"
    speed_up = f"{1 / row['ratio']['p50']:.2f}" if row["ratio"] else ""
    return [case, provider, *times, speed_up, *memory, path]


def problems(found: dict, expected: dict[str, list[str]]) -> list[str]:
    """Everything that did not run or was wrong, in words. `expected`: the names of each part."""
    lines = [] if found["tests"]["exit_code"] == 0 else [f"tests: {found['tests']['closing_line']}"]
    lines += [] if found["checks"] else ["checks: not run"]
    for part in ("checks", "benchmark", "stress", "tuned"):
        lines += [f"{part}: {name}: not run" for name in expected.get(part, ()) if name not in found[part]]
        for name, rows in found[part].items():
            if part == "benchmark":
                wrong = [why_not_timed(row) for row in rows if row["status"] not in ("ok", "unavailable")]
            else:
                wrong = [row["error"] for row in rows if "error" in row]
                wrong += [f"{row['other bits']} calls gave other bits" for row in rows[-1:] if row.get("other bits")]
            lines += [f"{part}: {name}: {words}" for words in wrong]
    return lines


def table(found: dict, expected: dict[str, list[str]]) -> str:
    """The report as Markdown."""
    checked = [row for rows in found["checks"].values() for row in rows]
    skipped = sum("skipped" in row for row in checked)
    right = len(checked) - skipped - sum("error" in row for row in checked)
    ours = [name for name in expected["benchmark"] if not name.endswith(" torch.nn")]
    values = {"right": right, "total": len(CHECKS), "skipped": skipped, "problems": problems(found, expected)}
    times = [cells_of(name, found) for name in ours]
    return TEMPLATES.get_template("summary.md").render(found=found, times=times, **values)
