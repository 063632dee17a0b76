"""Templates as families write them: white space controls, tools, thinking, contents in parts. The slot goes where it was trained, or the edit is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jinja2 import Environment, nodes
from tokenizers import AddedToken

from conftest import CHATML, build, vectors_for
from trimtab.chat import Position, render
from trimtab.errors import ExportError
from trimtab.exporters.template import with_slot
from trimtab.models import Model
from trimtab.softtoken.artifact import SoftToken

NAMES = ["<|trimtab_0|>"]
# Spread over lines, with controls on both sides, a date, tools in the first user turn, and contents trimmed.
LINES = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\nToday: " + date_string + "\\n" }}
{{- system_message }}
{{- "<|im_end|>" }}
{%- if tools is not none and messages %}
    {{- "<|im_start|>user\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- messages[0]['content'] | trim + "<|im_end|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Thinking switched by the caller, and taken out of earlier turns; the header is written by a condition of its own.
THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# The header as an expression, and contents that may be parts.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<s>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
FAMILY = {
    "lines": LINES,
    "thinking": THINKING,
    "parts": PARTS,
    "blank first": "\n\n  " + CHATML,
    "ends in a line": CHATML + "\n\n",
}


def spoken(template: str) -> tuple[Model, Any]:
    """A model with this template, and its tokenizer with the slot's name in it."""
    model = build("llama", "chatml")
    model.tokenizer.chat_template = template
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES], special_tokens=True)
    return model, tokenizer


@pytest.mark.parametrize("position", ["start", "user", "assistant", "reply"])
@pytest.mark.parametrize("family", FAMILY)
def test_a_slot_finds_its_place(family: str, position: Position) -> None:
    model, tokenizer = spoken(FAMILY[family])
    token = SoftToken.of(model, vectors_for(model), position)
    template, proof = with_slot(model, token, tokenizer, NAMES)
    assert proof.equal == 225
    assert template.endswith(FAMILY[family]) or position in ("assistant", "reply")


def test_contents_in_parts_get_the_slot_too_and_are_taken_apart() -> None:
    model, tokenizer = spoken(PARTS)
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": parts},
    ]
    for position in ("user", "assistant"):
        token = SoftToken.of(model, vectors_for(model), position)
        template, _ = with_slot(model, token, tokenizer, NAMES)
        options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        text = tokenizer.apply_chat_template(turns, **options)
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) == render(model, turns, position=position).ids
        hostile = [{"role": "user", "content": [{"type": "text", "text": NAMES[0]}, parts[0]]}]
        assert tokenizer.apply_chat_template(hostile, **options).count(NAMES[0]) == 1


@pytest.mark.parametrize("position", ["start", "system", "user", "assistant", "reply"])
@pytest.mark.parametrize(("source", "takes_parts"), [(CHATML, False), (PARTS, True)])
def test_only_a_model_that_takes_parts_seems_to(position: Position, source: str, takes_parts: bool) -> None:
    """vLLM gives all text as parts to a template that loops over a turn's content: the slot's must do so no more than the model's own."""
    model, tokenizer = spoken(source)
    token = SoftToken.of(model, vectors_for(model), position)
    template, _ = with_slot(model, token, tokenizer, NAMES)
    loops = list(Environment().parse(template).find_all(nodes.For))
    turns = {loop.target.name for loop in loops if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"}
    over = [loop.iter for loop in loops if isinstance(loop.iter, nodes.Getattr | nodes.Getitem)]
    contents = [each for each in over if isinstance(each.node, nodes.Name) and each.node.name in turns]
    assert bool(contents) == takes_parts


def test_a_name_in_pieces_is_refused_where_pieces_are_joined() -> None:
    model, tokenizer = spoken(PARTS)
    for position in ("start", "user", "assistant"):
        template, _ = with_slot(model, SoftToken.of(model, vectors_for(model), position), tokenizer, NAMES)
        for cut in range(1, len(NAMES[0])):
            pieces = [{"type": "text", "text": NAMES[0][:cut]}, {"type": "text", "text": NAMES[0][cut:]}]
            with pytest.raises(Exception, match="together spell the name"):
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": pieces}], chat_template=template, tokenize=False
                )


def test_a_turn_that_is_rewritten_keeps_what_else_it_holds() -> None:
    called = "{% for m in messages %}{{ m.role + ': ' + m.content + (m.tool_calls | string if m.tool_calls else '') + (m.tool_call_id or '') }}{% endfor %}{{ 'assistant' if add_generation_prompt else '' }}"
    model, tokenizer = spoken(called)
    template, _ = with_slot(model, SoftToken.of(model, vectors_for(model), "user"), tokenizer, NAMES)
    turns = [
        {"role": "user", "content": "Look it up.", "tool_call_id": "mine"},
        {"role": "assistant", "content": f"calling for {NAMES[0]}", "tool_calls": ["look"]},
        {"role": "tool", "content": f"{NAMES[0]} is a name.", "tool_call_id": "7"},
    ]
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    assert (
        text
        == f"user: {NAMES[0]}Look it up.mineassistant: calling for <| trimtab_0|>['look']tool: <| trimtab_0|> is a name.7"
    )
    with pytest.raises(Exception, match="this conversation has none"):
        tokenizer.apply_chat_template(turns[1:], chat_template=template, tokenize=False)
    for other in ({"content": NAMES[0]}, {"content": "Hi"}, {"content": None}):
        both = [turns[0], {"role": "assistant", "tool_calls": [NAMES[0]], **other}]
        with pytest.raises(Exception, match="other than its text"):
            tokenizer.apply_chat_template(both, chat_template=template, tokenize=False)


@pytest.mark.parametrize(
    ("template", "position", "why"),
    [
        ({"default": CHATML, "tool_use": CHATML}, "assistant", "several templates by name"),
        ("{{ strftime_now('%Y') }}" + CHATML, "system", "it writes the date"),
    ],
)
def test_templates_that_an_edit_would_not_reach_are_refused(template: Any, position: Position, why: str) -> None:
    model, tokenizer = spoken(template)
    with pytest.raises(ExportError, match=why):
        with_slot(model, SoftToken.of(model, vectors_for(model), position), tokenizer, NAMES)


def test_a_name_elsewhere_in_a_message_or_a_tool_is_refused() -> None:
    model, tokenizer = spoken(THINKING)
    template, _ = with_slot(model, SoftToken.of(model, vectors_for(model), "assistant"), tokenizer, NAMES)
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    with pytest.raises(Exception, match="other than its text spells the name"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi", "name": NAMES[0]}], **options)
    tool = {"type": "function", "function": {"name": NAMES[0], "description": "", "parameters": {}}}
    with pytest.raises(Exception, match="a tool spells the name"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=[tool], **options)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m.content", "(m.content | upper)"),
        CHATML.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt or true %}"),
    ],
    ids=["shouts", "always asks"],
)
def test_a_template_without_a_safe_place_is_refused_with_a_way_out(template: str) -> None:
    model, tokenizer = spoken(template)
    token = SoftToken.of(model, vectors_for(model), "user" if "upper" in template else "assistant")
    with pytest.raises(
        ExportError, match=r"cannot be edited safely for the position \w+: .*\n  Train the token at another position"
    ):
        with_slot(model, token, tokenizer, NAMES)
