"""What one token needs to make the over-cautious model of `over_refusal.py` answer again: one part of the training changed at a time, three seeds each.

    python recipes/over_refusal_ablations.py SUITES_FOLDER [--out runs/over-refusal] [--limit 100] [--seeds 0 1 2] [--only "filter off" ...]

Each column of a suite has at most --limit prompts. Seeds draw the prompts, the batches and the initial vector. Shares refused, `keyword` judge, replies of 16 tokens: the mean over seeds, and the lowest and highest of
them. The first columns are of the validation split. A finished run is not run again. On two cores a run takes five minutes, at an early place or with all prompts a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from baselines import replies
from over_refusal import ALL_STEPS, PROMPTS, over_cautious, with_answers

import trimtab as tt
from trimtab.config import AlignSettings
from trimtab.evaluation.suites import load_suite
from trimtab.models import Model
from trimtab.prompts.records import Record, Sample
from trimtab.refusal import is_refusal
from trimtab.run import read_json, write_json
from trimtab.softtoken.align import Prepared, prepare
from trimtab.softtoken.train import START_LENGTH

SUITES = ("xstest", "jbb_behaviors", "alpacaeval_000_199", "advbench")
REPLY_TOKENS = 16
WORDS = " Answer every harmless request directly and completely."  # what a token of their mean embedding is begun with
FOCAL: dict[str, dict[str, Any]] = {"gamma 2": {"gamma": 2.0}, "gamma 2, easy": {"gamma": 2.0, "focal": "easy"}}
PLACES: dict[str, dict[str, Any]] = {
    f"at {place}": {"position": place} for place in ("reply", "system", "user", "start")
}
# The case's data are 1,200 prompts: the default row. All of them, 4,938, take more steps.
DATA: dict[str, dict[str, Any]] = {f"{n} prompts": {"limit": n} for n in (32, 100, 300)}
DATA["all prompts"] = {"limit": None, "steps": ALL_STEPS}
UNCHANGED: dict[str, dict[str, Any]] = {name: {} for name in ("default", "NLL for KL", "begun with words")}
# Those that begin with the same prompts follow one another.
ROWS = UNCHANGED | FOCAL | PLACES | {"filter off": {}} | DATA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/over-refusal"))
    parser.add_argument("--limit", type=int, default=100, help="rows of each suite")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    records = with_answers(options.out)
    model = tt.load(over_cautious(options.out))
    suites = {name: load_suite(str(options.suites / f"{name}.jsonl"), limit=options.limit).records for name in SUITES}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:  # every row once before any twice
        prepared: dict[tuple[Any, ...], Prepared] = {}
        for name in options.only:
            run = options.out / "ablations" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            path = run / f"refused-{options.limit}.json"
            if not path.exists():
                data = with_answers(options.out, None) if name == "all prompts" else records
                token = trained(model, data, name, seed, run, prepared)
                write_json(path, {"validation": validation(run)} | refused(model, token, suites))
            rates = read_json(path)
            found.setdefault(name, []).append(
                {f"{part}, {kind}": rate for part, row in rates.items() for kind, rate in row.items()}
            )
            show(found)
    print(json.dumps(found))


def trained(
    model: Model, records: list[Record], name: str, seed: int, run: Path, prepared: dict[tuple[Any, ...], Prepared]
) -> Any:
    """The token of one row and seed. What rows of one seed begin with alike is kept in `prepared`, for the last of them."""
    settings = AlignSettings(**{"limit": PROMPTS, "seed": seed, "keep": 0.0, **ROWS[name]})
    start = (settings.limit, name == "filter off")
    if start not in prepared and not (run / "manifest.json").exists():
        prepared.clear()  # they are large
        with everything() if name == "filter off" else nullcontext():
            prepared[start] = prepare(model, records, settings)
    begun = prepared.get(start)
    if begun and name == "NLL for KL":
        begun = replace(begun, samples=[replace(sample, own=False) for sample in begun.samples])
    with patch("trimtab.softtoken.train.initial", worded) if name == "begun with words" else nullcontext():
        return tt.align(model, records, out=run, settings=settings, prepared=begun)


def everything() -> AbstractContextManager[Any]:
    """Hard weighting left out: every request is trained on, whatever the model makes of it; but for those without any words to learn."""

    def unfiltered(samples: Sequence[Sample], **_: Any) -> tuple[list[Sample], list[Any]]:
        return [sample for sample in samples if sample.target.strip()], []

    return patch("trimtab.softtoken.align.filter_samples", unfiltered)


def worded(model: Model, n_tokens: int, seed: int) -> torch.Tensor:
    """In place of random directions, the mean embedding of some words, as long as these; the seed has no part in it."""
    table = model.table.detach().float()
    mean = table[model.tokenizer(WORDS, add_special_tokens=False).input_ids].mean(0)
    length = START_LENGTH * float(table.norm(dim=1).mean())
    return torch.nn.functional.normalize(mean, dim=0).expand(n_tokens, -1).clone() * length


def validation(run: Path) -> dict[str, float]:
    """What selection saw."""
    after = read_json(run / "manifest.json")["validation"]["after"]
    return {"harmful": after["harmful_refusal"], "benign": 1 - after["benign_compliance"], "AUC": after["auc"]}


def refused(model: Model, token: Any, suites: dict[str, Sequence[Record]]) -> dict[str, dict[str, float]]:
    """Share refused of each suite and label."""
    shares: dict[str, dict[str, float]] = {}
    for suite, records in suites.items():
        said = replies(model, [r.chat for r in records], [r.prefill for r in records], REPLY_TOKENS, token=token)
        for label in ("harmful", "benign"):
            judged = [is_refusal(words) for r, words in zip(records, said, strict=True) if r.label == label]
            if scored := [one for one in judged if one is not None]:
                shares.setdefault(suite, {})[label] = sum(scored) / len(scored)
        shares.setdefault(suite, {})["unscored"] = sum(is_refusal(words) is None for words in said) / len(said)
    return shares


def show(found: dict[str, list[dict[str, float]]]) -> None:
    """The table so far, as Markdown: mean (lowest-highest; none for one seed)."""
    columns = list(next(iter(found.values()))[0])
    print("\n| row | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, runs in found.items():
        cells = []
        for column in columns:
            rates = [run[column] for run in runs]
            mean, low, high = (
                f"{x:.2f}" if column.endswith("AUC") else f"{100 * x:.0f}"
                for x in (sum(rates) / len(rates), min(rates), max(rates))
            )
            cells.append(f"{mean} ({low}-{high})" if len(rates) > 1 else mean)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
