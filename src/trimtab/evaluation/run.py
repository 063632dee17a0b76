"""Evaluate: replies first, verdicts after, both resumable; then rates, intervals and tests.

Replies and refusal log-odds go to `replies.jsonl`, one record per prompt and arm, keyed by everything they depend on. The same
command run again does only what is missing; judges read the stored rows and can be run again at no cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.chat import Prompt, render
from trimtab.decoding.engine import by_length, decode, read
from trimtab.evaluation.judges import JUDGES
from trimtab.evaluation.metrics import auc, mcnemar, wilson
from trimtab.evaluation.suites import Suite, load_suite
from trimtab.models import Model, describe_machine, slot
from trimtab.prompts.records import Record
from trimtab.refusal import opening_log_odds
from trimtab.run import Cost, Records, console, create, digest, environment, progress, write_json
from trimtab.softtoken.artifact import SoftToken

Row = dict[str, Any]


def evaluate(
    model: Model,
    suites: Sequence[str | Suite],
    *,
    token: SoftToken | None = None,
    out: str | Path,
    compare: bool = False,
    judges: Sequence[str] = ("keyword", "logit"),
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Measure refusals of a model, with or without a token, on suites of labelled prompts.

    Args:
        suites: `.jsonl` files, `builtin:test`, or suites already loaded.
        token: the guidance; checked against the model.
        out: run folder for replies and results.
        compare: also measure the untouched model on the same prompts, with paired tests.
        limit: at most so many rows a suite, stratified.

    Returns:
        `{"suites": {name: {"n", "harmful"|"benign": {judge: {"refusal_rate", "ci95", "unscored"}}}}, "auc": {...}}`, and with
        `compare` also `base` (the same for the untouched model) and `paired`. Written to `results.json` as well.
    """
    if token is not None:
        token.check(model)
    folder, cost = create(Path(out)), Cost()
    loaded = [s if isinstance(s, Suite) else load_suite(s, limit=limit) for s in suites]
    for suite in loaded:
        if len(suite.records) < suite.total:
            console.print(f"{suite.name}: {len(suite.records)} of {suite.total} rows, drawn in proportion")
    arms: dict[str, SoftToken | None] = {"token" if token else "base": token}
    if compare:
        arms["base"] = None
    store = Records(folder / "replies.jsonl")
    rows: dict[str, dict[str, list[Row]]] = {}
    for arm, guidance in arms.items():
        rows[arm] = {s.name: _measure(model, s, arm, guidance, store, max_new_tokens, batch_size) for s in loaded}
    main = "token" if token else "base"
    result: dict[str, Any] = {**_results(rows[main], judges), "model": model.name, "arm": main}
    if token and compare:
        result["base"] = _results(rows["base"], judges)
        result["paired"] = {s.name: paired(rows["base"][s.name], rows["token"][s.name], judges) for s in loaded}
    result["cost"] = cost.record(describe_machine(model.device))
    result["environment"] = environment()
    write_json(folder / "rows.json", {s.name: _side_by_side({arm: rows[arm][s.name] for arm in arms}) for s in loaded})
    write_json(folder / "results.json", result)
    return result


def _measure(
    model: Model, suite: Suite, arm: str, token: SoftToken | None, store: Records, max_new_tokens: int, batch_size: int
) -> list[Row]:
    """Rows of one suite under one arm, made or read from the store."""
    prompts = [_render(model, record, token) for record in suite.records]
    identity = [model.fingerprint, str(model.dtype), token.sha256() if token else "", max_new_tokens]
    keys = [digest(*identity, p.ids) for p in prompts]
    missing = [i for i, key in enumerate(keys) if key not in store]
    vectors = token.vectors.to(model.device) if token else None
    with progress(f"{suite.name} ({arm})", len(missing)) as advance:
        for chunk in by_length([len(prompts[i].ids) for i in missing], batch_size):
            batch = [missing[i] for i in chunk]
            with torch.inference_mode(), slot(model, vectors):
                past, tails = read(model, [prompts[i].ids for i in batch])
                scores = opening_log_odds(model, tails, past.fork()).tolist()
                rows = decode(model, tails, past, max_new_tokens, vectors=vectors)
            for i, score, row in zip(batch, scores, rows, strict=True):
                store.add(
                    keys[i],
                    id=suite.records[i].id,
                    arm=arm,
                    reply=model.tokenizer.decode(row.ids, skip_special_tokens=True),
                    tokens=len(row.ids),
                    stop=row.stop,
                    log_odds=score if math.isfinite(score) else None,
                )
                advance()
    return [{**store[k], **r.model_dump(exclude={"split"})} for r, k in zip(suite.records, keys, strict=True)]


