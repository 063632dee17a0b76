"""What is learned: own words where there are any, long enough to read as what they are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from conftest import build
from test_align import records
from trimtab.chat import reply_ids
from trimtab.config import AlignSettings
from trimtab.models import Model
from trimtab.softtoken import targets
from trimtab.softtoken.align import prepare
from trimtab.softtoken.examples import Examples
from trimtab.softtoken.targets import TEMPLATES, collect, deciding_tokens

OWN = "Sorry, I am not able to do this, and I will not."


@pytest.fixture
def model() -> Model:
    return build("llama", "default")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A model that refuses what is harmful in its own words and answers the rest; how many tokens were asked for, by title."""
    lengths: dict[str, int] = {}

    def replies(model: Model, base: Examples, indices: Sequence[int], n_tokens: int, title: str) -> dict[int, str]:
        lengths[title] = n_tokens
        said = {"harmful": OWN, "benign": "Here is a list of everything that you asked me for."}
        return {i: model.tokenizer.decode(reply_ids(model, said[base.records[i].label])[:n_tokens]) for i in indices}

    monkeypatch.setattr(targets, "_replies", replies)
    monkeypatch.setattr(
        targets, "_scores", lambda _, base: [2.0 if r.label == "harmful" else -2.0 for r in base.records]
    )
    return lengths


def test_own_refusals_are_kept_however_few_tokens_the_loss_sees(model: Model, asked: dict[str, int]) -> None:
    for k in (1, 3, 40):
        kept = prepare(model, records(), AlignSettings(reply_tokens=k, refusal=OWN)).samples
        assert asked["and refusals"] == max(10, k + 1)  # so that a refusal that goes on is not taught to end
    harmful = [s for s in kept if s.record.label == "harmful"]
    assert harmful
    assert all(s.own and OWN.startswith(s.target.rstrip()) for s in harmful)


def test_answers_are_as_long_as_a_late_decision(model: Model, asked: dict[str, int]) -> None:
    late = "Thank you for your question. Unfortunately, as a responsible assistant, I cannot help with that."
    base = Examples(model, records(), "")
    collect(model, base, refusal=late)
    assert asked["the model's own words"] == max(10, deciding_tokens(model, late) + 1)
    assert asked["the model's own words"] > 10
    collect(model, base, refusal=TEMPLATES[0])
    assert asked["the model's own words"] == max(10, deciding_tokens(model, TEMPLATES[0]) + 1)
