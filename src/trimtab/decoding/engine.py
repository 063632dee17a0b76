"""Batched, cached decoding on ids alone: the engine knows nothing of tokenizers or chats.

Three things live here: `forward`, one pass over the ends of several rows behind what is already cached (`past.py`); `Prefixes`,
the cached beginnings that never change; and `decode`, token by token until every row has stopped.

Rows are padded on the left, between the cached beginning and their own tokens, so that all rows end in the same column:
the next token of every row is then read from the last columns alone, and only these are projected to the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.past import Past
from trimtab.decoding.sampling import BROKEN, Sampling, chance, draw, greedy, penalised
from trimtab.models import Model, slot
from trimtab.neuron.neuron import Step

Ids = Sequence[int]

# Tokens of prompts, padding included, in one pass: enough to keep the processor busy. One long prompt among short ones would make padding of most of it.
READ_TOGETHER = 3072


def forward(model: Model, tails: Sequence[Ids], past: Past, keep: int) -> Tensor:
    """Read `tails` behind `past` (which grows) and return the logits of the last `keep` columns, `[B, keep, V]`, fp32.

    Tails may differ in length. Gradients flow wherever autograd is on.
    """
    width = max(map(len, tails))
    ids = torch.zeros(len(tails), width, dtype=torch.long)
    mask = torch.zeros(len(tails), width, dtype=torch.long)
    for row, tail in enumerate(tails):
        ids[row, width - len(tail) :] = torch.tensor(tail)
        mask[row, width - len(tail) :] = 1
    mask = mask.to(model.device)
    positions = (past.lengths.unsqueeze(1) + mask.cumsum(1) - 1).clamp(min=0)
    past.mask = torch.cat([past.mask, mask], dim=1)
    past.lengths = past.lengths + mask.sum(1)
    logits: Tensor = model.network(
        input_ids=ids.to(model.device),
        attention_mask=_attention_mask(model, past.mask, width),
        position_ids=positions,
        past_key_values=past.cache,
        use_cache=True,
        # As indices, not as a count: a slice of hidden states is not contiguous, and the projection to the vocabulary would
        # then read its weights anew for every row.
        logits_to_keep=torch.arange(width - keep, width, device=model.device),
    ).logits
    return logits.float()


def _attention_mask(model: Model, mask: Tensor, width: int) -> Any:
    """The mask `[B, P + width]` as the network needs it, to read the last `width` columns.

    A family with a sliding window counts the window in columns. Padding between real tokens would use it up, so once the
    window can matter the masks are written out, with distances in real tokens (law 4).
    """
    config = model.network.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if not window or mask.shape[1] <= window or "sliding_attention" not in kinds:
        return mask
    places, columns = mask.cumsum(1), torch.arange(mask.shape[1], device=mask.device)
    query = columns[-width:, None]
    # A padded query sees itself: attention to nothing is not a number.
    seen = ((columns <= query) & mask[:, None].bool()) | (columns == query)
    near = seen & (places[:, -width:, None] - places[:, None] < window)
    written = {
        kind: torch.zeros(see.shape, dtype=model.dtype, device=mask.device)
        .masked_fill(~see, torch.finfo(model.dtype).min)
        .unsqueeze(1)
        for kind, see in {"full_attention": seen, "sliding_attention": near}.items()
    }
    return written if "full_attention" in kinds else written["sliding_attention"]


class Prefixes:
    """Keys and values of prompt beginnings that stay the same while a later slot learns or a reply grows.

    What all rows share is held once; the rest is held row by row, without padding.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, rows: Sequence[Ids], *, batch_size: int = 48, progress: Callable[[int], None] | None = None
    ) -> None:
        shared = rows[0][: common_length(rows)] if rows else ()
        self.shared = len(shared)
        self._common = Past.empty(1, model.device)
        self._own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
        self.lengths = [len(row) for row in rows]
        if shared:
            forward(model, [shared], self._common, 1)
        for chunk in by_length([length - self.shared for length in self.lengths], batch_size, READ_TOGETHER):
            own = [rows[i][self.shared :] for i in chunk]
            if any(own):
                past = self._common.repeat(len(chunk))
                forward(model, own, past, 1)
                layers = _layers(past.cache)
                for row, i in enumerate(chunk):
                    if own[row]:
                        self._own[i] = [
                            (k[row, :, -len(own[row]) :].clone(), v[row, :, -len(own[row]) :].clone())
                            for k, v in layers
                        ]
            if progress:
                progress(len(chunk))

    def past(self, rows: Sequence[int]) -> Past:
        """A fresh `Past` holding these rows, which the caller may extend."""
        past = self._common.repeat(len(rows))
        own = [self.lengths[i] - self.shared for i in rows]
        width = max(own, default=0)
        if width == 0:
            return past
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, length in enumerate(own):
            mask[row, width - length :] = 1
        layers = next(self._own[i] for i in rows if self._own[i])
        for layer, (key, _) in enumerate(layers):
            keys = key.new_zeros(len(rows), key.shape[0], width, key.shape[2])
            values = torch.zeros_like(keys)
            for row, i in enumerate(rows):
                if own[row]:
                    keys[row, :, width - own[row] :], values[row, :, width - own[row] :] = self._own[i][layer]
            past.cache.update(keys, values, layer)
        past.mask = torch.cat([past.mask, mask.to(past.mask.device)], dim=1)
        past.lengths = past.lengths + past.mask[:, self.shared :].sum(1)
        return past


