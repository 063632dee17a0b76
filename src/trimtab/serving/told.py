"""What a running OpenAI-compatible endpoint tells: its models, what it made of a prompt, how likely its first word was.

Engines differ in how much they tell and where they put it (vLLM, llama.cpp), so every answer is brought to one form here; what an engine does not tell is `None`.
Plain HTTP, since the fields looked for are no part of OpenAI's own.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from trimtab.errors import ConfigError, EndpointError, nearest
from trimtab.evaluation.endpoint import api_key

TIMEOUT = 120.0  # seconds for one answer
LONGEST = 32 << 20  # bytes of an answer that are read
TOP = 20  # likeliest first tokens asked for; more are refused by vLLM, and by OpenAI
# What is asked for besides the reply, most first: an endpoint that refuses unknown fields is asked again with less.
EXTRAS: tuple[dict[str, Any], ...] = (
    {
        "logprobs": True,
        "top_logprobs": TOP,
        # vLLM: ids of prompt and reply, and tokens by id where there are words otherwise.
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # llama.cpp: the prompt as it was read, and the reply's ids.
        "verbose": True,
        "return_tokens": True,
    },
    {"logprobs": True, "top_logprobs": TOP},
    {},
)
LOOK = "Give the base of its API, such as http://127.0.0.1:8000/v1, and see that the server runs."


@dataclass(frozen=True)
class Service:
    """An endpoint that answered, and the model to ask for. `url` is the base of the API."""

    url: str
    model: str
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class Told:
    """What an endpoint told about one conversation.

    Attributes:
        text: the reply's words. reply_ids: its token ids.
        prompt_tokens: how long the prompt was. prompt_ids: its token ids.
        first: the likeliest first tokens of the reply, by id or in words, with their probabilities; empty if not told.
    """

    text: str
    reply_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    prompt_ids: tuple[int, ...] | None
    first: tuple[tuple[int | str, float], ...]


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go with it."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_Stay)


def connect(address: str, timeout: float = TIMEOUT) -> Service:
    """The endpoint at `URL` or `URL#MODEL`; without a name, the one model that it serves.

    Raises:
        ConfigError: no address, or no such model there. EndpointError: it cannot be reached, or is no OpenAI-compatible endpoint.
    """
    url, _, wanted = address.partition("#")
    url = url.rstrip("/")
    if not _is_address(url):
        raise ConfigError(f"{address!r} is no address of an endpoint.", "Write URL, say http://127.0.0.1:8000/v1.")
    base = url
    status, body = _call(f"{base}/models", None, timeout)
    if not isinstance(body, dict) or status == 404:  # a server's own page, maybe, and the API beside it
        deeper, found = _call(f"{url}/v1/models", None, timeout)
        if deeper == 200:
            base, status, body = f"{url}/v1", deeper, found
    if status != 200:
        raise _refused(f"{base}/models", status, body)
    try:
        served = [str(each["id"]) for each in body["data"]]
        names = {*served, *(alias for each in body["data"] for alias in each.get("aliases") or ())}
    except (TypeError, KeyError, AttributeError):
        raise EndpointError(f"{base}/models is no list of models: {str(body)[:80]!r}.", LOOK) from None
    if wanted and wanted not in names:
        raise ConfigError(f"{base} serves no model {wanted!r}.", nearest(wanted, names) if names else LOOK)
    if not wanted and len(served) != 1:
        known = f"Write {url}#MODEL, where MODEL is one of: {', '.join(served)}." if served else LOOK
        raise ConfigError(f"{base} serves {len(served)} models.", known)
    return Service(base, wanted or served[0], timeout)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that are none
        return False


def ask(service: Service, turns: Sequence[Mapping[str, Any]], length: int, template_args: dict[str, Any]) -> Told:
    """One greedy reply of at most `length` tokens, and all that the endpoint tells about it.

    Raises:
        EndpointError: it does not answer, or what it answers is no reply.
    """
    place = f"{service.url}/chat/completions"
    body = {"model": service.model, "messages": list(turns), "temperature": 0, "max_tokens": length}
    if template_args:
        body["chat_template_kwargs"] = template_args
    for extra in EXTRAS:
        status, answer = _call(place, body | extra, service.timeout)
        if status not in (400, 422):
            break
    if status != 200:
        raise _refused(place, status, answer)
    try:
        return _told(service, answer)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        raise EndpointError(f"{place} answers with no reply: {str(answer)[:80]!r}.", LOOK) from None


def _told(service: Service, answer: Any) -> Told:
    choice = answer["choices"][0]
    seen = (choice.get("logprobs") or {}).get("content") or []
    named = [_token(each) for each in seen]
    own = answer.get("__verbose") or {}
    said = choice.get("token_ids") or own.get("tokens") or (named if named else None)
    length = (answer.get("usage") or {}).get("prompt_tokens")
    prompt = answer.get("prompt_token_ids") or _tokenized(service, own.get("prompt"), length)
    top = seen[0].get("top_logprobs") or [] if seen else []
    return Told(
        text=str(choice["message"].get("content") or ""),
        reply_ids=_ids(said),
        prompt_tokens=length if isinstance(length, int) else None,
        prompt_ids=_ids(prompt),
        first=tuple((_token(each), math.exp(min(0.0, float(each["logprob"])))) for each in top),
    )


def _token(entry: Any) -> int | str:
    """A token by id if the engine gives one (llama.cpp beside the word, vLLM instead of it), else in words."""
    word = entry["token"]
    if isinstance(entry.get("id"), int):
        return int(entry["id"])
    return int(word.removeprefix("token_id:")) if word.startswith("token_id:") else str(word)


def _ids(found: Any) -> tuple[int, ...] | None:
    return tuple(found) if isinstance(found, Sequence) and found and all(type(i) is int for i in found) else None


def _tokenized(service: Service, prompt: Any, length: Any) -> Any:
    """The ids of a prompt that llama.cpp gave in words, by its own tokenizer; `None` where they are not as many as it read."""
    if not isinstance(prompt, str):
        return None
    place = service.url.removesuffix("/v1") + "/tokenize"
    # The words are the prompt read back, BOS included.
    status, body = _call(place, {"content": prompt, "add_special": False, "parse_special": True}, service.timeout)
    ids = body.get("tokens") if status == 200 and isinstance(body, dict) else None
    return ids if isinstance(ids, list) and len(ids) == length else None


def _call(url: str, body: Any, timeout: float) -> tuple[int, Any]:
    """The status of a request, and what came with it: as JSON if it is that, else the words. POST if there is a `body`.

    Raises:
        EndpointError: nothing came.
    """
    headers = {"Content-Type": "application/json"}
    if key := api_key(url):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        with OPENER.open(request, timeout=timeout) as answer:
            status, data = answer.status, answer.read(LONGEST)
    except urllib.error.HTTPError as error:
        with error:
            status, data = error.code, error.read(LONGEST)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise EndpointError(
                f"no answer within {timeout:g} seconds from {url}.",
                "It may be loading its model or busy with others: try again when it is idle.",
            ) from None
        raise EndpointError(f"{url} cannot be reached: {reason}.", LOOK) from None
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode("utf-8", "replace")


def _refused(place: str, status: int, body: Any) -> EndpointError:
    """What a status says, in words, and the mend."""
    detail = body.get("error", body) if isinstance(body, dict) else body
    words = " ".join(str(detail.get("message", detail) if isinstance(detail, dict) else detail).split())[:200]
    if 300 <= status < 400:
        return EndpointError(f"{place} leads elsewhere (HTTP {status}).", "Give the address that it leads to.")
    if status in (401, 403):
        mend = "Set OPENAI_API_KEY; it is sent over https, or to this machine."
    elif status in (404, 405):
        return EndpointError(f"{place} is not there (HTTP {status}): no OpenAI-compatible endpoint.", LOOK)
    elif status in (429, 503):
        mend = "It is busy, or still loading its model: try again when it is idle."
    elif status in (400, 422):
        mend = "Its chat template or its settings refuse a plain conversation: serve the exported model with its own."
    else:
        mend = "See the server's own log."
    return EndpointError(f"{place} answers HTTP {status}: {words or 'nothing'}", mend)
