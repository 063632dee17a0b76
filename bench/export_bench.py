"""Export of a checkpoint that memory cannot hold, against `cp -r` of the same folder.

Makes a sharded Llama-type checkpoint of random bfloat16 tensors (`--gb`, 8 if not given, written shard by shard), and a random token for it. Then in turn, four times each:

- `cp -r` of the folder, and `sync`;
- the whole of `trimtab export RUN --no-verify`, in a process of its own that is told it has 1 GB of memory: starting Python, checking the token's fingerprint on
  the files, writing weights, tokenizer and template, proving the template on some hundred conversations, the card; and `sync`.

Both read what the other has read, so that the page cache treats them alike; what was written is removed in between. `seconds_copying` is `write_weights` alone and
`sync`, without Python's start and the template. At last SmolLM2 is exported by the command line, loaded, measured and verified, as a checkpoint (`seconds_smollm2`), as a GGUF file
(`seconds_smollm2_gguf`), and as a checkpoint in bfloat16; what verifying found is printed.

    python bench/export_bench.py [--gb 8 | 0] [--folder DIR] [--skip-smollm2]

Prints a table, then one JSON line: ratio_cp (cp's seconds / the export's, best of four, higher is better), ratio_cp_copying (the same for `write_weights`), peak_gb (of
the exporting process), seconds_smollm2, seconds_smollm2_gguf. With `--gb 0` SmolLM2 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, WORDS, SHARD = 4096, 128_000, 4  # layers in a shard
TURNS = 4
LAYER = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 14336)  # bytes of its matrices


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=8)
    parser.add_argument(
        "--folder", type=Path, help="where there is room for three times as much [the temporary folder]"
    )
    parser.add_argument("--skip-smollm2", action="store_true")
    parser.add_argument("--one", choices=("make", "export", "copying"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one == "make":
        make(options.folder, options.gb)
        return
    if options.one:
        print(json.dumps(exported(options.folder, options.one)))
        return
    result = large(options.folder, options.gb) if options.gb else {}
    if not options.skip_smollm2:
        result |= {"seconds_smollm2": smollm2(), "seconds_smollm2_gguf": smollm2("gguf")}
        smollm2(dtype="bfloat16")
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))


def large(within: Path | None, gb: float) -> dict[str, float]:
    """The checkpoint that memory cannot hold: ratios and the peak."""
    with tempfile.TemporaryDirectory(dir=within) as name:
        folder = Path(name)
        # In a process of its own: a child's peak memory begins at what its parent held.
        own = [sys.executable, __file__, "--one", "make", "--gb", str(gb), "--folder", name]
        subprocess.run(own, check=True)
        size = sum(path.stat().st_size for path in (folder / "model").iterdir())
        found: dict[str, list[dict[str, float]]] = {"cp": [], "export": [], "copying": []}
        for _ in range(TURNS):
            for one, rows in found.items():
                rows.append(copied(folder) if one == "cp" else child(folder, one))
                shutil.rmtree(folder / "out")
                os.sync()
    best = {one: min(row["seconds"] for row in rows) for one, rows in found.items()}
    print(f"{'':12}{'seconds':>10}{'MB/s':>10}{'peak GB':>10}")
    for one, rows in found.items():
        for row in rows:
            print(f"{one:12}{row['seconds']:10.1f}{size / row['seconds'] / 1e6:10.0f}{row.get('peak_gb', 0):10.2f}")
    return {
        "gb": size / 1e9,
        "ratio_cp": best["cp"] / best["export"],
        "ratio_cp_copying": best["cp"] / best["copying"],
        "peak_gb": max(row["peak_gb"] for row in found["export"]),
    }


def copied(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "model", folder / "out"], check=True)
    os.sync()
    return {"seconds": time.perf_counter() - start}


def child(folder: Path, one: str) -> dict[str, float]:
    """In a process of its own, whose start counts for the export and not for copying alone."""
    command = [sys.executable, __file__, "--one", one, "--folder", str(folder)]
    start = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    os.sync()
    whole = time.perf_counter() - start
    return {"seconds": whole, **json.loads(output.strip().splitlines()[-1])}


def exported(folder: Path, one: str) -> dict[str, float]:
    """Export in this process, which believes that it has 1 GB; its peak memory, and for `copying` its seconds."""
    from rich.console import Console

    import trimtab.machine as machine
    from trimtab.config import ExportSettings
    from trimtab.exporters.export import export_run

    machine.free_memory = lambda _device: 10**9
    found = {}
    if one == "export":
        export_run(ExportSettings(run=folder / "run", out=folder / "out", verify=False), Console(stderr=True))
    else:
        import torch

        from trimtab.exporters.huggingface import write_weights
        from trimtab.exporters.outline import outline
        from trimtab.exporters.plan import plan
        from trimtab.softtoken.artifact import SoftToken

        model, token = outline(str(folder / "model"), "bfloat16"), SoftToken.load(folder / "run")
        (folder / "out").mkdir()
        decided = plan(model, token, untie=True)
        start = time.perf_counter()
        write_weights(decided, token, folder / "out", torch.zeros_like(token.vectors))
        os.sync()
        found["seconds"] = time.perf_counter() - start
    return {**found, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def make(folder: Path, gb: float) -> None:
    """A Llama of so many GB, with the tokenizer of SmolLM2, and a token for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    import trimtab as tt
    from trimtab.exporters.outline import outline
    from trimtab.models import empty
    from trimtab.softtoken.artifact import SoftToken

    target = folder / "model"
    tokenizer = tt.load("smollm2-135m").tokenizer
    tokenizer.save_pretrained(target)
    layers = max(1, round((gb * 1e9 - 4 * HIDDEN * WORDS) / LAYER))
    config = LlamaConfig(
        vocab_size=WORDS if gb >= 2 else len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(target)
    shapes = {name: p.shape for name, p in empty(config, torch.bfloat16).state_dict().items()}
    shards: dict[int, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        place = 1 + int(name.split(".")[2]) // SHARD if ".layers." in name else 0
        shards.setdefault(place, {})[name] = shape
    where = {}
    for place, held in shards.items():
        file = f"model-{place + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in held.items()}, target / file)
        where |= dict.fromkeys(held, file)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    SoftToken.of(outline(str(target), "bfloat16"), torch.randn(1, HIDDEN), "assistant").save(folder / "run")
    os.sync()


def smollm2(form: str = "hf", dtype: str = "float32") -> float:
    """Seconds of `trimtab export` of SmolLM2 with a random token as long as a trained one, Python's start included; prints what it found."""
    import torch

    import trimtab as tt
    from trimtab.softtoken.artifact import SoftToken

    with tempfile.TemporaryDirectory() as name:
        model = tt.load("smollm2-135m", dtype=dtype)
        vectors = torch.nn.functional.normalize(torch.randn(1, model.hidden_size)) * 966
        SoftToken.of(model, vectors, "assistant").save(Path(name) / "run")
        del model
        command = [sys.executable, "-m", "trimtab", "export", f"{name}/run", "-o", f"{name}/out", "--format", form]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    print(f"SmolLM2, {form}, {dtype}: {seconds:.1f} s; {' '.join(done.stdout.split())}")
    return seconds


if __name__ == "__main__":
    main()
