"""An artefact knows its model (law 5), and one that changes nothing is an error (law 6)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from conftest import build, vectors_for
from trimtab.errors import ArtefactError, NoEffectError
from trimtab.models import Model
from trimtab.run import digest
from trimtab.softtoken.artifact import NO_EFFECT, SoftToken, effect


@pytest.fixture
def model(tiny: Callable[..., Model]) -> Model:
    return tiny("llama", "default")


@pytest.fixture
def token(model: Model) -> SoftToken:
    return SoftToken.of(model, vectors_for(model, 2), "user", enable_thinking=False)


@pytest.fixture
def saved(token: SoftToken, tmp_path: Path) -> Path:
    return token.save(tmp_path / "run" / "token")


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of token.json; `...` takes one out. The seal is made anew, unless it is among the changes."""
    path = folder / "token.json"
    fields = json.loads(path.read_text()) | changes
    if "seal" not in changes:
        fields["seal"] = digest({k: v for k, v in fields.items() if k != "seal"})
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


@pytest.mark.parametrize("above", [False, True])
def test_a_token_comes_back_bit_for_bit(saved: Path, token: SoftToken, model: Model, above: bool) -> None:
    again = SoftToken.load(saved.parent if above else saved, model)
    assert torch.equal(again.vectors, token.vectors)
    assert again.vectors.dtype == torch.float32
    fields = ("position", "fingerprint", "template_hash", "template_args", "model", "origin", "dtype")
    assert {f: getattr(again, f) for f in fields} == {f: getattr(token, f) for f in fields}
    assert again.template_args == {"enable_thinking": False}
    assert again.sha256() == token.sha256()


def test_the_folder_holds_n_tokens_x_hidden_numbers_and_no_pickle(saved: Path, token: SoftToken) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["token.json", "token.safetensors"]
    assert (saved / "token.safetensors").read_bytes() == save({"vectors": token.vectors})
    identity = json.loads((saved / "token.json").read_text())
    assert (identity["n_tokens"], identity["hidden_size"], identity["dtype"]) == (2, 32, "float32")


def test_of_takes_a_detached_copy_in_float32(model: Model) -> None:
    vectors = vectors_for(model).double().requires_grad_()
    token = SoftToken.of(model, vectors, "start")
    with torch.no_grad():
        vectors.zero_()
    assert (token.vectors.dtype, token.vectors.requires_grad) == (torch.float32, False)
    assert token.vectors.abs().max() > 0


def test_a_token_saved_again_replaces_the_old_one(saved: Path, token: SoftToken, model: Model) -> None:
    other = SoftToken.of(model, vectors_for(model, 1), "start")
    other.save(saved)
    assert torch.equal(SoftToken.load(saved, model).vectors, other.vectors)
    assert other.sha256() != token.sha256()


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_truncated_numbers(saved: Path, cut: int) -> None:
    path = saved / "token.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtefactError, match=r"token\.safetensors is not the file that was saved: sha256"):
        SoftToken.load(saved)


def test_every_edited_byte_of_the_numbers_is_noticed(saved: Path) -> None:
    path = saved / "token.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtefactError, match="not the file that was saved"):
            SoftToken.load(saved)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "has format 2, this trimtab reads format 1"),
        ({"format": ...}, r"token\.json is damaged: (.|\n)*format"),
        ({"position": "middle"}, r"token\.json is damaged: (.|\n)*position"),
        ({"fingerprint": ...}, r"token\.json is damaged: (.|\n)*fingerprint"),
        ({"extra": 1}, r"token\.json is damaged: (.|\n)*extra"),
        ({"n_tokens": 3}, r"shape \(2, 32\), token\.json says \(3, 32\)"),
        ({"hidden_size": 16}, r"shape \(2, 32\), token\.json says \(2, 16\)"),
        ({"sha256": "0" * 64}, "not the file that was saved"),
        ({"position": "user", "seal": "0" * 16}, r"token\.json was edited"),
        ({"position": "assistant", "seal": ""}, r"token\.json was edited"),
        ({"fingerprint": "0" * 16}, r"weights \(fingerprint\): trained on 0000"),
        ({"template_hash": "0" * 16}, r"chat template \(hash\): trained on 0000"),
    ],
)
def test_an_edited_json(saved: Path, model: Model, changes: dict[str, Any], says: str) -> None:
    edit(saved, **changes)
    with pytest.raises(ArtefactError, match=says):
        SoftToken.load(saved, model)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"format": 1', "\x00"])
