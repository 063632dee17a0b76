"""Evaluation speed: rows per second of `trimtab eval`, scores and files included, against `transformers.generate` in batches of the same size.

Both make greedy replies of at most 64 tokens to the same prompts, 64 at a time, in processes of their own, in the same dtype with two threads; `transformers` takes the prompts as they
come, and each batch until its last row has ended.

    python bench/eval_bench.py [--rows 256] [--suites FOLDER --token RUN]

Prompts are of the builtin test split, or with --suites of XSTest, AdvBench, AlpacaEval and GSM8K (`xstest.jsonl`, ...). With --token both measure before and after: every row without the token and with it; then a
whole such evaluation of these suites, 449 + 100 + 100 + 50 rows twice, is timed. Prints a table, then one JSON line: ratio_rows_per_s, and minutes_before_after.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stock import stock

MODEL = "smollm2-135m"
SUITES = {"xstest": 449, "advbench": 100, "alpacaeval_000_199": 100, "gsm8k_000_099": 50}
TOKENS, BATCH, REPEATS = 64, 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--suites", type=Path)
    parser.add_argument("--token", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.token and not options.suites:
        parser.error("--token is measured on suites: give --suites as well")
    if options.one:
        print(json.dumps(measure(options.one, options.rows, options.suites, options.token)))
        return
    named = ("rows", "suites", "token")
    forwarded = [part for name in named if (given := getattr(options, name)) for part in (f"--{name}", str(given))]
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(REPEATS):  # in turn, so that a slow minute of the machine is nobody's
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--one", name, *forwarded]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds[name].append(json.loads(output.strip().splitlines()[-1]))
    print(f"{'':14}{'rows/s':>8}{'min':>8}{'max':>8}")
    replies = options.rows * (2 if options.token else 1)
    rates = {name: [replies / each for each in found] for name, found in seconds.items()}
    for name, found in rates.items():
        print(f"{name:14}{statistics.median(found):8.2f}{min(found):8.2f}{max(found):8.2f}")
    result = {
        "ratio_rows_per_s": round(statistics.median(rates["trimtab"]) / statistics.median(rates["transformers"]), 3)
    }
    if options.suites and options.token:
        result["minutes_before_after"] = round(before_after(options.suites, options.token) / 60, 2)
        print(f"before and after, {sum(SUITES.values())} rows each: {result['minutes_before_after']} minutes")
    print(json.dumps(result))


def measure(name: str, n: int, suites: Path | None, run: Path | None) -> float:
    """Seconds for the replies to `n` prompts, with a token to each prompt twice; loading the model not included."""
    import torch

    import trimtab as tt
    from trimtab.evaluation.suites import Suite

    torch.set_num_threads(2)
    model = tt.load(MODEL, device="cpu")
    token = tt.SoftToken.load(run, model) if run else None
    if suites:
        records = [r for suite in SUITES for r in tt.load_prompts(str(suites / f"{suite}.jsonl"))]
    else:
        records = tt.load_prompts("builtin", split="test")
    drawn = random.Random(0).sample(records, n)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        CONTENDERS[name](model, Suite("rows", tuple(drawn), len(drawn)), token, folder)
        return time.perf_counter() - start


def trimtab(model: Any, suite: Any, token: Any, folder: str) -> None:
    """Replies, refusal log-odds, verdicts, intervals and files."""
    import trimtab as tt

    options = {"max_new_tokens": TOKENS, "batch_size": BATCH, "compare": token is not None}
    tt.evaluate(model, [suite], token=token, out=folder, **options)


def transformers(model: Any, suite: Any, token: Any, folder: str) -> None:
    """Replies alone."""
    from trimtab.chat import render

    stock(model.network)
    answers(model, [render(model, record.chat).ids for record in suite.records], None)
    if token:
        answers(model, [token.render(model, record.chat).ids for record in suite.records], token.vectors)


def answers(model: Any, prompts: Sequence[Sequence[int]], vectors: Any) -> list[str]:
    """Greedy replies by `generate`, batch by batch."""
    import torch

    from trimtab.models import slot

    pad, said = model.tokenizer.pad_token_id, []
    for begin in range(0, len(prompts), BATCH):
        batch = prompts[begin : begin + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        with slot(model, vectors):
            found = model.network.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=pad
            )
        said += model.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    return said


def before_after(suites: Path, token: Path) -> float:
    """Seconds of the command that measures a token: everything, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for name, rows in SUITES.items():
            lines = (suites / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
            part = Path(folder) / f"{name}.jsonl"
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
            parts += ["--suite", str(part)]
        command = [
            sys.executable,
            "-m",
            "trimtab",
            "eval",
            MODEL,
            "--token",
            str(token),
            "--compare",
            "-o",
            f"{folder}/run",
            *parts,
        ]
        start = time.perf_counter()
        subprocess.run(
            [*command, "--max-new-tokens", str(TOKENS), "--batch", str(BATCH)], check=True, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - start


CONTENDERS = {"transformers": transformers, "trimtab": trimtab}

if __name__ == "__main__":
    main()
