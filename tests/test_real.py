"""The packaged SmolLM2-135M itself: loading, rendering, decoding, and one short training run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trimtab as tt
from test_guided import adapter, guided, naive_guided, relative
from trimtab.chat import render
from trimtab.config import AlignSettings
from trimtab.decoding.engine import generate_ids
from trimtab.decoding.guided import Draft
from trimtab.models import Model
from trimtab.neuron.expert import load_expert, model_expert, token_expert
from trimtab.refusal import log_odds
from trimtab.softtoken.artifact import SoftToken

pytestmark = pytest.mark.real

CHATS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea, in the style of a sailor.",
]


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return tt.load("smollm2-135m")


def test_it_is_what_the_design_says(smollm2: Model) -> None:
    assert smollm2.hidden_size == 576
    assert smollm2.dtype == torch.float32
    assert not any(p.requires_grad for p in smollm2.network.parameters())
    assert smollm2.origin["kind"] == "gguf"


def test_rendering_is_the_templates_own(smollm2: Model) -> None:
    turns = [{"role": "user", "content": CHATS[0]}]
    own = smollm2.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(render(smollm2, CHATS[0]).ids) == own
    for position in ("start", "system", "user", "assistant", "reply"):
        prompt = render(smollm2, CHATS[0], position=position)
        assert prompt.ids.count(smollm2.slot_ids(1)[0]) == 1
        assert [i for i in prompt.ids if i != smollm2.slot_ids(1)[0]] == own


def test_batched_decoding_equals_transformers(smollm2: Model) -> None:
    prompts = [render(smollm2, chat).ids for chat in CHATS]
    found = {row.index: row.ids for row in generate_ids(smollm2, prompts, max_new_tokens=12)}
    for i, ids in enumerate(prompts):
        whole = smollm2.network.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
        expected = [t for t in whole[0, len(ids) :].tolist() if t not in smollm2.eos_ids]
        assert found[i] == expected


@pytest.mark.parametrize("kind", ["token", "lora", "model"])
def test_guided_decoding_equals_the_naive_procedure(smollm2: Model, kind: str, tmp_path: Path) -> None:
    if kind == "token":
        vectors = 100 * torch.randn(1, smollm2.hidden_size, generator=torch.Generator().manual_seed(0))
        expert = token_expert(SoftToken.of(smollm2, vectors, "assistant"), smollm2)
    elif kind == "lora":
        pytest.importorskip("peft")
        expert = load_expert(f"lora:{adapter(smollm2, tmp_path, 0.3)}", tt.load("smollm2-135m"))
    else:
        expert = model_expert(relative(smollm2, 0.1), smollm2)
    alphas = (0.9, 0.5, 0.9)
    with torch.inference_mode():
        expected = [naive_guided(smollm2, expert, c, a, limit=10) for c, a in zip(CHATS, alphas, strict=True)]
        found = guided(smollm2, expert, CHATS, alphas=alphas, max_new_tokens=10, batch_size=3, draft=Draft(3))
    assert [(row.ids, [step.spike for step in row.trace]) for row in found] == expected
    assert any(any(fired) for _, fired in expected)


def test_a_short_training_run_moves_harmful_above_benign(smollm2: Model, tmp_path: Path) -> None:
    records = tt.load_prompts("builtin")
    few = [r for r in records if r.split == "train"][::14] + [r for r in records if r.split == "validation"][::6]
    settings = AlignSettings(steps=40, batch=8, eval_every=40, calibration_steps=0)
    token = tt.align(smollm2, few, settings=settings, out=tmp_path)
    test = [r for r in records if r.split == "test"][::8]
    scores = log_odds(smollm2, [token.render(smollm2, r.chat) for r in test], vectors=token.vectors)
    base = log_odds(smollm2, [render(smollm2, r.chat) for r in test])
    gain = {
        label: [s - b for s, b, r in zip(scores, base, test, strict=True) if r.label == label]
        for label in ("harmful", "benign")
    }
    mean = {label: sum(values) / len(values) for label, values in gain.items()}
    assert mean["harmful"] > mean["benign"] > 0
    history = json.loads((tmp_path / "history.json").read_text())
    for kind in ("harmful_loss", "wording_loss"):  # nats: of a refusal's first word, and of all of it
        losses = [step[kind] for step in history if kind in step]
        assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    replies = tt.generate(smollm2, CHATS, token=token, max_new_tokens=8)
    assert all(reply.text.strip() for reply in replies)
