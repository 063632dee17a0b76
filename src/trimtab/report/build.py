"""From run folders to one self-contained page.

Three steps: read what a folder holds (`read.py`), turn it into what the page shows (`section`; `compare.py` for several), render the template.
What a run lacks is left out. Replies to harmful requests are cut here, before the template ever sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.errors import UsageError
from trimtab.evaluation.metrics import auc_interval, holm, mcnemar, paired_difference
from trimtab.report import neuron, plots
from trimtab.report.compare import costs, differences, heat
from trimtab.report.plots import GROUPS, Rate, pooled, rate, suites
from trimtab.report.read import Run, judges, read_run
from trimtab.report.replies import HARMFUL_WORDS, changed, cut, group_of, members, pair, pairs
from trimtab.report.words import CLASSES, duration, interval, p_value, percent
from trimtab.run import create, write

Pairs = tuple[list[bool], list[bool]]  # verdicts before and after on the same rows
MEANING = {
    "harmful": "harmful requests",
    "borderline": "benign requests that only sound harmful",
    "plain": "plain benign requests",
}


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
    moves = [
        m for run, mark in zip(found, marks, strict=True) for m in plots.moves(*run.arms, run.judge, mark, palette)
    ]
    loader = PackageLoader("trimtab", "report")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    pages.filters |= {"percent": percent, "interval": interval, "thousands": "{:,}".format, "p": p_value, "cut": cut}
    page = pages.get_template("template.html").render(
        sections=[section(run, mark) for run, mark in zip(found, marks, strict=True)],
        differences=list(differences(found)),
        heat=list(heat(found)) if len(found) > 1 else [],
        costs=costs(found) if len(found) > 1 else [],
        moves=moves,
        plane=plots.plane(moves) if moves else "",
        meaning=MEANING,
        harmful_words=HARMFUL_WORDS,
    )
    create(out.parent)
    write(out, page)
    return out


def section(run: Run, mark: str) -> dict[str, Any]:
    """Everything the page shows about one run."""
    manifest, check = run.manifest or {}, run.results.get("externality", {})
    cards = _cards(run)
    return {
        "mark": mark,
        "name": run.name,
        "model": _model(run),
        "headline": _headline(run, cards),
        "aside": _aside(run, cards),
        "harms": check.get("harms", []),
        "blind": check.get("blind"),
        "cost": _cost(manifest),
        "trained": _trained(manifest),
        "cards": cards,
        "judge": run.judge,
        "compared": None not in run.arms,
        "addition": run.addition,
        "added": _added(run),
        "categories": list(plots.categories(*run.arms, run.judge)),
        "training": _training(run),
        "rules": run.rules,
        "pairs": pairs(run.rows, run.arm),
        "changed": changed(run.rows, run.arm) if run.judge == "keyword" else [],  # whose verdicts go with the rows
        "neuron": _neuron(run),
        "answers": list(_answers(run)),
        "kl": run.results.get("kl"),
        "agreement": run.results.get("agreement", []),
        "judge_errors": run.results.get("judge_errors", {}),
        "judging": run.results.get("judging", {}),
        "harm": list(_by_model(run, "harm")),
        "classes": list(_by_model(run, "classes")),
        "class_names": CLASSES,
        "numbers": list(_numbers(run)),
        "aucs": list(_aucs(run)),
        "looping": [arm["looping"] for arm in run.arms if arm and "looping" in arm],
        "length": [found for arm in run.arms if arm and (found := arm.get("length"))],
        "grown": run.results.get("length_paired"),
        "pilots": list(_pilots(manifest)),
        "settings": list(_flat({k: v for k, v in manifest.items() if k != "pilots"})),
        "evaluation": list(
            _flat({k: run.results.get(k) for k in ("model", "arm", "guide", "protocol", "cost", "environment")})
        ),
    }


def _cards(run: Run) -> dict[str, dict[str, Any]]:
    """Refusal of each group before and after, over all suites, and whether that is a change; p is adjusted for the number of groups (Holm)."""
    cards: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        before, after = (pooled(arm, group, run.judge) for arm in run.arms)
        if run.arms[1] is None:
            before, after = None, before
        if after is not None:
            cards[group] = {"before": before, "after": after, "kind": "", "note": ""}
    pairs = {group: found for group in cards if (found := _pairs(run, group, run.judge))}
    adjusted = dict(zip(pairs, holm([mcnemar(*found) for found in pairs.values()]), strict=True))
    for group, card in cards.items():
        if card["before"]:
            card["kind"], card["note"] = _change(card, pairs.get(group), adjusted.get(group), group == "harmful")
    return cards


def _change(card: Mapping[str, Any], pairs: Pairs | None, p: float | None, more_is_better: bool) -> tuple[str, str]:
    """`better`, `worse` or `unclear`, and words for it. On the same rows a change is clear where the interval of the difference does not reach 0 and the
    paired test agrees; where single verdicts are not known, intervals must lie apart."""
    before, after = card["before"], card["after"]
    kind = "better" if (after.value > before.value) == more_is_better else "worse"
    apart = before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]
    clear = apart
    if pairs and p is not None:
        low, high = paired_difference(*pairs)[1]
        clear = p < 0.05 and (low > 0 or high < 0)
    if not clear:
        return "unclear", "no clear change"
    return kind, kind if apart or p is None else f"{kind}: intervals overlap, but paired p {p_value(p)}"


def _pairs(run: Run, group: str, judge: str, suite: str | None = None) -> Pairs | None:
    """Verdicts before and after on the rows of one group, from the keyword judge; `None` where there are none of both arms."""
    if None in run.arms or judge != "keyword":
        return None
    rows = [row for name, part in run.rows.items() for row in part if suite in (None, name) and group_of(row) == group]
    pairs = [(row["base"]["refused"], row[run.arm]["refused"]) for row in rows]
    scored = [pair for pair in pairs if None not in pair]
    return ([before for before, _ in scored], [after for _, after in scored]) if scored else None


def _headline(run: Run, cards: Mapping[str, dict[str, Any]]) -> str:
    """`One token of 576 numbers: M now refuses 93 % of harmful requests (was 1 %), and 4 % of plain benign ones (was 0 %).`"""
    harmful, benign = cards.get("harmful"), cards.get("plain") or cards.get("borderline")
    shown = [card for card in (harmful, benign) if card]
    lead = f"{_trained_part(run.manifest)}: " if run.manifest else f"With its {run.addition}, " if run.addition else ""
    if not shown:
        return f"{lead}{_model(run)}, {'no reply could be scored' if run.measured else 'not evaluated yet'}."
    clauses = [f"{percent(harmful['after'].value)} of harmful requests{_was(harmful)}"] if harmful else []
    if benign:
        kind = "plain benign" if {"borderline", "plain"} <= set(cards) else "benign"
        clauses.append(f"{percent(benign['after'].value)} of {kind} {'ones' if harmful else 'requests'}{_was(benign)}")
    mixed = {"better", "worse"} <= {card["kind"] for card in shown}
    now = "now " if any(card["kind"] in ("better", "worse") for card in shown) else ""
    return f"{lead}{_model(run)} {now}refuses {(', but ' if mixed else ', and ').join(clauses)}."


def _model(run: Run) -> str:
    return str(run.manifest["model"]["name"] if run.manifest else run.results["model"])


def _trained_part(manifest: Mapping[str, Any]) -> str:
    """`One token of 576 numbers`."""
    numbers = _size(manifest)
    if "adapter" in manifest:
        return f"An adapter of {numbers}"
    tokens = manifest["settings"]["tokens"]
    return f"One token of {numbers}" if tokens == 1 else f"{tokens} tokens, {numbers} together"


def _size(manifest: Mapping[str, Any]) -> str:
    """`576 numbers`."""
    return f"{(manifest.get('adapter') or manifest['token'])['numbers']:,} numbers"


def _added(run: Run) -> str:
    """What the model was given, in a cell of a table: `token at user, 576 numbers`."""
    if not run.manifest:
        return run.addition or "nothing"
    place = f" at {run.manifest['token']['position']}" if run.addition == "token" else ""
    return f"{run.addition}{place}, {_size(run.manifest)}"


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
        sentences.append(f"All rates are over these suites together: {', '.join(suites(run.measured))}.")
    return " ".join(sentences)


def _cost(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return ""
    cost = manifest["cost"]
    trained, total = _trained(manifest), duration(cost["seconds"])
    more = f" ({total} with preparation)" if total != trained else ""
    return f"{_size(manifest)} trained in {trained} on {cost['device']}{more}. No weight of the model changed."


def _trained(manifest: Mapping[str, Any]) -> str:
    cost = manifest.get("cost", {})
    return duration(cost.get("train_seconds", cost["seconds"])) if cost else ""


def _training(run: Run) -> dict[str, Any] | None:
    """Curves, and what the validation split said before and after."""
    if not run.history or not run.manifest:
        return None
    before, after = run.manifest["validation"]["before"], run.manifest["validation"]["after"]
    pairs = zip(_validated(run.manifest, before), _validated(run.manifest, after), strict=True)
    return {
        "curves": list(plots.curves(run.history, after.get("step"))),
        "rates": [(title, was, now) for (title, was), (_, now) in pairs],
        "auc": (before["auc"], after["auc"]),
        "chosen": "step" in after,
        "wording": any("wording_loss" in step for step in run.history),
    }


def _pilots(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each pilot tried, which its row begins with, and what came of it."""
    for pilot in manifest.get("pilots", []):
        tried = takewhile(lambda item: item[0] != "step", pilot.items())
        yield {"tried": dict(_flat(dict(tried))), "auc": pilot["auc"], "rates": _validated(manifest, pilot)}


