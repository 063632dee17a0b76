"""Where prompts come from: the builtin set, a JSONL file, or a hub data set at a pinned revision."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.errors import DataError, nearest
from trimtab.prompts.records import Label, Record, Split

BUILTIN = ("harmful", "borderline", "plain")
ANSWERS = "builtin:answers"  # sums and questions that have one right answer: measured on, never trained on
HUB = re.compile(r"^hf:(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?::(?P<split>[\w.-]+))?$")


def load_prompts(source: str | Path, *, split: Split | None = None) -> list[Record]:
    """Read prompts with their labels.

    Args:
        source: `builtin`, `builtin:test` (one split), `builtin:answers`, a `.jsonl` file, or `hf:owner/name@revision:split`.
        split: keep only this split; a set without splits is divided by topic first (see `split_records`).

    Raises:
        DataError: no such file; a malformed line (file, line and field are named); a hub set without a revision.
    """
    name = str(source)
    if name == ANSWERS:
        records = _builtin("answers")
    elif name.partition(":")[0] == "builtin":
        split = split or _named_split(name)
        records = [record for part in BUILTIN for record in _builtin(part)]
    elif name.startswith("hf:"):
        records = _read_hub(name)
    else:
        records = read_jsonl(Path(name))
    if split is None:
        return records
    return [r for r in split_records(records) if r.split == split]


def read_jsonl(path: Path) -> list[Record]:
    """One record a line; blank lines are passed over, unknown fields ignored, a missing id is made of the line number.

    Raises:
        DataError: no such file, an empty one, or a malformed line: what is trained on is to be all right.
    """
    records, broken = read_good_lines(path)
    if broken:
        raise next(iter(broken.values()))
    return records


def read_good_lines(path: Path) -> tuple[list[Record], dict[int, DataError]]:
    """The records of a file, and by line number what is wrong with the lines that hold none: one of them does not stop a long measurement.

    Raises:
        DataError: no such file, an empty one, one with no good line, or an id that is there twice.
    """
    records: list[Record] = []
    broken: dict[int, DataError] = {}
    for number, where, line in _lines(path):
        try:
            records.append(_record(_object(line, where), where, f"{path.stem}-{number:05d}"))
        except DataError as error:
            broken[number] = error
    if not records:
        raise next(iter(broken.values()))
    number, twice = next(((n, i) for i, n in Counter(r.id for r in records).items() if n > 1), (0, ""))
    if twice:
        raise DataError(f"{path}: {number} rows have the id {twice!r}.", "Ids are unique in a file.")
    return records, broken


class Chat(BaseModel):
    """One conversation to be continued; no label. `line` is where it stands in its file."""

    model_config = ConfigDict(frozen=True)

    line: int
    id: str
    messages: tuple[dict[str, Any], ...]
    prefill: str = ""


def read_chats(path: Path) -> tuple[list[Chat], dict[int, str]]:
    """The conversations of a file with lines `{"id", "prompt" | "messages", "prefill"?}`; a missing id is the line number.

    Returns:
        the conversations, and by line number what is wrong with the lines that hold none.

    Raises:
        DataError: no such file, an empty one, or one with no good line; what is wrong with its first.
    """
    chats: list[Chat] = []
    broken: dict[int, DataError] = {}
    for number, where, line in _lines(path):
        try:
            row = _object(line, where)
            _require_words(row, where)
            messages: Any = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            name, prefill = str(row.get("id") or number), row.get("prefill") or ""
            try:
                chat = Chat(line=number, id=name, messages=messages, prefill=prefill)
            except ValidationError as error:
                raise _field_error(error, where) from None
            _require_turns(chat, where)
            chats.append(chat)
        except DataError as error:
            broken[number] = error
    if not chats:
        raise next(iter(broken.values()))
    return chats, {number: error.args[0] for number, error in broken.items()}


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, "file, line n" and text of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.jsonl")]) if path.parent.is_dir() else ""
        raise DataError(
            f"no file {path}.",
            near if "mean" in near else "A prompt file is JSON Lines; --data and --suite take builtin too.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "A prompt file is JSON Lines in UTF-8.") from None
    if not any(line.strip() for line in lines):
        raise DataError(
            f"{path} holds no prompts.", 'A line is an object such as {"prompt": "...", "label": "benign"}.'
        )
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, f"{path}, line {number}", line


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}).", "Each line is one JSON object.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object.", "Each line is one JSON object.")
    return row


def _record(row: dict[str, Any], where: str, default_id: str) -> Record:
    _require_words(row, where)
    # Fields left null by an exporter are the same as absent ones.
    given = {k: v for k, v in row.items() if v is not None}
    if given.get("label") == "harmful":
        given.setdefault("group", "harmful")
    try:
        return Record(**{"id": default_id, **given})
    except ValidationError as error:
        raise _field_error(error, where) from None


def _require_words(row: dict[str, Any], where: str) -> None:
    if not str(row.get("prompt") or "").strip() and not row.get("messages") and not row.get("turns"):
        raise DataError(
            f"{where}, field prompt: missing or empty.", "Give a request in `prompt`, or turns in `messages`."
        )


def _require_turns(chat: Chat, where: str) -> None:
    """Raises DataError for a turn that only the chat template would stumble over, and the whole file with it."""
    for n, turn in enumerate(chat.messages):
        # A turn that calls a tool may say nothing.
        speaks = isinstance(turn.get("content"), str | list) or turn.get("tool_calls")
        if not isinstance(turn.get("role"), str) or not speaks:
            raise DataError(
                f"{where}, field messages.{n}: a turn needs a role and content.", "See the README on prompt files."
            )


def _field_error(error: ValidationError, where: str) -> DataError:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    mend = f"Labels are {' and '.join(get_args(Label))}." if field == "label" else "See the README on prompt files."
    return DataError(f"{where}, field {field}: {first['msg'].lower()}.", mend)


def _read_hub(name: str) -> list[Record]:
    match = HUB.match(name)
    if not match:
        raise DataError(f"{name} is no hub data set.", "Write hf:owner/name@revision:split.")
    if not match["revision"]:
        raise DataError(
            f"{name} names no revision, so the run could not be repeated.", "Write hf:owner/name@COMMIT:split."
        )
    if not re.fullmatch(r"[0-9a-f]{7,40}", match["revision"]):
        raise DataError(
            f"{match['revision']!r} is no commit: a branch or tag may move, and the run could not be repeated.",
            f"Its commits are at https://huggingface.co/datasets/{match['id']}/commits.",
        )
    split = match["split"] or "train"
    rows = fetched(name, "Check the name and your connection.", match["id"], revision=match["revision"], split=split)
    return [_record(row, f"{name}, row {i}", f"{match['id']}-{i:05d}") for i, row in enumerate(rows)]


def fetched(what: str, mend: str, *place: str | None, **options: Any) -> list[dict[str, Any]]:
    """Rows of a data set, by what `datasets.load_dataset` takes; `what` is its name for people.

    Raises:
        DataError: the package datasets is missing, or the rows cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{what} needs the package datasets.", "pip install 'trimtab[data]'") from None
    try:
        return [dict(row) for row in load_dataset(*place, **options)]
    except Exception as error:  # datasets passes on whatever the network or the files raise
        raise DataError(f"cannot load {what}: {type(error).__name__}: {error}", mend) from None


def split_records(records: Sequence[Record]) -> list[Record]:
    """Give every record without a split one: 70 % train, 10 % validation, 20 % test, a topic (else a prompt) whole.

    The choice is a hash of the topic, so adding rows never moves others.
    """
    return [r if r.split else r.model_copy(update={"split": _split_of(r.topic or r.text)}) for r in records]


def require_both_labels(records: Iterable[Record], what: str) -> None:
    """Raises DataError where all labels are of one class: nothing could be told apart."""
    counts = Counter(r.label for r in records)
    for label in get_args(Label):
        if not counts[label]:
            raise DataError(
                f"{what} holds no {label} prompts ({dict(counts)}).", "Training needs both harmful and benign ones."
            )


def _split_of(key: str) -> Split:
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


def _builtin(part: str) -> list[Record]:
    return read_jsonl(Path(str(files("trimtab.prompts") / f"builtin/{part}.jsonl")))


def _named_split(name: str) -> Split | None:
    part = name.partition(":")[2]
    for split in get_args(Split):
        if part == split:
            return split  # type: ignore[no-any-return]
    if part:
        raise DataError(f"builtin has no split {part!r}.", nearest(part, (*get_args(Split), "answers")))
    return None
