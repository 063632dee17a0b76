"""The pipeline on tiny models: only the vector learns, a killed run ends with the same bits, bad data is told apart."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from conftest import build, naive_logits, naive_reply
from trimtab.chat import POSITIONS, render, reply_ids
from trimtab.config import AlignSettings
from trimtab.errors import DataError, FilterError, RunError
from trimtab.evaluation.metrics import harmonic_mean
from trimtab.models import Model
from trimtab.prompts.records import Record, Sample
from trimtab.refusal import is_refusal
from trimtab.run import read_json
from trimtab.softtoken.align import prepare
from trimtab.softtoken.examples import Examples
from trimtab.softtoken.openings import HELD_OUT_ATTACKS, attack_ids
from trimtab.softtoken.optimiser import NaturalGradient
from trimtab.softtoken.targets import deciding_tokens
from trimtab.softtoken.train import (
    MAX_LENGTH,
    MAX_PREFIX,
    START_LENGTH,
    WORDING_WEIGHT,
    Trainer,
    TrainingSet,
    batch_loss,
    batches,
    initial,
    sample_losses,
    token_weights,
)
from trimtab.softtoken.validation import validate

WORDS = [
    "sea",
    "bank",
    "ship",
    "rope",
    "sail",
    "tide",
    "port",
    "crew",
    "wind",
    "deck",
    "mast",
    "helm",
    "keel",
    "dock",
    "buoy",
    "gale",
    "reef",
    "knot",
    "hull",
    "wake",
]
SHORT = AlignSettings(
    steps=6, batch=4, eval_every=3, calibration_steps=2, reply_tokens=3, position="assistant", radius=0.05
)


def records(n: int = 12, splits: tuple[str, ...] = ("train", "validation", "test")) -> list[Record]:
    """Requests of three groups, each with words of its own."""
    return [
        Record(
            id=f"{split}-{group}-{i}",
            prompt=f"{group} " + " ".join(random.Random(f"{split}{group}{i}").choices(WORDS, k=4 + i % 5)),
            label="harmful" if group == "harmful" else "benign",
            group=group,
            category=f"c{i % 2}",
            split=split,
        )
        for split in splits
        for group in ("harmful", "borderline", "plain")
        for i in range(n)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model() -> Model:
    return build("llama", "default")


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.network.state_dict().items()}


@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "after_bos"])
def test_only_the_vector_learns(model: Model, position: str) -> None:
    before = weights(model)
    token = tt.align(model, records(), settings=SHORT.model_copy(update={"position": position}))
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    assert token.vectors.shape == (1, model.hidden_size)
    assert token.position == position
    assert not model.embedding._forward_hooks


def test_several_tokens(model: Model) -> None:
    assert tt.align(model, records(), settings=SHORT.model_copy(update={"tokens": 3})).vectors.shape[0] == 3


def test_same_seed_same_bits_other_seed_others(model: Model) -> None:
    first, again, other = (
        tt.align(model, records(), settings=SHORT.model_copy(update={"seed": seed})).vectors for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("steps_before_the_kill", [1, 4, 6])
def test_a_killed_run_ends_with_the_same_bits(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before_the_kill: int
) -> None:
    monkeypatch.setattr("trimtab.softtoken.train.CHECKPOINT_EVERY", 2)
    whole = tt.align(model, records(), settings=SHORT, out=tmp_path / "whole")
    take_step = Trainer.take_step

    def killed(self: Trainer, radius: float, weight: float) -> None:
        if self.step == steps_before_the_kill:
            raise MemoryError("killed")  # like kill -9: nothing of ours runs after it
        take_step(self, radius, weight)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", killed)
        with pytest.raises(MemoryError):
            tt.align(model, records(), settings=SHORT, out=tmp_path / "killed")
    resumed = tt.align(model, records(), settings=SHORT, out=tmp_path / "killed")
    assert torch.equal(whole.vectors, resumed.vectors)
    histories = [json.loads((tmp_path / run / "history.json").read_text()) for run in ("whole", "killed")]
    assert histories[0] == histories[1]


def test_ctrl_c_leaves_a_checkpoint(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = Trainer.take_step

    def interrupted(self: Trainer, radius: float, weight: float) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(self, radius, weight)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tt.align(model, records(), settings=SHORT, out=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert torch.equal(
        tt.align(model, records(), settings=SHORT, out=tmp_path).vectors,
        tt.align(model, records(), settings=SHORT).vectors,
    )


def test_the_run_folder_tells_the_story(model: Model, tmp_path: Path) -> None:
    token = tt.align(model, records(), settings=SHORT, out=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == model.fingerprint
    assert manifest["token"]["numbers"] == model.hidden_size
    assert manifest["effect_kl"] > 0
    assert manifest["data"]["train"] == {"harmful": 12, "borderline": 12, "plain": 12}
    assert [r["name"] for r in json.loads((tmp_path / "filter.json").read_text())] == [
        "label agreement", "behaviour", "target", "duplicates", "balance",
    ]  # fmt: skip
    assert torch.equal(tt.SoftToken.load(tmp_path, model).vectors, token.vectors)


def test_a_finished_run_is_not_trained_again(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tt.align(model, records(), settings=SHORT, out=tmp_path)
    monkeypatch.setattr(Trainer, "take_step", lambda *_: pytest.fail("trained again"))
    assert torch.equal(tt.align(model, records(), settings=SHORT, out=tmp_path).vectors, token.vectors)


def test_a_limit_takes_every_group_in_proportion(model: Model, tmp_path: Path) -> None:
    tt.align(model, records(20), settings=SHORT.model_copy(update={"limit": 30}), out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["train"] == {"harmful": 10, "borderline": 10, "plain": 10}
    assert manifest["data"]["validation"] == {"harmful": 20, "borderline": 20, "plain": 20}


def test_another_run_is_not_written_over(model: Model, tmp_path: Path) -> None:
    tt.align(model, records(), settings=SHORT, out=tmp_path)
    with pytest.raises(RunError, match="another run"):
        tt.align(model, records(), settings=SHORT.model_copy(update={"seed": 7}), out=tmp_path)


def test_labels_of_one_class(model: Model) -> None:
    with pytest.raises(DataError, match="no harmful prompts"):
        tt.align(model, [r for r in records() if r.label == "benign"], settings=SHORT)


def test_data_that_the_filter_empties(model: Model) -> None:
    same = [r.model_copy(update={"prompt": "the very same words"}) for r in records()]
    with pytest.raises(FilterError, match="label agreement"):
        tt.align(model, same, settings=SHORT)


def test_auto_tries_positions_and_keeps_the_best(model: Model, tmp_path: Path) -> None:
    token = tt.align(
        model, records(6), settings=SHORT.model_copy(update={"position": "auto", "calibration_steps": 0}), out=tmp_path
    )
    pilots = json.loads((tmp_path / "manifest.json").read_text())["pilots"]
    assert {row["position"] for row in pilots} == {p for p in POSITIONS if p != "after_bos"}
    assert token.position == pilots[0]["position"]
    assert pilots[0]["auc"] == max(row["auc"] for row in pilots)


def test_batches_are_balanced_bucketed_and_cover_everything(model: Model) -> None:
    examples = Examples(model, records(16, ("train",)), "test", position="user")
    pick = batches(examples, 8, seed=0)
    drawn = [pick(step) for step in range(16)]
    for rows in drawn:
        groups = [examples.group(i) for i in rows]
        assert (groups.count("harmful"), groups.count("borderline"), groups.count("plain")) == (8, 4, 4)
    assert {i for rows in drawn for i in rows} == set(range(48))
    spread = [max(examples.lengths[i] for i in rows) - min(examples.lengths[i] for i in rows) for rows in drawn]
    shuffled = [pick(step) for step in range(16, 32)]
    assert drawn != shuffled
    assert sum(spread) / len(spread) < max(examples.lengths) - min(examples.lengths)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("position", ["start", "user", "assistant", "reply"])
def test_reused_prefixes_give_the_same_scores_as_whole_prompts(family: str, position: str) -> None:
    from trimtab.chat import render
    from trimtab.refusal import log_odds

    model = build(family, "default")
    rows = records(3, ("validation",))
    vectors = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    scores = validate(model, Examples(model, rows, "test", position=position, n_tokens=2), vectors)
    found = [look.score for group in scores.values() for look in group]
    prompts = [render(model, r.chat, position=position, n_tokens=2) for r in rows]
    whole = dict(zip([r.id for r in rows], log_odds(model, prompts, vectors=vectors), strict=True))
    assert sorted(found) == pytest.approx(sorted(whole.values()), abs=2e-3)


def test_the_start_is_long_and_in_a_direction_of_its_own(model: Model) -> None:
    first, second = initial(model, 2, seed=0)
    rows = float(model.table.norm(dim=1).mean())
    assert float(first.norm()) == pytest.approx(START_LENGTH * rows, rel=1e-4)
    assert float(second.norm()) == pytest.approx(START_LENGTH * rows, rel=1e-4)
    assert float(torch.cosine_similarity(first, second, dim=0)) < 0.99
    assert torch.equal(initial(model, 2, seed=0)[0], first)
    assert not torch.equal(initial(model, 2, seed=1)[0], first)


def training_set(model: Model, refusal: str, k: int, **options: object) -> TrainingSet:
    some = records(4, ("train",))
    base = Examples(model, some, "test")
    samples = [Sample(r, 0.0, refusal if r.label == "harmful" else "sea bank ship rope sail", True) for r in some]
    return TrainingSet(model, samples, base, SHORT.model_copy(update={"reply_tokens": k, **options}), "assistant")


def test_the_decision_is_the_tokens_that_make_it_a_refusal(model: Model) -> None:
    refusal = "Sorry, but I can't help with that."
    ids = reply_ids(model, refusal)
    decision = deciding_tokens(model, refusal)
    assert is_refusal(model.tokenizer.decode(ids[:decision]))
    assert not is_refusal(model.tokenizer.decode(ids[: decision - 1]))
    data = training_set(model, refusal, decision + 2)
    assert data.decision == decision
    assert token_weights(9, 3, 5) == [1.0] * 3 + [WORDING_WEIGHT] * 2
    assert token_weights(4, 3, 6) == [1.0] * 3 + [WORDING_WEIGHT, 0.0, 0.0]
    assert training_set(model, refusal, 1).decision == 1  # never more than the loss may see


def test_the_loss_over_fewer_tokens_is_the_loss_of_a_shorter_set(model: Model) -> None:
    refusal = "Sorry, but I can't help with that."
    vectors = initial(model, 1, seed=0)
    long, short = training_set(model, refusal, 6), training_set(model, refusal, 2)
    assert long.decision > short.decision == 2
    long.decision = 2
    rows = [0, 1, 4, 8]
    copies = vectors.expand(len(rows), *vectors.shape)
    for ours, theirs in zip(
        batch_loss(model, long, rows, copies, SHORT, 0.5, 2),
        batch_loss(model, short, rows, copies, SHORT, 0.5, 2),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_refusals_are_read_further_than_answers(model: Model) -> None:
    """Of answers only what decides; the order of rows does not matter, and neither do others in the batch."""
    data = training_set(model, "Sorry, but I can't help with that.", 6)
    data.decision = 2
    vectors = initial(model, 1, seed=0)
    rows = [data.examples.indices(g)[i] for g, i in (("plain", 0), ("harmful", 0), ("borderline", 1), ("harmful", 1))]
    loss, h, b = batch_loss(model, data, rows, vectors.expand(4, 1, -1), SHORT, 0.25, 6)
    for i, found, k in zip(rows, (b[0], h[0], b[1], h[1]), (2, 6, 2, 6), strict=True):
        assert torch.allclose(found, sample_losses(model, data, [i], vectors, k, 0)[0], atol=1e-4)
    assert float(loss) == pytest.approx(0.75 * float(h.mean()) + 0.25 * float(b.mean()), rel=1e-5)
    assert not torch.allclose(h, sample_losses(model, data, [rows[1], rows[3]], vectors, 2, 0), atol=1e-2)


def test_an_expert_also_learns_to_refuse_when_its_reply_has_begun(model: Model) -> None:
    refusal = "Sorry, but I can't help with that."
    data = training_set(model, refusal, 4, goal="refuse")
    harmful, leads = data.examples.indices("harmful"), data.openings.leads
    led, plain = (next(i for i in data.openings.answers if (i in leads) is which) for which in (True, False))
    assert len(leads) == round(len(data.reference) / 2)
    begun = {i: [data.said(i, step) for step in range(400)] for i in (harmful[0], led, plain)}
    assert begun[led] == [data.said(led, step) for step in range(400)]  # so a resumed run sees the same
    attacks = data.openings.attacks
    own = tuple(naive_reply(model, render(model, data.examples.records[harmful[0]].prompt).ids, MAX_PREFIX))
    for opening, reply, _ in begun[harmful[0]]:
        space = " " if opening and not model.tokenizer.decode(opening[-1:]).isspace() else ""
        assert reply == (reply_ids(model, space + refusal, end=True) if opening else data.replies[harmful[0]])
        assert opening == own[: len(opening)] or any(opening == (*a, *own)[: len(opening)] for a in attacks)
    for i in (led, plain):
        lead, answer = leads.get(i, ()), data.replies[i]
        for opening, reply, n in begun[i]:
            assert (opening, reply) == (lead + answer[:n], answer[n:])
            assert reply
        assert {n for *_, n in begun[i]} == set(range(min(MAX_PREFIX, len(answer) - 1) + 1))
    for i, cases in begun.items():
        started = [len(opening) > len(leads.get(i, ())) for opening, *_ in cases]
        assert 0.4 < sum(started) / len(started) < 0.6
    behind_attack = [opening != own[: len(opening)] for opening, *_ in begun[harmful[0]]]
    assert 0.15 < sum(behind_attack) / 400 < 0.35

    # The losses of begun replies, by hand: the refusal behind the opening; KL along the model's own answer.
    vectors, k = initial(model, 1, seed=0), data.decision
    counts = torch.tensor(token_weights(9, data.decision, k))
    for i in (led, plain):
        step = next(s for s in range(400) if 0 < begun[i][s][2] < len(data.replies[i]) - k and begun[harmful[0]][s][0])
        _, h, b = batch_loss(model, data, [harmful[0], i], vectors.expand(2, 1, -1), SHORT, 0.5, k, step)

        def logits(i: int, vectors: torch.Tensor | None, step: int = step) -> torch.Tensor:
            """At the places where the first k ids of what is to be said are due."""
            words, reply, _ = begun[i][step]
            place = "assistant" if vectors is not None else None
            prompt = render(model, data.examples.records[i].prompt, position=place).ids
            return naive_logits(model, [*prompt, *words, *reply[: k - 1]], vectors)[-k:].log_softmax(-1)

        _, refused, _ = begun[harmful[0]][step]
        expected = -(logits(harmful[0], vectors)[range(k), refused[:k]] * counts).sum()
        assert float(h) == pytest.approx(float(expected), abs=1e-3)
        p, q = logits(i, None), logits(i, vectors)
        assert float(b) == pytest.approx(float(((p.exp() * (p - q)).sum(-1) * counts).sum()), rel=0.02)


def test_an_expert_is_validated_behind_openings_too(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model learns no words: let every short reply with an "e" be a refusal.
    monkeypatch.setattr("trimtab.softtoken.openings.is_refusal", lambda words: len(words) < 15 and "e" in words)

    def words(ids: list[int]) -> str:
        return str(model.tokenizer.decode(ids, skip_special_tokens=True))

    settings = SHORT.model_copy(update={"goal": "refuse", "refusal": "Sorry"})
    token = tt.align(model, records(), out=tmp_path, settings=settings)
    manifest = read_json(tmp_path / "manifest.json")
    prompts = [r.prompt for r in records() if r.label == "harmful" and r.split == "validation"]
    own = {prompt: naive_reply(model, render(model, prompt).ids, 5) for prompt in prompts}
    # Every other time behind the words of a prefill attack.
    attacks = attack_ids(model, HELD_OUT_ATTACKS)
    begun = {p: (*(attacks[i // 2 % 3] if i % 2 else ()), *ids) for i, (p, ids) in enumerate(own.items())}
    assert manifest["data"]["validation_with_opening"] == len(begun) > 3

    def rate(vectors: torch.Tensor | None) -> float:
        place = "assistant" if vectors is not None else None
        read = [[*render(model, p, position=place).ids, *o] for p, o in begun.items()]
        return sum("e" in words(naive_reply(model, ids, 8, vectors)) for ids in read) / len(read)

    found = [manifest["validation"][when]["prefill_refusal"] for when in ("before", "after")]
    assert found == [rate(None), rate(token.vectors)]
    assert 0 < found[0] < 1


def test_openings_are_for_the_goal_that_needs_them(model: Model) -> None:
    data = training_set(model, "Sorry, no.", 2)
    everyone = range(len(data.replies))
    assert {data.said(i, step)[0] for i in everyone for step in range(50)} == {()}
    assert [data.said(i, 0)[1] for i in everyone] == data.replies


def test_every_third_step_looks_at_the_wording(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append(args[-2])  # type: ignore[arg-type]
        return batch_loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("trimtab.softtoken.train.batch_loss", spy)
    settings = SHORT.model_copy(update={"steps": 20, "reply_tokens": 9, "calibration_steps": 2})
    tt.align(model, records(), settings=settings)
    assert seen[0] == 9 > seen[1]
    assert seen == (seen[:1] + [seen[1]] * 2) * 7 + [9]


def script(monkeypatch: pytest.MonkeyPatch, looks: list[tuple[float, float]]) -> tuple[Any, list[torch.Tensor]]:
    """Validation that finds `looks`, refused of harmful and answered of benign, one after another; what is left of them, and the vectors that were looked at."""
    rates, seen = iter(looks), []

    def scripted(model: Model, examples: object, vectors: torch.Tensor) -> tuple[float, float]:
        seen.append(vectors.clone())
        return next(rates)

    monkeypatch.setattr("trimtab.softtoken.train.validate", scripted)
    monkeypatch.setattr(
        "trimtab.softtoken.train.summary",
        lambda found: {
            "harmful_refusal": found[0],
            "benign_compliance": found[1],
            "harmonic_mean": harmonic_mean(*found),
        },
    )
    return rates, seen


def trainer_of(model: Model, floor: float = 0.0, **changed: Any) -> Trainer:
    settings = SHORT.model_copy(update={"steps": 2, "eval_every": 2, "calibration_steps": 2, **changed})
    prepared = prepare(model, records(), settings)
    data = TrainingSet(model, prepared.samples, prepared.base, settings, "assistant")
    return Trainer(model, data, prepared.held, settings, None, floor)


@pytest.mark.parametrize(
    ("looks", "shares", "kept"),
    [
        ([(0.9, 0.5), (0.8, 0.55)], [1.0], 1.0),  # not there yet at the end of the way
        ([(0.9, 0.5), (0.6, 0.9), (0.75, 0.55)], [1.0, 0.5], 1.0),  # tipped over
        ([(0.9, 0.5), (0.4, 0.9), (0.8, 0.6)], [1.0, 0.5], 0.5),
        ([(0.3, 0.9), (0.9, 0.2), (0.7, 0.6)], [1.0, 0.5], 0.5),  # too lax at first
        ([(0.9, 0.5), (0.4, 0.9), (0.45, 0.9)], [1.0, 0.5], None),  # nothing better on the way
    ],
)
def test_calibration_stops_where_the_worse_rate_is_best(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    looks: list[tuple[float, float]],
    shares: list[float],
    kept: float | None,
) -> None:
    rates, seen = script(monkeypatch, looks)
    trainer = trainer_of(model)
    trainer.run(lambda: None)
    trainer.calibrate()
    begin, end, *between = seen
    assert not torch.equal(begin, end)
    assert next(rates, None) is None
    for share, vectors in zip(shares[1:], between, strict=True):
        torch.testing.assert_close(vectors, begin + share * (end - begin))
    expected = begin if kept is None else begin + kept * (end - begin)
    torch.testing.assert_close(trainer.best, expected)
    assert trainer.kept.get("calibration") == kept
    assert (trainer.kept["harmful_refusal"], trainer.kept["benign_compliance"]) == looks[
        0 if kept is None else shares.index(kept) + 1
    ]


@pytest.mark.parametrize(
    ("looks", "kept"),
    [
        (
            [(0.7, 0.8), (0.8, 0.75), (0.92, 0.6), (0.86, 0.7), (0.88, 0.9), (0.91, 0.7)],
            5,
        ),  # goes on until enough, then for the balance
        ([(0.7, 0.8), (0.6, 0.9)], 0),  # no way up
        ([(0.95, 0.5), (0.85, 0.9), (0.93, 0.6)], 2),  # enough before: answers are won above the floor only
        ([(0.95, 0.5), (0.85, 0.9), (0.85, 0.9)], 0),
    ],
)
def test_refusals_that_must_be_kept_come_first(
    model: Model, monkeypatch: pytest.MonkeyPatch, looks: list[tuple[float, float]], kept: int
) -> None:
    rates, _ = script(monkeypatch, looks)
    trainer = trainer_of(model, floor=0.9)
    trainer.run(lambda: None)
    trainer.calibrate()
    assert next(rates, None) is None
    assert (trainer.kept["harmful_refusal"], trainer.kept["benign_compliance"]) == looks[kept]


@pytest.mark.parametrize(("floor", "best"), [(0.0, 1), (0.9, 0)])
def test_selection_asks_for_the_floor_first(
    model: Model, monkeypatch: pytest.MonkeyPatch, floor: float, best: int
) -> None:
    looks = [(0.9, 0.4), (0.8, 0.8)]
    script(monkeypatch, looks)
    trainer = trainer_of(model, floor, eval_every=1)
    trainer.run(lambda: None)
    assert (trainer.kept["harmful_refusal"], trainer.kept["benign_compliance"]) == looks[best]


def test_the_floor_is_a_share_of_what_was_refused_before(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    begin = Trainer.__init__

    def watched(self: Trainer, *args: Any, floor: float = 0.0) -> None:
        seen.append(floor)
        begin(self, *args, floor=floor)

    monkeypatch.setattr(Trainer, "__init__", watched)
    monkeypatch.setattr("trimtab.softtoken.validation.is_refusal", lambda _words: True)
    tt.align(model, records(), settings=SHORT.model_copy(update={"keep": 0.5}))
    assert seen == [0.5]


def test_a_vector_does_not_run_away(model: Model) -> None:
    settings = SHORT.model_copy(update={"steps": 40, "radius": 50.0, "calibration_steps": 0, "eval_every": 40})
    token = tt.align(model, records(), settings=settings)
    bound = MAX_LENGTH * START_LENGTH * float(model.table.norm(dim=1).mean())
    assert bound / 3 < float(token.vectors.norm()) <= bound * 1.001


def test_several_tokens_step_as_each_would_alone() -> None:
    """At the size of a real model, where solving for all of them at once once went wrong without a word."""
    n, d, b = 3, 576, 8
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(b, n, d, generator=generator)
    start = 10 * torch.randn(n, d, generator=generator)
    together, optimiser = start.clone(), NaturalGradient(start, damping=0.1)
    optimiser.step(together, gradients, radius=0.1)
    g = gradients.double()
    fisher = torch.einsum("bni,bnj->nij", g, g) / b
    damped = fisher + 0.1 * fisher.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(d)
    delta = torch.stack([torch.linalg.inv(damped[i]) @ g.mean(0)[i] for i in range(n)])
    delta *= 0.1 / torch.einsum("ni,nij,nj->", delta, fisher, delta).sqrt()
    torch.testing.assert_close(together, (start - delta).float(), atol=1e-4, rtol=1e-4)


def test_pilots_that_are_done_are_not_run_again(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SHORT.model_copy(update={"position": "auto", "calibration_steps": 0})
    whole = tt.align(model, records(6), settings=settings, out=tmp_path / "whole")
    run, places = Trainer.run, []

    def counted(self: Trainer, advance: Callable[[], None]) -> None:
        places.append(self.data.examples)
        if len(places) == 4:
            raise KeyboardInterrupt
        run(self, advance)

    monkeypatch.setattr(Trainer, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        tt.align(model, records(6), settings=settings, out=tmp_path / "stopped")
    resumed = tt.align(model, records(6), settings=settings, out=tmp_path / "stopped")
    pilots = json.loads((tmp_path / "stopped" / "manifest.json").read_text())["pilots"]
    assert len(places) == 4 + len(pilots) - 3 + 1  # the one that was stopped, those still to do, the training
    assert pilots == json.loads((tmp_path / "whole" / "manifest.json").read_text())["pilots"]
    assert torch.equal(whole.vectors, resumed.vectors)


def test_an_earlier_look_that_was_better_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [(0.9, 0.8), (0.95, 0.6), (0.5, 0.9)])
    trainer = trainer_of(model, steps=5)
    seen = []
    trainer.run(lambda: seen.append(trainer.vectors.clone()))
    assert torch.equal(trainer.best, seen[1])
    assert (trainer.kept["step"], trainer.step) == (2, 5)


def test_a_model_in_bfloat16_trains_a_vector_in_float32(model: Model) -> None:
    model.network.to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    token = tt.align(model, records(), settings=SHORT)
    assert (token.dtype, token.vectors.dtype) == ("bfloat16", torch.float32)
    assert torch.equal(token.vectors, tt.align(model, records(), settings=SHORT).vectors)
    assert not torch.equal(token.vectors, token.vectors.bfloat16().float())
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


COMMAND = "import sys; from trimtab import cli; sys.argv = ['trimtab', *sys.argv[1:]]; cli.main()"


def command(folder: Path, data: Path, out: Path) -> list[str]:
    options = ["--data", str(data), "-o", str(out), "--steps", "40", "--batch", "2", "--check", "0"]
    return [sys.executable, "-c", COMMAND, "align", str(folder), *options]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in records(6)))
    return path


def test_kill_9_costs_nothing_but_time(folder: Path, data: Path, tmp_path: Path) -> None:
    subprocess.run(command(folder, data, tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(command(folder, data, tmp_path / "killed"), stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = subprocess.run(command(folder, data, tmp_path / "killed"), check=True, capture_output=True, text=True)
    assert "going on from step" in again.stderr
    tokens = [(tmp_path / run / "token" / "token.safetensors").read_bytes() for run in ("whole", "killed")]
    assert tokens[0] == tokens[1]


def test_a_full_disk_is_told_and_the_run_can_go_on(folder: Path, data: Path, tmp_path: Path) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

    out = tmp_path / "run"
    stopped = subprocess.run(command(folder, data, out), capture_output=True, text=True, preexec_fn=full, check=False)
    assert stopped.returncode == 1
    assert "error: cannot write" in stopped.stderr
    assert "run the same command again" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    subprocess.run(command(folder, data, out), check=True, capture_output=True)
    assert (out / "manifest.json").exists()