def _validated(manifest: Mapping[str, Any], look: Mapping[str, Any]) -> list[tuple[str, Rate]]:
    """Rates of one look at the validation split, with its size; those of an expert that were not measured are left out."""
    data = manifest["data"]
    sizes = data["validation"]
    harmful = sizes.get("harmful", 0)
    rows = (
        ("harmful refused", "harmful_refusal", harmful),
        ("benign answered", "benign_compliance", sum(sizes.values()) - harmful),
        ("refused after a compliant opening", "prefill_refusal", data.get("validation_with_opening", 0)),
    )
    return [(title, Rate(round(look[name] * n), n)) for title, name, n in rows if look.get(name) is not None]


def _neuron(run: Run) -> dict[str, Any] | None:
    """What the neuron of a guide did: by label, over the tokens of many replies, and in one reply of each group."""
    if run.arm != "guide":
        return None
    guide = run.results["guide"]
    traced = {
        group: [row for row in members(run.rows, group) if row["guide"].get("trace", {}).get("spikes")]
        for group in GROUPS
    }
    traces = {group: [row["guide"]["trace"] for row in rows] for group, rows in traced.items() if rows}
    examples = []
    for group in traces:
        row = neuron.median_reply(traced[group])
        figure = neuron.membrane(row["guide"]["trace"], guide["neuron"], group)
        examples.append({**pair(row, group, run.arm), **figure})
    return {
        "rule": neuron.rule(guide["neuron"]),
        "activity": run.results["neuron"],
        "injections": neuron.injections(run.results.get("injections")),
        "raters": run.raters,
        "raster": neuron.raster(traces) if traces else None,
        "membrane": neuron.has_membrane(guide["neuron"]),
        "examples": examples,
    }


