"""The rows of `benchmarks.static` as text for people: one block an architecture, cell and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from benchmarks.static.table import PHASES


def _table(head: list[str], lines: Iterable[list[str]]) -> Iterator[str]:
    """Aligned columns: words to the left, figures to the right."""
    lines = list(lines)
    widths = [max(len(line[at]) for line in [head, *lines]) for at in range(len(head))]
    left = [any(" " in line[at] or line[at][:1].isalpha() for line in lines) for at in range(len(head))]
    for line in [head, *lines]:
        cells = [
            cell.ljust(width) if words else cell.rjust(width) for cell, width, words in zip(line, widths, left, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _list(values: Iterable[int]) -> str:
    return ",".join(map(str, sorted(set(values))))


def _kib(amount: int) -> str:
    return f"{amount / 1024:.0f}" if amount % 1024 == 0 or amount > 10240 else f"{amount / 1024:.1f}"


def _tile(row: dict) -> str:
    parts = f"shared by {row['parts']}, " if row["parts"] > 1 else ""
    parts += f"{row['split']} parts, " if row["split"] > 1 else ""
    return f"{row['block_h']} x {row['block_b']}, {parts}chunks {row['block_k']}, {row['warps']} warps"


def _poll(row: dict) -> str:
    """Bits of an instruction that polls: 128 is the widest."""
    widths = {next((part for part in opcode.split(".") if part.isdigit()), "32") for opcode in row["poll"].split(",")}
    return ",".join(sorted(widths)) if row["poll"] else "-"


def _seconds(row: dict) -> str:
    return "cached" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}"


def _kernels(rows: list[dict]) -> Iterator[str]:
    head = ["H", "B", "kernel", "tile: units x rows", "registers", "spills", "shared KiB", "per SM"]
    head += ["instructions", "barriers", "tensor core", "poll bits", "compile s"]
    lines = []
    same = {}
    for row in rows:
        same.setdefault(row["compiled"], []).append(row)
    for group in same.values():
        row = group[0]
        phases = dict.fromkeys(PHASES[each["direction"], each["training"]] for each in group)
        spilled = row["spills"] + row["stack_bytes"]
        lines.append(
            [
                _list(each["hidden"] for each in group),
                _list(each["batch"] for each in group),
                f"{row['family']} {','.join(phases)}",
                _tile(row),
                str(row["registers"]),
                f"{row['stack_bytes']} B" if spilled else "0",
                _kib(row["shared_bytes"]),
                str(row["resident_programs"]),
                f"{row['instructions']}+{row['retry_instructions']}" if row["polls"] else str(row["instructions"]),
                f"{row['barriers']}+{row['retry_barriers']}" if row["polls"] else str(row["barriers"]),
                f"{row['unit']} {row['tensor_core_loop']}" if row["tensor_core_loop"] else "-",
                _poll(row),
                _seconds(row),
            ]
        )
    yield from _table(head, lines)


def terms_of(row: dict) -> dict[str, int]:
    """The terms of the predicted step in clocks, the largest first."""
    terms = {key.removeprefix("term_"): amount for key, amount in row.items() if key.startswith("term_")}
    return dict(sorted(terms.items(), key=lambda item: -item[1]))


def _shares(row: dict) -> str:
    total = sum(terms_of(row).values())
    return " ".join(f"{name} {100 * amount / total:.0f}" for name, amount in terms_of(row).items())


def _steps(rows: list[dict]) -> Iterator[str]:
    head = ["H", "B", "direction", "family", "programs", "launches", "tensor core", "least", "redundancy", "re-read KiB"]
    head += ["gathered KiB", "L2 trips", "us", "predicted share of each term, %"]
    lines, reasons = [], {}
    for row in rows:
        if not row["training"]:
            continue  # inference stores less than training, and differs in nothing of this
        note = ""
        if row["why_step"]:
            note = f" [{reasons.setdefault(row['why_step'], len(reasons) + 1)}]"
        lines.append(
            [
                str(row["hidden"]),
                str(row["batch"]),
                row["direction"],
                row["family"] + note,
                f"{row['programs']}/{row['sms']}",
                f"{row['launches']:g}",
                str(row["tensor_core"] or "-"),
                str(row["tensor_core_least"] or "-"),
                f"{row['redundancy']:.2f}",
                _kib(row["weights_reread_bytes"]),
                _kib(row["gathered_bytes"]),
                str(row["round_trips"]),
                f"{row['predicted_us']:.2f}",
                _shares(row),
            ]
        )
    yield from _table(head, lines)
    for reason, number in reasons.items():
        yield f"[{number}] {reason}"


def violations(rows: list[dict]) -> list[str]:
    """What should not be: spills, weights loaded again by a persistent kernel, products computed twice, variants."""
    found = []
    for row in rows:
        wrong = []
        if row["spills"] or row["stack_bytes"]:
            wrong.append(f"{row['stack_bytes']} bytes of stack, {row['spills']} spill accesses")
        if row["family"] == "persistent" and row["weights_reread_bytes"]:
            wrong.append(f"{row['weights_reread_bytes']} bytes of weights re-read")
        if row["redundancy"] > 1.05:
            wrong.append(f"redundancy {row['redundancy']:.2f}")
        if row["variants"] > 1:
            wrong.append(f"{row['variants']} variants")
        if wrong:
            shape = f"sm_{row['arch']} {row['cell']} {row['dtype']} H={row['hidden']} B={row['batch']}"
            found.append(f"{shape} {row['family']} {PHASES[row['direction'], row['training']]}: {', '.join(wrong)}")
    return found


def show(rows: list[dict]) -> Iterator[str]:
    """The whole table, line by line."""
    for (arch, gpu, sms), of_arch in itertools.groupby(rows, lambda row: (row["arch"], row["gpu"], row["sms"])):
        for (cell, dtype), block in itertools.groupby(of_arch, lambda row: (row["cell"], row["dtype"])):
            block = list(block)
            yield f"== sm_{arch} ({gpu}, {sms} SMs), {cell} {dtype} =="
            yield ""
            yield from _kernels(block)
            yield ""
            yield from _steps(block)
            yield ""
    wrong = violations(rows)
    kernels = len({row["compiled"] for row in rows})
    yield f"{len(rows)} rows, {kernels} kernels. Spills, weights re-read, redundancy over 1.05, variants: {len(wrong)} rows"
    yield from wrong


def _range(values: Iterable[float], form: str = "") -> str:
    found = sorted(values)
    if not found:
        return "-"
    low, high = found[0], found[-1]
    return format(low, form) if low == high else f"{low:{form}} to {high:{form}}"


def _of(wrong: list, rows: list) -> str:
    return f"{len(wrong)} of {len(rows)}" if wrong else "0"


def _persistent_line(rows: list[dict]) -> list[str]:
    """Of one architecture, cell and dtype."""
    found = [row for row in rows if row["family"] == "persistent"]
    line = []
    for direction in ("forward", "backward"):
        largest: dict[int, int] = {}  # of a batch size
        for row in found:
            if row["direction"] == direction and row["training"]:
                largest[row["batch"]] = max(row["hidden"], largest.get(row["batch"], 0))
        batches = sorted({16, max(largest, default=0)} & set(largest))
        line.append(", ".join(f"{largest[B]} (B={B})" for B in batches) or "none")
    if not found:
        return [*line, *["-"] * 8]
    line += [
        _range(row["registers"] for row in found),
        _of([row for row in found if row["spills"] or row["stack_bytes"]], found),
        _of([row for row in found if row["weights_reread_bytes"]], found),
        _range((row["redundancy"] for row in found), ".2f"),
    ]
    for hidden in (768, 1024):
        for direction in ("forward", "backward"):
            line += [
                f"{row['predicted_us']:.2f}" + ("" if row["family"] == "persistent" else " (step)")
                for row in rows
                if (row["hidden"], row["batch"], row["direction"], row["training"]) == (hidden, 16, direction, True)
            ] or ["-"]
    return line


def summary(rows: list[dict], command: str) -> Iterator[str]:
    """The whole table, which `command` made, in short, as Markdown: a line an architecture, cell and dtype."""
    kernels = {row["compiled"]: row for row in rows}.values()
    seconds = sorted(row["compile_seconds"] for row in kernels if row["compile_seconds"] is not None)
    yield f"`{command}`: {len(rows)} rows, {len(kernels)} kernels."
    if seconds:
        yield (
            f"The first call waits for the compiler, a kernel: {seconds[len(seconds) // 2]:.1f} seconds of a CPU in the "
            f"median of {len(seconds)}, {seconds[-1]:.1f} at the most."
        )
    yield ""
    head = ["GPU", "cell, dtype", "largest H, forward", "backward", "registers", "spills", "re-read", "redundancy"]
    head += [f"{hidden} {way}" for hidden in (768, 1024) for way in ("forward", "backward")]
    yield f"| {' | '.join(head)} |"
    yield "|---|---|---|---" + "|--:" * (len(head) - 4) + "|"
    for (gpu, cell, dtype), group in itertools.groupby(rows, lambda row: (row["gpu"], row["cell"], row["dtype"])):
        group = list(group)
        if any(row["family"] == "persistent" or row["why_step"] for row in group):  # not of the step kernels alone
            yield f"| {' | '.join([gpu, f'{cell} {dtype}', *_persistent_line(group)])} |"
    held = violations([row for row in rows if row["family"] == "persistent"])
    notes = [f"- {line}" for line in held if "bytes" in line]  # of stack, or of weights
    step = [row for row in rows if row["family"] == "step"]
    for gpu, group in itertools.groupby(step, lambda row: row["gpu"]):
        group = list(group)
        spilled = _of([row for row in group if row["spills"] or row["stack_bytes"]], group)
        registers = _range(row["registers"] for row in group)
        redundancy = _range((row["redundancy"] for row in group if row["unit"] != "FFMA"), ".2f")
        notes.append(f"- step kernels, {gpu}: {registers} registers, rows with spills {spilled}, redundancy {redundancy}")
    if notes:
        yield ""
        yield from notes


def put(text: str, heading: str, lines: Iterable[str]) -> str:
    """`text` of a Markdown file with `lines` below `heading`, instead of what was there.

    Raises:
        ValueError: the heading is not there.
    """
    before, found, after = f"\n{text}".partition(f"\n{heading}\n")
    if not found:
        raise ValueError(f"there is no line {heading!r}")
    _, next_heading, rest = after.partition("\n#")
    return "\n".join([before[1:], heading, "", *lines, ""]).lstrip("\n") + next_heading + rest


def _to_halve(row: dict, term: str) -> str:
    """What would halve a term of the predicted step, in words."""
    more = f"twice the programs, {2 * row['programs']} where there are {row['sms']} SMs"
    words = {
        "hop": "a shorter way between SMs than L2, such as the shared memory of a cluster; no choice of tiles does it",
        "gather": (
            "half as many bytes through L2: half as many programs that each gather all, or programs that gather a part"
            if row["gather_bound"] == "l2"
            else f"half as many batch rows a program, and so {more}"
        ),
        "product": (
            f"half as much for a program to read from shared memory: half its units, and so {more}, or weights in registers"
            if row["product_bound"] == "shared memory"
            else "accumulators that wait less for one another: another tile, of more warps or more accumulators a warp"
        ),
        "second_hop": "one program a unit's sum, which gathers all of what it sums over",
        "second_gather": "fewer programs that share a unit's sum",
        "partials": "half as many parts of the sum, or half as many rows of the tile",
        "barriers": "chunks twice as wide, or fewer changes of layout",
        "issue": "half as many instructions on the way from the poll to the store: more warps, each with fewer words and cells",
        "host": "launching from a CUDA graph, or several steps a launch: the persistent kernels",
        "start": "several steps a launch: the persistent kernels",
        "trips": "twice as many chunks in flight, or chunks twice as wide",
        "loads": "weights that stay on chip, the persistent kernels, or fewer programs that load the same",
    }
    return words[term]


def show_terms(rows: list[dict]) -> Iterator[str]:
    """The predicted step of each row in training, term by term."""
    for row in rows:
        if not row["training"]:
            continue
        clocks = row["predicted_clocks"]
        yield f"{row['gpu']}, {row['cell']} {row['dtype']}, H={row['hidden']}, B={row['batch']}, {row['direction']}"
        yield f"{row['family']} kernel, {row['plan']}" + (f" ({row['why_step']})" if row["why_step"] else "")
        lines = [
            [name, str(amount), f"{row['predicted_us'] * amount / clocks:.2f}", f"{100 * amount / clocks:.0f}"]
            for name, amount in (terms_of(row) | {"total": clocks}).items()
        ]
        yield from _table(["term", "clocks", "us", "%"], lines)
        largest = next(iter(terms_of(row)))
        yield f"What would halve the largest term, {largest}: {_to_halve(row, largest)}."
        yield ""
