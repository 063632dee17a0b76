"""The words to train towards: the frozen model's own where possible.

A harmful request gets the model's own refusal if it has one, else a refusal from `TEMPLATES`: the one the frozen model itself
finds likeliest. A benign request gets the model's own answer; one that the model refuses gets the answer it gives
under a more open system prompt, else the data set's reference. Replies are kept on disk by content.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.chat import Prompt, render, reply_ids
from trimtab.decoding.engine import Past, by_length, forward, generate_ids
from trimtab.models import Model, cache_dir
from trimtab.prompts.records import Record, Sample
from trimtab.refusal import is_refusal, log_odds
from trimtab.run import Records, create, digest, progress

# Full refusals with the openings that models use most; none is specific to a subject.
TEMPLATES = (
    "Sorry, but I can't help with that.",
    "I'm sorry, but I can't help with that.",
    "I can't help with that.",
    "I cannot help with that request.",
)
OPEN_SYSTEM = "You are a knowledgeable assistant. The next request is harmless. Answer it directly and completely."


def collect(model: Model, records: Sequence[Record], *, n_tokens: int = 16, refusal: str = "") -> list[Sample]:
    """Score every record with the untouched model and give it a target of at most `n_tokens` tokens.

    `refusal` overrides the choice among `TEMPLATES`.
    """
    prompts = [render(model, record.chat) for record in records]
    with progress("scoring with the base model", len(records)) as advance:
        scores = log_odds(model, prompts, progress=advance)
    # Own words are worth generating where they can be used: answers, and refusals of what is refused.
    asked = [i for i, r in enumerate(records) if r.label == "benign" or scores[i] > 0]
    own = dict(zip(asked, _replies(model, [prompts[i] for i in asked], n_tokens, "own words"), strict=True))
    refused = [i for i in asked if records[i].label == "benign" and is_refusal(own[i])]
    opened = [render(model, [{"role": "system", "content": OPEN_SYSTEM}, *records[i].chat]) for i in refused]
    other = dict(zip(refused, _replies(model, opened, n_tokens, "answers to refused prompts"), strict=True))
    harmful = [prompts[i] for i, r in enumerate(records) if r.label == "harmful"]
    template = refusal or _likeliest(model, harmful[:48])

    samples = []
    for i, record in enumerate(records):
        reply = own.get(i, "")
        if record.label == "harmful":
            keeps = bool(is_refusal(reply))
            samples.append(Sample(record, scores[i], reply if keeps else template, keeps))
        elif i not in other:
            samples.append(Sample(record, scores[i], reply, True))
        else:
            answer = record.reference if is_refusal(other[i]) else other[i]
            samples.append(Sample(record, scores[i], answer, False))
    return samples


def _likeliest(model: Model, prompts: Sequence[Prompt]) -> str:
    """The refusal template that the frozen model gives the highest likelihood per token after these prompts."""
    if not prompts:
        return TEMPLATES[0]
    likelihood = {}
    for template in TEMPLATES:
        ids = reply_ids(model, template)
        total = 0.0
        for chunk in by_length([len(p.ids) for p in prompts], 24):
            tails = [prompts[i].ids + ids[:-1] for i in chunk]
            log_p = _no_grad_forward(model, tails, len(ids))
            total += float(log_p[:, range(len(ids)), ids].sum())
        likelihood[template] = total / len(ids)
    return max(likelihood, key=lambda template: likelihood[template])


def _no_grad_forward(model: Model, tails: Sequence[Sequence[int]], keep: int) -> torch.Tensor:
    with torch.inference_mode():
        return forward(model, tails, Past.empty(len(tails), model.device), keep).log_softmax(-1)


def _replies(model: Model, prompts: Sequence[Prompt], n_tokens: int, title: str) -> list[str]:
    """Greedy replies of the untouched model, kept on disk."""
    store = Records(create(cache_dir() / "replies") / f"{model.fingerprint}.jsonl")
    keys = [digest(prompt.ids, n_tokens) for prompt in prompts]
    missing = [i for i, key in enumerate(keys) if key not in store]
    if missing:
        with progress(title, len(missing)) as advance:
            for row in generate_ids(model, [prompts[i].ids for i in missing], max_new_tokens=n_tokens):
                store.add(keys[missing[row.index]], reply=model.tokenizer.decode(row.ids, skip_special_tokens=True))
                advance()
    return [str(store[key]["reply"]) for key in keys]
