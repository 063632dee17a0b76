"""Likelihoods of given replies against one that reads every row by itself, in one go, and steps the neuron by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, build, naive_logits, vectors_for
from test_guided import EXPERTS, adapter, relative
from trimtab.chat import render, reply_ids
from trimtab.decoding.generate import generate
from trimtab.decoding.likelihood import guided_log_odds, likelihood
from trimtab.models import Model
from trimtab.neuron.expert import Expert, load_expert, model_expert, token_expert
from trimtab.neuron.guide import Guide
from trimtab.neuron.mix import mix, tv
from trimtab.neuron.neuron import Neuron
from trimtab.neuron.risk import ConstantRisk
from trimtab.refusal import OPENINGS, log_odds
from trimtab.softtoken.artifact import SoftToken

CHATS = ("Hi", "Where is the inn, then? " * 3, "a  b", "the the the", "x" * 30)
REPLIES = ("Sorry, no.", "In the inn", "y", "I can't help with that, and the reason is long.", "the")


def chances(
    model: Model, ids: tuple[int, ...], said: tuple[int, ...], vectors: torch.Tensor | None = None
) -> torch.Tensor:
    """`[len(said), V]`, the slot's ids left out."""
    logits = naive_logits(model, [*ids, *said], vectors)[len(ids) - 1 : -1].clone()
    if vectors is not None:
        logits[:, [i for i in model.slot_ids(len(vectors)) if i < logits.shape[1]]] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_alone_and_with_a_token(family: str, with_token: bool) -> None:
    model = build(family, "chatml", reserved=2)
    token = SoftToken.of(model, vectors_for(model, 2, 30.0), "user") if with_token else None
    found = likelihood(model, CHATS, REPLIES, token=token)
    for chat, reply, (p, greedy) in zip(CHATS, REPLIES, found, strict=True):
        ids = (token.render(model, chat) if token else render(model, chat)).ids
        said = reply_ids(model, reply)
        each = chances(model, ids, said, token.vectors if token else None)
        assert p == pytest.approx(float(each[range(len(said)), list(said)].log().sum()), abs=2e-3)
        assert greedy == (each.argmax(-1).tolist() == list(said))
    assert len({p for p, _ in found}) == len(found)


def expert_of(model: Model, kind: str, folder: Path) -> Expert:
    if kind == "token":
        return token_expert(SoftToken.of(model, vectors_for(model, 2, 30.0), "user"), model)
    if kind == "lora":
        return load_expert(f"lora:{adapter(model, folder)}", model)
    return model_expert(relative(model, 0.3), model)


