"""The artefact: n_tokens x hidden numbers in safetensors, and a JSON that knows its model (law 5).

A folder holds `token.safetensors` (one tensor, `vectors`, [n_tokens, hidden], float32) and `token.json`. Loading on another model,
or a truncated or edited file, is an error that says what differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trimtab.adapter import is_adapter
from trimtab.chat import Message, Position, Prompt, render, template_hash
from trimtab.decoding.engine import forward
from trimtab.decoding.past import Past
from trimtab.errors import ArtefactError, NoEffectError
from trimtab.identity import FORMAT, Identity, read_whole
from trimtab.models import Model, slot
from trimtab.run import create, existing, write

# Harmless words whose next-token distribution shows whether a token is heard at all.
PROBES = ("What can you do for me?", "Tell me about yourself.", "How do I do this?")
# KL in nats below which two float32 computations of one model count as the same.
NO_EFFECT = 1e-5


class TokenIdentity(Identity):
    """What a token was trained for, and where it goes."""

    WHAT = "token"
    template_args: dict[str, Any]
    position: Position
    n_tokens: int
    hidden_size: int
    sha256: str

    @property
    def home(self) -> str:
        """Where its model was, as `load_at` reads it."""
        if "id" in self.origin:
            return f"{self.origin['id']}@{self.origin['revision']}"
        return self.origin.get("path", self.model)


@dataclass(frozen=True)
class SoftToken:
    """Trained soft tokens and where they go.

    Attributes:
        vectors: `[n_tokens, hidden]`, float32, as rows of the embedding table.
        position: their place in the conversation, see `chat.POSITIONS`.
        fingerprint: of the model they were trained on. template_hash: of its chat template.
        template_args: template variables of training, such as the thinking mode.
        model, origin, dtype: the model's name, where it came from, and the dtype it was trained in.
    """

    vectors: Tensor
    position: Position
    fingerprint: str
    template_hash: str
    template_args: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"

    @classmethod
    def of(cls, model: Model, vectors: Tensor, position: Position, **template_args: Any) -> SoftToken:
        """Vectors trained on `model`."""
        return cls(
            vectors.detach().to("cpu", torch.float32).clone(),
            position,
            model.fingerprint,
            template_hash(model),
            template_args,
            model.name,
            dict(model.origin),
            str(model.dtype).removeprefix("torch."),
        )

    def sha256(self) -> str:
        """Hash of the saved tensor: the token's identity."""
        return hashlib.sha256(save_tensors({"vectors": self.vectors.contiguous()})).hexdigest()

    def identity(self) -> TokenIdentity:
        return TokenIdentity(
            format=FORMAT,
            model=self.model,
            origin=self.origin,
            fingerprint=self.fingerprint,
            template_hash=self.template_hash,
            template_args=self.template_args,
            position=self.position,
            n_tokens=len(self.vectors),
            hidden_size=self.vectors.shape[1],
            dtype=self.dtype,
            sha256=self.sha256(),
        )

    def render(
        self, model: Model, messages: str | Sequence[Message], *, prefill: str = "", attack_tokens: int = 0
    ) -> Prompt:
        """Ids of a conversation with this token in its place."""
        return render(
            model,
            messages,
            position=self.position,
            n_tokens=len(self.vectors),
            prefill=prefill,
            attack_tokens=attack_tokens,
            template_args=self.template_args,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the artefact; the JSON last, so that a folder with a JSON is whole."""
        path = create(Path(folder))
        write(path / "token.safetensors", save_tensors({"vectors": self.vectors.contiguous()}))
        self.identity().write(path / "token.json")
        return path

    @classmethod
    def load(cls, folder: str | Path, model: Model | None = None) -> SoftToken:
        """Read an artefact from its folder, or from the run folder above it; check it against `model` if given. A PEFT adapter of tokens, whoever
        trained it, is read too (`softtoken/foreign.py`), but only for a `model`, since it does not know its own.

        Raises:
            PathError: no such folder. ArtefactError: missing, truncated or edited files; a model that differs, and in what.
            NoEffectError: the model does not hear it (law 6).
        """
        path = existing(Path(folder))
        if (path / "token" / "token.json").is_file():
            path = path / "token"
        if not (path / "token.json").is_file() and is_adapter(path):
            return cls._from_adapter(path, model)
        identity = TokenIdentity.read(path / "token.json")
        data = read_whole(path / "token.safetensors", identity.sha256)
        try:
            vectors = load_tensors(data)["vectors"]
        except (SafetensorError, KeyError) as error:
            raise ArtefactError(f"{path / 'token.safetensors'} cannot be read: {error}") from None
        if tuple(vectors.shape) != (identity.n_tokens, identity.hidden_size):
            raise ArtefactError(
                f"{path}: the tensor has shape {tuple(vectors.shape)}, "
                f"token.json says {(identity.n_tokens, identity.hidden_size)}."
            )
        token = cls(
            vectors,
            identity.position,
            identity.fingerprint,
            identity.template_hash,
            identity.template_args,
            identity.model,
            identity.origin,
            identity.dtype,
        )
        if model is not None:
            token.check(model)
            effect(model, token)
        return token

    @classmethod
    def _from_adapter(cls, folder: Path, model: Model | None) -> SoftToken:
        from trimtab.softtoken.foreign import read_token

        if model is None:
            raise ArtefactError(f"{folder} is a PEFT adapter, which does not know its model.", "Say which (--model).")
        token = read_token(folder, model)
        effect(model, token)
        return token

    def check(self, model: Model) -> None:
        """Raises ArtefactError where `model` is not the one this token was trained on, saying what differs."""
        self.identity().check(model, hidden_size=(self.vectors.shape[1], model.hidden_size))


@torch.inference_mode()
def effect(model: Model, token: SoftToken) -> float:
    """Mean KL divergence in nats from the base's next-token distribution to the tuned one, over `PROBES`.

    A slot whose vectors are not heard still adds a token to the prompt; so the token is compared with silent (zero) vectors too.

    Raises:
        NoEffectError: the token changes nothing (law 6), or its numbers are not finite.
    """
    changes, heard = [], []
    for words in PROBES:
        untouched = render(model, words, template_args=token.template_args).ids
        base = next_logits(model, untouched, None).log_softmax(-1)
        tuned = next_logits(model, token.render(model, words).ids, token.vectors).log_softmax(-1)
        silent = next_logits(model, token.render(model, words).ids, torch.zeros_like(token.vectors)).log_softmax(-1)
        changes.append(float((base.exp() * (base - tuned)).sum()))
        heard.append(float((silent.exp() * (silent - tuned)).sum()))
    for values, against in ((changes, "the untouched model"), (heard, "a silent slot")):
        if not (mean := sum(values) / len(values)) > NO_EFFECT:
            raise NoEffectError(
                f"this token changes nothing: KL to {against} is {mean:.2e} nats on {len(PROBES)} probes.",
                "It was not trained, or the model does not hear its slot.",
            )
    return sum(changes) / len(changes)


@torch.inference_mode()
def next_logits(model: Model, ids: Sequence[int], vectors: Tensor | None) -> Tensor:
    """Logits `[V]` of the token after `ids`; `vectors` fill the slot."""
    with slot(model, None if vectors is None else vectors.to(model.device)):
        return forward(model, [ids], Past.empty(1, model.device), 1)[0, -1]
