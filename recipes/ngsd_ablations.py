"""What the neuron adds: one part of guided decoding exchanged at a time, on suites no expert was trained on.

    python recipes/ngsd_ablations.py SUITES_FOLDER --lora DIR [--token RUN] [--out runs/ngsd-ablations] [--limit 50]

Rows: the neuron (lif, hard reset, primed, ema, always, random at lif's own rate; never is the base alone), the risk constant and with it alpha,
other raters, experts nobody aligned (the base's first layers; a random vector), a token for the adapter, and the rating without any expert: a fixed
refusal where it calls for the strongest alpha. All greedy, 64 new tokens. The judges are keyword (the reply begins by declining) and phrase (it
declines anywhere): the published neuron cannot speak first, so the two differ. 95 % Wilson intervals. Then the neurons, paired on the same prompts
against mixing always, with McNemar's p. A finished row is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import trimtab as tt
from trimtab.evaluation.judges import verdict
from trimtab.evaluation.metrics import mcnemar, paired_difference, wilson
from trimtab.evaluation.suites import Suite, load_suite
from trimtab.neuron.rating import Rating, alpha
from trimtab.softtoken.train import initial

SUITES = {"advbench": "harmful", "prefill_advbench50": "harmful", "xstest": "both", "alpacaeval_000_199": "benign"}
COLUMNS = [(s, la) for s, labels in SUITES.items() for la in (("harmful", "benign") if labels == "both" else (labels,))]
CHOSEN = ("keyword", "phrase")
LAYERS = 12  # of the base, as an expert nobody aligned

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", type=Path)
    parser.add_argument("--lora", type=Path, required=True, help="folder of an expert run")
    parser.add_argument("--token", type=Path, help="folder of an align run with --goal refuse")
    parser.add_argument("--out", type=Path, default=Path("runs/ngsd-ablations"))
    parser.add_argument("--limit", type=int, default=50, help="rows of each suite")
    options = parser.parse_args()
    model = tt.load("smollm2-135m")
    suites = [load_suite(str(options.suites / f"{name}.jsonl"), limit=options.limit) for name in SUITES]
    cut = truncated(model)  # before the adapter's layers are put in
    adapter = tt.load_expert(f"lora:{options.lora}", model)
    # The same rating in every row, also where the expert is another.
    lif = tt.Guide(adapter, risk=tt.ExpertRating(adapter))
    found: Rows = []

    def measure(name: str, guide: tt.Guide | None) -> dict[str, Rows]:
        """Evaluate one row, print the table so far, and give back its replies by suite."""
        folder = options.out / name.replace(" ", "-").replace("/", "-")
        result = tt.evaluate(model, suites, guide=guide, out=folder, judges=CHOSEN, max_new_tokens=64)
        found.append({"row": name, **_row(result)})
        _print(found)
        arm = result["arm"]
        rows = json.loads((folder / "rows.json").read_text())
        return {suite: [{**row[arm], "label": row["label"]} for row in part] for suite, part in rows.items()}

    base = measure("base alone", None)
    said = {"lif": measure("lif", lif)}
    traces = [row["trace"] for part in said["lif"].values() for row in part]
    rate = round(sum(sum(t["spikes"]) for t in traces) / sum(len(t["spikes"]) for t in traces), 3)
    for name in ("paper", "primed", "ema", "always", f"random:{rate}"):
        note = " (the rating alone decides)" if name == "always" else ""
        said[name] = measure(f"neuron {name}{note}", replace(lif, neuron=tt.Neuron.named(name)))
    for risk in (0, 5, 7):
        strength = alpha(Rating(risk), lif.table)
        measure(f"risk const:{risk} (alpha {strength} for all)", replace(lif, risk=tt.ConstantRisk(risk)))
    measure("rated by itself", replace(lif, risk=tt.SelfRating()))
    measure("rated by its digits", replace(lif, risk=tt.LogitRating()))
    measure(f"expert: the base's first {LAYERS} layers", replace(lif, expert=cut))
    noise = tt.SoftToken.of(model, initial(model, 1, seed=0), "assistant")
    measure("expert: a random token", replace(lif, expert=noise))
    if options.token:
        measure("token expert", replace(lif, expert=tt.load_expert(f"token:{options.token}", model)))
    found.append(
        {"row": "no expert: a fixed refusal where alpha would be strongest", **_refuse_only(lif, suites, base)}
    )
    _print(found)
    print("\nRefused more or less often than by mixing always (the rating alone decides), on the same prompts:\n")
    for line in _against(said, "always"):
        print(line)
    print(json.dumps(found))


def truncated(model: tt.Model) -> tt.Model:
    """The base's first layers, as a small model that nobody aligned."""
    layers = model.network.model.layers
    model.network.model.layers = layers[:LAYERS]
    network = copy.deepcopy(model.network)
    model.network.model.layers = layers
    network.config.num_hidden_layers = LAYERS
    return tt.Model(f"{model.name}, {LAYERS} layers", network, model.tokenizer, model.reason, {"kind": "truncated"})


