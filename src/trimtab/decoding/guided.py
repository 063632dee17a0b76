"""Neuron-Guided Safe Decoding (arXiv 2602.02027): a base model, an expert beside it, and a neuron that decides when the expert may speak.

At every token the neuron integrates how far base and expert disagree. While it is silent the base speaks alone; when it fires, the token
comes from both, mixed with the row's strength alpha. Two ways to compute the same ids (law 4):

- An expert with the base's own weights (a soft token, an adapter) is a second half of the batch: one forward pass for both.
- A separate expert must read every token anyway, so it writes ahead: it drafts m tokens, the base reads them in one pass, and the
  token rule is then applied place by place. The first choice that differs from the draft ends the round and both caches forget the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trimtab.decoding.engine import Ids, Row, Watch, by_length, choose, decode, forward, read
from trimtab.decoding.past import Past
from trimtab.decoding.sampling import Sampling, chance, penalised
from trimtab.models import Model
from trimtab.neuron.expert import Expert
from trimtab.neuron.mix import DIVERGENCES, mix
from trimtab.neuron.neuron import Neuron, Step


class Guidance:
    """The token rule (NGSD, B.4) for one batch, with the neurons' state.

    Called with logits `[2, B, V]`, base first, it chooses the next id of each row, as `engine.Rule`, and adds a step to the row's trace.
    """

    def __init__(self, neuron: Neuron, alphas: Mapping[int, float], sampling: Sampling, device: torch.device) -> None:
        self.neuron, self.sampling = neuron, sampling
        self._place = {index: place for place, index in enumerate(alphas)}
        self._alphas = torch.tensor(list(alphas.values()), dtype=torch.float32, device=device)
        self._potentials = torch.full((len(alphas),), neuron.start, dtype=torch.float32, device=device)

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        contexts = ((*row.prompt, *row.ids) for row in rows)
        scores = penalised(logits, contexts, self.sampling.repetition_penalty)
        base, expert = scores.softmax(-1)
        places = torch.tensor([self._place[row.index] for row in rows], device=logits.device)
        alphas = self._alphas[places]
        divergence = DIVERGENCES[self.neuron.divergence](base, expert)
        # Places before 0: a random neuron's spikes are drawn apart from the tokens.
        chances = [chance(self.sampling.seed, row.stream, -1 - len(row.ids)) for row in rows]
        spikes_by_chance = torch.tensor(chances, device=logits.device)
        potential, spike, after = self.neuron.step(self._potentials[places], divergence, spikes_by_chance)
        self._potentials[places] = after
        alone = chosen = choose(scores[0], rows, self.sampling)
        if spike.any():
            mixed, candidates = mix(base, expert, alphas)
            if self.sampling.temperature > 0:
                mixed = mixed.masked_fill(~candidates, 0).log()
            together = choose(mixed, rows, self.sampling)
            chosen = [t if s else a for t, s, a in zip(together, spike.tolist(), alone, strict=True)]
        said = (torch.tensor(alone), expert.argmax(-1), torch.tensor(chosen), base.argmax(-1))
        columns = (divergence, potential, spike, alphas, *said)
        for row, values in zip(rows, zip(*(c.tolist() for c in columns), strict=True), strict=True):
            row.trace.append(Step(*values))
        return chosen

    def propose(self, logits: Tensor, rows: Sequence[Row], ahead: int) -> list[int]:
        """What the expert would say `ahead` tokens further on, from its logits `[B, V]`: with the chances of that place, so that two models
        that agree also draw alike."""
        return choose(logits, rows, self.sampling, ahead)


class Draft:
    """How many tokens the expert writes ahead: fixed, or what has paid best so far.

    A round of m drafted tokens costs m + 1 passes of the expert and one of the base, and yields 1 + a + ... + a^m tokens where a is
    the chance that a drafted token stands.

    Attributes:
        accepted, offered: over all rounds, of the expert's proposals; their ratio is the acceptance rate. rounds: passes of the base.
    """

    MAXIMUM = 8
    MEMORY = 0.9

    def __init__(self, size: int | None = None) -> None:
        self.fixed = size
        self.accepted = self.offered = self.rounds = 0
        self._acceptance, self._ratio = 0.7, 0.3

    def size(self) -> int:
        if self.fixed is not None:
            return self.fixed
        a, r = self._acceptance, self._ratio
        return max(range(self.MAXIMUM + 1), key=lambda m: sum(a**i for i in range(m + 1)) / (1 + (m + 1) * r))

    def learn(self, accepted: int, offered: int, expert_seconds: float, base_seconds: float) -> None:
        """After a round: how many proposals stood, and how long one pass of each model took."""
        self.accepted, self.offered, self.rounds = self.accepted + accepted, self.offered + offered, self.rounds + 1
        self._acceptance += (1 - self.MEMORY) * (accepted / offered - self._acceptance)
        self._ratio += (1 - self.MEMORY) * (expert_seconds / max(base_seconds, 1e-9) - self._ratio)


def guided_ids(
    model: Model,
    expert: Expert,
    prompts: Sequence[Ids],
    expert_prompts: Sequence[Ids],
    alphas: Sequence[float],
    neuron: Neuron,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    watch: Watch | None = None,
    draft: Draft | None = None,
    streams: Sequence[int] | None = None,
) -> Iterator[Row]:
    """Continue every prompt with guidance; yields the finished rows batch by batch, in no fixed order.

    Args:
        prompts: as the base reads them. expert_prompts: the same conversations as the expert reads them.
        alphas: strength of the expert for each prompt. draft: for experts with weights of their own; adaptive if not given. Exact in float32; where
            a dtype rounds more coarsely, a token that is a near tie may depend on how many were drafted.
        streams: see `Row.stream`.
    """
    sampling, draft = sampling or Sampling(), draft or Draft()
    for chunk in by_length([len(p) for p in prompts], batch_size):
        rows = [Row(i, max_new_tokens, prompts[i], streams[i] if streams else i) for i in chunk]
        fit = [
            row
            for row in rows
            if row.fits(model, len(row.prompt)) and row.fits(expert.model, len(expert_prompts[row.index]))
        ]
        if fit:
            guidance = Guidance(neuron, {row.index: alphas[row.index] for row in fit}, sampling, model.device)
            with torch.inference_mode():
                _decode_batch(model, expert, fit, [expert_prompts[row.index] for row in fit], guidance, draft, watch)
        yield from rows


def _decode_batch(
    model: Model,
    expert: Expert,
    rows: Sequence[Row],
    expert_prompts: Sequence[Ids],
    guidance: Guidance,
    draft: Draft,
    watch: Watch | None,
) -> None:
    past, tails = read(model, [row.prompt for row in rows])
    with expert.speaking():
        expert_past, expert_tails = read(expert.model, expert_prompts)
    if not expert.shares_weights:
        decode_drafted(model, expert.model, tails, expert_tails, past, expert_past, rows, guidance, draft, watch)
        return
    both = Past.stack(past, expert_past)
    with expert.speaking(beside_base=True):
        decode(
            expert.model, [*tails, *expert_tails], both, rows, guidance, voices=2, vectors=expert.vectors, watch=watch
        )


def decode_drafted(
    model: Model,
    expert: Model,
    tails: Sequence[Ids],
    expert_tails: Sequence[Ids],
    past: Past,
    expert_past: Past,
    rows: Sequence[Row],
    guidance: Guidance,
    draft: Draft,
    watch: Watch | None = None,
) -> None:
    """Let a batch of `rows` grow until each has stopped, the expert writing ahead of the base.

    Vocabularies may be padded differently: only the ids that both have are ever said.
    """
    common = min(len(model.table), len(expert.table))
    running = list(rows)
    while running:
        # No row may be read past its room.
        ahead = min(draft.size(), min(row.limit - len(row.ids) for row in running) - 1)
        start = time.perf_counter()
        heard: list[Tensor] = []
        proposals: list[list[int]] = [[] for _ in running]
        for place in range(ahead + 1):
            logits = forward(expert, expert_tails, expert_past, 1)[:, -1, :common]
            heard.append(logits)
            for mine, token in zip(proposals, guidance.propose(logits, running, place), strict=True):
                mine.append(max(token, 0))  # a broken row proposes anything; the rule will stop it
            expert_tails = [mine[-1:] for mine in proposals]
        middle = time.perf_counter()
        drafted = [[*tail, *mine[:ahead]] for tail, mine in zip(tails, proposals, strict=True)]
        said = forward(model, drafted, past, ahead + 1)[..., :common]
        base_seconds, expert_seconds = time.perf_counter() - middle, (middle - start) / (ahead + 1)

        begun = [len(row.ids) for row in running]
        accepted = offered = 0
        alive = list(range(len(running)))
        for place in range(ahead + 1):
            at = torch.tensor(alive, device=model.device)
            chosen = guidance(torch.stack([said[at, place], heard[place][at]]), [running[i] for i in alive])
            agreed = [token == proposals[i][place] for i, token in zip(alive, chosen, strict=True)]
            accepted, offered = accepted + sum(agreed), offered + len(agreed)
            for i, token in zip(alive, chosen, strict=True):
                running[i].take(token, model.eos_ids, watch)
            alive = [i for i, same in zip(alive, agreed, strict=True) if same and not running[i].stop]
            if not alive:
                break
        draft.learn(accepted, offered, expert_seconds, base_seconds)

        # Of ahead + 1 tokens read, those before the last one said stand: it is read in the next round.
        unread = [ahead + 1 - (len(row.ids) - n) for row, n in zip(running, begun, strict=True)]
        keep = [i for i, row in enumerate(running) if not row.stop]
        running, unread = [running[i] for i in keep], [unread[i] for i in keep]
        for read_so_far in (past, expert_past) if running else ():
            if len(keep) < len(begun):
                read_so_far.select(torch.tensor(keep, device=model.device))
            read_so_far.retract(unread)
        tails = expert_tails = [row.ids[-1:] for row in running]
