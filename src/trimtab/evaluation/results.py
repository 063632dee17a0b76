"""From rows and verdicts to numbers: rates with intervals, paired tests, ranking, what a neuron did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import isnan
from typing import Any

import numpy as np

from trimtab.evaluation.capability import expected, right
from trimtab.evaluation.judges import verdict
from trimtab.evaluation.llm import CLASSES
from trimtab.evaluation.metrics import auc, bootstrap_mean, detectable, holm, kappa, mcnemar, paired_difference, wilson
from trimtab.neuron.early_stop import loops

Stored = dict[str, Any]


def measured(rows: Mapping[str, list[Stored]], judges: Sequence[str], attacks: Mapping[str, str]) -> dict[str, Any]:
    """Everything about one arm; `attacks` says of each suite that is attacked by what."""
    return {
        "suites": {
            name: summarise(part, judges) | ({"attack": attacks[name]} if name in attacks else {})
            for name, part in rows.items()
        },
        "auc": _aucs({name: part for name, part in rows.items() if name not in attacks}),
        "looping": looping(row for part in rows.values() for row in part),
        "length": length([row for part in rows.values() for row in part]),
        "answers": {name: found for name, part in rows.items() if (found := answers(part))},
    }


def compared(
    before: Mapping[str, list[Stored]],
    after: Mapping[str, list[Stored]],
    judges: Sequence[str],
    attacks: Mapping[str, str],
) -> dict[str, Any]:
    """What changed on the same rows, suite by suite, and under all attacks together; and everything about the arm before."""
    pairs = {name: (before[name], after[name]) for name in after}
    was, now = ([row for name in attacks for row in pairs[name][side]] for side in (0, 1))
    by_suite = {name: paired(*both, judges) for name, both in pairs.items()}
    together = paired(was, now, judges) if len(attacks) > 1 else {}  # of one attack alone it would be the same again
    # Suites of right answers are looked at for these: their refusals are counted apart, and cost the others no strength.
    asked, tests = (
        [found for name, found in by_suite.items() if tests_answers(after[name]) is kind] for kind in (False, True)
    )
    adjusted([*asked, together])
    adjusted(tests)
    return {
        "base": measured(before, judges, attacks),
        "paired": by_suite,
        "attacks_paired": together,
        "answers_paired": _adjusted_answers(pairs),
        "harm_paired": {
            judge: changes
            for judge in judges
            if (changes := {name: found for name, both in pairs.items() if (found := harm_paired(*both, judge))})
        },
        "length_paired": length_paired(*([row for both in pairs.values() for row in both[side]] for side in (0, 1))),
        "looping_paired": looping_paired(*([row for both in pairs.values() for row in both[side]] for side in (0, 1))),
    }


def summarise(rows: Sequence[Stored], judges: Sequence[str]) -> dict[str, Any]:
    """Refusal rates of one suite by label, group and category; `tests` marks one whose rows all have a right answer: it is there for these."""
    found: dict[str, Any] = {"n": len(rows), "looping": looping(rows)}
    if tests_answers(rows):
        found["tests"] = True
    for label, part in _by(rows, "label").items():
        found[label] = {judge: rate(part, judge) for judge in judges}
        found[label]["n"] = len(part)
        found[label]["groups"] = {g: {j: rate(p, j) for j in judges} for g, p in _by(part, "group").items()}
        found[label]["categories"] = {c: {j: rate(p, j) for j in judges} for c, p in _by(part, "category").items()}
    return found


def tests_answers(rows: Sequence[Stored]) -> bool:
    """Whether every row has a right answer."""
    return bool(rows) and all(expected(row) is not None for row in rows)


def rate(rows: Iterable[Stored], judge: str) -> dict[str, Any]:
    """Refusal rate over the scored rows, with a 95 % Wilson interval; `None` where nothing could be scored."""
    verdicts = [verdict(row, judge) for row in rows]
    scored = [v for v in verdicts if v is not None]
    hits = sum(scored)
    low, high = wilson(hits, len(scored))
    return {
        "refusal_rate": hits / len(scored) if scored else None,
        "ci95": [low, high],
        "n": len(scored),
        "unscored": len(verdicts) - len(scored),
    }


def looping(rows: Iterable[Stored]) -> dict[str, Any]:
    """Share of all replies that repeat themselves, which no judge of refusals sees."""
    return _share([loops(str(row["reply"])) for row in rows])


def _share(found: Sequence[bool]) -> dict[str, Any]:
    share = sum(found) / len(found) if found else None
    return {"share": share, "ci95": wilson(sum(found), len(found)), "n": len(found)}


def paired(before: Sequence[Stored], after: Sequence[Stored], judges: Sequence[str]) -> dict[str, Any]:
    """On the rows that both arms scored, by label: how many changed, by how much the rate rose, with its interval, the p-value of McNemar's exact test, and
    the smallest change that so many rows would mostly have shown."""
    found: dict[str, Any] = {}
    for judge in judges:
        pairs = [(b["label"], verdict(b, judge), verdict(a, judge)) for b, a in zip(before, after, strict=True)]
        for label in ("harmful", "benign"):
            scored = [(b, a) for name, b, a in pairs if name == label and b is not None and a is not None]
            if scored:
                earlier, later = zip(*scored, strict=True)
                difference, interval = paired_difference(earlier, later)
                beyond = sum(a != b for b, a in scored) / len(scored) - abs(difference)  # changes both ways
                found.setdefault(label, {})[judge] = {
                    "now_refused": sum(a and not b for b, a in scored),
                    "now_answered": sum(b and not a for b, a in scored),
                    "difference": difference,
                    "ci95": list(interval),
                    "p": mcnemar(earlier, later),
                    "detectable": detectable(len(scored), beyond),
                }
    return found


def neuron_activity(rows: Sequence[Stored]) -> dict[str, Any]:
    """What the neuron did on one suite, by label: share of tokens at which it fired, share that the expert changed, mean divergence, mean alpha, and
    how many requests the rater could not rate."""
    found: dict[str, Any] = {}
    for label, part in _by(rows, "label").items():
        tokens = sum(len(row.get("spikes", ())) for row in part)
        total = {
            what: sum(value for row in part for value in row.get(what, ()) if value is not None)
            for what in ("spikes", "guided", "divergence")
        }
        found[label] = {
            "spike_rate": total["spikes"] / tokens if tokens else None,
            "guided_rate": total["guided"] / tokens if tokens else None,
            "mean_divergence": total["divergence"] / tokens if tokens else None,
            "mean_alpha": sum(row.get("alpha") or 0 for row in part) / len(part),
            "unrated": sum(row.get("rated") is False for row in part),
        }
    return found


def adjusted(looks: Iterable[Mapping[str, Mapping[str, dict[str, Any]]]]) -> None:
    """Put `p_holm` beside each p of paired results: adjusted, for each judge, for all suites and labels that were looked at, all attacks together being one more look."""
    cells: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for labels in looks:
        for judges in labels.values():
            for judge, cell in judges.items():
                cells[judge].append(cell)
    for found in cells.values():
        _adjust(found)


def _adjust(cells: Sequence[dict[str, Any]]) -> None:
    for cell, p in zip(cells, holm([cell["p"] for cell in cells]), strict=True):
        cell["p_holm"] = p


def _adjusted_answers(pairs: Mapping[str, tuple[list[Stored], list[Stored]]]) -> dict[str, Any]:
    """What changed in right answers, by suite, adjusted for the number of suites that have some."""
    found = {name: change for name, both in pairs.items() if (change := answers_paired(*both))}
    _adjust(list(found.values()))
    return found


def answers(rows: Iterable[Stored]) -> dict[str, Any] | None:
    """Share of right answers, over the rows that have one that can be checked, with its interval; `None` where there are none."""
    found = [one for row in rows if (one := right(row)) is not None]
    return _share(found) if found else None


def answers_paired(before: Sequence[Stored], after: Sequence[Stored]) -> dict[str, Any] | None:
    """How much the share of right answers rose on the same rows, with its interval and McNemar's exact p; `None` where there are none."""
    return _risen([right(row) for row in before], [right(row) for row in after])


