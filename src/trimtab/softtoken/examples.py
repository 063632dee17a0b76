"""Requests rendered to ids, the part before the slot already read.

What stands before the slot never changes, so its keys and values are computed once. A late slot then costs a few tokens per example
whatever the prompt's length. The untouched prompts are cut before the header of the reply, so that scoring, the model's own
words, the reference of the KL term and training at `assistant` all share one reading.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.chat import Position, render
from trimtab.decoding.engine import Prefixes
from trimtab.decoding.past import Past
from trimtab.errors import ChatError
from trimtab.models import Model
from trimtab.prompts.records import Group, Record
from trimtab.run import progress

Ids = tuple[int, ...]


class Examples:
    """Rendered requests, in the order of `records`.

    Attributes:
        records: the requests. heads: ids before the cut, already read. tails: ids from the cut on. lengths: of whole prompts.
    """

    def __init__(
        self,
        model: Model,
        records: Sequence[Record],
        title: str,
        *,
        position: Position | None = None,
        n_tokens: int = 1,
        base: Examples | None = None,
    ) -> None:
        """`position` None is the untouched model. What `base` has already read of the same records is not read again."""
        self.records = records
        self._prefixes: Prefixes
        cut = [_cut(model, record, position, n_tokens) for record in records]
        self.heads = [head for head, _ in cut]
        self.tails = [tail for _, tail in cut]
        self.lengths = [len(head) + len(tail) for head, tail in cut]
        self._row = {record.id: i for i, record in enumerate(records)}
        if base and all(head == base.heads[base._row[r.id]] for r, head in zip(records, self.heads, strict=True)):
            self._row, self._prefixes = base._row, base._prefixes
            return
        with progress(title, len(records)) as advance:
            self._prefixes = Prefixes(model, self.heads, progress=advance)

    def group(self, index: int) -> Group:
        return self.records[index].group

    def indices(self, group: Group) -> list[int]:
        return [i for i, record in enumerate(self.records) if record.group == group]

    def past(self, indices: Sequence[int]) -> Past:
        """What has been read of these requests."""
        return self._prefixes.past([self._row[self.records[i].id] for i in indices])


def _cut(model: Model, record: Record, position: Position | None, n_tokens: int) -> tuple[Ids, Ids]:
    if position is not None:
        prompt = render(model, record.chat, position=position, n_tokens=n_tokens)
        return prompt.ids[: prompt.slot], prompt.ids[prompt.slot :]
    ids = render(model, record.chat).ids
    try:
        cut = render(model, record.chat, position="assistant", n_tokens=1).slot
    except ChatError:
        cut = len(ids) - 1
    return ids[:cut], ids[cut:]
