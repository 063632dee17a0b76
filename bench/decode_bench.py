"""Decoding speed: plain, guided, and drafted, against transformers and against the research code's procedure.

Every contender decodes greedily, with a process of its own (so that peak memory is its own), the same dtype and two threads, and never stops early. They take turns, three times, so that a slow minute of the
machine is nobody's; the research code is so slow that once must do:

    research      NGSD as published: no cache, one row, both models re-read everything at every token
    transformers  model.generate of the untouched model
    plain         trimtab's engine, the untouched model
    token         guided by a soft token: base and expert share one pass
    drafted A     guided by an expert with weights of its own, whose proposals stand with chance A. The expert is the first LAYERS layers of
                  the base; its cost is real, its agreement is set: proposals are the base's own next token with chance A

    python bench/decode_bench.py [--tokens 256] [--dtypes float32 bfloat16]

Prints tables, then one JSON line: ratio_guided_vs_research (row by row; ..._b8: eight rows, which the research code cannot), ratio_plain_vs_transformers, ratio_guided_token_b1, ratio_guided_token_b8
(tokens per second, the first named over the second; guided against plain for the last two; medians over the turns; memory is the peak while decoding, models included; rating the request, one short pass with the default rater, is not in it) and breakeven_acceptance, from which on
guided decoding with a separate expert is faster than undefended decoding. All for the first dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from stock import stock

MODEL = "smollm2-135m"
LAYERS = 4
TURNS = 3
ACCEPTANCE = (0.0, 0.4, 0.6, 0.7, 0.8, 1.0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, batch, dtype = options.one
        print(json.dumps(measure(name, int(batch), dtype, options.tokens)))
        return
    ratios = [compare(dtype, options.tokens) for dtype in options.dtypes]
    print(json.dumps({k: None if v is None else round(v, 3) for k, v in ratios[0].items()}))


def compare(dtype: str, tokens: int) -> dict[str, float | None]:
    """All contenders in one dtype: the table, and the ratios."""
    drafted = [f"drafted {a}" for a in ACCEPTANCE]
    runs = [
        ("research", 1),
        *((n, b) for b in (1, 8) for n in ("transformers", "plain", "token")),
        *((d, 1) for d in drafted),
    ]
    found: dict[tuple[str, int], list[dict[str, float]]] = {run: [] for run in runs}
    for turn in range(TURNS):
        for run in runs if turn == 0 else runs[1:]:
            command = [sys.executable, __file__, "--tokens", str(tokens), "--one", run[0], str(run[1]), dtype]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[run].append(json.loads(output.strip().splitlines()[-1]))
            print(f"turn {turn + 1}: {run}, {found[run][-1]['tokens_per_s']:.1f}", file=sys.stderr, flush=True)
    print(f"\n{dtype}, {tokens} new tokens\n{'':16}{'batch':>6}{'tokens/s':>11}{'(range)':>14}{'peak GB':>9}")
    for (name, batch), rows in found.items():
        speeds = [row["tokens_per_s"] for row in rows]
        spread = f"({min(speeds):.1f}-{max(speeds):.1f})"
        last = rows[-1]
        note = (
            f"   accepted {last['accepted']:.2f}, {last['tokens_a_pass']:.1f} tokens a pass of the base"
            if "accepted" in last
            else ""
        )
        print(
            f"{name:16}{batch:6}{statistics.median(speeds):11.1f}{spread:>14}{last['peak_gb']:9.2f}{note}", flush=True
        )

    def ratio(first: tuple[str, int], second: tuple[str, int]) -> float:
        """Turn by turn, so that both sides had the same machine."""
        once = found[second] * TURNS if second[0] == "research" else found[second]
        return statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(found[first], once, strict=True))

    return {
        "ratio_guided_vs_research": ratio(("token", 1), ("research", 1)),
        "ratio_guided_vs_research_b8": ratio(("token", 8), ("research", 1)),
        "ratio_plain_vs_transformers": ratio(("plain", 1), ("transformers", 1)),
        "ratio_plain_vs_transformers_b8": ratio(("plain", 8), ("transformers", 8)),
        "ratio_guided_token_b1": ratio(("token", 1), ("plain", 1)),
        "ratio_guided_token_b8": ratio(("token", 8), ("plain", 8)),
        "breakeven_acceptance": breakeven([(a, ratio((f"drafted {a}", 1), ("plain", 1))) for a in ACCEPTANCE]),
    }


def breakeven(curve: list[tuple[float, float]]) -> float | None:
    """The acceptance at which the speed ratio crosses 1, on the line between two measurements."""
    for (a, below), (b, above) in itertools.pairwise(curve):
        if below < 1 <= above:
            return a + (b - a) * (1 - below) / (above - below)
    return curve[0][0] if curve[0][1] >= 1 else None


def measure(name: str, batch: int, dtype: str, tokens: int) -> dict[str, float]:
    """Tokens per second of all rows together, reading the prompts included, and the peak memory of this process."""
    import torch

    import trimtab as tt
    from trimtab.chat import render

    torch.set_num_threads(2)
    model = tt.load(MODEL, dtype=dtype)
    model.__dict__["eos_ids"] = frozenset()
    prompts = [render(model, PROMPTS[i % len(PROMPTS)]).ids for i in range(batch)]
    kind, _, acceptance = name.partition(" ")
    if kind in ("research", "transformers"):
        stock(model.network)
    decode = {"research": research, "transformers": transformers, "plain": plain, "token": token, "drafted": drafted}[
        kind
    ]
    prepared = decode(model, prompts, tokens, float(acceptance or 0))
    next(prepared)
    reset_peak()
    start = time.perf_counter()
    notes = next(prepared)
    return {"tokens_per_s": batch * tokens / (time.perf_counter() - start), "peak_gb": peak_gb(), **notes}


def reset_peak() -> None:
    """Forget what loading needed, where the system can."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# Each contender is a generator: it gets ready up to its first yield, and is timed up to its second.


