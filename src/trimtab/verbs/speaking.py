"""Verbs that make a model speak: generate, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.errors import ConfigError
from trimtab.verbs.common import finish, only_given
from trimtab.verbs.options import COMMON, GUIDANCE, REPLY, ModelName, with_options


@with_options(REPLY, GUIDANCE, COMMON)
def generate(
    model: ModelName,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='lines {"id", "prompt" | "messages", "prefill"?}')],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.jsonl", help="replies, in the same order")],
    trace: Annotated[
        Path | None, typer.Option(metavar="TRACE.jsonl", help="what the neuron did, a line a token")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="replies generated together [16]")] = None,
    **shared: Any,
) -> None:
    """Reply to every prompt of a file: {"id", "reply", "tokens", "stop"} a line, in input order."""
    given = only_given(locals())
    from trimtab.config import GenerateSettings, settle
    from trimtab.decoding.generate import generate as run
    from trimtab.decoding.generate import traces
    from trimtab.guidance import load_guided
    from trimtab.prompts.sources import read_chats
    from trimtab.run import console, create, progress, screen, tell, write_jsonl

    settings = settle(GenerateSettings, given, shared["config"])
    _require_neuron(settings)
    chats, broken = read_chats(settings.source)
    for file in filter(None, (settings.out, settings.trace)):
        create(file.parent)
    loaded, guidance = load_guided(settings)
    with progress("replies", len(chats)) as advance:
        replies = run(
            loaded,
            [chat.messages for chat in chats],
            **guidance,
            prefills=[chat.prefill for chat in chats],
            streams=[chat.line for chat in chats],  # mending one line draws no other anew
            **settings.sampling(),
            batch_size=settings.batch,
            progress=advance,
        )
    lines = {
        chat.line: {
            **{"id": chat.id, "reply": reply.text, "tokens": len(reply.ids), "stop": reply.stop},
            **({"error": reply.error} if reply.error else {}),
        }
        for chat, reply in zip(chats, replies, strict=True)
    }
    lines |= {n: {"id": f"line-{n}", "reply": "", "tokens": 0, "stop": "error", "error": e} for n, e in broken.items()}
    write_jsonl(settings.out, [lines[n] for n in sorted(lines)])
    if settings.trace:
        write_jsonl(settings.trace, traces(loaded, [chat.id for chat in chats], replies))
    failed = [line["error"] for line in lines.values() if "error" in line]
    for error in failed:
        console.print(f"left out: {error}", markup=False)
    unrated = sum(bool(r.rating and not r.rating.parsed and not r.error) for r in replies)
    if unrated:
        console.print(
            f"{unrated} of {len(chats)} requests could not be rated; the expert was at its strongest for them"
        )
    tell(screen(shared["as_json"]), f"{len(lines) - len(failed)} replies: {settings.out}")
    finish(shared["as_json"], {"out": str(settings.out), "n": len(lines), "failed": len(failed), "unrated": unrated})
    if failed:
        raise typer.Exit(1)


@with_options(REPLY, GUIDANCE, COMMON)
def chat(
    model: ModelName,
    trace: Annotated[
        bool | None, typer.Option("--trace", help="colour what the expert chose, draw the membrane")
    ] = None,
    **shared: Any,
) -> None:
    """Talk to a model, guided or not; an empty line ends it."""
    given = only_given(locals())
    from trimtab.config import ChatSettings, settle
    from trimtab.guidance import load_guided
    from trimtab.run import console, screen
    from trimtab.terminal import converse

    settings = settle(ChatSettings, given, shared["config"])
    _require_neuron(settings)
    loaded, guidance = load_guided(settings)
    console.print("an empty line ends the conversation")
    turns = converse(loaded, guidance, settings.sampling(), settings.trace, screen(shared["as_json"]))
    finish(shared["as_json"], {"messages": turns})


def _require_neuron(settings: Any) -> None:
    if settings.trace and (not settings.expert or settings.neuron == "never"):
        raise ConfigError("--trace shows what a neuron did, and here is none.", "Add --expert.")
