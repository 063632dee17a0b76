"""What the documents say of the code is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.evaluation.catalogue import CATALOGUE

ROOT = Path(__file__).parents[1]
PAGE, _, FAITHFULNESS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("## Faithfulness")


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table that begins with this heading."""
    table = text[text.index(f"| {heading} |") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("row", rows(FAITHFULNESS, "method"), ids=lambda row: row[0])
def test_every_function_of_the_faithfulness_page_is_where_it_says(row: list[str]) -> None:
    named = re.findall(r"`([\w/]+\.py): ([\w, ]+)`", row[3])
    assert named
    assert len(named) == row[3].count(".py")
    for file, names in named:
        text = (ROOT / file if file.startswith("recipes/") else ROOT / "src" / "trimtab" / file).read_text(
            encoding="utf-8"
        )
        for name in names.split(", "):
            assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"{file}: {name}"


def test_the_suites_are_those_of_the_catalogue() -> None:
    said = {row[0].strip("`"): row[1:] for row in rows(PAGE, "suite")}
    assert list(said) == list(CATALOGUE)
    for name, (measures, licence, where) in said.items():
        known = CATALOGUE[name]
        assert measures.removesuffix(" (gated)") == known.measures
        assert measures.endswith("(gated)") == known.gated
        assert licence == known.licence
        assert where in known.source
