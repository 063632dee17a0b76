"""A PEFT adapter as a soft token, whoever trained it: prompt tuning, which stands before everything, or trainable tokens, which stand where a template says them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trimtab.adapter import Adapter, read, tell_base
from trimtab.chat import POSITIONS, Position, render
from trimtab.errors import ArtefactError, ChatError
from trimtab.models import Model
from trimtab.softtoken.artifact import SoftToken

KINDS = ("PROMPT_TUNING", "TRAINABLE_TOKENS")
PROMPT, ROWS = "prompt_embeddings", ".trainable_tokens_delta"
# Conversations that tell the positions apart.
SHAPES = (
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}],
    [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What can you do?"},
    ],
)


def read_token(folder: Path, model: Model) -> SoftToken:
    """The adapter in `folder` as a token for `model`. What its folder cannot say, that it was trained on these weights, is told to the user.

    Raises:
        ArtefactError: damaged files, another kind of adapter, one for another size of model or that names another; trained rows without a template that says them.
    """
    adapter = read(folder, KINDS)
    vectors = _vectors(adapter)
    if vectors.shape[1] != model.hidden_size:
        raise ArtefactError(
            f"{folder}: its vectors have {vectors.shape[1]} numbers each, and {model.name} has {model.hidden_size}.",
            f"It belongs to another model; it names {adapter.config.get('base_model_name_or_path') or 'none'}.",
        )
    if not vectors.isfinite().all():
        raise ArtefactError(f"{folder}: its vectors are not finite numbers.", "It was damaged, or its training failed.")
    tell_base(adapter, model)
    if adapter.kind == "PROMPT_TUNING":
        # PEFT hands these to the layers as they are; a row would be scaled first.
        return SoftToken.of(model, vectors / model.embedding_scale, "start")
    return SoftToken.of(model, vectors, _said_at(adapter, model))


def _vectors(adapter: Adapter) -> Tensor:
    """`[n_tokens, hidden]`, float32.

    Raises:
        ArtefactError: there are none, or several that differ.
    """
    names = [name for name in adapter.tensors if name == PROMPT or name.endswith(ROWS)]
    found = [adapter.tensors[name].to(torch.float32) for name in names]
    expected = adapter.config.get("num_virtual_tokens") or len(adapter.config.get("token_indices") or ())
    # Where the head is tied, PEFT stores the same rows under its name too.
    if not found or len(found) != len(adapter.tensors) or any(not torch.equal(found[0], each) for each in found[1:]):
        raise ArtefactError(
            f"{adapter.folder} holds other tensors than one table of token vectors: {', '.join(sorted(adapter.tensors)) or 'none'}.",
            "Whole embedding tables and encoders beside the tokens cannot be used here.",
        )
    if found[0].dim() != 2 or len(found[0]) != expected:
        raise ArtefactError(
            f"{adapter.folder} is damaged: a tensor of shape {tuple(found[0].shape)}, where its settings say {expected} tokens.",
            "Copy the adapter again.",
        )
    return found[0]


def _said_at(adapter: Adapter, model: Model) -> Position:
    """Where the chat template in the adapter's folder says the trained rows: compared with `chat.py`, place by place.

    Raises:
        ArtefactError: the folder has no template, or says them nowhere that is known here.
    """
    from transformers import AutoTokenizer

    indices = tuple(adapter.config["token_indices"])
    ours = tuple(model.slot_ids(len(indices)))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(adapter.folder), trust_remote_code=False)
        said = [
            tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
            for turns in SHAPES
        ]
    except (
        Exception
    ) as error:  # no tokenizer files, no template, or one that refuses: transformers and jinja2 raise many kinds
        raise _nowhere(adapter, f"no chat template there that can be read ({type(error).__name__})") from None
    for position in POSITIONS:
        try:
            known = [render(model, turns, position=position, n_tokens=len(indices)).ids for turns in SHAPES]
        except ChatError:
            continue
        there = dict(zip(ours, indices, strict=True))
        if said == [tuple(there.get(i, i) for i in ids) for ids in known]:
            return position
    raise _nowhere(adapter, f"its chat template says them at none of {', '.join(POSITIONS)}, once")


def _nowhere(adapter: Adapter, why: str) -> ArtefactError:
    return ArtefactError(
        f"{adapter.folder} trains rows of the vocabulary, and where these stand in a conversation is unknown: {why}.",
        "Put the tokenizer and a chat template that says the tokens into the folder, as `trimtab export --format peft` does.",
    )
