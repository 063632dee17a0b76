"""Figures: which rates they show, and inline SVG that belongs to the page, with its fonts and colours, light or dark.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables. Text stays text. One unit of a
figure is one CSS pixel, and figures are narrow, so that they are still readable on a phone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trimtab.evaluation.metrics import wilson
from trimtab.run import digest

Arm = Mapping[str, Any] | None  # results of one arm: the untouched model, or the model with what was trained for it
GROUPS = ("harmful", "borderline", "plain")
# The page's colour variables, and the order in which (suite, group) pairs take theirs.
VARIABLES = ("ink", "muted", "rule", "paper", "before", "good", "harmful", "borderline", "plain", "c4", "c5", "c6")
PAIR_COLOURS = ("borderline", "plain", "harmful", "c4", "c5", "c6")
STAND_INS = {name: f"#fe01{i:02x}" for i, name in enumerate(VARIABLES)}
FONT = "DejaVu Sans"  # matplotlib measures with it; the page then uses its own
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": [FONT],
    "font.size": 12,
    "text.parse_math": False,
    "text.color": STAND_INS["ink"],
    "axes.labelcolor": STAND_INS["muted"],
    "axes.edgecolor": STAND_INS["rule"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": STAND_INS["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": STAND_INS["rule"],
    "ytick.color": STAND_INS["rule"],
    "xtick.labelcolor": STAND_INS["muted"],
    "ytick.labelcolor": STAND_INS["muted"],
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


class Rate(NamedTuple):
    """A refusal rate as counts: `hits` of `n` scored rows; `unscored` rows had no verdict."""

    hits: int
    n: int
    unscored: int = 0

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson."""
        return wilson(self.hits, self.n)


class Point(NamedTuple):
    """A model on the plane: how often it refuses benign and harmful requests."""

    benign: Rate
    harmful: Rate


class Move(NamedTuple):
    """One pair of groups under one run: from the untouched model to the guided one, either of which may be missing."""

    label: str
    colour: str
    mark: str
    before: Point | None
    after: Point | None


def rate(arm: Arm, suite: str, *path: str) -> Rate | None:
    """The rate at `path` below a suite of an arm; `None` where it was not measured."""
    found: Any = arm and arm["suites"].get(suite)
    for key in path:
        found = found and found.get(key)
    return Rate(round((found["refusal_rate"] or 0) * found["n"]), found["n"], found["unscored"]) if found else None


def group_rate(arm: Arm, suite: str, group: str, judge: str) -> Rate | None:
    path = ("harmful", judge) if group == "harmful" else ("benign", "groups", group, judge)
    return rate(arm, suite, *path)


def pooled(arm: Arm, group: str, judge: str) -> Rate | None:
    """Refusal of one group over all suites of an arm."""
    rates = [found for suite in suites(arm) if (found := group_rate(arm, suite, group, judge))]
    hits, n, unscored = (sum(counts) for counts in zip(*rates, strict=True)) if rates else (0, 0, 0)
    return Rate(hits, n, unscored) if n else None


def suites(arm: Arm) -> Mapping[str, Any]:
    """The suites of an arm, those under attack and those of right answers left out unless there are no others: figures and headlines are of requests as people make them."""
    found: Mapping[str, Any] = arm["suites"] if arm else {}
    return {name: part for name, part in found.items() if not part.get("attack") and not part.get("tests")} or found


def moves(before: Arm, after: Arm, judge: str, mark: str, palette: dict[str, str]) -> Iterator[Move]:
    """Every benign group of every suite against the harmful requests of its suite, or of all suites where it has none.

    `palette` remembers the colours of pairs, so that several runs agree.
    """
    measured = after or before
    for suite, group in ((s, g) for s in suites(measured) for g in GROUPS[1:] if group_rate(measured, s, g, judge)):
        own = rate(measured, suite, "harmful", judge) is not None
        points: list[Point | None] = []
        for arm in (before, after):
            benign = group_rate(arm, suite, group, judge)
            harmful = rate(arm, suite, "harmful", judge) if own else pooled(arm, "harmful", judge)
            points.append(Point(benign, harmful) if benign and harmful and benign.n and harmful.n else None)
        label = f"{'' if own else 'all '}harmful against {group}"
        label = f"{suite}: {label}" if len(suites(measured)) > 1 else label
        free = [colour for colour in (group, *PAIR_COLOURS) if colour not in palette.values()]
        if any(points):
            yield Move(label, palette.setdefault(label, free[0] if free else "muted"), mark, *points)


