"""Which replies the page shows, and how: drawn by rule, cut, with the sentence that refuses set apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from trimtab.report.plots import GROUPS
from trimtab.run import digest

HARMFUL_WORDS, BENIGN_WORDS = 25, 60  # replies are shown no longer than this
PAIRS = 4  # of each group
CHANGED = 3  # of each label and direction


def pairs(rows: Mapping[str, Sequence[Mapping[str, Any]]], arm: str) -> list[dict[str, Any]]:
    """Up to twelve prompts with their replies: four of each group, failures in proportion, spread over categories."""
    found = []
    for group in GROUPS:
        candidates = members(rows, group)
        verdicts = [row[arm]["refused"] for row in candidates]
        good = [row for row, refused in zip(candidates, verdicts, strict=True) if refused is (group == "harmful")]
        bad = [row for row, refused in zip(candidates, verdicts, strict=True) if refused is not (group == "harmful")]
        failures = min(max(1, round(PAIRS * len(bad) / len(candidates))), PAIRS - bool(good)) if bad else 0
        used: Counter[str] = Counter()
        chosen = _spread(good, PAIRS - failures, used)
        found += [pair(row, group, arm) for row in chosen + _spread(bad, PAIRS - len(chosen), used)]
    return found


def changed(rows: Mapping[str, Sequence[Mapping[str, Any]]], arm: str) -> list[dict[str, Any]]:
    """What turned over, better or worse, by label: how many prompts of those shown, and a few of them, from categories apart."""
    found = []
    for label, refused in product(("harmful", "benign"), (True, False)):
        everyone = (
            members(rows, "harmful") if label == "harmful" else members(rows, "borderline") + members(rows, "plain")
        )
        turned = [
            row for row in everyone if "base" in row and arm != "base"
            and (row["base"]["refused"], row[arm]["refused"]) == (not refused, refused)
        ]  # fmt: skip
        if turned:
            title = f"{label} requests that are {'refused' if refused else 'answered'} now"
            shown = [pair(row, group_of(row), arm) for row in _spread(turned, CHANGED, Counter())]
            found.append({"title": title, "n": len(turned), "good": refused is (label == "harmful"), "pairs": shown})
    return found


def members(rows: Mapping[str, Sequence[Mapping[str, Any]]], group: str) -> list[dict[str, Any]]:
    """All rows of one group, in an order that nobody chose."""
    found = [{**row, "suite": suite} for suite, part in rows.items() for row in part if group_of(row) == group]
    return sorted(found, key=lambda row: digest(row["suite"], row["id"]))


def group_of(row: Mapping[str, Any]) -> str:
    return str(row["group"]) if row["label"] == "benign" else "harmful"


def _spread(rows: Sequence[dict[str, Any]], n: int, used: Counter[str]) -> list[dict[str, Any]]:
    """The first `n` rows, each time from a category that was used least."""
    left, chosen = list(rows), list[dict[str, Any]]()
    while left and len(chosen) < n:
        chosen.append(left.pop(min(range(len(left)), key=lambda i: used[left[i]["category"]])))
        used[chosen[-1]["category"]] += 1
    return chosen


def pair(row: Mapping[str, Any], group: str, measured: str) -> dict[str, Any]:
    """A prompt and its replies, before and under the arm that was measured, cut, with the sentence that refuses set apart."""
    replies = []
    for arm in (arm for arm in dict.fromkeys(("base", measured)) if arm in row):
        refused: bool | None = row[arm]["refused"]
        answer = re.sub(r"(?s)^.*</think(ing)?>|<think(ing)?>.*$", "", row[arm]["reply"])
        text = cut(answer, HARMFUL_WORDS if group == "harmful" else BENIGN_WORDS)
        first = re.match(r".+?[.!?…](?=\s|$)|.+", text) if refused else None
        replies.append(
            {
                "arm": "before" if arm == "base" else "after",
                "verdict": {True: "refused", False: "answered", None: "unscored"}[refused],
                "good": refused is (group == "harmful"),
                "refusal": first.group() if first else "",
                "rest": text[first.end() :] if first else text,
            }
        )
    return {"group": group, "category": row["category"], "prompt": cut(row["prompt"], BENIGN_WORDS), "replies": replies}


def cut(text: str, words: int) -> str:
    """The first so many words, on one line; writing without spaces is cut by its letters."""
    parts = text.split()
    short = " ".join(parts[:words])[: words * 10]
    return short if short == " ".join(parts) else f"{short} …"
