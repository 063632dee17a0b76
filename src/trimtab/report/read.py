"""What a run folder holds, as the report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import RunError
from trimtab.report.plots import Arm, suites
from trimtab.run import existing, read_json


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `manifest`, `history` and `rules` come from `align` or `expert`, `results` and `rows` from `eval`, `raters` from `recipes/raters.py`."""

    name: str
    manifest: dict[str, Any] | None
    history: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    results: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    raters: dict[str, Any]

    @property
    def arm(self) -> str:
        """What was evaluated: `base`, `token` or `guide`; empty where nothing was."""
        return str(self.results.get("arm", ""))

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """Results before (the untouched model) and after (with its token or guide)."""
        if self.arm == "base":
            return self.results, None
        return self.results.get("base"), self.results if self.arm else None

    @property
    def addition(self) -> str:
        """What the model was given: `token`, `adapter` or `guide`; empty for an untouched model."""
        if self.manifest:
            return "adapter" if "adapter" in self.manifest else "token"
        return self.arm if self.arms[1] else ""

    @property
    def measured(self) -> Arm:
        return self.arms[1] or self.arms[0]

    @property
    def judge(self) -> str:
        """The judge of headline and figures: `keyword` where it was asked, as it reads the replies people see."""
        found = [judge for part in suites(self.measured).values() for judge in judges(part)]
        return "keyword" if "keyword" in found or not found else found[0]


def read_run(folder: Path) -> Run:
    """Read a run of `align` or `expert` (with its evaluation in `eval/`, if any) or of `eval`.

    Raises:
        PathError: no such folder. RunError: it is neither, or a file in it is damaged.
    """
    existing(folder)

    def part(path: Path, empty: Any) -> Any:
        value = read_json(path) if path.exists() else empty
        if not isinstance(value, type(empty)):
            raise RunError(f"{path} is damaged: it holds no {type(empty).__name__}.", "Run the same command again.")
        return value

    manifest = part(folder / "manifest.json", {})
    evaluation = folder / "eval" if manifest else folder
    if results := part(evaluation / "results.json", {}):
        results |= part(evaluation / "cost.json", {})
    if not manifest and not {"suites", "arm", "model"} <= set(results):
        raise RunError(
            f"{folder} is no finished run: it holds neither manifest.json nor results.json.",
            "Give a folder of `trimtab align`, `expert` or `eval`; a run that was stopped goes on when it is started again.",
        )
    rows = part(evaluation / "rows.json", {}) if results else {}
    return Run(
        name=folder.resolve().name,
        manifest=manifest or None,
        history=part(folder / "history.json", []),
        rules=part(folder / "filter.json", []),
        results=results,
        rows={name: rows[name] for name in suites(results) if name in rows} if results else {},
        raters=part(evaluation / "raters.json", {}),
    )


def judges(part: Mapping[str, Any]) -> list[str]:
    """The judges of one suite's results."""
    found = {**part.get("harmful", {}), **part.get("benign", {})}
    return [name for name, value in found.items() if isinstance(value, dict) and "refusal_rate" in value]
