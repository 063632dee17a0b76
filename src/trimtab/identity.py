"""What an artefact knows about itself and its model (law 5): a sealed JSON beside its files, and errors that say what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.chat import template_hash
from trimtab.errors import ArtefactError, RunError
from trimtab.models import Model
from trimtab.run import digest, read_json, write_json

FORMAT = 1
Kind = TypeVar("Kind", bound="Identity")


class Identity(BaseModel):
    """The model that an artefact was made for; all of it must match where the artefact is used.

    Attributes:
        WHAT: the artefact, in a word.
        fingerprint, template_hash, dtype: of the model's weights, of its chat template, and of its numbers.
        seal: digest of every other field: an edited position or template would put a token elsewhere, unnoticed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    WHAT: ClassVar[str]
    format: int
    model: str
    origin: dict[str, str]
    fingerprint: str
    template_hash: str
    dtype: str
    seal: str = ""

    def sealed(self) -> str:
        return digest(self.model_dump(exclude={"seal"}))

    def write(self, path: Path) -> None:
        """Write it with its seal: last, so that a folder with it is whole."""
        write_json(path, {**self.model_dump(), "seal": self.sealed()})

    @classmethod
    def read(cls: type[Kind], path: Path) -> Kind:
        """Raises ArtefactError where it is missing, damaged, of another format or edited."""
        again = f"Train the {cls.WHAT} again."
        try:
            fields = read_json(path)
        except RunError as error:
            raise ArtefactError(
                f"{path.parent} holds no {cls.WHAT}: {error.args[0]}", "Give the folder of a finished run."
            ) from None
        if isinstance(fields, dict) and fields.get("format", FORMAT) != FORMAT:
            raise ArtefactError(
                f"{path} has format {fields['format']}, this trimtab reads format {FORMAT}.",
                "Use the version of trimtab that wrote it.",
            )
        try:
            found = cls(**fields)
        except (ValidationError, TypeError) as error:
            raise ArtefactError(f"{path} is damaged: {error}", again) from None
        if found.seal != found.sealed():
            raise ArtefactError(f"{path} was edited: its fields do not match their seal.", again)
        return found

    def check(self, model: Model, **more: tuple[Any, Any]) -> None:
        """Raises ArtefactError where `model` is not the one the artefact was made for; `more` compares further pairs, made for and here."""
        dtype = str(model.dtype).removeprefix("torch.")
        compared: Mapping[str, tuple[Any, Any]] = {
            **more,
            "dtype": (self.dtype, dtype),
            "weights (fingerprint)": (self.fingerprint, model.fingerprint),
            "chat template (hash)": (self.template_hash, template_hash(model)),
        }
        differs = [
            f"{name.replace('_', ' ')}: trained on {made_for}, this model has {here}"
            for name, (made_for, here) in compared.items()
            if made_for != here
        ]
        if differs:
            where = "" if dtype == self.dtype else f" in {self.dtype}"
            # One name may be two models: held in another dtype, or changed since.
            here = "not as it is here" if self.model == model.name else f"not on {model.name}"
            raise ArtefactError(
                f"this {self.WHAT} was trained on {self.model or 'another model'}, {here}.\n    "
                + "\n    ".join(differs),
                f"Load {self.model}{where}, or train a {self.WHAT} for {model.name}." if self.model else "",
            )


def read_whole(path: Path, sha256: str) -> bytes:
    """A file of the artefact. Raises ArtefactError where it is missing or not the one that was saved."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read: {error.strerror or error}", "Give the folder of a finished run."
        ) from None
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ArtefactError(
            f"{path} is not the file that was saved: sha256 {found[:12]}..., expected {sha256[:12]}... ({len(data)} bytes).",
            "It was truncated or edited; copy it again.",
        )
    return data