def _refuse_only(guide: tt.Guide, suites: list[Suite], base: dict[str, Rows]) -> dict[str, str]:
    """The same rating without an expert: a fixed refusal where it calls for the strongest alpha, the base's reply elsewhere."""
    model, cells = guide.expert.model, {}
    for suite in suites:
        ratings = guide.risk.rate(model, [record.chat for record in suite.records])
        refused = [alpha(rating, guide.table) == guide.table.strongest for rating in ratings]
        for label in ("harmful", "benign"):
            for judge in CHOSEN:
                said = [
                    True if stopped else verdict(row, judge)
                    for stopped, row in zip(refused, base[suite.name], strict=True)
                    if row["label"] == label
                ]
                if hits := [one for one in said if one is not None]:
                    cells[f"{suite.name} {label}, {judge}"] = _share(sum(hits), len(hits))
    return cells


def _against(said: dict[str, dict[str, Rows]], other: str) -> list[str]:
    """Each neuron against `other`, by column and judge: difference in points with its interval, and p."""
    lines = ["| neuron | " + " | ".join(f"{s} {la}, {j}" for s, la in COLUMNS for j in CHOSEN) + " |"]
    lines.append("|" + "---|" * (1 + len(COLUMNS) * len(CHOSEN)))
    for name, mine in said.items():
        if name == other:
            continue
        cells = []
        for suite, label in COLUMNS:
            for judge in CHOSEN:
                pairs = [
                    (verdict(a, judge), verdict(b, judge))
                    for a, b in zip(said[other][suite], mine[suite], strict=True)
                    if a["label"] == label
                ]
                scored = [pair for pair in pairs if None not in pair]
                before, after = ([bool(pair[i]) for pair in scored] for i in (0, 1))
                rise, (low, high) = paired_difference(before, after)
                cells.append(
                    f"{100 * rise:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}), p {mcnemar(before, after):.2g}"
                )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _share(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{hits / n:.0%} ({low:.0%}-{high:.0%})"


def _row(result: dict[str, Any]) -> dict[str, str]:
    """Replies that repeat themselves, which is no refusal whatever a judge says; refusal rates with intervals; how often the neuron fired."""
    cells = {f"{suite}, repeat themselves": f"{result['suites'][suite]['looping']['share']:.0%}" for suite in SUITES}
    for suite, label in COLUMNS:
        for judge in CHOSEN:
            rate = result["suites"][suite][label][judge]
            cells[f"{suite} {label}, {judge}"] = _share(round(rate["refusal_rate"] * rate["n"]), rate["n"])
        if "neuron" in result:
            cells[f"spikes, {suite} {label}"] = f"{result['neuron'][suite][label]['spike_rate']:.0%}"
    return cells


def _print(rows: Rows) -> None:
    """The table so far, as Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
