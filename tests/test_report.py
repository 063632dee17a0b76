"""The report, built from fake run folders: no model, no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import PathError, RunError, UsageError
from trimtab.evaluation.metrics import auc_interval, mcnemar, paired_difference, wilson
from trimtab.report import neuron, plots
from trimtab.report.build import _change as change_of
from trimtab.report.build import build
from trimtab.report.replies import cut
from trimtab.report.words import duration, percent

REFUSAL = "I'm sorry, but I can't help. Ask me another."
LONG = " ".join(["word"] * 29 + ["SENTINEL"] + ["word"] * 40)  # the sentinel is word 30
Rows = list[dict[str, Any]]


def rows(group: str, n: int, before: int, after: int, **more: Any) -> Rows:
    """`n` rows of a group, the first `before` (`after`) of them refused by the untouched (guided) model."""

    def arm(refused: bool) -> dict[str, Any]:
        return {"reply": REFUSAL if refused else LONG, "refused": refused}

    label = "harmful" if group == "harmful" else "benign"
    return [
        {
            "id": f"{group}-{i}",
            "prompt": f"Prompt {i} of {group}?",
            "label": label,
            "group": group,
            "category": f"{group} topic {i % 3}",
            "base": arm(i < before),
            "token": arm(i < after),
            **more,
        }
        for i in range(n)
    ]


def results(suites: dict[str, Rows], arms: tuple[str, ...] = ("base", "token")) -> dict[str, Any]:
    """What `evaluate` writes for these rows."""

    def rate(part: Rows, arm: str) -> dict[str, Any]:
        scored = [r[arm]["refused"] for r in part if r[arm]["refused"] is not None]
        return {
            "refusal_rate": sum(scored) / len(scored) if scored else None,
            "ci95": list(wilson(sum(scored), len(scored))),
            "n": len(scored),
            "unscored": len(part) - len(scored),
        }

    def parts(part: Rows, field: str, arm: str) -> dict[str, Any]:
        return {v: {"keyword": rate([r for r in part if r[field] == v], arm)} for v in {r[field]: 0 for r in part}}

    def side(part: Rows, arm: str) -> dict[str, Any]:
        return {
            "keyword": rate(part, arm),
            "n": len(part),
            "groups": parts(part, "group", arm),
            "categories": parts(part, "category", arm),
        }

    def summary(arm: str) -> dict[str, Any]:
        by_label = {
            name: {label: [r for r in part if r["label"] == label] for label in ("harmful", "benign")}
            for name, part in suites.items()
        }
        return {
            "suites": {
                name: {"n": len(suites[name]), **{label: side(part, arm) for label, part in both.items() if part}}
                for name, both in by_label.items()
            },
            "auc": dict.fromkeys(suites, 0.9),
        }

    found = {**summary(arms[-1]), "model": "tiny", "arm": arms[-1], "cost": {"seconds": 5, "device": "abacus"}}
    if len(arms) == 2:
        paired = {}
        for name, part in suites.items():
            for label in {r["label"] for r in part}:
                pairs = [(r["base"]["refused"], r[arms[-1]]["refused"]) for r in part if r["label"] == label]
                pairs = [pair for pair in pairs if None not in pair]
                p = mcnemar([b for b, _ in pairs], [a for _, a in pairs])
                gained, lost = sum(a and not b for b, a in pairs), sum(b and not a for b, a in pairs)
                verdict = {
                    "now_refused": gained,
                    "now_answered": lost,
                    "difference": 0.25,
                    "ci95": [0.1, 0.4],
                    "p": p,
                    "detectable": 0.142,
                }
                paired.setdefault(name, {})[label] = {"keyword": verdict}
        found |= {"base": summary("base"), "paired": paired}
    return found


def manifest(**more: Any) -> dict[str, Any]:
    look = {"harmful_refusal": 0.5, "benign_compliance": 0.9, "harmonic_mean": 0.64, "auc": 0.8}
    return {
        "settings": {"tokens": 1, "position": "user"},
        "model": {"name": "tiny"},
        "token": {"position": "user", "numbers": 576, "norm": 20.0},
        "data": {"validation": {"harmful": 10, "plain": 10}},
        "validation": {"before": look, "after": {**look, "step": 4}},
        "pilots": [{"position": "start", "radius": 0.1, "step": 8, **look}],
        "cost": {"seconds": 100.0, "train_seconds": 61.0, "device": "abacus"},
        "environment": {"python": "3.11"},
        **more,
    }


def history(steps: int) -> list[dict[str, Any]]:
    looks = {"harmful_refusal": 0.5, "benign_compliance": 0.9, "auc": 0.8}
    return [
        {
            "step": i,
            "loss": 1.0,
            "harmful_loss": 2.0,
            "benign_loss": 0.5,
            "norm": 3.0,
            "reply_tokens": 1,
            **(looks if i % 2 == 0 else {}),
        }
        for i in range(1, steps + 1)
    ]


RULES = [
    {
        "name": "behaviour",
        "meaning": "is clear",
        "seen": 20,
        "kept": 15,
        "dropped": {"plain": 5},
        "examples": ["x " * 24 + "LAST OVER"],
    }
]


def write_run(folder: Path, suites: dict[str, Rows] | None = None, **files: Any) -> Path:
    """A run folder of `align`; `history=None` leaves a file out."""
    files = {"manifest": manifest(), "history": history(4), "filter": RULES, **files}
    if suites:
        files = {"eval/results": results(suites), "eval/rows": suites, **files}
    for name, value in files.items():
        if value is not None:
            path = folder / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value), encoding="utf-8")
    return folder


def page(*runs: Path, out: Path) -> str:
    """The built page, its non-breaking spaces made plain."""
    text = build(runs, out / "report.html").read_text(encoding="utf-8")
    return text.replace("\u00a0", " ").replace("&nbsp;", " ")


SUITE = {"test": rows("harmful", 100, 1, 93) + rows("borderline", 100, 2, 40) + rows("plain", 100, 0, 4)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything; tests must leave it as it is."""
    return write_run(tmp_path_factory.mktemp("runs") / "one", SUITE)


