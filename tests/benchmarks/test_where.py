"""The table of what runs where, which docs/choice.md shows."""

from pathlib import Path

from benchmarks import where

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_shows_what_the_models_say(capsys):
    """The page and the command do not drift apart."""
    assert where.main([]) == 0
    assert capsys.readouterr().out.strip() in (DOCS / "choice.md").read_text(encoding="utf-8")
