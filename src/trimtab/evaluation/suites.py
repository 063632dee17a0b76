"""Suites: labelled prompts that are measured on and never trained on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.prompts.records import Record
from trimtab.prompts.sources import load_prompts


@dataclass(frozen=True)
class Suite:
    """A name, its rows, and how many rows there were before `--limit`."""

    name: str
    records: tuple[Record, ...]
    total: int


def load_suite(source: str, *, limit: int | None = None, seed: int = 0) -> Suite:
    """Read a suite from a `.jsonl` file (its name is the file's stem) or from `builtin:test`.

    `limit` draws at most so many rows, label and category in proportion.
    """
    records = load_prompts(source)
    name = Path(source).stem if source.endswith(".jsonl") else source.replace(":", "-")
    return Suite(name, tuple(stratified(records, limit, seed)), len(records))


def stratified(records: Sequence[Record], limit: int | None, seed: int = 0) -> list[Record]:
    """At most `limit` rows, drawn in turn from every (group, category), in their original order."""
    if limit is None or len(records) <= limit:
        return list(records)
    rng = random.Random(seed)
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        strata[record.group, record.category].append(i)
    # Each row gets its relative rank within its stratum; the lowest ranks over all strata are a proportional sample.
    ranked = []
    for members in strata.values():
        for rank, i in enumerate(rng.sample(members, len(members))):
            ranked.append(((rank + rng.random()) / len(members), i))
    return [records[i] for i in sorted(i for _, i in sorted(ranked)[:limit])]
