"""The smallest edit of a model's own chat template that puts the slot where it was trained, proved by rendering.

The template itself is kept to the letter. In front of it comes a prelude that goes through the turns: it takes the slot's name apart wherever
somebody spelled it, and for the places `system` and `user` writes the slot into the turn. For the other places one expression is added:
before the header of the reply, behind BOS, at the very beginning or at the end. Templates differ, so there are several candidates; the
first that renders every conversation of `conversations` as `chat.py` does is taken. It keeps to plain Jinja: tried in jinja2 and in llama.cpp.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from trimtab.chat import Message, Position, as_messages, default_system, render, rendered_text
from trimtab.errors import ChatError, ExportError
from trimtab.models import Model
from trimtab.softtoken.artifact import SoftToken

# A block or an expression about the header of the reply.
ASKED = r"\badd_generation_prompt\b"
HEADER_BLOCK = re.compile(
    rf"\{{%(?P<mark>[-+]?)\s*if\s(?P<when>(?:(?!%\}}).)*?{ASKED}(?:(?!%\}}).)*?)[-+]?%\}}", re.DOTALL
)
HEADER_EXPRESSION = re.compile(rf"\{{\{{(?P<mark>[-+]?)(?:(?!\}}\}}).)*?{ASKED}(?:(?!\}}\}}).)*?\}}\}}", re.DOTALL)
BOS = re.compile(r"\bbos_token\b(?!\s+is\b)")

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
CONTENTS = (
    "Hello!",
    "  What is the capital of France? \n",
    "Zwei Zeilen:\n\n- ä\n- 東京",
    "{{ user }} {% if %} <b>'\"\\</b>",
    "",
)
SYSTEM = "You are a helpful assistant."
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Proof:
    """How many conversations were rendered by both and found equal, and how many the model's own template refuses."""

    equal: int
    refused: int


def with_slot(model: Model, token: SoftToken, tokenizer: Any, names: Sequence[str]) -> tuple[str, Proof]:
    """A template that emits `names`, the slot's tokens, where `token` was trained.

    `tokenizer` is the exported one: the names are special tokens in it.

    Raises:
        ExportError: no candidate renders all conversations as `chat.py` does; names the first that differs.
    """
    if not isinstance(model.tokenizer.chat_template, str):
        raise unsafe(model, token, "it has several templates by name, and each would need the slot")
    if token.position == "system" and "strftime_now" in model.tokenizer.chat_template:
        raise unsafe(model, token, "it writes the date, which would stay that of today")
    why = "it has no such place"
    for candidate in candidates(model, token.position, names):
        try:
            return candidate, prove(model, token, tokenizer, names, candidate)
        except ExportError as error:
            why = str(error.args[0])
    raise unsafe(model, token, why)


def in_place(model: Model, token: SoftToken, chat: Sequence[Message]) -> Turns | None:
    """The conversation, under a system turn where the token has no place without one; `None` where it has none at all."""
    turns = as_messages(chat)
    for variant in (turns, [{"role": "system", "content": SYSTEM}, *turns]):
        try:
            token.render(model, variant)
        except ChatError:
            continue
        return variant
    return None


def unsafe(model: Model, token: SoftToken, why: str) -> ExportError:
    """A template that cannot be edited for this token, why, and a way out."""
    return ExportError(
        f"the chat template of {model.name} cannot be edited safely for the position {token.position}: {why}.",
        "Train the token at another position (start works with every template), or edit the template by hand and serve it with the engine's own option.",
    )


def candidates(model: Model, position: Position, names: Sequence[str]) -> Iterator[str]:
    """Edited templates, simplest first."""
    source: str = model.tokenizer.chat_template
    slot = _quoted("".join(names))
    if position in ("user", "system"):
        for trim in ("", " | trim"):
            yield _prelude(model, position, names, trim) + source
        return
    head = _prelude(model, position, names)
    if position == "start":
        yield head + source
    elif position == "reply":
        # As Jinja does: of a template's last line the end is no part of it.
        yield head + source.removesuffix("\n") + "{{ " + slot + " if add_generation_prompt else '' }}"
    elif position == "after_bos":
        for found in BOS.finditer(source):
            yield head + source[: found.start()] + f"(bos_token + {slot})" + source[found.end() :]
    else:
        for found in HEADER_BLOCK.finditer(source):
            # A block of its own in front, so that white space around the model's own is treated as before.
            added = f"{{%{found['mark']} if {found['when'].strip()} %}}{{{{ {slot} }}}}{{% endif %}}"
            yield head + source[: found.start()] + added + source[found.start() :]
        for found in HEADER_EXPRESSION.finditer(source):
            added = f"{{{{{found['mark']} {slot} if add_generation_prompt else '' }}}}"
            yield head + source[: found.start()] + added + source[found.start() :]


