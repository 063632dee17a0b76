"""LoRA adapters that somebody else trained with PEFT, as experts beside their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, build, naive_logits
from test_guided import ALPHAS, CHATS, guided, naive_guided
from trimtab.adapter import CONFIG, WEIGHTS
from trimtab.chat import render
from trimtab.errors import ArtefactError, NoEffectError
from trimtab.models import Model
from trimtab.neuron.expert import load_expert
from trimtab.softtoken.artifact import SoftToken

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True."),
]


def trained(model: Model, out: Path, **options: Any) -> Any:
    """An adapter that PEFT makes and saves, moved away from its start; the network that wears it."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model.network, peft.LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(7)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(out)
    return wrapped.eval()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"use_rslora": True, "r": 4}),
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}}),
        ("qwen3", {"layers_to_transform": [1], "lora_dropout": 0.1}),
    ],
)
@torch.inference_mode()
def test_it_speaks_as_in_peft_and_guides_as_the_naive_procedure(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with torch.inference_mode(False):
        wrapped = trained(build(family, "default"), tmp_path, **options)
    model = build(family, "default")
    ids = render(model, CHATS[1]).ids
    untouched = naive_logits(model, ids)
    theirs = wrapped(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    expert = load_expert(f"lora:{tmp_path}", model)
    with expert.speaking():
        ours = expert.model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(naive_logits(model, ids), untouched)
    assert (ours - untouched).abs().max() > 0.1
    expected = [naive_guided(model, expert, chat, alpha) for chat, alpha in zip(CHATS, ALPHAS, strict=True)]
    assert any(any(fired) for _, fired in expected)
    found = guided(model, expert, batch_size=3)
    assert [row.ids for row in found] == [ids for ids, _ in expected]


def test_who_it_is_depends_on_both_files(tmp_path: Path) -> None:
    trained(build(), tmp_path)
    first = load_expert(f"lora:{tmp_path}", build()).identity
    assert load_expert(f"lora:{tmp_path}", build()).identity == first
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 5}))
    assert load_expert(f"lora:{tmp_path}", build()).identity != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "is DoRA"),
        ({"bias": "lora_only"}, "changes the base model itself .bias: lora_only"),
        ({"modules_to_save": ["lm_head"]}, "more than LoRA matrices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "more than LoRA matrices"),
        ({"init_lora_weights": "pissa"}, "changes the base model itself .init_lora_weights: pissa"),
        ({"alora_invocation_tokens": [5, 6]}, "not plain"),
        ({"trainable_token_indices": [5, 6]}, "more than LoRA matrices"),
    ],
)
def test_more_than_plain_lora_is_refused_and_leaves_the_base_alone(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    trained(build(), tmp_path, **options)
    model = build()
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    with pytest.raises(ArtefactError, match=says) as caught:
        load_expert(f"lora:{tmp_path}", model)
    assert "Plain LoRA" in caught.value.mend
    after = model.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_of_other_models_and_damaged_ones(tmp_path: Path) -> None:
    trained(build(), tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    first = next(iter(whole))

    def with_tensors(tensors: dict[str, torch.Tensor], says: str) -> None:
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(ArtefactError, match=says):
            load_expert(f"lora:{tmp_path}", build())

    with_tensors({**whole, first: torch.ones(3, 99)}, "does not fit")
    with_tensors(
        {name.replace("layers.1", "layers.7"): rows for name, rows in whole.items()}, "no linear layer of that name"
    )
    with_tensors({name: rows for name, rows in whole.items() if name != first}, "it is damaged")
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ArtefactError, match="missing or damaged"):
        load_expert(f"lora:{tmp_path}", build())
    save_file({name: rows * ("lora_A" in name) for name, rows in whole.items()}, tmp_path / WEIGHTS)
    with pytest.raises(NoEffectError, match="changes nothing"):
        load_expert(f"lora:{tmp_path}", build())
    save_file(whole, tmp_path / WEIGHTS)
    model = build()
    model.origin.update({"kind": "hub", "id": "owner/tiny"})
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "owner/other"}))
    with pytest.raises(ArtefactError, match="trained on owner/other"):
        load_expert(f"lora:{tmp_path}", model)
    path.write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ArtefactError, match=r"not LORA.\n.*--token"):
        load_expert(f"lora:{tmp_path}", model)
    with pytest.raises(ArtefactError, match="holds no expert"):
        load_expert(f"lora:{tmp_path.parent}", model)
    with pytest.raises(ArtefactError, match="holds no token"):
        SoftToken.load(tmp_path.parent, model)