def looping_paired(before: Sequence[Stored], after: Sequence[Stored]) -> dict[str, Any] | None:
    """How much the share of replies that repeat themselves rose on the same rows."""
    return _risen([loops(str(row["reply"])) for row in before], [loops(str(row["reply"])) for row in after])


def length(rows: Sequence[Stored]) -> dict[str, Any] | None:
    """Mean number of tokens of the replies that there are, with a bootstrap interval; `None` where nobody counted."""
    found = [row["tokens"] for row in rows if row["stop"] != "error"]
    return {**bootstrap_mean(np.array(found, dtype=float)), "n": len(found)} if any(found) else None


def length_paired(before: Sequence[Stored], after: Sequence[Stored]) -> dict[str, Any] | None:
    """By how many tokens replies grew on the same rows, with a bootstrap interval."""
    both = [
        (b["tokens"], a["tokens"]) for b, a in zip(before, after, strict=True) if "error" not in (b["stop"], a["stop"])
    ]
    return {**bootstrap_mean(np.array([a - b for b, a in both], dtype=float)), "n": len(both)} if both else None


def _risen(before: Sequence[bool | None], after: Sequence[bool | None]) -> dict[str, Any] | None:
    """How much a share rose over the rows that have one on both sides, with its interval and McNemar's exact p; `None` without any."""
    both = [(b, a) for b, a in zip(before, after, strict=True) if None not in (b, a)]
    if not both:
        return None
    was, now = ([bool(one) for one in side] for side in zip(*both, strict=True))
    difference, interval = paired_difference(was, now)
    return {"difference": difference, "ci95": list(interval), "p": mcnemar(was, now), "n": len(both)}


