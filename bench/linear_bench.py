"""Products with frozen weights, `trimtab.linear` against `torch.nn.Linear`: the matrices of SmolLM2 in float32, two threads, no gradients.

    python bench/linear_bench.py

Prints a table of milliseconds for a pass through all of them by the number of rows, then one JSON line: ratio_rows_N (torch's time over ours; the best of ten passes that take turns).
"""

from __future__ import annotations

import copy
import json
import time

import torch

import trimtab as tt
from stock import stock

ROWS, TURNS = (1, 2, 8, 32, 256), 10


def main() -> None:
    torch.set_num_threads(2)
    ours = tt.load("smollm2-135m", dtype="float32", device="cpu").network
    sides = {"torch": stock(copy.deepcopy(ours)), "trimtab": ours}
    layers = {name: [m for m in net.modules() if isinstance(m, torch.nn.Linear)] for name, net in sides.items()}
    print(f"{'rows':>6}{'torch':>10}{'trimtab':>10}   (ms)")
    result = {}
    for rows in ROWS:
        best = {name: min(times) for name, times in taking_turns(layers, rows).items()}
        print(f"{rows:6}{1e3 * best['torch']:10.1f}{1e3 * best['trimtab']:10.1f}")
        result[f"ratio_rows_{rows}"] = round(best["torch"] / best["trimtab"], 2)
    print(json.dumps(result))


@torch.inference_mode()
def taking_turns(layers: dict[str, list[torch.nn.Linear]], rows: int) -> dict[str, list[float]]:
    read = {size: torch.randn(rows, size) for size in {layer.in_features for layer in layers["torch"]}}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(TURNS):
        for name, part in layers.items():
            start = time.perf_counter()
            for layer in part:
                layer(read[layer.in_features])
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
