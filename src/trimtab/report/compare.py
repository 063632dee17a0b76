"""Several runs side by side: what each refuses, category by category, and what each cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.report.plots import Arm, Rate, rate, suites
from trimtab.report.read import Run
from trimtab.report.words import duration


def heat(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A table for every suite and label that at least two columns share: a row a category, a column for each run, and one before them for each model as it was
    untouched. `good` is what the colour of a high rate means."""
    columns: dict[str, tuple[Arm, str]] = {}
    for number, run in enumerate(runs, 1):
        before, after = run.arms
        if before and after:
            columns.setdefault(f"untouched {run.results['model']}", (before, run.judge))
        columns[str(number)] = (run.measured, run.judge)
    columns = dict(
        sorted(columns.items(), key=lambda column: column[0].isdigit())
    )  # a stable sort: the untouched first
    names = dict.fromkeys(name for arm, _ in columns.values() for name in suites(arm))
    for suite in names:
        for label in ("harmful", "benign"):
            cells = {name: _by_category(arm, suite, label, judge) for name, (arm, judge) in columns.items()}
            cells = {name: found for name, found in cells.items() if found}
            categories = sorted({category for found in cells.values() for category in found})
            if len(cells) > 1 and len(categories) > 1:
                yield {
                    "suite": suite,
                    "label": label,
                    "good": label == "harmful",
                    "columns": list(cells),
                    "rows": [(name, [found.get(name) for found in cells.values()]) for name in categories],
                }


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
                "memory": max((cost.get("peak_memory_gb", 0.0) for cost in (trained, measured)), default=0.0),
                "judged": f"{read:,} + {written:,}" if judging else "",
                "device": trained.get("device") or measured.get("device", ""),
            }
        )
    return found


def _by_category(arm: Arm, suite: str, label: str, judge: str) -> dict[str, Rate]:
    """Refusal rates of one suite and label, by category; those with a scored row."""
    categories = suites(arm).get(suite, {}).get(label, {}).get("categories", {})
    rates = {name: rate(arm, suite, label, "categories", name, judge) for name in categories}
    return {name: found for name, found in rates.items() if found and found.n}
