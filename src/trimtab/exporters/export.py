"""From a token to a checkpoint: plan, write, prove the template, verify, card; all of it beside the target, which appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.config import ExportSettings
from trimtab.errors import ExportError, RunError
from trimtab.exporters.card import write_card
from trimtab.exporters.checkpoint import (
    INDEX,
    STORED,
    Rows,
    copy_file,
    rewrite,
    shards,
    tensors,
    total_bytes,
    write_index,
)
from trimtab.exporters.head import loudest, states, unsaid
from trimtab.exporters.plan import Plan, plan, show
from trimtab.exporters.template import in_place, unsafe, with_slot
from trimtab.exporters.verify import verify
from trimtab.models import Model, load_at
from trimtab.prompts.sources import load_prompts
from trimtab.run import Cost, create, progress, tell, write_json
from trimtab.softtoken.artifact import SoftToken

SAID = 1e-3  # a slot likelier than this, once, is too loud for a tied head
HEARD = 96  # prompts along whose replies the slot's own probability is measured; a third of them are not fitted to


def export(
    model: Model,
    token: SoftToken,
    out: str | Path,
    *,
    untie: bool | None = None,
    force: bool = False,
    check: bool = True,
    run: Path | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face checkpoint in which `token` is a row of the vocabulary and the chat template says it (law 2).

    Args:
        model: the model the token was trained on; its files are read where they are, tensor by tensor.
        untie: write out a tied head as a table of its own. If not given, where the slot would otherwise be said: measured.
        force: replace `out` if it holds something.
        check: verify the result (`verify.py`); needs room for a second model.
        run: folder of the align run, for its figures in the card.

    Returns:
        the plan, how the template was proved, how loud the slot is as an output, and what `verify` found; also in `trimtab.json` there.

    Raises:
        ArtefactError: the token belongs to another model. ExportError: it cannot be exported, or what was written is not the same computation. RunError: no room.
    """
    cost, target = Cost(), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
        raise ExportError(
            f"{target} holds something already.", "Give another folder with -o, or --force to replace it."
        )
    token.check(model)
    loud, rows = _head(model, token)
    found = plan(model, token, untie=loud["tied"] > SAID if untie is None else untie)
    with _beside(target, found.size) as scratch:
        _weights(found, token, scratch, rows)
        _settings(found, scratch)
        tokenizer = _tokenizer(found, model, scratch)
        template, proof = with_slot(model, token, tokenizer, found.names)
        _template(found.source, scratch, template)
        result: dict[str, Any] = {
            "plan": found.record(),
            "template": {
                "position": token.position,
                "conversations_equal": proof.equal,
                "refused_by_both": proof.refused,
            },
            "slot_as_output": loud,
        }
        dtype = STORED[found.tensors[found.embedding].dtype]
        result["verified"] = verify(model, token, scratch, dtype) if check else None
        result["cost"] = cost.record("")
        write_card(scratch, target.name, model, token, result, run)
        write_json(scratch / "trimtab.json", result)
    return result


def export_run(settings: ExportSettings, people: Console) -> dict[str, Any]:
    """`trimtab export`: the token of a run, with the model it names; or with --dry-run the plan alone."""
    identity = SoftToken.load(settings.run).identity()
    model = load_at(settings.model or str(identity.origin.get("path") or identity.model), dtype=identity.dtype)
    token = SoftToken.load(settings.run, model)
    if settings.dry_run:
        # Whether a tied head would be written out is measured; unless told, the plan takes the larger of the two.
        found = plan(model, token, untie=settings.untie is not False)
        show(found, people)
        return found.record()
    result = export(
        model,
        token,
        settings.out,
        untie=settings.untie,
        force=settings.force,
        check=settings.verify,
        run=settings.run,
    )
    checked = result["verified"]
    if checked:
        tell(
            people,
            f"verified by transformers alone: logits differ by {checked['logits_max_difference']:.1e} at most, "
            f"{checked['replies_equal']} of {checked['probes']} greedy replies equal, effect {checked['effect_kl']:.2g} nats",
        )
    tell(people, f"Checkpoint: {settings.out} (its README.md says how to serve it)")
    return result


