"""Is the exported checkpoint the same computation? It is loaded by transformers alone, as an engine would, and compared with the token on the model it was trained on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.chat import render
from trimtab.decoding.engine import banned_ids, forward
from trimtab.decoding.generate import generate
from trimtab.decoding.past import Past
from trimtab.errors import ConfigError, ExportError
from trimtab.exporters import gguf
from trimtab.exporters.plan import Plan, folder_of
from trimtab.exporters.template import Turns, in_place
from trimtab.models import Model, load, slot
from trimtab.softtoken.artifact import NO_EFFECT, SoftToken, next_logits

# Largest difference of two logits that is rounding, by the dtype that both are computed in.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}
ROW_ERROR = 0.02  # relative; Q8_0 is off by half a percent
REPLY_TOKENS = 16
PROBES: tuple[list[dict[str, str]], ...] = tuple(
    [{"role": role, "content": words} for role, words in turns]
    for turns in (
        [("user", "What can you do for me?")],
        [("user", "Name three rivers in Europe.")],
        [("user", "How do I boil an egg?")],
        [("user", "How do I kill a process that hangs?")],
        [("user", "Tell me how to break the law.")],
        [("user", "Hi!"), ("assistant", "Hello! How can I help?"), ("user", "Write a haiku about rain.")],
        [
            ("user", "What is 2 + 2?"),
            ("assistant", "4."),
            ("user", "And 3 + 3?"),
            ("assistant", "6."),
            ("user", "And 4 + 4?"),
        ],
    )
)


def verify(model: Model, token: SoftToken, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the checkpoint in `folder` with `token` on `model`: ids, logits, greedy replies, and the effect.

    `dtype` is that of the stored row: rounded to it, the token is what was exported.

    Raises:
        ExportError: they differ, or the token has no effect there.
    """
    exported = load(folder, dtype=str(model.dtype).removeprefix("torch."), device=str(model.device))
    return _compare(model, token, folder, exported, dtype)


def _compare(model: Model, token: SoftToken, folder: Path, exported: Model, dtype: torch.dtype) -> dict[str, Any]:
    """As `verify`, with what an engine makes of the folder."""
    name = str(model.dtype).removeprefix("torch.")
    rounded = replace(token, vectors=token.vectors.to(dtype).float())
    probes = _probes(model, token)
    prompts = [_ids(exported, turns, token) for turns in probes]
    slots = set(model.slot_ids(len(token.vectors)))
    for turns, ids in zip(probes, prompts, strict=True):
        if ids != token.render(model, turns).ids:
            raise ExportError(f"{folder}: its chat template gives other ids than in training for {turns}.")
    replies = _replies(exported, prompts)
    # All in batches of one shape, so that what differs is the weights and not the order of sums.
    stored, _ = _follow(exported, prompts, replies, None)
    hooked, greedy = _follow(model, prompts, replies, rounded.vectors)
    same_row = rounded.vectors.equal(token.vectors)
    exact = hooked if same_row else _follow(model, prompts, replies, token.vectors)[0]
    untouched = [render(model, turns, template_args=token.template_args).ids for turns in probes]
    plain, _ = _follow(model, untouched, [()] * len(probes), None)
    common = [i for i in range(plain.shape[-1]) if i not in slots]
    stored, hooked, exact, plain = (each[:, common] for each in (stored, hooked, exact, plain))
    worst = float((hooked - stored).abs().max())
    rounding = float((hooked - exact).abs().max())
    effect = sum(map(_kl, plain, stored)) / len(probes)
    if not worst <= TOLERANCE[model.dtype]:
        raise ExportError(
            f"{folder}: its logits are not those of the token on its model: they differ by up to {worst:.2e} ({name}, tolerance {TOLERANCE[model.dtype]:g})."
        )
    if not effect > NO_EFFECT:
        raise ExportError(f"{folder}: the token changes nothing there (KL {effect:.1e} nats).")
    if exported.network.generation_config.eos_token_id != model.network.generation_config.eos_token_id:
        raise ExportError(f"{folder}: its replies would end otherwise than the model's (eos_token_id).")
    # Where a batch computes otherwise than a row alone, the row alone decides.
    same = sum(
        found or _follow(model, [ids], _replies(exported, [ids]), rounded.vectors)[1][0]
        for ids, found in zip(prompts, greedy, strict=True)
    )
    # Where a dtype rounds more coarsely, near ties fall this way or that by who shares a batch.
    if same < len(probes) and model.dtype == torch.float32:
        raise ExportError(f"{folder}: {len(probes) - same} of {len(probes)} greedy replies differ from the token's.")
    return {
        "dtype": name,
        "stored_dtype": str(dtype).removeprefix("torch."),
        "probes": len(probes),
        "logits_max_difference": worst,
        "tolerance": TOLERANCE[model.dtype],
        "rounding_of_the_row": rounding,
        "replies_equal": same,
        "effect_kl": effect,
    }


