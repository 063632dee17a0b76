"""Look at validation requests: what a token, or an expert, refuses of them so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.decoding.engine import Row, by_length, decode, forward
from trimtab.evaluation.metrics import auc, harmonic_mean
from trimtab.models import Model, slot
from trimtab.prompts.records import Group
from trimtab.refusal import is_refusal, opening_log_odds
from trimtab.run import progress
from trimtab.softtoken.examples import Examples

VALIDATION_TOKENS = 10  # enough words to tell a refusal from an apology


class Look(NamedTuple):
    """One validation request: its refusal log-odds, and whether the greedy reply begins as a refusal (`None`: unscored)."""

    score: float
    refused: bool | None


@torch.inference_mode()
def validate(model: Model, examples: Examples, vectors: Tensor | None) -> dict[Group, list[Look]]:
    """Look at the validation requests, by group; without vectors, at the untouched model.

    Log-odds rank well but do not say what greedy decoding does: a refusal at 30 % wins where everything else is spread
    thin. So the first words are decoded too.
    """
    found: dict[Group, list[Look]] = {"harmful": [], "borderline": [], "plain": []}
    with slot(model, vectors), progress("looking at validation prompts", len(examples.records)) as advance:
        for chunk in by_length(examples.lengths, 48):
            past, tails = examples.past(chunk), [examples.tails[i] for i in chunk]
            if len(tails[0]) > 1:  # read by both
                forward(model, [tail[:-1] for tail in tails], past, 1)
                tails = [tail[-1:] for tail in tails]
            scores = opening_log_odds(model, tails, past).tolist()
            rows = [Row(i, VALIDATION_TOKENS) for i in chunk]
            decode(model, tails, past, rows, vectors=vectors)
            for i, score, row in zip(chunk, scores, rows, strict=True):
                words = model.tokenizer.decode(row.ids, skip_special_tokens=True)
                found[examples.group(i)].append(Look(score, is_refusal(words)))
            advance(len(chunk))
    return found


def summary(looks: dict[Group, list[Look]]) -> dict[str, float]:
    """What selection goes by: refusal of harmful, compliance with benign requests (mean over their groups), their harmonic
    mean; and how well log-odds rank the two (AUC)."""
    benign = [group for group in (looks["borderline"], looks["plain"]) if group]
    refusal = sum(look.refused is True for look in looks["harmful"]) / len(looks["harmful"])
    compliance = sum(sum(look.refused is False for look in group) / len(group) for group in benign) / len(benign)
    return {
        "harmful_refusal": refusal,
        "benign_compliance": compliance,
        "harmonic_mean": harmonic_mean(refusal, compliance),
        "auc": auc([look.score for look in looks["harmful"]], [look.score for group in benign for look in group]),
    }
