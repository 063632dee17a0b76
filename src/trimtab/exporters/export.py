"""From a token to a checkpoint: plan, write, prove the template, verify, card; all of it beside the target, which appears whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from trimtab.adapter import CONFIG, WEIGHTS, is_adapter
from trimtab.config import ExportSettings
from trimtab.errors import ConfigError, ExportError, RoomError, RunError
from trimtab.exporters import gguf
from trimtab.exporters.card import write_card
from trimtab.exporters.checkpoint import STORED
from trimtab.exporters.head import loudest, states, unsaid
from trimtab.exporters.huggingface import write_settings, write_template, write_tokenizer, write_weights
from trimtab.exporters.ollama import modelfile
from trimtab.exporters.outline import is_outline, outline
from trimtab.exporters.peft import write_prompt, write_rows
from trimtab.exporters.plan import MODELFILE, NEW, RECORD, Format, Plan, folder_of, gguf_file, plan, show, show_files
from trimtab.exporters.template import Proof, in_place, unsafe, with_slot
from trimtab.exporters.verify import in_words, verify, verify_adapter, verify_rows, verify_tokens
from trimtab.machine import describe_machine, require_room
from trimtab.models import Model, load_at, size_of
from trimtab.prompts.records import stratified
from trimtab.prompts.sources import load_prompts
from trimtab.run import Cost, alone, console, create, progress, tell, write_json
from trimtab.softtoken.artifact import SoftToken

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EFBIG}
SAID = 1e-3  # a slot likelier than this, once, is too loud for a tied head
PEFT_FORMS = {
    "prompt tuning": "the token stands before everything else, the one place that form knows",
    "trainable tokens": "a row of the vocabulary, which the chat template in the folder says in its place; any place but the start",
}
UNLOADED = (
    "So it is not loaded: its fingerprint was checked on the files, and nothing can be measured or verified. Unless told otherwise a tied head is written out by "
    "itself; a new output row is zero, which in SmolLM2 made the slot 2.7 % likely at worst, at temperature 1."
)
HEARD = (
    24  # prompts of all groups along whose replies the slot's own probability is measured; every third is not fitted to
)


def export(
    model: Model,
    token: SoftToken,
    out: str | Path,
    *,
    format: Format = "hf",
    untie: bool | None = None,
    force: bool = False,
    check: bool = True,
    run: Path | None = None,
) -> dict[str, Any]:
    """Write the model with `token` as a row of its vocabulary and a chat template that says it (law 2), for engines that know nothing of trimtab.

    Args:
        model: the model the token was trained on; its files are read where they are, tensor by tensor.
        format: `hf`, a Hugging Face checkpoint; `gguf`, the model's own GGUF file with a row more; `peft`, an adapter: prompt tuning for tokens at the start, trainable tokens elsewhere.
        untie: write out a tied head as a table of its own. If not given, where the slot would otherwise be said: measured.
        force: replace an earlier export in `out`.
        check: verify the result (`verify.py`); needs room for a second model, and not an outline (`outline.py`).
        run: folder of the align run, for its figures in the card.

    Returns:
        the plan, how the template was proved, how loud the slot is as an output, and what `verify` found; also in `trimtab.json` there.

    Raises:
        ArtefactError: the token belongs to another model. ExportError: it cannot be exported, or what was written is not the same computation. RoomError: memory does not hold
            the model twice. RunError: no room on the disk.
    """
    cost, target = Cost(), Path(out).resolve()
    _require_free(target, force, [path for path in (run, folder_of(model) if format != "peft" else None) if path])
    token.check(model)
    if check and format != "gguf":
        mend = "Verifying reads the export beside the model; --no-verify leaves it out."
        require_room(size_of(model.network), model.dtype, str(model.device), mend)
    if format == "peft" and token.position == "start":
        with _beside(target, 2 * token.vectors.numel() * 4, force) as scratch:
            write_prompt(scratch, model, token)
            verified = verify_adapter(model, token, scratch) if check else None
            result: dict[str, Any] = {
                "format": format,
                "verified": verified,
                "cost": cost.record(describe_machine(model.device)),
            }
            write_card(scratch, target.name, model, token, result, run)
            write_json(scratch / RECORD, result)
        return result
    # Where nothing can be computed, a tied head is written out, and a new row of it is zero.
    nothing = torch.zeros(0, model.hidden_size)
    heard, unfitted, silent = (
        (nothing, nothing, torch.zeros_like(token.vectors)) if is_outline(model) else _head(model, token)
    )
    tied = loudest(model, heard, token.vectors) if len(heard) else None
    loud = tied is None or tied > SAID
    found = plan(model, token, format=format, untie=(loud if untie is None else untie) and format != "peft")
    if format == "gguf" and not gguf.holds_silence(gguf_file(model)):
        silent = torch.zeros_like(silent)
    # Rows that the model's own head has already stay as they are there; where PEFT loads, transformers makes the row, and it is suppressed.
    grown = found.appended and format != "peft" and (found.untie or not found.tied)
    own = loudest(model, unfitted, silent) if grown and len(unfitted) else None
    if own is not None and own > SAID:
        console.print(f"the slot may be generated: its own output row reaches a probability of {own:.2g}")
    write = {"hf": _checkpoint, "gguf": _gguf, "peft": _adapter}[format]
    with _beside(target, found.size, force) as scratch:
        proof, verified = write(found, model, token, scratch, silent, check)
        result = {
            "format": format,
            "plan": found.record(),
            "template": {
                "position": token.position,
                "template_args": token.template_args,
                "conversations_equal": proof.equal,
                "refused_by_both": proof.refused,
            },
            "slot_as_output": {
                "tied": tied if found.tied else None,
                "own_row": own,
                "places": len(heard),
                "places_unfitted": len(unfitted),
            },
            "verified": verified,
            "cost": cost.record(describe_machine(model.device)),
        }
        write_card(scratch, target.name, model, token, result, run)
        write_json(scratch / RECORD, result)
    return result


def _checkpoint(
    found: Plan, model: Model, token: SoftToken, scratch: Path, silent: Tensor, check: bool
) -> tuple[Proof, dict[str, Any] | None]:
    """A Hugging Face checkpoint."""
    write_weights(found, token, scratch, silent)
    write_settings(found, model, scratch)
    tokenizer = write_tokenizer(found, model, scratch)
    template, proof = with_slot(model, token, tokenizer, found.names)
    write_template(found.source, scratch, template)
    dtype = STORED[found.tensors[found.embedding].dtype]
    return proof, verify(model, token, scratch, dtype) if check else None


def _gguf(
    found: Plan, model: Model, token: SoftToken, scratch: Path, silent: Tensor, check: bool
) -> tuple[Proof, dict[str, Any] | None]:
    """The model's own GGUF file with one row more."""
    source = gguf_file(model)
    with tempfile.TemporaryDirectory() as folder:  # the tokenizer only proves the template
        template, proof = with_slot(model, token, write_tokenizer(found, model, Path(folder)), found.names)
    target = scratch / found.files[0][0]
    vectors = dict(zip(found.ids, token.vectors, strict=True))
    quiet = found.behind(silent)
    with progress("writing tensors", found.size // 1000) as advance:
        kind = gguf.patch(
            source,
            target,
            vectors,
            found.names,
            template=template,
            at_start=token.position == "start",
            silent=quiet,
            untie=found.untie,
            advance=lambda size: advance(size // 1000),
        )
    words = modelfile(model, token, found)
    (scratch / MODELFILE).write_text(words, encoding="utf-8")
    verified = verify_rows(model, token, source, target, kind, found, template) if check else None
    gguf.opened.cache_clear()  # or the file stays mapped
    return proof, verified


def _adapter(
    found: Plan, model: Model, token: SoftToken, scratch: Path, silent: Tensor, check: bool
) -> tuple[Proof, dict[str, Any] | None]:
    """Trainable tokens for PEFT, with tokenizer and template."""
    write_rows(scratch, model, token, found)
    tokenizer = write_tokenizer(found, model, scratch)
    template, proof = with_slot(model, token, tokenizer, found.names)
    write_template(found.source, scratch, template)
    return proof, verify_tokens(model, token, scratch, found) if check else None


def export_run(settings: ExportSettings, people: Console) -> dict[str, Any]:
    """`trimtab export`: the token of a run, with the model it names; or with --dry-run the plan alone."""
    if settings.format == "peft" and settings.untie is not None:
        raise ConfigError(
            "--untie is about a head, which an adapter does not hold.", "Leave it out, or use --format hf."
        )
    model, why = _model(settings)
    # That the token is heard is part of verifying.
    checked = settings.verify and not settings.dry_run and not is_adapter(settings.run)
    token = SoftToken.load(settings.run, None if why or checked else model)
    token.check(model)
    if why:
        tell(people, f"{why} {UNLOADED}")
    if settings.format == "peft":
        form = "prompt tuning" if token.position == "start" else "trainable tokens"
        tell(people, f"{form}: {PEFT_FORMS[form]} (trained at {token.position})")
    if settings.dry_run and settings.format == "peft" and token.position == "start":
        written = {CONFIG: 0, WEIGHTS: token.vectors.numel() * 4, **dict.fromkeys(NEW, 0)}
        show_files([(name, "new", size) for name, size in written.items()], people, f"export of {settings.run}")
        tell(people, "the model's files stay as they are")
        return {
            "format": "peft",
            "form": "prompt tuning",
            "numbers": token.vectors.numel(),
            "files": [{"file": name, "what": "new", "bytes": size} for name, size in written.items()],
        }
    if settings.dry_run:
        # Whether a tied head would be written out is measured; unless told, the plan takes the larger of the two.
        found = plan(model, token, format=settings.format, untie=settings.untie is not False)
        show(found, people, measured=settings.untie is not None or settings.format == "peft")
        return found.record()
    result = export(
        model,
        token,
        settings.out,
        format=settings.format,
        untie=settings.untie,
        force=settings.force,
        check=settings.verify and not why,
        run=settings.run,
    )
    if words := (result.get("plan") or {}).get("unpacked"):
        tell(people, words)
    if result["verified"]:
        tell(people, "verified: " + in_words(result["verified"]))
    tell(people, f"Exported: {settings.out} (its README.md says how to serve it)")
    return result


def _model(settings: ExportSettings) -> tuple[Model, str]:
    """The model of a run's token; where memory cannot hold it, its outline, and why.

    Raises:
        RoomError: memory cannot hold it, and the export is to be verified.
    """
    if is_adapter(settings.run):
        if settings.model is None:
            raise ExportError(
                f"{settings.run} is a PEFT adapter, which does not know its model.", "Say which: --model."
            )
        return load_at(settings.model), ""
    identity = SoftToken.load(settings.run).identity()
    home = settings.model or identity.home
    try:
        return load_at(home, dtype=identity.dtype), ""
    except RoomError as error:
        why = str(error.args[0])
        if (settings.verify and not settings.dry_run) or settings.format == "peft":
            mend = "--no-verify exports a safetensors checkpoint (--format hf) without loading it."
            raise RoomError(why, mend) from None
        return outline(home, identity.dtype), why


def _head(model: Model, token: SoftToken) -> tuple[Tensor, Tensor, Tensor]:
    """What the head reads along the greedy replies to some prompts `[n, hidden]`; that part of it which belongs to every third of them `[m, hidden]`; and output rows `[n_tokens, hidden]` that are
    silent along the replies to the others, to be measured on that part."""
    records = stratified(load_prompts("builtin", split="test"), HEARD)
    prompts = [token.render(model, turns) for record in records if (turns := in_place(model, token, record.chat))]
    if not prompts:
        raise unsafe(model, token, "no conversation has a place for it")
    heard = states(model, token, prompts)
    fitted = [one for i, one in enumerate(heard) if i % 3 != 2 or len(heard) < 3]
    return torch.cat(heard), torch.cat(heard[2::3] or heard), unsaid(torch.cat(fitted)).expand(len(token.vectors), -1)


def _require_free(target: Path, force: bool, keep: Sequence[Path]) -> None:
    """Refuse a target that holds something, unless it is an earlier export and `force` says to replace it; never one that holds what is read here.

    Raises:
        ExportError: that would be lost.
    """
    if any(path.resolve().is_relative_to(target) for path in (*keep, Path.cwd())):
        raise ExportError(
            f"{target} holds the run, the model or the working folder itself.", "Give another folder with -o."
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / RECORD).is_file():
        raise ExportError(f"{target} holds something that is no export.", "Give another folder with -o.")
    if not force:
        raise ExportError(
            f"{target} holds an export already.", "Give another folder with -o, or --force to replace it."
        )


@contextmanager
def _beside(target: Path, size: int, force: bool) -> Iterator[Path]:
    """A folder that becomes `target` when all went well, and is gone otherwise; what a killed export left there goes first.

    Raises:
        RunError: no room for `size` bytes, the disk is full after all, or another process exports to `target`. ExportError: `target` was filled meanwhile.
    """
    parent = create(target.parent, "the folder", "Give another folder with -o.")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise RunError(
            f"no room in {parent}: the export takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.",
            "Free some room, or give another folder with -o.",
        )
    scratch = parent / f".{target.name}.partial"
    new, old = scratch / "new", scratch / "old"
    scratch.mkdir(exist_ok=True)
    with alone(scratch):
        try:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not target.exists():  # killed between two renames
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            new.mkdir()
            yield new
            _require_free(target, force, [])
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise RunError(
                f"cannot write {target}: {error.strerror}", "Free some room, or give another folder with -o."
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
