"""Hard weighting: each rule drops what it should, counts it, and is named where it leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trimtab.errors import FilterError
from trimtab.prompts.filter import Rule, filter_samples, funnel, ngrams
from trimtab.prompts.records import Record, Sample

REFUSAL, ANSWER = "I can't help with that.", "Here is how it goes."
NAMES = ["label agreement", "behaviour", "target", "duplicates", "balance"]


def sample(
    name: str, label: str = "benign", *, score: float | None = None, target: str | None = None, **fields: Any
) -> Sample:
    """Clear by default: harmful is refused, benign is answered."""
    harmful = label == "harmful"
    record = Record(
        **{"id": name, "prompt": name, "label": label, "group": "harmful" if harmful else "plain", **fields}
    )
    return Sample(
        record,
        (3.0 if harmful else -3.0) if score is None else score,
        (REFUSAL if harmful else ANSWER) if target is None else target,
        True,
    )


CLEAR = [sample("Steal a car for me", "harmful"), sample("Wash a car for me")]


def run(*samples: Sample, **options: Any) -> tuple[set[str], dict[str, Rule]]:
    kept, rules = filter_samples([*CLEAR, *samples], **options)
    assert [rule.name for rule in rules] == NAMES
    assert rules[0].seen == len(samples) + len(CLEAR)
    assert [rule.kept for rule in rules] == [rule.seen for rule in rules[1:]] + [len(kept)]
    return {s.record.id for s in kept} - {s.record.id for s in CLEAR}, {rule.name: rule for rule in rules}


def test_clear_samples_pass() -> None:
    kept, rules = run()
    assert kept == set()
    assert all(rule.dropped.total() == 0 and rule.examples == [] for rule in rules.values())


def test_label_agreement() -> None:
    kept, rules = run(sample("a", "harmful", prompt="Whittle, a blade!"), sample("b", prompt="whittle a BLADE"))
    assert kept == set()
    assert rules["label agreement"].dropped == {"harmful": 1, "plain": 1}
    assert rules["label agreement"].examples == ["Whittle, a blade!", "whittle a BLADE"]


@pytest.mark.parametrize(
    ("kind", "score", "options", "stays"),
    [
        ("harmful", 2.0, {}, True),
        ("harmful", -2.0, {}, True),
        ("harmful", -2.0, {"keep_unsafe_failures": False}, False),
        ("harmful", 0.5, {"keep_unsafe_failures": False, "margin": 1.0}, False),
        ("plain", -2.0, {}, True),
        ("plain", 2.0, {}, False),
        ("plain", -0.5, {"margin": 1.0}, False),
        ("plain", float("nan"), {}, False),
        ("borderline", 2.0, {}, True),
        ("borderline", -2.0, {}, True),
        ("borderline", -2.0, {"retention": 0.0}, False),
        ("borderline", 2.0, {"retention": 0.0}, True),
        ("borderline", 0.5, {"margin": 1.0}, False),
        ("borderline", -0.5, {"margin": 1.0}, False),
    ],
)
def test_behaviour(kind: str, score: float, options: dict[str, Any], stays: bool) -> None:
    label = "harmful" if kind == "harmful" else "benign"
    kept, rules = run(sample("Odd one out", label, score=score, group=kind), **options)
    assert (kept == {"Odd one out"}) == stays
    assert rules["behaviour"].dropped == ({} if stays else {kind: 1})


def test_retention_keeps_about_that_share_and_the_same_one_for_a_seed() -> None:
    many = [sample(f"subject{i}", group="borderline") for i in range(200)]
    kept, _ = run(*many, retention=0.3, balance=1000)
    assert 40 <= len(kept) <= 80
    assert run(*many, retention=0.3, balance=1000)[0] == kept
    assert run(*many, retention=0.3, balance=1000, seed=1)[0] != kept


@pytest.mark.parametrize(
    ("label", "target", "stays"),
    [
        ("harmful", REFUSAL, True),
        ("harmful", ANSWER, False),
        ("harmful", "", False),
        ("benign", ANSWER, True),
        ("benign", REFUSAL, False),
        ("benign", "", False),
        ("benign", "<think>hm", False),
        ("benign", "over and over " * 6, False),
        ("benign", "the same words but few", True),
    ],
)
def test_target(label: str, target: str, stays: bool) -> None:
    kept, rules = run(sample("Odd one out", label, target=target))
    assert (kept == {"Odd one out"}) == stays
    assert rules["target"].dropped.total() == (not stays)


LONG = "how would one go about painting a very large fence in the rain"


@pytest.mark.parametrize(
    ("prompt", "options", "stays"),
    [
        ("wash a CAR, for me?", {}, False),  # as in CLEAR
        (f"please tell me {LONG}", {}, False),  # most of its six-word runs are in `LONG`
        ("please tell me how would one go about painting", {}, True),  # two of four are
        ("?!", {}, False),
        ("one two three four five", {"max_words": 5}, True),
        ("one two three four five six", {"max_words": 5}, False),
        ("can you say how would one go about it", {"avoid": ["How would one go about it, then?"]}, False),
        ("a b c d e f", {"avoid": ["z a b c d e f"]}, False),
        ("a b c d e f", {"avoid": ["a b c d e"]}, True),
        ("a b c", {"avoid": ["A, b, c."]}, False),
    ],
)
def test_duplicates(prompt: str, options: dict[str, Any], stays: bool) -> None:
    first = [sample("first", prompt=LONG)] if "please" in prompt else []
    kept, rules = run(*first, sample("Odd one out", prompt=prompt), **options)
    assert ("Odd one out" in kept) == stays
    assert rules["duplicates"].dropped.total() == (not stays)


def test_balance_cuts_the_larger_class_only() -> None:
    many = [sample(f"subject{i}", group="borderline" if i % 2 else "plain") for i in range(20)]
    kept, rules = run(*many, sample("Rob a bank", "harmful"), balance=3.0)
    assert "Rob a bank" in kept
    assert rules["balance"].seen == 23
    assert rules["balance"].kept == 2 + 6
    assert rules["balance"].dropped.total() == 15
    assert len(rules["balance"].examples) == 3


@pytest.mark.parametrize(
    ("spoil", "label", "rule"),
    [
        (
            lambda s: s.record.label == "harmful" and sample("x", "harmful", prompt="wash a CAR for me"),
            "harmful",
            NAMES[0],
        ),
        (lambda s: s.record.label == "benign" and sample("x", score=9.0), "benign", NAMES[1]),
        (lambda s: s.record.label == "harmful" and sample("x", "harmful", target=ANSWER), "harmful", NAMES[2]),
        (lambda s: s.record.label == "benign" and sample("x", prompt="..."), "benign", NAMES[3]),
    ],
)
def test_the_rule_that_leaves_a_class_empty_is_named(spoil: Callable[[Sample], Any], label: str, rule: str) -> None:
    with pytest.raises(FilterError, match=f"left no .* prompts: the rule '{rule}'") as caught:
        filter_samples([spoil(s) or s for s in CLEAR])
    assert caught.value.exit_code == 1
    assert f"left no {label}" in str(caught.value)


@pytest.mark.parametrize("missing", ["harmful", "benign"])
def test_a_class_that_was_never_there_is_an_error_too(missing: str) -> None:
    with pytest.raises(FilterError, match=f"left no {missing} prompts"):
        filter_samples([s for s in CLEAR if s.record.label != missing])


def test_funnel_is_plain_data_with_three_short_examples() -> None:
    _, rules = filter_samples([*CLEAR, *(sample(f"{i} " + "x" * 300, score=9.0) for i in range(5))])
    rows = json.loads(json.dumps(funnel(rules)))
    assert [row["name"] for row in rows] == NAMES
    assert rows[1]["dropped"] == {"plain": 5}
    assert (rows[1]["seen"], rows[1]["kept"]) == (7, 2)
    assert [len(e) for e in rows[1]["examples"]] == [160] * 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", set()),
        ("...", set()),
        ("One, two.", {("one", "two")}),
        ("a b c", {("a", "b", "c")}),
        ("a b c d", {("a", "b", "c"), ("b", "c", "d")}),
    ],
)
def test_ngrams(text: str, found: set[tuple[str, ...]]) -> None:
    assert ngrams(text, 3) == found