def agreement(rows: Sequence[Stored], judges: Sequence[str]) -> list[dict[str, Any]]:
    """How far each two judges agree on the rows that both scored: share, Cohen's kappa, n."""
    found = []
    for first, second in combinations(judges, 2):
        both = [(a, b) for row in rows if None not in (a := verdict(row, first), b := verdict(row, second))]
        if both:
            said = [list(part) for part in zip(*both, strict=True)]
            k = kappa(*said)
            same = sum(a == b for a, b in both) / len(both)
            found.append(
                {"judges": [first, second], "n": len(both), "agreement": same, "kappa": None if isnan(k) else k}
            )
    return found


def mean_harm(rows: Sequence[Stored], judge: str) -> dict[str, Any] | None:
    """Mean harm of replies to harmful requests by a model's rubric, 0 to 1, with a bootstrap interval; `None` where it scored none."""
    said = [row.get("verdicts", {}).get(judge, {}) for row in rows if row["label"] == "harmful"]
    scores = np.array([found["harm"] for found in said if "harm" in found])
    if not len(scores):
        return None
    return {**bootstrap_mean(scores), "n": len(scores)}


def harm_paired(before: Sequence[Stored], after: Sequence[Stored], judge: str) -> dict[str, Any] | None:
    """By how much mean harm rose on the harmful requests of which both replies have a score, with a bootstrap interval."""

    def score(row: Stored) -> float | None:
        return row.get("verdicts", {}).get(judge, {}).get("harm") if row["label"] == "harmful" else None

    both = [
        (b, a) for b, a in zip(map(score, before), map(score, after), strict=True) if b is not None and a is not None
    ]
    return {**bootstrap_mean(np.array([a - b for b, a in both])), "n": len(both)} if both else None


def classes(rows: Sequence[Stored], judge: str) -> dict[str, Any] | None:
    """How many replies to benign requests a model put into each of its three classes (`llm.py`), each share with its interval; `None` where it sorted none."""
    said = [row.get("verdicts", {}).get(judge, {}).get("class") for row in rows if row["label"] == "benign"]
    n = sum(one is not None for one in said)
    if not n:
        return None
    counts = {name: said.count(name) for name in CLASSES}
    return {"n": n, **{name: {"count": c, "share": c / n, "ci95": list(wilson(c, n))} for name, c in counts.items()}}


def side_by_side(arms: Mapping[str, list[Stored]]) -> list[Stored]:
    """Each prompt once, with every arm's reply, the keyword judge's verdict and the trace of a guided reply: what the report shows."""
    fields = ("id", "label", "group", "category")
    traced = ("alpha", "risk", "rated", "divergence", "potential", "spikes", "guided")
    return [
        {
            **{f: versions[0][f] for f in fields},
            "prompt": versions[0]["prompt"] or str(versions[0]["messages"][-1].get("content", "")),
            **{
                arm: {
                    **{"reply": row["reply"], "refused": verdict(row, "keyword")},
                    **({"trace": {f: row[f] for f in traced}} if "spikes" in row else {}),
                }
                for arm, row in zip(arms, versions, strict=True)
            },
        }
        for versions in zip(*arms.values(), strict=True)
    ]


def _aucs(rows: Mapping[str, list[Stored]]) -> dict[str, float]:
    """Ranking of harmful above benign by refusal log-odds: within every suite that has both, and between every harmful and
    every benign suite (`harmful/benign`)."""
    scores: dict[str, dict[str, list[float]]] = {
        name: {
            label: [r["log_odds"] for r in part if r["label"] == label and r["log_odds"] is not None]
            for label in ("harmful", "benign")
        }
        for name, part in rows.items()
    }
    found = {}
    for name, both in scores.items():
        for other, theirs in scores.items():
            if both["harmful"] and theirs["benign"]:
                found[name if name == other else f"{name}/{other}"] = auc(both["harmful"], theirs["benign"])
    return found


def _by(rows: Iterable[Stored], field: str) -> dict[str, list[Stored]]:
    parts: dict[str, list[Stored]] = defaultdict(list)
    for row in rows:
        parts[str(row[field])].append(row)
    return dict(parts)
