"""Suites: labelled prompts that are measured on and never trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.errors import DataError, nearest
from trimtab.evaluation.attacks import apply
from trimtab.evaluation.catalogue import CATALOGUE, fetch
from trimtab.prompts.records import Record, stratified
from trimtab.prompts.sources import load_prompts, read_good_lines
from trimtab.run import console


@dataclass(frozen=True)
class Suite:
    """A name, its rows, and how many rows there were before `--limit`; the attack that they are under, if any; where they came from, at which commit, under which licence; how many tokens
    of a reply are enough (0: as many as are asked for); how many lines of its file were malformed and are left out."""

    name: str
    records: tuple[Record, ...]
    total: int
    attack: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    enough: int = 0
    malformed: int = 0


def load_suite(source: str, *, limit: int | None = None, seed: int = 0) -> Suite:
    """Read a suite: a name of the catalogue, a `.jsonl` file (its name is the file's stem), `builtin:test` or `builtin:answers`.

    `limit` draws at most so many rows, label and category in proportion. Malformed lines of a file are told with their numbers, counted, and left out.

    Raises:
        DataError: no such suite, a file with no good line, a named suite that cannot be had.
    """
    if not source.startswith(("builtin", "hf:")) and source not in CATALOGUE and not Path(source).suffix:
        raise DataError(
            f"no suite {source!r}.",
            nearest(source, (*CATALOGUE, "builtin:test", "builtin:answers")) + " Or give a .jsonl file.",
        )
    broken: dict[int, DataError] = {}
    if source in CATALOGUE:
        records = fetch(source)
    elif source.startswith(("builtin", "hf:")):
        records = load_prompts(source)
    else:
        records, broken = read_good_lines(Path(source))
    for error in broken.values():
        console.print(f"left out: {error.args[0]}", markup=False)
    name = Path(source).stem if source.endswith(".jsonl") else source.replace(":", "-")
    origin = {"source": Path(source).name if source.endswith(".jsonl") else source}
    if known := CATALOGUE.get(source):
        origin = {"source": known.source, "revision": known.revision, "licence": known.licence}
    return Suite(name, tuple(stratified(records, limit, seed)), len(records), origin=origin, malformed=len(broken))


def attacked(suite: Suite, attack: str) -> Suite:
    """The harmful rows of a suite under an attack (`attacks.py`); none where it has none."""
    records = tuple(apply(attack, suite.records))
    return Suite(f"{suite.name}+{attack.replace('/', '-')}", records, len(records), attack, suite.origin)
