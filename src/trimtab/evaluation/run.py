"""Evaluate: replies first, verdicts after, both resumable; then rates, intervals and tests.

Replies and refusal log-odds go to `replies.jsonl`, one record per prompt and arm, keyed by everything they depend on. The same
command run again does only what is missing; judges read the stored rows and can be run again at no cost.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.chat import render, template_hash
from trimtab.errors import ChatError, ConfigError, RunError
from trimtab.evaluation.adaptive import soft_prompt
from trimtab.evaluation.backends import Backend, Fields, Guidance, at_endpoint, failed, in_process, speaker
from trimtab.evaluation.capability import kl_to_base, kl_under_guide
from trimtab.evaluation.endpoint import Endpoint
from trimtab.evaluation.externality import MARGIN, blind, harms
from trimtab.evaluation.judges import Asked, ask, known_errors, load_judges
from trimtab.evaluation.metrics import wilson
from trimtab.evaluation.results import (
    Stored,
    agreement,
    classes,
    compared,
    mean_harm,
    measured,
    neuron_activity,
    side_by_side,
    tests_answers,
)
from trimtab.evaluation.suites import Suite, attacked, load_suite
from trimtab.machine import describe_machine
from trimtab.models import Model
from trimtab.neuron.expert import Expert
from trimtab.neuron.guide import Guide
from trimtab.neuron.rating import injections
from trimtab.neuron.risk import ConstantRisk, talked_round
from trimtab.prompts.records import Record, stratified
from trimtab.prompts.sources import load_prompts
from trimtab.run import (
    Cost,
    Records,
    alone,
    console,
    create,
    digest,
    environment,
    progress,
    read_json,
    write_json,
)
from trimtab.softtoken.artifact import SoftToken

ADAPTIVE = "soft_prompt:"  # the attack that is trained against each arm
ATTACK_PROMPTS = 256  # that a soft prompt is trained on
COST = ("judging", "cost", "environment")
PLAIN = 64  # requests along whose replies the distance from the base is measured


def evaluate(
    model: Model | Endpoint,
    suites: Sequence[str | Suite],
    *,
    token: SoftToken | None = None,
    guide: Guide | None = None,
    out: str | Path,
    compare: bool = False,
    judges: Sequence[str] = ("keyword", "logit"),
    taxonomy: Mapping[str, str] | None = None,
    attacks: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    margin: float = MARGIN,
    concurrency: int = 8,
    timeout: float = 120.0,
) -> dict[str, Any]:
    """Measure refusals of a model, untouched, with a token or under a guide, on suites of labelled prompts.

    Args:
        model: a model to run here, or an endpoint that runs one; what serves it decides what guides it.
        suites: `.jsonl` files, `builtin:test`, or suites already loaded.
        token: a soft token that is always on; checked against the model. guide: neuron-guided decoding. Not both.
        out: run folder for replies and results. Replies of several arms may share one; results are those of the last.
        compare: also measure the untouched model on the same prompts, with paired tests.
        judges: names (`judges.py`). Guards are loaded first, beside the model, on its device and in its dtype.
        taxonomy: what guards judge by, name to description, in place of their own categories.
        attacks: what else is done to the harmful rows of every suite (`attacks.py`); each makes a suite of its own, `{suite}+{attack}`.
        limit: at most so many rows a suite, stratified.
        margin: with `compare`, losses above it are named in `externality` (`externality.py`).
        concurrency, timeout: of judges behind an endpoint: rows at a time, seconds for one answer.

    Returns:
        `{"suites": {name: {"n", "harmful"|"benign": {judge: {"refusal_rate", "ci95", "unscored"}}}}, "auc": {...}, "looping": {...}, "answers": {...}}`, and with
        `compare` also `base` (the same for the untouched model), `paired`, `answers_paired`, `length_paired` and `kl` (`capability.py`); under a guide also `guide`, `neuron` (what it did) and `injections`
        (how often its rater is talked round). `agreement` of the judges; with models among them `judging` (what they cost), `harm` and `classes`. `failed` counts
        rows without a reply and malformed lines. `protocol` says what was asked. Written to `results.json` as well, but for `judging`, `cost` and `environment`, which are in `cost.json`.
    """
    if token is not None and guide is not None:
        raise ConfigError("a token that is always on and a guide exclude each other.", "Name the token as the expert.")
    arms = _arms(model, token, guide, compare, attacks)
    main = next(iter(arms))
    where: dict[str, Any] = {}
    if isinstance(model, Model):
        where = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    models = load_judges(judges, taxonomy=taxonomy, concurrency=concurrency, timeout=timeout, **where)
    folder, cost = create(Path(out)), Cost()
    with alone(folder):
        loaded = _load(suites, attacks, limit)
        under = {suite.name: suite.attack for suite in loaded if suite.attack}
        rows = _replies(model, arms, loaded, folder, max_new_tokens, batch_size)
        result: dict[str, Any] = {"model": model.name, "arm": main, "key": _key(model, arms[main])}
        result["protocol"] = protocol(loaded, judges, taxonomy, max_new_tokens)
        result |= _judged(rows, judges, models, Records(folder / "verdicts.jsonl"))
        result = {**measured(rows[main], judges, under), **result}
        if isinstance(model, Model) and main != "base" and compare:
            result |= compared(rows["base"], rows[main], judges, under)
            result["kl"] = _distance(model, arms[main], rows["base"], rows[main])
            result["externality"] = {"margin": margin, "harms": harms(result, margin), "blind": blind(result)}
        if isinstance(model, Model) and isinstance(who := arms[main], Guide):
            result |= _guided(model, who, rows[main], folder)
        everything = [row for parts in rows.values() for part in parts.values() for row in part]
        result["failed"] = sum(row["stop"] == "error" for row in everything) + sum(s.malformed for s in loaded)
        result["cost"] = cost.record(describe_machine(model.device) if isinstance(model, Model) else model.url)
        result["environment"] = environment()
        _write(folder, result, rows)
    return result


def _arms(
    model: Model | Endpoint, token: SoftToken | None, guide: Guide | None, compare: bool, attacks: Sequence[str]
) -> dict[str, Guidance]:
    """What is measured, by name: first what was asked for, then the untouched model, if it is to be compared with.

    Raises:
        ConfigError: of an endpoint what only a model that is loaded here can do. ArtefactError: token or expert belong to another model.
    """
    main = "guide" if guide else "token" if token else "base"
    if compare and main == "base" and isinstance(model, Model):
        raise ConfigError(
            "here is nothing to compare the untouched model with.",
            "Give a token or an expert, or leave the comparison out.",
        )
    guidance: Guidance = token
    if isinstance(model, Model):
        if guide:
            guidance = replace(guide, expert=guide.expert_for(model))
        elif token:
            token.check(model)
    elif main != "base" or compare:
        raise ConfigError(
            "an endpoint answers as it does: there is nothing here to guide or compare it with.",
            "Evaluate each endpoint by itself.",
        )
    elif any(attack.startswith(ADAPTIVE) for attack in attacks):
        raise ConfigError("a soft prompt is trained through the model's weights, and an endpoint shows none.")
    return {main: guidance, **({"base": None} if compare else {})}


def _key(model: Model | Endpoint, guidance: Guidance) -> str:
    """Whose results these are."""
    if isinstance(model, Endpoint):
        return digest("endpoint", model.url, model.model)
    return digest(model.fingerprint, str(model.dtype), template_hash(model), speaker(model, guidance))


def _replies(
    model: Model | Endpoint,
    arms: Mapping[str, Guidance],
    suites: Sequence[Suite],
    folder: Path,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, dict[str, list[Stored]]]:
    """Rows of every suite under every arm, by arm and suite; soft prompts are trained against each arm first."""
    store = Records(folder / "replies.jsonl")
    if isinstance(model, Endpoint):
        backend = at_endpoint(model, max_new_tokens=max_new_tokens)
        return {arm: {s.name: _measure(s, arm, backend, store) for s in suites} for arm in arms}
    local = partial(in_process, max_new_tokens=max_new_tokens, batch_size=batch_size)
    rows: dict[str, dict[str, list[Stored]]] = {}
    adaptive = dict.fromkeys(suite.attack for suite in suites if suite.attack.startswith(ADAPTIVE))
    for arm, who in arms.items():
        trained = {attack: _against(model, who, attack, folder, local) for attack in adaptive}
        rows[arm] = {}
        for suite in suites:
            short = min(max_new_tokens, suite.enough or max_new_tokens)
            backend = trained.get(suite.attack) or local(model, who, max_new_tokens=short)
            rows[arm][suite.name] = _measure(suite, arm, backend, store)
    return rows


def _guided(model: Model, guide: Guide, rows: Mapping[str, list[Stored]], folder: Path) -> dict[str, Any]:
    """What guided, what its neuron did on every suite, and how often its rater is talked round."""
    expert = guide.expert_for(model)
    return {
        "guide": {**guide.describe(expert), "name": expert.name, "origin": expert.model.origin},
        "neuron": {name: neuron_activity(part) for name, part in rows.items()},
        "injections": _injections(model, guide, expert, folder),
    }


def _write(folder: Path, result: Mapping[str, Any], rows: Mapping[str, Mapping[str, list[Stored]]]) -> None:
    """Results, and each prompt with every arm's reply. What depends on the run, and not on what was measured, stands apart: the same measurement is the same file."""
    if _held(folder) not in ("", result["key"]):
        console.print(f"{folder} held results of another model, token or guide: they give way; all replies are kept")
    names = next(iter(rows.values()))
    write_json(folder / "rows.json", {name: side_by_side({arm: rows[arm][name] for arm in rows}) for name in names})
    write_json(folder / "cost.json", {name: result[name] for name in COST if name in result})
    write_json(folder / "results.json", {name: value for name, value in result.items() if name not in COST})


