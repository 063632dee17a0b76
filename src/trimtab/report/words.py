"""Numbers as people read them."""

from __future__ import annotations

import math

from trimtab.report.plots import Rate

# What a model as judge sorts replies to benign requests into (`evaluation/llm.py`), in XSTest's words.
CLASSES = {"answered": "full compliance", "partly": "partial refusal", "refused": "full refusal"}


def percent(share: float) -> str:
    """`93 %`; one decimal close to 0 and 1, which are only written where they are meant."""
    if math.isnan(share):
        return "–"
    return f"{share:.{1 if 0 < share < 0.01 or 0.99 < share < 1 else 0}%}".replace("%", "\u00a0%")


def interval(found: Rate) -> str:
    low, high = (f"{100 * bound:.0f}" for bound in found.interval)
    return f"{low}–{high}\u00a0%" if found.n else "–"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\u00a0min {rest}\u00a0s" if minutes else f"{rest}\u00a0s"
