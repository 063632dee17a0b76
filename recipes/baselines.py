"""Other ways to make an over-cautious model answer, for `over_refusal.py`: a system prompt, Self-CD, and surgical ablation. Each gives a function from conversations to replies, or a model.

After the papers' ideas, in our words and with our choices: Self-CD's prompt is ours, and it may only say what is among the ten likeliest tokens without it; surgical ablation looks at one position, the last of the
prompt, and at five layers, without the published bound on its KL.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.chat import as_messages, render
from trimtab.decoding.engine import Row, by_length, choose, decode, read
from trimtab.decoding.generate import generate
from trimtab.decoding.past import Past
from trimtab.decoding.sampling import Sampling
from trimtab.models import Model
from trimtab.prompts.records import Record

HELPFUL = (
    "You are a helpful assistant. Many requests only sound dangerous: look at what is really asked, and answer every harmless request directly and completely. "
    "Decline only what would do real harm."
)
CAREFUL = "You are a helpful assistant that puts safety first. Look for anything in the request that could be harmful, and decline if there is."
CANDIDATES = 10  # Self-CD chooses among the likeliest so many of the model without the prompt
BATCH = 32


def with_system(chat: Sequence[Any], words: str) -> list[dict[str, Any]]:
    """The conversation under a system prompt, in place of its own."""
    return [{"role": "system", "content": words}, *(turn for turn in as_messages(chat) if turn["role"] != "system")]


@torch.inference_mode()
def self_cd(model: Model, chats: Sequence[Any], prefills: Sequence[str], limit: int, strength: float) -> list[str]:
    """Self-contrastive decoding (Shi et al., 2024): what a prompt that stresses safety adds to the next-token scores is over-attention, and is subtracted,
    `strength` times; among the likeliest tokens of the model without it."""
    said = [""] * len(chats)
    plain = [render(model, chat, prefill=words).ids for chat, words in zip(chats, prefills, strict=True)]
    stressed = [
        render(model, with_system(chat, CAREFUL), prefill=words).ids
        for chat, words in zip(chats, prefills, strict=True)
    ]

    def contrast(logits: Tensor, rows: Sequence[Row]) -> list[int]:
        alone, careful = logits.log_softmax(-1)
        scores = alone - strength * (careful - alone)
        worst = alone.topk(CANDIDATES, dim=-1).values[:, -1:]
        return choose(scores.masked_fill(alone < worst, -torch.inf), rows, Sampling())

    for chunk in by_length([len(ids) for ids in plain], BATCH):
        rows = [Row(i, limit, plain[i]) for i in chunk]
        past, tails = read(model, [plain[i] for i in chunk])
        other, ends = read(model, [stressed[i] for i in chunk])
        decode(model, [*tails, *ends], Past.stack(past, other), rows, contrast, voices=2)
        for row in rows:
            said[row.index] = str(model.tokenizer.decode(row.ids, skip_special_tokens=True))
    return said


@torch.inference_mode()
def states(model: Model, records: Sequence[Record]) -> Tensor:
    """Mean residual state at the last token of the prompt, after every layer: `[layers, hidden]`, float32."""
    total: Any = 0
    for chunk in by_length([len(record.text) for record in records], BATCH):
        prompts = [render(model, records[i].chat).ids for i in chunk]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.network(input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1)
        total = total + torch.stack([layer[:, -1].float().sum(0) for layer in out.hidden_states[1:]])
    found: Tensor = total / len(records)
    return found


def false_refusal(over_refused: Tensor, harmful: Tensor, plain: Tensor) -> Tensor:
    """Directions `[layers, hidden]` of needless refusal alone (Wang et al., 2024): the difference of means between benign requests that are refused and plain ones, less its part along the
    direction of rightful refusal."""
    wrong, right = over_refused - plain, torch.nn.functional.normalize(harmful - plain, dim=-1)
    return torch.nn.functional.normalize(wrong - (wrong * right).sum(-1, keepdim=True) * right, dim=-1)


def ablated(model: Model, direction: Tensor) -> Model:
    """A model that cannot write along `direction` `[hidden]`: the same as taking it out of every state, done in the weights (Arditi et al., 2024)."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        table = network.get_input_embeddings().weight
        if network.get_output_embeddings().weight is table:  # what reads states must stay as it was
            network.get_output_embeddings().weight = torch.nn.Parameter(table.clone(), requires_grad=False)
        table -= torch.outer(table @ direction, direction)
        for name, module in network.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.weight -= torch.outer(direction, direction @ module.weight)
    return replace(model, network=network, name=f"{model.name}, ablated")


def replies(model: Model, chats: Sequence[Any], prefills: Sequence[str], limit: int, **guidance: Any) -> list[str]:
    """Greedy replies, with a token if one is given."""
    found = generate(model, chats, prefills=prefills, max_new_tokens=limit, batch_size=BATCH, **guidance)
    return [reply.text for reply in found]


def under_system(model: Model, chats: Sequence[Any], prefills: Sequence[str], limit: int) -> list[str]:
    """Greedy replies under a system prompt of the same intent as the token."""
    return replies(model, [with_system(chat, HELPFUL) for chat in chats], prefills, limit)
