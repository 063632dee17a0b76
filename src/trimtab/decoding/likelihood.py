"""How likely given replies are: under the model alone, with a token, or under a guide.

Under a guide (NGSD) the neuron goes along the given words as it would along its own: at every token it integrates how far base and expert disagree; where it fires, the
token's probability is the mixture's, elsewhere the base's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.chat import Message, Prompt, as_messages, render, reply_ids
from trimtab.decoding.engine import Ids, Prefixes, Row, banned_ids, by_length, common_length, forward
from trimtab.decoding.sampling import chance
from trimtab.models import Model, slot
from trimtab.neuron.expert import Expert
from trimtab.neuron.guide import Guide
from trimtab.neuron.mix import DIVERGENCES, mix
from trimtab.refusal import OPENINGS, odds
from trimtab.softtoken.artifact import SoftToken

BATCH, PLACES = 48, 256  # rows, and places of their replies, that are read together


class Likelihood(NamedTuple):
    """Of one reply.

    Attributes:
        log_probability: in nats, of all its tokens; NaN where the model has no room for them. greedy: whether greedy decoding would say just this.
    """

    log_probability: float
    greedy: bool


@torch.inference_mode()
def likelihood(
    model: Model,
    chats: Sequence[str | Sequence[Message]],
    replies: Sequence[str],
    *,
    token: SoftToken | None = None,
    guide: Guide | None = None,
    prefills: Sequence[str] | None = None,
    alphas: Sequence[float] | None = None,
    streams: Sequence[int] | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Likelihood]:
    """How likely each reply is, behind its prefill, as the answer to its chat; the end of the turn is not part of it.

    Args:
        alphas: strength of a guide's expert for each chat, where it is known; else each conversation is rated, once.
        streams: a number for each chat that fixes when a `random:P` neuron fires: the same for replies that are to be compared. The same for all if not given.

    Raises:
        ArtefactError: token or expert belong to another model. ChatError: a conversation that the template refuses.
    """
    if token is not None:
        token.check(model)
    expert = _expert(model, guide)
    turns = [as_messages(chat) for chat in chats]
    begun = prefills or [""] * len(chats)
    strengths: Sequence[float] = alphas or ()
    if guide and expert and alphas is None:
        strengths = _rated(guide, model, expert, turns)
    voice: Callable[..., Prompt] = token.render if token else render
    pieces = [_piece(model, voice, expert, *each) for each in zip(turns, begun, replies, strict=True)]
    vectors = token.vectors.to(model.device) if token else None
    return _followed(model, pieces, expert, vectors, guide, strengths, streams or [0] * len(chats), progress)


@torch.inference_mode()
def guided_log_odds(
    model: Model,
    chats: Sequence[Sequence[Message]],
    guide: Guide,
    *,
    prefills: Sequence[str],
    alphas: Sequence[float],
    streams: Sequence[int],
) -> list[float]:
    """Refusal log-odds (`refusal.log_odds`) of the reply to each chat, as the guide leaves its chances: the neuron goes along each opening of a refusal. NaN where there is no room.

    Args:
        alphas, streams: as for `likelihood`, one for each chat.
    """
    expert = _expert(model, guide)
    openings = [reply_ids(model, opening) for opening in OPENINGS]
    pieces = [
        _Piece(render(model, chat, prefill=begun).ids, expert.render(chat, prefill=begun).ids if expert else (), ids)
        for chat, begun in zip(chats, prefills, strict=True)
        for ids in openings
    ]
    strengths, drawn_by = ([x for x in values for _ in openings] for values in (alphas, streams))
    found = _followed(model, pieces, expert, None, guide, strengths, [int(n) for n in drawn_by])
    each = torch.tensor([one.log_probability for one in found], dtype=torch.float64).view(-1, len(openings))
    # A chance may have vanished in float32: the odds stay finite.
    scores: list[float] = odds(each.logsumexp(1).clamp(min=math.log(sys.float_info.min))).tolist()
    return scores


def _expert(model: Model, guide: Guide | None) -> Expert | None:
    return guide.expert_for(model) if guide and guide.neuron.kind != "never" else None


def _followed(
    model: Model,
    pieces: Sequence[_Piece],
    expert: Expert | None,
    vectors: Tensor | None,
    guide: Guide | None,
    strengths: Sequence[float],
    streams: Sequence[int],
    progress: Callable[[], None] | None = None,
) -> list[Likelihood]:
    """How likely the reply of each piece is."""
    found = [Likelihood(float("nan"), False)] * len(pieces)
    longest = max((len(piece.said) for piece in pieces), default=1)
    # Distributions over the vocabulary are large: the longer the replies, the fewer at a time. Replies to one chat stay together, whose prompt is then read once.
    for chunk in by_length([len(piece.context) for piece in pieces], max(1, min(BATCH, PLACES // longest))):
        fit = [i for i in chunk if pieces[i].fits(model, expert)]
        if not fit:
            continue
        contexts, heard, said = ([piece[part] for piece in (pieces[i] for i in fit)] for part in range(3))
        banned = banned_ids(model, expert.vectors if expert else vectors)
        chances = chances_along(model, contexts, said, slot(model, vectors), banned)
        if guide and expert:
            other = chances_along(expert.model, heard, said, expert.speaking(), banned)
            chances = guided_chances(
                chances, other, said, guide, [strengths[i] for i in fit], [streams[i] for i in fit]
            )
        for row, i in enumerate(fit):
            along, ids = chances[row, -len(said[row]) :], torch.tensor(said[row], device=model.device)
            chosen = along.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            found[i] = Likelihood(float(chosen.log().sum()), bool((along.argmax(-1) == ids).all()))
            if progress:
                progress()
    return found


def _rated(guide: Guide, model: Model, expert: Expert, chats: Sequence[Sequence[Message]]) -> list[float]:
    """The expert's strength for each conversation; those that are asked several times, as choices are, are rated once."""
    keys = [json.dumps(chat, sort_keys=True, default=str) for chat in chats]
    apart = dict(zip(keys, chats, strict=True))
    rated = dict(zip(apart, guide.rate(model, expert, list(apart.values()))[1], strict=True))
    return [rated[key] for key in keys]


