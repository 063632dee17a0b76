"""The command line as scripts use it: exit codes, JSON on stdout, errors without a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from test_align import records
from trimtab import cli

FAST = ["--steps", "3", "--batch", "2", "--position", "assistant", "--check", "12"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in records(6)))
    return path


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
        (["eval", "{model}", "-o", "{tmp}/x", "--token", "{tmp}/nowhere"], 1, "holds no token"),
        (["eval", "{model}", "-o", "{tmp}/x", "--suite", "builtin:tset"], 2, "Did you mean test?"),
        (["report", "{tmp}", "-o", "{tmp}/r.html"], 1, "no finished run"),
        (["generate", "{model}", "{tmp}/none.jsonl", "-o", "{tmp}/o.jsonl"], 2, "no file"),
    ],
)
def test_bad_input_is_told_plainly(
    arguments: list[str],
    code: int,
    says: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = '{"prompt": "hello there", "label": "benign"}\n'
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text(good + "{no json\n")
    (tmp_path / "label.jsonl").write_text('{"prompt": "x", "label": "evil"}\n')
    (tmp_path / "one.jsonl").write_text("".join(good.replace("there", f"there {i}") for i in range(40)))
    (tmp_path / "typo.toml").write_text("stepps = 3\n")
    found = run(monkeypatch, capsys, *(a.format(tmp=tmp_path, model=folder) for a in arguments))
    assert found[0] == code, found
    assert says in " ".join(found[2].split())
    assert "Traceback" not in found[2]


def test_json_says_errors_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "align", "nope", "-o", "x", "--json")
    assert code == 2
    assert json.loads(out)["kind"] == "ModelError"


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
    code, _, err = run(monkeypatch, capsys, "align", folder, "-o", tmp_path / "r", "--data", data, *FAST)
    assert code == 130
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
