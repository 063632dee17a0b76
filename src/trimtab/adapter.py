"""A PEFT adapter that anybody trained: what its folder says, and what it cannot say.

A trimtab artefact knows its model by the weights' fingerprint; an adapter knows at most a name. A name that contradicts the model here is refused; beyond
that, whether the adapter was trained on this model cannot be known, and is told.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from trimtab.errors import ArtefactError
from trimtab.models import ALIASES, Model
from trimtab.run import console, digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# How each kind is used here.
USES = {
    "PROMPT_TUNING": "Use --token {0}, or --expert token:{0}.",
    "TRAINABLE_TOKENS": "Use --token {0}, or --expert token:{0}.",
    "LORA": "Use --expert lora:{0}.",
}


@dataclass(frozen=True)
class Adapter:
    """The two files of a PEFT adapter, read; `identity` is a hash of both."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    identity: str

    @property
    def kind(self) -> str:
        """PEFT's word for it: LORA, PROMPT_TUNING, TRAINABLE_TOKENS ..."""
        return str(self.config.get("peft_type"))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def read(folder: Path, kinds: tuple[str, ...]) -> Adapter:
    """The adapter in `folder`, of one of these `kinds`.

    Raises:
        ArtefactError: damaged or missing files, or another kind of adapter.
    """
    try:
        settings = (folder / CONFIG).read_bytes()
        config = json.loads(settings)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder / CONFIG} cannot be read: {error}", "Copy the adapter again.") from None
    if not isinstance(config, dict) or config.get("peft_type") not in kinds:
        kind = str(config.get("peft_type")) if isinstance(config, dict) else ""
        mend = USES.get(kind, "Only prompt tuning, trainable tokens and LoRA can be used here.").format(folder)
        raise ArtefactError(f"{folder} is a {kind or 'nameless'} adapter, not {' or '.join(kinds)}.", mend)
    try:
        data = (folder / WEIGHTS).read_bytes()
        tensors = load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{folder / WEIGHTS} cannot be read: {error}",
            "It is missing or damaged: copy it again. (A .bin file is never read: save the adapter as safetensors.)",
        ) from None
    found = digest(hashlib.sha256(data).hexdigest(), hashlib.sha256(settings).hexdigest())
    return Adapter(folder, config, tensors, found)


def base_of(model: Model) -> str:
    """What PEFT is to load beside the adapter: the hub's model where there is one. A GGUF's weights are near those, but not the same."""
    if model.name in ALIASES:
        return ALIASES[model.name][0]
    return model.origin.get("id") or model.origin.get("path") or model.name


def tell_base(adapter: Adapter, model: Model) -> None:
    """Compare the base that the adapter names with `model`, and say what cannot be known.

    Raises:
        ArtefactError: it names another model or another revision.
    """
    named, revision = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    here = {model.name, base_of(model), *(model.origin.get(key, "") for key in ("id", "path"))} - {""}
    at = model.origin.get("revision") or (ALIASES[model.name][1] if model.name in ALIASES else None)
    commits = [each for each in (revision, at) if each and len(each) == 40]
    on_hub = model.origin.get("kind") == "hub" or model.name in ALIASES
    fits = named in here
    contradicts = on_hub and named and not fits and str(named).count("/") == 1 and not Path(named).exists()
    if contradicts or (fits and len(set(commits)) == 2):
        theirs = f"{named}@{revision}" if fits else named
        raise ArtefactError(
            f"the adapter in {adapter.folder} was trained on {theirs}, not on {base_of(model)}{f'@{at}' if fits else ''}.",
            f"Load that model; or if these are the same weights, correct {CONFIG}.",
        )
    says = "names this model" if fits else f"names {named}, which says little" if named else "names no model"
    console.print(
        f"{adapter.folder} is a PEFT adapter and {says}: that it was trained on these very weights cannot be known",
        markup=False,
    )
