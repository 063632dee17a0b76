"""Is the token in effect at a running endpoint? A silently ignored token is this field's commonest fault, so nothing is taken for granted.

Prompts are counted against those of training, ids looked at where the engine gives them, and the first words of replies compared with the token's own and the
untouched model's, computed here. Every check says ok, failed or unknown, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from trimtab.decoding.engine import common_length
from trimtab.errors import ConfigError
from trimtab.exporters.verify import REPLY_TOKENS
from trimtab.run import progress, tell
from trimtab.serving.expected import Expected, Probe, apart, beginnings, from_export, from_run, replies
from trimtab.serving.told import TIMEOUT, Told, ask, connect

Verdict = Literal["ok", "failed", "unknown"]
COLOURS: dict[Verdict, str] = {"ok": "green", "failed": "red", "unknown": "yellow"}
# In shares of probability moved from one first token to another, 0 to 1, as a mean over the probes.
AUDIBLE = 0.02  # a token that moves less than this cannot be told from rounding
ROUNDING = 0.06  # what quantised weights may be off by
FOREIGN = 0.3  # farther off than this from both, it is something else
SEEN = 0.7  # share of the token's effect that shows it at work; the rest shows the untouched model


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, the verdict, and why."""

    what: str
    verdict: Verdict
    why: str


