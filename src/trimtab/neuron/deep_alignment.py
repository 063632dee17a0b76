"""Train a safety expert by deep alignment (NGSD, section B.6; Qi et al., ICLR 2025): a LoRA adapter on the frozen base.

Deep alignment teaches a refusal that may begin late (`softtoken/openings.py`). In one step, with x a request and y an answer,

    L = (1 - lambda) * mean_h -log p(refusal | x_h, o_h)  +  lambda * mean_b KL(p_0(. | x_b, y_b) || p(. | x_b, y_b))

o_h is empty or, with probability `prefix_share`, the first k ~ U{1..max_prefix} tokens that the untouched model p_0
would itself answer with, half of the time behind words of a prefill attack and cut again; only the refusal's tokens are in the loss. Answers y_b have
such words before them, outside of the loss, in a share of `prefix_share` of the benign requests. Benign requests that p_0 refuses are trained towards
an answer by likelihood instead. The published recipe takes openings from a data set of harmful answers and trains all
weights; the base's own openings need no such data, and are what the expert hears when it guards this base. They live in
memory alone: never written to disk, never logged.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.chat import reply_ids, template_hash
from trimtab.config import ExpertSettings, settle
from trimtab.decoding.engine import Row, by_length, common_length, forward
from trimtab.decoding.past import Past
from trimtab.errors import NoEffectError, RunError
from trimtab.machine import describe_machine
from trimtab.models import Model
from trimtab.neuron.lora import attached, lora_config, save_adapter
from trimtab.prompts.records import Record, stratified
from trimtab.prompts.sources import require_both_labels, split_records
from trimtab.refusal import says_no
from trimtab.run import (
    Cost,
    alone,
    claim,
    console,
    create,
    deferred_interrupt,
    digest,
    environment,
    progress,
    write,
    write_json,
)
from trimtab.softtoken.examples import Examples
from trimtab.softtoken.objective import Reference, kl_to_base, reply_nll, sta_loss
from trimtab.softtoken.openings import Openings, compliant_openings, openings, own_words, prefill_refusal
from trimtab.softtoken.targets import TEMPLATES, choose_refusal, collect
from trimtab.softtoken.train import batches, padded, references
from trimtab.softtoken.validation import summary, validate

SCHEME = 3  # raised when the same settings train otherwise than before: a run begun then is not gone on with
WARM_UP = 10  # steps
CHECKPOINT_EVERY = 10  # steps that a kill may cost
VALIDATION_PROMPTS = 150  # at most
ROWS = 48  # of a batch without gradients

Ids = tuple[int, ...]


def train_expert(
    model: Model,
    records: Sequence[Record],
    *,
    out: Path,
    settings: ExpertSettings | None = None,
    **options: Any,
) -> Path:
    """Train an expert that refuses harmful requests, however the reply began, and answers benign ones as `model` does.

    Args:
        model: the base; it is bit for bit the same afterwards, and no adapter is left on it.
        records: labelled requests; their `train` and `validation` splits are used, never `test`.
        out: run folder; the expert is in `out/adapter`. A run that was killed goes on from there, to the same bits.
        settings: see `ExpertSettings`; single fields may be given as keyword `options` instead.

    Returns:
        `out`, for `lora.load_adapter`.

    Raises:
        UsageError: peft is missing. ModelError: no attention projections to adapt. DataError: labels of one class only,
        or no validation prompts. RunError: the folder belongs to another run. NoEffectError: the loss is no number.
    """
    settings = settings or settle(ExpertSettings, options)
    config = lora_config(model, settings.rank, settings.lora_alpha)
    records = split_records(records)
    parts = {s: [r for r in records if r.split == s] for s in ("train", "validation")}
    for name, part in parts.items():
        require_both_labels(part, f"the {name} split of the data")
    train = stratified(parts["train"], settings.limit, settings.seed)
    validation = stratified(parts["validation"], VALIDATION_PROMPTS)
    folder = create(out)
    key = digest(
        "expert",
        SCHEME,
        settings.model_dump(),
        model.fingerprint,
        str(model.dtype),
        template_hash(model),
        [r.model_dump() for r in records],
    )
    with alone(folder):
        claim(folder, key)
        if (folder / "manifest.json").exists():
            console.print(f"{folder} holds this very run, finished; nothing to train")
        else:
            _train(model, train, validation, settings, config, key, folder)
    return folder


def _train(
    model: Model,
    train: Sequence[Record],
    validation: Sequence[Record],
    settings: ExpertSettings,
    config: Any,
    key: str,
    folder: Path,
) -> None:
    """Train on from what is in `folder`, and write the adapter there with its manifest."""
    cost = Cost()
    data = TrainingSet(model, Examples(model, train, "reading prompts"), settings)
    held = Examples(model, validation, "reading validation prompts")
    begun = compliant_openings(model, held)
    before = look(model, held, begun)
    prepared = cost.record("")["seconds"]
    with attached(model, config, settings.seed) as expert:
        trainer = Trainer(expert, data, settings, folder)
        if trainer.resume():
            console.print(f"going on from step {trainer.step} of {settings.steps}")
        with progress("training the expert", settings.steps) as advance:
            advance(trainer.step)
            trainer.run(advance)
        trained = round(cost.record("")["seconds"] - prepared, 2)
        after = look(expert, Examples(expert, validation, "reading them as the expert"), begun)
        save_adapter(expert, folder / "adapter")
    write_json(folder / "history.json", trainer.history)
    result = {
        "key": key,
        "settings": settings.model_dump(),
        "model": {"name": model.name, "origin": model.origin, "fingerprint": model.fingerprint, "device": model.reason},
        "adapter": {"numbers": sum(w.numel() for w in trainer.weights.values())},
        "data": {
            "train": dict(Counter(r.group for r in data.examples.records)),
            "with_opening": len(data.openings.compliant),
            "validation": dict(Counter(r.group for r in validation)),
            "validation_with_opening": len(begun),
            "refusal": data.refusal,
        },
        "validation": {"before": before, "after": after},
        "cost": {
            **cost.record(describe_machine(model.device)),
            "prepare_seconds": prepared,
            "train_seconds": trained,
        },
        "environment": environment(),
    }
    write_json(folder / "manifest.json", result)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


class TrainingSet:
    """Requests with what is to be said to each, and what the untouched model thinks of it.

    Attributes:
        examples: requests that have something to be learned. prompts: their ids, whole.
        replies: ids in the loss, ended by the end-of-turn id where the reply ends.
        openings: what replies have begun with.
        reference: the untouched model's distributions over the reply, by index, for samples anchored to it by KL.
        refusal: in words, where the model has none of its own. length: that all replies are padded to.
    """

    def __init__(self, model: Model, base: Examples, settings: ExpertSettings) -> None:
        k, records, harmful = settings.reply_tokens, base.records, base.indices("harmful")
        self.settings = settings
        self.refusal = settings.refusal or choose_refusal(model, base, harmful[:ROWS])
        first = own_words(model, base, max(k, settings.max_prefix))
        begun = openings(model, first, settings.max_prefix)
        said = {}
        for i in harmful:
            refuses = says_no(_text(model, first[i].ids))
            said[i] = _cut(model, first[i], k) if refuses else reply_ids(model, self.refusal, end=True)
        answers = _answers(model, Examples(model, [r for r in records if r.label == "benign"], "", base=base), k)
        said |= {i: answers[r.id][0] for i, r in enumerate(records) if r.id in answers}

        kept = sorted(said)
        self.examples = Examples(model, [records[i] for i in kept], "", base=base)
        require_both_labels(self.examples.records, "what is left of the train split")
        self.prompts = [head + tail for head, tail in zip(self.examples.heads, self.examples.tails, strict=True)]
        self.replies = [said[i] for i in kept]
        compliant = {place: begun[i] for place, i in enumerate(kept) if i in begun}
        own = [i for i, r in enumerate(self.examples.records) if r.id in answers and answers[r.id][1]]
        # Answers are in the loss from their first token on: all that may stand before is the words of an attack.
        self.openings = Openings(
            model,
            compliant,
            dict.fromkeys(own, ()),
            refusal=self.refusal,
            seed=settings.seed,
            share=settings.prefix_share,
        )
        self.length = max(k, *map(len, [*self.replies, *self.openings.refusals.values()]))
        self.reference = references(model, self.examples, self.replies, own, k, self.openings.leads)

    def task(self, index: int, step: int) -> tuple[Ids, Ids]:
        """What is read at this step, and what is to be said then."""
        opening, _ = self.openings.begun(index, step)
        late = opening and index in self.openings.compliant
        return self.prompts[index] + opening, self.openings.refusal_after(opening) if late else self.replies[index]


def batch_loss(expert: Model, data: TrainingSet, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a step on `rows`, and the samples' losses, harmful `[H]` and benign `[B]`.

    In nats, summed over each reply; the loss is the equation at the top.
    """
    tasks, k = [data.task(i, step) for i in rows], data.length
    # What all prompts begin with is read once a step, not once a row.
    shared = min(common_length([read for read, _ in tasks]), min(len(read) for read, _ in tasks) - 1)
    past = Past.empty(1, expert.device)
    if shared:
        forward(expert, [tasks[0][0][:shared]], past, 1)
    parts: dict[int, Tensor] = {}
    # Replies that have begun are much longer: read apart, nobody is padded to their length.
    for places in by_length([len(read) for read, _ in tasks], math.ceil(len(tasks) / 2)):
        losses = _losses(expert, data, [(rows[place], *tasks[place]) for place in places], past, shared, k)
        parts |= dict(zip(places, losses, strict=True))
    losses = torch.stack([parts[place] for place in range(len(rows))])
    harmful = torch.tensor([data.examples.group(i) == "harmful" for i in rows], device=losses.device)
    h, b = losses[harmful], losses[~harmful]
    return sta_loss(h, b, benign_weight=data.settings.benign_weight, gamma=0.0), h.detach(), b.detach()


