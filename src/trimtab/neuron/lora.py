"""The expert as a LoRA adapter on the frozen base: put on, taken off, saved, loaded, and heard row by row.

Base and expert share one set of weights, so one forward pass computes both: some rows of a batch pass the adapter by,
the others go through it. Saved in PEFT's own format (`adapter_config.json`, `adapter_model.safetensors`), with
`expert.json` beside it, which knows the model it belongs to (law 5), as `token.json` does. A LoRA adapter that anybody
trained with PEFT is taken too, where it is plain enough to be heard row by row; it knows its model by name at most.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from trimtab.adapter import CONFIG, WEIGHTS, Adapter, is_adapter, read, tell_base
from trimtab.chat import template_hash
from trimtab.errors import ArtefactError, ModelError, NoEffectError, UsageError
from trimtab.identity import FORMAT, Identity, read_whole
from trimtab.models import Model
from trimtab.run import create, existing, write, write_json

IDENTITY = "expert.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# PEFT's word for no adapter, and ours for this one.
BASE, EXPERT = "__base__", "expert"
PLAIN = "Plain LoRA on linear layers can be used (rsLoRA too): train or convert it so, or merge it and give the model as --expert model:DIR."
# Of an adapter that began otherwise (PiSSA and its like) PEFT changes the base's own weights to make up for it.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")


class ExpertIdentity(Identity):
    """What an adapter was trained for, and its files."""

    WHAT = "expert"
    sha256: str
    """Of `adapter_model.safetensors`."""
    config_sha256: str
    """Of `adapter_config.json`: an edited scale would make the expert louder, unnoticed."""


def load_peft() -> Any:
    """The optional package peft.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError:
        raise UsageError("an expert needs the package peft.", "pip install 'trimtab[expert]'") from None


def lora_config(model: Model, rank: int, alpha: float) -> Any:
    """PEFT's configuration of an adapter on the attention projections; no dropout, so training is deterministic.

    Raises:
        UsageError: peft is missing. ModelError: the network names its projections otherwise.
    """
    linear = {name.rpartition(".")[2] for name, m in model.network.named_modules() if isinstance(m, nn.Linear)}
    targets = [name for name in ATTENTION if name in linear]
    if not targets:
        raise ModelError(
            f"{model.name} has no attention projection named {', '.join(ATTENTION)}.",
            f"An expert cannot be trained on this family. Its linear layers: {', '.join(sorted(linear)) or 'none'}.",
        )
    return load_peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets, task_type="CAUSAL_LM"
    )


@contextmanager
def attached(model: Model, config: Any, seed: int) -> Iterator[Model]:
    """While open, the model with a fresh, trainable adapter on it; afterwards, come what may, `model` is as it was.

    PEFT puts its layers into `model.network` itself, so inside `model` speaks as the expert too.
    """
    _require_bare(model)
    fingerprint = model.fingerprint  # of the bare network: PEFT renames its parameters
    with _wrapping(seed):
        network = load_peft().get_peft_model(model.network, config, adapter_name=EXPERT)
    try:
        yield _dressed(model, network, fingerprint)
    finally:
        network.unload()


def save_adapter(expert: Model, folder: Path) -> None:
    """Write the adapter that `expert` wears; `expert.json` last, so that a folder with one is whole."""
    create(folder)
    settings = expert.network.peft_config[EXPERT].to_dict()
    settings |= {"inference_mode": True, "base_model_name_or_path": expert.name}  # no path of this machine
    write_json(folder / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()})
    tensors = load_peft().get_peft_model_state_dict(expert.network, adapter_name=EXPERT, save_embedding_layers=False)
    data = save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"format": "pt"})
    write(folder / WEIGHTS, data)
    made_for = ExpertIdentity(
        format=FORMAT,
        model=expert.name,
        origin=dict(expert.origin),
        fingerprint=expert.fingerprint,
        template_hash=template_hash(expert),
        dtype=str(expert.dtype).removeprefix("torch."),
        sha256=hashlib.sha256(data).hexdigest(),
        config_sha256=hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest(),
    )
    made_for.write(folder / IDENTITY)


def load_adapter(folder: Path, model: Model) -> Model:
    """The expert: `model` with the adapter from its folder, or from the run folder above it; silent until `speaking`. One without `expert.json` was
    trained elsewhere: its shapes are checked, and its base by name.

    PEFT puts its layers into `model.network` itself. Outside of `speaking` they only pass on what the base's own layers
    compute, so both models are the untouched base.

    Raises:
        PathError: no such folder. ArtefactError: missing, truncated or edited files; a model that differs, and in what.
        UsageError: peft is missing, or the model wears an adapter already.
    """
    path = _adapter_folder(existing(folder))
    foreign = _foreign(path)
    peft = load_peft()
    _require_bare(model)
    if foreign:
        _require_plain(foreign, model)
        tell_base(foreign, model)
    else:
        identity(folder).check(model)
    fingerprint = model.fingerprint
    with _wrapping(0):  # PEFT draws weights before it reads them
        network = peft.PeftModel.from_pretrained(model.network, str(path), adapter_name=EXPERT)
    if foreign and (why := _not_heard_by_row(network, foreign)):
        network.unload()
        raise ArtefactError(f"the adapter in {path} cannot be heard beside its base: {why}.", PLAIN)
    if not any(bool(w.any()) for key, w in network.named_parameters() if "lora_B" in key):
        network.unload()
        raise NoEffectError(
            f"the adapter in {path} changes nothing: its output matrices are zero.",
            "It was not trained: train the expert again.",
        )
    network.base_model.disable_adapter_layers()
    network.eval()
    return _dressed(model, network, fingerprint)