def categories(before: Arm, after: Arm, judge: str) -> Iterator[dict[str, Any]]:
    """Bars per category for harmful and benign requests of every suite that has more than one."""
    measured = after or before
    for suite, part in suites(measured).items():
        for label, colour in (("harmful", "harmful"), ("benign", "borderline")):
            rows: dict[str, tuple[Rate | None, Rate]] = {}
            for category in sorted(part.get(label, {}).get("categories", {})):
                path = (suite, label, "categories", category, judge)
                if found := rate(measured, *path):
                    rows[category] = (rate(before, *path) if after else None, found)
            if len(rows) > 1:
                title = f"{label.capitalize()} requests refused"
                told = "; ".join(f"{name} {_counts(*both)}" for name, both in rows.items())
                alt = f"{title} by category, {suite}: {told}."
                yield {"title": title, "suite": suite, "colour": colour, "svg": category_bars(rows, colour), "alt": alt}


def curves(history: Sequence[Mapping[str, Any]], kept: int | None) -> Iterator[dict[str, Any]]:
    """Loss, length of the vector and validation over the steps, where they were recorded; `kept` is the step whose vector was kept."""
    last, losses = history[-1], [("harmful", "harmful"), ("borderline", "benign")]
    looks = [("harmful", "harmful refused"), ("borderline", "benign answered"), ("plain", "AUC")]
    decision, wording = ([row[name] for row in history if name in row] for name in ("harmful_loss", "wording_loss"))
    for title, field, draw, key, end in (
        (
            "Loss",
            "harmful_loss",
            loss_curve,
            losses,
            f"That of harmful requests ends at {[math.nan, *decision][-1]:.2f}",
        ),
        ("Loss of whole refusals", "wording_loss", wording_curve, [], f"It ends at {[math.nan, *wording][-1]:.2f}"),
        ("Length of the vector", "norm", norm_curve, [], f"It ends at {last.get('norm', math.nan):.1f}"),
        ("Validation", "auc", validation_curve, looks, f"The vector of step {kept} was kept"),
    ):
        if any(field in row for row in history):
            alt = f"{title} over {last['step']} steps. {end}."
            yield {"title": title, "svg": draw(history, kept), "key": key, "alt": alt}


def plane(shown: Sequence[Move]) -> Markup:
    """Refusal of benign requests (x) against refusal of harmful ones (y), with 95 % crosses; top left is good."""
    with rc_context(STYLE):
        axes = new_axes(440, 435)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axes.set_xlabel("benign requests refused: needlessly")
        axes.set_ylabel("harmful requests refused: rightly")
        for axis in (axes.xaxis, axes.yaxis):
            _percent(axis)
        axes.axvspan(-0.03, 0.25, 0.7 / 1.06 + 0.05, 1, color=STAND_INS["good"], alpha=0.12, linewidth=0)
        axes.plot([0, 1], [0, 1], color=STAND_INS["muted"], linewidth=1, linestyle=(0, (1, 4)))
        corners = (
            (-0.03, 1.06, "left", "SAFE AND HELPFUL", "good"),
            (1.03, 1.06, "right", "refuses everything", "muted"),
            (0.13, 0.04, "left", "refuses nothing", "muted"),
            (1.03, 0.04, "right", "the wrong way round", "muted"),
        )
        for x, y, align, text, colour in corners:
            axes.text(x, y, text, ha=align, va="center", color=STAND_INS[colour], fontsize=11)
        axes.text(
            0.62,
            0.57,
            "cannot tell them apart",
            color=STAND_INS["muted"],
            fontsize=11,
            rotation=45,
            ha="center",
            va="center",
        )
        for move in shown:
            _draw_move(axes, move)
        return to_svg(axes)


def _draw_move(axes: Axes, move: Move) -> None:
    colour = STAND_INS[move.colour]
    for point, face in ((move.before, STAND_INS["paper"]), (move.after, colour)):
        if point is None:
            continue
        x, y = point.benign.value, point.harmful.value
        axes.plot(point.benign.interval, (y, y), color=colour, linewidth=1.3, alpha=0.6)
        axes.plot((x, x), point.harmful.interval, color=colour, linewidth=1.3, alpha=0.6)
        axes.plot(x, y, "o", markersize=10, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=2, zorder=4)
    if move.before and move.after:
        start = (move.before.benign.value, move.before.harmful.value)
        end = (move.after.benign.value, move.after.harmful.value)
        if math.dist(start, end) > 0.07:
            arrow = {
                "arrowstyle": "-|>",
                "color": colour,
                "linewidth": 1.8,
                "shrinkA": 8,
                "shrinkB": 8,
                "mutation_scale": 14,
            }
            axes.annotate("", end, start, arrowprops=arrow, zorder=3)
    last = move.after or move.before
    if move.mark and last:
        place = (last.benign.value, last.harmful.value)
        axes.annotate(move.mark, place, (9, -9), textcoords="offset points", va="top", color=colour, fontweight="bold")


