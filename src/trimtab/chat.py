"""The only place where messages become ids (law 3).

A conversation is rendered by the model's own chat template to text, the slot's place is found in that text, and the
pieces left and right of it are tokenised apart, as they would be around a real special token. BOS comes from the
template alone, so it is there once; the slot run is there once.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trimtab.errors import ChatError
from trimtab.models import Model

Message = Mapping[str, Any]
Position = Literal["start", "after_bos", "system", "user", "assistant", "reply"]
POSITIONS: tuple[Position, ...] = get_args(Position)
# What `start`, `system` ... mean, for help texts and reports.
POSITION_MEANING: dict[Position, str] = {
    "start": "before everything, BOS included (the paper's prefix)",
    "after_bos": "after the BOS token",
    "system": "end of the system turn",
    "user": "start of the last user turn",
    "assistant": "right before the header of the reply",
    "reply": "first position of the reply",
}
THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)\s*", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """Ids of a conversation up to the reply, with the place of the slot run.

    Attributes:
        ids: token ids, `slot_length` of them slot ids.
        slot: index of the first slot id; `len(ids)` when there is none.
        slot_length: number of slot ids; 0 for the untouched model.
    """

    ids: tuple[int, ...]
    slot: int
    slot_length: int


def as_messages(prompt: str | Sequence[Message]) -> list[dict[str, Any]]:
    """A bare string is one user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def render(
    model: Model,
    messages: str | Sequence[Message],
    *,
    position: Position | None = None,
    n_tokens: int = 1,
    attack_tokens: int = 0,
    prefill: str = "",
    tools: Sequence[Any] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Prompt:
    """Ids of `messages` with the header of the reply, ready for the model to continue.

    Args:
        messages: a user's words, or turns with `role` and `content`.
        position: where the slot run of `n_tokens` ids goes; `None` leaves it out (the untouched model).
        attack_tokens: so many further slot ids at the start of the last user turn: an attacker's (`evaluation/adaptive.py`).
        prefill: words the reply is made to begin with.
        tools: tool definitions for the template.
        template_args: extra template variables, such as `enable_thinking`.

    Raises:
        ChatError: no chat template, no system role where one is needed, or no safe place for the slot.
    """
    turns = as_messages(messages)
    options: dict[str, Any] = {"tools": list(tools) if tools else None, **(template_args or {})}
    text = _text(model, turns, options)
    n_tokens = n_tokens if position else 0
    if not n_tokens + attack_tokens:
        ids = _ids(model, text + prefill)
        return Prompt(ids, len(ids), 0)
    slot_ids = tuple(model.slot_ids(n_tokens + attack_tokens))
    runs = [(_find_slot(model, turns, options, text, position), slot_ids[:n_tokens])] if position else []
    if attack_tokens:
        runs.append((_find_slot(model, turns, options, text, "user"), slot_ids[n_tokens:]))
    ids, begun, slot = (), 0, 0
    for cut, run in sorted(runs, key=lambda found: found[0]):
        ids += _ids_without(model, text[begun:cut], slot_ids)
        slot = len(ids) if run[0] == slot_ids[0] else slot
        ids, begun = ids + run, cut
    return Prompt(ids + _ids_without(model, text[begun:] + prefill, slot_ids), slot, n_tokens or attack_tokens)


def reply_ids(model: Model, reply: str, *, end: bool = False) -> tuple[int, ...]:
    """Ids of a reply as the model would generate it; `end` adds the token that ends a turn."""
    ids = _ids(model, reply)
    return (*ids, model.tokenizer.eos_token_id) if end else ids


def strip_thinking(reply: str) -> str:
    """The answer without its think blocks; an unfinished block swallows the rest."""
    if "</think>" in reply and "<think>" not in reply:  # the template itself opened the block
        reply = reply.split("</think>", 1)[1]
    return THINKING.sub("", reply).strip()


def whole_reply(row: Mapping[str, Any]) -> str:
    """A stored reply without its think blocks, behind the words that it was made to begin with, as they follow each other."""
    reply, begun = strip_thinking(str(row["reply"])), str(row.get("prefill", ""))
    space = " " if begun and str(row["reply"])[:1].isspace() and not begun[-1].isspace() else ""
    return begun + space + reply


def rendered_text(
    model: Model,
    messages: str | Sequence[Message],
    *,
    header: bool,
    tools: Any = None,
    template_args: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model's own template writes it, with or without the header of a reply; no slot."""
    return _text(model, as_messages(messages), {"tools": tools, **(template_args or {})}, header=header)


def default_system(model: Model) -> str | None:
    """What the template says as system where a conversation has no system turn; `None` if nothing."""
    turns = [{"role": "user", "content": "Hello!"}]
    try:
        return str(_with_system_turn(model, turns, {}, _text(model, turns, {}))[0]["content"])
    except ChatError:
        return None


def template_hash(model: Model) -> str:
    """16 hex digits of the chat template: another template would put the slot elsewhere."""
    return hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest()[:16]


def _ids(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _ids_without(model: Model, text: str, slot_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids of a text in which a slot's name, spelled out by whoever wrote it, is plain text: it is cut in two, and so no special token."""
    ids = _ids(model, text)
    if not set(slot_ids).intersection(ids):
        return ids
    names = [name for name in model.tokenizer.convert_ids_to_tokens(list(slot_ids)) if name]
    pieces = re.split("|".join(rf"(?<={re.escape(name[:2])})(?={re.escape(name[2:])})" for name in names), text)
    return tuple(i for piece in pieces for i in _ids(model, piece))


def _text(model: Model, turns: list[dict[str, Any]], options: Mapping[str, Any], *, header: bool = True) -> str:
    if not model.tokenizer.chat_template:
        raise ChatError(
            f"{model.name} has no chat template, so a conversation has no defined form.",
            "Use the instruction-tuned version of this model, or set tokenizer.chat_template.",
        )
    try:
        text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header, **options)
    except Exception as error:  # jinja2 raises what the template's author chose to raise
        raise ChatError(f"the chat template of {model.name} refuses these turns: {error}") from None
    return str(text)


def _find_slot(
    model: Model, turns: list[dict[str, Any]], options: Mapping[str, Any], text: str, position: Position
) -> int:
    """The index in `text` where the slot run goes."""
    if position == "start":
        return 0
    if position == "reply":
        return len(text)
    if position == "after_bos":
        bos = model.tokenizer.bos_token or ""
        # Where the "BOS" also opens every turn (ChatML), it is no prefix of its own and there is nothing to be after.
        if not bos or not text.startswith(bos) or text.count(bos) > 1:
            raise ChatError(f"{model.name} begins a conversation with no BOS token of its own.", "Use position start.")
        return len(bos)
    if position == "assistant":
        closed = _text(model, turns, options, header=False)
        if not text.startswith(closed) or closed == text:
            raise ChatError(
                f"the chat template of {model.name} has no separate header for the reply.", "Use position reply."
            )
        return len(closed)
    if position == "user":
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is None:
            raise ChatError("position user needs a user turn, and this conversation has none.")
        return _mark(model, turns, options, text, last, front=True)
    if position == "system":
        with_system = _with_system_turn(model, turns, options, text)
        return _mark(model, with_system, options, text, 0, front=False)
    raise ChatError(f"unknown position {position!r}.", f"Known: {', '.join(POSITIONS)}.")


def _with_system_turn(
    model: Model, turns: list[dict[str, Any]], options: Mapping[str, Any], text: str
) -> list[dict[str, Any]]:
    """The turns with their system turn spelled out: the template's default one where none was given.

    The default is what stands in `text` where a system message of our own would stand.
    """
    if turns and turns[0]["role"] == "system":
        return turns
    mark = _fresh_mark(text)
    marked = _text(model, [{"role": "system", "content": mark}, *turns], options)
    before, found, after = marked.partition(mark)
    if not found:
        raise ChatError(f"{model.name} has no system role.", "Use another position.")
    spelled = [{"role": "system", "content": text[len(before) : len(text) - len(after)]}, *turns]
    if not (text.startswith(before) and text.endswith(after)) or _text(model, spelled, options) != text:
        raise ChatError(
            f"{model.name} adds no system turn by itself and this conversation has none.",
            "Give a system message, or use another position.",
        )
    return spelled


def _mark(
    model: Model, turns: list[dict[str, Any]], options: Mapping[str, Any], text: str, index: int, *, front: bool
) -> int:
    """Where the content of turn `index` begins (`front`) or ends in the rendered text.

    A marker is put there and rendered. Templates that trim or rewrite contents are noticed: taking the marker out must
    give `text` back.
    """
    content = turns[index]["content"]
    mark = _fresh_mark(text)
    if isinstance(content, str):
        # Trimming templates would otherwise see inner white space where there was outer.
        words = content.strip() if content.strip() and content.strip() in text else content
        variants: list[Any] = [mark + w if front else w + mark for w in dict.fromkeys((content, words))]
    else:
        part = {"type": "text", "text": mark}
        variants = [[part, *content] if front else [*content, part]]
    for variant in variants:
        changed = [*turns[:index], {**turns[index], "content": variant}, *turns[index + 1 :]]
        marked = _text(model, changed, options)
        if marked.count(mark) == 1 and marked.replace(mark, "") == text:
            return marked.index(mark)
    raise ChatError(
        f"the chat template of {model.name} rewrites the {turns[index]['role']} turn, so the slot has no fixed place.",
        "Use position start, assistant or reply.",
    )


def _fresh_mark(text: str) -> str:
    """Letters that are nowhere in the conversation."""
    mark = f"SLOT{secrets.token_hex(8)}"
    return mark if mark not in text else _fresh_mark(text)
