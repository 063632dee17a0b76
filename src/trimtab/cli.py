"""The command line: the verbs in their order, and how each of them ends. Progress goes to stderr, results to stdout; with `--json` stdout ends with one
JSON object, and what is for people goes to stderr.

Exit codes: 0 done, 1 failed, 2 unusable arguments, 130 interrupted. Nothing heavy is imported before a verb runs, so `--help` is
quick.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from trimtab.errors import TrimtabError, UsageError
from trimtab.verbs import doctor, measuring, shipping, speaking, training

# What typer raises for arguments that it cannot read; the class has no public name.
ParseError: Any = typer.BadParameter.__base__

# As `--help` lists them.
VERBS: dict[str, Callable[..., None]] = {
    "demo": training.demo,
    "align": training.align,
    "eval": measuring.evaluate,
    "generate": speaking.generate,
    "chat": speaking.chat,
    "expert": training.expert,
    "export": shipping.export,
    "serve-check": shipping.serve_check,
    "report": measuring.report,
    "doctor": doctor.doctor,
}

app = typer.Typer(
    help="Refine the safety behaviour of a language model with one token, and prove what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, verb in VERBS.items():
    app.command(name)(verb)


def main() -> None:
    """Run a verb; a user's mistake is told without a traceback."""
    failure = None
    try:
        code = app(standalone_mode=False) or 0  # of typer.Exit
        if code == 130:
            failure = {"error": "interrupted", "kind": "KeyboardInterrupt"}
    except TrimtabError as error:
        typer.echo(f"error: {error}", err=True)
        code, failure = error.exit_code, {"error": str(error), "kind": type(error).__name__}
    except ParseError as error:
        error.show()
        code, failure = error.exit_code, {"error": error.format_message(), "kind": UsageError.__name__}
    except typer.Abort:
        code, failure = 1, {"error": "input ended", "kind": "Abort"}
    except Exception as error:  # a defect of ours, or of the machine: the traceback helps
        traceback.print_exc()
        code, failure = 1, {"error": str(error), "kind": type(error).__name__}
    if failure and "--json" in sys.argv:
        typer.echo(json.dumps(failure))
    sys.exit(code)