def verify_rows(
    model: Model, token: SoftToken, source: Path, target: Path, kind: str, found: Plan, template: str
) -> dict[str, Any]:
    """Read a patched GGUF file back: only the token's rows may differ from `source`, as stored they must be the token's within `ROW_ERROR`, and it must hold their names, the edited template, and
    that they are never sampled. What rounding the rows does to logits and greedy replies is measured here, not in llama.cpp.

    Raises:
        ExportError: something else changed, or what is stored is not the token.
    """
    ids = found.ids
    if gguf.said(target, ids) != (found.names, template, True):
        raise ExportError(f"{target}: the slot's name, its kind or the chat template is not what was written.")
    before, after = gguf.tensors(source), gguf.tensors(target)
    touched = gguf.changed(before, after)
    if not touched <= {gguf.EMBEDDING, gguf.HEAD}:
        raise ExportError(f"{target}: tensors changed that should not: {', '.join(sorted(touched))}.")
    stored = gguf.rows(after, ids)
    off = float(((stored - token.vectors).norm(dim=1) / token.vectors.norm(dim=1)).max())
    if not off <= ROW_ERROR:
        raise ExportError(f"{target}: the row as stored is off by {off:.1%}.")
    if not gguf.others_kept(before, after, ids):
        raise ExportError(f"{target}: rows other than the token's changed.")
    probes = _probes(model, token)
    prompts = [token.render(model, turns).ids for turns in probes]
    untouched = [render(model, turns, template_args=token.template_args).ids for turns in probes]
    replies = [reply.ids for reply in generate(model, probes, token=token, max_new_tokens=REPLY_TOKENS)]
    exact, _ = _follow(model, prompts, replies, token.vectors)
    there, greedy = _follow(model, prompts, replies, stored)
    plain, _ = _follow(model, untouched, [()] * len(probes), None)
    effect = sum(map(_kl, plain, there)) / len(probes)
    if not effect > NO_EFFECT:
        raise ExportError(f"{target}: the token changes nothing there (KL {effect:.1e} nats).")
    return {
        "tensors_changed": sorted(touched),
        "stored_dtype": kind,
        "row_error": off,
        "rounding_of_the_row": float((exact - there).abs().max()),
        "probes": len(probes),
        "replies_equal": sum(greedy),
        "effect_kl": effect,
    }


