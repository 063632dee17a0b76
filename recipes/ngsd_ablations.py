"""What the neuron adds: one part of guided decoding exchanged at a time, on suites no expert was trained on.

    python recipes/ngsd_ablations.py SUITES_FOLDER --lora DIR [--token RUN] [--out runs/ngsd-ablations] [--limit 50]

Rows: the neuron (lif, hard reset, primed, ema, always, random at lif's own rate; never is the base alone), alpha fixed, other raters, an expert nobody trained, a token for the adapter. All greedy,
64 new tokens, keyword judge, 95 % Wilson intervals. A finished row is not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import trimtab as tt
from trimtab.neuron.rating import alpha_table
from trimtab.softtoken.train import initial

SUITES = {"advbench": "harmful", "prefill_advbench50": "harmful", "xstest": "both", "alpacaeval_000_199": "benign"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", type=Path)
    parser.add_argument("--lora", type=Path, required=True, help="folder of an expert run")
    parser.add_argument("--token", type=Path, help="folder of an align run with --goal refuse")
    parser.add_argument("--out", type=Path, default=Path("runs/ngsd-ablations"))
    parser.add_argument("--limit", type=int, default=50, help="rows of each suite")
    options = parser.parse_args()
    model = tt.load("smollm2-135m")
    suites = [str(options.suites / f"{name}.jsonl") for name in SUITES]
    adapter = tt.load_expert(f"lora:{options.lora}", model)
    # The same rating in every row, also where the expert is another.
    lif = tt.Guide(adapter, risk=tt.ExpertRating(adapter))
    found: list[dict[str, Any]] = []

    def measure(name: str, guide: tt.Guide | None) -> dict[str, Any]:
        folder = options.out / name.replace(" ", "-")
        result = tt.evaluate(
            model, suites, guide=guide, out=folder, judges=("keyword",), limit=options.limit, max_new_tokens=64
        )
        found.append({"row": name, **_row(result)})
        _print(found)
        return result

    measure("base alone", None)
    measure("lif", lif)
    rows = [json.loads(line) for line in (options.out / "lif" / "replies.jsonl").read_text().splitlines()]
    rate = round(sum(sum(row["spikes"]) for row in rows) / sum(len(row["spikes"]) for row in rows), 3)
    for name in ("paper", "primed", "ema", "always", f"random:{rate}"):
        note = " (the rating alone decides)" if name == "always" else ""
        measure(f"neuron {name}{note}", replace(lif, neuron=tt.Neuron.named(name)))
    for strength in ("0.5", "0.9"):
        measure(f"alpha {strength} for all (no rating)", replace(lif, table=alpha_table(strength)))
    measure("rated by itself", replace(lif, risk=tt.SelfRating()))
    measure("rated by its digits", replace(lif, risk=tt.LogitRating()))
    noise = tt.SoftToken.of(model, initial(model, 1, seed=0), "assistant")
    measure("expert nobody trained", replace(lif, expert=noise))
    if options.token:
        measure("token expert", replace(lif, expert=tt.load_expert(f"token:{options.token}", model)))
    print(json.dumps(found))


def _row(result: dict[str, Any]) -> dict[str, str]:
    """Refusal rates with intervals, and how often the neuron fired."""
    cells = {}
    for suite, labels in SUITES.items():
        for label in ("harmful", "benign") if labels == "both" else (labels,):
            rate = result["suites"][suite][label]["keyword"]
            low, high = rate["ci95"]
            cells[f"{suite} {label}"] = f"{rate['refusal_rate']:.0%} ({low:.0%}-{high:.0%})"
            if "neuron" in result:
                cells[f"spikes, {suite} {label}"] = f"{result['neuron'][suite][label]['spike_rate']:.0%}"
    return cells


def _print(rows: list[dict[str, Any]]) -> None:
    """The table so far, as Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