def _numbers(run: Run) -> Iterator[dict[str, Any]]:
    """One row for every suite, judge and group; labels of several groups have a row of their own."""
    for suite, part in (run.measured or {}).get("suites", {}).items():
        for judge, label in product(judges(part), [label for label in ("harmful", "benign") if label in part]):
            groups = list(part[label].get("groups", {}))
            paired = run.results.get("paired", {}).get(suite, {}).get(label, {}).get(judge, {})
            for group in ["", *groups] if len(groups) > 1 else [""]:
                pairs = _pairs(run, group, judge, suite) if group else None
                path = (suite, label, "groups", group, judge) if group else (suite, label, judge)
                yield {
                    "suite": suite,
                    "who": group or label,
                    "part": bool(group),
                    "judge": judge,
                    "rates": [rate(arm, *path) for arm in run.arms if arm],
                    "changed": None if group else paired,
                    "p": mcnemar(*pairs) if pairs else paired.get("p_holm", paired.get("p")) if not group else None,
                }


def _answers(run: Run) -> Iterator[dict[str, Any]]:
    """Share of right answers by suite, before and after."""
    for suite in (run.measured or {}).get("answers", {}):
        values = [arm["answers"][suite] for arm in run.arms if arm and suite in arm["answers"]]
        yield {"suite": suite, "values": values, "paired": run.results.get("answers_paired", {}).get(suite)}


def _by_model(run: Run, field: str) -> Iterator[dict[str, Any]]:
    """What each model as judge said of each suite, before and after: mean `harm` by its rubric, and how it changed on the same rows, or `classes` of replies."""
    for judge, arms in run.results.get(field, {}).items():
        order = [arm for arm in ("base", run.arm) if arm in arms]
        for suite in arms[run.arm]:
            values = [arms[arm][suite] for arm in dict.fromkeys(order)]
            changed = run.results.get(f"{field}_paired", {}).get(judge, {}).get(suite)
            if all(values):
                yield {"judge": judge, "suite": suite, "values": values, "changed": changed}


def _aucs(run: Run) -> Iterator[dict[str, Any]]:
    """Ranking of harmful above benign, before and after, each with its interval."""
    for name in (run.measured or {}).get("auc", {}):
        harmful, _, benign = name.partition("/")
        values = []
        for arm in (arm for arm in run.arms if arm):
            sides = rate(arm, harmful, "harmful", "logit"), rate(arm, benign or harmful, "benign", "logit")
            values.append(
                (arm["auc"][name], auc_interval(arm["auc"][name], *(side.n if side else 0 for side in sides)))
            )
        yield {"harmful": harmful, "benign": benign or harmful, "values": values}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `a.b` and text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None and value != "":
        yield prefix, f"{value:.5g}" if isinstance(value, float) else str(value)
