"""What an export will do, before it does anything: which row of the vocabulary holds the token, which files change, and what engines make of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

from trimtab.adapter import CONFIG, WEIGHTS
from trimtab.errors import ExportError, ModelError
from trimtab.exporters import gguf
from trimtab.exporters.checkpoint import INDEX, STORED, Stored, row_bytes, shards, tensors
from trimtab.models import Model, resolve, unpacked
from trimtab.run import tell
from trimtab.softtoken.artifact import SoftToken

Format = Literal["hf", "gguf", "peft"]
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
PROCESSOR = "processor_config.json"
REWRITTEN = ("config.json", "generation_config.json", "tokenizer.json", *TEMPLATES)
RECORD = "trimtab.json"  # what was done, and how it was verified; in every export
NEW = ("README.md", RECORD)
MODELFILE = "Modelfile"  # Ollama's
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
ROW_MEANING = {
    "unused": "a row of the table that the tokenizer does not use: no shape changes",
    "reserved": "a special token that the model's makers reserved for its users: no shape changes",
    "appended": "behind the tokenizer's last word: the table grows",
}


@dataclass(frozen=True)
class Plan:
    """One export, decided.

    Attributes:
        format: of the export. source: the model's folder. ids, names: the slot's rows, and the special tokens that stand for them. row: which kind of row (`ROW_MEANING`).
        rows: of the table, before and after. embedding: its name in the checkpoint. head: the output table's name there; none where it is tied and not stored.
        family: the model's type, as its config has it. tied: whether the model's head is its embedding table. untie: whether the head is written out as a table of its own.
        table_bytes: of the embedding table, as the export stores it.
        tensors: everything in the checkpoint. files: name, what becomes of it, bytes afterwards. unpacked: where it was read from a GGUF file, what that means, in words.
    """

    format: Format
    source: Path
    ids: tuple[int, ...]
    names: tuple[str, ...]
    row: Literal["unused", "reserved", "appended"]
    rows: tuple[int, int]
    embedding: str
    head: str
    tied: bool
    untie: bool
    family: str
    table_bytes: int
    tensors: dict[str, Stored]
    files: tuple[tuple[str, str, int], ...]
    unpacked: str = ""

    @property
    def appended(self) -> bool:
        return self.row == "appended"

    def behind(self, rows: Tensor) -> dict[int, Tensor]:
        """Of `rows`, one for each of the slot's, by id: those that the tables do not have yet."""
        return {i: row for i, row in zip(self.ids, rows, strict=True) if i >= self.rows[0]}

    @property
    def head_stored(self) -> bool:
        return self.head in self.tensors

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.files)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        names = ("row", "family", "ids", "names", "rows", "embedding", "head", "tied", "untie", "table_bytes")
        described = {name: getattr(self, name) for name in names}
        files = [{"file": name, "what": what, "bytes": size} for name, what, size in self.files]
        return {
            "source": str(self.source),
            **described,
            "dtype": self.tensors[self.embedding].dtype,
            "files": files,
            "bytes": self.size,
            "unpacked": self.unpacked,
            "engines": engines(self),
        }


def plan(model: Model, token: SoftToken, *, untie: bool, format: Format = "hf") -> Plan:
    """Decide an export of `token` with `model`; `untie` writes out a head that is tied.

    Raises:
        ArtefactError: the token belongs to another model. ExportError: an architecture or a file that this cannot be done to.
    """
    token.check(model)
    source = folder_of(model)
    found = tensors(source)
    ids = tuple(model.slot_ids(len(token.vectors)))
    before = len(model.table)
    known = {i: name for name, i in model.tokenizer.get_vocab().items()}
    row: Literal["unused", "reserved", "appended"] = (
        "appended" if ids[-1] >= before else "reserved" if ids[0] in known else "unused"
    )
    names = slot_names(model, ids)
    if row != "reserved" and (taken := [name for name in names if name in known.values()]):
        raise ExportError(f"{model.name} has a token {taken[0]} already.", "Export from the model it was trained on.")
    tied = _head_of(model) is model.table
    embedding = _find(model, found, model.embedding, model.table)
    head = f"{name_of(model, model.network.get_output_embeddings())}.weight"
    if not tied:
        head = _find(model, found, model.network.get_output_embeddings(), _head_of(model))
    after = max(before, ids[-1] + 1)
    written_out = tied and untie
    family = str(model.network.config.get_text_config().model_type)
    if format == "gguf":
        path = gguf_file(model)
        size, table = gguf.sizes(path, after - before, written_out)
        files = ((f"{path.stem}.trimtab.gguf", "one row", size), *((name, "new", 0) for name in (MODELFILE, *NEW)))
    elif format == "peft":
        table = 0  # the base's own, and not part of it
        weights = (2 if tied else 1) * token.vectors.numel() * 4
        says = ("tokenizer.json", *TEMPLATES)
        kept = [path for path in sorted(source.iterdir()) if path.name in says or _says_template(path)]
        files = (
            (CONFIG, "new", 0),
            (WEIGHTS, "new", weights),
            *((path.name, "the slot's name and place", path.stat().st_size) for path in kept),
            *((name, "new", 0) for name in NEW),
        )
        written_out = False
    else:
        if found[embedding].dtype not in STORED:
            raise ExportError(
                f"the embedding table of {model.name} is stored as {found[embedding].dtype}, which cannot hold a trained row.",
                "Export from the unquantised model (float32, bfloat16 or float16).",
            )
        table = after * row_bytes(found[embedding])
        grown = {embedding: after - before} | ({head: after - before} if head in found and not written_out else {})
        extra = {embedding: table} if written_out and head not in found else {}
        files = _files(source, found, grown, extra)
    return Plan(
        format,
        source,
        ids,
        names,
        row,
        (before, after),
        embedding,
        head,
        tied,
        written_out,
        family,
        table,
        found,
        files,
        _unpacked(model, sum(size for _, _, size in files)) if format == "hf" else "",
    )


