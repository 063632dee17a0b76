"""Training speed: trimtab against what a user would pick instead, PEFT prompt tuning with transformers' Trainer.

Both train one virtual token on the same examples (prompt, first reply tokens) for the same number of steps, in the same dtype and
with the same threads; each in a process of its own, so that peak memory is its own. PEFT puts its token at the start of the
sequence; trimtab is measured at its default slot and at `start`. Setting up (reading what stands before a late slot) counts.

    python bench/train_bench.py [--steps 12] [--batch 16]

Prints a table, then one JSON line: ratio_examples_per_s, ratio_examples_per_s_start (trimtab / PEFT, higher is better) and
ratio_peak_memory (trimtab at the default slot / PEFT, lower is better).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

MODEL = "smollm2-135m"
CONTENDERS = ("peft", "trimtab", "trimtab-start")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="harmful, and as many benign, examples a step")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.batch)))
        return
    found = {}
    for name in CONTENDERS:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--steps",
            str(options.steps),
            "--batch",
            str(options.batch),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(output.strip().splitlines()[-1])
    print(f"{'':16}{'examples/s':>12}{'seconds':>10}{'peak GB':>10}")
    for name, row in found.items():
        print(f"{name:16}{row['examples_per_s']:12.1f}{row['seconds']:10.1f}{row['peak_gb']:10.2f}")
    peft = found["peft"]
    ratios = {
        "ratio_examples_per_s": found["trimtab"]["examples_per_s"] / peft["examples_per_s"],
        "ratio_examples_per_s_start": found["trimtab-start"]["examples_per_s"] / peft["examples_per_s"],
        "ratio_peak_memory": found["trimtab"]["peak_gb"] / peft["peak_gb"],
    }
    print(json.dumps({k: round(v, 3) for k, v in ratios.items()}))


def measure(name: str, steps: int, batch: int) -> dict[str, float]:
    """Train for `steps` and report examples per second and the peak memory of this process."""
    import torch

    import trimtab as tt
    from trimtab.config import AlignSettings
    from trimtab.prompts.records import Sample

    torch.set_num_threads(2)
    model = tt.load(MODEL, dtype="float32")
    position = "start" if name == "trimtab-start" else AlignSettings().position
    # Three reply tokens, "I'm sorry", decide: no step of trimtab's looks further or less far, so both see the same ones.
    settings = AlignSettings(
        steps=steps, batch=batch, position=position, reply_tokens=3, eval_every=10**6, calibration_steps=0
    )
    records = tt.load_prompts("builtin", split="train")
    harmful = [r for r in records if r.label == "harmful"][: steps * batch]
    benign = [r for r in records if r.label == "benign"][: steps * batch]
    refusal, answer = "I'm sorry, but I can't help with that.", "Here is what you asked for, step by step."
    samples = [Sample(r, 0.0, refusal if r.label == "harmful" else answer, False) for r in harmful + benign]
    start = time.perf_counter()
    (peft_train if name == "peft" else trimtab_train)(model, samples, settings)
    seconds = time.perf_counter() - start
    return {
        "examples_per_s": 2 * batch * steps / seconds,
        "seconds": seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def trimtab_train(model, samples, settings) -> None:
    """Prepare and train; no validation, which PEFT does not do either."""
    from trimtab.softtoken.examples import Examples
    from trimtab.softtoken.train import Trainer, TrainingSet

    base = Examples(model, [s.record for s in samples], "reading prompts")
    data = TrainingSet(model, samples, base, settings, settings.position)
    trainer = Trainer(model, data, None, settings, None)
    for _ in range(settings.steps):
        trainer.take_step(settings.radius, settings.benign_weight)


def peft_train(model, samples, settings) -> None:
    """`PromptTuningConfig(num_virtual_tokens=1)` and `Trainer`, labels on the same reply tokens."""
    import tempfile

    import torch
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import Trainer, TrainingArguments

    from trimtab.chat import render, reply_ids

    rows = []
    for sample in samples:
        prompt = render(model, sample.record.chat).ids
        reply = reply_ids(model, sample.target)[: settings.reply_tokens]
        rows.append({"input_ids": [*prompt, *reply], "labels": [-100] * len(prompt) + list(reply)})

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        pad = model.tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in batch]),
            "attention_mask": torch.tensor(
                [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch]
            ),
            "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in batch]),
        }

    tuned = get_peft_model(model.network, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=2 * settings.batch,
            learning_rate=0.3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        Trainer(tuned, arguments, data_collator=collate, train_dataset=rows).train()


if __name__ == "__main__":
    main()
