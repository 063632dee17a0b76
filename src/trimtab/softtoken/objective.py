"""Soft weighting: STA's focal objective, as pure functions on logits.

STA's paper names its parts (hard filtering, focal weighting, harmful and benign samples) but not its formulas; the forms
below are our choice. The loss of one step is

    L = (1 - lambda) * sum_h w_h l_h / sum_h w_h  +  lambda * sum_b w_b l_b / sum_b w_b

with l_h the negative log-likelihood of a refusal, *summed* over the first k reply tokens: averaged over many tokens, the one
decision that matters is diluted. Tokens after the decision ("Sorry" / ", but I") weigh less, for the same reason. For benign requests that the untouched model answers, l_b is the KL divergence from
the untouched model over the first tokens of its own answer, as many as decide (plain likelihood has a floor that swamps the signal); for benign
requests that it refuses, l_b is the negative log-likelihood of a compliant answer. The focal weight is computed from
p = exp(-l), the probability that the sample is already right, and carries no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FocalDirection = Literal["hard", "easy"]


def focal_weights(losses: Tensor, gamma: float, direction: FocalDirection = "hard") -> Tensor:
    """Weights `[B]` of samples with losses `[B]` (nats), without gradient.

    `hard` is (1-p)^gamma, the classic focal form: samples that are still wrong count most. `easy` is p^gamma, as in FocalPO,
    for data whose hardest samples may be mislabelled. gamma 0 gives plain training.
    """
    # Above p, rounding would make (1 - p) vanish for the best samples; expm1 keeps it exact.
    probability = torch.exp(-losses.detach())
    base = -torch.expm1(-losses.detach()) if direction == "hard" else probability
    return base.clamp(min=0).pow(gamma)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """`sum w l / sum w`; the plain mean where all weights vanish; 0 for an empty class."""
    if losses.numel() == 0:
        return losses.sum()
    total = weights.sum()
    return losses.mean() if float(total) < 1e-6 else (weights * losses).sum() / total


def reply_nll(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood `[B]` of reply tokens, summed over the k positions that `mask` keeps.

    Args:
        logits: `[B, k, V]`, position t predicting target t.
        targets: `[B, k]` ids. mask: `[B, k]`, the weight of each position; 0 where a reply is shorter than k.
    """
    picked = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -(picked * mask).sum(-1)


@dataclass(frozen=True)
class Reference:
    """What the untouched model thought at k reply positions: its likeliest tokens, and the rest lumped together.

    Attributes:
        ids: `[B, k, n]` ids of the n likeliest tokens. log_p: `[B, k, n]` their log-probabilities.
    """

    ids: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor, n: int = 256) -> Reference:
        """From logits `[B, k, V]`; `n` tokens hold nearly all of the mass, for a hundredth of the memory."""
        top = logits.log_softmax(-1).topk(min(n, logits.shape[-1]), dim=-1)
        return cls(top.indices, top.values)

    def row(self, index: int) -> Reference:
        """One row, as a batch of one."""
        return Reference(self.ids[index : index + 1].clone(), self.log_p[index : index + 1].clone())

    @classmethod
    def join(cls, references: Sequence[Reference], k: int, starts: Sequence[int] | None = None) -> Reference:
        """Several as one batch, `k` positions of each, from `starts` on (0 if not given)."""
        cut = [slice(start, start + k) for start in starts or [0] * len(references)]
        ids = torch.cat([r.ids[:, part] for r, part in zip(references, cut, strict=True)])
        return cls(ids, torch.cat([r.log_p[:, part] for r, part in zip(references, cut, strict=True)]))


def kl_to_base(logits: Tensor, reference: Reference, mask: Tensor) -> Tensor:
    """KL divergence `[B]` from the untouched model to the tuned one, in nats, summed over the k positions.

    `KL(p_0 || p_theta)` over the reference's tokens plus one bucket for all the others: a lower bound of the full divergence, and
    exact where the rest has no mass. logits `[B, k, V]`, mask `[B, k]`.
    """
    log_q = logits.log_softmax(-1).gather(-1, reference.ids)
    p = reference.log_p.exp()
    inside = (p * (reference.log_p - log_q)).sum(-1)
    rest_p = (1 - p.sum(-1)).clamp(min=1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
    return ((inside + rest_p * (rest_p.log() - rest_q.log())) * mask).sum(-1)


def sta_loss(
    harmful: Tensor,
    benign: Tensor,
    *,
    benign_weight: float,
    gamma: float,
    direction: FocalDirection = "hard",
) -> Tensor:
    """The objective of one step from per-sample losses: `harmful` [H] and `benign` [B], in nats.

    `benign_weight` is lambda in [0, 1]; the two classes' weights add up to 1 (the form of Magic Image, by the same group).
    """
    loss = weighted_mean(harmful, focal_weights(harmful, gamma, direction))
    anchor = weighted_mean(benign, focal_weights(benign, gamma, direction))
    return (1 - benign_weight) * loss + benign_weight * anchor