def slot_names(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    """The special tokens that stand for slots: reserved ones have names already."""
    known = {i: name for name, i in model.tokenizer.get_vocab().items()}
    return tuple(known.get(i, f"<|trimtab_{n}|>") for n, i in enumerate(ids))


def folder_of(model: Model) -> Path:
    """Where the model's own files are; a GGUF's are unpacked ones.

    Raises:
        ExportError: nowhere on this machine.
    """
    kind = model.origin.get("kind")
    if kind == "folder":
        return Path(model.origin["path"])
    if kind == "hub":
        from huggingface_hub import snapshot_download

        unwanted = [*(f"*{suffix}" for suffix in OTHER_WEIGHTS), "original/*"]
        try:
            folder = snapshot_download(model.origin["id"], revision=model.origin["revision"], ignore_patterns=unwanted)
        except Exception as error:  # the hub's client raises many kinds
            raise ModelError(
                f"cannot fetch {model.origin['id']}: {error}", "Check your connection and HF_HUB_OFFLINE."
            ) from None
        return Path(folder)
    if kind == "gguf":
        return unpacked(model.origin["sha256"])
    raise ExportError(
        f"{model.name} is not on this machine as files.", "Load it from a folder, a GGUF file or the hub."
    )


def gguf_file(model: Model) -> Path:
    """The GGUF file that a model was read from.

    Raises:
        ExportError: it was not read from one.
    """
    if model.origin.get("kind") != "gguf":
        raise ExportError(
            f"{model.name} was not read from a GGUF file, and only such a file can be given a row more.",
            "Use --format hf, and convert the folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    return Path(resolve(model.name, None)[0])


def engines(found: Plan) -> dict[str, str]:
    """What each engine does with the export, in a sentence."""
    if found.format == "gguf":
        return {
            "llama.cpp": "loads it as it is, with --jinja; tokenizer.ggml.suppress_tokens keeps the slot from being generated",
            "Ollama": "ollama create NAME -f Modelfile; the Modelfile says whether its template is whole. Not tried in Ollama",
        }
    if found.format == "peft":
        said = (
            "; the head is tied, so the row is an output too, which suppress_tokens keeps from being said"
            if found.tied
            else ""
        )
        grown = (
            "after resize_token_embeddings, since PEFT has no rows behind the table" if found.appended else "as it is"
        )
        return {"PEFT": f"PeftModel.from_pretrained loads it {grown}{said}; use the tokenizer of this folder"}
    spoken = (
        "keeps it from being generated by generation_config.json"
        if not found.tied or found.untie
        else "the head is tied, and generation_config.json keeps the slot from being generated"
    )
    asked = f'give "bad_words": {json.dumps(found.names)} with every request'
    halved = " (in half precision, unless --dtype float32)" if found.tensors[found.embedding].dtype == "F32" else ""
    served = f"loads it as it is{halved}; ignores suppress_tokens" + (
        "; the head of its own makes the slot unlikely" if not found.tied or found.untie else f": {asked}"
    )
    if found.untie and found.family.startswith(("gemma2", "cohere")):
        served = f"reads no head of its own for {found.family}: export with --keep-tied, and {asked}"
    converted = "wants a GGUF file: convert this folder, and keep the embedding table at q8_0 or f16. Suppression is lost on the way"
    if found.tied and not found.untie:
        never = json.dumps([[i, False] for i in found.ids])
        converted += f', and the head is tied: give "logit_bias": {never} with every request'
    return {
        "transformers": f"chat template and row are its own; {spoken}",
        "vLLM": served,
        "llama.cpp": converted,
        "Ollama": "wants a GGUF file too, and a template in Go's language: see the Modelfile that --format gguf writes. Not tried",
    }


def show(found: Plan, people: Console, *, measured: bool) -> None:
    """The plan as a table, and in words; `measured` is false where it takes for granted that a tied head is written out."""
    show_files(found.files, people, f"export of {found.source}")
    tell(people, f"row {found.ids[0]}, {found.names[0]}: {ROW_MEANING[found.row]}")
    if found.tied:
        written = f"written out by itself, {found.table_bytes / 1e6:.1f} MB more"
        if not measured:
            written = (
                f"this plan takes for granted that it is {written}: whether it must be is measured when exporting. "
                "--untie or --keep-tied decides now"
            )
        tell(people, f"the head is the embedding table; {written if found.untie else 'it stays so'}")
    else:
        grows = "grows by as many rows, made to be silent" if found.appended else "stays as it is"
        tell(people, f"the head is a table of its own, and {grows}")
    if found.unpacked:
        tell(people, found.unpacked)
    for engine, words in engines(found).items():
        tell(people, f"{engine}: {words}")


def show_files(files: Sequence[tuple[str, str, int]], people: Console, title: str) -> None:
    """Every file, what becomes of it, and its size; of a new one that is small, none is known before."""
    table = Table("file", "what becomes of it", "MB", title=title)
    for name, what, size in files:
        table.add_row(name, what, f"{size / 1e6:.1f}" if size >= 50_000 else f"{size / 1e6:.3f}" if size else "small")
    people.print(table)


def _unpacked(model: Model, size: int) -> str:
    """What becomes of a GGUF file in a Hugging Face checkpoint, in words; none where the model is no such file."""
    if model.origin.get("kind") != "gguf":
        return ""
    before = gguf_file(model).stat().st_size
    return (
        f"the model was read from a GGUF file of {before / 1e6:.1f} MB: this is its unpacked float32 copy, {size / 1e6:.1f} MB; "
        "--format gguf keeps it as small as it is"
    )


def _head_of(model: Model) -> Tensor:
    """The output table.

    Raises:
        ExportError: there is none, or it has a bias, which a new row would need as well.
    """
    head = model.network.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ExportError(
            f"{model.name} ({type(model.network).__name__}) has no plain output table.",
            "Use --format peft for a token at the start, or serve it with trimtab.",
        )
    weight: Tensor = head.weight
    return weight


def name_of(model: Model, module: Any) -> str:
    """Of a layer, in the loaded network."""
    names: list[str] = [name for name, each in model.network.named_modules() if each is module]
    return names[0]


def _find(model: Model, found: dict[str, Stored], module: Any, table: Tensor) -> str:
    """The name under which a module's table is stored: a checkpoint's prefixes are not always those of the loaded network."""
    leaf = name_of(model, module).rpartition(".")[2]
    named = [
        name
        for name, stored in found.items()
        if f".{name}".endswith(f".{leaf}.weight") and stored.shape == tuple(table.shape)
    ]
    if len(named) != 1:
        raise ExportError(
            f"{model.name} ({type(model.network).__name__}): {len(named)} tensors of the checkpoint could be its table {leaf}.weight.",
            "This architecture is unknown here: use --format peft for a token at the start, or serve it with trimtab.",
        )
    return named[0]


def _says_template(path: Path) -> bool:
    """Whether this is a processor's config with a chat template in it, as older ones have: transformers would take that one."""
    return path.name == PROCESSOR and "chat_template" in json.loads(path.read_text(encoding="utf-8"))


def _files(
    source: Path, found: dict[str, Stored], grown: dict[str, int], extra: dict[str, int]
) -> tuple[tuple[str, str, int], ...]:
    """Every file of the export: its name, what becomes of it, and its bytes."""
    weights = {path.name for path in shards(source)}
    sized: dict[str, int] = {}
    for name, rows in grown.items():
        sized[found[name].file.name] = sized.get(found[name].file.name, 0) + rows * row_bytes(found[name])
    for name, size in extra.items():
        sized[found[name].file.name] = sized.get(found[name].file.name, 0) + size
    files: list[tuple[str, str, int]] = []
    for path in sorted(source.iterdir()):
        size = path.stat().st_size
        if path.name in weights:
            files.append((path.name, "one row" if path.name in sized else "as it is", size + sized.get(path.name, 0)))
        elif path.name in (*REWRITTEN, INDEX) or _says_template(path):
            files.append((path.name, "rewritten", size))
        elif (
            path.is_file()
            and path.name not in NEW
            and not path.name.startswith(".")
            and path.suffix not in OTHER_WEIGHTS
            and path.suffix != ".safetensors"
        ):
            files.append((path.name, "as it is", size))
    return (*files, *((name, "new", 0) for name in NEW))
