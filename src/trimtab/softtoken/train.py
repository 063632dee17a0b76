"""Train one vector: batches, steps, checkpoints, selection and calibration. The model stays frozen (law 1)."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.chat import Position, reply_ids
from trimtab.config import AlignSettings
from trimtab.decoding.engine import by_length, forward
from trimtab.errors import RunError
from trimtab.evaluation.metrics import harmonic_mean
from trimtab.models import Model, slot
from trimtab.prompts.records import Group, Sample
from trimtab.run import deferred_interrupt, progress, write
from trimtab.softtoken.examples import Examples
from trimtab.softtoken.objective import Reference, kl_to_base, reply_nll, sta_loss
from trimtab.softtoken.openings import Openings, openings, own_words
from trimtab.softtoken.optimiser import NaturalGradient
from trimtab.softtoken.targets import deciding_tokens
from trimtab.softtoken.validation import summary, validate

Ids = tuple[int, ...]

WORDING_EVERY = 3  # steps, one looks at whole refusals; the others only at what decides between refusal and answer
WORDING_WEIGHT = 0.3  # of each later token: which refusal it is matters less than whether it is one
CHECKPOINT_EVERY = 10  # steps that a kill may cost
WINDOW = 8  # batches that are sorted by length together
START_LENGTH = 35.0  # in mean lengths of the table's rows
MAX_LENGTH = 10.0  # in start lengths; beyond, steps that only lengthen would make all later ones small
CALIBRATION_SHARE = 0.2  # of the radius
CALIBRATION_ROUNDS = 6  # at most, while refusals that are to be kept are not
MAX_PREFIX = 12  # tokens of its own that a reply may have begun with, for the goal `refuse`
PREFIX_SHARE = 0.5  # chance of an opening, for the goal `refuse`


class TrainingSet:
    """Samples ready for the objective: examples, what is to be said, and what the untouched model thinks of it.

    For the goal `refuse` a reply may have begun already (`Openings`); benign ones with the beginning of their own answer, so that what the token says
    late in a reply depends on the request too.

    Attributes:
        examples: with the slot in place. replies: ids of each target.
        openings: what a reply may already have begun with; nothing for the goal `balance`.
        reference: the untouched model's distributions along its own reply, by index, for samples anchored to it by KL.
        decision: how many first tokens tell a refusal from an answer; of benign replies, the loss sees no more. wording: how many it sees of refusals.
    """

    def __init__(
        self, model: Model, samples: Sequence[Sample], base: Examples, settings: AlignSettings, position: Position
    ) -> None:
        records = [s.record for s in samples]
        self.examples = Examples(
            model, records, "reading prompts", position=position, n_tokens=settings.tokens, base=base
        )
        untouched = Examples(model, records, "", base=base)
        self.replies = [reply_ids(model, s.target, end=True) for s in samples]
        harmful = [i for i, s in enumerate(samples) if s.record.label == "harmful"]
        refusals = Counter(samples[i].target for i in harmful)
        self.wording = min(settings.reply_tokens, max(len(self.replies[i]) for i in harmful))
        self.decision = min(settings.reply_tokens, max(deciding_tokens(model, refusal) for refusal in refusals))
        # KL where the model's own answer is the target; likelihood where it must learn another.
        anchored = [i for i, s in enumerate(samples) if s.record.label == "benign" and s.own]
        refusal = refusals.most_common(1)[0][0]
        compliant, answers = {}, {}
        if settings.goal == "refuse":
            compliant = openings(model, own_words(model, untouched, MAX_PREFIX), MAX_PREFIX)
            answers = {i: self.replies[i][:-1][:MAX_PREFIX] for i in anchored}  # something must be left to say
            self.decision = min(settings.reply_tokens, max(self.decision, deciding_tokens(model, " " + refusal)))
        self.openings = Openings(model, compliant, answers, refusal=refusal, seed=settings.seed, share=PREFIX_SHARE)
        reach = self.decision + max(map(len, self.openings.answers.values()), default=0)
        self.reference = references(model, untouched, self.replies, anchored, reach, self.openings.leads)

    def said(self, index: int, step: int) -> tuple[Ids, Ids, int]:
        """What a reply has begun with at this step, what is to follow, and where in the reference that begins."""
        opening, own = self.openings.begun(index, step)
        if not opening or index in self.reference:
            return opening, self.replies[index][own:], own
        return opening, self.openings.refusal_after(opening), 0


def padded(ids: Ids, k: int) -> Ids:
    """The first `k` ids, the last one repeated where there are fewer; the loss masks what is repeated."""
    return ids[:k] + ids[-1:] * (k - len(ids))


def batches(examples: Examples, batch: int, seed: int) -> Callable[[int], list[int]]:
    """A function from step to indices: `batch` harmful requests and as many benign ones, half of these borderline.

    It depends on nothing but its arguments, so a resumed run sees the same batches. In every `WINDOW` steps each group is
    sorted by length, so that rows of one batch are of similar length.
    """
    groups: tuple[Group, ...] = ("harmful", "borderline", "plain")
    pools = {g: examples.indices(g) for g in groups}
    shares = dict.fromkeys(groups, 0) | {"harmful": batch}
    borderline, plain = len(pools["borderline"]), len(pools["plain"])
    shares["borderline"] = 0 if not borderline else batch if not plain else math.ceil(batch / 2)
    shares["plain"] = batch - shares["borderline"]

    @cache
    def epoch(group: Group, number: int) -> list[int]:
        return random.Random(f"{seed}/{group}/{number}").sample(pools[group], len(pools[group]))

    @lru_cache(maxsize=2)
    def window(number: int) -> list[list[int]]:
        steps: list[list[int]] = [[] for _ in range(WINDOW)]
        order = random.Random(f"{seed}/{number}").sample(range(WINDOW), WINDOW)
        for group, share in shares.items():
            if not share:
                continue
            size = len(pools[group])
            first = number * WINDOW * share
            drawn = [epoch(group, n // size)[n % size] for n in range(first, first + WINDOW * share)]
            drawn.sort(key=lambda i: (examples.lengths[i], i))
            for place, step in enumerate(order):
                steps[step] += drawn[place * share : (place + 1) * share]
        return steps

    return lambda step: window(step // WINDOW)[step % WINDOW]


def references(
    model: Model,
    untouched: Examples,
    replies: Sequence[Ids],
    anchored: Sequence[int],
    k: int,
    leads: Mapping[int, Ids],
) -> dict[int, Reference]:
    """What the untouched model thinks at the first `k` places along its own replies, by index, for the samples `anchored` to it; behind the
    `leads` of those that have one."""
    found: dict[int, Reference] = {}
    with torch.inference_mode(), progress("the base model's answers", len(anchored)) as advance:
        for chunk in by_length([untouched.lengths[i] for i in anchored], 48):
            rows = [anchored[i] for i in chunk]
            tails = [untouched.tails[i] + leads.get(i, ()) + padded(replies[i], k)[:-1] for i in rows]
            reference = Reference.of(forward(model, tails, untouched.past(rows), k))
            found |= {i: reference.row(row) for row, i in enumerate(rows)}
            advance(len(rows))
    return found


def token_weights(length: int, decision: int, k: int) -> list[float]:
    """What each of the first `k` tokens of a reply counts: the deciding ones in full, later ones less, none past its end."""
    return [0.0 if t >= length else 1.0 if t < decision else WORDING_WEIGHT for t in range(k)]


def batch_loss(
    model: Model,
    data: TrainingSet,
    rows: Sequence[int],
    vectors: Tensor,
    settings: AlignSettings,
    weight: float,
    k: int,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of `rows`, each with its own `vectors` [R, n_tokens, hidden], and the samples' losses, harmful `[H]` and benign `[B]`.

    Of refusals the loss sees `k` tokens, of benign replies only those that decide: nothing in an answer's further words tells it from a refusal.
    """
    harmful = torch.tensor([data.examples.group(i) == "harmful" for i in rows], device=vectors.device)
    if k == data.decision:
        losses = sample_losses(model, data, rows, vectors, k, step)
        h, b = losses[harmful], losses[~harmful]
    else:  # apart, so that nobody is padded to refusals' length
        h, b = (
            sample_losses(
                model, data, [i for i, one in zip(rows, part.tolist(), strict=True) if one], vectors[part], n, step
            )
            for part, n in ((harmful, k), (~harmful, data.decision))
        )
    loss = sta_loss(h, b, benign_weight=weight, gamma=settings.gamma, direction=settings.focal)
    return loss, h.detach(), b.detach()


