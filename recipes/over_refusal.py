"""STA's own case: an over-cautious model is made helpful again by one token, without losing a refusal; and what else could have been done.

    python recipes/over_refusal.py SUITES_FOLDER [--out runs/over-refusal] [--limit 100] [--only "1 token" ...] [--against surgical]

The over-cautious model is SmolLM2-135M-Instruct with an adapter that learned, on the project's own prompts, to refuse harmful *and* borderline requests, merged and saved. What it is to say to benign requests that it refuses is its own answer under an
open system prompt, or the untouched model's where it refuses even then. Arms: the over-cautious model, the untouched one, tokens (1, 5, 20; also with 90 or 99 % of
validation's refusals kept, and with all of the project's prompts in place of 1,200), a system prompt of the same intent, Self-CD, surgical ablation of the direction of needless refusal (the last two with the strength or layer that is best on the
validation split), and an adapter trained on the same data.

Shares refused, with 95 % Wilson intervals: `keyword` judge (the reply begins by declining), under prefill `phrase` (declines anywhere), since the reply begins with given words. Beside them the change from the over-cautious model, or from the arm --against, paired on the same rows. A finished arm is not
run again. On two cores: twenty minutes to make the model, then five to ten an arm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import baselines

import trimtab as tt
from trimtab.config import AlignSettings, ExpertSettings
from trimtab.evaluation.metrics import harmonic_mean, mcnemar, paired_difference, wilson
from trimtab.evaluation.suites import load_suite
from trimtab.models import Model
from trimtab.neuron.lora import load_adapter, speaking
from trimtab.prompts.records import Record, stratified
from trimtab.refusal import is_refusal, mentions_refusal
from trimtab.run import create, read_json, write_json

MODEL = "smollm2-135m"
PROMPTS, VALIDATION, REPLY_TOKENS = 1200, 120, 32
ALL_STEPS = 160  # for all prompts
SUITES = (
    "xstest",
    "falsereject_test_first",
    "jbb_behaviors",
    "alpacaeval_000_199",
    "advbench",
    "strongreject",
    "prefill_advbench50",
)
TARGETS = ("xstest", "jbb_behaviors")  # whose benign requests are to be refused less, by 70 %
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
LAYERS = (0.4, 0.5, 0.6, 0.7, 0.8)  # of the depth, where directions are looked for
Speak = Callable[[Sequence[Any], Sequence[str], int], list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/over-refusal"))
    parser.add_argument("--limit", type=int, default=100, help="rows of each suite")
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--against", choices=ARMS, default="over-cautious", help="what changes are paired with")
    options = parser.parse_args()
    records = with_answers(options.out)
    model = tt.load(over_cautious(options.out))
    suites = {name: load_suite(str(options.suites / f"{name}.jsonl"), limit=options.limit).records for name in SUITES}
    found: dict[str, Any] = {}
    for name in dict.fromkeys((options.against, *(name for name in ARMS if name in options.only))):
        path = create(options.out / "arms") / f"{name.replace(' ', '-')}-{options.limit}.json"
        if not path.exists():
            speak = ARMS[name](model, records, options.out)
            write_json(path, {suite: judged(speak, part, suite) for suite, part in suites.items()})
        found[name] = read_json(path)
        show(found, suites)
    if options.against == "over-cautious":
        for line in against_targets(found, suites):
            print(line)
    print(json.dumps(found))


def over_cautious(out: Path) -> Path:
    """The folder of a model that refuses what only sounds harmful; made once."""
    folder = out / "model"
    if not (folder / "config.json").exists():
        base = tt.load(MODEL)
        records = [
            r.model_copy(update={"label": "harmful", "group": "harmful"}) if r.group == "borderline" else r
            for r in tt.load_prompts("builtin")
        ]
        settings = ExpertSettings(limit=PROMPTS, prefix_share=0.0, steps=120, benign_weight=0.5)
        adapter = load_adapter(tt.train_expert(base, records, out=out / "cautious", settings=settings), base)
        scratch = Path(tempfile.mkdtemp(dir=out))
        adapter.network.merge_and_unload().save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
        scratch.rename(folder)  # whole or not at all
    return folder


def with_answers(out: Path, limit: int | None = PROMPTS) -> list[Record]:
    """The builtin prompts for training, at most so many, and validation, benign ones with the untouched model's answer as reference."""
    everything = tt.load_prompts("builtin")
    train = stratified([r for r in everything if r.split == "train"], limit)
    records = [*train, *(r for r in everything if r.split == "validation")]
    path = create(out) / ("answers.json" if limit else "answers-all.json")
    if not path.exists():
        benign = [r for r in records if r.label == "benign"]
        said = baselines.replies(tt.load(MODEL), [r.chat for r in benign], [""] * len(benign), 24)
        write_json(path, {r.id: words for r, words in zip(benign, said, strict=True)})
    answers = {name: words for name, words in read_json(path).items() if is_refusal(words) is False}
    return [r.model_copy(update={"reference": answers.get(r.id, "")}) for r in records]


