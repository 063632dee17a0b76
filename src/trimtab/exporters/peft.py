"""The token as a PEFT adapter, in the form that its place allows.

Prompt tuning knows one place, before everything else. Trainable tokens are rows of the vocabulary, which stand wherever a chat template says them: so
tokenizer and template come along. PEFT exchanges rows that the table has; a row behind the last one must be there first, by a line of transformers' own.
`softtoken/foreign.py` reads both back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save

from trimtab.adapter import CONFIG, WEIGHTS, base_of
from trimtab.exporters.plan import Plan, name_of
from trimtab.models import Model
from trimtab.run import write, write_json
from trimtab.softtoken.artifact import SoftToken
from trimtab.softtoken.foreign import PROMPT, ROWS


def write_prompt(folder: Path, model: Model, token: SoftToken) -> None:
    """Prompt tuning: `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.

    PEFT prepends what the model's layers would see, so where a family scales its embeddings the vectors are stored scaled.
    """
    config = model.network.config.get_text_config()
    write_json(
        folder / CONFIG,
        {
            **_common(model, "PROMPT_TUNING"),
            "num_virtual_tokens": len(token.vectors),
            "token_dim": token.vectors.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "prompt_tuning_init": "RANDOM",
        },
    )
    write(folder / WEIGHTS, save({PROMPT: (token.vectors * model.embedding_scale).contiguous()}))


def write_rows(folder: Path, model: Model, token: SoftToken, found: Plan) -> None:
    """Trainable tokens: the same two files, with the rows as the table would hold them; where the head is tied, under its name too, as PEFT does."""
    layers = [name_of(model, model.embedding)]
    if found.tied:
        layers.append(name_of(model, model.network.get_output_embeddings()))
    write_json(
        folder / CONFIG,
        {
            **_common(model, "TRAINABLE_TOKENS"),
            "token_indices": list(found.ids),
            "target_modules": layers[0],
            "init_weights": True,
        },
    )
    rows = {f"base_model.model.{name}{ROWS}": token.vectors.clone().contiguous() for name in layers}
    write(folder / WEIGHTS, save(rows))


def _common(model: Model, kind: str) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_of(model),
        "revision": model.origin.get("revision"),
        "inference_mode": True,
    }
