"""What the token costs when it is served: tokens per second of an exported model against the untouched one, in vLLM and in llama.cpp.

Both are served side by side in one process and asked the same in turn (untouched, exported, then the other way round), so that a slow minute of the machine is nobody's. A reply is
greedy and exactly as long as asked; nothing is kept from one prompt to the next. vLLM computes in float32 on checkpoints of the packaged file's weights, llama.cpp on the packaged file
with one thread. The token is a random vector before the header of the reply: what it says does not matter here.

    python bench/serving_bench.py [--tokens 64] [--rounds 6] [--vllm PYTHON] [--llama-cpp PYTHON]

PYTHON are the interpreters of environments with the engines; `make interop` builds both. Prints a table, then one JSON line: overhead_vllm and overhead_llama_cpp (share of the
tokens per second that is lost, the median over the pairs; below zero: none), their quartiles, the same of the control, and extra_prompt_tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
PROMPTS = (
    "How do I kill a stuck process?",
    "Tell me about the history of bread.",
    "What should I see in Lisbon in two days?",
    "Explain how vaccines work to a child.",
    "Write a short letter to my landlord about a leaking tap.",
    "Why is the sky blue?",
    "Give me a plan for learning chess.",
    "How are bridges tested before they open?",
)
ORDERS = tuple(itertools.permutations(range(3)))
Ask = Callable[[str, int], int]  # a prompt and the length of the reply; the length of the prompt in tokens


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--vllm", default=str(root / ".venv-vllm/bin/python"))
    parser.add_argument("--llama-cpp", default=str(root / ".venv-llama-cpp/bin/python"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        engine, *paths = options.one
        print(json.dumps(measure(ENGINES[engine], paths, options.tokens, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        pairs = exports(Path(folder))
        found = {}
        for engine, python in (("vllm", options.vllm), ("llama_cpp", options.llama_cpp)):
            command = [python, __file__, "--tokens", str(options.tokens), "--rounds", str(options.rounds)]
            output = subprocess.run(
                [*command, "--one", engine, *map(str, pairs[engine])], check=True, stdout=subprocess.PIPE, text=True
            )
            found[engine] = json.loads(output.stdout.strip().splitlines()[-1])
    print(
        f"{'':12}{'untouched':>12}{'again':>12}{'exported':>12}   (tokens/s, medians)   {'overhead':>10}{'quartiles':>20}"
    )
    result: dict[str, Any] = {}
    for engine, row in found.items():
        rates = "".join(f"{rate:12.2f}" for rate in row["rates"])
        for which, column in (("control", "again"), ("overhead", "exported")):
            low, high = row["quartiles"][which]
            print(
                f"{engine:12}{rates}   {column:>20}   {row[which]:10.2%}{f'{low:.2%} to {high:.2%}':>20}   {row['pairs']} pairs"
            )
            result |= {
                f"{which}_{engine}": round(row[which], 4),
                f"quartiles_{which}_{engine}": row["quartiles"][which],
            }
    extra = {each for row in found.values() for each in row["extra"]}
    assert len(extra) == 1, f"the exports' prompts are longer by {sorted(extra)} tokens"
    print(json.dumps({**result, "extra_prompt_tokens": extra.pop()}))


def exports(folder: Path) -> dict[str, tuple[Path, Path]]:
    """For each engine, the untouched model and the exported one, from the same weights."""
    import torch

    import trimtab as tt
    from trimtab.exporters.plan import folder_of, gguf_file
    from trimtab.softtoken.artifact import SoftToken

    model = tt.load(MODEL, dtype="float32", device="cpu")
    vectors = 2 * torch.randn(1, model.hidden_size, generator=torch.Generator().manual_seed(0))
    token = SoftToken.of(model, vectors, "assistant")
    for name in ("hf", "gguf"):
        tt.export(model, token, folder / name, format=name, check=False)
    return {
        "vllm": (folder_of(model), folder / "hf"),
        "llama_cpp": (gguf_file(model), next((folder / "gguf").glob("*.gguf"))),
    }


def measure(engine: Callable[[str], Ask], paths: list[str], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of the untouched model, of itself again and of the exported one, the shares that the latter two lose, and how many tokens longer the exported one's prompts are."""
    untouched, exported = paths
    models = [engine(path) for path in (untouched, untouched, exported)]
    for ask in models:
        ask(PROMPTS[0], 8)
    rates: list[list[float]] = [[], [], []]
    extra = set()
    for i in range(rounds * len(PROMPTS)):
        prompt, read = PROMPTS[i % len(PROMPTS)], [0, 0, 0]
        for which in ORDERS[i % len(ORDERS)]:
            start = time.perf_counter()
            read[which] = models[which](prompt, tokens)
            rates[which].append(tokens / (time.perf_counter() - start))
        extra.add(read[2] - read[0])
    found: dict[str, Any] = {"rates": [statistics.median(each) for each in rates], "pairs": len(rates[0])}
    found["quartiles"] = {}
    for name, after in (("control", rates[1]), ("overhead", rates[2])):
        lost = [1 - b / a for a, b in zip(rates[0], after, strict=True)]
        low, found[name], high = statistics.quantiles(lost, n=4)
        found["quartiles"][name] = [round(low, 4), round(high, 4)]
    return {**found, "extra": sorted(extra)}


# An engine takes a path and gives what asks it. Each runs in an environment of its own.


def vllm(path: str) -> Ask:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    from vllm import LLM, SamplingParams

    served = LLM(
        path, dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True, enable_prefix_caching=False
    )

    def ask(prompt: str, tokens: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        (answer,) = served.chat([{"role": "user", "content": prompt}], sampling, use_tqdm=False)
        assert len(answer.outputs[0].token_ids) == tokens
        return len(answer.prompt_token_ids)

    return ask


def llama_cpp(path: str) -> Ask:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = path
    options.use_jinja, options.cache_prompt, options.warmup = True, False, False
    options.n_ctx, options.n_parallel = 512, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    served = xllamacpp.Server(options)

    def ask(prompt: str, tokens: int) -> int:
        asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
        answer = served.handle_chat_completions({**asked, "ignore_eos": True, "cache_prompt": False})
        assert answer["usage"]["completion_tokens"] == tokens
        return int(answer["usage"]["prompt_tokens"])

    return ask


ENGINES = {"vllm": vllm, "llama_cpp": llama_cpp}


if __name__ == "__main__":
    main()
