"""What an endpoint that serves a token has to tell: the ids of some prompts, and how its replies begin with the token and without it.

Known from a run and the model it names, or from an exported folder alone: that renders and computes by itself, and without its slot it is the untouched model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.chat import render
from trimtab.decoding.engine import generate_ids
from trimtab.errors import ChatError, ConfigError, ExportError, ModelError, PathError
from trimtab.exporters.plan import RECORD, slot_names
from trimtab.exporters.template import SYSTEM, Turns
from trimtab.exporters.verify import PROBES
from trimtab.guidance import load_tuned
from trimtab.models import Model, load
from trimtab.run import existing, read_json
from trimtab.softtoken.artifact import next_logits

Ids = tuple[int, ...]
# The ids of a conversation with the slot, and without it; raises ChatError where there is no place for it.
Speak = Callable[[Turns], tuple[Ids, Ids]]


@dataclass(frozen=True)
class Probe:
    """A conversation and its ids, with the slot and without."""

    turns: Turns
    ids: Ids
    plain: Ids


@dataclass(frozen=True)
class Expected:
    """What should be served.

    Attributes:
        names, slot_ids: the slot's tokens. tokenizer: the model's. template_args: template variables of training.
        probes: plain conversations. spelled: one whose words spell the slot's names, as it has to be read.
        model, vectors: what computes here; without `vectors`, the slot is a row of the model's own. No model where `missing` says why.
    """

    names: tuple[str, ...]
    slot_ids: Ids
    tokenizer: Any
    template_args: dict[str, Any]
    probes: tuple[Probe, ...]
    spelled: Probe
    model: Model | None
    vectors: Tensor | None = None
    missing: str = ""


def from_run(run: Path, name: str | None = None) -> Expected:
    """From the token of an align run; `name` is its model, where that has moved since."""
    model, token = load_tuned(run, name)
    slot_ids = tuple(model.slot_ids(len(token.vectors)))

    def speak(turns: Turns) -> tuple[Ids, Ids]:
        return token.render(model, turns).ids, render(model, turns, template_args=token.template_args).ids

    names = slot_names(model, slot_ids)
    vectors = token.vectors.to(model.device)
    return Expected(names, slot_ids, model.tokenizer, token.template_args, *_probes(speak, names), model, vectors)


def from_export(folder: Path) -> Expected:
    """From an exported folder. Where its weights are not here or do not fit, the tokenizer still knows the prompts.

    Raises:
        PathError: no such folder, or no export in it. ConfigError: an adapter, which puts nothing into a prompt. ExportError, ModelError: it is damaged.
    """
    if not (existing(folder) / RECORD).is_file():
        raise PathError(f"{folder} holds no export: {RECORD} is missing.", "Give a folder that trimtab export wrote.")
    record = read_json(folder / RECORD)
    if record.get("plan") is None:
        raise ConfigError(
            f"{folder} is a prompt-tuning adapter, which puts nothing into prompts.", "Give another export."
        )
    names, slot_ids = tuple(record["plan"]["names"]), tuple(record["plan"]["ids"])
    options = record["template"].get("template_args", {})
    model, tokenizer, missing = _loaded(folder, record)
    if any(tokenizer.encode(name, add_special_tokens=False) != [i] for name, i in zip(names, slot_ids, strict=True)):
        raise ExportError(f"{folder}: its tokenizer does not know the slot.", "It was edited: export again.")

    def speak(turns: Turns) -> tuple[Ids, Ids]:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # jinja2 raises what the template's author chose to raise
            raise ChatError(f"the chat template of {folder} refuses these turns: {error}") from None
        with_slot, without = (
            tuple(tokenizer.encode(words, add_special_tokens=False))
            for words in (text, text.replace("".join(names), ""))
        )
        return with_slot, without

    return Expected(names, slot_ids, tokenizer, options, *_probes(speak, names), model, missing=missing)


def apart(name: str) -> str:
    """A slot's name as an exported template writes it where a message spells it."""
    return f"{name[:2]} {name[2:]}"


@torch.inference_mode()
def beginnings(expected: Expected, probe: Probe) -> tuple[Tensor, Tensor]:
    """Probabilities `[V]` of a reply's first token, with the token and without; of the slot itself 0, as it is never said."""
    assert expected.model is not None
    found = []
    for ids, vectors in ((probe.ids, expected.vectors), (probe.plain, None)):
        logits = next_logits(expected.model, ids, vectors)
        logits[[i for i in expected.slot_ids if i < len(logits)]] = -torch.inf
        found.append(logits.softmax(-1).cpu())
    return found[0], found[1]


def replies(expected: Expected, length: int) -> list[tuple[str, str]]:
    """Greedy replies to every probe, with the token and without."""
    assert expected.model is not None
    said = []
    for prompts, vectors in (
        ([probe.ids for probe in expected.probes], expected.vectors),
        ([probe.plain for probe in expected.probes], None),
    ):
        rows = generate_ids(expected.model, prompts, vectors=vectors, max_new_tokens=length)
        by_place = {row.index: expected.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows}
        said.append([by_place[place] for place in range(len(prompts))])
    return list(zip(*said, strict=True))


def _loaded(folder: Path, record: dict[str, Any]) -> tuple[Model | None, Any, str]:
    """The exported model and its tokenizer; or the tokenizer alone, and why."""
    if record["format"] == "gguf":
        model = load(folder / record["plan"]["files"][0]["file"])
        return model, model.tokenizer, ""
    try:
        model = load(folder)
    except ModelError as error:
        from transformers import AutoTokenizer

        try:
            return None, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False), str(error.args[0])
        except Exception:  # nothing of a model is here
            raise error from None
    return model, model.tokenizer, ""


def _probes(speak: Speak, names: tuple[str, ...]) -> tuple[tuple[Probe, ...], Probe]:
    """`PROBES` as the token can stand in them, and one that spells its names: what is expected there is that the names are taken apart."""
    probes = [found for turns in PROBES if (found := _probe(speak, turns))]
    words = "What does {} mean?"
    spelled, as_read = (
        [{"role": "user", "content": words.format("".join(each))}] for each in (names, map(apart, names))
    )
    read = _probe(speak, as_read)
    if not probes or read is None:
        raise ChatError("no plain conversation has a place for this token.", "Nothing can be checked.")
    turns = [*read.turns[:-1], *spelled]
    return tuple(probes), Probe(turns, read.ids, read.plain)


def _probe(speak: Speak, turns: Turns) -> Probe | None:
    """A conversation as it can be spoken, under a system turn if it must; `None` where the slot has no place at all."""
    for variant in (turns, [{"role": "system", "content": SYSTEM}, *turns]):
        try:
            return Probe(variant, *speak(variant))
        except ChatError:
            continue
    return None
