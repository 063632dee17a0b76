"""trimtab's models inside other people's harnesses: lm-evaluation-harness and Inspect."""

from __future__ import annotations

from typing import Any

from trimtab.config import GuidanceSettings, settle
from trimtab.guidance import load_guided
from trimtab.models import Model


def open_model(name: str, arguments: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """A model and its guidance from the arguments that a harness passes on: those of `trimtab generate` (`token`, `expert`, `neuron`, `risk`, ...).

    Raises:
        ConfigError: an argument that there is not.
    """
    settings = settle(GuidanceSettings, {"model": name, **arguments})
    return load_guided(settings)
