"""The model that settings name, and what guides it: a token, a guide, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapter import is_adapter, read
from trimtab.config import GuidanceSettings, ModelSettings
from trimtab.models import Model, load, load_at
from trimtab.neuron.guide import guide_from
from trimtab.run import console
from trimtab.softtoken.artifact import SoftToken
from trimtab.softtoken.foreign import KINDS


def load_model(settings: ModelSettings) -> Model:
    """The model, with the reason for its device and dtype printed.

    Raises:
        ModelError: see `models.load`.
    """
    model = load(settings.model, dtype=settings.dtype, device=settings.device, revision=settings.revision)
    console.print(f"{model.name}: {model.reason}", markup=False)
    return model


def load_guided(settings: GuidanceSettings) -> tuple[Model, dict[str, Any]]:
    """The model, and its guidance as `generate` and `evaluate` take it: `{"token", "guide"}`.

    Raises:
        ArtefactError, ConfigError, ModelError: something that cannot be used, or not together.
    """
    if settings.token:  # what is bad about it is told before the model loads
        if is_adapter(settings.token):
            read(settings.token, KINDS)
        else:
            SoftToken.load(settings.token)
    model = load_model(settings)
    token = SoftToken.load(settings.token, model) if settings.token else None
    return model, {"token": token, "guide": guide_from(settings, model)}


def load_tuned(run: Path, model: str | None = None) -> tuple[Model, SoftToken]:
    """The token of a run, and the model that it names, or `model` where that has moved since.

    Raises:
        ArtefactError, ModelError, NoEffectError, PathError: see `SoftToken.load` and `models.load`.
    """
    if model and is_adapter(run):
        loaded = load_at(model)
    else:
        identity = SoftToken.load(run).identity()
        loaded = load_at(model or identity.home, dtype=identity.dtype)
    return loaded, SoftToken.load(run, loaded)
