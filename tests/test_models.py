"""Loading, identity, and the slot: where a soft token is heard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from conftest import FAMILIES, build, naive_logits, vectors_for
from trimtab import models
from trimtab.errors import ModelError
from trimtab.machine import choose_device
from trimtab.models import MAX_TOKENS, Model, load, resolve, slot


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The saved tiny model, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def hooks(model: Model) -> int:
    return len(model.embedding._forward_hooks) + len(model.embedding._forward_pre_hooks)


# Loading


def test_load_a_folder(folder: Path) -> None:
    model = load(folder, dtype="float32", device="cpu")
    original = build("llama", "default")
    assert model.name == str(folder)
    assert model.origin == {"kind": "folder", "path": str(folder.resolve())}
    assert model.reason == "cpu (asked for), float32 (asked for)"
    assert model.fingerprint == original.fingerprint
    assert model.tokenizer.chat_template == original.tokenizer.chat_template
    assert (model.hidden_size, model.dtype, model.device.type) == (32, torch.float32, "cpu")
    assert not model.network.training
    assert [name for name, p in model.network.named_parameters() if p.requires_grad] == []
    ids = model.tokenizer.encode("the inn", add_special_tokens=False)
    torch.testing.assert_close(naive_logits(model, ids), naive_logits(original, ids))


def test_eos_ids_come_from_generation_config_and_tokenizer(folder: Path) -> None:
    model = load(folder, device="cpu")
    end, stop = model.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert model.eos_ids == {end}
    for given, found in ([stop, 5], {stop, 5, end}), (stop, {stop, end}), (None, {end}):
        fresh = Model("x", model.network, model.tokenizer, "", {})
        fresh.network.generation_config.eos_token_id = given
        assert fresh.eos_ids == found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135", r"no model 'smollm2-135': .*\n  Did you mean smollm2-135m\?"),
        ("zebra", r"no model 'zebra': .*\n  Known: smollm2-135m\. Or give a hub id"),
        ("./nowhere/at-all", r"no model '\./nowhere/at-all'"),
        ("nowhere.gguf", r"no file nowhere\.gguf"),
        ("a/b/c", r"no model 'a/b/c'"),
        ("", r"holds no model: config\.json is missing"),
        ("owner/name", r"cannot load owner/name: (.|\n)*HF_HUB_OFFLINE"),
    ],
)
def test_a_name_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=says) as caught:
        load(name)
    assert caught.value.exit_code == 2


def test_a_folder_without_config_points_to_its_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing\.\n  A model folder has"):
        load(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ModelError, match=r"Did you mean .*some\.gguf\?"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 1000, -100])
def test_truncated_weights(copy: Path, size: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match=f"cannot load {copy}: (.|\n)*damaged"):
        load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_folder_without_one_of_its_files(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ModelError, match=str(copy)):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_file(copy: Path, name: str) -> None:
    (copy / name).write_text('{"model_type": ')
    with pytest.raises(ModelError, match=f"cannot load {copy}"):
        load(copy)


def test_weights_that_memory_cannot_hold(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10}))
    with pytest.raises(
        ModelError, match=r"too large: its weights take 2560\.\d GB as float32, and [1-9][\d.]* GB are free on cpu"
    ) as caught:
        load(copy)
    assert "bfloat16" in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = build("gemma3", "fold", tied=True)
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").fingerprint == model.fingerprint


def test_weights_without_one_of_their_tensors(copy: Path) -> None:
    """Filled with random numbers they would give a model that nobody trained."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"not a gguf at all"])
def test_a_damaged_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read .*some\.gguf"):
        load(tmp_path / "some.gguf")


def test_dtype_and_device() -> None:
    assert choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    assert choose_device("cpu", None) == (
        "cpu",
        torch.float32,
        "cpu (asked for), float32 (exact; half precision is not faster on this device)",
    )
    with pytest.raises(ModelError, match=r"unknown dtype 'float31'\.\n  Did you mean float32"):
        choose_device("cpu", "float31")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
            choose_device(device, None)


# Identity


def test_fingerprint_tells_weights_and_shapes_apart() -> None:
    prints = {build("llama", seed=s).fingerprint for s in (0, 1)}
    prints |= {build(f).fingerprint for f in FAMILIES} | {build("llama", padding=8).fingerprint}
    assert len(prints) == 1 + len(FAMILIES) + 1
    assert build("llama").fingerprint == build("llama").fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fingerprint_stays_under_a_change_of_dtype(folder: Path, dtype: str) -> None:
    assert load(folder, dtype=dtype, device="cpu").fingerprint == build("llama", "default").fingerprint


