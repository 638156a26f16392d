"""The findings of `benchmarks.gpu_check` as Markdown, and everything in them that is not right."""

from __future__ import annotations

from benchmarks.gpu.jobs import CHECKS
from benchmarks.timing.cases import Case

__all__ = ["problems", "table"]


def why_not_timed(row: dict) -> str:
    if row["status"] == "wrong":
        return f"{row['error']['tensor']} has {row['error']['worst']:.3g} times the error allowed"
    return row["note"]


def benchmark_lines(found: dict, expected: list[str]) -> list[str]:
    """A line for each case and family of kernels, beside torch.nn."""
    lines = ["| case | kernels | us/step | torch.nn | speed-up | MiB | torch.nn MiB | cuDNN's path |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|---|"]
    for name in expected:
        case, _, provider = name.partition(" ")
        (row,), (base,) = (found["benchmark"].get(one, [None]) for one in (name, f"{case} torch.nn"))
        if provider == "torch.nn" and row and row["status"] == "ok":
            continue
        if row is None or row["status"] != "ok":
            lines.append(f"| {case}, not timed: {why_not_timed(row) if row else 'not run'} | {provider} | | | | | | |")
            continue
        steps, timed = Case(**row["case"]).T, [row, base if base and base["status"] == "ok" else None]
        times = [f"{each['timings'][0]['p50'] / steps:.2f}" if each else "" for each in timed]
        memory = [f"{each['peak_bytes'] / 2**20:.0f}" if each else "" for each in timed]
        path = cudnn_path(base) if timed[1] else ""
        speed_up = f"{1 / row['ratio']['p50']:.2f}"
        lines.append(f"| {' | '.join([case, provider, *times, speed_up, *memory, path])} |")
    return lines


def cudnn_path(row: dict) -> str:
    """Whether cuDNN kept the weights on chip, told from the names of its kernels."""
    if not row["kernels"]:
        return "not seen"
    return "persistent" if any("persist" in name.lower() for name in row["kernels"]) else "standard"


def problems(found: dict, expected: dict[str, list[str]]) -> list[str]:
    """Everything that did not run or was wrong, in words. `expected`: the names of each part."""
    lines = [] if found["tests"]["exit_code"] == 0 else [f"tests: {found['tests']['closing_line']}"]
    if not found["checks"]:
        lines.append("checks: not run")
    for part in ("checks", "benchmark", "stress", "tuned"):
        lines += [f"{part}: {name}: not run" for name in expected.get(part, ()) if name not in found[part]]
        for name, rows in found[part].items():
            if part == "benchmark":
                lines += [f"{part}: {name}: {why_not_timed(row)}" for row in rows if row["status"] not in ("ok", "unavailable")]
                continue
            lines += [f"{part}: {name}: {row['error']}" for row in rows if "error" in row]
            lines += [
                f"{part}: {name}: {row['other bits']} calls gave other bits" for row in rows[-1:] if row.get("other bits")
            ]
    return lines


def table(found: dict, expected: dict[str, list[str]]) -> str:
    """The report as Markdown."""
    checked = [row for rows in found["checks"].values() for row in rows]
    skipped = [row for row in checked if "skipped" in row]
    right = len(checked) - len(skipped) - sum("error" in row for row in checked)
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in found["environment"].items()), ""]
    lines += [f"Tests: {found['tests']['closing_line']}", ""]
    lines += [f"Persistent kernels against float64: {right} of {len(CHECKS)} cases right, {len(skipped)} have no plan.", ""]
    lines += [f"- not right: {problem}" for problem in problems(found, expected)] + [""]
    lines += ["One layer, one direction, input side included, eager, warm L2. Medians, in microseconds per time step.", ""]
    lines += [*benchmark_lines(found, expected["benchmark"]), "", "## Launches in a row", ""]
    for name, rows in found["stress"].items():
        last = [row for row in rows if "launches" in row][-1:] or [{"launches": 0, "other bits": 0}]
        lines.append(f"- {name}: {last[0]['launches']} launches, {last[0]['other bits']} calls with other bits than the first")
    lines += ["", "## rnnfast tune", ""]
    for name, rows in found["tuned"].items():
        for row in rows:
            result = row["error"] if "error" in row else f"{row['us/step']:.2f} us/step"
            lines.append(f"- {name}: {result}: {row['candidate']}")
    lines += ["", "## Kernels that ran", ""]
    for name, rows in found["benchmark"].items():
        lines += [f"- {name}: {', '.join(f'`{kernel}`' for kernel in row['kernels'])}" for row in rows if row["kernels"]]
    return "\n".join(lines) + "\n"
