"""A model that memory cannot hold: exported from its files alone, and known by the same fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conftest import FAMILIES, build, vectors_for
from test_export import hashes, saved
from trimtab.config import ExportSettings
from trimtab.errors import ArtefactError, ExportError, RoomError
from trimtab.exporters.export import export, export_run
from trimtab.exporters.outline import is_outline, outline
from trimtab.models import load
from trimtab.softtoken.artifact import SoftToken

SHAPES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "sharded": {"shard": "20KB"},
    "padded": {"padding": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_give_the_fingerprint_of_the_loaded_model(family: str, shape: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family, **SHAPES[shape])
    drawn = outline(str(tmp_path), "float32")
    assert is_outline(drawn)
    assert not is_outline(model)
    assert drawn.fingerprint == model.fingerprint
    assert (len(drawn.table), drawn.hidden_size, drawn.dtype) == (len(model.table), model.hidden_size, model.dtype)
    assert drawn.slot_ids(2) == model.slot_ids(2)


@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_the_fingerprint_is_that_of_the_numbers_as_loaded(stored: str, held: str, tmp_path: Path) -> None:
    made = build("llama", "default", tied=True)
    made.network.to(getattr(torch, stored)).save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    assert outline(str(tmp_path), held).fingerprint == load(tmp_path, dtype=held).fingerprint


def test_another_weight_gives_another_fingerprint(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b", seed=1)
    assert outline(str(tmp_path / "a"), "float32").fingerprint != outline(str(tmp_path / "b"), "float32").fingerprint


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unloaded_export_is_the_loaded_one_but_for_the_row_that_was_measured(shape: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", **SHAPES[shape])
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    export(model, token, tmp_path / "loaded", check=False, untie=True)
    result = export(outline(str(tmp_path / "model"), "float32"), token, tmp_path / "drawn", check=False)
    assert result["slot_as_output"] == {
        "tied": None,
        "own_row": None,
        "places": 0,
        "places_unfitted": 0,
    }
    assert result["plan"]["untie"] is (shape == "tied")
    one, other = hashes(tmp_path / "loaded"), hashes(tmp_path / "drawn")
    assert {name for name in one if one[name] != other[name]} == (set() if shape == "padded" else {"lm_head.weight"})
    assert "Not measured, since the model was not loaded" in (tmp_path / "drawn" / "README.md").read_text()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "loaded" / name).read_bytes() == (tmp_path / "drawn" / name).read_bytes()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose memory holds no model."""
    monkeypatch.setattr("trimtab.machine.free_memory", lambda _: 1000)


def test_without_memory_only_an_unverified_export_is_made_and_says_so(
    token_run: Path, tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RoomError, match=r"too large.*\n.*--no-verify exports a safetensors checkpoint"):
        export_run(ExportSettings(run=token_run, out=tmp_path / "out"), Console())
    assert not (tmp_path / "out").exists()
    export_run(ExportSettings(run=token_run, out=tmp_path / "out", dry_run=True), Console())
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    export_run(ExportSettings(run=token_run, out=tmp_path / "out", verify=False), Console(width=1000))
    said = capsys.readouterr().out
    assert "too large" in said
    assert "nothing can be measured or verified" in said
    assert json.loads((tmp_path / "out" / "trimtab.json").read_text())["verified"] is None


def test_another_models_token_is_noticed_without_loading_it(token_run: Path, tmp_path: Path, small: None) -> None:
    build("llama", "default", seed=3).network.save_pretrained(tmp_path / "other")
    build("llama", "default", seed=3).tokenizer.save_pretrained(tmp_path / "other")
    settings = ExportSettings(run=token_run, out=tmp_path / "out", verify=False, model=str(tmp_path / "other"))
    with pytest.raises(ArtefactError, match="weights \\(fingerprint\\)"):
        export_run(settings, Console())
    assert not (tmp_path / "out").exists()


def test_files_that_name_weights_otherwise_are_refused(tmp_path: Path) -> None:
    from test_export_families import seeing

    seeing(tmp_path, "llava", tied=False)
    with pytest.raises(ExportError, match=r"no such tensor in the files.*\n.*whose memory holds the model"):
        outline(str(tmp_path), "float32")
