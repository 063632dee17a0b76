"""What a model can still do: right answers, and how far its distribution has moved where nothing should change.

Answers: rows with `choices` by the likeliest letter (as MMLU is scored: no reply is parsed); rows whose `reference` is a number by the last number of the reply
(as GSM8K is scored: exact match). Distance: KL from the untouched model along its own replies to plain requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.chat import Prompt, reply_ids, strip_thinking
from trimtab.decoding.engine import by_length, forward, read
from trimtab.decoding.past import Past
from trimtab.evaluation.metrics import bootstrap_mean
from trimtab.models import Model, slot
from trimtab.prompts.records import LETTERS
from trimtab.run import progress

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
ALONG = 32  # tokens of the untouched model's reply
BATCH = 8  # each row holds that many distributions over the vocabulary


def expected(row: Mapping[str, Any]) -> str | float | None:
    """The right answer of a row, a letter or a number; `None` where it has none that could be checked."""
    reference = str(row["reference"]).strip()
    if row["choices"]:
        letters = LETTERS[: len(row["choices"])]
        return reference.upper() if len(reference) == 1 and reference.upper() in letters else None
    return _number(reference) if NUMBER.fullmatch(reference) else None


def right(row: Mapping[str, Any]) -> bool | None:
    """Whether a row's answer is right; `None` where it has no answer that could be checked."""
    answer = expected(row)
    if answer is None or row.get("stop") == "error":
        return None
    if row["choices"]:
        return row["choice"] == answer if row.get("choice") is not None else None
    found = NUMBER.findall(strip_thinking(str(row["reply"])))
    return bool(found) and _number(found[-1]) == answer


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def choose_letter(
    model: Model, tails: Sequence[Sequence[int]], past: Past, choices: Sequence[Sequence[str]]
) -> list[str | None]:
    """For each row the letter that is likeliest as the reply's first token; `None` for rows without choices, or with logits that are no numbers."""
    logits = forward(model, tails, past, 1)[:, -1]
    letters = [reply_ids(model, letter)[0] for letter in LETTERS]
    found: list[str | None] = []
    for row, options in zip(logits, choices, strict=True):
        scores = row[letters[: len(options)]]
        found.append(LETTERS[int(scores.argmax())] if len(options) and scores.isfinite().all() else None)
    return found


@torch.inference_mode()
def kl_to_base(
    model: Model,
    prompts: Sequence[Prompt],
    tuned: Sequence[Prompt],
    replies: Sequence[str],
    vectors: Tensor,
) -> dict[str, Any] | None:
    """Mean KL divergence in nats from the untouched model to the one with `vectors`, at the first token and over the first `ALONG` tokens of the untouched
    model's own replies, with bootstrap intervals; `None` without rows.

    Args:
        prompts: of the untouched model. tuned: the same conversations with the slot in place. replies: the untouched model's.
    """
    said = [reply_ids(model, reply)[:ALONG] for reply in replies]
    places = [i for i, ids in enumerate(said) if ids]
    first, along = torch.zeros(len(said)), torch.zeros(len(said))
    with progress("distance from the base", len(places)) as advance:
        for chunk in by_length([len(prompts[i].ids) + len(said[i]) for i in places], BATCH):
            batch = [places[place] for place in chunk]
            k = max(len(said[i]) for i in batch)
            base = _log_p(model, [prompts[i].ids for i in batch], [said[i] for i in batch], k, None)
            moved = _log_p(model, [tuned[i].ids for i in batch], [said[i] for i in batch], k, vectors)
            divergence = (base.exp() * (base - moved)).sum(-1).clamp(min=0)
            for row, i in enumerate(batch):
                # Replies end in the last columns.
                own = divergence[row, k - len(said[i]) :]
                first[i], along[i] = own[0], own.mean()
            advance(len(batch))
    if not places:
        return None
    means = {"first": bootstrap_mean(first[places].numpy()), "along": bootstrap_mean(along[places].numpy())}
    return {"n": len(places), "tokens": ALONG, **means}


def _log_p(
    model: Model, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], k: int, vectors: Tensor | None
) -> Tensor:
    """Log-probabilities `[B, k, V]` at the last k places of prompt and reply, the one before each reply token included."""
    with slot(model, vectors):
        past, tails = read(model, [tuple(prompt) for prompt in prompts])
        whole = [(*tail, *reply[:-1]) for tail, reply in zip(tails, replies, strict=True)]
        return forward(model, whole, past, k).log_softmax(-1)
