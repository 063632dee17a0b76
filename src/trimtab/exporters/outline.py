"""A model without its weights, for a machine whose memory cannot hold them: its config, its tokenizer, and a fingerprint from the files.

An export copies bytes from file to file; only measuring and verifying compute anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from trimtab.errors import ExportError
from trimtab.exporters.checkpoint import STORED, pick, tensors
from trimtab.exporters.plan import folder_of
from trimtab.machine import DTYPES, Dtype
from trimtab.models import Model, dequantised, empty, fingerprint_of, place_of, resolve, sampled


def outline(name: str, dtype: str) -> Model:
    """A model as `load_at` would read it in `dtype`, but with its network on the meta device: it can be exported (`check=False`), and cannot compute.

    Raises:
        ModelError: no such model. ExportError: its files name weights otherwise than the network does.
    """
    from transformers import AutoConfig, AutoTokenizer

    place, revision = place_of(name)
    source, origin = resolve(place, revision)
    if origin["kind"] == "gguf":
        dequantised(Path(source), origin)
    model = Model(place, None, None, "not loaded", origin)
    folder = folder_of(model)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    model.network = empty(config, DTYPES[dtype])
    model.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    names = ((name, tuple(parameter.shape)) for name, parameter in model.network.named_parameters())
    model.fingerprint = fingerprint_of(config, _samples(folder, names, DTYPES[dtype]))
    return model


def is_outline(model: Model) -> bool:
    return model.device.type == "meta"


def _samples(folder: Path, names: Iterable[tuple[str, tuple[int, ...]]], dtype: Dtype) -> dict[str, Tensor]:
    """What the fingerprint looks at, as it would be loaded: 64 numbers of each weight, and no more, are read."""
    held, found = tensors(folder), {}
    for name, shape in names:
        stored = held.get(name)
        if stored is None or stored.shape != shape or stored.dtype not in STORED:
            what = "no such tensor" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise ExportError(
                f"{folder}: {name} {list(shape)} of the network is {what} in the files, so that its fingerprint cannot be taken without loading it.",
                "Export on a machine whose memory holds the model.",
            )
        found[name] = pick(stored, sampled(stored.numbers)).to(dtype)
    return found
