"""The slot as an output: a row more in the table of a tied head is also one more thing to say, and a trained vector is a loud one.

A head written out as a table of its own needs a row for the slot that is never said. Zero will not do: its logit, 0, is near that of many words. The row
is fitted by ridge regression on the model's own final states, to a logit far below all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.chat import Prompt
from trimtab.decoding.engine import Row, by_length, decode, plain, read
from trimtab.decoding.sampling import Sampling
from trimtab.models import Model, slot
from trimtab.softtoken.artifact import SoftToken

LOGIT = -60.0  # that the row is fitted to; on states it has not seen, half of it is left
RIDGE = 100.0
REPLY_TOKENS = 16


@torch.inference_mode()
def states(model: Model, token: SoftToken, prompts: Sequence[Prompt]) -> list[Tensor]:
    """For each prompt, what the head reads `[n, hidden]`, float32, at its last place and along the greedy reply to it, with the token in place."""
    seen: list[list[Tensor]] = [[] for _ in prompts]
    latest: list[Tensor] = []
    greedy = plain(Sampling())

    def keep(_module: object, args: tuple[Tensor, ...]) -> None:
        latest[:] = [args[0][:, -1].float().cpu()]

    def rule(logits: Tensor, rows: Sequence[Row]) -> list[int]:
        for row, state in zip(rows, latest[0], strict=True):
            seen[row.index].append(state)
        return greedy(logits, rows)

    handle = model.network.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        vectors = token.vectors.to(model.device)
        with slot(model, vectors):
            for chunk in by_length([len(prompt.ids) for prompt in prompts], 32):
                past, tails = read(model, [prompts[i].ids for i in chunk])
                decode(model, tails, past, [Row(i, REPLY_TOKENS) for i in chunk], rule, vectors=vectors)
    finally:
        handle.remove()
    return [torch.stack(each) for each in seen]


def unsaid(heard: Tensor) -> Tensor:
    """A row `[hidden]` for a slot that is never said, fitted to `heard` `[n, hidden]`."""
    hidden: Tensor = heard.double()
    gram = hidden.T @ hidden + RIDGE * torch.eye(hidden.shape[1], dtype=torch.float64)
    row: Tensor = torch.linalg.solve(gram, hidden.T @ torch.full((len(hidden),), LOGIT, dtype=torch.float64))
    return row.float()


@torch.inference_mode()
def loudest(model: Model, heard: Tensor, rows: Tensor) -> float:
    """The highest probability, over states `[n, hidden]`, that output rows `[k, hidden]` added to the model's head would give the slot."""
    worst = 0.0
    head = model.network.get_output_embeddings()
    config = model.network.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    for part in torch.split(heard, 64):
        there = part.to(model.device, model.dtype)
        logits, mine = head(there).float(), (there.float() @ rows.to(model.device, torch.float32).T)
        logits, mine = logits * scale, mine * scale
        if cap:
            logits, mine = (torch.tanh(each / cap) * cap for each in (logits, mine))
        log_p = mine.logsumexp(-1) - torch.cat([logits, mine], -1).logsumexp(-1)
        worst = max(worst, float(log_p.exp().max()))
    return worst
