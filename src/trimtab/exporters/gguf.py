"""The token as one row of a GGUF file that exists already: nothing else is quantised anew, and every other tensor's bytes are as they were.

llama.cpp knows tensors by fixed names. A head that is the embedding table is not stored at all; written out, it is `output.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, TokenType
from gguf.quants import dequantize, quantize
from torch import Tensor

from trimtab.errors import ExportError

Tensors = dict[str, Any]  # the library's tensors, by name
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
SUPPRESS = "tokenizer.ggml.suppress_tokens"  # llama.cpp never samples these
# What holds a trained row closely enough (Q8_0: half a percent), and can be written here.
EXACT = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)


def patch(
    source: Path,
    target: Path,
    vectors: Mapping[int, Tensor],
    names: Sequence[str],
    *,
    template: str,
    at_start: bool = False,
    silent: Mapping[int, Tensor] | None,
    untie: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> str:
    """Write `source` with the rows `vectors`, by id, and their `names`, as `target`.

    Args:
        template: the edited chat template. at_start: the token stands before BOS, which the template says: llama.cpp must not put one before both. silent: output rows for ids behind the last one. untie: write the head out by itself.

    Returns:
        the embedding table's type.

    Raises:
        ExportError: as `sizes`.
    """
    reader = _read(source)
    held = _by_name(reader)
    kind = _table(source, held).tensor_type
    tables = {EMBEDDING: _with_rows(held[EMBEDDING].data, vectors, kind)}
    quiet = silent if silent and min(silent) >= len(held[EMBEDDING].data) else None
    if HEAD in held:
        if quiet:
            tables[HEAD] = _quieted(held[HEAD], quiet)
    elif untie:
        tables[HEAD] = _with_rows(held[EMBEDDING].data, quiet or {}, kind)
    writer = GGUFWriter(target, str(reader.fields[Keys.General.ARCHITECTURE].contents()), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    entries = _metadata(reader, dict(zip(vectors, names, strict=True)), template, len(tables[EMBEDDING]))
    for key, value, value_kind, of in entries:
        if key == Keys.Tokenizer.ADD_BOS and at_start:
            value = False
        writer.add_key_value(key, value, value_kind, sub_type=of)
    data = {name: (tables.get(name, tensor.data), tensor.tensor_type) for name, tensor in held.items()}
    data |= {name: (table, kind) for name, table in tables.items() if name not in held}
    for name, (table, its_kind) in data.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes, its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for table, _ in data.values():
        writer.write_tensor_data(table, tensor_endianess=reader.endianess)
        advance(table.nbytes)
    writer.close()
    return str(kind.name)


def sizes(source: Path, appended: int, untie: bool) -> tuple[int, int]:
    """Bytes of the file that `patch` will write, but for a few of its header, and of the embedding table in it.

    Raises:
        ExportError: the file is damaged, or its table is quantised too coarsely for a trained row.
    """
    held = tensors(source)
    before = int(_table(source, held).n_bytes)
    row = before // len(held[EMBEDDING].data)
    table = before + appended * row
    return source.stat().st_size + appended * row + (table if untie and HEAD not in held else 0), table


def tensors(path: Path) -> Tensors:
    """A file's tensors by name, mapped and not read."""
    return _by_name(_read(path))


def said(path: Path, ids: Sequence[int]) -> tuple[tuple[str, ...], str, bool]:
    """What a file says of the tokens `ids`: their names, the chat template, and whether they are control tokens that are never sampled."""
    fields = _read(path).fields

    def at(key: str) -> list[Any]:
        return list(fields[key].contents()) if key in fields else []

    words, kinds, kept_back = at(Keys.Tokenizer.LIST), at(Keys.Tokenizer.TOKEN_TYPE), at(SUPPRESS)
    never = all(i in kept_back and (not kinds or kinds[i] == TokenType.CONTROL) for i in ids)
    return tuple(words[i] for i in ids), str(fields[Keys.Tokenizer.CHAT_TEMPLATE].contents()), never


def rows(held: Tensors, ids: Sequence[int]) -> Tensor:
    """Rows `[n, hidden]` of a file's embedding table, as an engine reads them."""
    table = held[EMBEDDING]
    return torch.from_numpy(np.array(dequantize(table.data[list(ids)], table.tensor_type), dtype=np.float32))


def changed(before: Tensors, after: Tensors) -> set[str]:
    """Names of the tensors whose bytes are not the same in both files."""
    return {
        name
        for name in {*before, *after}
        if name not in before or name not in after or not np.array_equal(before[name].data, after[name].data)
    }