def serve_check(
    address: str,
    *,
    run: Path | None = None,
    export: Path | None = None,
    model: str | None = None,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Probe the endpoint at `address` (URL or URL#MODEL) for the token of a `run` or an `export`.

    Args:
        model: the run's model, where it has moved since. timeout: seconds for one answer.

    Returns:
        url, model, in_effect, and every check as `{what, verdict, why}`. In effect is what was seen to be, and nothing failed.

    Raises:
        ConfigError: the arguments do not name one token and one served model. EndpointError: nothing usable answers at `address`.
    """
    if (run is None) == (export is None):
        raise ConfigError("one token is checked for.", "Give --run RUN or --export DIR.")
    if export and model:
        raise ConfigError("--model is for a run; an export has its model with it.", "Leave it out.")
    service = connect(address, timeout)
    expected = from_run(run, model) if run else from_export(export or Path())
    probes = (*expected.probes, expected.spelled)
    with progress("probes", len(probes)) as advance:
        told = []
        for probe in probes:
            told.append(ask(service, probe.turns, REPLY_TOKENS, expected.template_args))
            advance()
    checks = examine(expected, told)
    return {
        "url": service.url,
        "model": service.model,
        "in_effect": in_effect(checks),
        "checks": [asdict(check) for check in checks],
    }


def examine(expected: Expected, told: Sequence[Told]) -> list[Check]:
    """All checks of what was told about every probe and, last, about the one that spells the slot's names."""
    plain, spelled = told[:-1], told[-1]
    return [
        length(expected, plain),
        slot(expected, plain),
        bos(expected, plain),
        effect(expected, plain),
        named(expected, plain, spelled),
        unsaid(expected, plain),
    ]


def in_effect(checks: Sequence[Check]) -> bool:
    """Nothing failed, and the replies are seen to be the token's."""
    seen = any(check.what == "effect" and check.verdict == "ok" for check in checks)
    return seen and not any(check.verdict == "failed" for check in checks)


def show(found: dict[str, Any], people: Console) -> None:
    """The checks as a table, and what follows from them."""
    table = Table("check", "verdict", "why", title=f"{escape(found['model'])} at {escape(found['url'])}")
    for check in found["checks"]:
        colour = COLOURS[check["verdict"]]
        table.add_row(check["what"], f"[{colour}]{check['verdict']}[/{colour}]", escape(check["why"]))
    people.print(table)
    failed = [check["what"] for check in found["checks"] if check["verdict"] == "failed"]
    if failed:
        tell(people, f"Not as it should be: {', '.join(failed)}. Serve the exported model with its own chat template.")
    elif found["in_effect"]:
        tell(people, "The token is in effect there.")
    else:
        tell(people, "Nothing is wrong, but whether the token is in effect was not seen.")


def length(expected: Expected, told: Sequence[Told]) -> Check:
    """Prompts are as long as in training."""
    what, n = "prompt length", len(expected.slot_ids)
    pairs = [(each.prompt_tokens, probe) for each, probe in zip(told, expected.probes, strict=True)]
    lengths = [(said, probe) for said, probe in pairs if said is not None]
    if len(lengths) < len(pairs):
        return Check(what, "unknown", "it does not tell how long prompts are (usage.prompt_tokens)")
    off = {said - len(probe.ids) for said, probe in lengths}
    over = {said - len(probe.plain) for said, probe in lengths}
    if off == {0}:
        return Check(what, "ok", f"as in training, for all {len(pairs)} prompts")
    if over == {0}:
        return Check(what, "failed", f"the slot is missing: {_tokens(n)} less than in training, as without it")
    if off == {1}:
        return Check(what, "failed", "1 token more than in training: BOS is there twice, most likely")
    if over == {1}:
        return Check(
            what, "failed", "1 token more than without the slot: it is missing and BOS is there twice, most likely"
        )
    words = ", ".join(f"{each:+d}" for each in sorted(off))
    return Check(what, "failed", f"another chat template or tokenizer: {words} tokens against training")


def slot(expected: Expected, told: Sequence[Told]) -> Check:
    """The slot is in each prompt once, where it was trained."""
    pairs = _with_ids(expected, told)
    if not pairs:
        return Check("slot once", "unknown", "it does not tell the ids of a prompt")
    counts = [_slots(ids, expected) for ids, _ in pairs]
    n = len(expected.slot_ids)
    if not any(counts):
        return Check(
            "slot once", "failed", f"it is in none of {len(pairs)} prompts: the engine's chat template does not say it"
        )
    if wrong := [count for count in counts if count != n]:
        return Check(
            "slot once", "failed", f"{wrong[0]} slot tokens instead of {n} in {len(wrong)} of {len(pairs)} prompts"
        )
    moved = sum(_around(ids, expected) != _around(probe.ids, expected) for ids, probe in pairs)
    if moved:
        return Check(
            "slot once", "failed", f"it is there once, but {moved} of {len(pairs)} prompts are not those of training"
        )
    return Check("slot once", "ok", f"where it was trained, in all {len(pairs)} prompts")


def bos(expected: Expected, told: Sequence[Told]) -> Check:
    """BOS is there as often as in training."""
    what, i = "BOS once", expected.tokenizer.bos_token_id
    pairs = _with_ids(expected, told)
    if not pairs:
        return Check(what, "unknown", "it does not tell the ids of a prompt")
    if i is None:
        return Check(what, "ok", "this model has none")
    more = {ids.count(i) - probe.ids.count(i) for ids, probe in pairs}
    if more == {0}:
        return Check(what, "ok", f"as in training, in all {len(pairs)} prompts")
    if min(more) > 0:
        return Check(
            what, "failed", f"{max(more)} more than in training: the template writes it, and the engine once more"
        )
    return Check(what, "failed", "fewer than in training: prompts lack it")


def effect(expected: Expected, told: Sequence[Told]) -> Check:
    """Replies begin as the token's do, and not as the untouched model's."""
    if expected.model is None:
        return Check("effect", "unknown", f"no model to compare with: {expected.missing}")
    first = [_by_id(expected, each) for each in told]
    return _first_words(expected, first) if all(first) else _whole_replies(expected, [each.text for each in told])


def named(expected: Expected, plain: Sequence[Told], told: Told) -> Check:
    """A message that spells the slot's names is plain text: there are no more slots than elsewhere."""
    what, probe = "spelled in a message", expected.spelled
    if told.prompt_ids is not None:
        usual = [_slots(each.prompt_ids, expected) for each in plain if each.prompt_ids is not None]
        if (found := _slots(told.prompt_ids, expected)) > min(usual, default=len(expected.slot_ids)):
            return Check(what, "failed", f"it is read as the slot: {_tokens(found)} of the slot in the prompt")
        if _around(told.prompt_ids, expected) == _around(probe.ids, expected):
            return Check(what, "ok", "it is plain text there")
        return Check(what, "unknown", "it is not read as the slot, but the prompt is not that of training")
    if told.prompt_tokens is None:
        return Check(what, "unknown", "it tells neither ids nor the length of a prompt")
    # Read as the slot, the many tokens of a spelled name are one.
    spoken = sum(len(expected.tokenizer.encode(apart(name), add_special_tokens=False)) for name in expected.names)
    lacking = len(probe.ids) - told.prompt_tokens
    if lacking == 0:
        return Check(what, "ok", "the prompt is as long as with plain text")
    if lacking > spoken // 2:
        return Check(what, "failed", f"it is read as the slot: the prompt is {_tokens(lacking)} too short")
    return Check(what, "unknown", "the prompt has another length than expected, whatever it is read as")


def unsaid(expected: Expected, told: Sequence[Told]) -> Check:
    """No reply contains the slot."""
    loud = sum(
        any(name in each.text for name in expected.names) or not set(expected.slot_ids).isdisjoint(each.reply_ids or ())
        for each in told
    )
    if loud:
        return Check("never said", "failed", f"the slot is in {loud} of {len(told)} replies: suppress it in the engine")
    if any(each.reply_ids is None for each in told):
        return Check("never said", "unknown", "not in the words of replies, where engines leave special tokens out")
    return Check("never said", "ok", f"in none of {len(told)} replies")


def _first_words(expected: Expected, first: Sequence[dict[int, float]]) -> Check:
    """By the probabilities of the first token: how much of the way from the untouched model to the token they have gone, over all probes."""
    known = [beginnings(expected, probe) for probe in expected.probes]
    moved = sum(float((tuned - plain).abs().sum()) / 2 for tuned, plain in known) / len(known)
    near = far = gone = whole = 0.0
    for top, (tuned, plain) in zip(first, known, strict=True):
        there = _shares(torch.tensor([*top.values()]))
        with_token, without = (_shares(each[[*top]]) for each in (tuned, plain))
        near += float((there - with_token).abs().sum()) / 2 / len(known)
        far += float((there - without).abs().sum()) / 2 / len(known)
        gone += float((there - without) @ (with_token - without))
        whole += float((with_token - without) @ (with_token - without))
    if moved < AUDIBLE or not whole:
        return Check("effect", "unknown", f"the token hardly changes how these replies begin ({moved:.3f})")
    seen = gone / whole
    figures = (
        f"{max(seen, 0.0):.0%} of its effect is seen; {near:.2f} off the token's, {far:.2f} off the untouched model's"
    )
    if seen >= SEEN and near <= max(ROUNDING, far / 2):
        return Check("effect", "ok", f"replies begin as the token's: {figures}")
    if seen <= 1 - SEEN and far <= max(ROUNDING, near / 2):
        return Check("effect", "failed", f"replies begin as the untouched model's: {figures}")
    why = f"replies begin as neither's: {figures}; another token, other weights, or these quantised too coarsely"
    return Check("effect", "failed" if min(near, far) > FOREIGN else "unknown", why)


def _whole_replies(expected: Expected, said: Sequence[str]) -> Check:
    """By the words of greedy replies, for endpoints that tell no probabilities: which of the two they follow longer."""
    tuned = untouched = 0
    for words, (with_token, without) in zip(said, replies(expected, REPLY_TOKENS), strict=True):
        same = [common_length([words.strip().encode(), each.strip().encode()]) for each in (with_token, without)]
        tuned, untouched = tuned + (same[0] > same[1]), untouched + (same[1] > same[0])
    figures = f"{tuned} of {len(said)} follow the token's, {untouched} the untouched model's (no probabilities told)"
    if tuned > 1 and tuned >= SEEN * (tuned + untouched):
        return Check("effect", "ok", f"replies are the token's: {figures}")
    if untouched > 1 and untouched >= SEEN * (tuned + untouched):
        return Check("effect", "failed", f"replies are the untouched model's: {figures}")
    return Check("effect", "unknown", f"too close to tell: {figures}")


def _shares(probabilities: Tensor) -> Tensor:
    """`[n + 1]`: of some tokens, and of all others together."""
    return torch.cat([probabilities, 1 - probabilities.sum(0, keepdim=True)])


def _by_id(expected: Expected, told: Told) -> dict[int, float]:
    """The likeliest first tokens by id; without the slot, and without words that are no one token."""
    assert expected.model is not None
    found = {}
    for token, probability in told.first:
        ids = [token] if isinstance(token, int) else expected.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) == 1 and 0 <= ids[0] < len(expected.model.table) and ids[0] not in expected.slot_ids:
            found[ids[0]] = probability
    return found


def _with_ids(expected: Expected, told: Sequence[Told]) -> list[tuple[tuple[int, ...], Probe]]:
    """The prompts whose ids were told, with what they should be."""
    return [(each.prompt_ids, p) for each, p in zip(told, expected.probes, strict=True) if each.prompt_ids is not None]


def _slots(ids: Sequence[int], expected: Expected) -> int:
    return sum(i in expected.slot_ids for i in ids)


def _around(ids: Sequence[int], expected: Expected) -> tuple[int, ...]:
    """A prompt without its BOS, which is looked at by itself."""
    return tuple(i for i in ids if i != expected.tokenizer.bos_token_id)


def _tokens(n: int) -> str:
    return f"{n} token" + ("" if n == 1 else "s")
