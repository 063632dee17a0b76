"""Single Token Alignment from prompts to artefact: targets, hard weighting, training, calibration, effect check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.chat import POSITIONS, Position, render, template_hash
from trimtab.config import AlignSettings, settle
from trimtab.errors import ChatError
from trimtab.machine import describe_machine
from trimtab.models import Model
from trimtab.prompts.filter import Rule, filter_samples, funnel
from trimtab.prompts.records import Record, Sample, stratified
from trimtab.prompts.sources import require_both_labels, split_records
from trimtab.run import (
    Cost,
    alone,
    claim,
    console,
    create,
    digest,
    environment,
    progress,
    read_json,
    write_json,
)
from trimtab.softtoken.artifact import SoftToken, effect
from trimtab.softtoken.examples import Examples
from trimtab.softtoken.openings import compliant_openings, prefill_refusal
from trimtab.softtoken.targets import collect
from trimtab.softtoken.train import MAX_PREFIX, Trainer, TrainingSet
from trimtab.softtoken.validation import summary, validate

SCHEME = 5  # raised when the same settings train otherwise than before: a run begun then is not gone on with
VALIDATION_PROMPTS = 240  # at most; every look decodes the beginnings of that many replies
PILOT_SHARE = 5  # a pilot takes a fifth of the steps


@dataclass(frozen=True)
class Prepared:
    """What training starts from, the same for every place, size and weight; made for one goal, one refusal and so many reply tokens.

    Attributes:
        base: the training prompts, read by the untouched model. held: the validation prompts. samples: what hard weighting kept, with targets.
        rules: what each of its rules dropped.
    """

    base: Examples
    held: Examples
    samples: list[Sample]
    rules: list[Rule]


def prepare(model: Model, records: Sequence[Record], settings: AlignSettings) -> Prepared:
    """Read the prompts, find out what the frozen model makes of them, and filter.

    Raises:
        DataError: labels of one class only, or no validation prompts. FilterError: nothing left to train on.
    """
    records = split_records(records)
    parts = {s: [r for r in records if r.split == s] for s in ("train", "validation")}
    for name, part in parts.items():
        require_both_labels(part, f"the {name} split of the data")
    base = Examples(model, stratified(parts["train"], settings.limit, settings.seed), "reading prompts")
    held = Examples(model, stratified(parts["validation"], VALIDATION_PROMPTS), "reading validation prompts")
    n_tokens = 10 + (MAX_PREFIX if settings.goal == "refuse" else 0)
    samples, rules = filter_samples(
        # Of a refusal one token more than is used: one that goes on is not taught to end where it was cut. Fewer than ten might not say no yet.
        collect(
            model, base, n_tokens=n_tokens, refusal_tokens=max(10, settings.reply_tokens + 1), refusal=settings.refusal
        ),
        margin=settings.margin,
        retention=settings.retention,
        avoid=[r.text for r in records if r.split in ("validation", "test")],
        seed=settings.seed,
    )
    dropped = ", ".join(f"{r.name} {r.dropped.total()}" for r in rules)
    console.print(f"hard weighting: {len(base.records)} prompts, {len(samples)} kept (dropped by {dropped})")
    return Prepared(base, held, samples, rules)


def align(
    model: Model,
    records: Sequence[Record],
    *,
    out: str | Path | None = None,
    settings: AlignSettings | None = None,
    prepared: Prepared | None = None,
    **options: Any,
) -> SoftToken:
    """Train one soft token (or a few) so that harmful requests are refused and benign ones answered; the model is frozen.

    Args:
        model: the model to refine.
        records: labelled requests; their `train` and `validation` splits are used, never `test`.
        out: run folder for checkpoints and manifest; a run that was killed goes on from there.
        settings: see `AlignSettings`; single fields may be given as keyword `options` instead.
        prepared: from `prepare` with the same model and records, to train on several times.

    Raises:
        DataError: labels of one class only, or no validation prompts. FilterError: nothing left to train on.
        RunError: the folder belongs to another run. NoEffectError: the trained token changes nothing.
    """
    settings = settings or settle(AlignSettings, options)
    folder = create(Path(out)) if out else None
    key = digest(
        SCHEME,
        settings.model_dump(),
        model.fingerprint,
        str(model.dtype),
        template_hash(model),
        [r.model_dump() for r in split_records(records)],
    )
    if folder is None:
        return _trained(model, records, settings, prepared, key, None)
    with alone(folder):
        claim(folder, key)
        if (folder / "manifest.json").exists():
            console.print(f"{folder} holds this very run, finished; nothing to train")
            return SoftToken.load(folder, model)
        return _trained(model, records, settings, prepared, key, folder)


def _trained(
    model: Model,
    records: Sequence[Record],
    settings: AlignSettings,
    prepared: Prepared | None,
    key: str,
    folder: Path | None,
) -> SoftToken:
    """The token, trained on from what is in `folder`, and written there with its manifest."""
    cost = Cost()
    prepared = prepared or prepare(model, records, settings)
    base, held, kept = prepared.base, prepared.held, prepared.samples
    if folder:
        write_json(folder / "filter.json", funnel(prepared.rules))
    position, radius, pilots = _place(model, kept, base, held, settings, folder)
    settings = settings.model_copy(update={"position": position, "radius": radius})
    data = TrainingSet(model, kept, base, settings, position)
    validation = _with_slot(model, held, settings, position)
    preparing = cost.record("")["seconds"]

    before: dict[str, float | None] = {**summary(validate(model, held, None))}
    trainer = Trainer(model, data, validation, settings, folder, floor=settings.keep * (before["harmful_refusal"] or 0))
    if trainer.resume():
        console.print(f"going on from step {trainer.step} of {settings.steps}")
    with progress("training", settings.steps) as advance:
        advance(trainer.step)
        trainer.run(advance)
    trainer.calibrate()
    trained = round(cost.record("")["seconds"] - preparing, 2)
    token = SoftToken.of(model, trainer.best, position)
    after: dict[str, float | None] = dict(trainer.kept)
    begun = compliant_openings(model, held) if settings.goal == "refuse" else {}
    if begun:
        before["prefill_refusal"] = prefill_refusal(model, held, begun)
        after["prefill_refusal"] = prefill_refusal(model, validation, begun, trainer.best)
    shift = effect(model, token)
    result = {
        "key": key,
        "settings": settings.model_dump(),
        "model": {"name": model.name, "origin": model.origin, "fingerprint": model.fingerprint, "device": model.reason},
        "token": {
            "position": position,
            "numbers": token.vectors.numel(),
            "norm": float(token.vectors.norm(dim=1).mean()),
        },
        "data": {
            "train": dict(Counter(s.record.group for s in kept)),
            "validation": dict(Counter(r.group for r in held.records)),
            "validation_with_opening": len(begun),
            "refusal": Counter(s.target for s in kept if s.record.label == "harmful").most_common(1)[0][0],
        },
        "validation": {"before": before, "after": after},
        "effect_kl": shift,
        "pilots": pilots,
        "cost": {
            **cost.record(describe_machine(model.device)),
            "prepare_seconds": preparing,
            "train_seconds": trained,
        },
        "environment": environment(),
    }
    if folder:
        write_json(folder / "history.json", trainer.history)
        token.save(folder / "token")
        write_json(folder / "manifest.json", result)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return token


def _with_slot(model: Model, held: Examples, settings: AlignSettings, position: Position) -> Examples:
    """The validation requests with the slot in place."""
    title = "reading validation prompts"
    return Examples(model, held.records, title, position=position, n_tokens=settings.tokens, base=held)


def _place(
    model: Model,
    samples: Sequence[Sample],
    base: Examples,
    held: Examples,
    settings: AlignSettings,
    folder: Path | None,
) -> tuple[Position, float, list[dict[str, Any]]]:
    """Position and step size: as set, or the best of short pilots on the validation split; finished pilots are kept in `pilots.json`."""
    if settings.position != "auto":
        return settings.position, settings.radius, []
    path = folder / "pilots.json" if folder else None
    rows: list[dict[str, Any]] = read_json(path) if path and path.exists() else []
    done = {(row["position"], row["radius"]) for row in rows}
    steps = max(1, settings.steps // PILOT_SHARE)
    short = settings.model_copy(update={"steps": steps, "calibration_steps": 0, "eval_every": steps})
    for position in POSITIONS:
        try:
            for record in held.records[:8]:
                render(model, record.chat, position=position)
        except ChatError as error:
            console.print(f"pilot: {position} left out: {error.args[0]}")
            continue
        left = [radius for radius in (settings.radius, settings.radius / 3) if (position, radius) not in done]
        if not left:
            continue
        data = TrainingSet(model, samples, base, short, position)
        looks = _with_slot(model, held, settings, position)
        for radius in left:
            trainer = Trainer(model, data, looks, short.model_copy(update={"radius": radius}), None)
            with progress(f"pilot {position}, radius {radius:g}", steps) as advance:
                trainer.run(advance)
            rows.append({"position": position, "radius": radius, **trainer.history[-1]})
            if path:
                write_json(path, rows)
    rows.sort(key=lambda row: -row["auc"])  # ranking is steadier than rates after so few steps
    table = Table(
        "position",
        "radius",
        "AUC",
        "harmful refused",
        "benign answered",
        title=f"pilots of {steps} steps, validation split",
    )
    for row in rows:
        rates = (row["auc"], row["harmful_refusal"], row["benign_compliance"])
        table.add_row(row["position"], f"{row['radius']:g}", *(f"{x:.2f}" for x in rates))
    console.print(table)
    return rows[0]["position"], rows[0]["radius"], rows