@dataclass
class Row:
    """One reply while it grows.

    Attributes:
        index: its number among all prompts. limit: at most so many new tokens. prompt: ids before the reply.
        stream: the number that, with the seed, fixes what is drawn for it; its index if not given.
        trace: under guidance, what the neuron did at each token.
        stop: empty while it runs; `eos`, `length`, `error` (and what it is in `error`), or what a `Watch` said.
    """

    index: int
    limit: int
    prompt: Ids = ()
    stream: int = -1
    ids: list[int] = field(default_factory=list)
    stop: str = ""
    error: str = ""
    trace: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = self.index if self.stream < 0 else self.stream

    def fits(self, model: Model, length: int) -> bool:
        """Whether a prompt of `length` tokens leaves `model` room for a reply; ends the row if not, lowers its limit if it must."""
        context = getattr(model.network.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if length >= context:
            self.stop, self.error = "error", f"a prompt of {length} tokens; {model.name} reads {context} with its reply"
        else:
            self.limit = int(min(self.limit, context - length))
        return not self.stop

    def take(self, token: int, eos_ids: frozenset[int], watch: Watch | None = None) -> None:
        """Add the next token, or end. `ids` excludes the end-of-turn token."""
        if token == BROKEN:
            self.stop, self.error = "error", f"the logits of token {len(self.ids) + 1} are not finite"
        elif token in eos_ids:
            self.stop = "eos"
        else:
            self.ids.append(token)
            self.stop = (watch(self) if watch else "") or ("length" if len(self.ids) >= self.limit else "")


# From the logits of the running rows `[voices, B, V]` to the next id of each.
Rule = Callable[[Tensor, Sequence[Row]], list[int]]
# Sees a row after each of its tokens; a word ends it.
Watch = Callable[[Row], str]


def plain(sampling: Sampling) -> Rule:
    """The model alone, greedy or sampled."""

    def rule(logits: Tensor, rows: Sequence[Row]) -> list[int]:
        contexts = ((*row.prompt, *row.ids) for row in rows)
        return choose(penalised(logits[0], contexts, sampling.repetition_penalty), rows, sampling)

    return rule


def choose(scores: Tensor, rows: Sequence[Row], sampling: Sampling, ahead: int = 0) -> list[int]:
    """The best of `[B, V]`, or what is drawn from it as from logits, `ahead` places after the rows' next token."""
    if sampling.temperature == 0:
        return greedy(scores)
    return draw(scores, sampling, [chance(sampling.seed, row.stream, len(row.ids) + ahead) for row in rows])


def generate_ids(
    model: Model,
    prompts: Sequence[Ids],
    *,
    vectors: Tensor | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    watch: Watch | None = None,
    streams: Sequence[int] | None = None,
) -> Iterator[Row]:
    """Continue every prompt; yields the finished rows batch by batch, in no fixed order. Prompts are batched by length."""
    rule = plain(sampling or Sampling())
    for chunk in by_length([len(p) for p in prompts], batch_size):
        rows = [Row(i, max_new_tokens, prompts[i], streams[i] if streams else i) for i in chunk]
        if fit := [row for row in rows if row.fits(model, len(row.prompt))]:
            with torch.inference_mode(), slot(model, vectors):
                past, tails = read(model, [row.prompt for row in fit])
                decode(model, tails, past, fit, rule, vectors=vectors, watch=watch)
        yield from rows


def read(model: Model, prompts: Sequence[Ids]) -> tuple[Past, list[Ids]]:
    """Read whole prompts but for their last tokens, which are returned as the tails: so there is a column with logits."""
    past = Prefixes(model, [p[:-1] for p in prompts], batch_size=len(prompts)).past(range(len(prompts)))
    return past, [p[-1:] for p in prompts]


def decode(
    model: Model,
    tails: Sequence[Ids],
    past: Past,
    rows: Sequence[Row],
    rule: Rule | None = None,
    *,
    voices: int = 1,
    vectors: Tensor | None = None,
    watch: Watch | None = None,
) -> None:
    """Let one batch of `rows` grow behind `past` until each has stopped; greedy if no `rule` is given.

    With several `voices` the batch holds every row once a voice (`[voices * B]`, voice by voice), each behind a past of its own; the rule
    sees them all, and what it chooses is read by all. Finished rows leave the batch. The slot ids of `vectors` are never generated.
    """
    rule = rule or plain(Sampling())
    banned = banned_ids(model, vectors)
    running = list(rows)
    while running:
        logits = forward(model, tails, past, 1)[:, -1]
        logits[:, banned] = -torch.inf
        for row, token in zip(running, rule(logits.view(voices, len(running), -1), running), strict=True):
            row.take(token, model.eos_ids, watch)
        keep = [i for i, row in enumerate(running) if not row.stop]
        if keep and len(keep) < len(running):
            past.select(torch.tensor([v * len(running) + i for v in range(voices) for i in keep], device=model.device))
        running = [running[i] for i in keep]
        tails = [row.ids[-1:] for row in running] * voices


def banned_ids(model: Model, vectors: Tensor | None) -> list[int]:
    """Rows of the table that are never generated: the slots of `vectors`."""
    return [i for i in model.slot_ids(vectors.shape[-2]) if i < len(model.table)] if vectors is not None else []


def common_length(rows: Sequence[Ids]) -> int:
    """How many first ids all rows share."""
    columns = zip(*rows, strict=False)
    return next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, rows)))


def by_length(lengths: Sequence[int], batch_size: int, tokens: float = math.inf) -> Iterator[list[int]]:
    """Indices in batches of similar length, shortest first: little padding. A batch has at most `batch_size` rows and, padding included, `tokens` tokens (one row may have more)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[i] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]
