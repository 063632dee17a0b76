"""Suites: labelled prompts that are measured on and never trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.errors import DataError, nearest
from trimtab.evaluation.attacks import apply
from trimtab.evaluation.catalogue import CATALOGUE, fetch
from trimtab.prompts.records import Record, stratified
from trimtab.prompts.sources import load_prompts


@dataclass(frozen=True)
class Suite:
    """A name, its rows, and how many rows there were before `--limit`; the attack that they are under, if any; where they came from, at which commit, under which licence; and how
    many tokens of a reply are enough (0: as many as are asked for)."""

    name: str
    records: tuple[Record, ...]
    total: int
    attack: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    enough: int = 0


def load_suite(source: str, *, limit: int | None = None, seed: int = 0) -> Suite:
    """Read a suite: a name of the catalogue, a `.jsonl` file (its name is the file's stem), `builtin:test` or `builtin:answers`.

    `limit` draws at most so many rows, label and category in proportion.
    """
    if not source.startswith(("builtin", "hf:")) and source not in CATALOGUE and not Path(source).suffix:
        raise DataError(
            f"no suite {source!r}.",
            nearest(source, (*CATALOGUE, "builtin:test", "builtin:answers")) + " Or give a .jsonl file.",
        )
    records = fetch(source) if source in CATALOGUE else load_prompts(source)
    name = Path(source).stem if source.endswith(".jsonl") else source.replace(":", "-")
    origin = {"source": Path(source).name if source.endswith(".jsonl") else source}
    if known := CATALOGUE.get(source):
        origin = {"source": known.source, "revision": known.revision, "licence": known.licence}
    return Suite(name, tuple(stratified(records, limit, seed)), len(records), origin=origin)


def attacked(suite: Suite, attack: str) -> Suite:
    """The harmful rows of a suite under an attack (`attacks.py`); none where it has none."""
    records = tuple(apply(attack, suite.records))
    return Suite(f"{suite.name}+{attack.replace('/', '-')}", records, len(records), attack, suite.origin)
