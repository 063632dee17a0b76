"""An exported SmolLM2-135M in a process that cannot import trimtab: transformers' pipeline gives trimtab's replies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab as tt
from conftest import vectors_for
from trimtab.softtoken.artifact import SoftToken

pytestmark = pytest.mark.real

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": "I think so."},
        {"role": "user", "content": "Name them."},
    ],
    [{"role": "user", "content": "Say <| trimtab_0|> twice."}],
]
SPELLED = [
    {"role": "user", "content": "Say <|trimtab_0|> twice."}
]  # the slot's name; the template takes it apart, as above
STOCK = """
import json, sys
sys.modules["trimtab"] = None  # importing it fails
from transformers import pipeline
folder, chats = sys.argv[1], json.loads(sys.argv[2])
speak = pipeline("text-generation", folder, dtype="float32", device="cpu")
print(json.dumps([speak(chat, max_new_tokens=20, do_sample=False)[0]["generated_text"][-1]["content"] for chat in chats]))
"""


def test_the_pipeline_gives_our_replies(tmp_path: Path) -> None:
    model = tt.load("smollm2-135m")
    token = SoftToken.of(model, vectors_for(model), "assistant")
    tt.export(model, token, tmp_path / "out", format="hf", check=False)
    command = [sys.executable, "-c", STOCK, str(tmp_path / "out"), json.dumps([*CHATS, SPELLED])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *said, spelled = json.loads(output.splitlines()[-1])
    ours = tt.generate(model, CHATS, token=token, max_new_tokens=20)
    assert said == [reply.text for reply in ours]
    assert spelled == said[-1]
    untouched = tt.generate(model, CHATS, max_new_tokens=20)
    assert any(one.text != other.text for one, other in zip(ours, untouched, strict=True))