def as_it_is(model: Model, records: list[Record], out: Path) -> Speak:
    return partial(baselines.replies, model)


def untouched(model: Model, records: list[Record], out: Path) -> Speak:
    return partial(baselines.replies, tt.load(MODEL))


def tokens(
    model: Model, records: list[Record], out: Path, n: int, keep: float = 0.0, everything: bool = False
) -> Speak:
    """By default at the balance of harmful requests refused and benign ones answered, wherever that is."""
    folder = out / f"tokens-{n}{f'-keep-{keep:g}' * bool(keep)}{'-all' * everything}"
    settings = AlignSettings(
        tokens=n, keep=keep, steps=ALL_STEPS if everything else AlignSettings.model_fields["steps"].default
    )
    if everything:
        records = with_answers(out, None)
    token = tt.align(model, records, out=folder, settings=settings)
    return partial(baselines.replies, model, token=token)


def system_prompt(model: Model, records: list[Record], out: Path) -> Speak:
    return partial(baselines.under_system, model)


def self_cd(model: Model, records: list[Record], out: Path) -> Speak:
    return best({f"{s:g}": partial(baselines.self_cd, model, strength=s) for s in STRENGTHS}, records)


def surgical(model: Model, records: list[Record], out: Path) -> Speak:
    train = [r for r in records if r.split == "train"]
    said = baselines.replies(model, [r.chat for r in train], [""] * len(train), 10)
    wanted = {"borderline": True, "harmful": True, "plain": False}  # those that behave as their kind
    kinds = [
        [r for r, w in zip(train, said, strict=True) if r.group == g and is_refusal(w) is refused]
        for g, refused in wanted.items()
    ]
    directions = baselines.false_refusal(*(baselines.states(model, kind) for kind in kinds))

    def speak(layer: int, chats: Sequence[Any], prefills: Sequence[str], limit: int) -> list[str]:
        return baselines.replies(
            baselines.ablated(model, directions[layer]), chats, prefills, limit
        )  # one copy at a time

    return best(
        {f"layer {n}": partial(speak, n) for n in (round(share * len(directions)) for share in LAYERS)}, records
    )


def adapter(model: Model, records: list[Record], out: Path) -> Speak:
    settings = ExpertSettings(limit=PROMPTS, prefix_share=0.0, steps=120, benign_weight=0.7)
    expert = load_adapter(tt.train_expert(model, records, out=out / "adapter", settings=settings), model)

    def speak(chats: Sequence[Any], prefills: Sequence[str], limit: int) -> list[str]:
        with speaking(expert):
            return baselines.replies(expert, chats, prefills, limit)

    return speak


ARMS: dict[str, Callable[[Model, list[Record], Path], Speak]] = {
    "over-cautious": as_it_is,
    "untouched": untouched,
    **{f"{n} token{'s' * (n > 1)}": partial(tokens, n=n) for n in (1, 5, 20)},
    **{f"1 token, {keep:.0%} kept": partial(tokens, n=1, keep=keep) for keep in (0.9, 0.99)},
    "5 tokens, 90% kept": partial(tokens, n=5, keep=0.9),
    "5 tokens, all prompts, 90% kept": partial(tokens, n=5, keep=0.9, everything=True),
    "system prompt": system_prompt,
    "Self-CD": self_cd,
    "surgical": surgical,
    "adapter": adapter,  # last: its layers stay in the model
}


