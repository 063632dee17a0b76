"""Verbs that bring a token to other engines, and see that they heed it: export, serve-check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.verbs.common import finish, only_given
from trimtab.verbs.options import Json


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="folder of an align run, or of a PEFT adapter (with --model)")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="folder of the checkpoint")],
    format: Annotated[
        str | None,
        typer.Option(
            help="hf: a Hugging Face checkpoint; gguf: the model's own GGUF file with a row more; peft: an adapter, prompt tuning for tokens at the start and trainable tokens elsewhere [hf]"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the model it was trained on, if it has moved since")] = None,
    untie: Annotated[
        bool | None,
        typer.Option("--untie/--keep-tied", help="a tied head as a table of its own [where the slot would be said]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export in DIR")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="compare the result with the token on its model; not asked for, a model that memory cannot hold is exported without loading it"
        ),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with the same settings as these options")] = None,
    as_json: Json = False,
) -> None:
    """Write the model with the token in it, for engines that know nothing of trimtab; verified."""
    given = only_given(locals())
    from trimtab.config import ExportSettings, settle
    from trimtab.exporters.export import export_run
    from trimtab.run import console, screen

    settings = settle(ExportSettings, given, config)
    try:
        finish(as_json, export_run(settings, screen(as_json)))
    except KeyboardInterrupt:
        console.print(f"interrupted; {settings.out} is as it was")
        raise


def serve_check(
    endpoint: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="of an OpenAI-compatible endpoint; URL#MODEL where it serves several models"
        ),
    ],
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="the token: folder of an align run")] = None,
    export: Annotated[Path | None, typer.Option(metavar="DIR", help="or the export that is served, hf or gguf")] = None,
    model: Annotated[str | None, typer.Option(help="the run's model, if it has moved since")] = None,
    as_json: Json = False,
) -> None:
    """Probe a running endpoint: is the slot in its prompts, once, and is the token in effect? Exit 1 unless it is seen to be."""
    from trimtab.run import screen
    from trimtab.serving.check import serve_check as check
    from trimtab.serving.check import show

    found = check(endpoint, run=run, export=export, model=model)
    show(found, screen(as_json))
    finish(as_json, found)
    if not found["in_effect"]:
        raise typer.Exit(1)