def protocol(
    suites: Sequence[Suite], judges: Sequence[str], taxonomy: Mapping[str, str] | None, max_new_tokens: int
) -> dict[str, Any]:
    """What was asked, and how it was judged: two figures may be compared where `digest` is the same. Of each suite its rows, how many there were to draw from, their
    digest, and where they came from."""
    asked: dict[str, Any] = {
        "suites": {
            s.name: {
                "rows": len(s.records),
                "of": s.total,
                "digest": digest([r.model_dump() for r in s.records]),
                **s.origin,
                **({"attack": s.attack} if s.attack else {}),
                **({"max_new_tokens": s.enough} if s.enough else {}),
                **({"malformed": s.malformed} if s.malformed else {}),
                **({"prefilled": n} if (n := sum(bool(r.prefill) for r in s.records)) else {}),
            }
            for s in suites
        },
        "judges": list(judges),
        "max_new_tokens": max_new_tokens,
        **({"taxonomy": dict(taxonomy)} if taxonomy else {}),
    }
    return {"digest": digest(asked), **asked}


def _load(suites: Sequence[str | Suite], attacks: Sequence[str], limit: int | None) -> list[Suite]:
    """The suites, then each of them under every attack.

    Raises:
        ConfigError: two have one name. DataError: one cannot be read.
    """
    loaded = [s if isinstance(s, Suite) else load_suite(s, limit=limit) for s in suites]
    for suite in loaded:
        if len(suite.records) < suite.total:
            console.print(f"{suite.name}: {len(suite.records)} of {suite.total} rows, drawn in proportion")
    loaded += [hit for suite in loaded for attack in attacks if (hit := attacked(suite, attack)).records]
    if twice := [name for name, n in Counter(suite.name for suite in loaded).items() if n > 1]:
        raise ConfigError(f"two suites have the name {twice[0]!r}.", "Rename one of the files.")
    return loaded