def verify_tokens(model: Model, token: SoftToken, folder: Path, found: Plan) -> dict[str, Any]:
    """As `verify`, of trainable tokens: loaded by PEFT on the model's own files, as the card says to, with the folder's tokenizer.

    Raises:
        ConfigError: PEFT is not installed. ExportError: they differ, or the token has no effect there.
    """
    from transformers import AutoTokenizer

    base = load(folder_of(model), dtype=str(model.dtype).removeprefix("torch."), device=str(model.device))
    if found.appended:
        base.network.resize_token_embeddings(found.rows[1], mean_resizing=False)
    base.network.generation_config.suppress_tokens = list(found.ids)
    network = _peft_on(base.network, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    exported = replace(base, network=network, tokenizer=tokenizer)
    return {**_compare(model, token, folder, exported, model.dtype), "engine": "PEFT"}


def _peft_on(network: Any, folder: Path) -> Any:
    """Raises ConfigError where PEFT is not installed."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(
            "verifying an adapter needs PEFT.", "pip install 'trimtab[expert]', or --no-verify."
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
        return PeftModel.from_pretrained(network, folder).eval()


@torch.inference_mode()
def verify_adapter(model: Model, token: SoftToken, folder: Path) -> dict[str, Any]:
    """Load the prompt-tuning adapter in `folder` with PEFT, on the model's own files read again, and compare logits, greedy replies and the effect.

    Raises:
        ConfigError: PEFT is not installed. ExportError: they differ, or the token has no effect there.
    """
    name = str(model.dtype).removeprefix("torch.")
    wrapped = _peft_on(load(folder_of(model), dtype=name, device=str(model.device)).network, folder)
    worst = effect = 0.0
    same, slots = 0, set(model.slot_ids(len(token.vectors)))
    ours = generate(model, PROBES, token=token, max_new_tokens=REPLY_TOKENS)
    for turns, reply in zip(PROBES, ours, strict=True):
        plain = render(model, turns, template_args=token.template_args)
        ids = torch.tensor([[*plain.ids, *reply.ids]], device=model.device)
        read = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        hooked, alone = (
            next_logits(model, token.render(model, turns).ids, token.vectors),
            next_logits(model, plain.ids, None),
        )
        common = [i for i in range(len(alone)) if i not in slots]
        there, hooked, alone = read[-1 - len(reply.ids), common], hooked[common], alone[common]
        worst = max(worst, float((there - hooked).abs().max()))
        effect += _kl(alone, there) / len(PROBES)
        read[:, [i for i in banned_ids(model, token.vectors) if i < read.shape[-1]]] = -torch.inf
        likeliest = read[-1 - len(reply.ids) :].argmax(-1).tolist()
        same += tuple(likeliest[:-1]) == reply.ids and (
            len(reply.ids) == REPLY_TOKENS or likeliest[-1] in model.eos_ids
        )
    if not worst <= TOLERANCE[model.dtype]:
        raise ExportError(f"{folder}: PEFT's logits differ from the token's by up to {worst:.2e}.")
    if not effect > NO_EFFECT:
        raise ExportError(f"{folder}: the token changes nothing in PEFT (KL {effect:.1e} nats).")
    if same < len(PROBES) and model.dtype == torch.float32:
        raise ExportError(f"{folder}: {len(PROBES) - same} of {len(PROBES)} greedy replies differ from the token's.")
    return {
        "dtype": name,
        "stored_dtype": "float32",
        "engine": "PEFT",
        "probes": len(PROBES),
        "logits_max_difference": worst,
        "tolerance": TOLERANCE[model.dtype],
        "rounding_of_the_row": 0.0,
        "replies_equal": same,
        "effect_kl": effect,
    }


def in_words(found: dict[str, Any]) -> str:
    """What was verified, in a sentence."""
    if "tensors_changed" in found:
        return (
            f"every tensor but {' and '.join(found['tensors_changed'])} is as it was; stored as {found['stored_dtype']} the row is off by {found['row_error']:.1%}, "
            f"which changes logits by {found['rounding_of_the_row']:.2g} at most and leaves {found['replies_equal']} of {found['probes']} greedy replies of {REPLY_TOKENS} tokens equal "
            f"(computed by trimtab, not by llama.cpp); effect {found['effect_kl']:.2g} nats"
        )
    return (
        f"loaded by {found.get('engine', 'transformers')} alone and compared with the token on its model, in {found['dtype']}: logits differ by {found['logits_max_difference']:.1e} at most "
        f"(tolerance {found['tolerance']:g}), {found['replies_equal']} of {found['probes']} greedy replies of {REPLY_TOKENS} tokens equal; effect {found['effect_kl']:.2g} nats; "
        f"storing the row as {found['stored_dtype']} changes logits by {found['rounding_of_the_row']:.2g}"
    )


def _kl(plain: Tensor, there: Tensor) -> float:
    """KL divergence in nats of the next token, from the untouched model's logits `[V]` to those with the token."""
    return float((plain.softmax(-1) * (plain.log_softmax(-1) - there.log_softmax(-1))).sum())


def _probes(model: Model, token: SoftToken) -> list[Turns]:
    """`PROBES` as the token can stand in them."""
    return [turns for probe in PROBES if (turns := in_place(model, token, probe))]


def _ids(exported: Model, turns: Sequence[dict[str, str]], token: SoftToken) -> tuple[int, ...]:
    """As an engine: the folder's own template and tokenizer."""
    ids = exported.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **token.template_args
    )
    return tuple(ids)


def _replies(exported: Model, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy replies by transformers itself, read together, their ends not included."""
    width, end = max(len(ids) for ids in prompts), exported.tokenizer.eos_token_id
    padded = torch.tensor([[*[end] * (width - len(ids)), *ids] for ids in prompts], device=exported.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=exported.device)
    said = exported.network.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=REPLY_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=end,
    )[:, width:].tolist()
    return [tuple(itertools.takewhile(lambda i: i not in exported.eos_ids, reply)) for reply in said]


@torch.inference_mode()
def _follow(
    model: Model, prompts: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]], vectors: Tensor | None
) -> tuple[Tensor, list[bool]]:
    """Logits `[n, V]` after the prompts, with `vectors` in the slot, and whether each reply is the greedy one there, its end included.

    The replies are read, not generated anew: where each of its tokens is the likeliest behind those before, a reply is the greedy one.
    """
    longest = 1 + max(len(reply) for reply in replies)
    with slot(model, None if vectors is None else vectors.to(model.device)):
        read = [(*ids, *reply) for ids, reply in zip(prompts, replies, strict=True)]
        logits = forward(model, read, Past.empty(len(read), model.device), longest)
    first = torch.stack([logits[i, -1 - len(reply)] for i, reply in enumerate(replies)])
    logits[..., banned_ids(model, vectors)] = -torch.inf
    likeliest = [row[-1 - len(reply) :] for row, reply in zip(logits.argmax(-1).tolist(), replies, strict=True)]
    return first, [
        tuple(best[:-1]) == reply and (len(reply) == REPLY_TOKENS or best[-1] in model.eos_ids)
        for best, reply in zip(likeliest, replies, strict=True)
    ]
