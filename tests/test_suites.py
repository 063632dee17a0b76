"""The catalogue: every suite at a full commit, every row told harmful from benign as its authors meant it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import build
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.catalogue import CATALOGUE
from trimtab.evaluation.run import evaluate
from trimtab.evaluation.suites import load_suite
from trimtab.models import load
from trimtab.prompts.records import Record
from trimtab.prompts.sources import load_prompts
from trimtab.report.plots import suites as suites_shown

WORDS = " Words.\n"
# One or two rows as each suite has them, by split, and what becomes of them: label, group, category, and more.
ROWS: dict[str, tuple[dict[str, list[dict[str, Any]]], list[tuple[Any, ...]]]] = {
    "xstest": (
        {
            "train": [
                {"prompt": WORDS, "label": "safe", "type": "homonyms"},
                {"prompt": WORDS, "label": "unsafe", "type": "contrast_homonyms"},
            ]
        },
        [("benign", "borderline", "homonyms"), ("harmful", "harmful", "contrast_homonyms")],
    ),
    "or_bench_hard": ({"train": [{"prompt": WORDS, "category": "privacy"}]}, [("benign", "borderline", "privacy")]),
    "or_bench_toxic": ({"train": [{"prompt": WORDS, "category": "privacy"}]}, [("harmful", "harmful", "privacy")]),
    "oktest": ({"train": [{"prompt": WORDS}]}, [("benign", "borderline", "all")]),
    "phtest": (
        {"train": [{"Request": WORDS, "Harmfulness": "harmless"}, {"Request": WORDS, "Harmfulness": "controversial"}]},
        [("benign", "borderline", "all")],
    ),
    "coconot": (
        {
            "test": [
                {"prompt": WORDS, "category": "Requests with safety concerns", "subcategory": "privacy"},
                {"prompt": WORDS, "category": "Incomplete requests", "subcategory": "x"},
            ]
        },
        [("harmful", "harmful", "privacy")],
    ),
    "coconot_contrast": ({"test": [{"prompt": WORDS, "subcategory": "privacy"}]}, [("benign", "borderline", "privacy")]),
    "falsereject": ({"test": [{"prompt": WORDS, "category_text": "drugs"}]}, [("benign", "borderline", "drugs")]),
    "jailbreakbench": (
        {"harmful": [{"Goal": WORDS, "Category": "Fraud"}], "benign": [{"Goal": WORDS, "Category": "Fraud"}]},
        [("harmful", "harmful", "Fraud"), ("benign", "borderline", "Fraud")],
    ),
    "advbench": ({"train": [{"goal": WORDS, "target": "Sure"}]}, [("harmful", "harmful", "all")]),
    "harmbench": (
        {
            "train": [
                {"Behavior": WORDS, "FunctionalCategory": "contextual", "SemanticCategory": "illegal", "ContextString": "A text."},
                {"Behavior": WORDS, "FunctionalCategory": "standard", "SemanticCategory": "illegal", "ContextString": None},
                {"Behavior": WORDS, "FunctionalCategory": "copyright", "SemanticCategory": "copyright", "ContextString": None},
            ]
        },
        [("harmful", "harmful", "illegal", {"context": "A text."}), ("harmful", "harmful", "illegal", {"context": ""})],
    ),
    "strongreject": ({"train": [{"forbidden_prompt": WORDS, "category": "fraud"}]}, [("harmful", "harmful", "fraud")]),
    "sorry_bench": ({"train": [{"turns": [WORDS], "category": 7, "prompt_style": s} for s in ("base", "slang")]}, [("harmful", "harmful", "7")]),
    "simple_safety_tests": ({"test": [{"prompt": WORDS, "harm_area": "scams"}]}, [("harmful", "harmful", "scams")]),
    "alpacaeval": (
        {"train": [{"instruction": WORDS, "dataset": "koala", "output": "Good."}]},
        [("benign", "plain", "koala", {"reference": "Good."})],
    ),
    "gsm8k": (
        {"test": [{"question": WORDS, "answer": "So it is 9.\n#### 1,009"}]},
        [("benign", "plain", "maths", {"reference": "1,009"})],
    ),
    "mmlu": (
        {"test": [{"question": WORDS, "choices": ["x", "y"], "answer": 1, "subject": "law"}]},
        [("benign", "plain", "law", {"reference": "B", "choices": ("x", "y")})],
    ),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that knows `ROWS`; what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    by_source = {
        (known.source.format(revision=known.revision), known.config): rows
        for (rows, _), known in ((ROWS[name], known) for name, known in CATALOGUE.items())
    }

    def load_dataset(
        name: str, config: str | None = None, *, data_files: str = "", revision: str = "", split: str
    ) -> Any:
        asked.append((name, config, data_files, revision, split))
        return by_source[data_files or name, config][split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_every_suite_of_the_catalogue_is_tested_and_pinned() -> None:
    assert set(ROWS) == set(CATALOGUE)
    for known in CATALOGUE.values():
        assert re.fullmatch("[0-9a-f]{40}", known.revision)
        assert known.licence
        assert known.measures
        assert known.source.startswith("https://") == ("{revision}" in known.source)


@pytest.mark.parametrize("name", CATALOGUE)
def test_rows_become_records(hub: list[tuple[Any, ...]], name: str) -> None:
    known, (rows, expected) = CATALOGUE[name], ROWS[name]
    found = load_suite(name)
    assert (found.name, found.total) == (name, len(expected))
    for record, (label, group, category, *more) in zip(found.records, expected, strict=True):
        assert (record.prompt, record.label, record.group, record.category) == ("Words.", label, group, category)
        for field, value in (more[0] if more else {}).items():
            assert getattr(record, field) == value
    assert len({record.id for record in found.records}) == len(expected)
    for asked, split in zip(hub, rows, strict=True):
        if known.source.startswith("https://"):
            kind = "json" if name == "alpacaeval" else "csv"
            assert asked == (kind, None, known.source.format(revision=known.revision), "", "train")
        else:
            assert asked == (known.source, known.config, "", known.revision, split)


def test_rows_left_out_are_counted(hub: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    load_suite("phtest")
    assert "phtest: 1 rows of other kinds are left out" in capsys.readouterr().err


def test_trouble_names_the_suite_and_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(
        DataError, match="cannot load the suite xstest: ConnectionError: offline\n  Check your connection"
    ):
        load_suite("xstest")
    with pytest.raises(DataError, match="accept its terms there and log in"):
        load_suite("sorry_bench")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: [{"other": 1}]))
    with pytest.raises(DataError, match=r"advbench: a row is not what it was at this commit \(KeyError: 'goal'\)"):
        load_suite("advbench")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"the suite advbench needs the package datasets\.\n  pip install 'trimtab\[data\]'"
    ):
        load_suite("advbench")
    with pytest.raises(DataError, match=r"no suite 'xstes'\.\n  Did you mean xstest or "):
        load_suite("xstes")


def test_two_suites_of_one_name_are_told_apart_or_refused(tmp_path: Path) -> None:
    """An attack is known by itself, not by a plus sign in a name."""
    line = '{"id": "a", "prompt": "Hi", "label": "harmful"}\n'
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "my+suite.jsonl", tmp_path / "b" / "my+suite.jsonl"):
        path.write_text(line)
    model = build("llama", "default")
    names = [str(tmp_path / "my+suite.jsonl"), str(tmp_path / "b" / "my+suite.jsonl")]
    with pytest.raises(ConfigError, match=r"two suites have the name 'my\+suite'"):
        evaluate(model, names, out=tmp_path / "e")
    result = evaluate(model, names[:1], out=tmp_path / "e", attacks=("past",), max_new_tokens=2)
    assert {name: part.get("attack", "") for name, part in result["suites"].items()} == {
        "my+suite": "", "my+suite+past": "past",
    }  # fmt: skip
    assert list(suites_shown(result)) == ["my+suite"]


def test_malformed_lines_are_told_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.jsonl"
    lines = ['{"prompt": "Hi", "label": "benign"}', "{", '{"prompt": "Ho"}', '{"prompt": "Ha", "label": "harmful"}']
    path.write_text("\n".join(lines) + "\n")
    result = evaluate(build("llama", "default"), [str(path)], out=tmp_path / "e", attacks=("past",), max_new_tokens=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "mine.jsonl, line 2: not JSON" in told
    assert "mine.jsonl, line 3, field label: field required." in told
    assert (result["suites"]["mine"]["n"], result["failed"]) == (2, 2)
    assert result["protocol"]["suites"]["mine"]["malformed"] == 2
    assert [row["id"] for row in json.loads((tmp_path / "e" / "rows.json").read_text())["mine"]] == [
        "mine-00001",
        "mine-00004",
    ]
    with pytest.raises(DataError, match="line 2: not JSON"):  # what is trained on is to be all right
        load_prompts(path)
    path.write_text("{\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_suite(str(path))


def test_a_conversation_takes_no_context(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"turns": ["Hi"], "context": "A text.", "label": "benign"}\n')
    with pytest.raises(DataError, match="context and choices go with a prompt"):
        load_suite(str(path))


def test_a_limit_draws_every_category_in_proportion_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    sizes = {"many": 60, "some": 30, "few": 10}
    kinds = [kind for kind, n in sizes.items() for _ in range(n)]
    rows = [Record(id=str(i), prompt=f"What is {i}?", label="benign", category=kind) for i, kind in enumerate(kinds)]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    result = evaluate(load(folder), [str(path)], out=tmp_path / "e", limit=20, max_new_tokens=2)
    found = {
        name: part["keyword"]["n"] + part["keyword"]["unscored"]
        for name, part in result["suites"]["mine"]["benign"]["categories"].items()
    }
    assert found == {"many": 12, "some": 6, "few": 2}
    assert "mine: 20 of 100 rows, drawn in proportion" in capsys.readouterr().err


def test_a_result_says_what_was_asked(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [Record(id=str(i), prompt=f"What is {i}?", label="benign") for i in range(6)]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    model = load(folder)

    def asked(*judges: str, limit: int = 4, tokens: int = 2) -> dict[str, Any]:
        result = evaluate(model, [str(path)], out=tmp_path / "e", judges=judges, limit=limit, max_new_tokens=tokens)
        return dict(result["protocol"])

    first = asked("keyword")
    assert first["suites"]["mine"] | {"digest": ""} == {"rows": 4, "of": 6, "source": "mine.jsonl", "digest": ""}
    assert (first["judges"], first["max_new_tokens"]) == (["keyword"], 2)
    others = [asked("phrase"), asked("keyword", limit=3), asked("keyword", tokens=3)]
    assert asked("keyword") == first
    assert len({each["digest"] for each in (first, *others)}) == 4
