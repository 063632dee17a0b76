"""`serve-check` against engines that serve the token, leave it out, double BOS, ignore it, talk nonsense or are not there."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, naive_logits, vectors_for
from trimtab import cli
from trimtab.errors import ConfigError, EndpointError, PathError
from trimtab.exporters.export import export
from trimtab.models import Model, load
from trimtab.serving.check import serve_check
from trimtab.softtoken.artifact import SoftToken

NAME = "<|trimtab_0|>"


@dataclass
class Engine:
    """An exported model behind HTTP, in the `dialect` of vllm, llama.cpp or neither (bare), with one `fault`.

    Attributes:
        answer: instead of a reply: a status, words, or seconds to wait. seen: what was asked, and headers.
    """

    model: Model
    slot: int
    dialect: str = "vllm"
    fault: str = ""
    answer: int | float | str | dict[str, Any] | None = None
    models: Any = field(default_factory=lambda: {"data": [{"id": "served"}]})
    seen: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def ids(self, turns: list[dict[str, str]]) -> list[int]:
        if self.fault == "reads names":  # a template that takes nothing apart
            turns = [{**turn, "content": turn["content"].replace(NAME, "\N{SNOWMAN}")} for turn in turns]
        text = self.model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if self.fault == "no slot":
            text = text.replace(NAME, "")
        if self.fault == "BOS twice":
            text = self.model.tokenizer.bos_token + text
        if self.fault == "slot twice":
            text = NAME + text
        text = text.replace("\N{SNOWMAN}", NAME)
        return self.model.tokenizer.encode(text, add_special_tokens=False)

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """A reply that never says the slot."""
        reply: list[int] = []
        while len(reply) < limit:
            logits = naive_logits(self.model, [*prompt, *reply])[-1]
            token = next(i for i in logits.argsort(descending=True).tolist() if i != self.slot)
            if token in self.model.eos_ids:
                break
            reply.append(token)
        return reply

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = self.ids(body["messages"])
        heard = [i for i in prompt if i != self.slot] if self.fault == "deaf" else prompt
        said = self.greedy(heard, body["max_tokens"])
        if self.fault == "says the slot":
            said[2:3] = [self.slot]
        logits = naive_logits(self.model, heard)[-1]
        if self.fault == "other weights":
            logits = logits.flip(0)
        best = logits.log_softmax(-1).topk(body.get("top_logprobs", 1))
        words = self.model.tokenizer.decode
        named = "token_id:{}" if self.dialect == "vllm" else "{}"
        top = [
            {
                "token": named.format(i if self.dialect == "vllm" else words([i])),
                **({"id": i} if self.dialect == "llama.cpp" else {}),
                "logprob": each,
            }
            for i, each in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        content = self.model.tokenizer.decode(said, skip_special_tokens=True)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": content}}
        answer: dict[str, Any] = {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
        if self.dialect == "silent":
            return {"choices": [choice]}
        if self.dialect != "bare":
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        if self.dialect == "vllm":
            answer["prompt_token_ids"], choice["token_ids"] = prompt, said
        if self.dialect == "llama.cpp":
            answer["__verbose"] = {"prompt": self.model.tokenizer.decode(prompt), "tokens": said}
        return answer


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self) -> None:
        self.engine.seen.append((self.path, None, dict(self.headers)))
        self.send(200 if self.path.endswith("/v1/models") else 404, self.engine.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.engine.seen.append((self.path, body, dict(self.headers)))
        answer = self.engine.answer
        if isinstance(answer, float):
            time.sleep(answer)
        if self.path == "/tokenize":
            ids = self.engine.model.tokenizer.encode(body["content"], add_special_tokens=False)
            self.send(200, {"tokens": ids})
        elif isinstance(answer, int):
            self.send(answer, {"error": {"message": "no such thing"}})
        elif isinstance(answer, str | dict):
            self.send(200, answer)
        elif self.engine.dialect == "bare" and ("logprobs" in body or "verbose" in body):
            self.send(400, {"error": "unknown fields"})
        else:
            self.send(200, self.engine.reply(body))

    def send(self, status: int, body: Any) -> None:
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode() if isinstance(body, str) else json.dumps(body).encode())
        except BrokenPipeError:  # who asked was tired of waiting
            pass

    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Made:
    """A model with a BOS of its own, a token for it, and its export."""

    run: Path
    export: Path
    model: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("serve")
    tiny = build("llama", "bos")
    tiny.network.save_pretrained(home / "model")
    tiny.tokenizer.save_pretrained(home / "model")
    model = load(home / "model")
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    token.save(home / "run")
    export(model, token, home / "export")
    return Made(home / "run", home / "export", home / "model")


@pytest.fixture(scope="module")
def exported(made: Made) -> Model:
    return load(made.export)


@pytest.fixture
def serve(made: Made, exported: Model) -> Iterator[Callable[..., Engine]]:
    running: list[ThreadingHTTPServer] = []
    slot = json.loads((made.export / "trimtab.json").read_text())["plan"]["ids"][0]

    def start(**options: Any) -> Engine:
        engine = Engine(exported, slot, **options)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"engine": engine}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        engine.url = f"http://127.0.0.1:{server.server_port}"
        return engine

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {check["what"]: check["verdict"] for check in found["checks"]}


def why(found: dict[str, Any], what: str) -> str:
    return next(check["why"] for check in found["checks"] if check["what"] == what)


GOOD = {
    "prompt length": "ok",
    "slot once": "ok",
    "BOS once": "ok",
    "effect": "ok",
    "spelled in a message": "ok",
    "never said": "ok",
}
NO_IDS = {"slot once": "unknown", "BOS once": "unknown", "never said": "unknown"}


@pytest.mark.parametrize("known", ["run", "export"])
@pytest.mark.parametrize(
    ("dialect", "expected"),
    [("vllm", GOOD), ("llama.cpp", GOOD), ("plain", GOOD | NO_IDS), ("bare", GOOD | NO_IDS)],
)
def test_a_token_in_effect_is_seen(
    made: Made, serve: Callable[..., Engine], dialect: str, known: str, expected: dict[str, str]
) -> None:
    """By ids and probabilities where the engine gives them, else by lengths and words."""
    engine = serve(dialect=dialect)
    found = serve_check(engine.url, **{known: getattr(made, known)})
    assert (verdicts(found), found["in_effect"]) == (expected, True), found
    assert (found["url"], found["model"]) == (f"{engine.url}/v1", "served")


FAULTS = [
    ("no slot", {"prompt length", "slot once", "effect"}, "slot once", "the engine's chat template does not say it"),
    ("BOS twice", {"prompt length", "BOS once"}, "BOS once", "1 more than in training"),
    ("slot twice", {"prompt length", "slot once"}, "slot once", "2 slot tokens instead of 1 in 7 of 7 prompts"),
    ("deaf", {"effect"}, "effect", "replies begin as the untouched model's"),
    ("other weights", set(), "effect", "replies begin as neither's"),
    ("reads names", {"spelled in a message"}, "spelled in a message", "2 tokens of the slot"),
    ("says the slot", {"never said"}, "never said", "suppress it in the engine"),
]
FAULTS_BY_LENGTH_AND_WORDS = [
    ("no slot", {"prompt length", "effect"}, "prompt length", "the slot is missing: 1 token less"),
    ("BOS twice", {"prompt length"}, "prompt length", "1 token more than in training: BOS is there twice"),
    ("deaf", {"effect"}, "effect", "the untouched model's"),
    ("reads names", {"spelled in a message"}, "spelled in a message", "it is read as the slot"),
]


@pytest.mark.parametrize(
    ("dialect", "fault", "failed", "what", "words"),
    [
        *((dialect, *case) for dialect in ("vllm", "llama.cpp") for case in FAULTS),
        *((dialect, *case) for dialect in ("plain", "bare") for case in FAULTS_BY_LENGTH_AND_WORDS),
    ],
)
def test_every_fault_is_named(
    made: Made, serve: Callable[..., Engine], dialect: str, fault: str, failed: set[str], what: str, words: str
) -> None:
    found = serve_check(serve(dialect=dialect, fault=fault).url, run=made.run)
    seen = {name for name, verdict in verdicts(found).items() if verdict == "failed"}
    # A second BOS or slot also changes what is said; in a random model by chance.
    assert (seen - {"effect"}, seen >= failed) == (failed - {"effect"}, True), found
    assert words in why(found, what)
    assert not found["in_effect"]


def test_what_is_not_told_is_unknown_and_proves_nothing(made: Made, serve: Callable[..., Engine]) -> None:
    found = serve_check(serve(dialect="silent").url, run=made.run)
    assert verdicts(found)["effect"] == "ok"  # by its words
    assert {name for name, verdict in verdicts(found).items() if verdict == "unknown"} == set(GOOD) - {"effect"}


def test_without_weights_the_effect_is_unknown(made: Made, serve: Callable[..., Engine], tmp_path: Path) -> None:
    """A folder with the tokenizer alone still knows the prompts."""
    shutil.copytree(made.export, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    found = serve_check(serve().url, export=tmp_path / "light")
    assert verdicts(found) == GOOD | {"effect": "unknown"}
    assert "no model to compare with" in why(found, "effect")
    assert not found["in_effect"]


def test_another_token_is_not_taken_for_the_served_one(
    made: Made, serve: Callable[..., Engine], tmp_path: Path
) -> None:
    model = load(made.model)
    other = 8 * torch.randn(1, model.hidden_size, generator=torch.Generator().manual_seed(7))
    SoftToken.of(model, other, "assistant").save(tmp_path / "other")
    found = serve_check(serve().url, run=tmp_path / "other")
    assert verdicts(found)["slot once"] == "ok"
    assert "replies begin as neither's" in why(found, "effect")
    assert not found["in_effect"]


def test_a_token_that_moves_next_to_nothing_cannot_be_seen(
    made: Made, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serving.check.AUDIBLE", 0.9)
    found = serve_check(serve().url, run=made.run)
    assert (verdicts(found), found["in_effect"]) == (GOOD | {"effect": "unknown"}, False)


def test_the_right_model_is_asked_with_the_variables_of_training(
    made: Made, serve: Callable[..., Engine], tmp_path: Path
) -> None:
    model = load(made.model)
    SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant", enable_thinking=False).save(tmp_path / "run")
    engine = serve(models={"data": [{"id": "other"}, {"id": "served", "aliases": ["mine"]}]})
    found = serve_check(f"{engine.url}/v1#mine", run=tmp_path / "run")
    assert (found["model"], found["in_effect"]) == ("mine", True)
    asked = [body for path, body, _ in engine.seen if path.endswith("/chat/completions")]
    assert {body["model"] for body in asked} == {"mine"}
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in asked)
    assert all(body["temperature"] == 0 for body in asked)


def test_the_key_is_sent_to_this_machine(
    made: Made, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = serve()
    serve_check(engine.url, run=made.run)
    assert {headers["Authorization"] for _, _, headers in engine.seen} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"models": "<html>hello</html>"}, EndpointError, "is no list of models: '<html>hello</html>'"),
        ({"models": {"data": []}}, ConfigError, "serves 0 models"),
        ({"models": {"data": [{"id": "a"}, {"id": "b"}]}}, ConfigError, "where MODEL is one of: a, b"),
        ({"answer": "<html>hello</html>"}, EndpointError, "answers with no reply: '<html>hello</html>'"),
        ({"answer": {"choices": []}}, EndpointError, "answers with no reply"),
        ({"answer": {"choices": [{"message": None}]}}, EndpointError, "answers with no reply"),
        ({"answer": 404}, EndpointError, "no OpenAI-compatible endpoint"),
        ({"answer": 400}, EndpointError, "answers HTTP 400: no such thing"),
        ({"answer": 401}, EndpointError, "Set OPENAI_API_KEY"),
        ({"answer": 503}, EndpointError, "still loading its model"),
        ({"answer": 307}, EndpointError, "leads elsewhere"),
        ({"answer": 0.8}, EndpointError, "no answer within 0.4 seconds"),
    ],
)
def test_what_is_no_answer_is_said(
    made: Made, serve: Callable[..., Engine], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    engine = serve(**options)
    with pytest.raises(kind) as failure:
        serve_check(engine.url, run=made.run, timeout=0.4)
    assert words in str(failure.value)
    assert failure.value.mend  # type: ignore[attr-defined]


def test_nobody_there(made: Made) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match=r"cannot be reached: .*refused"):
        serve_check(f"http://127.0.0.1:{port}", run=made.run)


@pytest.mark.parametrize(
    ("address", "options", "words"),
    [
        ("localhost:8000", {"run": "run"}, "no address of an endpoint"),
        ("http://", {"run": "run"}, "no address of an endpoint"),
        ("http://[bad", {"run": "run"}, "no address of an endpoint"),
        ("http://127.0.0.1:port", {"run": "run"}, "no address of an endpoint"),
        ("http://127.0.0.1:1", {}, "Give --run RUN or --export DIR"),
        ("http://127.0.0.1:1", {"run": "run", "export": "export"}, "Give --run RUN or --export DIR"),
        ("http://127.0.0.1:1", {"export": "export", "model": "x"}, "--model is for a run"),
    ],
)
def test_unusable_arguments(made: Made, address: str, options: dict[str, Any], words: str) -> None:
    given = {name: getattr(made, value, value) if name != "model" else value for name, value in options.items()}
    with pytest.raises(ConfigError, match=words.replace("-", "[-]")):
        serve_check(address, **given)


def test_a_wrong_name_is_told_with_the_nearest(made: Made, serve: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="serves no model 'sreved'") as failure:
        serve_check(f"{serve().url}#sreved", run=made.run)
    assert failure.value.mend == "Did you mean served?"


def test_the_verb(
    made: Made, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trimtab", "serve-check", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    code, out, _ = run(serve().url, "--export", made.export)
    assert code == 0
    assert "The token is in effect there." in out
    code, out, err = run(serve(fault="no slot").url, "--run", made.run, "--json")
    found = json.loads(out)
    assert (code, found["in_effect"]) == (1, False)
    assert verdicts(found)["slot once"] == "failed"
    assert "Not as it should be: prompt length, slot once, effect." in err
    code, out, _ = run("http://127.0.0.1:9", "--run", made.run, "--json")
    assert (code, json.loads(out)["kind"]) == (1, "EndpointError")
    code, out, _ = run("nowhere", "--run", made.run, "--json")
    assert (code, json.loads(out)["kind"]) == (2, "ConfigError")


def test_a_folder_that_is_no_export(serve: Callable[..., Engine], tmp_path: Path) -> None:
    with pytest.raises(PathError, match="holds no export"):
        serve_check(serve().url, export=tmp_path)


def test_an_adapter_puts_nothing_into_prompts(made: Made, serve: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "trimtab.json").write_text('{"format": "peft", "verified": null}')
    with pytest.raises(ConfigError, match="is a prompt-tuning adapter"):
        serve_check(serve().url, export=tmp_path)


def test_several_tokens_are_one_slot(made: Made, serve: Callable[..., Engine], tmp_path: Path) -> None:
    """Of three tokens a prompt lacks three; one is not taken for them."""
    model = load(made.model)
    SoftToken.of(model, vectors_for(model, 3, 8.0), "assistant").save(tmp_path / "run")
    said = {
        fault: why(serve_check(serve(dialect="bare", fault=fault).url, run=tmp_path / "run"), "prompt length")
        for fault in ("no slot", "")
    }
    assert said["no slot"].startswith("the slot is missing: 3 tokens less")
    assert said[""].startswith("1 token more than without the slot")


def test_tokens_in_words_are_found_again(made: Made, exported: Model) -> None:
    """What an engine says in words is looked up; a word of several tokens counts with all others."""
    from trimtab.serving.check import _by_id
    from trimtab.serving.expected import from_run
    from trimtab.serving.told import Told

    expected = from_run(made.run)
    word = exported.tokenizer.decode([40])
    told = Told("", None, None, None, ((word, 0.5), ("the inn the inn", 0.2), (41, 0.1), (expected.slot_ids[0], 0.1)))
    assert _by_id(expected, told) == {40: 0.5, 41: 0.1}
