"""Checkpoints of other shapes: models that also see, several vectors and too few spare rows, a memory that holds one model and no second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from conftest import tiny_tokenizer, vectors_for
from test_export import hashes, saved
from trimtab.errors import RoomError
from trimtab.exporters.checkpoint import INDEX
from trimtab.exporters.export import export
from trimtab.models import Model, load
from trimtab.softtoken.artifact import SoftToken

EYE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {"model_type": "siglip_vision_model", **EYE},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **EYE},
    },
    "qwen2_5_vl": {
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "intermediate_size": 16,
            "patch_size": 4,
        },
    },
}


def seeing(folder: Path, family: str, tied: bool, shard: str = "5GB") -> Model:
    """A tiny model with an eye, whose language part is nested in its config."""
    tokenizer = tiny_tokenizer("default")
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        **ends,
    }
    parts = {**SEEING[family], "text_config": {**text, **SEEING[family]["text_config"]}}
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **parts, tie_word_embeddings=tied, **ends)
    )
    network.float().save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SEEING)
def test_a_model_that_also_sees_gets_its_token_in_its_language_part(family: str, tied: bool, tmp_path: Path) -> None:
    model = seeing(tmp_path / "model", family, tied, "20KB")
    assert (tmp_path / "model" / INDEX).is_file()
    token = SoftToken.of(model, vectors_for(model, 1, 20.0), "assistant")
    result = export(model, token, tmp_path / "out", untie=True)
    assert result["plan"]["untie"] is tied
    assert result["verified"]["replies_equal"] == result["verified"]["probes"]
    before, after = hashes(tmp_path / "model"), hashes(tmp_path / "out")
    touched = {result["plan"]["embedding"], result["plan"]["head"]}
    assert len(before.keys() - touched) > 20
    assert {name for name, each in after.items() if before.get(name) != each} == touched
    assert not before.keys() - after.keys()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.get_text_config().vocab_size == len(model.table) + 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [0, 2, 5])
def test_five_vectors_are_appended_where_spare_rows_are_too_few(padding: int, tied: bool, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", padding=padding, tied=tied)
    token = SoftToken.of(model, vectors_for(model, 5, 8.0), "assistant")
    result = export(model, token, tmp_path / "out", untie=True)
    words = len(model.tokenizer)
    ids = list(result["plan"]["ids"])
    assert ids == list(range(words, words + 5))
    assert result["plan"]["row"] == ("unused" if padding == 5 else "appended")
    assert result["plan"]["rows"] == (len(model.table), words + 5)
    assert result["verified"]["replies_equal"] == result["verified"]["probes"]
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(held["model.embed_tokens.weight"][ids], token.vectors)
    # What the head had, spare rows included, it has still.
    assert torch.equal(
        held["lm_head.weight"][: words + padding], model.network.get_output_embeddings().weight[: words + padding]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("".join(result["plan"]["names"]), add_special_tokens=False) == ids


def test_no_room_for_a_second_model_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "model")
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    monkeypatch.setattr("trimtab.machine.free_memory", lambda _: 1000)
    monkeypatch.setattr("trimtab.exporters.export.write_weights", lambda *_: pytest.fail("written"))
    with pytest.raises(RoomError, match=r"(?s)too large.*--no-verify leaves it out"):
        export(model, token, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr("trimtab.machine.free_memory", lambda _: 1000)
    assert export(model, token, tmp_path / "out", check=False)["verified"] is None