@pytest.fixture(scope="module")
def whole(run: Path) -> str:
    """Its page."""
    return page(run, out=run.parent)


class Tags(HTMLParser):
    """Start tags with their attributes, and whether every tag that was opened was closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing_from_outside(whole: str) -> None:
    tags = Tags(whole).tags
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert all((a.get(key) or "#").startswith("#") for _, a in tags for key in ("href", "src", "xlink:href"))
    assert not re.search(r"@import|https?://|url\((?!#)", whole)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', whole)) <= set(ids)


def test_figures_take_their_colours_from_the_page(whole: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", whole, re.DOTALL)
    assert len(figures) == 6  # plane, two bars, three curves
    assert not re.search(r"#[0-9a-f]{6}\b", "".join(figures))
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", "".join(figures)))
    light, dark = (re.search(pattern, whole, re.DOTALL) for pattern in (r":root \{(.*?)\}", r"dark\) \{(.*?)\}"))
    assert light is not None
    assert dark is not None
    for scheme in (light.group(1), dark.group(1)):
        assert used <= set(re.findall(r"--([a-z0-9]+):", scheme))
    assert all(a.get("aria-label") for tag, a in Tags(whole).tags if tag == "figure")


def test_the_headline_says_what_was_measured(whole: str) -> None:
    wanted = (
        "<h1>One token of 576 numbers: tiny now refuses 93 % of harmful requests (was 1 %), "
        "and 4 % of plain benign ones (was 0 %: no clear change).</h1>"
    )
    assert wanted in whole
    assert "benign requests that only sound harmful, it refuses 40 % (was 2 %: worse)." in whole
    assert "576 numbers trained in 1 min 1 s on abacus (1 min 40 s with preparation)" in whole
    for hits, n in ((1, 100), (93, 100), (40, 100)):
        low, high = wilson(hits, n)
        assert f"{100 * low:.0f}–{100 * high:.0f} %" in whole


@pytest.mark.parametrize(
    ("harmful", "plain", "wanted"),
    [
        ((50, 90), (0, 30), "now refuses 90 % of harmful requests (was 50 %), but 30 % of benign ones (was 0 %: worse)"),
        ((90, 50), (0, 0), "now refuses 50 % of harmful requests (was 90 %: worse), and 0 % of benign ones"),
        ((50, 55), (3, 2), "tiny refuses 55 % of harmful requests (was 50 %: no clear change), and 2 %"),
        ((10, 10), (3, 3), "refuses 10 % of harmful requests (was 10 %: no clear change), and 3 % of benign ones (was 3 %: no"),
        ((0, 50), (40, 0), "(was 0 %), and 0 % of benign ones (was 40 %)."),
    ],
)  # fmt: skip
def test_the_headline_is_honest(harmful: tuple[int, int], plain: tuple[int, int], wanted: str, tmp_path: Path) -> None:
    suite = rows("harmful", 100, *harmful) + rows("plain", 100, *plain)
    if harmful == (50, 55):  # the same rates by other rows: no pairing to lean on
        for i, row in enumerate(suite[:100]):
            row["token"]["refused"] = i >= 45
    assert wanted in page(write_run(tmp_path / "r", {"test": suite}), out=tmp_path)


def test_three_small_changes_are_no_clear_ones_together(tmp_path: Path) -> None:
    """Each by itself has p = 0.031; of three, one that small is to be expected more often."""
    suite = {"test": [row for group in plots.GROUPS for row in rows(group, 100, 0, 6)]}
    text = page(write_run(tmp_path / "r", suite), out=tmp_path)
    assert text.count("no clear change</b>") == 3
    assert "tiny refuses 6 % of harmful requests (was 0 %: no clear change)" in text


@given(n=st.integers(6, 60), gained=st.integers(0, 30), lost=st.integers(0, 30))
def test_no_change_is_claimed_whose_interval_reaches_zero(n: int, gained: int, lost: int) -> None:
    gained, lost = min(gained, n), min(lost, max(0, n - gained))
    before, after = [False] * n, [False] * n
    for i in range(gained):
        after[i] = True
    for i in range(gained, gained + lost):
        before[i] = True
    card = {"before": plots.Rate(sum(before), n), "after": plots.Rate(sum(after), n)}
    kind, _ = change_of(card, (before, after), mcnemar(before, after), True)
    low, high = paired_difference(before, after)[1]
    assert (kind == "better") <= (low > 0)
    assert (kind == "worse") <= (high < 0)


def test_overlapping_intervals_are_named_where_the_paired_test_sees_a_change(tmp_path: Path) -> None:
    suite = {"test": rows("harmful", 50, 0, 50) + rows("plain", 100, 0, 6)}
    assert "6 % of benign ones (was 0 %: worse: intervals overlap, but paired p 0.031)" in page(
        write_run(tmp_path / "r", suite), out=tmp_path
    )


def test_replies_to_harmful_requests_are_cut_everywhere(whole: str, tmp_path: Path) -> None:
    harmful_only = {"test": [row for row in SUITE["test"] if row["label"] == "harmful"]}
    assert "SENTINEL" not in page(write_run(tmp_path / "harmful", harmful_only), out=tmp_path)
    for article in re.findall(r'<article class="pair" style="--c: var\(--harmful\)">.*?</article>', whole, re.DOTALL):
        assert "SENTINEL" not in article
        assert article.count("word") in (0, 25, 50)
    assert "SENTINEL" in whole  # benign replies are longer
    assert whole.count("word") < 12 * 2 * 60


def test_writing_without_spaces_is_cut_as_well(tmp_path: Path) -> None:
    suite = rows("harmful", 4, 0, 0)
    for row in suite:
        row["token"]["reply"] = "字" * 400 + "SENTINEL"
    text = page(write_run(tmp_path / "r", {"test": suite}), out=tmp_path)
    assert "字" * 250 in text
    assert "字" * 251 not in text
    assert "SENTINEL" not in text


def test_pairs_show_failures_in_proportion(whole: str, run: Path, tmp_path: Path) -> None:
    shown = whole[: whole.index("<details><summary>harmful requests that are")]
    pairs = re.findall(r'<article class="pair" style="--c: var\(--(\w+)\)">(.*?)</article>', shown, re.DOTALL)
    assert [group for group, _ in pairs] == ["harmful"] * 4 + ["borderline"] * 4 + ["plain"] * 4
    after = [re.findall(r'class="badge ?(good|)">', body)[1] for _, body in pairs]
    # 7 %, 40 % and 4 % failed: at least one of four is shown, and two of four for 40 %
    assert [after[i : i + 4].count("") for i in (0, 4, 8)] == [1, 2, 1]
    assert '<mark class="good">I&#39;m sorry, but I can&#39;t help.</mark> Ask me another.' in whole
    for start in (0, 4, 8):
        names = [re.findall(r'class="over">(.*?)<', body)[0] for _, body in pairs[start : start + 4]]
        assert len(set(names)) == 3  # all categories there are
    assert page(run, out=tmp_path) == whole  # nothing is left to chance


def test_an_unscored_reply_is_never_shown_as_good(tmp_path: Path) -> None:
    suite = rows("harmful", 8, 0, 8)
    suite[0]["token"] = {"reply": "", "refused": None}
    text = page(write_run(tmp_path / "r", {"test": suite}), out=tmp_path)
    assert '<span class="badge ">unscored ✗</span>' in text
    assert '<span class="muted">(empty)</span>' in text


def test_thoughts_are_not_taken_for_the_answer(tmp_path: Path) -> None:
    suite = rows("plain", 4, 0, 0)
    for row in suite:
        row["token"]["reply"] = "<think>PONDER</think>\nThe answer."
    text = page(write_run(tmp_path / "r", {"test": suite}), out=tmp_path)
    assert "The answer." in text
    assert "PONDER" not in text


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    suite = rows("harmful", 6, 0, 3, prompt=evil) + rows("plain", 6, 0, 3, prompt=evil)
    for i, row in enumerate(suite):
        row["category"] = f"{evil}{i % 2} $x^2$"
        row["token"] = {"reply": evil, "refused": False}
    rules = [{**RULES[0], "examples": [evil], "name": evil}]
    text = page(write_run(tmp_path / evil.replace("/", "_"), {evil: suite}, filter=rules), out=tmp_path)
    assert "&lt;script&gt;" in text
    assert "script" not in {tag for tag, _ in Tags(text).tags}


def test_every_part_may_be_missing(whole: str, tmp_path: Path) -> None:
    sections = ("Safer, or", "By category", "Training", "What it learned", "Before and after", "All numbers", "Pilots")
    assert [title for title in sections if f"<h2>{title}" not in whole] == []
    no_history = page(write_run(tmp_path / "a", SUITE, history=None), out=tmp_path)
    assert [title for title in sections if f"<h2>{title}" not in no_history] == ["Training"]
    bare = page(write_run(tmp_path / "b", filter=None, manifest=manifest(pilots=[])), out=tmp_path)
    assert [title for title in sections if f"<h2>{title}" in bare] == ["Training"]
    assert "One token of 576 numbers: tiny, not evaluated yet." in bare
    (tmp_path / "a/eval/rows.json").unlink()
    no_rows = page(tmp_path / "a", out=tmp_path)
    assert [title for title in sections if f"<h2>{title}" not in no_rows] == ["Training", "Before and after"]


def test_an_evaluation_without_a_token(tmp_path: Path) -> None:
    suite = {"test": [{k: v for k, v in row.items() if k != "token"} for row in SUITE["test"]]}
    write_run(tmp_path / "e", manifest=None, history=None, filter=None, results=results(suite, ("base",)), rows=suite)
    text = page(tmp_path / "e", out=tmp_path)
    assert "<h1>tiny refuses 1 % of harmful requests, and 0 % of plain benign ones.</h1>" in text
    assert "<h2>Replies</h2>" in text
    assert "McNemar p" not in text


def test_an_evaluation_of_a_token_alone(tmp_path: Path) -> None:
    suite = {"test": [{k: v for k, v in row.items() if k != "base"} for row in SUITE["test"]]}
    write_run(tmp_path / "e", manifest=None, history=None, filter=None, results=results(suite, ("token",)), rows=suite)
    assert "<h1>With its token, tiny refuses 93 % of harmful requests, and 4 %" in page(tmp_path / "e", out=tmp_path)


def test_suites_of_one_label_meet_on_the_plane(tmp_path: Path) -> None:
    suites = {"attacks": rows("harmful", 50, 0, 40), "chat": rows("plain", 50, 0, 1), "mixed": SUITE["test"]}
    text = page(write_run(tmp_path / "r", suites), out=tmp_path)
    for label in (
        "chat: all harmful against plain",
        "mixed: harmful against plain",
        "mixed: harmful against borderline",
    ):
        assert label in text
    assert "attacks: harmful against" not in text
    assert "89 % of harmful requests (was 0.7 %)" in text  # 133 and 1 of 150
    assert "these suites together: attacks, chat, mixed." in text


def test_sums_are_no_part_of_the_headline(tmp_path: Path) -> None:
    suites = {"test": SUITE["test"], "sums": rows("plain", 50, 0, 50)}
    whole = results(suites)
    for arm in (whole, whole["base"]):
        arm["suites"]["sums"]["tests"] = True
    text = page(write_run(tmp_path / "r", suites, **{"eval/results": whole}), out=tmp_path)
    assert ", and 4 % of" in text
    assert "suites together" not in text
    assert "<td>sums</td>" in text


def test_two_runs_are_compared(tmp_path: Path) -> None:
    worse = {"test": rows("harmful", 100, 1, 55) + rows("plain", 100, 0, 0)}
    runs = [write_run(tmp_path / "one", SUITE), write_run(tmp_path / "two", worse, history=None)]
    text = page(*runs, out=tmp_path)
    Tags(text)
    assert "<h1>2 runs compared</h1>" in text
    table = text[: text.index("</table>")]
    for number in ("one", "two", "93 %", "55 %", "40 %", "was 2 %"):
        assert number in table
    assert 'id="run-1"' in text
    assert 'href="#run-2"' in text
    assert len(re.findall('aria-label="Plane', text)) == 1
    assert re.search("Run 1, .*Run 2, ", text)


def test_runs_that_were_not_measured_alike_say_so(tmp_path: Path) -> None:
    def measured(name: str, *, digest: str = "d", tokens: int = 64, judges: tuple[str, ...] = ("keyword",)) -> Path:
        asked = {"test": {"rows": 40, "of": 200, "digest": digest}}
        protocol = {"digest": name, "suites": asked, "judges": list(judges), "max_new_tokens": tokens}
        return write_run(tmp_path / name, SUITE, **{"eval/results": {**results(SUITE), "protocol": protocol}})

    first = measured("first")
    assert "Not measured alike" not in page(first, measured("same"), out=tmp_path)
    text = page(
        first, measured("rows", digest="e"), measured("cut", tokens=16), measured("j", judges=("phrase",)), out=tmp_path
    )
    for line in (
        "test is not the same rows: 40 of 200 (run 1), 40 of 200 (run 2), 40 of 200 (run 3), 40 of 200 (run 4)",
        "replies were cut at different lengths, in tokens: 64 (run 1), 64 (run 2), 16 (run 3), 64 (run 4)",
        "categories are compared by keyword, and others judged: phrase (run 4)",
    ):
        assert f"<li>{line}</li>" in text
    assert text.index("Not measured alike") < text.index('aria-label="Plane')


def test_harm_on_the_same_rows_has_its_change_and_interval(tmp_path: Path) -> None:
    def harm(mean: float) -> dict[str, Any]:
        return {"test": {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 90}}

    more = {
        "harm": {"llm:u#m": {"base": harm(0.8), "token": harm(0.3)}},
        "harm_paired": {"llm:u#m": {"test": {"mean": -0.48, "ci95": [-0.6, -0.36], "n": 88}}},
    }
    text = page(write_run(tmp_path / "r", SUITE, **{"eval/results": {**results(SUITE), **more}}), out=tmp_path)
    assert "on the same 88 rows -0.48 (-0.60 to -0.36)" in text


def test_categories_and_costs_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    worse = {"test": rows("harmful", 100, 1, 55) + rows("plain", 100, 0, 0)}
    judged = {
        "judging": {"llm:u#m": {"asked": 1, "failed": 0, "why": "", "prompt_tokens": 1200, "completion_tokens": 30}}
    }
    measured = {**results(worse), **judged, "cost": {"seconds": 65, "peak_memory_gb": 2.5, "device": "abacus"}}
    one = write_run(tmp_path / "one", SUITE)
    two = write_run(tmp_path / "two", **{"eval/results": measured, "eval/rows": worse})
    text = page(one, two, out=tmp_path)
    side = text[text.index("<h2>Side by side") : text.index("<h2>What each cost")]
    head = re.findall(r'<th class="n">(.*?)</th>', side)
    assert head == ["untouched tiny", "1", "2", "untouched tiny", "1", "2"]  # harmful, benign
    # 34 of the 100 prompts are of the first topic: the first refused one, every third of the first 93, and of the first 55
    first = re.search(r"<tr><td>harmful topic 0</td>(.*?)</tr>", side, re.DOTALL)
    assert first
    assert re.findall(r">([^<>]+)</td>", first[1]) == ["3 %", "91 %", "56 %"]
    assert re.findall(r'title="(\d+ of \d+)', first[1]) == ["1 of 34", "31 of 34", "19 of 34"]
    assert re.findall(r"--at:(\d+)%", first[1]) == ["3", "91", "56"]
    plain = re.search(r"<tr><td>plain topic 2</td>(.*?)</tr>", side, re.DOTALL)
    assert plain
    assert "1 of 33" in plain[1]
    assert ">–</td>" in re.search(r"<tr><td>borderline topic 0</td>(.*?)</tr>", side, re.DOTALL)[1]  # type: ignore[index]
    costs = part(text, "What each cost")
    assert re.findall(r'<td class="n">(.*?)</td>', costs) == [
        *("1", "1 min 40 s", "5 s", "–", "–"),
        *("2", "1 min 40 s", "1 min 5 s", "2.5 GB", "1,200 + 30"),
    ]
    assert "Side by side" not in page(one, out=tmp_path)
    for row in SUITE["test"][95:100]:  # five categories of one row each
        assert row["label"] == "harmful"
    few = {"test": [{**row, "category": f"rare {i}"} if 95 <= i < 100 else row for i, row in enumerate(SUITE["test"])]}
    text = page(write_run(tmp_path / "a", few), write_run(tmp_path / "b", few), out=tmp_path)
    small = re.search(r"<tr><td>5 small ones</td>(.*?)</tr>", text, re.DOTALL)
    assert small
    assert "0 of 5" in small[1]


def test_what_turned_over_is_shown_in_both_directions(tmp_path: Path) -> None:
    both = {"test": rows("harmful", 30, 1, 20) + rows("plain", 30, 0, 2)}
    both["test"][0]["token"]["refused"] = False  # the only one that was refused before
    text = page(write_run(tmp_path / "run", both), out=tmp_path)
    told = re.findall(r"<summary>((?:harmful|benign) requests that are .*?)</summary>", text)
    assert [re.sub("<[^>]*>", "", each) for each in told] == [
        "harmful requests that are refused now: 19 better, 3 of them here",
        "harmful requests that are answered now: 1 worse",
        "benign requests that are refused now: 2 worse",
    ]
    assert "SENTINEL" not in text[text.index(told[0]) :].split("benign requests that are")[0]  # cut as everywhere
    untouched = {"test": rows("harmful", 30, 1, 1)}
    for row in untouched["test"]:
        del row["token"]
    alone = write_run(
        tmp_path / "base",
        manifest=None,
        history=None,
        filter=None,
        results=results(untouched, ("base",)),
        rows=untouched,
    )
    assert "requests that are" not in page(alone, out=tmp_path)


@pytest.mark.parametrize("made", [(), ("run.json",), ("history.json",)])
def test_a_folder_that_is_no_run_is_named(made: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    for name in made:
        (folder / name).write_text("{}")
    with pytest.raises(RunError, match=re.escape(str(folder))):
        build([folder], tmp_path / "report.html")
    with pytest.raises(PathError, match="nowhere"):
        build([tmp_path / "nowhere"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (write_run(tmp_path / "r", SUITE) / "eval" / "results.json").write_text(content)
    with pytest.raises(RunError, match=r"results\.json"):
        build([tmp_path / "r"], tmp_path / "report.html")


def test_no_run_at_all_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        build([], tmp_path / "report.html")


def test_the_page_goes_to_a_new_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "report.html"
    assert build([run], out) == out
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_examples_of_the_filter_are_cut(whole: str) -> None:
    assert "LAST" in whole
    assert "OVER" not in whole


def test_every_number_has_its_n_and_p(whole: str) -> None:
    table = whole[whole.index("<h2>All numbers") :]
    cells = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<td.*?</td>", table, re.DOTALL)]
    harmful = cells[:11]
    assert harmful[:4] == ["test", "keyword", "harmful", "100"]
    assert harmful[6:11] == ["0", "+92, −0", "+25 +10 to +40", "14", "&lt; 0.001"]
    assert "0.12" in cells  # plain: 4 changed, none the other way
    assert "90–100 %" not in harmful  # AUC is no percentage


def test_pilots_show_what_they_tried(whole: str) -> None:
    table = whole[whole.index("<h2>Pilots") :]
    heads = re.findall("<th>(.*?)</th>", table)
    assert heads == ["position", "radius", "AUC", "harmful refused", "benign answered"]
    assert "<td>start</td><td>0.1</td><td>0.80</td>" in table


def test_loss_curves_survive_what_is_not_a_number() -> None:
    steps = history(30)
    steps[3] |= {"harmful_loss": float("nan")}
    assert "<svg" in plots.loss_curve(steps, None)


def test_words() -> None:
    assert [percent(x).replace("\u00a0", " ") for x in (0, 0.004, 0.014, 0.996, 1)] == [
        "0 %",
        "0.4 %",
        "1 %",
        "99.6 %",
        "100 %",
    ]
    assert percent(float("nan")) == "–"
    assert [duration(s).replace("\u00a0", " ") for s in (0.4, 59.6, 185)] == ["0 s", "1 min 0 s", "3 min 5 s"]
    assert cut("a  b\nc", 2) == "a b …"
    assert cut("a  b\nc", 3) == "a b c"


def test_auc_interval_is_the_published_one() -> None:
    """Hanley and McNeil 1982, table II and text: area 0.893, 51 abnormal and 58 normal cases, standard error 0.032."""
    low, high = auc_interval(0.893, 51, 58) or (0.0, 0.0)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.032, abs=0.001)
    assert auc_interval(0.5, 0, 3) is None
    assert auc_interval(1.0, 5, 5) == (1.0, 1.0)


def test_the_report_needs_no_torch() -> None:
    code = (
        "import sys, trimtab.report.build; assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_steps_that_look_at_whole_refusals_have_a_curve_of_their_own(tmp_path: Path) -> None:
    steps = history(4)
    steps[2] = {"wording_loss": 4.5, **{k: v for k, v in steps[2].items() if k != "harmful_loss"}}
    whole, even = write_run(tmp_path / "whole", history=steps), write_run(tmp_path / "even")
    for text in ("every third looks at whole refusals", "Loss of whole refusals over 4 steps. It ends at 4.50."):
        assert text in page(whole, out=tmp_path / "whole.html")
        assert text not in page(even, out=tmp_path / "even.html")


LIF = {"kind": "lif", "tau": 8.0, "threshold": 1.0, "keep": 0.6, "rate": 0.0, "divergence": "tv"}


def trace(spikes: list[int], guided: list[int] | None = None, **more: Any) -> dict[str, Any]:
    """What a guided reply left; a potential above the threshold wherever it spikes."""
    return {
        "alpha": 0.9,
        "risk": 8.0,
        "rated": True,
        "divergence": [0.25] * len(spikes),
        "potential": [1.5 if spike else 0.5 for spike in spikes],
        "spikes": spikes,
        "guided": guided or [0] * len(spikes),
        **more,
    }


def under_guide(suite: Rows) -> Rows:
    """The same rows with a guide instead of a token: reply i of a group has 6 tokens and i % 5 spikes, of which the expert changed one."""
    for row in suite:
        n = int(row["id"].split("-")[1]) % 5
        row["guide"] = {
            **row.pop("token"),
            "trace": trace([1] * n + [0] * (6 - n), [1] * bool(n) + [0] * (6 - bool(n))),
        }
    return suite


def guided_results(suites: dict[str, Rows], gate: dict[str, Any] | None = None) -> dict[str, Any]:
    found = results(suites, ("base", "guide"))
    harmful = {"spike_rate": 0.4, "guided_rate": 0.3, "mean_divergence": 0.25, "mean_alpha": 0.9, "unrated": 3}
    nothing = {"spike_rate": None, "guided_rate": None, "mean_divergence": None, "mean_alpha": 0.1, "unrated": 0}
    measured = {name: {"harmful": harmful, "benign": nothing} for name in suites}
    described = {"expert": "feed", "neuron": gate or LIF, "risk": "SelfRating()", "early_stop": "off"}
    tried = {"fooled": 3, "foolable": 12, "ci95": [0.0889, 0.5323]}
    return {**found, "guide": described, "neuron": measured, "injections": tried}


def write_guided(folder: Path, groups: Rows, gate: dict[str, Any] | None = None) -> Path:
    """A folder of `eval --expert`."""
    suites = {"test": under_guide(groups)}
    files = {"results": guided_results(suites, gate), "rows": suites}
    return write_run(folder, manifest=None, history=None, filter=None, **files)


def write_expert(folder: Path, prefill_refusal: tuple[float | None, float | None] = (0.1, 0.9)) -> Path:
    """A folder of `expert`, with its check in `eval/`."""
    suites = {"test": under_guide(rows("harmful", 20, 0, 19) + rows("plain", 20, 0, 0))}
    look = {"harmful_refusal": 0.5, "benign_compliance": 0.9, "harmonic_mean": 0.64, "auc": 0.8}
    before, after = ({**look, "prefill_refusal": share} for share in prefill_refusal)
    made = manifest(
        settings={"rank": 8},
        adapter={"numbers": 460800},
        data={"validation": {"harmful": 10, "plain": 10}, "validation_with_opening": 10 if prefill_refusal[0] else 0},
        validation={"before": before, "after": after},
    )
    steps = [
        {k: v for k, v in row.items() if k in ("step", "loss", "harmful_loss", "benign_loss")} for row in history(4)
    ]
    files = {
        "manifest": {k: v for k, v in made.items() if k not in ("token", "pilots")},
        "history": steps,
        "filter": None,
    }
    always = guided_results(suites, {**LIF, "kind": "always"})
    return write_run(folder, **files, **{"eval/results": always, "eval/rows": suites})


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of guided decoding compared with the untouched model."""
    folder = tmp_path_factory.mktemp("guided")
    groups = rows("harmful", 100, 1, 93) + rows("borderline", 30, 2, 12) + rows("plain", 5, 0, 0)
    return page(write_guided(folder / "g", groups), out=folder)


