"""The token as PEFT loads it, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, build, naive_logits, vectors_for
from trimtab.chat import render
from trimtab.errors import ArtefactError, ExportError
from trimtab.exporters.export import export
from trimtab.exporters.peft import read_adapter, write_adapter
from trimtab.models import load
from trimtab.softtoken.artifact import SoftToken

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_the_token_does(family: str, n_tokens: int, tmp_path: Path) -> None:
    model = build(family, "default")
    token = SoftToken.of(model, vectors_for(model, n_tokens, 8.0), "start")
    write_adapter(tmp_path, model, token)
    words = "What is the capital of France?"
    ours = naive_logits(model, token.render(model, words).ids, token.vectors)[-1]
    ids = torch.tensor([render(model, words).ids])
    wrapped = peft.PeftModel.from_pretrained(build(family, "default").network, tmp_path)
    with torch.inference_mode():
        theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    if family != "mistral":  # whose window does not reach back to the start
        assert not torch.allclose(theirs, naive_logits(model, render(model, words).ids)[-1], atol=1e-2)
    back = read_adapter(tmp_path, model)
    torch.testing.assert_close(back.vectors, token.vectors)
    assert back.position == "start"


def test_other_places_and_other_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    with pytest.raises(
        ExportError, match=r"before everything else, and this one was trained at assistant\.\n.*--format hf"
    ):
        export(model, token, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtefactError, match="holds no prompt-tuning adapter"):
        read_adapter(tmp_path, model)
    start = SoftToken.of(model, vectors_for(model, 1, 8.0), "start")
    result = export(model, start, tmp_path / "out", format="peft")
    assert result["verified"]["logits_max_difference"] <= 1e-4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "trimtab.json",
    }
