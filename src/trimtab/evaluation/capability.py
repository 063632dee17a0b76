"""What a model can still do: right answers, and how far its distribution has moved where nothing should change.

Answers: rows with `choices` by the likeliest letter (as MMLU is scored: no reply is parsed); rows whose `reference` is a number by the last number of the reply
(as GSM8K is scored: exact match). Distance: KL from the untouched model along its own replies to plain requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.chat import Prompt, render, reply_ids, strip_thinking
from trimtab.decoding.engine import Ids, banned_ids, by_length, forward, read
from trimtab.decoding.likelihood import chances_along, guided_chances
from trimtab.decoding.past import Past
from trimtab.evaluation.metrics import bootstrap_mean
from trimtab.models import Model, slot
from trimtab.neuron.guide import Guide
from trimtab.prompts.records import LETTERS, Record
from trimtab.run import progress

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
ALONG = 32  # tokens of the untouched model's reply
TINY = 1e-30  # chances below it count as it: a KL is finite
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
    """For each row the letter that is likeliest as the reply's first token; `None` for rows without choices, or with logits that are no numbers. `past` is left as it was."""
    logits = forward(model, tails, past, 1)[:, -1]
    past.retract([len(tail) for tail in tails])
    letters = [reply_ids(model, letter)[0] for letter in LETTERS]
    found: list[str | None] = []
    for row, options in zip(logits, choices, strict=True):
        scores = row[letters[: len(options)]]
        found.append(LETTERS[int(scores.argmax())] if len(options) and scores.isfinite().all() else None)
    return found


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

    def both(places: Sequence[int], said: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        base = _log_p(model, [prompts[i].ids for i in places], said, None)
        return base, _log_p(model, [tuned[i].ids for i in places], said, vectors)

    return _mean_kl(model, prompts, replies, both)


def kl_under_guide(
    model: Model,
    records: Sequence[Record],
    replies: Sequence[str],
    guide: Guide,
    alphas: Sequence[float],
    streams: Sequence[int],
) -> dict[str, Any] | None:
    """As `kl_to_base`, to what the guide leaves of the model's chances: its neuron goes along the untouched model's replies, and where it fires, the expert is
    mixed in. That it may stop early is left out of account.

    Args:
        replies: the untouched model's. alphas: the expert's strength for each record. streams: what a random neuron draws for each (`likelihood`).
    """
    expert = guide.expert_for(model)
    prompts = [render(model, record.chat, prefill=record.prefill) for record in records]
    heard = [expert.render(record.chat, prefill=record.prefill) for record in records]
    banned = banned_ids(model, expert.vectors)

    def both(places: Sequence[int], said: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        base = chances_along(model, [prompts[i].ids for i in places], said, slot(model, None), banned)
        other = chances_along(expert.model, [heard[i].ids for i in places], said, expert.speaking(), banned)
        moved = guided_chances(base, other, said, guide, [alphas[i] for i in places], [streams[i] for i in places])
        moved = moved / moved.sum(-1, keepdim=True)  # a mixture on some candidates sums only nearly to 1
        return base[..., : moved.shape[-1]].clamp(min=TINY).log(), moved.clamp(min=TINY).log()

    return _mean_kl(model, prompts, replies, both)


@torch.inference_mode()
def _mean_kl(
    model: Model,
    prompts: Sequence[Prompt],
    replies: Sequence[str],
    both: Callable[[Sequence[int], Sequence[Ids]], tuple[Tensor, Tensor]],
) -> dict[str, Any] | None:
    """`both` gives log-probabilities `[B, T, V]` before and after, for rows and the replies that are read along, which end in the last columns."""
    said = [reply_ids(model, reply)[:ALONG] for reply in replies]
    places = [i for i, ids in enumerate(said) if ids]
    first, along = torch.zeros(len(said)), torch.zeros(len(said))
    with progress("distance from the base", len(places)) as advance:
        for chunk in by_length([len(prompts[i].ids) + len(said[i]) for i in places], BATCH):
            batch = [places[place] for place in chunk]
            base, moved = both(batch, [said[i] for i in batch])
            divergence = (base.exp() * (base - moved)).sum(-1).clamp(min=0)
            for row, i in enumerate(batch):
                own = divergence[row, -len(said[i]) :]
                first[i], along[i] = own[0], own.mean()
            advance(len(batch))
    if not places:
        return None
    means = {"first": bootstrap_mean(first[places].numpy()), "along": bootstrap_mean(along[places].numpy())}
    return {"n": len(places), "tokens": ALONG, **means}


def _log_p(model: Model, prompts: Sequence[Ids], replies: Sequence[Ids], vectors: Tensor | None) -> Tensor:
    """Log-probabilities `[B, T, V]` at the places of the longest reply, the one before each reply token included."""
    with slot(model, vectors):
        past, tails = read(model, prompts)
        whole = [(*tail, *reply[:-1]) for tail, reply in zip(tails, replies, strict=True)]
        return forward(model, whole, past, max(map(len, replies))).log_softmax(-1)
