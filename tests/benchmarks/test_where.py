"""The tables of predictions, which docs/choice.md and docs/results.md show."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import where

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    "page, options",
    [("choice.md", []), ("choice.md", ["--stacks"]), ("results.md", ["--faster", "--gpu", "H100", "A100"])],
)
def test_the_pages_show_what_the_models_say(page, options, capsys):
    """A page and the command do not drift apart."""
    assert where.main(options) == 0
    caption, _, tables = capsys.readouterr().out.partition("\n\n")
    assert caption.startswith("Predicted, not measured. ") and tables.strip() in (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", where.STACK_GPUS)
@pytest.mark.parametrize("number", where.STACKS)
def test_terms_of_stacks(number, name):
    """Groups take less than one member after another, in each term but the products; training has what inference has."""
    shape = where.STACKS[number]
    for training in (False, True):
        trained = replace(shape, training=training)
        (alone, _), (grouped, runs) = (where.stack(trained, name, how) for how in (False, True))
        assert sum(grouped.values()) < sum(alone.values()) * (0.5 if shape.directions == 1 else 0.65)
        assert len(runs) == 1 + training and (grouped["gradients"] > 0) == training
        assert grouped["steps"] < alone["steps"] and grouped["call"] == alone["call"]
        inference, _ = where.stack(shape, name, True)
        assert all(inference[term] <= grouped[term] for term in where.TERMS)
