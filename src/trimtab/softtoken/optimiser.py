"""Natural gradient for a vector of a few hundred to a few thousand numbers.

One token is so few numbers that the full Fisher matrix fits, and the slot gives per-sample gradients for nothing: each row of
a batch holds its own copy of the vector. So a step is

    F <- beta F + (1 - beta) mean_i g_i g_i'      m <- mu m + (1 - mu) mean_i g_i
    delta = -(F + damping * mean(diag F) * I)^-1 m,   scaled so that sqrt(delta' F delta) = radius

The radius is in nats: how far the samples' losses may move in one step. It needs no tuning to a model's embedding scale, which
a learning rate does (published ones span three orders of magnitude). Our choice, not the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA, MU = 0.95, 0.8
MAX_GROWTH = 0.15  # a step moves a vector by at most this share of its norm


class NaturalGradient:
    """State of the optimiser for `vectors` [n_tokens, hidden]; the Fisher matrix is block-diagonal over tokens.

    Attributes:
        fisher: `[n_tokens, hidden, hidden]`. momentum: `[n_tokens, hidden]`. steps: how many were taken.
    """

    def __init__(self, vectors: Tensor, damping: float) -> None:
        n, d = vectors.shape
        self.damping = damping
        self.fisher = torch.zeros(n, d, d, device=vectors.device)
        self.momentum = torch.zeros(n, d, device=vectors.device)
        self.steps = 0

    def step(self, vectors: Tensor, gradients: Tensor, radius: float) -> None:
        """Move `vectors` in place, given per-sample gradients `[B, n_tokens, hidden]` of the loss's terms."""
        self.steps += 1
        self.fisher.mul_(BETA)
        for block, own in zip(self.fisher, gradients.unbind(1), strict=True):
            block.addmm_(own.T, own, alpha=(1 - BETA) / len(own))
        self.momentum.mul_(MU).add_(gradients.mean(0), alpha=1 - MU)
        fisher = self.fisher / (1 - BETA**self.steps)
        momentum = self.momentum / (1 - MU**self.steps)
        diagonal = fisher.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
        eye = torch.eye(fisher.shape[-1], device=fisher.device)
        damped = fisher + self.damping * diagonal[:, None, None] * eye
        # One by one: given several large systems at once, some builds of MKL fail without raising.
        delta = torch.stack([torch.linalg.solve(f, m) for f, m in zip(damped, momentum, strict=True)])
        length = (delta * (fisher @ delta.unsqueeze(-1)).squeeze(-1)).sum().clamp(min=1e-18).sqrt()
        delta = delta * (radius / length)
        limit = MAX_GROWTH * vectors.norm(dim=1, keepdim=True) / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)
        vectors.sub_(delta * limit.clamp(max=1))