def plain(model, prompts, tokens, _):
    from trimtab.decoding.engine import generate_ids

    list(generate_ids(model, prompts, max_new_tokens=4))
    yield
    rows = list(generate_ids(model, prompts, max_new_tokens=tokens))
    assert all(len(row.ids) == tokens for row in rows)
    yield {}


def transformers(model, prompts, tokens, _):
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = model.network.generation_config
    config.eos_token_id, config.pad_token_id = None, 0

    def run(n):
        return model.network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, do_sample=False)

    run(4)
    yield
    assert run(tokens).shape[1] == width + tokens
    yield {}


def _token_expert(model):
    """Its words do not matter here, only that it is heard and often disagrees."""
    import torch

    from trimtab.neuron.expert import token_expert
    from trimtab.softtoken.artifact import SoftToken

    vectors = 100 * torch.randn(1, model.hidden_size, generator=torch.Generator().manual_seed(0))
    return token_expert(SoftToken.of(model, vectors, "assistant"), model)


def token(model, prompts, tokens, _):
    from trimtab.decoding.guided import guided_ids
    from trimtab.neuron.neuron import Neuron

    expert = _token_expert(model)
    others = [expert.render(PROMPTS[i % len(PROMPTS)]).ids for i in range(len(prompts))]

    def run(n):
        return list(guided_ids(model, expert, prompts, others, [0.9] * len(prompts), Neuron(), max_new_tokens=n))

    run(4)
    yield
    rows = run(tokens)
    assert all(len(row.ids) == tokens for row in rows)
    spikes = sum(step.spike for row in rows for step in row.trace)
    assert spikes > 0
    yield {}


def research(model, prompts, tokens, _):
    import torch

    from trimtab.models import slot

    expert = _token_expert(model)
    (prompt,), other = prompts, expert.render(PROMPTS[0]).ids
    model.network(input_ids=torch.tensor([prompt]), use_cache=False)
    yield
    reply, v = [], 0.0
    with torch.inference_mode(), slot(model, expert.vectors):
        for _step in range(tokens):
            base, safe = (
                model.network(input_ids=torch.tensor([[*ids, *reply]]), use_cache=False)
                .logits[0, -1]
                .float()
                .softmax(-1)
                for ids in (prompt, other)
            )
            v = 0.875 * v + float(0.5 * (base - safe).abs().sum())
            scores = base.clone()
            if v >= 1:
                v *= 0.6
                union = torch.cat([base.topk(64).indices, safe.topk(64).indices]).unique()
                scores[union] = 0.1 * base[union] + 0.9 * safe[union]
            reply.append(int(scores.argmax()))
    yield {}


def drafted(model, prompts, tokens, acceptance):
    import copy
    from dataclasses import replace

    import torch

    from trimtab.decoding.engine import Row, generate_ids, read
    from trimtab.decoding.guided import Draft, Guidance, decode_drafted
    from trimtab.decoding.sampling import Sampling
    from trimtab.neuron.neuron import Neuron

    layers = model.network.model.layers
    model.network.model.layers = layers[:LAYERS]
    network = copy.deepcopy(model.network)  # weights of its own, which count
    model.network.model.layers = layers
    expert = replace(model, network=network)
    # Mixed at every token, at strength 0: the whole work is done, and what is said is the base's own reply, so agreement can be set.
    said = {row.index: row.ids for row in generate_ids(model, prompts, max_new_tokens=tokens)}
    dice = random.Random(0)

    class Scripted(Guidance):
        def propose(self, logits, rows, ahead):
            super().propose(logits, rows, ahead)
            places = [(said[row.index], len(row.ids) + ahead) for row in rows]
            agree = [place < len(ids) and dice.random() < acceptance for ids, place in places]
            return [ids[place] if same else 0 for (ids, place), same in zip(places, agree, strict=True)]

    yield
    draft = Draft()
    rows = [Row(i, tokens, p) for i, p in enumerate(prompts)]
    with torch.inference_mode():
        past, tails = read(model, prompts)
        other, other_tails = read(expert, prompts)
        guidance = Scripted(Neuron.named("always"), dict.fromkeys(range(len(rows)), 0.0), Sampling(), model.device)
        decode_drafted(model, expert, tails, other_tails, past, other, rows, guidance, draft)
    # In coarser dtypes a near tie may fall otherwise when several tokens are read at once; from there on fewer drafts stand, which `accepted` shows.
    assert model.dtype != torch.float32 or [row.ids for row in rows] == [said[i] for i in range(len(rows))]
    yield {"accepted": draft.accepted / draft.offered, "tokens_a_pass": tokens * len(rows) / draft.rounds}


if __name__ == "__main__":
    main()
