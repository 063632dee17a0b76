"""The Modelfile. Its Go templates were rendered by Go's own text/template once, by hand; what is said there is mirrored by `said`."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import TEMPLATES, build, vectors_for
from trimtab.chat import POSITION_MEANING, Position, default_system
from trimtab.exporters.ollama import chatml, is_chatml, modelfile
from trimtab.exporters.plan import plan
from trimtab.models import load
from trimtab.softtoken.artifact import SoftToken


def test_only_chatml_is_translated() -> None:
    assert [name for name in TEMPLATES if is_chatml(build("llama", name))] == ["chatml", "default"]


@pytest.mark.parametrize("position", ["start", "system", "user", "assistant", "reply"])
def test_the_slot_is_in_its_place(position: Position) -> None:
    written = chatml("<|trimtab_0|>", position, "You are tiny.")
    before = {
        "start": '{{- "<|trimtab_0|>" }}\n{{- if ne',
        "system": "You are tiny.<|trimtab_0|><|im_end|>",
        "user": "{{ if eq $i $user }}<|trimtab_0|>{{ end }}{{ $m.Content }}",
        "assistant": '{{ "<|trimtab_0|><|im_start|>assistant',
        "reply": 'assistant\\n<|trimtab_0|>" }}',
    }
    assert [place for place, words in before.items() if words in written] == [position]
    # A system turn that was given holds the slot as the default one does.
    assert written.count("<|trimtab_0|>") == (2 if position == "system" else 1)


@pytest.mark.parametrize(("template", "translated"), [("default", True), ("fold", False)])
def test_a_modelfile_says_what_it_is(template: str, translated: bool, tmp_path: Path) -> None:
    model = build("llama", template)
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    token = SoftToken.of(model, vectors_for(model), "assistant")
    words = modelfile(model, token, plan(model, token, untie=True))
    assert ('TEMPLATE """' in words) == translated
    assert ("Ollama does not say\n# the token" in words) != translated
    assert POSITION_MEANING["assistant"] in words
    assert words.count("FROM ./") == 1
    if translated:
        assert (default_system(model) or "-") in words
        assert "cannot take the slot's name apart" in words