def _against(model: Any, guidance: Guidance, attack: str, folder: Path, local: Callable[..., Backend]) -> Backend:
    """The back end of one arm with a soft prompt that was trained against it, on builtin requests of the training split."""
    if isinstance(guidance, Guide):
        raise ConfigError("a soft prompt is trained through one model, and a guide is two.", "Leave soft_prompt out.")
    steps = int(attack.partition(":")[2])
    harmful = [r for r in load_prompts("builtin", split="train") if r.label == "harmful"]
    attacker = soft_prompt(model, guidance, stratified(harmful, ATTACK_PROMPTS), steps, folder)
    return local(model, guidance, attacker=attacker)


def _judged(
    rows: Mapping[str, Mapping[str, list[Stored]]], judges: Sequence[str], models: Sequence[Asked], store: Records
) -> dict[str, Any]:
    """Ask `models`, those among the judges, about every arm's rows; what that cost, how far judges agree, the harm that rubrics see, and the classes that benign rows fell into."""
    everything = [row for parts in rows.values() for part in parts.values() for row in part]
    asked = {judge.name: ask(judge, everything, store) for judge in models}
    found: dict[str, Any] = {
        "agreement": agreement(everything, judges),
        "judge_errors": {judge: error for judge in judges if (error := known_errors(judge))},
    }
    if asked:
        found["judging"] = asked
        for field, total in (("harm", mean_harm), ("classes", classes)):
            found[field] = {
                judge: {arm: {name: total(part, judge) for name, part in parts.items()} for arm, parts in rows.items()}
                for judge in asked
                if judge.startswith("llm:")
            }
    return found


