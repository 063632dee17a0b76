"""The command line as scripts use it: exit codes, JSON on stdout, errors without a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from conftest import build, vectors_for
from test_align import records
from test_guided import relative
from trimtab import cli
from trimtab.config import AlignCommand, ChatSettings, EvalSettings, ExpertCommand, GenerateSettings
from trimtab.decoding.generate import generate
from trimtab.models import Model, load
from trimtab.neuron.guide import Guide
from trimtab.neuron.risk import ConstantRisk
from trimtab.softtoken.artifact import SoftToken

FAST = ["--steps", "3", "--batch", "2", "--position", "assistant", "--check", "12"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in records(6)))
    return path


def saved(model: Model, path: Path) -> Path:
    """A tiny model as a Hugging Face folder."""
    model.network.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def token_run(folder: Path, tmp_path: Path) -> Path:
    """A soft token that makes a difference, not trained."""
    model = load(folder)
    return SoftToken.of(model, vectors_for(model, 2, 30.0), "user").save(tmp_path / "token-run")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `trimtab ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_align_eval_generate_report(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "run"
    code, out, err = run(monkeypatch, capsys, "align", folder, "-o", token, "--data", data, *FAST, "--json")
    assert code == 0, err
    aligned = json.loads(out.strip().splitlines()[-1])
    assert aligned["token"]["numbers"] == 32
    assert {p.name for p in token.iterdir()} >= {"token", "manifest.json", "report.html", "filter.json", "history.json"}

    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join(r.model_dump_json() + "\n" for r in records(3, ("test",))))
    arguments = ["eval", folder, "--token", token, "--suite", suite, "-o", tmp_path / "eval", "--compare"]
    code, out, err = run(monkeypatch, capsys, *arguments, "--max-new-tokens", 4, "--json")
    assert code == 0, err
    found = json.loads(out.strip().splitlines()[-1])
    assert found["suites"]["suite"]["n"] == 9
    for label in ("harmful", "benign"):
        for judge in ("keyword", "logit"):
            assert set(found["suites"]["suite"][label][judge]) >= {"refusal_rate", "ci95", "unscored"}
    assert 0 <= found["auc"]["suite"] <= 1
    assert "paired" in found
    assert (tmp_path / "eval" / "report.html").exists()

    # The same command again makes no reply anew.
    before = (tmp_path / "eval" / "replies.jsonl").read_bytes()
    code, out, _ = run(monkeypatch, capsys, *arguments, "--max-new-tokens", 4, "--json")
    assert json.loads(out.strip().splitlines()[-1])["suites"] == found["suites"]
    assert (tmp_path / "eval" / "replies.jsonl").read_bytes() == before

    prompts = tmp_path / "in.jsonl"
    prompts.write_text(
        '{"id": "b", "prompt": "Hello there", "more": 1}\n{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}\n'
    )
    replies = tmp_path / "out.jsonl"
    code, _, err = run(
        monkeypatch, capsys, "generate", folder, prompts, "-o", replies, "--token", token, "--max-new-tokens", 5
    )
    assert code == 0, err
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["b", "a"]
    assert all(set(line) == {"id", "reply", "tokens", "stop"} and line["tokens"] <= 5 for line in lines)

    page = tmp_path / "page.html"
    assert run(monkeypatch, capsys, "report", token, tmp_path / "eval", "-o", page)[0] == 0
    assert "<html" in page.read_text()


EXPERT = ["--expert", "token:{tmp}/token-run"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["align", "smollm2-135", "-o", "{tmp}/x"], 2, "Did you mean smollm2-135m?"),
        (["align", "{tmp}", "-o", "{tmp}/x"], 2, "config.json is missing"),
        (["align", "{model}", "-o", "{tmp}/x", "--data", "{tmp}/none.jsonl"], 2, "no file"),
        (["align", "{model}", "-o", "{tmp}/x", "--data", "{tmp}/empty.jsonl"], 2, "holds no prompts"),
        (["align", "{model}", "-o", "{tmp}/x", "--data", "{tmp}/bad.jsonl"], 2, "line 2: not JSON"),
        (["align", "{model}", "-o", "{tmp}/x", "--data", "{tmp}/label.jsonl"], 2, "line 1, field label"),
        (["align", "{model}", "-o", "{tmp}/x", "--data", "{tmp}/one.jsonl"], 2, "no harmful prompts"),
        (["align", "{model}", "-o", "{tmp}/x", "--data", "hf:owner/name"], 2, "names no revision"),
        (["align", "{model}", "-o", "{tmp}/x", "--tokens", "0"], 2, "tokens: input should be greater"),
        (["align", "{model}", "-o", "{tmp}/x", "--tokens", "4000"], 2, "less than or equal to 128"),
        (["align", "{model}", "-o", "{tmp}/x", "--position", "middle"], 2, "position"),
        (["align", "{model}", "-o", "{tmp}/empty.jsonl"], 1, "cannot write to the run folder"),
        (["align", "{model}", "-o", "{tmp}/x", "--config", "{tmp}/typo.toml"], 2, "Did you mean steps"),
        (["align", "{model}"], 2, "--out"),
        (["align", "{model}", "-o", "{tmp}/x", "--stepz", "3"], 2, "--stepz"),
        (["eval", "{model}", "-o", "{tmp}/x", "--token", "{tmp}/nowhere"], 2, "no folder"),
        (["eval", "{model}", "-o", "{tmp}/x", "--token", "{tmp}"], 1, "holds no token"),
        (["eval", "{model}", "-o", "{tmp}/x", "--expert", "lora:{tmp}/nowhere"], 2, "no folder"),
        (["report", "{tmp}/nowhere", "-o", "{tmp}/r.html"], 2, "no folder"),
        (["eval", "{model}", "-o", "{tmp}/x", "--suite", "builtin:tset"], 2, "Did you mean test?"),
        (["report", "{tmp}", "-o", "{tmp}/r.html"], 1, "no finished run"),
        (["generate", "{model}", "{tmp}/none.jsonl", "-o", "{tmp}/o.jsonl"], 2, "no file"),
        (["generate", "{model}", "{tmp}/empty.jsonl", "-o", "{tmp}/o.jsonl"], 2, "holds no prompts"),
        (["generate", "{model}", "{tmp}/broken.jsonl", "-o", "{tmp}/o.jsonl"], 2, "line 1: not JSON"),
        (["generate", "{model}", "{tmp}/one.jsonl", "-o", "{tmp}/o.jsonl", "--top-p", "0"], 2, "top_p: input should"),
        (
            ["generate", "{model}", "{tmp}/one.jsonl", "-o", "{tmp}/o.jsonl", *EXPERT, "--alpha", "2"],
            2,
            "alpha table '2'",
        ),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--alpha", "-0.1"], 2, "a number in the range [0, 1]"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--threshold", "0"], 2, "threshold: input should be greater"),
        (["chat", "{model}", *EXPERT, "--threshold", "nan"], 2, "threshold: input should be greater"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--neuron", "lof"], 2, "unknown neuron 'lof'"),
        (["chat", "{model}", *EXPERT, "--neuron", "random:1.5"], 2, "must be in [0, 1] (given: 1.5)"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--risk", "const:11"], 2, "a risk must be a number in [0, 10]"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--risk", "gaurd:x"], 2, "unknown rater 'gaurd:x'"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--divergence", "l2"], 2, "divergence: input should be 'tv'"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--draft", "65"], 2, "draft: input should be less"),
        (["eval", "{model}", "-o", "{tmp}/x", *EXPERT, "--token", "{tmp}/token-run"], 2, "Give one of them"),
        (
            ["generate", "{model}", "{tmp}/one.jsonl", "-o", "{tmp}/o.jsonl", "--trace", "{tmp}/t.jsonl"],
            2,
            "what a neuron did",
        ),
        (["chat", "{model}", "--trace", "--token", "{tmp}/token-run"], 2, "what a neuron did"),
        (["chat", "{model}", "--expert", "token:{tmp}/nowhere"], 2, "no folder"),
        (["chat", "{model}", "--expert", "{tmp}/token-run"], 2, "names no expert"),
        (["chat", "{model}", "--expert", "model:{model}"], 1, "is the base model itself"),
        (["chat", "{model}", "--expert", "model:{other}"], 1, "has another vocabulary"),
        (["chat", "{other}", *EXPERT], 1, "was trained on"),
        (["expert", "{model}", "-o", "{tmp}/x", "--data", "{tmp}/one.jsonl"], 2, "no harmful prompts"),
        (["expert", "{model}", "-o", "{tmp}/x", "--rank", "0"], 2, "rank: input should be greater"),
        (["expert", "{model}", "-o", "{tmp}/x", "--prefix-share", "2"], 2, "prefix_share: input should be less"),
    ],
)
def test_bad_input_is_told_plainly(
    arguments: list[str],
    code: int,
    says: str,
    folder: Path,
    token_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = saved(build("llama", "default", reserved=2), tmp_path / "other") if "{other}" in str(arguments) else None
    good = '{"prompt": "hello there", "label": "benign"}\n'
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text(good + "{no json\n")
    (tmp_path / "broken.jsonl").write_text("{no json\n7\n")
    (tmp_path / "label.jsonl").write_text('{"prompt": "x", "label": "evil"}\n')
    (tmp_path / "one.jsonl").write_text("".join(good.replace("there", f"there {i}") for i in range(40)))
    (tmp_path / "typo.toml").write_text("stepps = 3\n")
    found = run(monkeypatch, capsys, *(a.format(tmp=tmp_path, model=folder, other=other) for a in arguments))
    assert found[0] == code, found
    assert says in " ".join(found[2].split())
    assert "Traceback" not in found[2]


# Under guidance


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_under_attack(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, out = tmp_path / "suite.jsonl", tmp_path / "eval"
    suite.write_text("".join(r.model_dump_json() + "\n" for r in records(2, ("test",))))
    arguments = ["eval", folder, "--suite", suite, "-o", out, "--max-new-tokens", 4, "--json"]
    code, text, err = run(monkeypatch, capsys, *arguments, "--attack", "past", "--attack", "prefill:3")
    assert code == 0, err
    found = json.loads(text)["suites"]
    harmful = found["suite"]["harmful"]["n"]
    assert {name: part["n"] for name, part in found.items()} == {
        "suite": found["suite"]["n"], "suite+past": harmful, "suite+prefill:3": harmful,
    }  # fmt: skip
    assert "suite+prefill:3" in (out / "report.html").read_text()
    code, _, err = run(monkeypatch, capsys, *arguments, "--attack", "pasta")
    assert code == 2
    assert "unknown attack 'pasta'" in err


def test_eval_with_an_expert(
    folder: Path, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, out = tmp_path / "suite.jsonl", tmp_path / "eval"
    suite.write_text("".join(r.model_dump_json() + "\n" for r in records(2, ("test",))))
    arguments = ["eval", folder, "--expert", f"token:{token_run}", "--suite", suite, "-o", out, "--compare"]
    arguments += ["--neuron", "paper", "--threshold", "0.5", "--risk", "const:9", "--max-new-tokens", 4, "--json"]
    code, text, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    found = json.loads(text)  # and nothing else on stdout
    assert found["arm"] == "guide"
    assert {"base", "paired", "guide", "report"} <= set(found)
    assert found["guide"]["neuron"]["keep"] == 0
    assert found["guide"]["neuron"]["threshold"] == 0.5
    assert found["guide"]["risk"] == "ConstantRisk(risk=9.0)"
    assert found["neuron"]["suite"]["harmful"]["mean_alpha"] == pytest.approx(0.9)
    assert 0 < found["neuron"]["suite"]["harmful"]["spike_rate"] <= 1
    assert "<html" in (out / "report.html").read_text()

    before = (out / "replies.jsonl").read_bytes()
    code, text, err = run(monkeypatch, capsys, *arguments)
    assert (code, json.loads(text)["suites"]) == (0, found["suites"])
    assert (out / "replies.jsonl").read_bytes() == before
    # Another judge reads the same replies. Another threshold is another measurement, whose results take the place of these, and that is said; the
    # untouched model stays as it was measured.
    code, _, err = run(monkeypatch, capsys, *arguments, "--judge", "phrase")
    assert (code, "give way" in err) == (0, False)
    assert (out / "replies.jsonl").read_bytes() == before
    arguments[arguments.index("0.5")] = "0.6"
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "they give way; all replies are kept" in " ".join(err.split())
    assert len(lines_of(out / "replies.jsonl")) == len(before.splitlines()) + 6


def test_generate_with_an_expert_and_a_trace(
    folder: Path, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, trace = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "new" / "trace.jsonl"
    prompts.write_text('{"id": "b", "prompt": "the inn"}\n{"id": "a", "prompt": "Hi", "prefill": "I "}\n')
    arguments = ["generate", folder, prompts, "-o", out, "--expert", f"token:{token_run}", "--trace", trace]
    code, text, err = run(monkeypatch, capsys, *arguments, "--risk", "const:9", "--max-new-tokens", 5, "--json")
    assert code == 0, err
    assert json.loads(text) == {"out": str(out), "n": 2, "failed": 0, "unrated": 0}

    model = load(folder)
    guide = Guide(SoftToken.load(token_run), risk=ConstantRisk(9))
    expected = generate(model, ["the inn", "Hi"], guide=guide, prefills=["", "I "], max_new_tokens=5)
    assert [line["reply"] for line in lines_of(out)] == [reply.text for reply in expected]
    steps = lines_of(trace)
    assert [(s["id"], s["token"]) for s in steps] == [
        (name, place) for name, reply in zip("ba", expected, strict=True) for place in range(len(reply.trace))
    ]
    assert [s["chosen"] for s in steps] == [step.chosen for reply in expected for step in reply.trace]
    assert [s["potential"] for s in steps] == pytest.approx([t.potential for r in expected for t in r.trace], abs=1e-4)
    assert all(s["chosen_text"] == model.tokenizer.decode([s["chosen"]]) for s in steps)


def test_a_trace_that_cannot_be_written_is_told_before_the_model_loads(
    token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "file").write_text("")
    code, _, err = run(
        monkeypatch, capsys, "generate", "no-such-model", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl",
        "--trace", tmp_path / "file" / "trace.jsonl", "--expert", f"token:{token_run}",
    )  # fmt: skip
    assert code == 1
    assert "cannot write" in err


def test_bad_lines_are_left_out_and_the_others_done(
    folder: Path, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told with their numbers on stderr; the good ones as if they were alone, in their places; exit code 1."""
    prompts, out = tmp_path / "in [bold].jsonl", tmp_path / "out.jsonl"  # which is no markup
    bad = {
        2: ("{no json", "line 2: not JSON"),
        3: ('["Hi"]', "line 3: a list, not an object"),
        5: ('{"id": "e"}', "line 5, field prompt: missing or empty"),
        6: ('{"prompt": 7}', "line 6, field messages.0: a turn needs a role and content"),
        7: ('{"messages": [{"content": "Hi"}]}', "line 7, field messages.0: a turn needs a role"),
        9: ('{"prompt": "Hi", "prefill": 3}', "line 9, field prefill: input should be a valid string"),
    }
    good = {1: "the inn", 8: "Hi", 11: "why"}
    long = json.dumps({"id": "long", "prompt": "x" * 600})
    rows = {n: line for n, (line, _) in bad.items()} | {n: json.dumps({"prompt": w}) for n, w in good.items()}
    for expert in ([], ["--expert", f"token:{token_run}"]):
        prompts.write_text("\n".join({**rows, 4: "", 10: long}[n] for n in range(1, 12)) + "\n")
        arguments = ["generate", folder, prompts, "-o", out, *expert, "--max-new-tokens", 4, "--json"]
        code, text, err = run(monkeypatch, capsys, *arguments)
        assert code == 1
        assert json.loads(text) == {"out": str(out), "n": 10, "failed": 7, "unrated": 0}
        told = "".join(err.split())
        for _, says in bad.values():
            assert "".join(f"{prompts}, {says}".split()) in told
        assert "apromptof" in told
        assert "Traceback" not in err

        found = lines_of(out)
        names = ["1", "line-2", "line-3", "line-5", "line-6", "line-7", "8", "line-9", "long", "11"]
        assert [line["id"] for line in found] == names
        assert [line["id"] for line in found if line["stop"] != "error"] == ["1", "8", "11"]
        assert all(line["reply"] == "" and line["tokens"] == 0 for line in found if "error" in line)
        prompts.write_text("".join(json.dumps({"id": str(n), "prompt": w}) + "\n" for n, w in good.items()))
        assert run(monkeypatch, capsys, *arguments)[0] == 0
        assert lines_of(out) == [line for line in found if "error" not in line]


