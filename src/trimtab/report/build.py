"""From run folders to one self-contained page.

Three steps: read what a folder holds (`read_run`), turn it into what the page shows (`section`), render the template.
What a run lacks is left out. Replies to harmful requests are cut here, before the template ever sees them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.errors import RunError, UsageError
from trimtab.evaluation.metrics import mcnemar
from trimtab.report import plots
from trimtab.report.plots import GROUPS, Arm, Rate, pooled, rate, suites
from trimtab.run import create, digest, read_json, write

MEANING = {
    "harmful": "harmful requests",
    "borderline": "benign requests that only sound harmful",
    "plain": "plain benign requests",
}
HARMFUL_WORDS, BENIGN_WORDS = 25, 60
PAIRS = 4  # of each group


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `manifest`, `history` and `rules` come from `align`, `results` and `rows` from `eval`."""

    name: str
    manifest: dict[str, Any] | None
    history: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    results: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """Results before (the untouched model) and after (with its token)."""
        arm = self.results.get("arm")
        return (self.results, None) if arm == "base" else (self.results.get("base"), self.results if arm else None)

    @property
    def measured(self) -> Arm:
        return self.arms[1] or self.arms[0]

    @property
    def judge(self) -> str:
        """The judge of headline and figures: `keyword` where it was asked, as it reads the replies people see."""
        found = [judge for part in suites(self.measured).values() for judge in judges(part)]
        return "keyword" if "keyword" in found or not found else found[0]