def _head(model: Model, token: SoftToken) -> tuple[dict[str, float], Any]:
    """How likely the slot is as the next word, at most, in a tied head and with an output row fitted to be silent; and these rows. Measured along the greedy
    replies to prompts that the rows were not fitted to."""
    records = load_prompts("builtin", split="test")[:HEARD]
    prompts = [token.render(model, turns) for record in records if (turns := in_place(model, token, record.chat))]
    if not prompts:
        raise unsafe(model, token, "no conversation has a place for it")
    fitted, held = prompts[: len(prompts) * 2 // 3], prompts[len(prompts) * 2 // 3 :]
    heard = states(model, token, held)
    row = unsaid(states(model, token, fitted))
    rows = row.expand(len(token.vectors), -1)
    return {
        "tied": loudest(model, heard, token.vectors),
        "own_row": loudest(model, heard, rows),
        "places": len(heard),
    }, rows


@contextmanager
def _beside(target: Path, size: int) -> Iterator[Path]:
    """A folder that becomes `target` when all went well, and is gone otherwise.

    Raises:
        RunError: no room for `size` bytes, or the disk is full after all.
    """
    parent = create(target.absolute().parent, "the folder", "Give another folder with -o.")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise RunError(
            f"no room in {parent}: the export takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.",
            "Free some room, or give another folder with -o.",
        )
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        if target.exists():
            target.rename(old / "old")
        scratch.rename(target)
        shutil.rmtree(old)
    except OSError as error:
        raise RunError(
            f"cannot write {target}: {error.strerror or error}", "Free some room and run it again."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _weights(found: Plan, token: SoftToken, scratch: Path, silent: Any) -> None:
    """The weights, shard by shard; the index last."""
    total = found.rows[1]
    vectors = dict(zip(found.ids, token.vectors, strict=True))
    quiet = dict(zip(found.ids, silent, strict=True)) if found.appended else {}
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
    with progress("writing weights", size // 1000) as advance:
        for path in shards(found.source):
            mine = {name: rows for name, rows in changed.items() if found.tensors[name].file == path}
            new = added if path.name == file else {}
            rewrite(path, scratch / path.name, mine, new, lambda done: advance(done // 1000))
    if (found.source / INDEX).is_file():
        # The index as it was is needed to find the shards again.
        copy_file(found.source / INDEX, scratch / INDEX)
        written = total_bytes(list(tensors(scratch).values()))
        write_index(found.source, scratch, dict.fromkeys(added, file), written)


def _settings(found: Plan, scratch: Path) -> None:
    """Files that stay as they are, and the two configs: vocabulary size, tied or not, and that the slot is never generated."""
    for name, what, _ in found.files:
        if what == "as it is" and not (scratch / name).exists():
            copy_file(found.source / name, scratch / name)
    config = json.loads((found.source / "config.json").read_text(encoding="utf-8"))
    for part in (
        config,
        *(config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)),
    ):
        if part.get("vocab_size") == found.rows[0] or (part is config and "text_config" not in config):
            part["vocab_size"] = found.rows[1]
        if found.untie and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(scratch / "config.json", config)
    path = found.source / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or ()), *found.ids})
    write_json(scratch / "generation_config.json", generation)


def _tokenizer(found: Plan, model: Model, scratch: Path) -> Any:
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


def _template(source: Path, scratch: Path, template: str) -> None:
    """The edited template, in every file that holds one."""
    config = scratch / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    held = fields.get("chat_template")
    if held is not None:
        named = (
            [{**each, "template": template} if each["name"] == "default" else each for each in held]
            if isinstance(held, list)
            else template
        )
        write_json(config, {**fields, "chat_template": named})
    if (source / "chat_template.json").is_file():
        write_json(scratch / "chat_template.json", {"chat_template": template})
    if held is None or (source / "chat_template.jinja").is_file():
        (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
