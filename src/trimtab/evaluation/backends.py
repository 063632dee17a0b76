"""Where replies come from: this process, untouched, with a token or under a guide; or an endpoint that somebody else runs.

A backend says what a reply depends on, so that none is made twice, and makes those that are missing, in whatever order suits it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.chat import Prompt, render
from trimtab.decoding.engine import Row, by_length, decode, read
from trimtab.decoding.generate import Reply, generate
from trimtab.decoding.likelihood import guided_log_odds, likelihood
from trimtab.errors import ChatError
from trimtab.evaluation.adaptive import beside
from trimtab.evaluation.capability import choose_letter
from trimtab.evaluation.endpoint import Endpoint
from trimtab.models import Model, slot
from trimtab.neuron.guide import Guide
from trimtab.prompts.records import LETTERS, Record
from trimtab.refusal import opening_log_odds
from trimtab.run import digest
from trimtab.softtoken.artifact import SoftToken

Fields = dict[str, Any]
Guidance = SoftToken | Guide | None


@dataclass(frozen=True)
class Backend:
    """Makes replies.

    Attributes:
        key: everything that the reply to a record depends on, as a digest. Raises ChatError where the model's template refuses the conversation.
        replies: for a suite's records and the places of those that are wanted: a place and the fields of its reply (`reply`, `tokens`, `stop`, `log_odds`), as they come.
    """

    key: Callable[[Record], str]
    replies: Callable[[Sequence[Record], Collection[int]], Iterator[tuple[int, Fields]]]


def speaker(model: Model, guidance: Guidance) -> Any:
    """What replies depend on besides the model: the token, or everything about the guide."""
    if isinstance(guidance, Guide):
        return guidance.describe(guidance.expert_for(model))
    return guidance.sha256() if guidance else ""


def in_process(
    model: Model, guidance: Guidance, *, max_new_tokens: int, batch_size: int, attacker: Tensor | None = None
) -> Backend:
    """Greedy replies of `model` here; `attacker` are the vectors of a soft prompt before the last user's words."""
    token = guidance if isinstance(guidance, SoftToken) else None
    vectors = token.vectors.to(model.device) if token else None
    who = speaker(model, guidance)
    attack_tokens = 0
    if attacker is not None:
        vectors, attack_tokens = beside(token, attacker), len(attacker)
        who = [who, hashlib.sha256(attacker.cpu().numpy().tobytes()).hexdigest()]

    def prompt_of(record: Record) -> Prompt:
        options: dict[str, Any] = {"prefill": record.prefill, "attack_tokens": attack_tokens}
        return render(model, record.chat, **options) if token is None else token.render(model, record.chat, **options)

    def key(record: Record) -> str:
        # Choices are asked for beside the reply: which letter is likeliest is stored with it.
        asked = [record.choices] if record.choices else []
        return digest(model.fingerprint, str(model.dtype), who, max_new_tokens, prompt_of(record).ids, *asked)

    def replies(records: Sequence[Record], wanted: Collection[int]) -> Iterator[tuple[int, Fields]]:
        if not wanted:
            return  # nothing is rendered for it
        prompts: dict[int, Prompt] = {}
        for i, record in enumerate(records):
            with suppress(ChatError):  # told where keys are made
                prompt = prompt_of(record)
                row = Row(i, max_new_tokens)
                if row.fits(model, len(prompt.ids)):
                    prompts[i] = prompt
                elif i in wanted:
                    yield i, failed(row.error)
        places = list(prompts)
        # Batches are those of the whole suite, whatever is left of it: who shares a batch shows in the last bits, and a run that was killed ends with the same ones.
        for batch in by_length([len(prompt.ids) for prompt in prompts.values()], batch_size):
            chunk = [places[i] for i in batch]
            if wanted_here := set(chunk).intersection(wanted):
                part = [records[i] for i in chunk]
                if isinstance(guidance, Guide):
                    found = _under_guide(model, part, chunk, guidance, max_new_tokens)
                else:
                    options = [record.choices for record in part]
                    found = _by_itself(model, [prompts[i] for i in chunk], options, vectors, max_new_tokens)
                yield from ((i, fields) for i, fields in zip(chunk, found, strict=True) if i in wanted_here)

    return Backend(key, replies)


def at_endpoint(endpoint: Endpoint, *, max_new_tokens: int) -> Backend:
    """Greedy replies of whatever model an endpoint serves. It cannot be made to begin a reply with given words: such rows are not asked."""

    def key(record: Record) -> str:
        return digest("endpoint", endpoint.url, endpoint.model, max_new_tokens, record.chat, record.prefill)

    def replies(records: Sequence[Record], wanted: Collection[int]) -> Iterator[tuple[int, Fields]]:
        asked = [i for i in sorted(wanted) if not records[i].prefill]
        for i in set(wanted).difference(asked):
            yield i, {**failed("a chat endpoint takes no words to begin a reply with"), "stop": "not asked"}
        for place, answer in endpoint.ask([records[i].chat for i in asked], max_tokens=max_new_tokens):
            if answer.error:
                yield asked[place], failed(answer.error)
            else:
                stop = "eos" if answer.stop == "stop" else answer.stop
                yield asked[place], {
                    "reply": answer.text, "tokens": answer.completion_tokens, "stop": stop, "log_odds": None,
                }  # fmt: skip

    return Backend(key, replies)


