"""What a run is told on the terminal: rates before and after, and a few replies. The whole story is in report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from trimtab.evaluation.externality import JUDGES, QUICK
from trimtab.evaluation.run import evaluate
from trimtab.evaluation.suites import Suite, load_suite
from trimtab.models import Model
from trimtab.neuron.expert import load_expert
from trimtab.neuron.guide import Guide
from trimtab.neuron.neuron import Neuron
from trimtab.neuron.rating import alpha_table
from trimtab.neuron.risk import ConstantRisk
from trimtab.prompts.records import Record, stratified
from trimtab.prompts.sources import ANSWERS, split_records
from trimtab.report.build import build
from trimtab.report.replies import HARMFUL_WORDS
from trimtab.report.words import CLASSES
from trimtab.run import read_json, tell
from trimtab.softtoken.artifact import SoftToken

ENOUGH = 16  # tokens for an answer of one number: the check that ends every training is to be quick
CHECK: Any = {"judges": (*JUDGES, "logit"), "attacks": QUICK, "max_new_tokens": 40}


def check_and_report(
    model: Model, token: SoftToken, records: Sequence[Record], run: Path, n: int, screen: Console
) -> dict[str, Any]:
    """Compare before and after on `n` held-out prompts, write `report.html`, and sum up for the terminal and `--json`."""
    manifest = read_json(run / "manifest.json")
    result: dict[str, Any] = {"run": str(run), **{k: manifest[k] for k in ("token", "validation", "effect_kl", "cost")}}
    held_out = [r for r in split_records(records) if r.split == "test"]
    if n and held_out:
        chosen = stratified(held_out, n)
        suite = Suite("held-out", tuple(chosen), len(held_out))
        result["check"] = evaluate(model, [suite, _answers()], token=token, out=run / "eval", compare=True, **CHECK)
        print_results(result["check"], screen)
        _print_pairs(read_json(run / "eval" / "rows.json")["held-out"], screen)
    result["report"] = str(build([run], run / "report.html"))
    cost = manifest["cost"]
    tell(
        screen,
        f"{manifest['token']['numbers']} numbers trained in {cost['train_seconds']:.0f} s on {cost['device']} "
        f"(and {cost['prepare_seconds']:.0f} s to prepare). Report: {result['report']}",
    )
    return result


def check_expert(model: Model, records: Sequence[Record], run: Path, n: int, screen: Console) -> dict[str, Any]:
    """The expert by itself against the untouched model on `n` held-out prompts, and the report; sums up for the terminal and `--json`."""
    manifest = read_json(run / "manifest.json")
    result: dict[str, Any] = {"run": str(run), **{k: manifest[k] for k in ("adapter", "validation", "cost")}}
    held_out = [r for r in split_records(records) if r.split == "test"]
    if n and held_out:
        suite = Suite("held-out", tuple(stratified(held_out, n)), len(held_out))
        # Always on and at full strength: what guided decoding mixes in, without the neuron and the rating.
        alone = Guide(load_expert(f"lora:{run}", model), Neuron(kind="always"), ConstantRisk(10), alpha_table("1"))
        result["check"] = evaluate(model, [suite, _answers()], guide=alone, out=run / "eval", compare=True, **CHECK)
        print_results(result["check"], screen)
    result["report"] = str(build([run], run / "report.html"))
    before, after = (manifest["validation"][when]["prefill_refusal"] for when in ("before", "after"))
    screen.print(
        f"refused after a compliant opening (validation): {percent(before)} before, {percent(after)} as the expert"
    )
    tell(screen, f"trained in {manifest['cost']['train_seconds']:.0f} s. Report: {result['report']}")
    return result


def _answers() -> Suite:
    return replace(load_suite(ANSWERS), enough=ENOUGH)


def print_results(result: Mapping[str, Any], screen: Console) -> None:
    """A table of refusal rates with intervals, and how well log-odds rank; before and after where both were measured."""
    base = result.get("base")
    columns = ("refused before", "refused now") if base else ("refused",)
    table = Table(Column("suite", overflow="fold"), "prompts", "judge", "n", *columns, "95 %")
    for name, suite in result["suites"].items():
        for label in ("harmful", "benign"):
            if label not in suite:
                continue
            for group in suite[label]["groups"]:
                for judge, found in suite[label]["groups"][group].items():
                    low, high = found["ci95"]
                    before = []
                    if base:
                        before = [percent(base["suites"][name][label]["groups"][group][judge]["refusal_rate"])]
                    row = [name, group, judge, str(found["n"]), *before, percent(found["refusal_rate"])]
                    table.add_row(*row, f"{100 * low:.0f}-{100 * high:.0f}")
    screen.print(table)
    for name, value in result["auc"].items():
        was = f" (before: {base['auc'][name]:.3f})" if base and name in base["auc"] else ""
        screen.print(f"AUC of refusal log-odds, {name}: {value:.3f}{was}")
    was = f" (before: {percent(base['looping']['share'])})" if base else ""
    screen.print(f"replies that repeat themselves: {percent(result['looping']['share'])}{was}")
    if length := result["length"]:
        was = f" (before: {base['length']['mean']:.1f})" if base and base["length"] else ""
        screen.print(f"length of replies: {length['mean']:.1f} tokens{was}")
    for name, found in result["answers"].items():
        was = (
            f" (before: {percent(base['answers'][name]['share'])}{_moved(result, name)})"
            if base and name in base["answers"]
            else ""
        )
        screen.print(f"right answers, {name}: {percent(found['share'])}{was}")
    for name, error in result.get("judge_errors", {}).items():
        screen.print(
            f"{name}, against 200 labelled replies: misses {error['missed']} of {error['refusals']} refusals, "
            f"takes {error['mistaken']} of {error['others']} others for one"
        )
    for judge, arms in result.get("classes", {}).items():
        for name, found in arms[result["arm"]].items():
            if found:
                shares = ", ".join(f"{title} {percent(found[kind]['share'])}" for kind, title in CLASSES.items())
                tell(screen, f"benign requests of {name} by {judge}: {shares} (n = {found['n']})")
    for harm in (check := result.get("externality", {})).get("harms", []):
        screen.print(f"[bold]worse[/bold]: {escape(harm)}")
    if check and not check["harms"] and check["blind"]:
        least, most = (f"{100 * loss:.0f}" for loss in check["blind"])
        tell(screen, f"no loss that is clear of chance; so many rows would mostly show one of {least} to {most} points")


def _moved(result: Mapping[str, Any], suite: str) -> str:
    """`; by -5 points, 95 %: -12 to +2`, on the same rows."""
    if not (change := result["answers_paired"].get(suite)):
        return ""
    by, low, high = (100 * value for value in (change["difference"], *change["ci95"]))
    return f"; by {by:+.0f} points, 95 %: {low:+.0f} to {high:+.0f}"


def percent(rate: float | None) -> str:
    return "unscored" if rate is None else f"{100 * rate:.1f} %"


def _print_pairs(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    """One reply before and after for each group."""
    for group in ("harmful", "borderline", "plain"):
        row = next((r for r in rows if r["group"] == group), None)
        if row is None:
            continue
        screen.print(f"\n[bold]{group}[/bold]: {escape(row['prompt'])}")
        for arm, name in (("base", "before"), ("token", "after ")):
            words = row[arm]["reply"].split()
            screen.print(
                f"  {name}: {escape(' '.join(words[:HARMFUL_WORDS]))}{' ...' if len(words) > HARMFUL_WORDS else ''}"
            )