@pytest.mark.parametrize("neuron", ["primed", "lif", "always"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_under_a_guide(kind: str, neuron: str, tmp_path: Path) -> None:
    model = build("llama", "chatml", reserved=2)
    expert, unit = expert_of(model, kind, tmp_path), Neuron.named(neuron)
    guide = Guide(expert, unit, risk=ConstantRisk(7))  # alpha 0.9
    spikes = 0
    for chat, reply, (p, greedy) in zip(CHATS, REPLIES, likelihood(model, CHATS, REPLIES, guide=guide), strict=True):
        said = reply_ids(model, reply)
        base = chances(model, render(model, chat).ids, said)
        with expert.speaking():
            heard = expert.render(chat).ids
            other = chances(expert.model, heard, said, expert.vectors)
        if expert.vectors is not None:
            banned = [i for i in model.slot_ids(2) if i < base.shape[1]]
            base[:, banned] = 0
            base = base / base.sum(-1, keepdim=True)
        potential, total, best = torch.tensor([unit.start]), 0.0, []
        for b, e, token in zip(base, other, said, strict=True):
            _, spike, potential = unit.step(potential, tv(b[None], e[None]), torch.zeros(1))
            mixed = mix(b[None], e[None], torch.tensor([0.9]))[0][0] if spike.item() else b
            spikes += int(spike.item())
            total += math.log(mixed[token])
            best.append(int(mixed.argmax()))
        assert p == pytest.approx(total, abs=2e-3)
        assert greedy == (best == list(said))
    assert spikes > 0


@pytest.mark.parametrize("kind", ["alone", "token", "guide"])
def test_what_greedy_decoding_says_is_greedy(kind: str) -> None:
    chats, seen = [letter * n for letter in "abcd" for n in (1, 4, 9)], 0
    for seed in range(8):  # each random model has its favourite words
        model = build("llama", "chatml", reserved=2, seed=seed)
        token = SoftToken.of(model, vectors_for(model, 1, 30.0), "user")
        guide = Guide(token_expert(token, model), Neuron.named("primed"), risk=ConstantRisk(7))
        options: dict[str, Any] = {"alone": {}, "token": {"token": token}, "guide": {"guide": guide}}[kind]
        said = generate(model, chats, max_new_tokens=1, **options)
        # Bytes that are no letters do not come back.
        same = [i for i, reply in enumerate(said) if reply.ids and reply_ids(model, reply.text) == reply.ids]
        found = likelihood(model, [chats[i] for i in same], [said[i].text for i in same], **options)
        assert all(greedy for _, greedy in found)
        assert not any(
            greedy for _, greedy in likelihood(model, [chats[i] for i in same], ["the inn"] * len(same), **options)
        )
        seen += len(same)
    assert seen > 10


def test_behind_a_prefill_the_words_meet_as_they_are_tokenised(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "chatml")
    (found,) = likelihood(model, ["Hi"], ["e inn"], prefills=["In th"])  # "the" is one token
    prompt = render(model, "Hi").ids
    before, whole = (render(model, "Hi", prefill=words).ids for words in ("In th", "In the inn"))
    shared = next(i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    assert len(prompt) < shared < len(before)
    said = whole[shared:]
    each = chances(model, whole[:shared], said)
    assert found.log_probability == pytest.approx(float(each[range(len(said)), list(said)].log().sum()), abs=2e-3)


def test_what_cannot_be_read_is_no_number_and_the_others_are(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "chatml")
    found = likelihood(model, ["x" * 600, "Hi", "Hi"], ["Yes", "", "Yes"])
    assert [math.isnan(p) for p, _ in found] == [True, True, False]
    assert not found[0].greedy


@pytest.mark.parametrize("neuron", ["never", "lif", "primed", "random:0.5"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_refusal_odds_under_a_guide(kind: str, neuron: str, tmp_path: Path) -> None:
    """The openings' chances added up, each as likely as that reply; with a silent neuron those of the model alone."""
    model = build("llama", "chatml", reserved=2)
    guide = Guide(expert_of(model, kind, tmp_path), Neuron.named(neuron), risk=ConstantRisk(7))
    turns = [[{"role": "user", "content": words}] for words in CHATS]
    streams = list(range(len(turns)))
    found = guided_log_odds(model, turns, guide, prefills=[""] * len(turns), alphas=[0.9] * len(turns), streams=streams)
    alone = log_odds(model, [render(model, chat) for chat in turns])
    for place, (chat, score) in enumerate(zip(turns, found, strict=True)):
        n = len(OPENINGS)
        each = likelihood(model, [chat] * n, OPENINGS, guide=guide, alphas=[0.9] * n, streams=[place] * n)
        chance = sum(math.exp(p) for p, _ in each)
        assert score == pytest.approx(math.log(chance / (1 - chance)), abs=2e-3)
    assert (found == pytest.approx(alone, abs=2e-3)) is (neuron == "never")


def test_refusal_odds_behind_a_given_beginning_and_without_room(tmp_path: Path) -> None:
    model = build("llama", "chatml", reserved=2)
    guide = Guide(expert_of(model, "token", tmp_path), Neuron.named("never"))
    turns = [[{"role": "user", "content": words}] for words in ("Hi", "x" * 600)]
    begun, outsize = guided_log_odds(model, turns, guide, prefills=["Sure, ", ""], alphas=[0.9, 0.9], streams=[0, 1])
    (expected,) = log_odds(model, [render(model, turns[0], prefill="Sure, ")])
    assert begun == pytest.approx(expected, abs=2e-3)
    assert math.isnan(outsize)
