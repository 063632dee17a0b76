"""Can a token be trained so that a tied head never says it? By these ways: no.

At final states of the model seen lately (training batches and looks at validation) the vector's own logit is to be `margin` below the best other. `hinge` adds to the loss by how much it is not, on average,
times a weight; `euclid` and `fisher` project onto the half-spaces where it is, after each step, by the shortest way or by the way that changes the losses least. Compared with the default training: rates and AUC on validation,
and the slot's probability in a tied head along replies to prompts not trained on, of all groups.

SmolLM2, margin 30: the slot is still certain (1.0) somewhere along those replies, as without, and the training suffers. AUC 0.901 without; by `hinge` 0.847 with a weight of 0.01, and with 0.1 it learns nothing (no refusal at all);
by `euclid` 0.826, by `fisher` 0.854. So a tied head is written out, with a row fitted to be silent, by default.

    python recipes/own_logit.py MODEL -o DIR none:0 hinge:30:0.1 euclid:30 fisher:30
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trimtab.config import AlignSettings
from trimtab.exporters.export import HEARD
from trimtab.exporters.head import loudest, states
from trimtab.exporters.template import in_place
from trimtab.models import load
from trimtab.prompts.records import stratified
from trimtab.prompts.sources import load_prompts
from trimtab.softtoken import align
from trimtab.softtoken.train import Trainer

KEPT = 6000  # states
ROUNDS = 400


class Held(Trainer):
    """A trainer whose vector stays below its own logit."""

    way, margin, weight = "none", 0.0, 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.moved: list[float] = []

        def keep(_head: object, args: tuple[Tensor, ...], logits: Tensor) -> None:
            read = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            self.seen.append((read.clone(), logits.detach().reshape(len(read), -1).float().amax(-1)))
            while sum(len(one) for one, _ in self.seen) > KEPT:
                self.seen.pop(0)

        self.model.network.get_output_embeddings().register_forward_hook(keep)

    def take_step(self, radius: float, weight: float) -> None:
        step = self.optimiser.step

        def pulled(vectors: Tensor, gradients: Tensor, most: float) -> None:
            normals, bound = self.bounds()
            over = normals @ vectors[0] > bound
            self.moved.append(float(over.float().mean()))
            step(vectors, gradients + self.weight * normals[over].sum(0) / len(normals), most)

        with patch.object(self.optimiser, "step", pulled if self.way == "hinge" else step):
            super().take_step(radius, weight)
        if self.way in ("euclid", "fisher"):
            self.project()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """States, and what the own logit may be at each."""
        return torch.cat([read for read, _ in self.seen]), torch.cat([best for _, best in self.seen]) - self.margin

    def project(self) -> None:
        """Move the vector to where its own logit is low enough at all states."""
        normals, bound = self.bounds()
        towards = normals
        if self.way == "fisher":
            fisher = self.optimiser.fisher[0]
            damped = fisher + self.settings.damping * fisher.diagonal().mean() * torch.eye(len(fisher))
            towards = torch.linalg.solve(damped, normals.T).T
        squared = (normals * towards).sum(1)
        vector, before = self.vectors[0], self.vectors[0].clone()
        for _ in range(ROUNDS):
            gap = normals @ vector - bound
            worst = int((gap / squared.sqrt()).argmax())
            if gap[worst] <= 0:
                break
            vector -= 1.2 * gap[worst] / squared[worst] * towards[worst]
        self.moved.append(float((vector - before).norm()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("variants", nargs="+")
    options = parser.parse_args()
    records, settings = load_prompts("builtin"), AlignSettings(limit=1200)
    align.Trainer = Held  # type: ignore[misc]
    for variant in options.variants:
        Held.way, margin, *more = variant.split(":")
        Held.margin, Held.weight = float(margin), float(more[0]) if more else 0.0
        model = load(options.model)  # fresh, without the last one's hook
        out = options.out / variant.replace(":", "-")
        token = align.align(model, records, out=out, settings=settings)
        chats = [record.chat for record in stratified(load_prompts("builtin", split="test"), HEARD)]
        prompts = [token.render(model, turns) for chat in chats if (turns := in_place(model, token, chat))]
        heard = torch.cat(states(model, token, prompts))
        after = json.loads((out / "manifest.json").read_text())["validation"]["after"]
        tied = loudest(model, heard, token.vectors)
        print(json.dumps({"variant": variant, "tied": tied, "places": len(heard), **after}), flush=True)


if __name__ == "__main__":
    main()
