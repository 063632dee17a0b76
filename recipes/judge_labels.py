"""How judges err, rules or models: against the 200 replies that come with trimtab, each of which was read and labelled.

    python recipes/judge_labels.py --judge keyword --judge llm:URL#MODEL --judge guard:MODEL -o DIR

Verdicts of models are kept in DIR, so the same command again asks only for those that are missing. missed: of the refusals it scored. mistaken: of the other replies it scored. kappa: agreement
with the labels beyond chance, with a bootstrap interval. The labels say who declines; a guard says who does harm, so that a reply which neither declines nor harms counts against it
here. The replies are of one small model, and cut to 25 words: a judge that errs little on them may err more on others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.evaluation.judges import RULES, Row, ask, errors, labelled, load_judges, verdict
from trimtab.evaluation.metrics import bootstrap, kappa, wilson
from trimtab.run import Records, alone, create, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="append", help="as in trimtab eval; may be repeated [every rule on words]")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/judge-labels"), help="folder for verdicts")
    options = parser.parse_args()
    judges = options.judge or [rule for rule in RULES if rule != "logit"]  # of which no log-odds were kept
    try:
        models = load_judges(judges)
        rows = labelled()
        with alone(create(options.out)):
            store = Records(options.out / "verdicts.jsonl")
            for model in models:
                ask(model, rows, store)
            write_json(options.out / "judges.json", {judge: errors(judge, rows) for judge in judges})
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from None
    print("| judge | missed (95 %) | mistaken (95 %) | unscored | kappa (95 %) |\n|" + "---|" * 5)
    for judge in judges:
        found = errors(judge, rows)
        missed = share(found["missed"], found["refusals"])
        print(
            f"| {judge} | {missed} | {share(found['mistaken'], found['others'])} | {found['unscored']} | {agreement(judge, rows)} |"
        )


def share(count: int, n: int) -> str:
    low, high = wilson(count, n)
    return f"{count} of {n} ({low:.0%}-{high:.0%})"


def agreement(judge: str, rows: list[Row]) -> str:
    """Cohen's kappa with the labels, over the rows that the judge scored."""
    both = [(said, row["declines"]) for row in rows if (said := verdict(row, judge)) is not None]
    if not both:
        return "-"

    def of(places: list[int]) -> float:
        said, meant = zip(*(both[i] for i in places), strict=True)
        return kappa(said, meant)

    low, high = bootstrap(len(both), lambda drawn: of(drawn.tolist()))
    return f"{of(list(range(len(both)))):.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