def test_a_damaged_json(saved: Path, content: str) -> None:
    (saved / "token.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"token\.json"):
        SoftToken.load(saved)


@pytest.mark.parametrize("tensors", [{"other": torch.zeros(2, 32)}, {}])
def test_a_file_with_the_right_hash_but_no_vectors(saved: Path, tensors: dict[str, torch.Tensor]) -> None:
    data = save(tensors)
    (saved / "token.safetensors").write_bytes(data)
    edit(saved, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ArtefactError, match="cannot be read"):
        SoftToken.load(saved)


@pytest.mark.parametrize("name", ["token.json", "token.safetensors"])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtefactError, match=rf"{name}(.|\n)*Give the folder of a finished run"):
        SoftToken.load(saved)


def test_another_model_and_what_differs(saved: Path, token: SoftToken, tiny: Callable[..., Model]) -> None:
    token.check(build("llama", "default"))  # the same model, built again
    for other, differs in (
        (tiny("qwen3", "default"), ["weights (fingerprint)"]),
        (tiny("llama", "chatml"), ["chat template (hash)"]),
        (tiny("gemma3", "fold"), ["weights (fingerprint)", "chat template (hash)"]),
    ):
        with pytest.raises(
            ArtefactError, match=rf"trained on tiny-llama, not (on {other.name}|as it is here)\."
        ) as caught:
            SoftToken.load(saved, other)
        lines = str(caught.value).splitlines()[1:-1]
        assert [line.strip().partition(":")[0] for line in lines] == differs
        assert str(caught.value).endswith(f"Load tiny-llama, or train a token for {other.name}.")


def test_another_hidden_size_is_named(model: Model, token: SoftToken) -> None:
    narrow = SoftToken(token.vectors[:, :16], token.position, token.fingerprint, token.template_hash)
    with pytest.raises(ArtefactError, match="hidden size: trained on 16, this model has 32"):
        narrow.check(model)


def test_render_puts_every_token_in_its_place(model: Model, token: SoftToken) -> None:
    prompt = token.render(model, "Hi", prefill="Sure")
    assert prompt.ids[prompt.slot : prompt.slot + 2] == tuple(model.slot_ids(2))
    assert model.tokenizer.decode(prompt.ids[prompt.slot + 2 :]).startswith("Hi<|im_end|>")
    assert model.tokenizer.decode(prompt.ids).endswith("assistant\nSure")


# Effect


def deaf() -> Model:
    """A model without attention: the next word depends on the last one alone, so an earlier slot is not heard."""
    model = build("llama", "default")
    for layer in model.network.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    return model


def test_the_effect_is_the_mean_kl_over_the_probes(model: Model, token: SoftToken) -> None:
    assert effect(model, token) > 100 * NO_EFFECT
    louder = SoftToken.of(model, token.vectors, "reply")
    assert effect(model, louder) != pytest.approx(effect(model, token))


def test_a_token_that_changes_nothing_is_an_error() -> None:
    model = deaf()
    with pytest.raises(
        NoEffectError, match=r"this token changes nothing: KL to the untouched model is .* nats on 3 probes"
    ) as caught:
        effect(model, SoftToken.of(model, vectors_for(model), "user"))
    assert caught.value.exit_code == 1
    assert effect(model, SoftToken.of(model, vectors_for(model), "reply")) > NO_EFFECT


def test_numbers_that_are_not_finite_are_an_error(model: Model) -> None:
    with pytest.raises(NoEffectError, match="nan"):
        effect(model, SoftToken.of(model, torch.full((1, 32), float("nan")), "user"))


def test_another_dtype_is_told(saved: Path) -> None:
    other = build("llama", "default")
    other.network.to(torch.bfloat16)
    with pytest.raises(ArtefactError, match=r"dtype: trained on float32, this model has bfloat16") as caught:
        SoftToken.load(saved, other)
    assert "Load tiny-llama in float32, or train a token for tiny-llama." in str(caught.value)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_token_that_is_not_heard_is_no_token(model: Model, tmp_path: Path, value: float) -> None:
    silent = SoftToken.of(model, torch.full((1, model.hidden_size), value), "user").save(tmp_path)
    SoftToken.load(silent)  # whole and unedited
    with pytest.raises(NoEffectError, match="changes nothing"):
        SoftToken.load(silent, model)
