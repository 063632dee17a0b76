"""Right answers and the distance from the base, against hand-made rows and naive computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import naive_logits, vectors_for
from trimtab.chat import render, reply_ids
from trimtab.decoding.engine import banned_ids
from trimtab.evaluation.capability import kl_to_base, kl_under_guide, right
from trimtab.evaluation.results import answers, answers_paired, looping_paired
from trimtab.evaluation.run import evaluate
from trimtab.evaluation.suites import Suite
from trimtab.models import Model
from trimtab.neuron.guide import Guide
from trimtab.neuron.mix import mix, tv
from trimtab.neuron.neuron import Neuron
from trimtab.neuron.rating import alpha_table
from trimtab.neuron.risk import ConstantRisk
from trimtab.prompts.records import LETTERS, Record
from trimtab.report.build import build
from trimtab.softtoken.artifact import SoftToken


def row(reply: str = "", reference: str = "", **fields: Any) -> dict[str, Any]:
    return {"reply": reply, "reference": reference, "choices": (), **fields}


@pytest.mark.parametrize(
    ("reply", "reference", "is_right"),
    [
        ("So she makes 9 * 2 = $18 every day.", "18", True),
        ("18. Or is it 19?", "18", False),
        ("It costs 1,250.50 in all", "1250.5", True),
        ("minus: -3", "-3", True),
        ("<think>18</think>I do not know.", "18", False),
        ("", "18", False),
        ("Some text.", "A text as reference", None),
        ("18", "", None),
    ],
)
def test_the_last_number_counts(reply: str, reference: str, is_right: bool | None) -> None:
    assert right(row(reply, reference)) is is_right


def test_letters_count_where_there_are_choices() -> None:
    options = {"choices": ("3", "4")}
    assert right(row("Whatever 3", "b", choice="B", **options)) is True
    assert right(row("B", "B", choice="A", **options)) is False
    assert right(row("B", "B", **options)) is None  # no likelihoods were stored
    assert right(row("B", "", choice="A", **options)) is None
    assert right(row("B", "4", choice="B", **options)) is None  # a text, no letter
    assert right(row("B", "C", choice="B", **options)) is None


def test_no_reply_is_no_wrong_answer() -> None:
    assert right(row("", "18", stop="error")) is None


def test_shares_and_pairs_by_hand() -> None:
    before = [row("1", "1"), row("2", "1"), row("2", "1"), row("x", "words")]
    after = [row("2", "1"), row("1", "1"), row("1", "1"), row("x", "words")]
    found = answers(before)
    assert found is not None
    assert (found["share"], found["n"]) == (pytest.approx(1 / 3), 3)
    change = answers_paired(before, after)
    assert change is not None
    assert (change["difference"], change["n"], change["p"]) == (pytest.approx(1 / 3), 3, 1.0)
    assert answers([row("x", "words")]) is None
    assert answers_paired([row("x", "words")], [row("y", "words")]) is None


def test_replies_that_begin_to_repeat_themselves_are_counted_on_the_same_rows() -> None:
    before, after = (
        [{"reply": words} for words in part]
        for part in (["fine", "no " * 20, "well"], ["no " * 20, "no " * 20, "well"])
    )
    change = looping_paired(before, after)
    assert change is not None
    assert (round(change["difference"], 3), change["n"], change["p"]) == (0.333, 3, 1.0)
    assert looping_paired([], []) is None


@torch.no_grad()
def test_kl_is_what_whole_forward_passes_give(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "default")
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user")
    chats = ["Hi", "Where is the inn? " * 3, "the the"]
    replies = ["In the inn.", "a", "x" * 50]
    found = kl_to_base(
        model, [render(model, c) for c in chats], [token.render(model, c) for c in chats], replies, token.vectors
    )
    first, along = [], []
    for chat, reply in zip(chats, replies, strict=True):
        said = list(reply_ids(model, reply)[:32])
        n = len(said)
        base = naive_logits(model, [*render(model, chat).ids, *said[:-1]])[-n:].log_softmax(-1)
        tuned = naive_logits(model, [*token.render(model, chat).ids, *said[:-1]], token.vectors)[-n:].log_softmax(-1)
        kl = (base.exp() * (base - tuned)).sum(-1)
        first.append(float(kl[0]))
        along.append(float(kl.mean()))
    assert found is not None
    assert found["n"] == 3
    assert found["first"]["mean"] == pytest.approx(sum(first) / 3, rel=1e-4)
    assert found["along"]["mean"] == pytest.approx(sum(along) / 3, rel=1e-4)
    assert found["along"]["ci95"][0] <= found["along"]["mean"] <= found["along"]["ci95"][1]
    assert kl_to_base(model, [render(model, "Hi")], [token.render(model, "Hi")], [""], token.vectors) is None


@torch.no_grad()
@pytest.mark.parametrize("neuron", ["always", "never", "lif"])
def test_kl_under_a_guide_is_what_the_mixture_gives(tiny: Callable[..., Model], neuron: str) -> None:
    model = tiny("llama", "default")
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user")
    guide = Guide(token, Neuron.named(neuron), risk=ConstantRisk(7), table=alpha_table("0.5"))
    chats, replies = ["Hi", "Where is the inn? " * 3, "the the"], ["In the inn.", "a", "x" * 50]
    records = [Record(id=str(i), prompt=chat, label="benign") for i, chat in enumerate(chats)]
    alphas = [0.5, 1.0, 0.25]
    found = kl_under_guide(model, records, replies, guide, alphas, [0, 1, 2])
    first, along = [], []
    banned = banned_ids(model, token.vectors)
    for chat, reply, alpha in zip(chats, replies, alphas, strict=True):
        said = list(reply_ids(model, reply)[:32])
        base = naive_logits(model, [*render(model, chat).ids, *said[:-1]])[-len(said) :].clone()
        expert = naive_logits(model, [*token.render(model, chat).ids, *said[:-1]], token.vectors)[-len(said) :].clone()
        base[:, banned] = expert[:, banned] = -torch.inf
        potential, kl = torch.full((1,), guide.neuron.start), []
        for b, e in zip(base.softmax(-1), expert.softmax(-1), strict=True):
            _, spike, potential = guide.neuron.step(potential, tv(b[None], e[None]), torch.zeros(1))
            moved = mix(b[None], e[None], torch.tensor([alpha]))[0][0] if spike else b
            moved = moved / moved.sum()
            kl.append(float((torch.xlogy(b, b) - torch.xlogy(b, moved)).sum()))
        first.append(kl[0])
        along.append(sum(kl) / len(kl))
    assert found is not None
    assert found["n"] == 3
    assert found["first"]["mean"] == pytest.approx(sum(first) / 3, rel=1e-4, abs=1e-6)
    assert found["along"]["mean"] == pytest.approx(sum(along) / 3, rel=1e-4, abs=1e-6)
    assert (found["along"]["mean"] > 0.001) is (neuron != "never")


def test_an_evaluation_under_a_guide_says_how_far_it_moves_and_how_long_replies_are(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = tiny("llama", "default")
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user")
    guide = Guide(token, Neuron.named("always"), risk=ConstantRisk(7), table=alpha_table("1"))
    records = tuple(Record(id=str(i), prompt=f"{i} the inn", label="benign") for i in range(6))
    suite = Suite("plain", records, 6)
    found = evaluate(model, [suite], guide=guide, out=tmp_path / "e", compare=True, max_new_tokens=4)
    assert found["kl"]["n"] == 6
    assert found["kl"]["along"]["mean"] > 0
    stored = [json.loads(line) for line in (tmp_path / "e" / "replies.jsonl").read_text().splitlines()]
    mean = {arm: sum(row["tokens"] for row in stored if row["arm"] == arm) / 6 for arm in ("base", "guide")}
    assert found["length"]["mean"] == pytest.approx(mean["guide"])
    assert found["length_paired"]["mean"] == pytest.approx(mean["guide"] - mean["base"])
    page = build([tmp_path / "e"], tmp_path / "r.html").read_text()
    assert "Length of replies, in tokens:" in page
    assert "Distance from the untouched model on plain requests" in page


def test_letters_under_a_guide_are_those_of_the_mixture(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny("llama", "default")
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user")
    lines = [
        {"id": str(i), "prompt": f"{i} + 2?", "choices": list("3456"), "reference": "B", "label": "benign"}
        for i in range(4)
    ]
    suite = tmp_path / "sums.jsonl"
    suite.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen: dict[str, list[str]] = {}
    for neuron, alpha in (("always", "1"), ("never", "1"), ("always", "0.5")):
        guide = Guide(token, Neuron.named(neuron), risk=ConstantRisk(7), table=alpha_table(alpha))
        name = f"{neuron}-{alpha}"
        evaluate(model, [str(suite)], guide=guide, out=tmp_path / name, max_new_tokens=2)
        stored = [json.loads(line) for line in (tmp_path / name / "replies.jsonl").read_text().splitlines()]
        chosen[name] = [row["choice"] for row in sorted(stored, key=lambda row: row["id"])]
    letters = [reply_ids(model, letter)[0] for letter in LETTERS[:4]]
    for i, line in enumerate(lines):
        prompt = f"{line['prompt']}\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer with one letter."
        base = naive_logits(model, render(model, prompt).ids)[-1].softmax(-1)[letters]
        other = naive_logits(model, token.render(model, prompt).ids, token.vectors)[-1].softmax(-1)[letters]
        assert chosen["always-1"][i] == LETTERS[int(other.argmax())]
        assert chosen["never-1"][i] == LETTERS[int(base.argmax())]
        assert chosen["always-0.5"][i] == LETTERS[int((base + other).argmax())]
    assert chosen["always-1"] != chosen["never-1"]


def test_an_evaluation_says_what_is_still_right(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny("llama", "default")
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user")
    lines = [
        {"id": "c", "prompt": "2 + 2?", "choices": ["3", "4", "5"], "reference": "B", "label": "benign"},
        {"id": "n", "prompt": "2 + 2?", "reference": "4", "label": "benign"},
        {"id": "w", "prompt": "Sing.", "reference": "La la.", "label": "benign"},
    ]
    suite = tmp_path / "sums.jsonl"
    suite.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = evaluate(model, [str(suite)], token=token, out=tmp_path / "e", compare=True, max_new_tokens=4)
    chosen = {
        json.loads(line)["arm"]: json.loads(line)["choice"]
        for line in (tmp_path / "e" / "replies.jsonl").read_text().splitlines()
        if "choice" in json.loads(line)
    }
    prompt = "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer with one letter."
    letters = [reply_ids(model, letter)[0] for letter in LETTERS[:3]]
    for arm, logits in (
        ("base", naive_logits(model, render(model, prompt).ids)[-1]),
        ("token", naive_logits(model, token.render(model, prompt).ids, token.vectors)[-1]),
    ):
        assert chosen[arm] == LETTERS[int(logits[letters].argmax())]
    assert result["answers"]["sums"]["n"] == result["base"]["answers"]["sums"]["n"] == 2
    assert result["answers_paired"]["sums"]["n"] == 2
    assert result["kl"]["n"] == 3
    page = build([tmp_path / "e"], tmp_path / "report.html").read_text().replace("\u00a0", " ")
    assert "Right answers, sums:" in page
    assert "Distance from the untouched model on plain requests" in page
