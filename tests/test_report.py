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

from trimtab.errors import RunError, UsageError
from trimtab.evaluation.metrics import mcnemar, wilson
from trimtab.report import plots
from trimtab.report.build import auc_interval, build, cut, duration, percent

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
                pairs = [(r["base"]["refused"], r["token"]["refused"]) for r in part if r["label"] == label]
                pairs = [pair for pair in pairs if None not in pair]
                p = mcnemar([b for b, _ in pairs], [a for _, a in pairs])
                gained, lost = sum(a and not b for b, a in pairs), sum(b and not a for b, a in pairs)
                verdict = {"now_refused": gained, "now_answered": lost, "p": p}
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
        files |= {"eval/results": results(suites), "eval/rows": suites}
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
    pairs = re.findall(r'<article class="pair" style="--c: var\(--(\w+)\)">(.*?)</article>', whole, re.DOTALL)
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


@pytest.mark.parametrize("made", [(), ("run.json",), ("history.json",)])
def test_a_folder_that_is_no_run_is_named(made: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    for name in made:
        (folder / name).write_text("{}")
    with pytest.raises(RunError, match=re.escape(str(folder))):
        build([folder], tmp_path / "report.html")
    with pytest.raises(RunError, match="nowhere"):
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
    harmful = cells[:9]
    assert harmful[:4] == ["test", "keyword", "harmful", "100"]
    assert harmful[6:9] == ["0 → 0", "+92, −0", "&lt; 0.001"]
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


def test_a_jump_of_the_loss_is_explained(tmp_path: Path) -> None:
    steps = [{**step, "reply_tokens": 1 if step["step"] < 3 else 4} for step in history(4)]
    wide, even = write_run(tmp_path / "wide", history=steps), write_run(tmp_path / "even")
    sentence = "From step 3 on the loss adds the words after the decision (4 tokens"
    assert sentence in page(wide, out=tmp_path / "wide.html")
    assert "From step" not in page(even, out=tmp_path / "even.html")
