"""Refine the safety behaviour of a language model with one token, and prove what changed.

Everything public is here and loaded when first used, so that `import trimtab` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.decoding.generate import generate
    from trimtab.evaluation.run import evaluate
    from trimtab.models import Model, load
    from trimtab.prompts.sources import load_prompts
    from trimtab.softtoken.align import align
    from trimtab.softtoken.artifact import SoftToken

__version__ = "0.1.0"
__all__ = ["Model", "SoftToken", "align", "evaluate", "generate", "load", "load_prompts"]

_HOMES = {
    "Model": "trimtab.models",
    "SoftToken": "trimtab.softtoken.artifact",
    "align": "trimtab.softtoken.align",
    "evaluate": "trimtab.evaluation.run",
    "generate": "trimtab.decoding.generate",
    "load": "trimtab.models",
    "load_prompts": "trimtab.prompts.sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