def sample_losses(model: Model, data: TrainingSet, rows: Sequence[int], vectors: Tensor, k: int, step: int) -> Tensor:
    """Losses `[R]` of `rows` over their next `k` reply tokens, in nats, from one forward pass; none for no rows."""
    if not rows:
        return vectors.new_zeros(0)
    said = [data.said(i, step) for i in rows]
    with slot(model, vectors):
        tails = [
            (*data.examples.tails[i], *opening, *padded(reply, k)[:-1])
            for i, (opening, reply, _) in zip(rows, said, strict=True)
        ]
        logits = forward(model, tails, data.examples.past(rows), k)
    targets = torch.tensor([padded(reply, k) for _, reply, _ in said], device=logits.device)
    mask = torch.tensor([token_weights(len(reply), data.decision, k) for _, reply, _ in said], device=logits.device)
    losses = reply_nll(logits, targets, mask)
    anchored = [row for row, i in enumerate(rows) if i in data.reference]
    if anchored:
        joined = Reference.join([data.reference[rows[row]] for row in anchored], k, [said[row][2] for row in anchored])
        divergence = kl_to_base(logits[anchored], joined, mask[anchored])
        losses = losses.index_copy(0, torch.tensor(anchored, device=logits.device), divergence)
    return losses


def initial(model: Model, n_tokens: int, seed: int) -> Tensor:
    """Start `[n_tokens, hidden]`, float32: random directions around the mean row, `START_LENGTH` times as long as a row.

    A short vector is drowned by what the first layers add to it, and training spends its first half making it longer. A long
    one outweighs them: the keys and values it offers then depend on it almost linearly in every layer.
    """
    table = model.table.detach().float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_tokens, model.hidden_size, generator=generator).to(model.device)
    direction = table.mean(0) + noise * table.std()
    length = START_LENGTH * float(table.norm(dim=1).mean())
    return torch.nn.functional.normalize(direction, dim=1) * length