def part(text: str, title: str) -> str:
    """One section of a page, to the next one."""
    return text[text.index(f"<h2>{title}") :].split("<h2>")[1]


def test_raters_are_compared_where_somebody_did(guided: str, tmp_path: Path) -> None:
    assert "Who could rate" not in guided
    folder = write_guided(tmp_path / "g", rows("harmful", 4, 1, 3))
    row = {
        "auc": 0.512, "auc_ci95": [0.44, 0.58], "alpha_harmful": 0.9, "alpha_borderline": 0.5, "alpha_plain": 0.1,
        "unread": 3, "n": 240, "fooled": 2, "foolable": 30, "fooled_ci95": [0.02, 0.2],
    }  # fmt: skip
    (folder / "raters.json").write_text(json.dumps({"self": row}))
    cells = re.findall(
        r"<td[^>]*>(.*?)</td>", page(folder, out=tmp_path).split("Who could rate")[1].split("</table>")[0]
    )
    assert cells == ["self", "0.51 (0.44–0.58)", "0.90, 0.50, 0.10", "3 of 240", "2 of 30"]


def strokes(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """Lines of a colour in a figure, each as its points."""
    drawn = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; [^"]*stroke: var\(--{colour}\)', svg)
    numbers = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", line) for path in drawn for line in re.findall("M[^M]*", path)]
    return [[(float(x), float(y)) for x, y in points] for points in numbers]


def test_a_guide_is_called_a_guide(guided: str) -> None:
    assert "<h1>With its guide, tiny now refuses 93 % of harmful requests (was 1 %), and 0 % of plain benign" in guided
    assert "with the guide</span>" in guided
    assert "With its token" not in guided
    assert "with the token" not in guided
    assert "<dt>guide.neuron.tau</dt><dd>8</dd>" in guided
    assert "guide.test" not in guided  # measurements are no settings
    cells = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<td.*?</td>", part(guided, "All numbers"), re.DOTALL)]
    assert cells[6:11] == ["0", "+92, −0", "+25 +10 to +40", "14", "&lt; 0.001"]
    assert guided[: guided.index("<details><summary>harmful requests that are")].count("<h4>after ") == 12


def test_what_the_neuron_did_is_told_by_label(guided: str) -> None:
    section = part(guided, "The neuron")
    table = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>.*?</tr>", section)]
    assert table == [
        ["", "harmful", "benign"],
        ["tokens with a spike", "40 %", "–"],
        ["tokens the expert changed", "30 %", "–"],
        ["mean divergence D", "0.250", "–"],
        ["mean alpha", "0.90", "0.10"],
        ["requests not rated", "3", "0"],
    ]
    assert "(total variation)" in section
    assert "time constant of 8 tokens. At a threshold of 1 it fires" in section
    assert "60 % of the potential is left" in section
    assert "3 of 12 talked the rater down (25 %, 95 % interval 9–53 %)" in section


def test_what_cannot_be_said_of_injections_is_not_said() -> None:
    assert neuron.injections(None) == ""
    assert "nothing to talk it out of" in neuron.injections({"fooled": 0, "foolable": 0, "ci95": [0, 1]})


def test_the_raster_holds_at_most_40_replies_a_group_harmful_first(guided: str) -> None:
    (told,) = re.findall(r'aria-label="When the neuron fired, a line a reply. (.*?)"', guided)
    harmful, borderline, plain = told.split("; ")
    assert harmful.startswith("harmful: 40 of 100 replies, 240 tokens, ")
    assert borderline.startswith(
        "borderline: 30 replies, 180 tokens, 60 spikes, 24 changed"
    )  # 6 times 0, 1, 2, 3, 4 spikes
    assert plain == "plain: 5 replies, 30 tokens, 10 spikes, 4 changed by the expert."


def test_every_mark_of_the_raster_is_drawn_where_it_belongs() -> None:
    traces = [trace([0, 1, 0, 0]), trace([1, 1, 0, 1, 1], [0, 1, 0, 0, 1])]
    drawn = str(neuron.raster({"harmful": traces})["svg"])
    *lines, _axis = strokes(drawn, "rule")
    dots, bars = strokes(drawn, "harmful"), strokes(drawn, "ink")
    assert (len(lines), len(dots), len(bars)) == (2, 3, 2)
    assert all(start == end for start, end in dots)
    assert all(start != end for start, end in bars)
    first, second = lines  # the reply with more spikes is on top, and longer
    assert first[0][1] < second[0][1]
    assert first[1][0] > second[1][0]
    assert sorted(y for (_, y), _ in dots) == [first[0][1], first[0][1], second[0][1]]
    token = (
        first[1][0] - first[0][0]
    ) / 4.6  # pixels: a line begins 0.3 before its first token, and ends 0.3 after its last
    assert [round((x - first[0][0]) / token + 0.7, 2) for (x, _), _ in bars] == [2, 5]


def test_hundreds_of_dots_are_all_there() -> None:
    many = neuron.raster({"plain": [trace([1] * 60)] * 40})
    assert len(strokes(str(many["svg"]), "plain")) == 2400
    assert "2400 tokens, 2400 spikes, 0 changed" in many["alt"]


def test_a_spike_resets_the_membrane() -> None:
    charged, spikes = [0.5, 1.2, 0.9], [0, 1, 0]
    assert list(neuron.course(charged, spikes, 0.6)) == [(1, 0.5), (2, 1.2), (2, pytest.approx(0.72)), (3, 0.9)]
    hard = str(neuron.membrane(trace(spikes, potential=charged), {**LIF, "keep": 0.0}, "plain")["svg"])
    (curve,) = strokes(hard, "plain")
    threshold = next(line for line in strokes(hard, "muted") if line[0][1] == line[1][1])
    (_, start), (x, peak), (at, bottom), (_, end) = curve
    assert x == at
    assert peak < threshold[0][1] < end < start < bottom  # y grows downwards
    assert (bottom - peak) / (bottom - threshold[0][1]) == pytest.approx(1.2, abs=1e-3)  # the bottom is 0


@pytest.mark.parametrize(
    ("gate", "words", "membrane"),
    [
        ({"keep": 0.0}, "with strength alpha, and the potential falls to 0.", True),
        ({"kind": "ema", "tau": 2.0, "threshold": 0.5}, "running mean over 2 tokens", True),
        ({"kind": "always"}, "the expert may speak at every token", False),
        ({"kind": "random", "rate": 0.43}, "the expert may speak at 43 % of tokens, by chance", False),
        ({"divergence": "kl"}, "(Kullback-Leibler, in bits)", True),
    ],
)
def test_every_neuron_is_told_as_it_is(gate: dict[str, Any], words: str, membrane: bool) -> None:
    assert words in neuron.rule({**LIF, **gate}).replace("\u00a0", " ")
    assert neuron.has_membrane({**LIF, **gate}) is membrane
    figure = neuron.membrane(trace([0, 1]), {**LIF, **gate}, "harmful")
    assert bool(strokes(str(figure["svg"]), "harmful")) is membrane
    assert ("threshold" in figure["alt"]) is membrane


def test_the_reply_shown_has_the_median_number_of_spikes() -> None:
    replies = [{"id": n, "guide": {"trace": trace([1] * n + [0] * (9 - n))}} for n in (9, 0, 2, 7)]
    assert neuron.median_reply(replies)["id"] == 2  # the lower one of 2 and 7
    assert neuron.median_reply(replies[:3])["id"] == 2
    assert neuron.median_reply(replies[:1])["id"] == 9


def test_one_reply_of_each_group_is_shown_and_cut(guided: str) -> None:
    section = part(guided, "The neuron")
    shown = re.findall(r'<article class="pair" style="--c: var\(--(\w+)\)">(.*?)</article>', section, re.DOTALL)
    assert [group for group, _ in shown] == ["harmful", "borderline", "plain"]
    for group, body in shown:
        assert "Risk 8.0, alpha 0.9; 2 spikes in 6 tokens, 1 changed by the expert." in body
        label = f"{group.capitalize()} reply, membrane against a threshold of 1: 2 spikes in 6 tokens"
        assert f'aria-label="{label}, 1 changed by the expert; the first spike at token 1."' in body
    assert "SENTINEL" not in shown[0][1]
    assert "SENTINEL" in shown[2][1]


def test_a_rating_that_could_not_be_read_is_not_given_as_a_number() -> None:
    caption = neuron.membrane(trace([0, 0], rated=False, risk=7), LIF, "plain")["caption"]
    assert caption == "Risk not readable, alpha 0.9; 0 spikes in 2 tokens, 0 changed by the expert."


def test_what_is_not_a_number_makes_no_figure_fail() -> None:
    nan = [float("nan")] * 2
    figure = neuron.membrane(trace([1, 1], divergence=nan, potential=nan), LIF, "harmful")
    assert "2 spikes in 2 tokens" in figure["alt"]


def test_guided_figures_belong_to_the_page(guided: str) -> None:
    tags = Tags(guided).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    figures = re.findall(r"<svg.*?</svg>", guided, re.DOTALL)
    assert len(figures) == 7  # plane, two bars, raster, three membranes
    assert not re.search(r"#[0-9a-f]{6}\b", "".join(figures))
    assert all(a.get("aria-label") for tag, a in tags if tag == "figure")


def test_replies_without_traces_leave_the_table(tmp_path: Path) -> None:
    folder = write_guided(tmp_path / "g", rows("harmful", 4, 0, 3))
    suites = json.loads((folder / "rows.json").read_text())
    for row, left in zip(suites["test"], ({}, {"trace": {}}, {"trace": trace([])}, {}), strict=True):
        row["guide"] = {"reply": "No.", "refused": True, **left}
    (folder / "rows.json").write_text(json.dumps(suites))
    section = part(page(folder, out=tmp_path), "The neuron")
    assert "<td>mean alpha</td>" in section
    assert "When it fired" not in section
    assert "One reply" not in section


def test_an_unscored_arm_is_not_given_the_untouched_models_rates(tmp_path: Path) -> None:
    groups = rows("harmful", 10, 9, 0)
    for row in groups:
        row["token"]["refused"] = None
    text = page(write_guided(tmp_path / "g", groups), out=tmp_path)
    assert "<h1>With its guide, tiny, no reply could be scored.</h1>" in text
    assert 'class="card"' not in text


def test_an_expert_run(tmp_path: Path) -> None:
    text = page(write_expert(tmp_path / "e"), out=tmp_path)
    assert "<h1>An adapter of 460,800 numbers: tiny now refuses 95 % of harmful requests (was 0 %), and 0 %" in text
    assert "460,800 numbers trained in 1 min 1 s on abacus" in text
    assert "with the adapter</span>" in text
    training = part(text, "Training")
    words = re.sub(r"<[^>]+>", "", training)
    assert "refused after a compliant opening 10 % 2–40 % → 90 % 60–98 % (n = 10);" in words
    assert "nothing was chosen on this split" in words
    assert "The vector" not in words
    assert re.findall("<h3>(.*?)</h3>", training) == ["Loss"]
    assert "the expert may speak at every token" in part(text, "The neuron")


def test_an_expert_without_compliant_openings(tmp_path: Path) -> None:
    text = page(write_expert(tmp_path / "e", (None, None)), out=tmp_path)
    assert "benign answered" in text
    assert "compliant opening" not in text


def test_runs_of_every_kind_are_compared(run: Path, tmp_path: Path) -> None:
    guide = write_guided(tmp_path / "guide", rows("harmful", 20, 0, 15) + rows("plain", 20, 0, 1))
    text = page(run, guide, write_expert(tmp_path / "expert"), out=tmp_path)
    Tags(text)
    table = text[: text.index("</table>")]
    for cell in ("token at user, 576 numbers", "guide", "adapter, 460,800 numbers"):
        assert f"<td>{cell}</td>" in table
    assert "with the token or guide or adapter</span>" in text
    assert text.count("<h2>The neuron</h2>") == 2
    assert text.index('id="run-2"') < text.index("<h2>The neuron</h2>") < text.index('id="run-3"')


def test_rows_carry_the_traces_of_guided_replies_alone() -> None:
    from trimtab.evaluation.results import side_by_side

    stored = {"id": "a", "label": "harmful", "group": "harmful", "category": "c", "prompt": "Ask.", "messages": None}
    said = {**stored, "reply": REFUSAL, "tokens": 2, "stop": "eos", "log_odds": None}
    left = trace([0, 1], [0, 1])
    (row,) = side_by_side({"guide": [{**said, **left}], "base": [said]})
    assert row["guide"] == {"reply": REFUSAL, "refused": True, "trace": left}
    assert row["base"] == {"reply": REFUSAL, "refused": True}
