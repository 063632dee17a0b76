"""A Hugging Face checkpoint with the token as one row more, written shard by shard: no tensor is ever held whole in memory.

A safetensors file is a length, a JSON header and the tensors' bytes. Only the embedding's row (and, where a tied head is written out, a copy of the table)
changes; every other tensor's bytes are copied as they are.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trimtab.errors import ExportError

INDEX = "model.safetensors.index.json"
PIECE = 8 << 20  # bytes copied at a time where the system cannot do it by itself
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: its number type, shape, and the bytes it takes there."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Rows:
    """What becomes of a table `[vocabulary, hidden]`: it grows to `total` rows, and these are set.

    Attributes:
        rows: vectors `[hidden]` by place. total: rows afterwards; those that nobody sets are zero. source: the tensor whose bytes it begins with; its own if not given.
    """

    rows: Mapping[int, Tensor]
    total: int
    source: Stored | None = None


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by name, from the files' headers.

    Raises:
        ExportError: no safetensors files, or damaged ones.
    """
    found: dict[str, Stored] = {}
    for path in shards(folder):
        held, _ = _held(path)
        size = path.stat().st_size
        for name, stored in held.items():
            if stored.end > size:
                raise ExportError(f"{path} is truncated: {name} is not whole.", "Fetch the model again.")
        found |= held
    return found


def shards(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, or the only one.

    Raises:
        ExportError: there are none, or some are missing.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ExportError(
            f"{folder} has no {missing[0]}: only safetensors checkpoints can be exported.",
            "Save the model with save_pretrained, which writes safetensors.",
        )
    return [folder / name for name in names]


def copy_shard(path: Path, target: Path, advance: Callable[[int], None]) -> None:
    """A file of weights as it is; `advance` is told the bytes as they are written."""
    with path.open("rb") as source, target.open("wb") as out:
        _copy(source, out, 0, path.stat().st_size, advance)
        os.fsync(out.fileno())


def rewrite(
    path: Path, target: Path, changed: Mapping[str, Rows], added: Mapping[str, Rows], advance: Callable[[int], None]
) -> None:
    """Copy a safetensors file with some tables `changed`, and others `added` behind all there is; `advance` is told the bytes as they are written."""
    held, metadata = _held(path)
    parts: list[tuple[str, Stored, Rows | None]] = [
        (name, stored, changed.get(name)) for name, stored in sorted(held.items(), key=lambda entry: entry[1].begin)
    ]
    for name, new in added.items():
        if new.source is None:
            raise ValueError(f"{name} is new, and needs a source")
        parts.append((name, new.source, new))
    described: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    at = 0
    for name, stored, rows in parts:
        shape = (rows.total, *stored.shape[1:]) if rows else stored.shape
        size = stored.end - stored.begin
        size += (rows.total - stored.shape[0]) * row_bytes(stored) if rows else 0
        described[name] = {"dtype": stored.dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, stored, rows in parts:
            here = out.tell()
            with stored.file.open("rb") as source:
                _copy(source, out, stored.begin, stored.end - stored.begin, advance)
            if rows is None:
                continue
            width = row_bytes(stored)
            out.seek(0, os.SEEK_END)
            out.write(bytes(here + rows.total * width - out.tell()))
            for row, vector in rows.rows.items():
                out.seek(here + row * width)
                out.write(encoded(vector, stored.dtype))
            out.seek(0, os.SEEK_END)
        out.flush()
        os.fsync(out.fileno())


def pick(stored: Stored, places: slice) -> Tensor:
    """Some numbers `[n]` of a tensor of a type in `STORED`, laid out flat; the others are not read."""
    width = STORED[stored.dtype].itemsize
    with stored.file.open("rb") as file:
        read = [
            os.pread(file.fileno(), width, stored.begin + i * width) for i in range(*places.indices(stored.numbers))
        ]
    return torch.frombuffer(bytearray(b"".join(read)), dtype=STORED[stored.dtype])


def row_bytes(stored: Stored) -> int:
    """Bytes of one row of a table."""
    return (stored.end - stored.begin) // stored.shape[0]


def encoded(vector: Tensor, dtype: str) -> bytes:
    """A row as the table stores it.

    Raises:
        ExportError: a number type that cannot hold a trained row.
    """
    if dtype not in STORED:
        raise ExportError(
            f"the embedding table is stored as {dtype}, which cannot hold a trained row.",
            "Export from the unquantised model (float32, bfloat16 or float16).",
        )
    return vector.detach().to("cpu", STORED[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def copy_file(source: Path, target: Path) -> None:
    """A file as it is; links are followed, since the hub's cache is made of them."""
    shutil.copyfile(source, target, follow_symlinks=True)


def write_index(folder: Path, target: Path, added: Mapping[str, str], total: int) -> None:
    """The index of a sharded checkpoint, with the tensors `added` (name to file) and its new size: last, so that a folder with it is whole."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= dict(added)
    index.setdefault("metadata", {})["total_size"] = total
    (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _held(path: Path) -> tuple[dict[str, Stored], Any]:
    """The tensors of one safetensors file, by name, and its metadata, if it has any."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = dict(json.loads(file.read(length)))
    except (OSError, ValueError, struct.error) as error:
        raise ExportError(f"{path} is no whole safetensors file: {error}", "Fetch the model again.") from None
    metadata = header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(begin + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }, metadata


def _copy(source: BinaryIO, target: BinaryIO, begin: int, size: int, advance: Callable[[int], None]) -> None:
    """Bytes from one file to where another stands, by the system itself where it can."""
    target.flush()
    left = size
    while left:
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(left, 16 * PIECE), begin + size - left)
        except (AttributeError, OSError):
            source.seek(begin + size - left)
            piece = source.read(min(left, PIECE))
            target.write(piece)
            target.flush()
            done = len(piece)
        if not done:
            raise ExportError(f"{source.name} is truncated.", "Fetch the model again.")
        left -= done
        advance(done)
    target.seek(0, os.SEEK_END)


def total_bytes(found: Sequence[Stored]) -> int:
    return sum(stored.end - stored.begin for stored in found)
