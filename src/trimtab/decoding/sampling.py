"""How the next token is drawn from logits. Every draw is fixed by (seed, row, place in the reply) alone.

So a reply does not depend on which rows share its batch, nor on how many tokens were drafted ahead: law 4 holds for sampling too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ConfigError

BROKEN = -1  # instead of an id, where logits are not finite


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. The rest as in transformers: the penalty changes what the model says, before anything else looks at it; then
    temperature, top_k (0 is off), top_p and min_p thin out what may be drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0, "temperature must be at least 0"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be at least 0"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
        )
        if wrong := [message for holds, message in checks if not holds]:
            raise ConfigError(f"sampling: {'; '.join(wrong)}.")


def penalised(logits: Tensor, contexts: Iterable[Sequence[int]], penalty: float) -> Tensor:
    """Logits `[..., B, V]` with every id in row b's context made less likely (Keskar et al., 2019, section 4.1)."""
    if penalty == 1.0:
        return logits
    seen = torch.zeros(logits.shape[-2:], dtype=torch.bool)
    for row, context in enumerate(contexts):
        seen[row, [i for i in context if i < seen.shape[1]]] = True  # a slot id may be no row of the table
    return torch.where(seen.to(logits.device), torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def greedy(scores: Tensor) -> list[int]:
    """The best of `[B, V]`, ties to the lowest id; `BROKEN` where the best is not finite."""
    best = scores.max(-1)
    return [
        i if finite else BROKEN
        for i, finite in zip(best.indices.tolist(), best.values.isfinite().tolist(), strict=True)
    ]


def draw(logits: Tensor, sampling: Sampling, chances: Sequence[float]) -> list[int]:
    """One id for each row of `[B, V]`: the inverse of the cumulative distribution at the row's chance in [0, 1)."""
    # On the CPU: sums of so many terms want float64, which not every device has.
    kept = _thinned((logits / sampling.temperature).softmax(-1), sampling).cpu().double().cumsum(-1)
    total = kept[:, -1:].clone()
    sought = torch.tensor(chances, dtype=torch.float64).unsqueeze(1) * total
    places = torch.searchsorted(kept, sought, right=True)
    # Rounding may carry the largest chances past the end: the last id that may be drawn is where the sum stops growing.
    last = torch.searchsorted(kept, total)
    return [
        i if finite else BROKEN
        for i, finite in zip(torch.minimum(places, last)[:, 0].tolist(), total[:, 0].isfinite().tolist(), strict=True)
    ]


def _thinned(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[B, V]` with what may not be drawn at 0."""
    if sampling.top_k and sampling.top_k < probabilities.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        share = ordered / ordered.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share
        # The token that crosses top_p stays.
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(before >= sampling.top_p, 0))
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.max(-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities


def chance(seed: int, row: int, place: int) -> float:
    """A number in [0, 1) that depends on nothing else (SplitMix64 of the three)."""
    state = 0
    for number in (seed, row, place):
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


_WORD = (1 << 64) - 1