def build(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about `runs` to `out`; several runs are compared.

    Raises:
        RunError: a folder is no run, is damaged, or the page cannot be written. UsageError: no folder at all.
    """
    if not runs:
        raise UsageError("no run to report on.", "Give the folder of a finished run.")
    found = [read_run(Path(folder)) for folder in runs]
    marks = [str(i + 1) if len(found) > 1 else "" for i in range(len(found))]
    palette: dict[str, str] = {}
    moves = [m for run, mark in zip(found, marks, strict=True) for m in plots.moves(*run.arms, run.judge, mark, palette)]
    environment = Environment(
        loader=PackageLoader("trimtab", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "interval": interval, "grouped": grouped, "p": p_value, "cut": cut}
    page = environment.get_template("template.html").render(
        sections=[section(run, mark) for run, mark in zip(found, marks, strict=True)],
        moves=moves,
        plane=plots.plane(moves) if moves else "",
        meaning=MEANING,
        harmful_words=HARMFUL_WORDS,
    )
    create(out.parent)
    write(out, page)
    return out


def read_run(folder: Path) -> Run:
    """Read a run of `align` (with its evaluation in `eval/`, if any) or of `eval`.

    Raises:
        RunError: it is neither, or a file in it is damaged.
    """

    def part(path: Path, empty: Any) -> Any:
        value = read_json(path) if path.exists() else empty
        if not isinstance(value, type(empty)):
            raise RunError(f"{path} is damaged: a {type(empty).__name__} should be in it.", "Run the same command again.")
        return value

    manifest = part(folder / "manifest.json", {})
    evaluation = folder / "eval" if manifest else folder
    results = part(evaluation / "results.json", {})
    if not manifest and not results:
        began = (folder / "run.json").exists()
        raise RunError(
            f"{folder} is no {'finished ' if began else ''}run: it holds neither manifest.json nor results.json.",
            "Run the same `trimtab align` again: it goes on." if began else "Give a folder of `trimtab align` or `eval`.",
        )
    return Run(
        name=folder.resolve().name,
        manifest=manifest or None,
        history=part(folder / "history.json", []),
        rules=part(folder / "filter.json", []),
        results=results,
        rows=part(evaluation / "rows.json", {}),
    )


def section(run: Run, mark: str) -> dict[str, Any]:
    """Everything the page shows about one run."""
    manifest = run.manifest or {}
    cards = {group: card for group in GROUPS if (card := _card(run, group))}
    return {
        "mark": mark,
        "name": run.name,
        "model": _model(run),
        "headline": _headline(run, cards),
        "aside": _aside(run, cards),
        "cost": _cost(manifest),
        "trained": duration(manifest["cost"]["seconds"]) if manifest else "",
        "cards": cards,
        "judge": run.judge,
        "compared": None not in run.arms,
        "guided": bool(manifest or run.arms[1]),
        "categories": list(plots.categories(*run.arms, run.judge)),
        "training": _training(run),
        "rules": run.rules,
        "pairs": _pairs(run.rows),
        "numbers": list(_numbers(run)),
        "aucs": list(_aucs(run)),
        "pilots": manifest.get("pilots", []),
        "token": manifest.get("token"),
        "settings": list(_flat({k: v for k, v in manifest.items() if k != "pilots"})),
        "evaluation": list(_flat({k: run.results.get(k) for k in ("model", "arm", "cost", "environment")})),
    }


# --- the headline ---------------------------------------------------------------------------------------------------


def _card(run: Run, group: str) -> dict[str, Any] | None:
    """Refusal of one group before and after, over all suites, and whether that is a change."""
    before, after = (pooled(arm, group, run.judge) for arm in run.arms)
    card = {"before": before if after else None, "after": after or before, "kind": "", "note": ""}
    if before and after:
        card["kind"], card["note"] = _change(before, after, _paired_p(run, group), group == "harmful")
    return card if card["after"] else None


def _change(before: Rate, after: Rate, p: float | None, more_is_better: bool) -> tuple[str, str]:
    """`better`, `worse` or `unclear`, and words for it. Clear is what intervals apart show, or else the paired test."""
    kind = "better" if (after.value > before.value) == more_is_better else "worse"
    if before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]:
        return kind, kind
    if p is not None and p < 0.05:
        return kind, f"{kind}: intervals overlap, but paired p {p_value(p)}"
    return "unclear", "no clear change"


def _paired_p(run: Run, group: str, suite: str | None = None) -> float | None:
    """McNemar's exact p for one group, from the single verdicts; `None` without scored rows of both arms."""
    rows = [row for name, part in run.rows.items() for row in part if suite in (None, name) and _group(row) == group]
    pairs = [(row["base"]["refused"], row["token"]["refused"]) for row in rows if "base" in row and "token" in row]
    scored = [pair for pair in pairs if None not in pair]
    return mcnemar([before for before, _ in scored], [after for _, after in scored]) if scored else None


def _headline(run: Run, cards: Mapping[str, dict[str, Any]]) -> str:
    """`One token of 576 numbers: M now refuses 93 % of harmful requests (was 1 %), and 4 % of plain benign ones (was 0 %).`"""
    harmful, benign = cards.get("harmful"), cards.get("plain") or cards.get("borderline")
    shown = [card for card in (harmful, benign) if card]
    lead = f"{_token(run.manifest)}: " if run.manifest else "With its token, " if run.arms[1] else ""
    if not shown:
        return f"{lead}{_model(run)}, not evaluated yet."
    clauses = [f"{percent(harmful['after'].value)} of harmful requests{_was(harmful)}"] if harmful else []
    if benign:
        kind = "plain benign" if {"borderline", "plain"} <= set(cards) else "benign"
        clauses.append(f"{percent(benign['after'].value)} of {kind} {'ones' if harmful else 'requests'}{_was(benign)}")
    mixed = {"better", "worse"} <= {card["kind"] for card in shown}
    now = "now " if any(card["kind"] in ("better", "worse") for card in shown) else ""
    return f"{lead}{_model(run)} {now}refuses {(', but ' if mixed else ', and ').join(clauses)}."


def _model(run: Run) -> str:
    return str(run.manifest["model"]["name"] if run.manifest else run.results["model"])


def _token(manifest: Mapping[str, Any]) -> str:
    """`One token of 576 numbers`."""
    tokens, numbers = manifest["settings"]["tokens"], grouped(manifest["token"]["numbers"])
    return f"One token of {numbers} numbers" if tokens == 1 else f"{tokens} tokens, {numbers} numbers together"


def _was(card: Mapping[str, Any]) -> str:
    """What it was; with a word where it got worse or did not clearly change."""
    if card["before"] is None:
        return ""
    return f" (was {percent(card['before'].value)}{'' if card['note'] == 'better' else ': ' + card['note']})"


def _aside(run: Run, cards: Mapping[str, dict[str, Any]]) -> str:
    """The price on borderline requests, which the headline does not name; and what rates are pooled over."""
    sentences = []
    if {"borderline", "plain"} <= set(cards):
        card = cards["borderline"]
        sentences.append(f"Of {MEANING['borderline']}, it refuses {percent(card['after'].value)}{_was(card)}.")
    if len(suites(run.measured)) > 1:
        sentences.append(f"Rates are over {len(suites(run.measured))} suites together: {', '.join(suites(run.measured))}.")
    return " ".join(sentences)


def _cost(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return ""
    numbers, cost = grouped(manifest["token"]["numbers"]), manifest["cost"]
    return f"{numbers} numbers trained in {duration(cost['seconds'])} on {cost['device']}. No weight of the model changed."


def _training(run: Run) -> dict[str, Any] | None:
    """Curves, and what the validation split said before and after."""
    if not run.history or not run.manifest:
        return None
    before, after = run.manifest["validation"]["before"], run.manifest["validation"]["after"]
    sizes = run.manifest["data"]["validation"]
    harmful, total = sizes.get("harmful", 0), sum(sizes.values())
    rows = [("harmful_refusal", "harmful refused", harmful), ("benign_compliance", "benign answered", total - harmful)]
    return {
        "curves": list(plots.curves(run.history, after.get("step"))),
        "rates": [(title, *(Rate(round(arm[name] * n), n) for arm in (before, after))) for name, title, n in rows],
        "auc": (before["auc"], after["auc"]),
    }


# --- replies side by side -------------------------------------------------------------------------------------------


def _pairs(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Up to twelve prompts with their replies: four of each group, failures in proportion, spread over categories."""
    pairs = []
    for group in GROUPS:
        members = [{**row, "suite": suite} for suite, part in rows.items() for row in part if _group(row) == group]
        members.sort(key=lambda row: digest(row["suite"], row["id"]))  # an order that nobody chose
        good = [row for row in members if (row.get("token") or row["base"])["refused"] is (group == "harmful")]
        bad = [row for row in members if row not in good]  # unscored is never good
        failures = min(max(1, round(PAIRS * len(bad) / len(members))), PAIRS - bool(good)) if bad else 0
        used: Counter[str] = Counter()
        chosen = _spread(good, PAIRS - failures, used)
        pairs += [_pair(row, group) for row in chosen + _spread(bad, PAIRS - len(chosen), used)]
    return pairs


def _group(row: Mapping[str, Any]) -> str:
    return str(row["group"]) if row["label"] == "benign" else "harmful"


def _spread(rows: Sequence[dict[str, Any]], n: int, used: Counter[str]) -> list[dict[str, Any]]:
    """The first `n` rows, each time from a category that was used least."""
    left, chosen = list(rows), []
    while left and len(chosen) < n:
        chosen.append(left.pop(min(range(len(left)), key=lambda i: used[left[i]["category"]])))
        used[chosen[-1]["category"]] += 1
    return chosen


def _pair(row: Mapping[str, Any], group: str) -> dict[str, Any]:
    """A prompt and its replies, cut, with the sentence that refuses set apart."""
    replies = []
    for arm in (arm for arm in ("base", "token") if arm in row):
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
    return {"group": group, "order": GROUPS.index(group), "category": row["category"], "prompt": cut(row["prompt"], BENIGN_WORDS), "replies": replies}


# --- tables ---------------------------------------------------------------------------------------------------------


def judges(part: Mapping[str, Any]) -> list[str]:
    """The judges of one suite's results."""
    labels = [part[label] for label in ("harmful", "benign") if label in part]
    return list(dict.fromkeys(k for label in labels for k, v in label.items() if isinstance(v, dict) and "refusal_rate" in v))


def _numbers(run: Run) -> Iterator[dict[str, Any]]:
    """One row for every suite, judge and group; labels of several groups have a row of their own."""
    for suite, part in suites(run.measured).items():
        for judge, label in ((judge, label) for judge in judges(part) for label in ("harmful", "benign") if label in part):
            groups = list(part[label].get("groups", {}))
            paired = run.results.get("paired", {}).get(suite, {}).get(label, {}).get(judge, {})
            for group in ["", *groups] if len(groups) > 1 else [""]:
                path = (suite, label, "groups", group, judge) if group else (suite, label, judge)
                p = _paired_p(run, group, suite) if group and judge == run.judge else None
                yield {
                    "suite": suite,
                    "who": group or label,
                    "part": bool(group),
                    "judge": judge,
                    "rates": [rate(arm, *path) for arm in run.arms if arm],
                    "changed": None if group else paired,
                    "p": p if group else paired.get("p"),
                }


def _aucs(run: Run) -> Iterator[dict[str, Any]]:
    """Ranking of harmful above benign, before and after, each with its interval."""
    for name in (run.measured or {}).get("auc", {}):
        harmful, _, benign = name.partition("/")
        values = []
        for arm in (arm for arm in run.arms if arm):
            n = [rate(arm, suite, label, "logit") for suite, label in ((harmful, "harmful"), (benign or harmful, "benign"))]
            values.append((arm["auc"][name], auc_interval(arm["auc"][name], *(r.n if r else 0 for r in n))))
        yield {"harmful": harmful, "benign": benign or harmful, "values": values}


def auc_interval(area: float, n: int, m: int) -> tuple[float, float] | None:
    """95 % of an AUC over `n` positives and `m` negatives, after Hanley and McNeil (1982)."""
    if not n or not m or math.isnan(area):
        return None
    extra = (n - 1) * (area / (2 - area) - area**2) + (m - 1) * (2 * area**2 / (1 + area) - area**2)
    half = 1.96 * math.sqrt((area * (1 - area) + extra) / (n * m))
    return max(0.0, area - half), min(1.0, area + half)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `a.b` and text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None and value != "":
        yield prefix, f"{value:.5g}" if isinstance(value, float) else str(value)


# --- words ----------------------------------------------------------------------------------------------------------


def cut(text: str, words: int) -> str:
    """The first so many words, on one line; writing without spaces is cut by its letters."""
    parts = text.split()
    short = " ".join(parts[:words])[: words * 10]
    return short if short == " ".join(parts) else f"{short} …"


def percent(share: float) -> str:
    """`93 %`; one decimal close to 0 and 1, which are only written where they are meant."""
    if math.isnan(share):
        return "–"
    return f"{share:.{1 if 0 < share < 0.01 or 0.99 < share < 1 else 0}%}".replace("%", "\u00a0%")


def interval(found: Rate) -> str:
    low, high = (f"{100 * bound:.0f}" for bound in found.interval)
    return f"{low}–{high}\u00a0%" if found.n else "–"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}" if p < 0.1 else f"= {p:.2f}"


def grouped(value: int) -> str:
    """Thousands apart."""
    return f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s` or `1 h 4 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
