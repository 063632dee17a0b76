"""Several runs side by side: whether they were asked alike, what each refuses, category by category, and what each cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.report.plots import Arm, Rate, rate, suites
from trimtab.report.read import Run
from trimtab.report.words import duration

SMALL = 3  # categories with fewer rows say nothing by themselves


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """In what runs were not measured alike, and so cannot be compared without a second thought."""
    asked = {n: run.results["protocol"] for n, run in enumerate(runs, 1) if run.results.get("protocol")}
    for suite in dict.fromkeys(name for found in asked.values() for name in found["suites"]):
        rows = {n: found["suites"][suite] for n, found in asked.items() if suite in found["suites"]}
        if len({part["digest"] for part in rows.values()}) > 1:
            yield f"{suite} is not the same rows: " + _told(
                {n: f"{part['rows']} of {part['of']}" for n, part in rows.items()}
            )
    lengths = {n: found["max_new_tokens"] for n, found in asked.items()}
    if len(set(lengths.values())) > 1:
        yield f"replies were cut at different lengths, in tokens: {_told(lengths)}"
    judge = shared_judge(runs)
    if without := {n: ", ".join(found["judges"]) for n, found in asked.items() if judge not in found["judges"]}:
        yield f"categories are compared by {judge}, and others judged: {_told(without)}"


def _told(values: Mapping[int, object]) -> str:
    return ", ".join(f"{value} (run {n})" for n, value in values.items())


def heat(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A table for every suite and label that at least two columns share: a row a category, a column for each run, and before them one for each model as it was
    untouched, from the first run that measured it on that suite. `good` is what the colour of a high rate means."""
    judge = shared_judge(runs)
    for suite in dict.fromkeys(name for run in runs for name in suites(run.measured)):
        columns: dict[str, Arm] = {}
        for run in runs:
            before, after = run.arms
            if after and before and suite in suites(before):
                columns.setdefault(f"untouched {run.results['model']}", before)
        columns |= {str(number): run.measured for number, run in enumerate(runs, 1)}
        for label in ("harmful", "benign"):
            cells = {name: found for name, arm in columns.items() if (found := _by_category(arm, suite, label, judge))}
            categories = sorted({category for found in cells.values() for category in found})
            if len(cells) > 1 and len(categories) > 1:
                yield {
                    "suite": suite,
                    "label": label,
                    "good": label == "harmful",
                    "columns": list(cells),
                    "rows": [(name, [found.get(name) for found in cells.values()]) for name in categories],
                }


def shared_judge(runs: Sequence[Run]) -> str:
    """The judge that all cells of a comparison are by: that of the first run that measured anything."""
    return next((run.judge for run in runs if run.measured), "keyword")


def costs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each run cost: training and measuring, memory, and the tokens of judges that are models."""
    found = []
    for run in runs:
        trained, measured = (run.manifest or {}).get("cost", {}), run.results.get("cost", {})
        judging = run.results.get("judging", {}).values()
        read, written = (sum(cost[what] for cost in judging) for what in ("prompt_tokens", "completion_tokens"))
        found.append(
            {
                "trained": duration(trained["seconds"]) if trained else "",
                "measured": duration(measured["seconds"]) if measured else "",
                "memory": max(cost.get("peak_memory_gb", 0.0) for cost in (trained, measured)),
                "judged": f"{read:,} + {written:,}" if judging else "",
                "device": trained.get("device") or measured.get("device", ""),
            }
        )
    return found


def _by_category(arm: Arm, suite: str, label: str, judge: str) -> dict[str, Rate]:
    """Refusal rates of one suite and label, by category; those of a row or two together."""
    categories = suites(arm).get(suite, {}).get(label, {}).get("categories", {})
    rates = {name: found for name in categories if (found := rate(arm, suite, label, "categories", name, judge))}
    small = [name for name, found in rates.items() if found.n + found.unscored < SMALL]
    if len(small) > 1:
        counts = zip(*(rates.pop(name) for name in small), strict=True)
        rates[f"{len(small)} small ones"] = Rate(*map(sum, counts))
    return {name: found for name, found in rates.items() if found.n}