def failed(why: str) -> Fields:
    """The fields of a row without a reply, and why it has none."""
    return {"reply": "", "tokens": 0, "stop": "error", "log_odds": None, "error": why}


def _by_itself(
    model: Model,
    prompts: Sequence[Prompt],
    choices: Sequence[Sequence[str]],
    vectors: Tensor | None,
    max_new_tokens: int,
) -> Iterator[Fields]:
    """Greedy replies and refusal log-odds, of the untouched model or with `vectors` in the prompts' slots; where there are choices, the likeliest letter."""
    rows = [Row(i, max_new_tokens, prompt.ids) for i, prompt in enumerate(prompts)]
    scores: dict[int, float] = {}
    letters: dict[int, str | None] = {}
    if fit := [row for row in rows if row.fits(model, len(row.prompt))]:
        with torch.inference_mode(), slot(model, vectors):
            past, tails = read(model, [row.prompt for row in fit])
            found = opening_log_odds(model, tails, past).tolist()
            if any(choices):
                chosen = choose_letter(model, tails, past, [choices[row.index] for row in fit])
                letters = {row.index: letter for row, letter in zip(fit, chosen, strict=True) if letter}
            decode(model, tails, past, fit, vectors=vectors)
        scores = {row.index: score for row, score in zip(fit, found, strict=True) if math.isfinite(score)}
    for row in rows:
        if row.stop == "error":
            yield failed(row.error)
            continue
        reply = model.tokenizer.decode(row.ids, skip_special_tokens=True)
        fields = {"reply": reply, "tokens": len(row.ids), "stop": row.stop, "log_odds": scores.get(row.index)}
        yield fields | ({"choice": letters[row.index]} if row.index in letters else {})


def _under_guide(
    model: Model, records: Sequence[Record], places: Sequence[int], guide: Guide, max_new_tokens: int
) -> Iterator[Fields]:
    """Greedy guided replies with their traces; `places` in the suite fix what a random neuron draws. Their log-odds are those of the mixture."""
    replies = generate(
        model,
        [record.chat for record in records],
        guide=guide,
        prefills=[record.prefill for record in records],
        max_new_tokens=max_new_tokens,
        batch_size=len(records),
        streams=places,
    )
    letters = _letters(model, records, places, guide, replies)
    said = [place for place, reply in enumerate(replies) if not reply.error]
    odds = guided_log_odds(
        model,
        [records[i].chat for i in said],
        guide,
        prefills=[records[i].prefill for i in said],
        alphas=[replies[i].alpha or 0.0 for i in said],
        streams=[places[i] for i in said],
    )
    scores = {place: score for place, score in zip(said, odds, strict=True) if math.isfinite(score)}
    for place, reply in enumerate(replies):
        if reply.error:
            yield failed(reply.error)
            continue
        steps = [step.record() for step in reply.trace]
        yield {
            "reply": reply.text,
            "tokens": len(reply.ids),
            "stop": reply.stop,
            "log_odds": scores.get(place),
            "alpha": reply.alpha,
            "risk": reply.rating.risk if reply.rating else None,
            "rated": reply.rating.parsed if reply.rating else None,
            "divergence": [step["divergence"] for step in steps],
            "potential": [step["potential"] for step in steps],
            "spikes": [int(step["spike"]) for step in steps],
            "guided": [int(step["chosen"] != step["base"]) for step in steps],
            **({"choice": letters[place]} if place in letters else {}),
        }


def _letters(
    model: Model, records: Sequence[Record], places: Sequence[int], guide: Guide, replies: Sequence[Reply]
) -> dict[int, str]:
    """The likeliest letter under the guide, by place in the batch, for records that have choices and got a reply."""
    asked = [
        (i, letter)
        for i, (record, reply) in enumerate(zip(records, replies, strict=True))
        for letter in LETTERS[: len(record.choices) if not reply.error else 0]
    ]
    found = likelihood(
        model,
        [records[i].chat for i, _ in asked],
        [letter for _, letter in asked],
        guide=guide,
        prefills=[records[i].prefill for i, _ in asked],
        alphas=[replies[i].alpha or 0.0 for i, _ in asked],
        streams=[places[i] for i, _ in asked],
    )
    chances: dict[int, dict[str, float]] = {}
    for (i, letter), (log_probability, _) in zip(asked, found, strict=True):
        chances.setdefault(i, {})[letter] = log_probability
    return {
        i: max(part, key=lambda letter: part[letter])
        for i, part in chances.items()
        if not any(map(math.isnan, part.values()))
    }