def test_fingerprint_of_published_bfloat16_weights_is_the_same_in_every_dtype() -> None:
    prints = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build("llama")
        model.network.bfloat16().to(dtype)
        prints.add(model.fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.mlp.down_proj", "layers.0.input_layernorm"])
def test_fingerprint_sees_every_matrix(name: str) -> None:
    model, other = build("llama"), build("llama")
    other.network.get_parameter(f"model.{name}.weight").mul_(1.1)
    assert model.fingerprint != other.fingerprint


@pytest.mark.parametrize(("family", "scale"), [("llama", 1.0), ("gemma3", 32**0.5)])
def test_embedding_scale(family: str, scale: float) -> None:
    assert build(family).embedding_scale == pytest.approx(scale)


def test_a_model_with_an_encoder_for_text_is_refused() -> None:
    with pytest.raises(ModelError, match=r"type t5 is no language model as is needed here\.\n.*a decoder alone"):
        models.reader_of(AutoConfig.for_model("t5"))


# Slot ids


@pytest.mark.parametrize(
    ("padding", "reserved", "n_tokens", "kind"),
    [
        (8, 4, 3, "padding"),
        (8, 4, 8, "padding"),
        (2, 4, 3, "reserved"),
        (0, 4, 4, "reserved"),
        (0, 4, 5, "appended"),
        (2, 0, 3, "appended"),
        (0, 0, 1, "appended"),
        (0, 0, MAX_TOKENS, "appended"),
    ],
)
def test_slot_ids_take_free_rows_in_order(
    tiny: Callable[..., Model], padding: int, reserved: int, n_tokens: int, kind: str
) -> None:
    model = tiny("llama", "chatml", padding=padding, reserved=reserved)
    words = len(model.tokenizer)
    first = {
        "padding": words,
        "reserved": model.tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>") if reserved else None,
        "appended": words,  # too few padding rows come first
    }[kind]
    assert model.slot_ids(n_tokens) == list(range(first, first + n_tokens))


def test_slot_ids_are_free_of_words_even_where_the_tokenizer_leaves_gaps() -> None:
    model = build("llama", padding=8)
    words = len(model.tokenizer)
    # Tokenizers with gaps count fewer words than their highest id.
    backend = model.tokenizer
    vocabulary = {**backend.get_vocab(), "late": words + 3}
    backend.get_vocab = lambda: vocabulary
    assert model.slot_ids(2) == [words + 4, words + 5]


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("<|reserved_special_token_7|>", True),
        ("<unused99>", True),
        ("<|extra_0|>", True),
        ("<|im_end|>", False),
        ("<extra> words", False),
        ("reserved_7", False),
        ("<pad>", False),
    ],
)
def test_reserved_words(text: str, free: bool) -> None:
    assert bool(models.RESERVED.match(text)) == free


# The slot


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hook_computes_what_a_stored_row_would(family: str, padding: int, dtype: torch.dtype) -> None:
    """Law 2: the exported checkpoint, with one real row, is the same computation; bit for bit."""
    model = build(family, padding=padding)
    model.network.to(dtype)
    vectors = vectors_for(model, 2)
    slots = model.slot_ids(2)
    ids = [5, slots[0], 6, slots[1], slots[0], 7]
    heard = naive_logits(model, ids, vectors)
    if not padding:
        model.network.resize_token_embeddings(len(model.tokenizer) + 2, mean_resizing=False)
    model.embedding.weight[slots] = vectors.to(dtype)
    stored = naive_logits(model, ids)
    words = slots[0]
    assert torch.equal(heard[:, :words], stored[:, :words])


def test_without_vectors_and_without_slot_ids_nothing_changes(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "chatml")
    untouched = naive_logits(model, [1, 2, 3])
    assert torch.equal(naive_logits(model, [1, 2, 3], vectors_for(model)), untouched)
    with slot(model, None):
        assert hooks(model) == 0


def test_each_row_of_a_batch_may_have_its_own_vectors(tiny: Callable[..., Model]) -> None:
    model = tiny("gemma3", "chatml")
    vectors = torch.stack([vectors_for(model, 2), -vectors_for(model, 2)])
    ids = [5, *model.slot_ids(2), 6]
    with torch.no_grad(), slot(model, vectors):
        logits = model.network(input_ids=torch.tensor([ids, ids])).logits
    for row in range(2):
        torch.testing.assert_close(logits[row], naive_logits(model, ids, vectors[row]), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_vectors_and_nothing_else(tiny: Callable[..., Model]) -> None:
    model = tiny("gemma3", "chatml")
    vectors = vectors_for(model, 2).requires_grad_()
    with slot(model, vectors):
        ids = torch.tensor([[5, model.slot_ids(2)[0], 6]])
        model.network(input_ids=ids).logits[0, -1, 9].backward()
    assert vectors.grad[0].abs().max() > 0
    assert vectors.grad[1].abs().max() == 0  # not in the prompt
    assert all(p.grad is None for p in model.network.parameters())


def test_the_slot_leaves_no_hook_behind(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "chatml")
    with slot(model, vectors_for(model)):
        assert hooks(model) == 2
    assert hooks(model) == 0
    with pytest.raises(KeyError, match="stop"), slot(model, vectors_for(model)):
        raise KeyError("stop")
    assert hooks(model) == 0
    with pytest.raises(IndexError), slot(model, vectors_for(model)):
        model.network(input_ids=torch.tensor([[10**6]]))
    assert hooks(model) == 0


def test_code_that_comes_with_a_model_is_never_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where somebody answers transformers' question with yes."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Network"}}
    (copy / "config.json").write_text(json.dumps(config))
    ran = copy / "ran"
    (copy / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as Config\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match=r"cannot load .*"):
        load(copy)
    assert not ran.exists()


def test_an_alias_without_its_package_is_its_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.models.find_spec", lambda _: None)
    source, origin = resolve("smollm2-135m", None)
    assert source == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (origin["kind"], len(origin["revision"])) == ("hub", 40)