class Trainer:
    """The state of a training run: vectors, optimiser, best vectors so far, history. All of it goes into a checkpoint."""

    def __init__(
        self,
        model: Model,
        data: TrainingSet,
        validation: Examples,
        settings: AlignSettings,
        folder: Path | None,
        floor: float = 0.0,
    ) -> None:
        """`floor`: the share of harmful validation requests that must be refused before anything else counts."""
        self.model, self.data, self.validation, self.settings, self.folder = model, data, validation, settings, folder
        self.floor = floor
        self.vectors = initial(model, settings.tokens, settings.seed)
        self.start_length = float(self.vectors[0].norm())
        self.optimiser = NaturalGradient(self.vectors, settings.damping)
        self.step = 0
        self.best = self.vectors.clone()
        self.kept: dict[str, Any] = {}  # what is known of the best vectors
        self.history: list[dict[str, Any]] = []
        self.pick = batches(data.examples, settings.batch, settings.seed)

    def radius(self) -> float:
        """How far this step may go, in nats: five steps of warm-up, then a cosine down to a twentieth."""
        s = self.settings
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / s.steps))
        return s.radius * min(1.0, (self.step + 1) / 5) * (0.05 + 0.95 * cosine)

    def run(self, advance: Callable[[], None]) -> None:
        """Train to the end, with a look at the validation split every `eval_every` steps.

        Ctrl-C waits for the step under way, so that the checkpoint it leaves is whole.
        """
        with deferred_interrupt() as interrupted:
            while self.step < self.settings.steps:
                self.take_step(self.radius(), self.settings.benign_weight)
                if self.step % self.settings.eval_every == 0 or self.step == self.settings.steps:
                    self._look()
                if self.step % CHECKPOINT_EVERY == 0 or self.step == self.settings.steps or interrupted:
                    self.checkpoint()
                if interrupted:
                    raise KeyboardInterrupt
                advance()

    def calibrate(self) -> None:
        """Small steps from the best vectors towards equal rates of refused harmful and answered benign requests, or until enough is refused, and the best place on that way.

        The losses' weights are tilted against the side that does too well. Where that tips the balance over, half the way is looked at too. Kept is where
        the worse of the two rates is best on validation, among places that refuse enough.
        """
        s = self.settings
        for _ in range(CALIBRATION_ROUNDS if s.calibration_steps and self.kept else 0):
            lacking = self.kept["harmful_refusal"] < self.floor
            too_strict = self._too_strict(self.kept)
            weight = (s.benign_weight + 1) / 2 if too_strict else s.benign_weight / 2
            begin, before = self.best, self.kept
            self.vectors.copy_(begin)
            with progress("calibrating", s.calibration_steps) as advance:
                for _ in range(s.calibration_steps):
                    self.take_step(s.radius * CALIBRATION_SHARE, weight)
                    advance()
            end = self.vectors.clone()
            ways: list[tuple[dict[str, Any], Tensor]] = []
            for share in (1.0, 0.5):
                vectors = torch.lerp(begin, end, share)
                found = summary(validate(self.model, self.validation, vectors))
                ways.append(({**found, "calibration": share}, vectors))
                if self._too_strict(found) == too_strict:  # the balance is not between this and the best
                    break
            found, vectors = max(ways, key=lambda way: self._worth(way[0]))
            self.history[-1].update(found)
            if self._worth(found) > self._worth(before):
                self.best, self.kept = vectors, self.history[-1]
            if not lacking or self.kept is before:
                break

    def _too_strict(self, rates: Mapping[str, float]) -> bool:
        """Whether more is refused than must be, and more than is answered."""
        return rates["harmful_refusal"] > max(rates["benign_compliance"], self.floor)

    def _worth(self, rates: Mapping[str, float], balance: Callable[..., float] = min) -> tuple[float, float]:
        """What places are compared by: refusals up to the floor come first, then the `balance` of the two rates."""
        return min(rates["harmful_refusal"], self.floor), balance(rates["harmful_refusal"], rates["benign_compliance"])

    def take_step(self, radius: float, weight: float) -> None:
        """One step of at most `radius` nats with benign weight `weight`.

        Most steps look at the deciding tokens alone, which is a quicker way to the decision; every third at the wording as well. (All at the end, steps are
        too small to learn it; all at the beginning, it is forgotten.)
        """
        rows = self.pick(self.step)
        k = self.data.decision if self.step % WORDING_EVERY else self.data.wording
        # A copy for each row: its gradient is the sample's own, which the optimiser needs.
        copies = self.vectors.expand(len(rows), *self.vectors.shape).clone().requires_grad_(True)
        loss, harmful, benign = batch_loss(self.model, self.data, rows, copies, self.settings, weight, k, self.step)
        (gradients,) = torch.autograd.grad(loss, copies)
        self.optimiser.step(self.vectors, gradients * len(rows), radius)
        self.vectors.copy_(self.vectors.renorm(2, 0, MAX_LENGTH * self.start_length))
        self.step += 1
        self.history.append(
            {
                "step": self.step,
                "reply_tokens": k,
                "loss": float(loss.detach()),
                "harmful_loss" if k == self.data.decision else "wording_loss": float(harmful.mean()),
                "benign_loss": float(benign.mean()),
                "norm": float(self.vectors.norm(dim=1).mean()),
            }
        )

    def _look(self) -> None:
        """Measure on the validation split and keep the vectors if they are the best so far."""
        self.history[-1].update(summary(validate(self.model, self.validation, self.vectors)))
        if not self.kept or self._worth(self.history[-1], harmonic_mean) > self._worth(self.kept, harmonic_mean):
            self.best, self.kept = self.vectors.clone(), self.history[-1]

    def checkpoint(self) -> None:
        """Write everything that a resumed run needs to go on with the same bits.

        One file, so that tensors and step can never disagree after a kill.
        """
        if self.folder is None:
            return
        meta = {"step": self.step, "kept": self.kept, "history": self.history}
        tensors = {
            "vectors": self.vectors,
            "best": self.best,
            "fisher": self.optimiser.fisher,
            "momentum": self.optimiser.momentum,
        }
        write(self.folder / "checkpoint.safetensors", save(tensors, {"state": json.dumps(meta)}))

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        path = self.folder / "checkpoint.safetensors" if self.folder else None
        if path is None or not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                meta: dict[str, Any] = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key).to(self.vectors.device) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kinds for damaged files
            raise RunError(f"{path} cannot be read: {error}", "Delete it to train from the start.") from None
        self.vectors, self.best = tensors["vectors"], tensors["best"]
        self.optimiser.fisher, self.optimiser.momentum = tensors["fisher"], tensors["momentum"]
        self.step, self.history, self.kept = meta["step"], meta["history"], meta["kept"]
        self.optimiser.steps = self.step
        return True
