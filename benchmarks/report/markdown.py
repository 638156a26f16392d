"""The report as Markdown: the tables of the page, without its charts."""

from __future__ import annotations

from benchmarks.report.tables import Table

__all__ = ["render"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(table: Table) -> list[str]:
    lines = [f"## {table.heading}", ""]
    if table.intro:
        lines += [table.intro, ""]
    if not table.rows:
        return [*lines, "None.", ""]
    lines.append(f"| {' | '.join(table.columns)} |")
    lines.append("|" + "|".join("--:" if number in table.numbers else "---" for number in range(len(table.columns))) + "|")
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
    return [*lines, ""]


def render(title: str, lead: str, tables: list[Table]) -> str:
    return "\n".join([f"# {title}", "", lead, "", *(line for table in tables for line in _table(table))])
