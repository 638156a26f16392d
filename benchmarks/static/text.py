"""The rows of `benchmarks.static` as text for people: one block an architecture, cell and dtype."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import jinja2

from benchmarks.static.table import PHASES

TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks.static"))


def _table(rows: list[dict[str, str]]) -> Iterator[str]:
    """Aligned columns under the keys of the rows: words to the left, figures to the right."""
    columns = {name: [name, *(row[name] for row in rows)] for name in rows[0]} if rows else {}
    for name, cells in columns.items():
        words = any(" " in cell or cell[:1].isalpha() for cell in cells[1:])
        width = max(map(len, cells))
        columns[name] = [cell.ljust(width) if words else cell.rjust(width) for cell in cells]
    for line in zip(*columns.values(), strict=True):
        yield "  ".join(line).rstrip()


def _groups(rows: Iterable[dict], *keys: str) -> Iterator[tuple[tuple, list[dict]]]:
    for values, group in itertools.groupby(rows, lambda row: tuple(row[key] for key in keys)):
        yield values, list(group)


def _list(values: Iterable[int]) -> str:
    return ",".join(map(str, sorted(set(values))))


def _kib(amount: int) -> str:
    return f"{amount / 1024:.0f}" if amount % 1024 == 0 or amount > 10240 else f"{amount / 1024:.1f}"


def _spilled(row: dict) -> bool:
    return bool(row["spills"] or row["stack_bytes"])


def _columns(macro: str, *values) -> dict[str, str]:
    """A line of a table: what a macro of lines.txt says for each column."""
    text = getattr(TEMPLATES.get_template("lines.txt").module, macro)(*values, _kib)
    return dict(line.split(" = ", 1) for line in text.splitlines())


def _arch(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


def _amd_kernel(rows: list[dict]) -> dict[str, str]:
    """The line of a kernel for an AMD GPU, which serves all of `rows`."""
    phases = dict.fromkeys(PHASES[each["direction"], each["training"]] for each in rows)
    sizes = [_list(each[name] for each in rows) for name in ("hidden", "batch")]
    return _columns("amd_kernel", rows[0], *sizes, ",".join(phases))


def _kernel(rows: list[dict]) -> dict[str, str]:
    """The line of a kernel, which serves all of `rows`."""
    row, phases = rows[0], dict.fromkeys(PHASES[each["direction"], each["training"]] for each in rows)
    bits = {next((part for part in code.split(".") if part.isdigit()), "32") for code in row["poll"].split(",")}
    sizes = [_list(each[name] for each in rows) for name in ("hidden", "batch")]
    return _columns("kernel", row, *sizes, ",".join(phases), _spilled(row), ",".join(sorted(bits)))


def terms_of(row: dict) -> dict[str, int]:
    """The terms of the predicted step in clocks, the largest first."""
    terms = {key.removeprefix("term_"): amount for key, amount in row.items() if key.startswith("term_")}
    return dict(sorted(terms.items(), key=lambda item: -item[1]))


def _step(row: dict, reasons: dict[str, int]) -> dict[str, str]:
    """The line of a step. `reasons` numbers why there is no plan."""
    note = reasons.setdefault(row["why_step"], len(reasons) + 1) if row["why_step"] else 0
    return _columns("step", row, note, terms_of(row))


def violations(rows: list[dict]) -> list[str]:
    """The faults of the rows: spills, weights read again although they stay on chip, products computed twice, more variants."""
    found = []
    for row in rows:
        wrong = [f"{row['stack_bytes']} bytes of stack, {row['spills']} spill accesses"] * _spilled(row)
        if row["family"] != "step" and row.get("weights_reread_bytes"):
            wrong.append(f"{row['weights_reread_bytes']} bytes of weights re-read")
        redundancy = row.get("redundancy", 1.0)  # which nothing counts for an AMD GPU, nor the bytes
        wrong += [f"redundancy {redundancy:.2f}"] * (redundancy > 1.05)
        wrong += [f"{row['variants']} variants"] * (row["variants"] > 1)
        if wrong:
            shape = f"{_arch(row['arch'])} {row['cell']} {row['dtype']} H={row['hidden']} B={row['batch']}"
            found.append(f"{shape} {row['family']} {PHASES[row['direction'], row['training']]}: {', '.join(wrong)}")
    return found


def show(rows: list[dict]) -> Iterator[str]:
    """The whole table, line by line."""
    for (arch, gpu, sms, cell, dtype), block in _groups(rows, "arch", "gpu", "sms", "cell", "dtype"):
        kernels: dict[str, list[dict]] = {}
        for row in block:
            kernels.setdefault(row["compiled"], []).append(row)
        reasons: dict[str, int] = {}
        yield from (f"== {_arch(arch)} ({gpu}, {sms} {'SMs' if isinstance(arch, int) else 'CUs'}), {cell} {dtype} ==", "")
        if isinstance(arch, str):
            yield from (*_table([_amd_kernel(group) for group in kernels.values()]), "")
            yield from (*{row["why_step"]: "" for row in block if row["why_step"]}, "")
            continue
        yield from (*_table([_kernel(group) for group in kernels.values()]), "")
        # inference stores less than training, and differs in nothing of this
        yield from _table([_step(row, reasons) for row in block if row["training"]])
        yield from (*(f"[{number}] {reason}" for reason, number in reasons.items()), "")
    wrong, kernels = violations(rows), {row["compiled"] for row in rows}
    head = f"{len(rows)} rows, {len(kernels)} kernels. "
    yield from (f"{head}Spills, weights re-read, redundancy over 1.05, variants: {len(wrong)} rows", *wrong)


def _range(rows: Iterable[dict], key: str, form: str = "") -> str:
    found = sorted(row[key] for row in rows)
    if not found:
        return "-"
    low, high = found[0], found[-1]
    return format(low, form) if low == high else f"{low:{form}} to {high:{form}}"


def _of(rows: list[dict], wrong: Callable[[dict], object]) -> str:
    count = sum(bool(wrong(row)) for row in rows)
    return f"{count} of {len(rows)}" if count else "0"


def _persistent_cells(rows: list[dict]) -> list[str]:
    """The cells of the summary for the persistent kernels of one architecture, cell and dtype."""
    found = [row for row in rows if row["family"] == "persistent"]
    line = []
    for direction in ("forward", "backward"):
        largest: dict[int, int] = {}  # H by B
        for row in found:
            if row["direction"] == direction and row["training"]:
                largest[row["batch"]] = max(row["hidden"], largest.get(row["batch"], 0))
        batches = sorted({16, max(largest, default=0)} & set(largest))
        line.append(", ".join(f"{largest[B]} (B={B})" for B in batches) or "none")
    if not found:
        return [*line, *["-"] * 8]
    spilled, reread = _of(found, _spilled), _of(found, lambda row: row["weights_reread_bytes"])
    line += [_range(found, "registers"), spilled, reread, _range(found, "redundancy", ".2f")]
    for key in itertools.product((768, 1024), (16,), ("forward", "backward"), (True,)):
        line += [
            f"{row['predicted_us']:.2f}" + " (step)" * (row["family"] == "step")
            for row in rows
            if (row["hidden"], row["batch"], row["direction"], row["training"]) == key
        ] or ["-"]
    return line


def summary(rows: list[dict], command: str) -> Iterator[str]:
    """The whole table, which `command` made, in short, as Markdown: a line an architecture, cell and dtype."""
    kernels = {row["compiled"]: row for row in rows}.values()
    seconds = sorted(row["compile_seconds"] for row in kernels if row["compile_seconds"] is not None)
    lines = [
        [gpu, f"{cell} {dtype}", *_persistent_cells(group)]
        for (gpu, cell, dtype), group in _groups(rows, "gpu", "cell", "dtype")
        if any(row["family"] == "persistent" or row["why_step"] for row in group)  # not of the step kernels alone
    ]
    held = violations([row for row in rows if row["family"] == "persistent"])
    notes = [line for line in held if "bytes" in line]  # bytes of stack, or of weights
    for (gpu,), group in _groups((row for row in rows if row["family"] == "step"), "gpu"):
        redundancy = _range((row for row in group if row["unit"] != "FFMA"), "redundancy", ".2f")
        notes.append(
            f"step kernels, {gpu}: {_range(group, 'registers')} registers, rows with spills {_of(group, _spilled)}, "
            f"redundancy {redundancy}"
        )
    values = {"rows": len(rows), "kernels": len(kernels), "seconds": seconds, "lines": lines, "notes": notes}
    yield from TEMPLATES.get_template("summary.md").render(command=command, **values).splitlines()


def amd_summary(rows: list[dict], command: str) -> Iterator[str]:
    """The kernels for AMD GPUs of training as Markdown, a line each, of the rows that `command` made. Inference stores less."""
    kernels: dict[tuple, list[dict]] = {}
    for row in rows:
        kernels.setdefault((row["gpu"], f"{row['cell']} {row['dtype']}", row["compiled"]), []).append(row)
    lines = [
        {"GPU": gpu, "cell, dtype": kind} | _amd_kernel(group)
        for (gpu, kind, _), group in kernels.items()
        if group[0]["training"]
    ]
    yield from (f"`{command}`: {len(rows)} rows, {len(kernels)} kernels, rows with spills: {len(violations(rows))}.", "")
    for line in (list(lines[0]), ["---"] * len(lines[0]), *(list(each.values()) for each in lines)):
        yield f"| {' | '.join(line)} |"


def put(text: str, heading: str, lines: Iterable[str]) -> str:
    """`text` of a Markdown file with `lines` below `heading`, instead of what was there. ValueError if there is no heading."""
    before, found, after = f"\n{text}".partition(f"\n{heading}\n")
    if not found:
        raise ValueError(f"there is no line {heading!r}")
    _, next_heading, rest = after.partition("\n#")
    return "\n".join([before[1:], heading, "", *lines, ""]).lstrip("\n") + next_heading + rest


def show_terms(rows: list[dict]) -> Iterator[str]:
    """The predicted step of each row in training, term by term, and what would halve the largest term."""
    for row in (row for row in rows if row["training"]):
        clocks = row["predicted_clocks"]
        lines = [
            {"term": name, "clocks": str(n), "us": f"{row['predicted_us'] * n / clocks:.2f}", "%": f"{100 * n / clocks:.0f}"}
            for name, n in (terms_of(row) | {"total": clocks}).items()
        ]
        values = {"row": row, "table": "\n".join(_table(lines)), "largest": next(iter(terms_of(row)))}
        yield TEMPLATES.get_template("terms.txt").render(values) + "\n"
