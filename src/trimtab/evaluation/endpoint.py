"""Any OpenAI-compatible endpoint (vLLM, llama.cpp, a provider): many conversations, a bounded number at a time.

Failures are answers too: one that cannot be had says why, and the others go on. Once the endpoint cannot be reached at all, or lets everything it was sent time out, nothing more is sent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from trimtab.errors import ConfigError, UsageError

Message = Mapping[str, Any]
GIVE_UP = 3  # connections that fail, one after another


@dataclass(frozen=True)
class Answer:
    """What came back for one conversation.

    Attributes:
        text: the reply. stop: why it ended, in the endpoint's words (`stop`, `length`, ...).
        prompt_tokens, completion_tokens: what it cost; 0 where the endpoint does not say.
        error: why there is no reply; empty where there is one.
    """

    text: str = ""
    stop: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, whom, and how many at a time. The key is `OPENAI_API_KEY`, if there is one: sent over https or to this machine alone, and written nowhere.

    Attributes:
        concurrency: conversations at a time. timeout: seconds for one answer. retries: of one request, with growing pauses.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 3

    @property
    def name(self) -> str:
        return self.model

    @classmethod
    def named(cls, text: str, **limits: Any) -> Endpoint:
        """From `URL#MODEL`; `limits` are `concurrency`, `timeout` and `retries`.

        Raises:
            ConfigError: one of the two is missing. UsageError: the package openai is missing.
        """
        if find_spec("openai") is None:
            raise UsageError("an endpoint needs the package openai.", "pip install 'trimtab[endpoint]'")
        url, _, model = text.partition("#")
        if not url.startswith(("http://", "https://")) or not model:
            raise ConfigError(f"{text!r} names no endpoint.", "Write URL#MODEL, say http://127.0.0.1:8000/v1#llama.")
        return cls(url, model, **limits)

    def ask(self, chats: Sequence[Sequence[Message]], *, max_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Answers to conversations as they come, each with its place; temperature 0."""
        import openai

        key = api_key(self.url) or "none"
        client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)
        lost = threading.Event()
        failures: list[Exception] = []  # in a row
        late: list[Exception] = []  # in a row

        def one(chat: Sequence[Message]) -> Answer:
            if lost.is_set():
                return Answer(error="not sent: the endpoint does not answer")
            try:
                messages: Any = [dict(turn) for turn in chat]
                found = client.chat.completions.create(
                    model=self.model, messages=messages, temperature=0.0, max_tokens=max_tokens
                )
                choice, usage = found.choices[0], found.usage
                answer = Answer(
                    choice.message.content or "",
                    choice.finish_reason or "",
                    usage.prompt_tokens if usage else 0,
                    usage.completion_tokens if usage else 0,
                )
            except openai.APITimeoutError as error:
                late.append(error)
                if len(late) > self.concurrency:  # all that it had at a time, and one more
                    lost.set()
                return Answer(error=f"no answer within {self.timeout:g} seconds, asked {self.retries + 1} times")
            except openai.APIConnectionError as error:
                failures.append(error)
                if len(failures) >= GIVE_UP:
                    lost.set()
                return Answer(error=f"cannot be reached: {error.__cause__ or error}")
            except Exception as error:  # whatever a page that is no answer leads the client to
                return Answer(error=f"{type(error).__name__}: {error}"[:300])
            failures.clear()
            late.clear()
            return answer

        pool = ThreadPoolExecutor(self.concurrency)
        places = {pool.submit(one, chat): place for place, chat in enumerate(chats)}
        try:
            for done in as_completed(places):
                yield places[done], done.result()
        finally:  # on Ctrl-C what has not begun is not begun, and what has is not waited for
            lost.set()
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()


def api_key(url: str) -> str | None:
    """The key for an endpoint, if there is one and it may be sent there."""
    trusted = url.startswith("https://") or urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return (os.environ.get("OPENAI_API_KEY") if trusted else None) or None
