"""The token as a PEFT adapter: prompt tuning, for the one place that it knows, before everything else; and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from trimtab.errors import ArtefactError, ExportError
from trimtab.models import ALIASES, Model
from trimtab.run import write, write_json
from trimtab.softtoken.artifact import SoftToken

KEY = "prompt_embeddings"


def require_start(token: SoftToken) -> None:
    """Raises ExportError for a token that stands anywhere but at the start."""
    if token.position != "start":
        raise ExportError(
            f"PEFT's prompt tuning puts its tokens before everything else, and this one was trained at {token.position}.",
            "Use --format hf, which can say it anywhere, or train with --position start.",
        )


def base_of(model: Model) -> str:
    """What PEFT is to load beside the adapter: the hub's model where there is one. A GGUF's weights are near those, but not the same."""
    if model.name in ALIASES:
        return ALIASES[model.name][0]
    return model.origin.get("id") or model.origin.get("path") or model.name


def write_adapter(folder: Path, model: Model, token: SoftToken) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.

    PEFT prepends what the model's layers would see, so where a family scales its embeddings the vectors are stored scaled.
    """
    base = base_of(model)
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": model.origin.get("revision"),
            "inference_mode": True,
            "num_virtual_tokens": len(token.vectors),
            "token_dim": token.vectors.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": model.network.config.get_text_config().num_attention_heads,
            "num_layers": model.network.config.get_text_config().num_hidden_layers,
            "prompt_tuning_init": "RANDOM",
        },
    )
    write(folder / "adapter_model.safetensors", save({KEY: (token.vectors * model.embedding_scale).contiguous()}))


def read_adapter(folder: Path, model: Model) -> SoftToken:
    """A prompt-tuning adapter as a token at the start, whoever trained it.

    Raises:
        ArtefactError: another kind of adapter, or one for another size of model.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        vectors: Tensor = load_file(folder / "adapter_model.safetensors")[KEY].to(torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ArtefactError(f"{folder} holds no prompt-tuning adapter: {error}") from None
    if config.get("peft_type") != "PROMPT_TUNING" or vectors.shape[1] != model.hidden_size:
        raise ArtefactError(
            f"{folder}: {config.get('peft_type')} of width {vectors.shape[1]}, where a prompt-tuning adapter of width {model.hidden_size} was expected."
        )
    return SoftToken.of(model, vectors / model.embedding_scale, "start")
