"""A guide: an expert, a neuron, and a rating that says how strongly the expert may speak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trimtab.chat import Message
from trimtab.config import GuidanceSettings
from trimtab.errors import ConfigError
from trimtab.models import Model
from trimtab.neuron.early_stop import EarlyStop
from trimtab.neuron.expert import Expert, load_expert, model_expert, token_expert
from trimtab.neuron.neuron import Neuron
from trimtab.neuron.rating import ALPHA_TABLES, AlphaTable, Rating, alpha, alpha_table
from trimtab.neuron.risk import ExpertRating, Rater, rater
from trimtab.softtoken.artifact import SoftToken


@dataclass(frozen=True)
class Guide:
    """Everything that guided decoding needs besides the base model.

    Attributes:
        expert: a soft token, a small model, or an `Expert` made by `load_expert`.
        neuron: when the expert may speak.
        risk: who rates a request; the expert itself if `None`. The rating sets the strength alpha through `table`.
        early_stop: see `neuron/early_stop.py`. draft: tokens that an expert with weights of its own writes ahead; adaptive if `None`.
    """

    expert: Expert | SoftToken | Model
    neuron: Neuron = field(default_factory=Neuron)
    risk: Rater | None = None
    table: AlphaTable = ALPHA_TABLES["code"]
    early_stop: EarlyStop = "off"
    draft: int | None = None

    def expert_for(self, model: Model) -> Expert:
        """The expert, checked against the base.

        Raises:
            ArtefactError: it was made for another model, or is the base itself.
        """
        if isinstance(self.expert, SoftToken):
            return token_expert(self.expert, model)
        if isinstance(self.expert, Model):
            return model_expert(self.expert, model)
        return self.expert

    def rate(
        self, model: Model, expert: Expert, chats: Sequence[Sequence[Message]]
    ) -> tuple[list[Rating], list[float]]:
        """Each conversation's rating, and the strength that follows from it."""
        ratings = (self.risk or ExpertRating(expert)).rate(model, chats)
        return ratings, [alpha(rating, self.table) for rating in ratings]

    def describe(self, expert: Expert) -> dict[str, Any]:
        """What a reply depends on besides the base: for manifests, and for the keys of stored replies."""
        return {
            "expert": expert.identity,
            "neuron": asdict(self.neuron),
            "risk": repr(self.risk or ExpertRating(expert)),
            "alpha": asdict(self.table),
            "early_stop": self.early_stop,
        }


def guide_from(settings: GuidanceSettings, model: Model) -> Guide | None:
    """The guide that a command's settings ask for; `None` where they name no expert.

    Raises:
        ConfigError: settings out of range, or a token that is always on beside an expert. ArtefactError, ModelError: see `load_expert`.
    """
    if settings.expert is None:
        return None
    if settings.token is not None:
        raise ConfigError("--token is always on and --expert waits for its neuron: give one of them.", "")
    neuron = replace(Neuron.named(settings.neuron), divergence=settings.divergence)
    if settings.threshold is not None:
        neuron = replace(neuron, threshold=settings.threshold)
    table = alpha_table(settings.alpha)
    if neuron.kind != "never":
        expert = load_expert(settings.expert, model, dtype=settings.dtype)
        return Guide(expert, neuron, rater(settings.risk, expert), table, settings.early_stop, settings.draft)
    return None  # an expert that is never heard need not be there
