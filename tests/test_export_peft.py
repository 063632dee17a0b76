"""The token as PEFT loads it, and back; and what others trained with PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, build, naive_logits, vectors_for
from trimtab.adapter import CONFIG, WEIGHTS
from trimtab.chat import POSITIONS, render
from trimtab.config import ChatSettings, ExportSettings, settle
from trimtab.decoding.generate import generate
from trimtab.errors import ArtefactError, ChatError, ExportError
from trimtab.exporters.export import export, export_run
from trimtab.exporters.peft import write_prompt
from trimtab.guidance import load_guided
from trimtab.models import Model, load
from trimtab.neuron.expert import load_expert
from trimtab.run import screen
from trimtab.softtoken.artifact import SoftToken

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PROMPTS = ("What is the capital of France?", "Hi")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Model]:
    """`saved(family, template, ...)`: as `build`, from a folder."""

    def make(*args: Any, **options: Any) -> Model:
        model = build(*args, **options)
        folder = tmp_path / "model"
        model.network.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return load(folder)

    return make


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_the_token_does(family: str, n_tokens: int, tmp_path: Path) -> None:
    model = build(family, "default")
    token = SoftToken.of(model, vectors_for(model, n_tokens, 8.0), "start")
    write_prompt(tmp_path, model, token)
    ours = naive_logits(model, token.render(model, PROMPTS[0]).ids, token.vectors)[-1]
    ids = torch.tensor([render(model, PROMPTS[0]).ids])
    wrapped = peft.PeftModel.from_pretrained(build(family, "default").network, tmp_path)
    with torch.inference_mode():
        theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    if family != "mistral":  # whose window does not reach back to the start
        assert not torch.allclose(theirs, naive_logits(model, render(model, PROMPTS[0]).ids)[-1], atol=1e-2)
        back = SoftToken.load(tmp_path, model)
        torch.testing.assert_close(back.vectors, token.vectors)
        assert back.position == "start"


@pytest.mark.parametrize(
    ("family", "template", "options", "row"),
    [
        ("llama", "default", {"padding": 4}, "unused"),
        ("gemma3", "bos", {"tied": True}, "appended"),
        ("qwen3", "chatml", {"reserved": 3}, "reserved"),
        ("llama", "fold", {}, "appended"),
    ],
)
def test_rows_go_out_and_come_back(
    family: str, template: str, options: dict[str, Any], row: str, saved: Callable[..., Model], tmp_path: Path
) -> None:
    """Every place but the start, which is prompt tuning's; loaded by PEFT alone, equal replies; and read back, the same token."""
    model = saved(family, template, **options)
    tried = 0
    for position in POSITIONS[1:]:
        token = SoftToken.of(model, vectors_for(model, 2, 30.0), position)
        try:
            token.render(model, PROMPTS[0])
        except ChatError:
            continue
        out = tmp_path / position
        result = export(model, token, out, format="peft")
        assert result["plan"]["row"] == row
        assert result["verified"]["engine"] == "PEFT"
        assert result["verified"]["logits_max_difference"] <= 1e-5
        assert result["verified"]["replies_equal"] == result["verified"]["probes"]
        assert json.loads((out / CONFIG).read_text())["peft_type"] == "TRAINABLE_TOKENS"
        card = (out / "README.md").read_text()
        assert ("resize_token_embeddings" in card) == (row == "appended")
        assert ("PEFT changes both" in card) == options.get("tied", False)
        back = SoftToken.load(out, model)
        assert back.position == position
        assert torch.equal(back.vectors, token.vectors)
        said, again = (generate(model, PROMPTS, token=each, max_new_tokens=8) for each in (token, back))
        assert [r.ids for r in said] == [r.ids for r in again]
        tried += 1
    assert tried >= 3


def test_the_form_follows_from_the_place(
    folder: Path, token_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ExportSettings(run=token_run, out=tmp_path / "out", format="peft", dry_run=True)
    record = export_run(settings, screen(False))
    assert "trainable tokens" in capsys.readouterr().out
    assert [file["file"] for file in record["files"]][:2] == [CONFIG, WEIGHTS]
    assert not (tmp_path / "out").exists()
    model = load(folder)
    start = SoftToken.of(model, vectors_for(model, 1, 8.0), "start")
    start.save(tmp_path / "start")
    record = export_run(settings.model_copy(update={"run": tmp_path / "start"}), screen(False))
    assert record["form"] == "prompt tuning"
    assert [file["file"] for file in record["files"]] == [CONFIG, WEIGHTS, "README.md", "trimtab.json"]
    assert "prompt tuning" in capsys.readouterr().out
    result = export(model, start, tmp_path / "out", format="peft")
    assert result["verified"]["logits_max_difference"] <= 1e-4
    assert result["verified"]["replies_equal"] == result["verified"]["probes"] == 7
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = card.split("## Serving")[1].split("```")[1]
    compile(snippet.replace("...", ""), "card", "exec")
    assert "import PeftModel" in snippet
    assert "tokenizer = AutoTokenizer" in snippet
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, "README.md", "trimtab.json"}
    # An adapter goes on to every other form, once a model is named.
    onward = ExportSettings(run=tmp_path / "out", out=tmp_path / "hf", format="hf")
    with pytest.raises(ExportError, match=r"does not know its model.\n.*--model"):
        export_run(onward, screen(False))
    result = export_run(onward.model_copy(update={"model": str(folder)}), screen(False))
    assert result["verified"]["logits_max_difference"] <= 1e-4


