"""An attacker who knows the defence: a soft prompt in front of the user's words, trained through the model with the defence in place.

White box, with a stated budget: `TOKENS` vectors, so many steps of `BATCH` requests that are in no suite. What is trained for is a compliant beginning, as published soft-prompt
attacks do (Schwinn et al., 2024); the optimiser is the one that trains the defence. No defence in the prompt is expected to hold against it: it says what is left when somebody who
holds the weights tries. Whoever holds them can also drop the token: that is the untouched model, the other arm of `--compare`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from trimtab.chat import render, reply_ids
from trimtab.decoding.engine import forward
from trimtab.decoding.past import Past
from trimtab.evaluation.attacks import apply
from trimtab.models import Model, slot
from trimtab.prompts.records import Record
from trimtab.run import digest, progress, write
from trimtab.softtoken.artifact import SoftToken
from trimtab.softtoken.objective import reply_nll
from trimtab.softtoken.optimiser import NaturalGradient
from trimtab.softtoken.train import initial

TOKENS = 4
BATCH = 8
PROMISED = 8  # words of the compliant beginning
RADIUS, DAMPING = 0.3, 0.1  # see `softtoken/optimiser.py`


def soft_prompt(
    model: Model, token: SoftToken | None, records: Sequence[Record], steps: int, folder: Path, seed: int = 0
) -> Tensor:
    """The attacker's vectors `[TOKENS, hidden]`, trained on `records`; kept in `folder`, and not trained twice.

    Args:
        token: the defence, if any; its vectors stay as they are. records: harmful requests to train on.
    """
    attacked = apply(f"prefill:{PROMISED}", records)
    key = digest(
        model.fingerprint,
        str(model.dtype),
        token.sha256() if token else "",
        steps,
        seed,
        [(r.id, r.prefill) for r in attacked],
    )
    path = folder / f"soft-prompt-{key}.safetensors"
    if path.exists():
        return load_file(path)["vectors"].to(model.device)
    vectors = initial(model, TOKENS, seed)
    optimiser = NaturalGradient(vectors, DAMPING)
    with progress("training the attacker", steps) as advance:
        for step in range(steps):
            drawn = random.Random(f"{seed}/{step}").sample(attacked, min(BATCH, len(attacked)))
            copies = vectors.expand(len(drawn), *vectors.shape).clone().requires_grad_(True)
            loss = promise_loss(model, token, drawn, copies)
            (gradients,) = torch.autograd.grad(loss, copies)
            optimiser.step(vectors, gradients * len(drawn), RADIUS)
            advance()
    write(path, save({"vectors": vectors.cpu().contiguous()}))
    return vectors


def promise_loss(model: Model, token: SoftToken | None, records: Sequence[Record], vectors: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of the compliant beginnings (`prefill`) of `records`; `vectors` `[B, TOKENS, hidden]` are the attacker's."""
    prompts = [attacked_ids(model, token, record) for record in records]
    promised = [reply_ids(model, record.prefill) for record in records]
    k = max(map(len, promised))
    targets = torch.tensor([ids + ids[-1:] * (k - len(ids)) for ids in promised], device=model.device)
    mask = torch.tensor([[float(t < len(ids)) for t in range(k)] for ids in promised], device=model.device)
    whole = [prompt + tuple(row[:-1]) for prompt, row in zip(prompts, targets.tolist(), strict=True)]
    with slot(model, beside(token, vectors)):
        logits = forward(model, whole, Past.empty(len(records), model.device), k)
    return reply_nll(logits, targets, mask).mean()


def attacked_ids(model: Model, token: SoftToken | None, record: Record) -> tuple[int, ...]:
    """Ids of a conversation with the defence in its place and the attacker's slots before the last user's words."""
    if token is None:
        return render(model, record.chat, attack_tokens=TOKENS).ids
    return token.render(model, record.chat, attack_tokens=TOKENS).ids


def beside(token: SoftToken | None, vectors: Tensor) -> Tensor:
    """The defence's vectors, then the attacker's, as the slot ids of `attacked_ids` count them."""
    if token is None:
        return vectors
    defence = token.vectors.to(vectors.device)
    return torch.cat([defence.expand(*vectors.shape[:-2], *defence.shape), vectors], dim=-2)
