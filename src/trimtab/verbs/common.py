"""What several verbs do in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from trimtab.errors import ConfigError


def only_given(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, of a verb's arguments: `None` means "not given"; the rest is not a setting."""
    given = {**arguments, **arguments.get("shared", {})}
    return {
        k: v for k, v in given.items() if v is not None and k not in ("config", "as_json", "shared", "fail_on_harm")
    }


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Work in a run folder alone, and say on Ctrl-C that nothing is lost.

    Raises:
        RunError: the folder cannot be written to, or another process is at work in it.
    """
    from trimtab.run import alone, console, create

    try:
        with alone(create(folder)):
            yield
    except KeyboardInterrupt:
        console.print(f"interrupted; run the same command again to go on ({folder} is kept)")
        raise


def require_check(check: int, fail_on_harm: bool) -> None:
    if fail_on_harm and not check:
        raise ConfigError(
            "--fail-on-harm looks at the held-out check, and --check 0 leaves it out.", "Give it prompts."
        )


def exit_on_harm(result: dict[str, Any], asked: bool) -> None:
    if asked and (not result.get("paired") or result["externality"]["harms"]):
        raise typer.Exit(1)


def finish(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, default=str))
