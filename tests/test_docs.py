"""What the documents say of the code is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("## Faithfulness")[2]
ROWS = [line.strip("|").split("|") for line in TABLE.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
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
