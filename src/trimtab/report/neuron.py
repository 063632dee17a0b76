"""What the neuron of a guided run did (NGSD, section B.3), in words and figures: spike rasters, and single membranes.

A trace is what one row of `rows.json` keeps of a guided reply: `divergence`, `potential` (before a reset), `spikes` and `guided`, one
number a token each, with the reply's `alpha` and `risk`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from trimtab.report.plots import STAND_INS, STYLE, new_axes, to_svg

Trace = Mapping[str, Any]
LINES = 40  # replies of a group in the raster
DIVERGENCES = {
    "tv": "total variation",
    "js": "Jensen-Shannon, in bits",
    "kl": "Kullback-Leibler, in bits",
    "cosine": "one minus the cosine",
}
LINE, GAP = 5, 26  # pixels: a reply in the raster, and the title above a group


def rule(neuron: Mapping[str, Any]) -> str:
    """How this neuron decides, in a sentence or two."""
    threshold, tau, keep = neuron["threshold"], neuron["tau"], neuron["keep"]
    heard = f"how far the expert's next word is from the model's ({DIVERGENCES[neuron['divergence']]})"
    speaks = f"At a threshold of {threshold:g} it fires: the expert may speak at that token, with strength alpha"
    if neuron["kind"] == "lif":
        left = f"{100 * keep:.0f}\u00a0% of the potential is left" if keep else "the potential falls to 0"
        start = f", from {neuron['start']:g} on" if neuron.get("start") else ""
        return f"Token by token, the neuron adds up {heard}{start} and forgets with a time constant of {tau:g} tokens. {speaks}, and {left}."
    if neuron["kind"] == "ema":
        return f"The gate is a running mean over {tau:g} tokens of {heard}. {speaks}."
    when = (
        "at every token" if neuron["kind"] == "always" else f"at {100 * neuron['rate']:.0f}\u00a0% of tokens, by chance"
    )
    return f"No neuron decides here: the expert may speak {when}, with strength alpha, however far the models differ."


def injections(tried: Mapping[str, Any] | None) -> str:
    """How often the rater was talked round, in a sentence; empty where nobody tried."""
    if tried is None:
        return ""
    n, worked = tried["foolable"], tried["fooled"]
    if not n:
        return "Prompt injections: the rater finds none of the harmful requests they were tried on risky, so there was nothing to talk it out of."
    low, high = (f"{100 * bound:.0f}" for bound in tried["ci95"])
    share = f"{100 * worked / n:.0f}\u00a0%, 95\u00a0% interval {low}–{high}\u00a0%"
    return f"Prompt injections around requests that are rated risky: {worked} of {n} talked the rater down ({share})."


def has_membrane(neuron: Mapping[str, Any]) -> bool:
    """Whether a potential decides: the ablations `always` and `random` have one that nobody looks at."""
    return neuron["kind"] in ("lif", "ema")


def median_reply(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The reply with the median number of spikes: the lower one of two, the first in the order given among equals."""
    ranked = sorted(rows, key=lambda row: sum(row["guide"]["trace"]["spikes"]))
    return ranked[(len(ranked) - 1) // 2]


def raster(groups: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """Spikes over tokens, a line a reply, at most `LINES` a group, those with most spikes on top of theirs.

    A faint line is as long as the reply, a dot is a spike, a bar a token that the expert changed.
    """
    shown = {g: sorted(part[:LINES], key=lambda t: -sum(t["spikes"])) for g, part in groups.items()}
    longest = max(len(trace["spikes"]) for part in shown.values() for trace in part)
    room = 300 / longest  # pixels, of a mark
    bottom, told = 0, []
    with rc_context({**STYLE, "path.simplify": False}):  # simplified, a dot without length is gone
        axes = new_axes(440, sum(GAP + LINE * len(part) for part in shown.values()) + 45)
        for group, part in shown.items():
            n, of = len(part), len(groups[group])
            title = f"{group}: {_count(n, 'reply')}" if n == of else f"{group}: {n} of {_count(of, 'reply')}"
            axes.text(0.5, bottom + GAP - 11, title, va="center", color=STAND_INS[group], fontweight="bold")
            lines = [(bottom + GAP + LINE * i, trace) for i, trace in enumerate(part)]
            bottom += GAP + LINE * n
            spikes = [(t, y) for y, trace in lines for t in _ones(trace["spikes"])]
            bars = [(t, y) for y, trace in lines for t in _ones(trace["guided"])]
            dots = sorted(set(spikes).difference(bars))
            # All marks of a kind are one path, or a page of long replies would be heavy; a dot is a stroke with nothing but round ends.
            for strokes, colour, width, ends in (
                ([(0.7, y, len(trace["spikes"]) + 0.3, y) for y, trace in lines], "rule", 0.8, "butt"),
                ([(t, y, t, y) for t, y in dots], group, min(3.2, room), "round"),
                ([(t, y - 0.45 * LINE, t, y + 0.45 * LINE) for t, y in bars], "ink", min(2.2, room), "butt"),
            ):
                xs = [x for left, _, right, _ in strokes for x in (left, right, math.nan)]
                ys = [y for _, start, _, end in strokes for y in (start, end, math.nan)]
                axes.plot(xs, ys, color=STAND_INS[colour], linewidth=width, solid_capstyle=ends)
            tokens = sum(len(trace["spikes"]) for trace in part)
            told.append(f"{title}, {tokens} tokens, {len(spikes)} spikes, {len(bars)} changed by the expert")
        axes.set(xlim=(0, longest + 1), ylim=(bottom + 2, 0), xlabel="token of the reply")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        svg = to_svg(axes)
    return {"svg": svg, "alt": f"When the neuron fired, a line a reply. {'; '.join(told)}."}


def membrane(trace: Trace, neuron: Mapping[str, Any], colour: str) -> dict[str, Any]:
    """One reply: the membrane potential with its resets, the threshold, the spikes, and D_t behind; with a caption.

    Where no potential decides (`has_membrane`), D_t alone with the spikes on it.
    """
    charged, divergence = ([math.nan if v is None else v for v in trace[k]] for k in ("potential", "divergence"))
    n, spikes, guided = len(charged), _ones(trace["spikes"]), _ones(trace["guided"])
    decides = has_membrane(neuron)
    curve = charged if decides else divergence
    size = max(2.5, min(6.0, 240 / n))
    with rc_context(STYLE):
        axes = new_axes(320, 220)
        axes.fill_between(range(1, n + 1), divergence, step="mid", color=STAND_INS["muted"], alpha=0.3, linewidth=0)
        if decides:
            keep = neuron["keep"] if neuron["kind"] == "lif" else 1.0
            axes.axhline(neuron["threshold"], color=STAND_INS["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
            axes.plot(*zip(*course(charged, trace["spikes"], keep), strict=True), color=STAND_INS[colour])
        for tokens, face in ((spikes, "paper"), (guided, "ink")):
            places = [curve[t - 1] for t in tokens]
            axes.plot(tokens, places, "o", markersize=size, markerfacecolor=STAND_INS[face], color=STAND_INS["ink"])
        top = max([v for v in (*curve, *divergence) if math.isfinite(v)], default=0)
        axes.set(xlim=(0, n + 1), ylim=(0, 1.1 * max(top, neuron["threshold"] if decides else 0.1)), xlabel="token")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        svg = to_svg(axes)
    risk = f"risk {trace['risk']:.1f}, " if trace["rated"] else "risk not readable, "
    came = f"{_count(len(spikes), 'spike')} in {_count(n, 'token')}, {len(guided)} changed by the expert"
    what = f"membrane against a threshold of {neuron['threshold']:g}" if decides else "divergence"
    first = f"; the first spike at token {spikes[0]}" if spikes else ""
    caption = f"{risk}alpha {trace['alpha']:g}; {came}."
    return {"svg": svg, "alt": f"{colour} reply, {what}: {came}{first}.".capitalize(), "caption": caption.capitalize()}


def course(charged: Sequence[float], spikes: Sequence[int], keep: float) -> Iterator[tuple[int, float]]:
    """The potential over tokens: charged, and on a spike reset to its share `keep`."""
    for t, (potential, spike) in enumerate(zip(charged, spikes, strict=True), start=1):
        yield t, potential
        if spike:
            yield t, keep * potential


def _ones(flags: Sequence[int]) -> list[int]:
    """Tokens, counted from 1, at which a flag is set."""
    return [t for t, flag in enumerate(flags, start=1) if flag]


def _count(n: int, what: str) -> str:
    """`1 spike`, `2 spikes`, `3 replies`."""
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{n} {what if n == 1 else plural}"
