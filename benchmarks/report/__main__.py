"""`python -m benchmarks.report FILE [FILE] [--out DIR]`: one results file as a page and a table, or two as before and after."""

import argparse
import sys
from pathlib import Path

from benchmarks.report import page, tables
from benchmarks.report.facts import Facts
from benchmarks.timing import results

LOSSES = "rnnfast slower than torch.nn in at least one way of calling, the worst first. Medians (20th to 80th percentile)."
WINS = "rnnfast as fast as torch.nn, or faster, in every way of calling, the least first."
THE_OTHERS = "Everybody else beside torch.nn, the slowest first."


def all_tables(facts: Facts, before: Facts | None) -> dict:
    """The tables before and after the charts."""
    ours = [entry for entry in facts.compared if entry.ours and entry.verdict(entry.worst) in tables.DECIDED]
    undecided = [entry for entry in facts.compared if entry.ours and entry not in ours]
    others = [entry for entry in facts.compared if not entry.ours]
    first = tables.change_tables(before, facts) if before else []
    first += [
        tables.summary_table(facts),
        tables.comparison_table(facts, "Where it loses", LOSSES, (entry for entry in ours if entry.worst.p50 < 1)),
        tables.comparison_table(facts, "Where it wins", WINS, (entry for entry in ours if entry.worst.p50 >= 1)),
        tables.comparison_table(facts, "Without a verdict", tables.NO_VERDICT, undecided, shown=0),
        tables.failure_table(facts),
        tables.comparison_table(facts, "The other providers", THE_OTHERS, others, shown=0),
    ]
    known = filter(None, [tables.published_table(facts), tables.floor_table(facts)])
    last = [tables.memory_table(facts), *known, tables.row_table(facts), tables.environment_table(facts)]
    return {"first": first, "last": last}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", help="a results file; with a second one, the state before")
    parser.add_argument("after", nargs="?", help="the state after")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder for report.html and report.md")
    args = parser.parse_args(argv)
    try:
        loaded = [Facts(results.load(path)) for path in (args.file, args.after) if path]
        args.out.mkdir(parents=True, exist_ok=True)
        before, facts = loaded if args.after else (None, loaded[0])
        title = f"rnnfast benchmark: {facts.title}" + (", before and after" if before else "")
        html, text = page.render(facts, title, all_tables(facts, before))
        (args.out / "report.html").write_text(html, encoding="utf-8")
        (args.out / "report.md").write_text(text, encoding="utf-8")
    except (OSError, results.BadResults) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written: {args.out / 'report.html'}, {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
