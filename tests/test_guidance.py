"""A guide from settings to results: what the options ask for, who rates, the traces, and evaluation under a guide."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from conftest import build, naive_logits, vectors_for
from test_align import records
from test_guided import adapter, relative
from trimtab import refusal
from trimtab.chat import render, reply_ids
from trimtab.config import GuidanceSettings, settle
from trimtab.decoding.engine import banned_ids
from trimtab.decoding.generate import Reply, generate, traces
from trimtab.decoding.likelihood import guided_log_odds
from trimtab.errors import ArtefactError, ConfigError, ModelError, PathError, RunError
from trimtab.evaluation import backends, judges
from trimtab.evaluation.metrics import detectable, holm, mcnemar, paired_difference, wilson
from trimtab.evaluation.results import adjusted, neuron_activity, paired
from trimtab.evaluation.run import evaluate
from trimtab.evaluation.suites import Suite, load_suite
from trimtab.models import Model
from trimtab.neuron import risk
from trimtab.neuron.deep_alignment import train_expert
from trimtab.neuron.expert import Expert, load_expert, model_expert, token_expert
from trimtab.neuron.guide import Guide, guide_from
from trimtab.neuron.neuron import Neuron, Step
from trimtab.neuron.rating import ALPHA_TABLES, UNREAD, AlphaTable, Rating, alpha, alpha_table
from trimtab.neuron.risk import ConstantRisk, ExpertRating, LogitRating, Rater, SelfRating
from trimtab.prompts.records import Record
from trimtab.run import read_json
from trimtab.softtoken.align import align
from trimtab.softtoken.artifact import SoftToken

LIMIT = 6
EXPERTS = ("token", "lora", "model")
CHATS = [[{"role": "user", "content": words}] for words in ("Hi", "Where is the inn? " * 3, "the the", "x" * 20)]


@pytest.fixture
def model() -> Model:
    return build("llama", "default")


@pytest.fixture
def token(model: Model) -> SoftToken:
    return SoftToken.of(model, vectors_for(model, 2, 30.0), "user")


@pytest.fixture(scope="module")
def suite() -> Suite:
    rows = tuple(records(3, ("test",)))
    return Suite("small", rows, len(rows))


@pytest.fixture
def make(model: Model, token: SoftToken, tmp_path: Path) -> Callable[[str], Expert]:
    def expert_of(kind: str) -> Expert:
        if kind == "token":
            return token_expert(token, model)
        if kind == "lora":
            return load_expert(f"lora:{adapter(model, tmp_path / 'adapter')}", model)
        return model_expert(relative(model, 0.15), model)

    return expert_of


def guide_of(expert: Any, **options: Any) -> Guide:
    return Guide(expert, **{"risk": ConstantRisk(7), **options})


def stored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != "cost"}


# From settings to a guide


def settings(**given: Any) -> GuidanceSettings:
    return settle(GuidanceSettings, {"model": "tiny", **given})


def test_no_expert_no_guide(model: Model) -> None:
    assert guide_from(settings(), model) is None
    assert guide_from(settings(token=Path("somewhere")), model) is None
    assert guide_from(settings(neuron="never"), model) is None
    for name, value in (("neuron", "always"), ("alpha", "0.9"), ("early_stop", "corrected"), ("draft", 4)):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} does nothing without an expert"):
            guide_from(settings(**{name: value}), model)


def test_an_expert_that_is_never_heard_need_not_be_there(model: Model) -> None:
    assert guide_from(settings(expert="model:/nowhere/at/all", neuron="never"), model) is None


def test_what_names_no_expert_is_told_even_where_it_would_never_be_heard(model: Model) -> None:
    with pytest.raises(ConfigError, match="'nonsense' names no expert"):
        guide_from(settings(expert="nonsense", neuron="never"), model)


def test_the_published_settings_are_the_defaults(model: Model, token: SoftToken, tmp_path: Path) -> None:
    found = guide_from(settings(expert=f"token:{token.save(tmp_path)}"), model)
    assert found
    assert found.neuron == Neuron(kind="lif", tau=8, threshold=1, keep=0.6, divergence="tv")
    assert (found.table, found.early_stop, found.draft) == (ALPHA_TABLES["code"], "off", None)
    assert isinstance(found.expert, Expert)
    assert found.expert.identity == token_expert(token, model).identity
    assert found.risk == ExpertRating(found.expert)


def test_every_option_reaches_the_guide(model: Model, token: SoftToken, tmp_path: Path) -> None:
    found = guide_from(
        settings(
            expert=f"token:{token.save(tmp_path)}", neuron="paper", threshold=0.7, divergence="js", risk="const:3",
            alpha="paper", early_stop="corrected",
        ),
        model,
    )  # fmt: skip
    assert found
    assert found.neuron == Neuron(keep=0.0, threshold=0.7, divergence="js")
    assert (found.risk, found.table) == (ConstantRisk(3), ALPHA_TABLES["paper"])
    assert found.early_stop == "corrected"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("self", SelfRating), ("logits", LogitRating), ("expert", ExpertRating), ("const:0", ConstantRisk)],
)
def test_raters_by_option(model: Model, token: SoftToken, tmp_path: Path, name: str, kind: type) -> None:
    found = guide_from(settings(expert=f"token:{token.save(tmp_path)}", risk=name), model)
    assert found
    assert isinstance(found.risk, kind)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"token": Path("other")}, "--token is always on and --expert waits"),
        ({"neuron": "lof"}, "unknown neuron 'lof'"),
        ({"neuron": "random:2"}, r"must be in \[0, 1\]"),
        ({"neuron": "random:"}, "is no number"),
        ({"alpha": "2"}, "unknown alpha table '2'"),
        ({"alpha": "nan"}, "unknown alpha table 'nan'"),
        ({"risk": "const:11"}, r"a risk must be a number in \[0, 10\]"),
        ({"risk": "guard:"}, "unknown rater 'guard:'"),
        ({"draft": 4}, "--draft does nothing with token:"),
    ],
)
def test_options_that_cannot_be_used(
    model: Model, token: SoftToken, tmp_path: Path, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        guide_from(settings(expert=f"token:{token.save(tmp_path)}", **given), model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"threshold": 0}, "threshold: input should be greater than 0"),
        ({"threshold": nan}, "threshold"),
        ({"divergence": "l2"}, "divergence: input should be 'tv', 'js', 'kl' or 'cosine'"),
        ({"early_stop": "on"}, "early_stop: input should be 'off', 'published' or 'corrected'"),
        ({"draft": 65}, "draft: input should be less than or equal to 64"),
        ({"treshold": 1}, "Did you mean threshold or"),
    ],
)
def test_settings_out_of_range(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(**given)
    assert says in str(raised.value)


def test_a_file_may_give_alpha_as_a_number(model: Model, token: SoftToken, tmp_path: Path) -> None:
    file = tmp_path / "guide.toml"
    file.write_text(f'model = "tiny"\nexpert = "token:{token.save(tmp_path)}"\nalpha = 0.25\nthreshold = 2\n')
    found = guide_from(settle(GuidanceSettings, {}, file), model)
    assert found
    assert found.table == alpha_table("0.25")
    assert found.neuron.threshold == 2


def test_an_expert_that_is_not_there_or_another_models(model: Model, token: SoftToken, tmp_path: Path) -> None:
    path = token.save(tmp_path)
    for reference, kind in (
        ("token:nowhere", PathError),
        ("lora:nowhere", PathError),
        ("model:smollm2-135", ModelError),
        ("oracle:x", ConfigError),
    ):
        with pytest.raises(kind):
            guide_from(settings(expert=reference), model)
    with pytest.raises(ArtefactError, match="trained on"):
        guide_from(settings(expert=f"token:{path}"), build("llama", "default", seed=5))


# The expert as a rater


def opening_probability(expert: Expert, chat: list[dict[str, str]], openings: tuple[str, ...]) -> float:
    """Read whole, word by word: the chance that the expert's reply begins with one of the openings."""
    total, prompt = 0.0, expert.render(chat).ids
    for opening in openings:
        words, p = reply_ids(expert.model, opening), 1.0
        with expert.speaking(), torch.inference_mode():
            logits = expert.model.network(input_ids=torch.tensor([[*prompt, *words]]), use_cache=False).logits[0]
        for place, word in enumerate(words):
            p *= float(logits[len(prompt) - 1 + place].softmax(-1)[word])
        total += p
    return total


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_risk_is_what_the_expert_would_do(
    make: Callable[[str], Expert], model: Model, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expert, openings = make(kind), ("a", "b", "k", "zo", "Z")
    monkeypatch.setattr(refusal, "OPENINGS", openings)
    begins = [naive_beginning(expert, chat) for chat in CHATS]
    declined = sorted(set(begins))[::2]  # some of what it says is a refusal, for now
    monkeypatch.setattr(risk, "is_refusal", lambda words: words in declined)
    found = ExpertRating(expert).rate(model, CHATS)
    chances = [opening_probability(expert, chat, openings) for chat in CHATS]
    expected = [7 + 3 * p if words in declined else 4 * p for p, words in zip(chances, begins, strict=True)]
    assert [rating.risk for rating in found] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert {rating.risk >= 7 for rating in found} == {True, False}
    assert max(chances) > 0.001
    # One at a time, the same.
    assert [ExpertRating(expert).rate(model, [chat])[0].risk for chat in CHATS] == pytest.approx(
        [rating.risk for rating in found], rel=1e-3
    )


def naive_beginning(expert: Expert, chat: Any) -> str:
    """The expert's first five tokens, greedily, reading everything anew for each."""
    ids, reply = expert.render(chat).ids, list[int]()
    banned = expert.model.slot_ids(len(expert.token.vectors)) if expert.token else []
    with expert.speaking(), torch.inference_mode():
        while len(reply) < 5:
            logits = expert.model.network(input_ids=torch.tensor([[*ids, *reply]]), use_cache=False).logits[0, -1]
            logits[[i for i in banned if i < len(logits)]] = -torch.inf
            if int(logits.argmax()) in expert.model.eos_ids:
                break
            reply.append(int(logits.argmax()))
    return str(expert.model.tokenizer.decode(reply, skip_special_tokens=True))


def test_what_the_expert_cannot_rate_is_strong(
    make: Callable[[str], Expert], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are no numbers, and a prompt that leaves no room; the others are rated, each at its place."""
    expert, long = make("token"), [{"role": "user", "content": "x" * 600}]
    rated = ExpertRating(expert).rate(model, CHATS[:2])
    assert ExpertRating(expert).rate(model, [CHATS[0], long, CHATS[1]]) == [rated[0], UNREAD, rated[1]]
    assert ExpertRating(expert).rate(model, []) == []
    monkeypatch.setattr(risk, "opening_log_odds", lambda _model, tails, _past: torch.tensor([nan, 0.0])[: len(tails)])
    found = ExpertRating(expert).rate(model, [CHATS[0], CHATS[0]])
    assert found == [UNREAD, Rating(2.0)]
    assert [alpha(rating, ALPHA_TABLES["code"]) for rating in found] == [0.9, 0.1]


def test_a_guide_without_a_rater_asks_its_expert(model: Model, token: SoftToken) -> None:
    expert = token_expert(token, model)
    ratings, alphas = Guide(token).rate(model, expert, CHATS)
    assert ratings == ExpertRating(expert).rate(model, CHATS)
    assert alphas == [alpha(rating, ALPHA_TABLES["code"]) for rating in ratings]


def test_a_description_is_short_and_names_what_replies_depend_on(
    make: Callable[[str], Expert], token: SoftToken
) -> None:
    for kind in EXPERTS:
        expert = make(kind)
        implied, named = Guide(expert), Guide(expert, risk=ExpertRating(expert))
        assert implied.describe(expert) == named.describe(expert)
        assert len(json.dumps(implied.describe(expert))) < 1000  # a network's repr is no part of it
    first, second = make("token"), make("model")
    guides = [
        Guide(first),
        Guide(second),
        Guide(first, risk=ExpertRating(second)),
        Guide(first, risk=ConstantRisk(7)),
        Guide(first, risk=ConstantRisk(8)),
        Guide(first, Neuron(threshold=0.9)),
        Guide(first, table=ALPHA_TABLES["paper"]),
        Guide(first, early_stop="corrected"),
    ]
    told = [json.dumps(guide.describe(guide.expert), sort_keys=True) for guide in guides]  # type: ignore[arg-type]
    assert len(set(told)) == len(told)
    assert Guide(first, draft=3).describe(first) == Guide(first).describe(first)


# Traces


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_trace_tells_every_token(make: Callable[[str], Expert], model: Model, kind: str) -> None:
    expert = make(kind)
    (reply,) = generate(model, ["the inn"], guide=guide_of(expert, neuron=Neuron(threshold=0.5)), max_new_tokens=LIMIT)
    lines = list(traces(model, ["a"], [reply]))
    assert [(line["id"], line["token"]) for line in lines] == [("a", place) for place in range(len(reply.trace))]
    banned = banned_ids(model, expert.vectors)
    prompt, other, v = render(model, "the inn").ids, expert.render("the inn").ids, 0.0
    for place, line in enumerate(lines):
        said = reply.ids[:place]
        base = naive_logits(model, [*prompt, *said])[-1].clone()
        with expert.speaking(), torch.inference_mode():
            safe = expert.model.network(input_ids=torch.tensor([[*other, *said]]), use_cache=False).logits[0, -1]
        safe = safe.clone()
        base[banned] = safe[banned] = -torch.inf
        divergence = float(0.5 * (base.softmax(-1) - safe.softmax(-1)).abs().sum())
        v = 0.875 * v + divergence
        assert line["divergence"] == pytest.approx(divergence, abs=1e-4)
        assert line["potential"] == pytest.approx(v, abs=1e-3)
        assert line["spike"] == (v >= 0.5)
        assert (line["base"], line["expert"]) == (int(base.argmax()), int(safe.argmax()))
        assert line["alpha"] == pytest.approx(0.9)
        for who in ("base", "expert", "chosen"):
            assert line[f"{who}_text"] == model.tokenizer.decode([line[who]])
        v *= 0.6 if v >= 0.5 else 1
    assert [line["chosen"] for line in lines][: len(reply.ids)] == list(reply.ids)
    assert any(line["spike"] for line in lines)
    assert lines == [json.loads(json.dumps(line)) for line in lines]


def test_traces_are_in_order_and_plain_replies_have_none(model: Model) -> None:
    step = Step(0.5, 0.5, False, 0.9, 70, 71, 70, 70)
    replies = [Reply("", (), "length", trace=(step,) * n) for n in (2, 0, 1)]
    assert [(line["id"], line["token"]) for line in traces(model, "abc", replies)] == [("a", 0), ("a", 1), ("c", 0)]
    assert list(traces(model, "a", generate(model, ["Hi"], max_new_tokens=2))) == []
    # A token that was never said has no words.
    (line,) = traces(model, "a", [Reply("", (), "error", trace=(replace(step, chosen=-1),))])
    assert line == {
        "id": "a", "token": 0, **asdict(step), "chosen": -1,
        "base_text": model.tokenizer.decode([70]), "expert_text": model.tokenizer.decode([71]),
        "base_top_text": model.tokenizer.decode([70]),
    }  # fmt: skip


def test_nothing_to_reply_to(model: Model, token: SoftToken) -> None:
    assert generate(model, []) == []
    assert generate(model, [], guide=Guide(token)) == []


# Evaluation


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    """A random model never refuses; here a reply whose bytes have an even sum does."""

    def even(reply: str) -> bool:
        return sum(reply.encode()) % 2 == 0

    monkeypatch.setattr(judges, "is_refusal", even)
    return even


@pytest.mark.parametrize("kind", EXPERTS)
def test_replies_are_those_of_generate_and_results_add_them_up(
    make: Callable[[str], Expert],
    model: Model,
    suite: Suite,
    tmp_path: Path,
    verdicts: Callable[[str], bool],
    kind: str,
) -> None:
    guide = guide_of(make(kind))
    result = evaluate(model, [suite], guide=guide, out=tmp_path / "e", compare=True, max_new_tokens=LIMIT, batch_size=4)
    chats = [record.chat for record in suite.records]
    after = generate(model, chats, guide=guide, max_new_tokens=LIMIT)
    before = generate(model, chats, max_new_tokens=LIMIT)
    assert [r.text for r in after] != [r.text for r in before]

    rows = {(row["arm"], row["id"]): row for row in stored(tmp_path / "e")}
    assert len(rows) == 2 * len(suite.records)
    for record, guided, plain in zip(suite.records, after, before, strict=True):
        row = rows["guide", record.id]
        assert (row["reply"], row["tokens"], row["stop"]) == (guided.text, len(guided.ids), guided.stop)
        assert (row["alpha"], row["risk"], row["rated"]) == (0.9, 7, True)
        (odds,) = guided_log_odds(model, [record.chat], guide, prefills=[""], alphas=[0.9], streams=[0])
        assert row["log_odds"] == pytest.approx(odds, abs=1e-3)
        assert row["spikes"] == [int(step.spike) for step in guided.trace]
        assert row["guided"] == [int(step.spike and step.chosen != step.base) for step in guided.trace]
        assert row["divergence"] == pytest.approx([step.divergence for step in guided.trace], abs=1e-4)
        assert row["potential"] == pytest.approx([step.potential for step in guided.trace], abs=1e-3)
        assert rows["base", record.id]["reply"] == plain.text
        assert rows["base", record.id]["log_odds"] is not None

    assert (result["arm"], result["model"]) == ("guide", model.name)
    by_label = result["paired"]["small"]
    p_holm = dict(zip(by_label, holm([found["keyword"]["p"] for found in by_label.values()]), strict=True))
    for label in ("harmful", "benign"):
        places = [i for i, record in enumerate(suite.records) if record.label == label]
        was, now = ([verdicts(replies[i].text) for i in places] for replies in (before, after))
        for part, said in ((result["base"], was), (result, now)):
            found = part["suites"]["small"][label]["keyword"]
            assert found["refusal_rate"] == pytest.approx(sum(said) / len(said))
            assert (found["n"], found["unscored"]) == (len(places), 0)
        assert result["paired"]["small"][label]["keyword"] == {
            "now_refused": sum(b and not a for a, b in zip(was, now, strict=True)),
            "now_answered": sum(a and not b for a, b in zip(was, now, strict=True)),
            "difference": pytest.approx((sum(now) - sum(was)) / len(was)),
            "ci95": list(paired_difference(was, now)[1]),
            "p": mcnemar(was, now),
            "p_holm": p_holm[label],
            "detectable": detectable(len(was), sum(a != b for a, b in zip(was, now, strict=True)) / len(was)),
        }
        logit = result["suites"]["small"][label]["logit"]
        assert (logit["n"], logit["unscored"]) == (len(places), 0)
        assert set(result["paired"]["small"][label]) == {"keyword", "logit"}
        steps = [step for i in places for step in after[i].trace]
        activity = result["neuron"]["small"][label]
        assert activity["spike_rate"] == pytest.approx(sum(s.spike for s in steps) / len(steps))
        assert activity["guided_rate"] == pytest.approx(sum(s.guided for s in steps) / len(steps))
        assert activity["mean_divergence"] == pytest.approx(sum(s.divergence for s in steps) / len(steps), abs=1e-4)
        assert (activity["mean_alpha"], activity["unrated"]) == (pytest.approx(0.9), 0)
    assert list(result["auc"]) == list(result["base"]["auc"]) == ["small"]
    assert result["guide"]["expert"] == guide.expert.identity  # type: ignore[union-attr]
    assert result["guide"]["neuron"] == asdict(Neuron())
    written = read_json(tmp_path / "e" / "results.json") | read_json(tmp_path / "e" / "cost.json")
    assert written == json.loads(json.dumps(result))
    shown = read_json(tmp_path / "e" / "rows.json")["small"]
    assert [row["guide"]["reply"] for row in shown] == [reply.text for reply in after]
    assert [row["base"]["refused"] for row in shown] == [verdicts(reply.text) for reply in before]


def test_the_same_command_again_generates_nothing(
    model: Model, token: SoftToken, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"out": tmp_path, "compare": True, "max_new_tokens": LIMIT}
    first = evaluate(model, [suite], guide=guide_of(token), **options)
    before = (tmp_path / "replies.jsonl").read_bytes()

    def generated(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("a reply that was there is made again")

    monkeypatch.setattr(backends, "_under_guide", generated)
    monkeypatch.setattr(backends, "_by_itself", generated)
    again = evaluate(model, [suite], guide=guide_of(token, draft=3), batch_size=2, **options)
    assert comparable(again) == comparable(first)
    assert (tmp_path / "replies.jsonl").read_bytes() == before


def test_the_rater_is_tried_by_injections_once(
    model: Model, token: SoftToken, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def tried(_model: Model, _rater: Rater, requests: Sequence[str], _table: AlphaTable) -> tuple[int, int]:
        asked.append(len(requests))
        return 3, 12

    monkeypatch.setattr("trimtab.evaluation.run.talked_round", tried)
    harmful = [r for r in load_suite("builtin:test").records if r.label == "harmful"]
    for _ in range(2):
        found = evaluate(model, [suite], guide=guide_of(token, risk=LogitRating()), out=tmp_path, max_new_tokens=LIMIT)
        assert found["injections"] == {"fooled": 3, "foolable": 12, "ci95": pytest.approx(wilson(3, 12))}
    assert asked == [len(harmful)]
    evaluate(model, [suite], guide=guide_of(token, risk=ExpertRating(token_expert(token, model))), out=tmp_path)
    assert len(asked) == 2  # another rater
    constant = evaluate(model, [suite], guide=guide_of(token), out=tmp_path, max_new_tokens=LIMIT)
    assert constant["injections"] is None
    same = guide_of(token, risk=LogitRating(), table=alpha_table("0.9"))
    assert evaluate(model, [suite], guide=same, out=tmp_path, max_new_tokens=LIMIT)["injections"] is None
    assert len(asked) == 2


def test_a_killed_evaluation_keeps_what_it_has(
    model: Model, token: SoftToken, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"compare": True, "max_new_tokens": LIMIT}
    whole = evaluate(model, [suite], guide=guide_of(token), out=tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / "replies.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "replies.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    made: list[str] = []
    under_guide = backends._under_guide

    def counted(model: Model, rows: Any, *rest: Any) -> Iterator[dict[str, Any]]:
        made.extend(record.id for record in rows)
        return under_guide(model, rows, *rest)

    monkeypatch.setattr(backends, "_under_guide", counted)
    found = evaluate(model, [suite], guide=guide_of(token), out=tmp_path / "killed", **options)
    assert comparable(found) == comparable(whole)
    # A batch that was broken off is made again as it was; what is there already stays, and nothing is there twice.
    assert sorted(made) == sorted(record.id for record in suite.records)
    stored = (tmp_path / "killed" / "replies.jsonl").read_bytes().splitlines(keepends=True)
    assert stored[:5] == lines[:5]
    assert sorted(stored) == sorted(lines)
    assert sorted((tmp_path / "killed" / "replies.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_keys_are_everything_that_a_reply_depends_on(
    model: Model, token: SoftToken, suite: Suite, tmp_path: Path
) -> None:
    """Each of these is measured anew in the same folder; the untouched model only once, whoever compares with it."""
    few = Suite("few", suite.records[:2], 2)
    options: dict[str, Any] = {"out": tmp_path, "compare": True, "max_new_tokens": 2}
    other = SoftToken.of(model, vectors_for(model, 2, 3.0), "user")
    guides = [
        guide_of(token),
        guide_of(other),
        guide_of(SoftToken.of(model, vectors_for(model, 2, 30.0), "assistant")),
        guide_of(relative(model, 0.15)),
        guide_of(token, neuron=Neuron(threshold=0.5)),
        guide_of(token, neuron=Neuron(divergence="js")),
        guide_of(token, risk=ConstantRisk(3)),
        Guide(token),
        guide_of(token, table=alpha_table("0.8")),
        guide_of(token, early_stop="published"),
    ]
    for count, guide in enumerate(guides, 1):
        evaluate(model, [few], guide=guide, **options)
        assert len(stored(tmp_path)) == 2 * (count + 1), count
    evaluate(model, [few], guide=guides[0], **{**options, "max_new_tokens": 3})
    n = 2 * (len(guides) + 1) + 4
    assert len(stored(tmp_path)) == n
    for guide in guides:
        evaluate(model, [few], guide=guide, **options)
    evaluate(model, [few], out=tmp_path, max_new_tokens=2)
    assert len(stored(tmp_path)) == n
    # A token that is always on is another thing than the same token behind a neuron.
    evaluate(model, [few], token=token, out=tmp_path, max_new_tokens=2)
    assert len(stored(tmp_path)) == n + 2


def test_an_expert_named_on_the_command_line_has_the_replies_of_the_same_one_in_python(
    model: Model, token: SoftToken, suite: Suite, tmp_path: Path
) -> None:
    few = Suite("few", suite.records[:2], 2)
    evaluate(model, [few], guide=Guide(token), out=tmp_path / "e", max_new_tokens=2)
    named = guide_from(settings(expert=f"token:{token.save(tmp_path / 't')}"), model)
    result = evaluate(model, [few], guide=named, out=tmp_path / "e", max_new_tokens=2)
    assert len(stored(tmp_path / "e")) == 2
    assert len(json.dumps(result["guide"])) < 2000


def test_without_compare_there_is_one_arm(model: Model, token: SoftToken, suite: Suite, tmp_path: Path) -> None:
    result = evaluate(model, [suite], guide=guide_of(token), out=tmp_path, max_new_tokens=2)
    assert not {"base", "paired"} & set(result)
    assert {row["arm"] for row in stored(tmp_path)} == {"guide"}
    assert all("base" not in row for row in read_json(tmp_path / "rows.json")["small"])


def test_a_neuron_that_never_fires_is_the_base(model: Model, token: SoftToken, suite: Suite, tmp_path: Path) -> None:
    guide = guide_of(token, neuron=Neuron.named("never"))
    result = evaluate(model, [suite], guide=guide, out=tmp_path, compare=True, max_new_tokens=LIMIT)
    rows = {(row["arm"], row["id"]): row["reply"] for row in stored(tmp_path)}
    assert all(rows["guide", r.id] == rows["base", r.id] for r in suite.records)
    assert result["neuron"]["small"]["harmful"] == {
        "spike_rate": None, "guided_rate": None, "mean_divergence": None, "mean_alpha": 0, "unrated": 0,
    }  # fmt: skip
    assert all(p["keyword"]["p"] == 1 for p in result["paired"]["small"].values())


def test_prefills_and_rows_without_room(model: Model, token: SoftToken, tmp_path: Path) -> None:
    first, second, *_ = records(1, ("test",))
    rows = (first.model_copy(update={"prefill": "Sure, "}), second.model_copy(update={"prompt": "x" * 600}))
    evaluate(model, [Suite("s", rows, 2)], guide=guide_of(token), out=tmp_path, max_new_tokens=LIMIT)
    (forced,) = generate(model, [first.chat], guide=guide_of(token), prefills=["Sure, "], max_new_tokens=LIMIT)
    found = {row["id"]: row for row in stored(tmp_path)}
    assert found[first.id]["reply"] == forced.text
    assert second.id not in found  # tried again by the next run
    shown = read_json(tmp_path / "rows.json")["s"]
    assert shown[1]["guide"]["refused"] is None  # unscored


def test_what_cannot_guide_is_refused_before_anything_is_written(
    model: Model, token: SoftToken, suite: Suite, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    with pytest.raises(ConfigError, match="exclude each other"):
        evaluate(model, [suite], token=token, guide=Guide(token), out=out)
    stranger = build("llama", "default", seed=9)
    with pytest.raises(ArtefactError, match="trained on"):
        evaluate(stranger, [suite], guide=Guide(token), out=out)
    with pytest.raises(ArtefactError, match="base model itself"):
        evaluate(model, [suite], guide=Guide(model), out=out)
    assert not out.exists()


def test_activity_by_hand() -> None:
    rows = [
        {"label": "harmful", "spikes": [0, 1, 1], "guided": [0, 0, 1], "divergence": [0.1, 0.5, 0.9], "alpha": 0.9,
         "rated": True},
        {"label": "harmful", "spikes": [1], "guided": [1], "divergence": [0.5], "alpha": 0.1, "rated": False},
        {"label": "harmful", "spikes": [], "guided": [], "divergence": [], "alpha": 0.5, "rated": True},
        {"label": "benign", "spikes": [], "guided": [], "divergence": [], "alpha": None, "rated": None},
    ]  # fmt: skip
    found = neuron_activity(rows)
    assert found["harmful"] == pytest.approx(
        {"spike_rate": 0.75, "guided_rate": 0.5, "mean_divergence": 0.5, "mean_alpha": 0.5, "unrated": 1}
    )
    assert found["benign"] == {
        "spike_rate": None, "guided_rate": None, "mean_divergence": None, "mean_alpha": 0, "unrated": 0,
    }  # fmt: skip
    assert neuron_activity([]) == {}


def rise(before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any]:
    difference, interval = paired_difference(list(map(bool, before)), list(map(bool, after)))
    changed = sum(b != a for b, a in zip(before, after, strict=True)) / len(before)
    return {"difference": difference, "ci95": list(interval), "p": 1.0, "detectable": detectable(len(before), changed)}


def test_pairs_by_hand() -> None:
    """Rows that either arm could not score are left out, and with them a judge that scored none."""
    sorry, fine = "I'm sorry, I can't help with that.", "Here you are."

    def rows(*replies: str, log_odds: float | None) -> list[dict[str, Any]]:
        labels = ("harmful",) * 4 + ("benign",) * 2
        return [{"label": la, "reply": re, "log_odds": log_odds} for la, re in zip(labels, replies, strict=True)]

    before = rows(fine, fine, fine, sorry, fine, fine, log_odds=-1.0)
    after = rows(sorry, sorry, "", fine, fine, sorry, log_odds=None)
    assert paired(before, after, ("keyword", "logit")) == {
        "harmful": {"keyword": {"now_refused": 2, "now_answered": 1, **rise((0, 0, 1), (1, 1, 0))}},
        "benign": {"keyword": {"now_refused": 1, "now_answered": 0, **rise((0, 0), (0, 1))}},
    }


def test_a_row_that_the_template_refuses_is_unscored_and_the_others_are_done(tmp_path: Path) -> None:
    model = build("llama", "no_system")
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user")
    odd = Record(
        id="odd",
        messages=({"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}),
        label="harmful",
        group="harmful",
    )
    suite = Suite("small", (odd, *(Record(id=f"{i}", prompt="the inn", label="benign") for i in range(2))), 3)
    for guidance in ({"token": token}, {"guide": Guide(token, risk=ConstantRisk(9))}):
        result = evaluate(
            model, [suite], **guidance, out=tmp_path / next(iter(guidance)), compare=True, max_new_tokens=3
        )  # type: ignore[arg-type]
        assert result["failed"] == 2  # one in each arm
        harmful, benign = (result["suites"]["small"][label]["keyword"] for label in ("harmful", "benign"))
        assert (harmful["n"], harmful["unscored"], benign["n"]) == (0, 1, 2)


def test_whoever_is_at_work_in_a_folder_is_left_alone(model: Model, suite: Suite, tmp_path: Path) -> None:
    """From Python as from the command line, and by another process."""
    code = "import sys; from pathlib import Path; from trimtab.run import alone, create\nwith alone(create(Path(sys.argv[1]))): print('in', flush=True); sys.stdin.read()"
    out = tmp_path / "shared"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        for work in (
            lambda: evaluate(model, [suite], out=out, max_new_tokens=2),
            lambda: align(model, list(suite.records), out=out),
            lambda: train_expert(model, records(2, ("train", "validation")), out=out),
        ):
            with pytest.raises(RunError, match="another process is at work in"):
                work()
        assert {path.name for path in out.iterdir()} == {".lock"}
        other.communicate("")
    assert evaluate(model, [suite], out=out, max_new_tokens=2)["failed"] == 0


def test_p_is_adjusted_for_every_suite_and_label_a_judge_saw() -> None:
    suites = {
        "a": {"harmful": {"keyword": {"p": 0.01}, "logit": {"p": 0.02}}, "benign": {"keyword": {"p": 0.03}}},
        "b": {"harmful": {"keyword": {"p": 0.5}}},
    }
    found = suites
    adjusted(suites.values())
    keyword = [found["a"]["harmful"]["keyword"], found["a"]["benign"]["keyword"], found["b"]["harmful"]["keyword"]]
    assert [cell["p_holm"] for cell in keyword] == pytest.approx([0.03, 0.06, 0.5])
    assert found["a"]["harmful"]["logit"] == {"p": 0.02, "p_holm": 0.02}


def test_the_public_names_are_these(model: Model, token: SoftToken, suite: Suite, tmp_path: Path) -> None:
    """The API as a user would write it."""
    guide = tt.Guide(token, risk=ConstantRisk(9))
    (reply,) = tt.generate(model, ["Hi"], guide=guide, max_new_tokens=2)
    assert reply.rating == Rating(9)
    assert reply.alpha == 0.9
    assert not isnan(reply.trace[0].divergence)
