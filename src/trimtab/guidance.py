"""The model that settings name, and what guides it: a token, a guide, or nothing."""

from __future__ import annotations

from typing import Any

from trimtab.adapter import is_adapter, read
from trimtab.config import GuidanceSettings, ModelSettings
from trimtab.models import Model, load
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