def trained(model: Model, config: Any, out: Path) -> Any:
    """An adapter that PEFT makes and saves, moved away from its start; the network that wears it."""
    wrapped = peft.get_peft_model(model.network, config)
    generator = torch.Generator().manual_seed(7)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(out)
    return wrapped.eval()


def test_prompt_tuning_trained_elsewhere(tmp_path: Path) -> None:
    model = build("llama", "default")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = trained(build("llama", "default"), config, tmp_path)
    token = SoftToken.load(tmp_path, model)
    ids = torch.tensor([render(model, PROMPTS[0]).ids])
    with torch.inference_mode():
        theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    ours = naive_logits(model, token.render(model, PROMPTS[0]).ids, token.vectors)[-1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    expert = load_expert(f"token:{tmp_path}", model)
    assert expert.token is not None
    assert torch.equal(expert.token.vectors, token.vectors)


def test_rows_trained_elsewhere_need_a_template_that_says_them(tmp_path: Path) -> None:
    model = build("llama", "default", padding=2)
    config = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[60])  # an ordinary letter
    trained(build("llama", "default", padding=2), config, tmp_path)
    with pytest.raises(ArtefactError, match="where these stand in a conversation is unknown: no chat template"):
        SoftToken.load(tmp_path, model)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="says them at none of start, "):
        SoftToken.load(tmp_path, model)
    letter = model.tokenizer.decode([60])
    path = tmp_path / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ '" + letter + "' }}")
    assert SoftToken.load(tmp_path, model).position == "reply"


def test_commands_take_an_adapter_for_a_token(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(folder)
    token = SoftToken.of(model, vectors_for(model, 2, 8.0), "start")
    write_prompt(tmp_path, model, token)
    _, guidance = load_guided(settle(ChatSettings, {"model": str(folder), "token": tmp_path}))
    assert torch.equal(guidance["token"].vectors, token.vectors)
    said = " ".join(capsys.readouterr().err.split())
    assert "and names this model: that it was trained on these very weights cannot be known" in said
    edit(tmp_path, peft_type="LORA")
    with pytest.raises(ArtefactError, match="is a LORA adapter"):  # before any model is loaded
        load_guided(settle(ChatSettings, {"model": "nowhere", "token": tmp_path}))


def test_adapters_that_are_no_token_here(tmp_path: Path) -> None:
    model = build("llama", "default")
    (tmp_path / "a").mkdir()
    write_prompt(tmp_path / "a", model, SoftToken.of(model, vectors_for(model, 2, 8.0), "start"))
    with pytest.raises(ArtefactError, match="does not know its model"):
        SoftToken.load(tmp_path / "a")

    def damaged(name: str, **fields: Any) -> Path:
        shutil.copytree(tmp_path / "a", tmp_path / name)
        edit(tmp_path / name, **fields)
        return tmp_path / name

    with pytest.raises(ArtefactError, match=r"is a LORA adapter, not .*\n.*--expert lora:"):
        SoftToken.load(damaged("lora", peft_type="LORA"), model)
    with pytest.raises(ArtefactError, match="PREFIX_TUNING adapter"):
        SoftToken.load(damaged("prefix", peft_type="PREFIX_TUNING"), model)
    with pytest.raises(ArtefactError, match="3 tokens"):
        SoftToken.load(damaged("short", num_virtual_tokens=3), model)
    wide = damaged("wide")
    save_file({"prompt_embeddings": torch.ones(2, 64)}, wide / WEIGHTS)
    with pytest.raises(ArtefactError, match="64 numbers each, and tiny-llama has 32"):
        SoftToken.load(wide, model)
    cut = damaged("cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(ArtefactError, match="missing or damaged"):
        SoftToken.load(cut, model)
    (cut / CONFIG).write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read"):
        SoftToken.load(cut, model)
    nan = damaged("nan")
    save_file({"prompt_embeddings": torch.full((2, 32), torch.nan)}, nan / WEIGHTS)
    with pytest.raises(ArtefactError, match="not finite"):
        SoftToken.load(nan, model)
    # A name is all that an adapter knows of its model; one that contradicts is an error, and so is another revision of it.
    model.origin.update({"kind": "hub", "id": "owner/tiny", "revision": "a" * 40})
    with pytest.raises(ArtefactError, match="trained on owner/other, not on owner/tiny"):
        SoftToken.load(damaged("other", base_model_name_or_path="owner/other"), model)
    with pytest.raises(ArtefactError, match=r"owner/tiny@bbb"):
        SoftToken.load(damaged("revision", base_model_name_or_path="owner/tiny", revision="b" * 40), model)
    assert SoftToken.load(damaged("same", base_model_name_or_path="owner/tiny", revision="a" * 40), model)
    assert SoftToken.load(damaged("unnamed", base_model_name_or_path=None, revision=None), model)


def test_damage_to_rows_is_told(saved: Callable[..., Model], tmp_path: Path) -> None:
    model = saved("llama", "default", tied=True, padding=2)
    token = SoftToken.of(model, vectors_for(model, 1, 30.0), "assistant")
    export(model, token, tmp_path / "out", format="peft")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert len(tensors) == 2  # the head's too
    save_file({name: rows + n for n, (name, rows) in enumerate(tensors.items())}, tmp_path / "out" / WEIGHTS)
    with pytest.raises(ArtefactError, match="other tensors than one table"):
        SoftToken.load(tmp_path / "out", model)