def others_kept(before: Tensors, after: Tensors, ids: Sequence[int]) -> bool:
    """Whether every other row of the tables is, byte for byte, that of the embedding table or head before."""
    for name in {EMBEDDING, HEAD} & set(after):
        table = before[name if name in before else EMBEDDING].data
        kept = np.delete(np.arange(len(table)), [i for i in ids if i < len(table)])
        if not np.array_equal(table[kept], after[name].data[kept]):
            return False
    return True


def holds_silence(path: Path) -> bool:
    """Whether a silent output row can be written into the file's head; some of its types can only be read here, and then the row is zero."""
    head = tensors(path).get(HEAD)
    return head is None or _writable(head)


def _writable(table: Any) -> bool:
    """Whether rows of a table's type can be written here."""
    try:
        quantize(np.zeros((1, int(table.shape[0])), dtype=np.float32), table.tensor_type)
    except NotImplementedError:
        return False
    return True


def _table(source: Path, held: Tensors) -> Any:
    """The embedding table, if a trained row can be written into it."""
    if EMBEDDING not in held:
        raise ExportError(f"{source} has no {EMBEDDING}.", "Only language models can be exported.")
    kind = held[EMBEDDING].tensor_type
    if kind not in EXACT:
        raise ExportError(
            f"the embedding table of {source.name} is {kind.name}, too coarse for a trained row.",
            "Quantise the model with --token-embedding-type q8_0 and train the token again on that, or export --format hf.",
        )
    return held[EMBEDDING]


def _by_name(reader: GGUFReader) -> Tensors:
    return {tensor.name: tensor for tensor in reader.tensors}


def _read(path: Path) -> GGUFReader:
    try:
        stat = path.stat()
        return opened(path, stat.st_mtime_ns, stat.st_size)
    except Exception as error:  # the reader raises whatever a damaged header leads it to
        raise ExportError(f"{path} is no whole GGUF file: {error}", "Fetch the model again.") from None


@lru_cache(maxsize=1)  # going through the keys of a vocabulary takes seconds, and an export asks six times
def opened(path: Path, changed_at: int, size: int) -> GGUFReader:
    """A file as it was at that time: its keys, and its tensors mapped."""
    return GGUFReader(path)


def _with_rows(table: Any, rows: Mapping[int, Tensor], kind: GGMLQuantizationType) -> Any:
    """The table's bytes `[rows, bytes of a row]` with some rows set; it grows if it must."""
    if not rows:
        return table
    grown = max(len(table), max(rows) + 1)
    new = np.zeros((grown, *table.shape[1:]), dtype=table.dtype)
    new[: len(table)] = table
    for i, row in rows.items():
        new[i] = quantize(row.float().numpy()[None], kind)[0]
    return new


def _quieted(head: Any, silent: Mapping[int, Tensor]) -> Any:
    """An output table with rows that are not said; zero where its type cannot be written here."""
    if _writable(head):
        return _with_rows(head.data, silent, head.tensor_type)
    return np.concatenate([head.data, np.zeros((len(silent), *head.data.shape[1:]), dtype=head.data.dtype)])


def _metadata(
    reader: GGUFReader, names: Mapping[int, str], template: str, total: int
) -> list[tuple[str, Any, GGUFValueType, Any]]:
    """Keys and values as they are, but for the vocabulary, its size, the template, and what is never sampled."""
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    size = Keys.LLM.VOCAB_SIZE.format(arch=architecture)
    new: dict[str, tuple[Any, GGUFValueType, Any]] = {
        Keys.Tokenizer.CHAT_TEMPLATE: (template, GGUFValueType.STRING, None),
        SUPPRESS: (sorted(names), GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    found = []
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key == Keys.General.ARCHITECTURE:
            continue  # written by the writer
        value, kind = entry.contents(), entry.types[0]
        of = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        filler = {
            Keys.Tokenizer.LIST: names,
            Keys.Tokenizer.TOKEN_TYPE: dict.fromkeys(names, int(TokenType.CONTROL)),
            Keys.Tokenizer.SCORES: dict.fromkeys(names, 0.0),
        }.get(key)
        if filler is not None:
            blank: Any = (
                "" if key == Keys.Tokenizer.LIST else int(TokenType.UNUSED) if key == Keys.Tokenizer.TOKEN_TYPE else 0.0
            )
            value = [*value, *[blank] * (total - len(value))]
            for i, each in filler.items():
                value[i] = each
        elif key == size:
            value = total
        elif key == SUPPRESS:
            value = sorted({*value, *names})
        elif key in new:
            value, kind, of = new[key]
        new.pop(key, None)
        found.append((key, value, kind, of))
    return found + [(key, *entry) for key, entry in new.items()]
