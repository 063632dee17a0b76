"""The files of a Hugging Face checkpoint with the slot in it: weights, configs, tokenizer, template."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.errors import ExportError
from trimtab.exporters.checkpoint import (
    INDEX,
    Rows,
    copy_file,
    copy_shard,
    rewrite,
    shards,
    tensors,
    total_bytes,
    write_index,
)
from trimtab.exporters.plan import PROCESSOR, Plan
from trimtab.models import Model
from trimtab.run import progress, write_json
from trimtab.softtoken.artifact import SoftToken

WRITERS = 2  # shards at a time: one is copied while another reaches the disk


def write_weights(found: Plan, token: SoftToken, scratch: Path, silent: Tensor) -> None:
    """The weights, shard by shard; the index last."""
    total = found.rows[1]
    vectors = dict(zip(found.ids, token.vectors, strict=True))
    quiet = found.behind(silent)
    changed = {found.embedding: Rows(vectors, total)}
    added: dict[str, Rows] = {}
    own_head = Rows(quiet, total, found.tensors[found.embedding])
    if found.untie:
        # A stored copy of a tied head is left out of account: the table itself is what the model uses.
        (changed if found.head_stored else added)[found.head] = own_head
    elif found.head_stored:
        changed[found.head] = Rows(vectors if found.tied else quiet, total)
    size = total_bytes(list(found.tensors.values()))
    file = found.tensors[found.embedding].file.name
    stopped = threading.Event()

    def write(path: Path) -> None:
        def advanced(done: int) -> None:
            if stopped.is_set():
                raise ExportError("writing was stopped.")
            advance(done // 1000)

        mine = {name: rows for name, rows in changed.items() if found.tensors[name].file == path}
        new = added if path.name == file else {}
        if mine or new:
            rewrite(path, scratch / path.name, mine, new, advanced)
        else:
            copy_shard(path, scratch / path.name, advanced)

    with progress("writing weights", size // 1000) as advance, ThreadPoolExecutor(WRITERS) as pool:
        try:
            for done in as_completed([pool.submit(write, path) for path in shards(found.source)]):
                done.result()
        except BaseException:  # Ctrl-C too: what else is being written ends at its next piece
            stopped.set()
            raise
    if (found.source / INDEX).is_file():
        # The index as it was is needed to find the shards again.
        copy_file(found.source / INDEX, scratch / INDEX)
        written = total_bytes(list(tensors(scratch).values()))
        write_index(found.source, scratch, dict.fromkeys(added, file), written)


def write_settings(found: Plan, model: Model, scratch: Path) -> None:
    """Files that stay as they are, and the two configs: vocabulary size, tied or not, and that the slot is never generated."""
    for name, what, _ in found.files:
        if what == "as it is" and not (scratch / name).exists():
            copy_file(found.source / name, scratch / name)
    config = json.loads((found.source / "config.json").read_text(encoding="utf-8"))
    nested = [config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)]
    for part in nested or [config]:
        part["vocab_size"] = found.rows[1]
    if found.untie:
        for part in (config, *nested):
            part["tie_word_embeddings"] = False
    if "vocab_size" in config:
        config["vocab_size"] = found.rows[1]
    write_json(scratch / "config.json", config)
    path = found.source / "generation_config.json"
    # Without the file, an engine takes these from config.json; with a file that says less, it would not know where replies end.
    own = model.network.generation_config.to_diff_dict()
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else own
    generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or ()), *found.ids})
    write_json(scratch / "generation_config.json", generation)


def write_tokenizer(found: Plan, model: Model, scratch: Path) -> Any:
    """The tokenizer's files with the slot's names as special tokens; loaded again, to see that they are."""
    from transformers import AutoTokenizer

    if not (found.source / "tokenizer.json").is_file():
        model.tokenizer.save_pretrained(scratch)  # from another form of vocabulary
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = scratch / name if (scratch / name).is_file() else found.source / name
        if not path.is_file():
            continue
        fields = json.loads(path.read_text(encoding="utf-8"))
        entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, word in zip(found.ids, found.names, strict=True):
            if name == "tokenizer.json":
                others = [each for each in fields["added_tokens"] if each["id"] != i]
                fields["added_tokens"] = [*others, {"id": i, "content": word, **entry}]
            elif "added_tokens_decoder" in fields:
                fields["added_tokens_decoder"][str(i)] = {"content": word, **entry}
        if name == "tokenizer.json":
            fields["added_tokens"].sort(key=lambda each: each["id"])
        (scratch / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(scratch), trust_remote_code=False)
    for i, word in zip(found.ids, found.names, strict=True):
        if tokenizer.encode(word, add_special_tokens=False) != [i]:
            raise ExportError(f"the tokenizer of {model.name} does not take {word} as the token {i}.")
    return tokenizer


def write_template(source: Path, scratch: Path, template: str) -> None:
    """The edited template, in every file that holds one."""
    config = scratch / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    held = fields.get("chat_template")
    if held is not None:
        write_json(config, {**fields, "chat_template": template})
    if (source / "chat_template.json").is_file():
        write_json(scratch / "chat_template.json", {"chat_template": template})
    processor = source / PROCESSOR
    if processor.is_file() and "chat_template" in (words := json.loads(processor.read_text(encoding="utf-8"))):
        write_json(scratch / PROCESSOR, {**words, "chat_template": template})
    if held is None or (source / "chat_template.jinja").is_file():
        (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
