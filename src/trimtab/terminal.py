"""A conversation in the terminal, with the neuron in view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from trimtab.decoding.engine import Row
from trimtab.decoding.generate import Reply, generate
from trimtab.models import Model
from trimtab.neuron.neuron import Step

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 72  # tokens of a membrane in one line


def converse(
    model: Model,
    guidance: dict[str, Any],
    options: dict[str, Any],
    trace: bool,
    console: Console,
    *,
    ask: Callable[[str], str] | None = None,
) -> list[dict[str, str]]:
    """Ask, reply, ask again, until an empty line, the end of input, or Ctrl-C; the conversation is returned.

    Args:
        guidance: `token` or `guide` for `generate`. options: its other arguments.
        trace: colour the tokens that the expert chose, and draw the membrane below each reply. console: where replies go. ask: for the user's words.
    """
    ask = ask or console.input  # not `input`, whose prompt would always go to stdout
    turns: list[dict[str, str]] = []
    while True:
        try:
            words = ask("> ").strip()
            if not words:
                return turns
            turns.append({"role": "user", "content": words})
            printer = _Printer(model, console, colour=trace)
            (reply,) = generate(model, [turns], **guidance, **options, stream=printer)
        except (EOFError, KeyboardInterrupt):
            return turns
        printer.end(reply)
        if trace and reply.trace:
            _draw(reply, console)
        if reply.error:
            turns.pop()  # what could not be replied to would be in the way of every later turn
        else:
            turns.append({"role": "assistant", "content": reply.text})


class _Printer:
    """Prints a reply while it grows; a character cut between two tokens waits for its end."""

    def __init__(self, model: Model, console: Console, *, colour: bool) -> None:
        self.model, self.console, self.colour = model, console, colour
        self.shown = 0

    def __call__(self, row: Row) -> None:
        text = self.model.tokenizer.decode(row.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            expert = self.colour and bool(row.trace) and row.trace[-1].guided
            self._print(text, "bold green" if expert else "")

    def end(self, reply: Reply) -> None:
        self._print(reply.text, "")
        if reply.error:
            self.console.print(Text(reply.error, style="red"), end="")
        self.console.print()

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text[self.shown :], style=style), end="", soft_wrap=True)
        self.shown = max(self.shown, len(text))


def sparkline(values: Sequence[float], top: float) -> str:
    """One bar a value, the highest at `top`; the lowest for what is no number, which `max` passes over only in this order."""
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * max(0, v) / top))] for v in values)


def _draw(reply: Reply, console: Console) -> None:
    """The membrane before each reset, spikes in green, with what it comes to."""
    steps: Sequence[Step] = reply.trace
    top = max(1.0, *(step.potential for step in steps)) * 1.001
    for start in range(0, len(steps), WIDTH):
        line = Text("  ")
        for step in steps[start : start + WIDTH]:
            line.append(sparkline([step.potential], top), style="green" if step.spike else "dim")
        console.print(line)
    spikes, guided = sum(s.spike for s in steps), sum(s.guided for s in steps)
    risk = f"risk {reply.rating.risk:.1f}{'' if reply.rating.parsed else ' (not readable)'}, " if reply.rating else ""
    console.print(
        f"  {risk}alpha {reply.alpha:g}; {spikes} spikes in {len(steps)} tokens, {guided} chosen by the expert",
        style="dim",
    )
