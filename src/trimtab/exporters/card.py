"""The model card: what was changed, what it does, what it costs, what it does not do, and how to serve it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from jinja2 import Environment, StrictUndefined

from trimtab.adapter import base_of
from trimtab.chat import POSITION_MEANING
from trimtab.errors import ExportError
from trimtab.exporters.plan import folder_of
from trimtab.exporters.verify import in_words
from trimtab.models import ALIASES, Model
from trimtab.run import write
from trimtab.softtoken.artifact import SoftToken


def write_card(
    folder: Path, name: str, model: Model, token: SoftToken, result: dict[str, Any], run: Path | None
) -> None:
    """`README.md`, from the export's record and, if there is one, the run's own figures."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    source = files("trimtab.exporters").joinpath("card.md").read_text(encoding="utf-8")
    check = _read(run, "eval/results.json")
    origin = model.origin.get("id") or model.origin.get("path") or model.origin.get("file", "")
    text = environment.from_string(source).render(
        name=name,
        model=model,
        token=token,
        origin=f"{origin} {model.origin.get('revision', '')}".strip(),
        meaning=POSITION_MEANING[token.position],
        licence="apache-2.0" if model.name in ALIASES else _licence(model),
        exact=" --dtype float32"
        if (result.get("plan") or {}).get("dtype") == "F32"
        else "",  # vLLM would take bfloat16
        base=base_of(model),
        result={"plan": None, **result},
        verified=in_words(result["verified"]) if result["verified"] else "",
        run=_read(run, "manifest.json"),
        check=check,
        rates=_rates(check),
        head_mb=(result.get("plan") or {}).get("table_bytes", 0) / 1e6,
    )
    write(folder / "README.md", text)


def _licence(model: Model) -> str:
    """As the base model's own card has it; empty where it says none."""
    try:
        return str((metadata_load(folder_of(model) / "README.md") or {}).get("license") or "")
    except (OSError, ValueError, ExportError):  # no card, or not one in this form
        return ""


def _rates(check: dict[str, Any]) -> list[dict[str, Any]]:
    """Refusals before and after, by suite and label."""
    if "base" not in check:
        return []
    rows = []
    for suite, found in check["suites"].items():
        for label in ("harmful", "benign"):
            if found.get(label, {}).get("keyword", {}).get("n"):
                after, before = found[label]["keyword"], check["base"]["suites"][suite][label]["keyword"]
                rows.append(
                    {"what": f"{suite}, {label}", "n": after["n"], "before": _share(before), "after": _share(after)}
                )
    return rows


def _share(rate: dict[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{rate['refusal_rate']:.0%} ({low:.0%}-{high:.0%})"


def _read(run: Path | None, name: str) -> dict[str, Any]:
    """A record of the run; empty where there is none."""
    path = run / name if run else None
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path and path.is_file() else {}