def test_chat_reads_stdin_to_its_end(
    folder: Path, token_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", folder, "--max-new-tokens", 3, "--json"]
    for more in ([], ["--token", token_run], ["--expert", f"token:{token_run}", "--risk", "const:9", "--trace"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nthe inn\n"))
        code, text, err = run(monkeypatch, capsys, *arguments, *more)
        assert code == 0, err
        turns = json.loads(text)["messages"]  # and nothing else on stdout
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
        assert [turn["content"] for turn in turns[::2]] == ["Hi", "the inn"]
        assert ("alpha 0.9; " in err) == ("--trace" in more)
    model, guide = load(folder), Guide(SoftToken.load(token_run), risk=ConstantRisk(9))
    assert turns[3]["content"] == generate(model, [turns[:3]], guide=guide, max_new_tokens=3)[0].text


def test_chat_draws_and_ends_replies_as_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5, "max_new_tokens": 8}
    expected = generate(load(folder), ["Hi"], **options)[0].text
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    for more, said in (([], expected), (["--stop", expected[3]], expected[: expected.index(expected[3])])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        code, text, _ = run(monkeypatch, capsys, "chat", folder, "--json", *arguments, *more)
        assert (code, json.loads(text)["messages"][1]["content"]) == (0, said)


def test_chat_is_over_at_an_empty_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nHi\n"))
    assert run(monkeypatch, capsys, "chat", folder, "--json")[:2] == (0, '{"messages": []}\n')


def test_an_expert_is_trained_checked_and_heard(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "expert"
    arguments = ["expert", folder, "-o", out, "--data", data, "--steps", 12, "--batch", 2, "--rank", 2, "--check", 9]
    arguments += ["--learning-rate", 0.1, "--max-prefix", 4, "--benign-weight", 0.3, "--json"]
    code, text, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    found = json.loads(text)
    assert found["adapter"]["numbers"] > 0
    assert found["check"]["arm"] == "guide"
    assert found["check"]["suites"]["held-out"]["n"] == 9
    assert found["check"]["answers_paired"]["builtin-answers"]["n"] == 60  # what it costs in right answers
    assert "right answers, builtin-answers:" in " ".join(err.split())
    # By itself: always on, at full strength.
    assert found["check"]["neuron"]["held-out"]["harmful"]["mean_alpha"] == 1
    assert found["check"]["neuron"]["held-out"]["harmful"]["spike_rate"] == 1
    assert {"manifest.json", "history.json", "report.html", "eval", "adapter"} <= {p.name for p in out.iterdir()}
    assert "refused after a compliant opening" in " ".join(err.split())  # as stdout is for JSON

    # The same command again trains and generates nothing.
    replies = (out / "eval" / "replies.jsonl").read_bytes()
    code, text, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "finished; nothing to train" in " ".join(err.split())
    assert (out / "eval" / "replies.jsonl").read_bytes() == replies
    assert json.loads(text)["check"]["suites"] == found["check"]["suites"]

    (tmp_path / "in.jsonl").write_text('{"prompt": "the inn"}\n')
    said = []
    for alpha in ("0", "1"):
        arguments = ["generate", folder, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--max-new-tokens", 8]
        arguments += ["--expert", f"lora:{out}", "--neuron", "always", "--risk", "const:9", "--alpha", alpha]
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 0, err
        said.append(lines_of(tmp_path / "out.jsonl")[0]["reply"])
    assert said[0] == generate(load(folder), ["the inn"], max_new_tokens=8)[0].text
    assert said[1] != said[0]


def test_a_model_of_its_own_guides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drafted or not, the same replies; a copy of the base in another folder is still the base."""
    model = load(folder)
    other = saved(relative(model, 0.15), tmp_path / "relative")
    (tmp_path / "in.jsonl").write_text('{"prompt": "the inn"}\n{"prompt": "Hi"}\n')
    arguments = ["generate", folder, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--max-new-tokens", 8]
    arguments += ["--risk", "const:9", "--expert"]
    said = []
    for draft in (0, 4):
        code, _, err = run(monkeypatch, capsys, *arguments, f"model:{other}", "--draft", draft)
        assert code == 0, err
        said.append(lines_of(tmp_path / "out.jsonl"))
    assert said[0] == said[1]
    guide = Guide(load(other), risk=ConstantRisk(9))
    assert [line["reply"] for line in said[0]] == [
        reply.text for reply in generate(model, ["the inn", "Hi"], guide=guide, max_new_tokens=8)
    ]
    shutil.copytree(folder, tmp_path / "copy")
    code, _, err = run(monkeypatch, capsys, *arguments, f"model:{tmp_path / 'copy'}")
    assert code == 1
    assert "is the base model itself" in " ".join(err.split())


def test_json_says_errors_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "align", "nope", "-o", "x", "--json")
    assert code == 2
    assert json.loads(out)["kind"] == "ModelError"
    code, out, _ = run(monkeypatch, capsys, "align", "nope", "--json", "--stepz", 3)
    assert (code, json.loads(out)["kind"]) == (2, "UsageError")
    assert "--stepz" in json.loads(out)["error"]


def test_input_that_ends_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ended(**_: Any) -> None:
        raise EOFError

    monkeypatch.setattr("trimtab.doctor.examine", ended)
    code, out, err = run(monkeypatch, capsys, "doctor", "--json")
    assert (code, json.loads(out)["kind"]) == (1, "Abort")
    assert "Traceback" not in err


def test_what_nobody_foresaw_ends_with_a_traceback_and_an_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trimtab.doctor.examine", lambda: 1 / 0)
    code, out, err = run(monkeypatch, capsys, "doctor", "--json")
    assert (code, json.loads(out)) == (1, {"error": "division by zero", "kind": "ZeroDivisionError"})
    assert "Traceback" in err


def test_results_go_to_stdout_unless_json_does(
    folder: Path, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join(r.model_dump_json() + "\n" for r in records(2, ("test",))))
    arguments = ["eval", folder, "--token", token_run, "--suite", suite, "-o", tmp_path / "e", "--max-new-tokens", 3]
    code, out, err = run(monkeypatch, capsys, *arguments, "--compare")
    assert code == 0, err
    assert "refused now" in " ".join(out.split())
    assert "(before: " in out
    assert f"Report: {tmp_path}/e/report.html\n" in out
    assert "refused now" not in err
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    assert json.loads(out)["arm"] == "token"
    assert "AUC of refusal log-odds" in err


VERBS = {
    "align": AlignCommand,
    "eval": EvalSettings,
    "generate": GenerateSettings,
    "chat": ChatSettings,
    "expert": ExpertCommand,
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_default(verb: str) -> None:
    """The help is written by hand, so that it needs no settings to be imported."""
    group: Any = typer.main.get_command(cli.app)
    for parameter in group.commands[verb].params:
        field = VERBS[verb].model_fields.get(parameter.name)
        if field is None or field.is_required() or isinstance(field.default, bool | Path):
            continue
        default = field.default
        said = (
            ", ".join(default)
            if isinstance(default, tuple)
            else f"{default:g}"
            if isinstance(default, float)
            else default
        )
        if said not in (None, ""):
            assert f" [{said}]" in parameter.help, parameter.name


def test_config_file_and_options_agree(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text('steps = 2\nbatch = 2\nposition = "reply"\ncheck = 0\n')
    code, _, err = run(
        monkeypatch,
        capsys,
        "align",
        folder,
        "-o",
        tmp_path / "r",
        "--data",
        data,
        "--config",
        tmp_path / "c.toml",
        "--position",
        "user",
    )
    assert code == 0, err
    settings = json.loads((tmp_path / "r" / "manifest.json").read_text())["settings"]
    assert (settings["steps"], settings["position"]) == (2, "user")  # the option has the last word


def test_no_network_for_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = run(monkeypatch, capsys, "align", "nobody/nothing", "-o", tmp_path / "x")
    assert code == 2
    assert "nobody/nothing" in err
    assert "HF_HUB_OFFLINE" in err


def test_ctrl_c_exits_130_and_says_how_to_go_on(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trimtab.softtoken.train import Trainer

    take_step = Trainer.take_step

    def interrupted(self: Trainer, radius: float, weight: float) -> None:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(self, radius, weight)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    code, out, err = run(monkeypatch, capsys, "align", folder, "-o", tmp_path / "r", "--data", data, *FAST, "--json")
    assert code == 130
    assert json.loads(out)["kind"] == "KeyboardInterrupt"
    assert "run the same command again to go on" in " ".join(err.split())
    assert (tmp_path / "r" / "checkpoint.safetensors").exists()


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "doctor", "--json")
    assert code == 0
    assert {"packages", "device", "memory"} <= {f["what"] for f in json.loads(out)["findings"]}


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys, trimtab.cli as c; sys.argv = ['trimtab', '--help']\ntry: c.main()\nfinally: sys.exit('torch' in sys.modules)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0
    assert "align" in done.stdout
    # The promise is 0.3 s; a loaded machine gets room, an import of torch (seconds) does not.
    assert time.perf_counter() - started < 2


def test_export_writes_a_checkpoint_and_a_dry_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, errors = run(monkeypatch, capsys, "export", token_run, "-o", out, "--dry-run")
    assert (code, out.exists()) == (0, False), errors
    assert "model.safetensors" in said
    assert "behind the tokenizer's last word: the table grows" in said
    code, said, errors = run(monkeypatch, capsys, "export", token_run, "-o", out, "--json")
    assert code == 0, errors
    result = json.loads(said.splitlines()[-1])
    assert result["verified"]["replies_equal"] == result["verified"]["probes"]
    assert "verified: loaded by transformers alone" in errors
    card = (out / "README.md").read_text()
    assert "Whoever holds the weights, or may write the prompt, can leave the token out" in card
    assert "<|trimtab_0|><|trimtab_1|>" in card
    assert "No measurement came with this token." in card
    code, _, errors = run(monkeypatch, capsys, "export", token_run, "-o", out)
    assert code == 1
    assert "holds an export already.\n  Give another folder with -o, or --force to replace it." in errors
    code, _, _ = run(monkeypatch, capsys, "export", token_run, "-o", out, "--force", "--no-verify")
    assert code == 0
    assert "**Not verified**" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--format", "onnx"], 2, "format: input should be 'hf', 'gguf' or 'peft'"),
        (["--format", "gguf"], 1, "was not read from a GGUF file"),
        (["--format", "peft", "--untie"], 2, "--untie is about a head, which an adapter does not hold"),
        (["--model", "nowhere/at-all/here"], 2, "no model 'nowhere/at-all/here'"),
    ],
)
def test_what_cannot_be_exported_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    token_run: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    found, _, errors = run(monkeypatch, capsys, "export", token_run, "-o", tmp_path / "out", *arguments)
    assert (found, words in errors) == (code, True), errors
    assert not (tmp_path / "out").exists()


def test_export_of_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, errors = run(monkeypatch, capsys, "export", tmp_path / "nothing", "-o", tmp_path / "out")
    assert (code, "no folder" in errors) == (2, True), errors