def _distance(
    model: Model, guidance: Guidance, base: Mapping[str, list[Stored]], tuned: Mapping[str, list[Stored]]
) -> dict[str, Any] | None:
    """How far token or guide move the model on plain requests, drawn from all suites; from those of right answers, whose replies are short, only where there are no others."""
    plain = [
        (place, before, after)
        for name in _talking(base)
        for place, (before, after) in enumerate(zip(base[name], tuned[name], strict=True))
        if before["group"] == "plain" and "error" not in (before["stop"], after["stop"])
    ]
    drawn = random.Random(0).sample(plain, min(PLAIN, len(plain)))
    records = [Record.model_validate(before) for _, before, _ in drawn]
    replies = [before["reply"] for _, before, _ in drawn]
    if isinstance(guidance, Guide):
        alphas = [after["alpha"] or 0.0 for _, _, after in drawn]
        return kl_under_guide(model, records, replies, guidance, alphas, [place for place, _, _ in drawn])
    if guidance is None:
        return None
    prompts = [render(model, record.chat, prefill=record.prefill) for record in records]
    with_token = [guidance.render(model, record.chat, prefill=record.prefill) for record in records]
    return kl_to_base(model, prompts, with_token, replies, guidance.vectors.to(model.device))


def _talking(suites: Mapping[str, list[Stored]]) -> list[str]:
    """The suites that have plain requests, without those of right answers if there are others."""
    plain = [name for name, rows in suites.items() if any(row["group"] == "plain" for row in rows)]
    return [name for name in plain if not tests_answers(suites[name])] or plain


def _held(folder: Path) -> str:
    """Whose results are in a folder; empty where that cannot be told."""
    try:
        return str(read_json(folder / "results.json")["key"])
    except (RunError, KeyError, TypeError):
        return ""


def _measure(suite: Suite, arm: str, backend: Backend, store: Records) -> list[Stored]:
    """Rows of one suite under one arm, made or read from the store. A row that cannot be asked, or got no reply, has an empty one: it is unscored, and
    the next run tries again."""
    keys: dict[int, str] = {}
    unanswered: dict[int, Fields] = {}
    for i, record in enumerate(suite.records):
        try:
            keys[i] = backend.key(record)
        except ChatError as error:
            unanswered[i] = failed(error.args[0])
    missing = [i for i, key in keys.items() if key not in store]
    with progress(f"{suite.name} ({arm})", len(missing)) as advance:
        for i, fields in backend.replies(suite.records, missing):
            if fields.get("error"):
                unanswered[i] = fields
            else:
                store.add(keys[i], id=suite.records[i].id, arm=arm, **fields)
            advance()
    if unanswered:
        why = next(iter(unanswered.values()))["error"]
        console.print(
            f"{suite.name} ({arm}): {len(unanswered)} rows have no reply, and are unscored ({why})", markup=False
        )
    rows = [
        {**(unanswered[i] if i in unanswered else store[keys[i]]), **record.model_dump(exclude={"split"})}
        for i, record in enumerate(suite.records)
    ]
    if unscored := sum(bool(row["choices"]) and "choice" not in row for row in rows):
        console.print(
            f"{suite.name} ({arm}): letters are not measured here; {unscored} rows have no answer that counts"
        )
    return rows


def _injections(model: Model, guide: Guide, expert: Expert, folder: Path) -> dict[str, Any] | None:
    """How often the rater is talked round by prompt injections around harmful builtin requests; `None` where nobody is heard: risk or alpha are
    constant."""
    who = guide.rater(expert)
    if isinstance(who, ConstantRisk) or not guide.table.steps:
        return None
    requests = [r.text for r in load_suite("builtin:test").records if r.label == "harmful"]
    store = Records(folder / "injections.jsonl")
    tried = [attempt.text for attempt in injections()]
    key = digest(
        model.fingerprint, str(model.dtype), template_hash(model), repr(who), asdict(guide.table), tried, requests
    )
    if key not in store:
        console.print("trying to talk the rater round")
        worked, could = talked_round(model, who, requests, guide.table)
        store.add(key, fooled=worked, foolable=could, ci95=wilson(worked, could))
    return {field: store[key][field] for field in ("fooled", "foolable", "ci95")}
