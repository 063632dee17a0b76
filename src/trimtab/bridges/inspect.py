"""Inspect (inspect-ai): its tasks, with a token or under a guide.

    inspect eval inspect_evals/xstest --model trimtab/smollm2-135m -M token=runs/one

Inspect finds this file by the entry point `inspect_ai` of the package. It asks for one reply at a time, many at once: those that wait together are made together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)

from trimtab.bridges import open_model
from trimtab.decoding.generate import Reply, generate
from trimtab.errors import ConfigError
from trimtab.run import digest

BATCH = 16
MAX_NEW_TOKENS = 512
GATHER = 0.01  # seconds in which others may join a batch
STOPS: dict[str, StopReason] = {"eos": "stop", "stop": "stop", "early": "stop", "length": "max_tokens"}


@dataclass(eq=False)
class _Request:
    """One reply that somebody waits for."""

    chat: list[dict[str, str]]
    prefill: str
    options: tuple[tuple[str, Any], ...]
    stream: int = 0
    reply: Reply | None = None


@modelapi(name="trimtab")
class TrimtabAPI(ModelAPI):
    """A model of trimtab's as Inspect knows models; `-M` takes `token`, `expert`, `neuron`, `risk`, `dtype`, ... as on the command line."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self._model, self._guidance = open_model(model_name, arguments)
        self._waiting: list[_Request] = []
        self._turn = anyio.Lock()
        self._asked: Counter[str] = Counter()

    def max_connections(self) -> int:
        """So many requests come at once: a batch."""
        return BATCH

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """A reply; greedy unless a temperature is given.

        Raises:
            ConfigError: tools, several choices or pictures, which are not offered. ValueError: a conversation that the template refuses.
        """
        if tools or (config.num_choices or 1) > 1 or any(not _is_text(message) for message in input):
            raise ConfigError("trimtab calls no tools, sees no pictures and gives one reply.", "Choose a task without.")
        request = _request(input, config)
        # What is drawn depends on the conversation and how often it was asked, not on who happens to share the batch.
        words = digest(request.chat, request.prefill)
        request.stream = int(digest(words, self._asked[words])[:12], 16)
        self._asked[words] += 1
        self._waiting.append(request)
        await anyio.sleep(GATHER)
        async with self._turn:
            if request.reply is None:
                others = [r for r in self._waiting if r is not request and r.options == request.options]
                await self._make([request, *others][:BATCH])
        reply = request.reply
        assert reply is not None
        if reply.error.startswith("a prompt of"):  # too long for the model: this sample alone fails
            return ModelOutput.from_content(self.model_name, "", "model_length", reply.error)
        if reply.error:
            raise ValueError(reply.error)
        message = ChatMessageAssistant(content=reply.text, model=self.model_name, source="generate")
        written = len(reply.ids)
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=STOPS.get(reply.stop, "unknown"))],
            usage=ModelUsage(output_tokens=written, total_tokens=written),
        )

    async def _make(self, batch: list[_Request]) -> None:
        work = partial(
            generate,
            self._model,
            [request.chat for request in batch],
            prefills=[request.prefill for request in batch],
            streams=[request.stream for request in batch],
            batch_size=BATCH,
            **self._guidance,
            **dict(batch[0].options),
        )
        try:
            replies = await anyio.to_thread.run_sync(work)
        finally:
            self._waiting = [request for request in self._waiting if request not in batch]
        for request, reply in zip(batch, replies, strict=True):
            request.reply = reply


def _is_text(message: ChatMessage) -> bool:
    return isinstance(message.content, str) or all(part.type == "text" for part in message.content)


def _request(messages: list[ChatMessage], config: GenerateConfig) -> _Request:
    chat = [{"role": message.role, "content": message.text} for message in messages]
    prefill = chat.pop()["content"] if chat[-1]["role"] == "assistant" else ""
    asked = {
        "max_new_tokens": config.max_tokens or MAX_NEW_TOKENS,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "stop": tuple(config.stop_seqs or ()),
    }
    return _Request(chat, prefill, tuple((name, value) for name, value in asked.items() if value is not None))
