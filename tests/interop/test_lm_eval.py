"""lm-evaluation-harness runs its tasks on a model of ours, with a token and under a guide (`make interop`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance

from trimtab.bridges.lm_eval import TrimtabLM, _sampling
from trimtab.decoding.generate import generate
from trimtab.decoding.likelihood import likelihood
from trimtab.errors import ConfigError

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


STOPS = list("aeiou \n0123456789")  # what a random model soon says one of


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    rows = [{"q": f"What is {i}?", "a": i % 3} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    return [
        {**shared, "task": "choose", "output_type": "multiple_choice", "doc_to_choice": ["one", "two", "three"], "doc_to_target": "a",
         "metric_list": [{"metric": "acc"}]},
        {**shared, "task": "write", "output_type": "generate_until", "doc_to_target": "{{a}}", "metric_list": [{"metric": "exact_match"}],
         "generation_kwargs": {"until": STOPS, "max_gen_toks": 12}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "guidance", [{}, {"token": True}, {"expert": True, "risk": "const:7", "neuron": "primed", "alpha": 0.9}]
)
def test_tasks_run(guidance: dict[str, Any], folder: Path, token_run: Path, tmp_path: Path) -> None:
    arguments = guidance | {
        name: value for name, value in (("token", str(token_run)), ("expert", f"token:{token_run}")) if name in guidance
    }
    lm = TrimtabLM(str(folder), **arguments)
    found = lm_eval.simple_evaluate(lm, tasks=tasks(tmp_path), apply_chat_template=True, log_samples=True)
    assert set(found["results"]) == {"choose", "write"}
    assert 0 <= found["results"]["choose"]["acc,none"] <= 1
    model, options = lm.model, lm.guidance
    asked = [[{"role": "user", "content": f"What is {i}?"}] for i in range(6)]
    written = {s["doc"]["q"]: s["resps"][0][0] for s in found["samples"]["write"]}
    ours = generate(model, asked, max_new_tokens=12, stop=STOPS, **options)
    assert any(reply.stop == "stop" for reply in ours)
    assert written == {chat[0]["content"]: reply.text for chat, reply in zip(asked, ours, strict=True)}
    chosen = {s["doc"]["q"]: [resp[0][0] for resp in s["resps"]] for s in found["samples"]["choose"]}
    ours_too = [p for p, _ in likelihood(model, [asked[2]] * 3, ["one", "two", "three"], **options)]
    assert [float(p) for p in chosen["What is 2?"]] == pytest.approx(ours_too, abs=2e-3)


def test_a_conversation_crosses_as_it_is(folder: Path, token_run: Path) -> None:
    lm = TrimtabLM(str(folder), token=str(token_run))
    turns = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "Hi\nyou"}]
    plain, begun = (
        lm.apply_chat_template(turns),
        lm.apply_chat_template([*turns, {"role": "assistant", "content": "The"}], False),
    )
    said = lm.generate_until(
        [request("generate_until", text, {"until": "Z", "max_gen_toks": 4}) for text in (plain, begun)]
    )
    ours = generate(lm.model, [turns, turns], prefills=["", "The"], stop=["Z"], max_new_tokens=4, **lm.guidance)
    assert said == [reply.text for reply in ours]
    bare = lm.generate_until([request("generate_until", "Q: Hi\nA:", {"max_gen_toks": 4})])
    assert bare == [generate(lm.model, ["Q: Hi\nA:"], max_new_tokens=4, **lm.guidance)[0].text]


def test_the_command_line_of_the_harness(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token_run: Path
) -> None:
    import sys

    from lm_eval.__main__ import cli_evaluate

    task = tmp_path / "tasks"
    task.mkdir()
    import yaml

    (task / "choose.yaml").write_text(yaml.safe_dump(tasks(tmp_path)[0]))
    arguments = [
        "run",
        "--model",
        "trimtab",
        "--model_args",
        f"pretrained={folder},token={token_run}",
        "--tasks",
        "choose",
        "--include_path",
        str(task),
    ]
    monkeypatch.setattr(
        sys, "argv", ["lm-eval", *arguments, "--apply_chat_template", "--output_path", str(tmp_path / "out")]
    )
    cli_evaluate()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["choose"]


def test_what_is_refused(folder: Path) -> None:
    lm = TrimtabLM(str(folder))
    with pytest.raises(ConfigError, match="bare text"):
        lm.loglikelihood_rolling([request("loglikelihood_rolling", "Some text.")])
    with pytest.raises(ConfigError, match="unknown setting 'tokn'"):
        TrimtabLM(str(folder), tokn="x")


def test_a_conversation_too_long_gets_an_empty_reply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = TrimtabLM(str(folder))
    said = lm.generate_until([request("generate_until", text, {"max_gen_toks": 4}) for text in ("x" * 900, "Hi")])
    assert said[0] == ""
    assert said[1] != ""
    assert "left empty: a prompt of" in " ".join(capsys.readouterr().err.split())


def test_a_continuation_without_room_is_impossible_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = TrimtabLM(str(folder), batch_size="8")
    assert lm.batch_size == 8
    asked = [request("loglikelihood", context, " yes") for context in ("x" * 900, "Hi")] + [
        request("loglikelihood", "Hi", " ")
    ]
    found = lm.loglikelihood(asked)
    assert [p == -math.inf for p, _ in found] == [True, False, True]
    assert "2 continuations are empty, or leave the model no room" in " ".join(capsys.readouterr().err.split())


def test_choices_of_a_question_are_compared_under_the_same_spikes(folder: Path, token_run: Path) -> None:
    lm = TrimtabLM(str(folder), expert=f"token:{token_run}", neuron="random:0.5", risk="const:7")
    found = lm.loglikelihood([request("loglikelihood", f"Q{i // 8}", "yes") for i in range(16)])
    assert len({p for p, _ in found[:8]}) == len({p for p, _ in found[8:]}) == 1


@pytest.mark.parametrize(
    ("asked", "temperature", "length"),
    [
        ({}, None, 256),
        ({"do_sample": False, "temperature": 0.7, "max_tokens": 7}, None, 7),
        ({"do_sample": True, "max_gen_toks": 9}, 1.0, 9),
        ({"temperature": 0.7, "top_p": 0.9}, 0.7, 256),
        ({"temperature": 0.0, "do_sample": True}, None, 256),
    ],
)
def test_what_a_task_asks_for(asked: dict[str, Any], temperature: float | None, length: int) -> None:
    options = _sampling(asked)
    assert (options.get("temperature"), options["max_new_tokens"]) == (temperature, length)
    assert options.get("top_p") == (asked.get("top_p") if temperature else None)


def test_answers_are_cached_by_the_harness(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(lm: Any) -> Any:
        found = lm_eval.simple_evaluate(
            lm, tasks=tasks(tmp_path), apply_chat_template=True, use_cache=str(tmp_path / "cache")
        )
        return found["results"]["write"]["exact_match,none"], found["results"]["choose"]["acc,none"]

    first = results(TrimtabLM(str(folder)))

    def never(*_: Any, **__: Any) -> Callable[..., Any]:
        raise AssertionError("asked again")

    monkeypatch.setattr("trimtab.bridges.lm_eval.generate", never)
    monkeypatch.setattr("trimtab.bridges.lm_eval.likelihood", never)
    assert results(TrimtabLM(str(folder))) == first
