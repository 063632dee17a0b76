"""Safety experts: what may speak beside the base. A soft token or a LoRA adapter on the base's own weights, or a small model of its own.

Named `token:RUN`, `lora:DIR` or `model:ID`. Base and expert must mean the same by every token id; that is checked, never assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trimtab.chat import Message, Prompt, render, template_hash
from trimtab.errors import ArtefactError, ConfigError
from trimtab.models import Model, load_at, slot
from trimtab.neuron import lora
from trimtab.run import digest
from trimtab.softtoken.artifact import SoftToken

REFERENCES = "token:RUN, lora:DIR or model:ID"


@dataclass(frozen=True)
class Expert:
    """An expert made ready for a base model.

    Attributes:
        name: how it was named. identity: hash of what makes it an expert. model: the network that speaks.
        token: the soft token it hears, if that is what makes it an expert.
        shares_weights: with the base, so that one pass of `model` reads base rows and expert rows.
    """

    name: str
    identity: str
    model: Model
    token: SoftToken | None = None
    shares_weights: bool = False

    @property
    def vectors(self) -> Tensor | None:
        return self.token.vectors.to(self.model.device) if self.token else None

    def render(self, messages: str | Sequence[Message], *, prefill: str = "") -> Prompt:
        """The conversation as the expert reads it: with its token, or in its own chat template."""
        if self.token:
            return self.token.render(self.model, messages, prefill=prefill)
        return render(self.model, messages, prefill=prefill)

    @contextmanager
    def speaking(self, *, beside_base: bool = False) -> Iterator[None]:
        """While open, forward passes of `model` are the expert's; `beside_base`, the first half of a batch is the base's."""
        if self.shares_weights and self.token is None:
            with lora.speaking(self.model, beside_base=beside_base):
                yield
        else:  # prompts without a slot do not hear the token
            with slot(self.model, self.vectors):
                yield


def load_expert(reference: str, base: Model, *, dtype: str | None = None) -> Expert:
    """The expert that `token:RUN`, `lora:DIR` or `model:ID` names, checked against `base`.

    Raises:
        ConfigError: no such kind of reference. ArtefactError: made for another model, or its ids mean other words.
        ModelError: no such model. NoEffectError: the expert changes nothing, so the neuron could never fire.
    """
    kind, place = split_reference(reference)
    if kind == "token":
        return token_expert(SoftToken.load(Path(place), base), base, name=reference)
    if kind == "lora":
        return lora_expert(Path(place), base, name=reference)
    return model_expert(load_at(place, dtype=dtype, device=str(base.device)), base, name=reference)


def split_reference(reference: str) -> tuple[str, str]:
    """The kind of an expert and where it is: `("token", "runs/one")`.

    Raises:
        ConfigError: no such kind of reference.
    """
    kind, _, place = reference.partition(":")
    if not place or kind not in ("token", "lora", "model"):
        raise ConfigError(f"{reference!r} names no expert.", f"Write {REFERENCES}.")
    return kind, place


def token_expert(token: SoftToken, base: Model, *, name: str = "token") -> Expert:
    """A soft token trained on `base`. It costs one more row in the batch."""
    token.check(base)
    identity = digest(token.sha256(), token.position, token.template_args)  # elsewhere it would be another expert
    return Expert(name, identity, base, token, shares_weights=True)


def lora_expert(folder: Path, base: Model, *, name: str = "lora") -> Expert:
    """A LoRA adapter trained on `base`, here or with PEFT elsewhere. It costs one more row in the batch."""
    expert = lora.load_adapter(folder, base)
    return Expert(name, lora.adapter_identity(folder), expert, shares_weights=True)


def model_expert(expert: Model, base: Model, *, name: str = "model") -> Expert:
    """A model of its own.

    Raises:
        ArtefactError: it is the base itself, or its ids mean other words.
    """
    if expert.fingerprint == base.fingerprint:
        raise ArtefactError(
            f"the expert {expert.name} is the base model itself: they never disagree, so the neuron can never fire.",
            "Name a model that was aligned for safety.",
        )
    check_vocabulary(expert, base)
    return Expert(name, digest(expert.fingerprint, template_hash(expert), str(expert.dtype)), expert)


def check_vocabulary(expert: Model, base: Model) -> None:
    """Raises ArtefactError where an id means one word to the expert and another, or none, to the base. Unused rows at the end may differ in number."""
    words = [{i: word for word, i in model.tokenizer.get_vocab().items()} for model in (base, expert)]
    differs = sorted(i for i in words[0].keys() | words[1].keys() if words[0].get(i) != words[1].get(i))
    if differs:
        shown = ", ".join(f"{i}: {words[0].get(i)!r} / {words[1].get(i)!r}" for i in differs[:3])
        raise ArtefactError(
            f"the expert {expert.name} has another vocabulary than {base.name}: {len(differs)} ids differ ({shown}).",
            "Base and expert must share their tokenizer: take a smaller model of the same family, or train one with `trimtab expert`.",
        )
    if base.eos_ids.isdisjoint(expert.eos_ids):
        raise ArtefactError(
            f"the expert {expert.name} and {base.name} end their turns with different tokens.",
            "Take the instruction-tuned version of both.",
        )
