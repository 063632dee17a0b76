"""Batched, cached decoding on ids alone: the engine knows nothing of tokenizers or chats.

Three things live here: `forward`, one pass over the ends of several rows behind what is already cached; `Prefixes`,
the cached beginnings that never change; and `generate_ids`, prefill and decode until every row has stopped.

Rows are padded on the left, between the cached beginning and their own tokens, so that all rows end in the same column:
the next token of every row is then read from the last columns alone, and only these are projected to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.models import Model, slot

Ids = Sequence[int]


@dataclass
class Past:
    """What a batch has already read: its cache, the mask over it, and how many real tokens each row has.

    Attributes:
        cache: keys and values, `[B, heads, P, head_dim]` a layer.
        mask: `[B, P]`, 0 where a row is padded.
        lengths: `[B]`, real tokens of each row; the position of its next token.
    """

    cache: DynamicCache
    mask: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Past:
        none = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls(DynamicCache(), none, torch.zeros(batch, dtype=torch.long, device=device))

    def fork(self) -> Past:
        """A second past that may grow by itself; the tensors are shared, never written to."""
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, index)
        return Past(cache, self.mask, self.lengths)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]


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
        self._model = model
        self._common: list[tuple[Tensor, Tensor]] = []
        self._own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
        self.lengths = [len(row) for row in rows]
        if shared:
            past = Past.empty(1, model.device)
            forward(model, [shared], past, 1)
            self._common = _layers(past.cache)
        for chunk in by_length([length - self.shared for length in self.lengths], batch_size):
            own = [rows[i][self.shared :] for i in chunk]
            if any(own):
                past = self._shared_past(len(chunk))
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
        past = self._shared_past(len(rows))
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

    def _shared_past(self, batch: int) -> Past:
        past = Past.empty(batch, self._model.device)
        for layer, (keys, values) in enumerate(self._common):
            past.cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
        past.mask = torch.ones(batch, self.shared, dtype=torch.long, device=self._model.device)
        past.lengths = torch.full((batch,), self.shared, dtype=torch.long, device=self._model.device)
        return past


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; each row draws from its own seeded stream."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Row:
    """One reply while it grows. `stop` is `eos`, `length`, or empty while it runs."""

    index: int
    ids: list[int] = field(default_factory=list)
    stop: str = ""


def generate_ids(
    model: Model,
    prompts: Sequence[Ids],
    *,
    vectors: Tensor | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    batch_size: int = 32,
) -> Iterator[Row]:
    """Continue every prompt; yields the finished rows batch by batch, in no fixed order.

    Prompts are batched by length. `ids` excludes the end-of-turn token.
    """
    for chunk in by_length([len(p) for p in prompts], batch_size):
        with torch.inference_mode(), slot(model, vectors):
            past, tails = read(model, [prompts[i] for i in chunk])
            streams = [_stream_seed((sampling or Sampling()).seed, i) for i in chunk]
            rows = decode(model, tails, past, max_new_tokens, sampling, vectors=vectors, seeds=streams)
        yield from (Row(chunk[row.index], row.ids, row.stop) for row in rows)


def read(model: Model, prompts: Sequence[Ids]) -> tuple[Past, list[Ids]]:
    """Read whole prompts but for their last tokens, which are returned as the tails: so there is a column with logits."""
    past = Prefixes(model, [p[:-1] for p in prompts], batch_size=len(prompts)).past(range(len(prompts)))
    return past, [p[-1:] for p in prompts]


def decode(
    model: Model,
    tails: Sequence[Ids],
    past: Past,
    limit: int,
    sampling: Sampling | None = None,
    *,
    vectors: Tensor | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Row]:
    """Decode one batch behind `past` to the end: at most `limit` tokens a row.

    Finished rows leave the batch. The slot ids of `vectors` are never generated. `seeds` start each row's own random stream.
    """
    sampling = sampling or Sampling()
    banned = [i for i in model.slot_ids(vectors.shape[-2]) if i < len(model.table)] if vectors is not None else []
    rows = [Row(i) for i in range(len(tails))]
    streams = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(tails))]
    running = rows
    while running:
        logits = forward(model, tails, past, 1)[:, -1]
        logits[:, banned] = -torch.inf
        for row, token in zip(running, _choose(logits, running, sampling, streams), strict=True):
            if token in model.eos_ids:
                row.stop = "eos"
            else:
                row.ids.append(token)
                row.stop = "length" if len(row.ids) >= limit else ""
        keep = [i for i, row in enumerate(running) if not row.stop]
        if len(keep) < len(running):
            past.select(torch.tensor(keep, dtype=torch.long, device=model.device))
        running = [running[i] for i in keep]
        tails = [[row.ids[-1]] for row in running]
    return rows


def _choose(logits: Tensor, rows: list[Row], sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """The next token of every row; ties go to the lowest id."""
    if sampling.temperature == 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    probabilities = (logits / sampling.temperature).softmax(-1).cpu()
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p stays
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(outside, 0))
    return [
        int(torch.multinomial(p, 1, generator=streams[row.index])) for p, row in zip(probabilities, rows, strict=True)
    ]


def common_length(rows: Sequence[Ids]) -> int:
    """How many first ids all rows share."""
    columns = zip(*rows, strict=False)
    return next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, rows)))


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, shortest first: little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _stream_seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % (2**63)


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]