def _losses(
    expert: Model, data: TrainingSet, tasks: Sequence[tuple[int, Ids, Ids]], past: Past, shared: int, k: int
) -> Tensor:
    """One forward pass: the losses `[B]` of `(index, what is read, what is to be said)`, of which `past` has read the first `shared` ids."""
    tails = [read[shared:] + padded(reply, k)[:-1] for _, read, reply in tasks]
    logits = forward(expert, tails, past.repeat(len(tasks)), k)
    targets = torch.tensor([padded(reply, k) for _, _, reply in tasks], device=logits.device)
    ends = torch.tensor([len(reply) for _, _, reply in tasks], device=logits.device)
    mask = (torch.arange(k, device=logits.device) < ends.unsqueeze(1)).float()
    losses = reply_nll(logits, targets, mask)
    if anchored := [row for row, (i, _, _) in enumerate(tasks) if i in data.reference]:
        n = data.settings.reply_tokens
        reference = Reference.join([data.reference[tasks[row][0]] for row in anchored], n)
        divergence = kl_to_base(logits[anchored, :n], reference, mask[anchored, :n])
        losses = losses.index_copy(0, torch.tensor(anchored, device=logits.device), divergence)
    return losses


class Trainer:
    """The state of a training run: the adapter's weights, AdamW's moments, history. All of it is in a checkpoint."""

    def __init__(self, expert: Model, data: TrainingSet, settings: ExpertSettings, folder: Path) -> None:
        self.expert, self.data, self.settings, self.folder = expert, data, settings, folder
        self.weights = {name: w for name, w in expert.network.named_parameters() if w.requires_grad}
        self.optimiser = torch.optim.AdamW(self.weights.values(), lr=settings.learning_rate)
        self.pick = batches(data.examples, settings.batch, settings.seed)
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def rate(self) -> float:
        """Learning rate of this step: a linear warm-up, then a cosine down to nothing."""
        s = self.settings
        return (
            s.learning_rate * min(1.0, (self.step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.step / s.steps))
        )

    def run(self, advance: Callable[[], None]) -> None:
        """Train to the end. Ctrl-C waits for the step under way, so that the checkpoint it leaves is whole."""
        with deferred_interrupt() as interrupted:
            while self.step < self.settings.steps:
                self.take_step()
                if self.step % CHECKPOINT_EVERY == 0 or self.step == self.settings.steps or interrupted:
                    self.checkpoint()
                if interrupted:
                    raise KeyboardInterrupt
                advance()

    def take_step(self) -> None:
        rate = self.rate()
        loss, harmful, benign = batch_loss(self.expert, self.data, self.pick(self.step), self.step)
        if not loss.isfinite():
            raise NoEffectError(f"the loss of step {self.step + 1} is no number.", "Train with a lower learning_rate.")
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.history.append(
            {
                "step": self.step,
                "loss": float(loss.detach()),
                "harmful_loss": float(harmful.mean()),
                "benign_loss": float(benign.mean()),
                "learning_rate": rate,
            }
        )

    def checkpoint(self) -> None:
        """Write everything that a resumed run needs to go on with the same bits.

        One file, so that tensors and step can never disagree after a kill.
        """
        tensors = {f"weight/{name}": w.detach() for name, w in self.weights.items()}
        for name, w in self.weights.items():
            state = self.optimiser.state[w]
            tensors |= {f"{moment}/{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        meta = json.dumps({"step": self.step, "history": self.history})
        write(self.folder / "checkpoint.safetensors", save(tensors, {"state": meta}))

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                meta: dict[str, Any] = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kinds for damaged files
            raise RunError(f"{path} cannot be read: {error}", "Delete it to train from the start.") from None
        for name, w in self.weights.items():
            w.data.copy_(tensors[f"weight/{name}"])
            moments = {moment: tensors[f"{moment}/{name}"].to(w.device) for moment in ("exp_avg", "exp_avg_sq")}
            self.optimiser.state[w] = {"step": torch.tensor(float(meta["step"])), **moments}
        self.step, self.history = meta["step"], meta["history"]
        return True


def look(model: Model, held: Examples, begun: dict[int, Ids]) -> dict[str, float | None]:
    """`validation.summary` of plain validation, and `prefill_refusal`.

    That is how often a reply made to begin with the untouched model's opening (`begun`, by index) goes on as a refusal;
    None where there are no openings.
    """
    with progress("validating", len(held.records)) as advance:
        found = summary(validate(model, held, None))
        advance(len(held.records))
    return {**found, "prefill_refusal": prefill_refusal(model, held, begun)}


def _answers(model: Model, benign: Examples, k: int) -> dict[str, tuple[Ids, bool]]:
    """First `k` ids of an answer to every benign request, by record id, and whether it is the model's own.

    Requests without an answer are left out.
    """
    # One token more than is used: an answer that goes on is not taught to end here.
    samples = collect(model, benign, n_tokens=k + 1, refusal=TEMPLATES[0])
    return {s.record.id: (reply_ids(model, s.target, end=True)[:k], s.own) for s in samples if s.own or s.target}


def _cut(model: Model, row: Row, k: int) -> Ids:
    """The first `k` ids of a reply, with the end of the turn where it came by then."""
    ends = (model.tokenizer.eos_token_id,) if row.stop == "eos" else ()
    return (*row.ids, *ends)[:k]


def _text(model: Model, ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))
