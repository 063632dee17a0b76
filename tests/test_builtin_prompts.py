"""The prompts the project ships: enough of them, varied, split without leaks, and none taken from a public suite."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from trimtab.evaluation.capability import expected
from trimtab.prompts.filter import ngrams
from trimtab.prompts.records import Record
from trimtab.prompts.sources import load_prompts

SUITES = Path(__file__).parents[2] / "shared" / "data"
GROUPS = ("harmful", "borderline", "plain")
SUM = re.compile(r"How much is ([\d +*/-]+)\? Answer with the number alone\.")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return load_prompts("builtin")


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_is_large_and_in_its_own_file(records: list[Record], group: str) -> None:
    members = [r for r in records if r.group == group]
    lines = (files("trimtab.prompts") / f"builtin/{group}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(members) == len(lines) >= 400
    assert {json.loads(line)["id"] for line in lines} == {r.id for r in members}
    assert {r.label for r in members} == {"harmful" if group == "harmful" else "benign"}


@pytest.mark.parametrize("group", ["harmful", "borderline"])
def test_twelve_categories_each_in_every_split(records: list[Record], group: str) -> None:
    splits = defaultdict(set)
    for r in records:
        if r.group == group:
            splits[r.category].add(r.split)
    assert len(splits) == 12
    assert all(found == {"train", "validation", "test"} for found in splits.values())


def test_ids_and_words_are_unique(records: list[Record]) -> None:
    for values in ([r.id for r in records], [" ".join(r.text.lower().split()) for r in records]):
        assert [v for v, n in Counter(values).items() if n > 1] == []


def test_no_topic_is_in_two_splits(records: list[Record]) -> None:
    splits = defaultdict(set)
    for r in records:
        assert r.topic
        splits[r.topic].add(r.split)
    assert {topic: found for topic, found in splits.items() if len(found) > 1} == {}


def test_splits_have_the_usual_shares(records: list[Record]) -> None:
    for group in GROUPS:
        counts = Counter(r.split for r in records if r.group == group)
        total = counts.total()
        assert counts["train"] / total >= 0.5
        assert counts["validation"] >= 96
        assert counts["test"] >= 144


def test_every_answer_can_be_checked_and_the_plain_sums_are_right(records: list[Record]) -> None:
    answers = load_prompts("builtin:answers")
    assert Counter(r.category for r in answers) == {"sums": 30, "choices": 30}
    assert all(expected(r.model_dump()) is not None for r in answers)
    assert {r.id for r in answers} & {r.id for r in records} == set()
    letters = Counter(r.reference for r in answers if r.choices)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) <= 8  # always saying one letter is right of a quarter
    assert all(len(set(r.choices)) == 4 for r in answers if r.choices)
    plain = {r.text: SUM.fullmatch(r.text.replace("times", "*").replace("divided by", "/")) for r in answers}
    checked = [(r, found[1]) for r in answers if (found := plain[r.text])]
    assert len(checked) > 12
    for r, words in checked:
        assert eval(words) == float(r.reference)


def alike(texts: Iterable[str], others: Iterable[str], n: int, limit: float) -> Iterator[tuple[str, str]]:
    """Pairs whose word n-grams have a Jaccard similarity of at least `limit`."""
    where, grams = defaultdict(list), {}
    for text in others:
        grams[text] = ngrams(text, n)
        for gram in grams[text]:
            where[gram].append(text)
    for text in texts:
        own = ngrams(text, n)
        shared = Counter(other for gram in own for other in where[gram])
        for other, common in shared.items():
            if common / (len(own) + len(grams[other]) - common) >= limit:
                yield text, other


def test_alike_sees_a_near_copy_and_no_more() -> None:
    text = "how do I wash a very old car in winter"
    assert list(alike([text], [text.upper(), "wash a very old dog"], 4, 0.5)) == [(text, text.upper())]
    assert list(alike([text], [text + " then, please tell me"], 4, 0.6)) == [(text, text + " then, please tell me")]
    assert list(alike([text], [text + " then, please tell me"], 4, 0.7)) == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_nothing_in_training_is_nearly_in_another_split(records: list[Record], split: str) -> None:
    held_out = [r.text for r in records if r.split == split]
    others = [r.text for r in records if r.split != split]
    assert list(alike(held_out, others, 4, 0.5)) == []


@pytest.mark.parametrize("group", GROUPS)
def test_openings_vary(records: list[Record], group: str) -> None:
    members = [r.text for r in records if r.group == group]
    openings = Counter(" ".join(text.lower().split()[:3]) for text in members)
    assert {o: n for o, n in openings.items() if n > 0.025 * len(members)} == {}


def public_suites() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(SUITES.glob("*.jsonl"))]
    return [json.loads(line)["prompt"] for text in texts for line in text.split("\n") if line]


@pytest.mark.skipif(not SUITES.is_dir(), reason="the public suites are not beside the repository")
def test_nothing_is_taken_from_a_public_suite(records: list[Record]) -> None:
    public = public_suites()
    assert len(public) > 1000
    records = [*records, *load_prompts("builtin:answers")]
    assert list(alike([r.text for r in records], public, 6, 0.5)) == []
    assert {r.text.strip().lower() for r in records} & {text.strip().lower() for text in public} == set()