def category_bars(rows: Mapping[str, tuple[Rate | None, Rate]], colour: str) -> Markup:
    """Refusal rate per category: before (grey) over after (coloured), whiskers 95 %, counts at the right."""
    with rc_context(STYLE):
        axes = new_axes(420, 50 + 32 * len(rows))
        axes.grid(False, axis="y")
        for i, (before, after) in enumerate(rows.values()):
            arms = [(before, -0.19, "before"), (after, 0.19, colour)] if before else [(after, 0.0, colour)]
            for rate, offset, name in arms:
                if rate and rate.n:
                    axes.barh(i + offset, rate.value, 0.34, color=STAND_INS[name], linewidth=0)
                    for halo, width in (("paper", 3.2), ("ink", 1.2)):
                        axes.plot(rate.interval, (i + offset,) * 2, color=STAND_INS[halo], linewidth=width, alpha=0.6)
            axes.text(1.03, i, _counts(before, after), va="center", fontsize=11, color=STAND_INS["muted"])
        names = [shorten(name.replace("_", " "), 24, placeholder="…") for name in rows]
        axes.set_yticks(range(len(rows)), names, color=STAND_INS["ink"])
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _percent(axes.xaxis)
        return to_svg(axes)


def _counts(before: Rate | None, after: Rate) -> str:
    """`1 → 11 of 12`; each with its own n where some rows were unscored."""
    if before is None:
        return f"{after.hits} of {after.n}"
    if before.n == after.n:
        return f"{before.hits} → {after.hits} of {after.n}"
    return f"{before.hits}/{before.n} → {after.hits}/{after.n}"


def loss_curve(history: Sequence[Mapping[str, Any]], kept: int | None) -> Markup:
    """Loss of each class: single steps faint, their running mean strong."""
    with rc_context(STYLE):
        axes = _curve_axes(history, kept)
        for name, colour in (("harmful_loss", "harmful"), ("benign_loss", "borderline")):
            steps, values = _series(history, name)
            axes.plot(steps, values, color=STAND_INS[colour], linewidth=0.8, alpha=0.3)
            axes.plot(steps, _smooth(values), color=STAND_INS[colour])
        axes.set_ylim(bottom=0)
        return to_svg(axes)


def wording_curve(history: Sequence[Mapping[str, Any]], kept: int | None) -> Markup:
    """Loss of refusals to their last word, in the steps that look so far."""
    with rc_context(STYLE):
        axes = _curve_axes(history, kept)
        axes.plot(*_series(history, "wording_loss"), color=STAND_INS["harmful"])
        axes.set_ylim(bottom=0)
        return to_svg(axes)


def norm_curve(history: Sequence[Mapping[str, Any]], kept: int | None) -> Markup:
    """Length of the trained vector."""
    with rc_context(STYLE):
        axes = _curve_axes(history, kept)
        axes.plot(*_series(history, "norm"), color=STAND_INS["ink"])
        return to_svg(axes)


def validation_curve(history: Sequence[Mapping[str, Any]], kept: int | None) -> Markup:
    """What selection looked at: refusal, compliance and ranking on the validation split."""
    with rc_context(STYLE):
        axes = _curve_axes(history, kept)
        names = (("harmful_refusal", "harmful"), ("benign_compliance", "borderline"), ("auc", "plain"))
        for name, colour in names:
            axes.plot(*_series(history, name), "o-", markersize=4, color=STAND_INS[colour])
        axes.set_ylim(-0.03, 1.03)
        _percent(axes.yaxis)
        return to_svg(axes)


def _curve_axes(history: Sequence[Mapping[str, Any]], kept: int | None) -> Axes:
    """Axes over the steps; a dotted line marks the step whose vector was kept."""
    axes = new_axes(320, 220)
    axes.set_xlabel("step")
    axes.set_xlim(0, max(int(h["step"]) for h in history) * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if kept:
        axes.axvline(kept, color=STAND_INS["muted"], linewidth=1.2, linestyle=(0, (1, 2)))
    return axes


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values where `name` was measured."""
    found = [(int(h["step"]), float(h[name])) for h in history if h.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last twentieth of the run, at least five steps; what is not finite is passed over."""
    width = max(5, len(values) // 20)
    smooth = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - width + 1) : i + 1] if math.isfinite(v)]
        smooth.append(sum(window) / len(window) if window else math.nan)
    return smooth


def new_axes(width: int, height: int) -> Axes:
    return Figure(figsize=(width / 72, height / 72), layout="constrained").add_subplot()


def _percent(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(4, steps=[2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def to_svg(axes: Axes) -> Markup:
    """The figure as an SVG element without size, metadata or ids that could meet those of another figure."""
    buffer = io.StringIO()
    figure = axes.get_figure(root=True)
    assert figure is not None
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "trimtab"}):
        warnings.simplefilter("ignore", UserWarning)  # letters that FONT lacks: the page's fonts may have them
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"| xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1f{digest(text)[:8]}-", text)
    width = figure.get_size_inches()[0] * 72
    head = f'<svg style="max-width:{width:.0f}px" aria-hidden="true" focusable="false"'
    text = re.sub(r'^<svg width="[^"]*" height="[^"]*"', head, text)
    text = text.replace(f"font-family: '{FONT}'", "font-family: inherit").replace("xlink:href", "href")
    for variable, stand_in in STAND_INS.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return Markup(text)
