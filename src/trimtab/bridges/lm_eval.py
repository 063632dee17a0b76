"""lm-evaluation-harness: its tasks, with a token or under a guide.

    python -m trimtab.bridges.lm_eval run --model trimtab --model_args pretrained=smollm2-135m,token=runs/one --tasks gsm8k --apply_chat_template

or `lm_eval.simple_evaluate(TrimtabLM("smollm2-135m", token="runs/one"), tasks=[...], apply_chat_template=True)`.

Conversations cross the harness as JSON, so that ids come from `chat.py` alone (law 3). Without `--apply_chat_template` a task's whole text is one user turn, since a
token has its place in a conversation. For the same reason perplexity of bare text (`loglikelihood_rolling`) is refused. Spaces before an answer are left out where it begins the reply.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from trimtab.bridges import open_model
from trimtab.decoding.generate import generate
from trimtab.decoding.likelihood import likelihood
from trimtab.errors import ConfigError
from trimtab.run import console, progress

CHAT = "<trimtab conversation>"  # what rendered conversations begin with on their way through the harness
MAX_NEW_TOKENS = 256


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
        self.batch_size = batch_size if isinstance(batch_size, int) else 16
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
            for places in alike.values():
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
        """Log-probability of each continuation, and whether greedy decoding would say it."""
        read = [_conversation(request.args[0]) for request in requests]
        said = [
            request.args[1] if prefill else request.args[1].lstrip()
            for request, (_, prefill) in zip(requests, read, strict=True)
        ]
        chats, prefills = [chat for chat, _ in read], [prefill for _, prefill in read]
        found = [(p, greedy) for p, greedy in likelihood(self.model, chats, said, prefills=prefills, **self.guidance)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
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


def _sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """What a task asks for, as `generate` knows it; greedy unless it says that it samples."""
    until = asked.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    options: dict[str, Any] = {
        "stop": [word for word in stop if word],
        "max_new_tokens": int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or MAX_NEW_TOKENS),
    }
    if asked.get("do_sample"):
        options |= {name: asked[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in asked}
    return options


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