class _Piece(NamedTuple):
    """One reply as ids: what the base reads before it, what the expert reads, and the reply."""

    context: Ids
    heard: Ids
    said: Ids

    def fits(self, model: Model, expert: Expert | None) -> bool:
        speakers = [(model, self.context), *([(expert.model, self.heard)] if expert else [])]
        return bool(self.said) and all(Row(0, 1).fits(who, len(ids) + len(self.said) - 1) for who, ids in speakers)


def _piece(
    model: Model,
    voice: Callable[..., Prompt],
    expert: Expert | None,
    chat: Sequence[Message],
    prefill: str,
    reply: str,
) -> _Piece:
    before = voice(model, chat, prefill=prefill).ids
    # A reply begins apart from its header, as the model would begin it. Behind words of its own it goes on: where it changes how these are tokenised, the last of them count as its own.
    whole = voice(model, chat, prefill=prefill + reply).ids if prefill else before + reply_ids(model, reply)
    shared = common_length([before, whole])
    heard = expert.render(chat, prefill=prefill).ids if expert else ()
    return _Piece(whole[:shared], heard[: len(heard) - len(before) + shared], whole[shared:])


def chances_along(
    model: Model, contexts: Sequence[Ids], said: Sequence[Ids], voice: AbstractContextManager[None], banned: list[int]
) -> Tensor:
    """Probabilities `[B, T, V]` at the places of the longest reply; shorter ones are aligned at their end."""
    apart = list(dict.fromkeys(map(tuple, contexts)))
    row = {context: i for i, context in enumerate(apart)}
    with voice:
        heads = Prefixes(model, [context[:-1] for context in apart], batch_size=len(apart))
        past = heads.past([row[tuple(context)] for context in contexts])
        along = [[*context[-1:], *ids[:-1]] for context, ids in zip(contexts, said, strict=True)]
        logits = forward(model, along, past, max(map(len, said)))
    logits[..., banned] = -torch.inf
    return logits.softmax(-1)


def guided_chances(
    base: Tensor, expert: Tensor, said: Sequence[Ids], guide: Guide, alphas: Sequence[float], streams: Sequence[int]
) -> Tensor:
    """Probabilities `[B, T, V]` as the neuron leaves them; a row's neuron starts at the row's first place."""
    common = min(base.shape[-1], expert.shape[-1])  # vocabularies may be padded differently
    base, expert = base[..., :common], expert[..., :common]
    places = base.shape[1]
    begin = torch.tensor([places - len(ids) for ids in said], device=base.device)
    potential = torch.full((len(said),), guide.neuron.start, device=base.device)
    strength = torch.tensor(alphas, dtype=torch.float32, device=base.device)
    left = []
    for place in range(places):
        b, e = base[:, place], expert[:, place]
        drawn = [chance(0, stream, -1 - place + first) for stream, first in zip(streams, begin.tolist(), strict=True)]
        divergence = DIVERGENCES[guide.neuron.divergence](b, e)
        _, spike, after = guide.neuron.step(potential, divergence, torch.tensor(drawn, device=base.device))
        running = place >= begin
        potential = torch.where(running, after, potential)
        left.append(torch.where((spike & running).unsqueeze(-1), mix(b, e, strength)[0], b))
    return torch.stack(left, dim=1)
