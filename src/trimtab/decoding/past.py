"""What a batch has already read: keys and values with room to grow, the mask over them, and how long each row is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class Growing(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer that are written behind one another into room laid out ahead.

    The library's own layer copies all it holds at every token: a fifth of the time of decoding a batch. While gradients are on it does so here as
    well, since autograd must find every tensor as it was.
    """

    ROOM = 64  # columns laid out at a time
    keys: Tensor
    values: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, heads, n, head_dim]`; returns all that is held."""
        if torch.is_grad_enabled():
            self._room = None
            held: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **options)
            return held
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if self._room is None or not self._fits(end):
            batch, heads, _, size = key_states.shape
            keys = key_states.new_empty(batch, heads, end + self.ROOM, size)
            values = value_states.new_empty(batch, heads, end + self.ROOM, value_states.shape[3])
            if begin:
                keys[:, :, :begin], values[:, :, :begin] = self.keys, self.values
            self._room = keys, values
        keys, values = self._room
        keys[:, :, begin:end], values[:, :, begin:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _fits(self, end: int) -> bool:
        """Whether `end` columns fit into the room, and what is held still lies in it: rows that were picked out lie elsewhere."""
        keys, _ = self._room or (self.keys, self.values)
        # Tensors made in inference mode cannot be written to outside it.
        writable = torch.is_inference_mode_enabled() or not keys.is_inference()
        return writable and end <= keys.shape[2] and self.keys.data_ptr() == keys.data_ptr()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows; the room of all of them is free at once."""
        super().batch_select_indices(indices)
        self._room = None

    def gather(self, where: Tensor) -> None:
        """Lay the columns out anew: `where` `[B, n]` says which one comes where."""
        index = where[:, None, :, None]
        self.keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self._room = None


@dataclass
class Past:
    """What a batch has already read: its cache, the mask over it, and how many real tokens each row has.

    Attributes:
        cache: keys and values, `[B, heads, P, head_dim]` a layer.
        mask: `[B, P]`, 0 where a row is padded.
        lengths: `[B]`, real tokens of each row; the position of its next token.
    """

    cache: Cache
    mask: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Past:
        none = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls(_growing(), none, torch.zeros(batch, dtype=torch.long, device=device))

    def repeat(self, batch: int) -> Past:
        """A past of one row as that of a batch; gradients flow back into the one."""
        cache = _growing()
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), index)
        return Past(cache, self.mask.expand(batch, -1), self.lengths.expand(batch))

    @classmethod
    def stack(cls, first: Past, second: Past) -> Past:
        """Two pasts of one network as one batch, the narrower padded on the left."""
        width = max(first.mask.shape[1], second.mask.shape[1])
        cache = _growing()
        for index, layers in enumerate(zip(first.cache.layers, second.cache.layers, strict=True)):
            keys = [pad(layer.keys, (0, 0, width - layer.keys.shape[2], 0)) for layer in layers]
            values = [pad(layer.values, (0, 0, width - layer.values.shape[2], 0)) for layer in layers]
            cache.update(torch.cat(keys), torch.cat(values), index)
        masks = [pad(past.mask, (width - past.mask.shape[1], 0)) for past in (first, second)]
        return cls(cache, torch.cat(masks), torch.cat([first.lengths, second.lengths]))

    def retract(self, counts: Sequence[int]) -> None:
        """Unread the last `counts[b]` tokens of each row, which all rows have read since the last retreat.

        What only some rows unread stays in the cache behind the mask. Once such holes fill a quarter of it, the rows are laid out anew.
        """
        columns = torch.arange(self.mask.shape[1], 0, -1, device=self.mask.device)
        self.mask = self.mask * (columns > torch.tensor(counts, device=self.mask.device).unsqueeze(1))
        self.lengths = self.lengths - torch.tensor(counts, device=self.mask.device)
        shorter = self.mask.shape[1] - min(counts)
        longest = int(self.lengths.max())
        if shorter > 1.25 * longest:
            # Real tokens to the right, in their order; what is left of them is padding.
            order = self.mask.argsort(dim=1, stable=True)[:, -longest:]
            for layer in self.cache.layers:
                layer.gather(order)
            self.mask = self.mask.gather(1, order)
        elif shorter < self.mask.shape[1]:
            self.mask = self.mask[:, :shorter]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :shorter], layer.values[:, :, :shorter]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]


def _growing() -> Cache:
    return Cache(layer_class_to_replicate=Growing)
