"""lm-evaluation-harness: its tasks, with a token or under a guide.

    python -m trimtab.bridges.lm_eval run --model trimtab --model_args pretrained=smollm2-135m,token=runs/one --tasks gsm8k --apply_chat_template --batch_size 16

or `lm_eval.simple_evaluate(TrimtabLM("smollm2-135m", token="runs/one"), tasks=[...], apply_chat_template=True)`.

Conversations cross the harness as JSON, so that ids come from `chat.py` alone (law 3). Without `--apply_chat_template` a task's whole text is one user turn, since a
token has its place in a conversation. For the same reason perplexity of bare text (`loglikelihood_rolling`) is refused. Spaces before an answer are left out where it begins the reply.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from trimtab.bridges import open_model
from trimtab.decoding.generate import generate
from trimtab.decoding.likelihood import likelihood
from trimtab.errors import ConfigError, TrimtabError
from trimtab.run import console, progress

CHAT = "<trimtab conversation>"  # what rendered conversations begin with on their way through the harness
MAX_NEW_TOKENS, CHUNK = 256, 256


@register_model("trimtab")
class TrimtabLM(LM):
    """A model of trimtab's as the harness knows models.

    Args:
        pretrained: as MODEL on the command line. batch_size: replies generated together.
        arguments: `token`, `expert`, `neuron`, `risk`, `dtype`, ... as on the command line.
    """

    def __init__(
        self, pretrained: str, batch_size: int | str = 16, max_batch_size: Any = None, **arguments: Any
    ) -> None:
        super().__init__()
        if str(arguments.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            arguments.pop("device")  # the harness's own default
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 16  # "auto" is 16
        self.model, self.guidance = open_model(pretrained, arguments)

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name.replace("/", "__"))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's own; another one cannot be asked for."""
        return str(self.model.tokenizer.chat_template or "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation, to be rendered where it is read."""
        return CHAT + json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies, each up to its stop strings; a conversation too long for the model gets an empty one, and is named."""
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        replies = [""] * len(requests)
        with progress("replies", len(requests)) as advance:
            for places in (part for same in alike.values() for part in _chunks(same)):
                chats, prefills = zip(*(_conversation(requests[i].args[0]) for i in places), strict=True)
                options = _sampling(requests[places[0]].args[1])
                found = generate(
                    self.model,
                    chats,
                    prefills=prefills,
                    batch_size=self.batch_size,
                    progress=advance,
                    **self.guidance,
                    **options,
                )
                for i, reply in zip(places, found, strict=True):
                    if reply.error:
                        console.print(f"left empty: {reply.error}", markup=False)
                    replies[i] = reply.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, reply.text)
        return replies

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would say it; -inf where the model has no room for it, which is named."""
        read = [_conversation(request.args[0]) for request in requests]
        # Choices of one question are compared with each other: a random neuron must do the same for all.
        streams = {context: place for place, context in enumerate(dict.fromkeys(r.args[0] for r in requests))}
        found: list[tuple[float, bool]] = []
        unread = 0
        with progress("likelihoods", len(requests)) as advance:
            for places in _chunks(range(len(requests))):
                parts = [(*read[i], requests[i].args[1]) for i in places]
                answers = likelihood(
                    self.model,
                    [chat for chat, _, _ in parts],
                    [said if prefill else said.lstrip() for _, prefill, said in parts],
                    prefills=[prefill for _, prefill, _ in parts],
                    streams=[streams[requests[i].args[0]] for i in places],
                    progress=advance,
                    **self.guidance,
                )
                for i, (chance, greedy) in zip(places, answers, strict=True):
                    unread += math.isnan(chance)
                    found.append((-math.inf if math.isnan(chance) else chance, greedy))
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, found[-1])
        if unread:
            console.print(f"{unread} continuations are empty, or leave the model no room: they count as impossible")
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: bare text has no place for a token."""
        raise ConfigError(
            "perplexity of bare text: a soft token has its place in a conversation.", "Leave this task out."
        )


def _conversation(context: str) -> tuple[list[dict[str, str]], str]:
    """A conversation and the words its reply begins with, from what went through the harness."""
    if not context.startswith(CHAT):
        return [{"role": "user", "content": context}], ""
    turns, end = json.JSONDecoder().raw_decode(context, len(CHAT))
    begun = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    return turns, begun + context[end:]


def _chunks(places: Sequence[int]) -> Iterator[Sequence[int]]:
    """Some at a time, so that the harness can keep what is done."""
    for begin in range(0, len(places), CHUNK):
        yield places[begin : begin + CHUNK]


def _sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """What a task asks for, as `generate` knows it; it samples where a temperature above 0 or `do_sample` says so."""
    until = asked.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    lengths = (asked.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
    options: dict[str, Any] = {
        "stop": [word for word in stop if word],
        "max_new_tokens": int(next(filter(None, lengths), MAX_NEW_TOKENS)),
    }
    temperature = float(asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0))
    if temperature > 0 and asked.get("do_sample", True):
        options |= {name: asked[name] for name in ("top_p", "top_k", "min_p") if name in asked}
        options["temperature"] = temperature
    return options


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except TrimtabError as error:
        sys.exit(f"error: {error}")