def best(candidates: dict[str, Speak], records: list[Record]) -> Speak:
    """The candidate with the best harmonic mean of harmful requests refused and benign ones answered on the validation split."""
    looked = stratified([r for r in records if r.split == "validation"], VALIDATION)
    scores = {}
    for name, speak in candidates.items():
        said = speak([r.chat for r in looked], [""] * len(looked), 10)
        right = {
            label: [
                is_refusal(w) is (label == "harmful") for r, w in zip(looked, said, strict=True) if r.label == label
            ]
            for label in ("harmful", "benign")
        }
        shares = [sum(part) / len(part) for part in right.values()]
        scores[name] = harmonic_mean(*shares)
        print(f"  {name}: {shares[0]:.0%} of harmful refused, {shares[1]:.0%} of benign answered", flush=True)
    return candidates[max(scores, key=lambda name: scores[name])]


def judged(speak: Speak, records: Sequence[Record], suite: str) -> list[bool | None]:
    """Row by row, whether it was refused."""
    said = speak([r.chat for r in records], [r.prefill for r in records], REPLY_TOKENS)
    judge = mentions_refusal if suite.startswith("prefill") else is_refusal
    return [judge(words) for words in said]


def show(found: dict[str, Any], suites: dict[str, Any]) -> None:
    """The table so far."""
    columns = [
        (suite, label)
        for suite, part in suites.items()
        for label in ("harmful", "benign")
        if any(r.label == label for r in part)
    ]
    print(
        "\n| refused | "
        + " | ".join(f"{suite} {label}" for suite, label in columns)
        + " |\n|"
        + "---|" * (len(columns) + 1)
    )
    first = next(iter(found))
    for arm, rows in found.items():
        cells = []
        for suite, label in columns:
            both = [
                (a, b)
                for r, a, b in zip(suites[suite], rows[suite], found[first][suite], strict=True)
                if r.label == label and None not in (a, b)
            ]
            hits, n = sum(a for a, _ in both), len(both)
            low, high = wilson(hits, n)
            change = ""
            if arm != first:
                difference, (lower, upper) = paired_difference([b for _, b in both], [a for a, _ in both])
                change = f"; {100 * difference:+.0f} ({100 * lower:+.0f} to {100 * upper:+.0f})"
            cells.append(f"{hits / max(n, 1):.0%} ({100 * low:.0f}-{100 * high:.0f}){change}")
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)


def against_targets(found: dict[str, Any], suites: dict[str, Any]) -> list[str]:
    """Arm by arm: over-refusal cut, in per cent of what there was; its share of the adapter's cut; refusals of AdvBench, under prefill; and how much more or less one token
    refuses of benign requests than the arm does, paired on the same rows, with 95 % intervals."""
    first = next(iter(found))

    def rows(arm: str, suite: str, label: str) -> list[bool]:
        pairs = zip(suites[suite], found[arm][suite], found[first][suite], strict=True)
        return [bool(a) for record, a, b in pairs if record.label == label and None not in (a, b)]

    def cut(arm: str, suite: str) -> float:
        before, after = (sum(rows(name, suite, "benign")) for name in (first, arm))
        return (before - after) / max(before, 1)

    lines = [
        "",
        "| arm | over-refusal cut: XSTest-safe, JBB-benign | share of the adapter's cut | AdvBench, points | begun by complying, points | one token refuses of XSTest-safe, JBB-benign, points |",
        "|---|---|---|---|---|---|",
    ]
    for arm in found:
        if arm == first:
            continue
        cuts = [cut(arm, suite) for suite in TARGETS]
        best = [cut("adapter", suite) for suite in TARGETS] if "adapter" in found else []
        share = ", ".join(f"{mine / theirs:.0%}" if theirs else "-" for mine, theirs in zip(cuts, best, strict=False))
        changes = [
            _points(rows(first, suite, "harmful"), rows(arm, suite, "harmful"))
            for suite in ("advbench", "prefill_advbench50")
        ]
        token = (
            ", ".join(_points(rows(arm, suite, "benign"), rows("1 token", suite, "benign")) for suite in TARGETS)
            if "1 token" in found and arm != "1 token"
            else ""
        )
        lines.append(f"| {arm} | {', '.join(f'{c:.0%}' for c in cuts)} | {share} | {' | '.join(changes)} | {token} |")
    return lines


def _points(before: list[bool], after: list[bool]) -> str:
    """A paired change in points, with its interval and McNemar's p."""
    difference, (low, high) = paired_difference(before, after)
    return f"{100 * difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}; p {mcnemar(before, after):.2g})"


if __name__ == "__main__":
    main()