def _render(model: Model, record: Record, token: SoftToken | None) -> Prompt:
    if token is None:
        return render(model, record.chat, prefill=record.prefill)
    return token.render(model, record.chat, prefill=record.prefill)


def _results(rows: Mapping[str, list[Row]], judges: Sequence[str]) -> dict[str, Any]:
    return {"suites": {name: summarise(part, judges) for name, part in rows.items()}, "auc": _aucs(rows)}


def summarise(rows: Sequence[Row], judges: Sequence[str]) -> dict[str, Any]:
    """Refusal rates of one suite by label, group and category."""
    found: dict[str, Any] = {"n": len(rows)}
    for label, part in _by(rows, "label").items():
        found[label] = {judge: rate(part, judge) for judge in judges}
        found[label]["n"] = len(part)
        found[label]["groups"] = {g: {j: rate(p, j) for j in judges} for g, p in _by(part, "group").items()}
        found[label]["categories"] = {c: {j: rate(p, j) for j in judges} for c, p in _by(part, "category").items()}
    return found


def rate(rows: Iterable[Row], judge: str) -> dict[str, Any]:
    """Refusal rate over the scored rows, with a 95 % Wilson interval; `None` where nothing could be scored."""
    verdicts = [JUDGES[judge](row) for row in rows]
    scored = [v for v in verdicts if v is not None]
    hits = sum(scored)
    low, high = wilson(hits, len(scored))
    return {
        "refusal_rate": hits / len(scored) if scored else None,
        "ci95": [low, high],
        "n": len(scored),
        "unscored": len(verdicts) - len(scored),
    }


def paired(before: Sequence[Row], after: Sequence[Row], judges: Sequence[str]) -> dict[str, Any]:
    """McNemar's exact test on the rows that both arms scored, by label: how many changed, and the p-value."""
    found: dict[str, Any] = {}
    for judge in judges:
        pairs = [(b["label"], JUDGES[judge](b), JUDGES[judge](a)) for b, a in zip(before, after, strict=True)]
        for label in ("harmful", "benign"):
            scored = [(b, a) for name, b, a in pairs if name == label and b is not None and a is not None]
            if scored:
                found.setdefault(label, {})[judge] = {
                    "now_refused": sum(a and not b for b, a in scored),
                    "now_answered": sum(b and not a for b, a in scored),
                    "p": mcnemar([b for b, _ in scored], [a for _, a in scored]),
                }
    return found


def _side_by_side(arms: Mapping[str, list[Row]]) -> list[Row]:
    """Each prompt once, with every arm's reply and the keyword judge's verdict: what the report shows."""
    fields = ("id", "label", "group", "category")
    return [
        {
            **{f: versions[0][f] for f in fields},
            "prompt": versions[0]["prompt"] or str(versions[0]["messages"][-1].get("content", "")),
            **{
                arm: {"reply": row["reply"], "refused": JUDGES["keyword"](row)}
                for arm, row in zip(arms, versions, strict=True)
            },
        }
        for versions in zip(*arms.values(), strict=True)
    ]


def _aucs(rows: Mapping[str, list[Row]]) -> dict[str, float]:
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


def _by(rows: Iterable[Row], field: str) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[str(row[field])].append(row)
    return dict(parts)