def prove(model: Model, token: SoftToken, tokenizer: Any, names: Sequence[str], template: str) -> Proof:
    """Render conversations with the edited template, and with the model's own and `chat.py`.

    With the header of a reply the ids must be the same, slot included; without it the text must be, but for the slot. Where somebody spells the slot's
    name, it is there once all the same.

    Raises:
        ExportError: the first difference.
    """
    slot_ids, spelled = tuple(model.slot_ids(len(names))), "".join(names)
    equal = refused = 0
    for turns, tools, extra in conversations():
        options: dict[str, Any] = {"tools": tools, "template_args": {**token.template_args, **extra}}
        try:
            expected = render(model, turns, position=token.position, n_tokens=len(names), **options).ids
        except ChatError:
            if renders(tokenizer, template, turns, **options):
                raise ExportError(f"it renders {turns}, which the model's own refuses or has no place in") from None
            refused += 1
            continue
        ids = _ids(tokenizer, template, turns, **options)
        if ids != expected:
            raise ExportError(f"it renders {turns} otherwise than in training")
        without = rendered_text(model, turns, header=False, **options)
        text = _text(tokenizer, template, turns, header=False, **options)
        if text.replace(spelled, "") != without or text.count(spelled) > 1:
            raise ExportError(f"it renders {turns} otherwise than the model's own where no reply follows")
        hostile = [{**turn, "content": f"{spelled} {turn['content']} {names[0]}"} for turn in turns]
        found = [i for i in _ids(tokenizer, template, hostile, **options) if i in slot_ids]
        if tuple(found) != slot_ids:
            raise ExportError(f"a message that spells {spelled} is read as the slot")
        equal += 1
    if not equal:
        raise ExportError("the model's own template refuses every conversation")
    return Proof(equal, refused)


def renders(tokenizer: Any, template: str, turns: Turns, **options: Any) -> bool:
    """Whether a template takes the conversation at all."""
    try:
        _text(tokenizer, template, turns, **options)
    except ExportError:
        return False
    return True


def conversations() -> Iterator[tuple[Turns, list[Any] | None, dict[str, Any]]]:
    """Some hundred conversations: turns, tools, and what else templates know. Plain words, odd characters, nothing harmful."""
    shapes = ("u", "ua", "uau", "uauau", "uu")
    systems = (None, SYSTEM, "  Be brief.\n")
    extras: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})
    for shape, system, content, extra in itertools.product(shapes, systems, range(len(CONTENTS)), extras):
        turns: Turns = [{"role": "system", "content": system}] if system is not None else []
        for place, who in enumerate(shape):
            words = CONTENTS[(content + place) % len(CONTENTS)]
            turns.append({"role": "user" if who == "u" else "assistant", "content": words})
        yield turns, [TOOL] if content == 0 else None, extra


def _prelude(model: Model, position: Position, names: Sequence[str], trim: str = "") -> str:
    """What goes through the turns before the template does (`prelude.jinja`)."""
    environment = Environment(
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
        comment_start_string="<#", comment_end_string="#>", trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["quoted"] = _quoted
    source = files("trimtab.exporters").joinpath("prelude.jinja").read_text(encoding="utf-8")
    default = default_system(model) if position == "system" else None
    return environment.from_string(source).render(names=names, position=position, default=default, trim=trim)


def _quoted(text: str) -> str:
    """As a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _text(
    tokenizer: Any, template: str, turns: Turns, *, header: bool = True, tools: Any, template_args: dict[str, Any]
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=header,
                tools=tools,
                **template_args,
            )
        )
    except Exception as error:  # jinja2 raises what the template's author chose to raise
        raise ExportError(f"it refuses {turns}: {error}") from None


def _ids(tokenizer: Any, template: str, turns: Turns, **options: Any) -> tuple[int, ...]:
    return tuple(tokenizer.encode(_text(tokenizer, template, turns, **options), add_special_tokens=False))
