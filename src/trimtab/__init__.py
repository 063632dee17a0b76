"""Refine the safety behaviour of a language model with one token or one neuron, and prove what changed.

Everything public is here and loaded when first used, so that `import trimtab` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.decoding.generate import generate
    from trimtab.evaluation.run import evaluate
    from trimtab.exporters.export import export
    from trimtab.models import Model, load
    from trimtab.neuron.deep_alignment import train_expert
    from trimtab.neuron.expert import load_expert
    from trimtab.neuron.guide import Guide
    from trimtab.neuron.neuron import Neuron
    from trimtab.neuron.risk import ConstantRisk, ExpertRating, GuardRating, LogitRating, SelfRating
    from trimtab.prompts.sources import load_prompts
    from trimtab.softtoken.align import align
    from trimtab.softtoken.artifact import SoftToken

__version__ = "0.1.0"
_HOMES = {
    "ConstantRisk": "trimtab.neuron.risk",
    "ExpertRating": "trimtab.neuron.risk",
    "GuardRating": "trimtab.neuron.risk",
    "Guide": "trimtab.neuron.guide",
    "LogitRating": "trimtab.neuron.risk",
    "Model": "trimtab.models",
    "Neuron": "trimtab.neuron.neuron",
    "SelfRating": "trimtab.neuron.risk",
    "SoftToken": "trimtab.softtoken.artifact",
    "align": "trimtab.softtoken.align",
    "evaluate": "trimtab.evaluation.run",
    "export": "trimtab.exporters.export",
    "generate": "trimtab.decoding.generate",
    "load": "trimtab.models",
    "load_expert": "trimtab.neuron.expert",
    "load_prompts": "trimtab.prompts.sources",
    "train_expert": "trimtab.neuron.deep_alignment",
}
__all__ = [
    "ConstantRisk",
    "ExpertRating",
    "GuardRating",
    "Guide",
    "LogitRating",
    "Model",
    "Neuron",
    "SelfRating",
    "SoftToken",
    "align",
    "evaluate",
    "export",
    "generate",
    "load",
    "load_expert",
    "load_prompts",
    "train_expert",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