@contextmanager
def speaking(expert: Model, *, beside_base: bool = False) -> Iterator[None]:
    """While open, forward passes of `expert` (from `load_adapter`) go through the adapter.

    `beside_base`: the first half of a batch's rows passes it by, and is the untouched base.
    """

    def name_rows(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        half, rest = len(args[0]) // 2, len(args[0]) - len(args[0]) // 2
        return args, {**kwargs, "adapter_names": [BASE] * half + [EXPERT] * rest}

    lora_layer = import_module("peft.tuners.lora").LoraLayer
    layers = [layer for layer in expert.network.modules() if isinstance(layer, lora_layer)] if beside_base else []
    # PEFT does the same when a forward pass is given `adapter_names`, but leaves its hooks behind if that pass fails.
    with ExitStack() as stack:
        stack.callback(expert.network.base_model.disable_adapter_layers)
        expert.network.base_model.enable_adapter_layers()
        expert.network.requires_grad_(False)  # enabling asks for gradients
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(name_rows, with_kwargs=True).remove)
        yield


def _require_plain(adapter: Adapter, model: Model) -> None:
    """Raises ArtefactError where the adapter is more than LoRA matrices on linear layers of `model`, before PEFT puts anything into it: saved biases,
    embeddings and the like would overwrite the base's own."""
    where, config = adapter.folder, adapter.config
    if config.get("use_dora"):
        raise ArtefactError(
            f"the adapter in {where} is DoRA, which cannot be heard beside its base in one pass.", PLAIN
        )
    plain = {"layer_replication": (None,), "bias": (None, "none"), "init_lora_weights": PLAIN_STARTS}
    if odd := [f"{name}: {config[name]}" for name, usual in plain.items() if config.get(name) not in usual]:
        raise ArtefactError(f"the adapter in {where} changes the base model itself ({', '.join(odd)}).", PLAIN)
    linear = {name: layer for name, layer in model.network.named_modules() if isinstance(layer, nn.Linear)}
    for name, tensor in adapter.tensors.items():
        place, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if rest not in ("A.weight", "B.weight"):
            raise ArtefactError(f"the adapter in {where} holds more than LoRA matrices: {name}.", PLAIN)
        if place not in linear:
            raise ArtefactError(
                f"the adapter in {where} is for a layer {place}, and {model.name} has no linear layer of that name.",
                f"It belongs to another model; it names {adapter.config.get('base_model_name_or_path') or 'none'}.",
            )
        width = linear[place].in_features if rest == "A.weight" else linear[place].out_features
        if tensor.shape[-1 if rest == "A.weight" else 0] != width:
            raise ArtefactError(
                f"the adapter in {where} does not fit: {name} has shape {tuple(tensor.shape)}, for a width of {width} in {model.name}.",
                f"It belongs to another model; it names {adapter.config.get('base_model_name_or_path') or 'none'}.",
            )


def _not_heard_by_row(network: Any, adapter: Adapter) -> str:
    """Why PEFT could not let some rows of a batch pass this adapter by; nothing where it can."""
    lora = import_module("peft.tuners.lora")
    layers = [layer for layer in network.modules() if isinstance(layer, lora.LoraLayer)]
    if odd := sorted(
        {type(layer).__name__ for layer in layers if not isinstance(layer, lora.Linear) or layer.lora_variant}
    ):
        return f"its layers are not plain ({', '.join(odd)})"
    matrices = len(adapter.tensors)
    return "" if matrices == 2 * len(layers) else f"{matrices} matrices for {len(layers)} layers; it is damaged"


def _dressed(model: Model, network: Any, fingerprint: str) -> Model:
    """`model` with another network; who it is does not change with what it wears."""
    network.eval()
    dressed = replace(model, network=network)
    dressed.fingerprint = fingerprint
    return dressed


def _require_bare(model: Model) -> None:
    if getattr(model.network, "peft_config", None):
        raise UsageError(f"{model.name} wears an adapter already.", "Load the model again for another expert.")


@contextmanager
def _wrapping(seed: int) -> Iterator[None]:
    """For PEFT's constructors: random numbers from `seed`, the caller's own stream untouched; and no warning about the
    names in transformers that PEFT has yet to follow."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # counted afterwards, and an error
        torch.manual_seed(seed)  # adapters are drawn on the CPU, whatever device they move to
        yield


def identity(folder: Path) -> ExpertIdentity:
    """Of a whole, unedited adapter, from its folder or from the run folder above it.

    Raises:
        PathError: no such folder. ArtefactError: it is not one, and why.
    """
    path = _adapter_folder(existing(folder))
    found = ExpertIdentity.read(path / IDENTITY)
    for name, sha256 in ((WEIGHTS, found.sha256), (CONFIG, found.config_sha256)):
        read_whole(path / name, sha256)
    return found


def adapter_identity(folder: Path) -> str:
    """Hash of what an adapter is, trained here or elsewhere; raises as `identity` does."""
    path = _adapter_folder(existing(folder))
    foreign = _foreign(path)
    return foreign.identity if foreign else identity(folder).seal


def _foreign(path: Path) -> Adapter | None:
    """The adapter in `path` where it was trained elsewhere: it has no `expert.json`."""
    return None if (path / IDENTITY).is_file() or not is_adapter(path) else read(path, ("LORA",))


def _adapter_folder(folder: Path) -> Path:
    """The adapter's own folder, where the run folder above it was named."""
    return folder / "adapter" if (folder / "adapter" / IDENTITY).is_file() else folder
