"""Inspect runs a task on a model of ours, found by its entry point (`make interop`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.tool import tool

from trimtab.bridges import inspect as bridge
from trimtab.decoding.generate import generate
from trimtab.models import load
from trimtab.softtoken.artifact import SoftToken

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def evaluate(folder: Path, samples: list[Sample], tmp_path: Path, arguments: dict[str, Any], **config: Any) -> Any:
    task = Task(dataset=samples, scorer=includes(), config=GenerateConfig(**config))
    model = f"trimtab/{folder}"
    (log,) = eval(task, model=model, model_args=arguments, log_dir=str(tmp_path / "logs"), display="none")
    return log


@pytest.mark.parametrize("kind", ["base", "token", "guide"])
def test_a_task_runs(kind: str, folder: Path, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        batches.append(len(arguments[1]))
        return generate(*arguments, **options)

    monkeypatch.setattr(bridge, "generate", counted)
    arguments: dict[str, Any] = {
        "base": {},
        "token": {"token": str(token_run)},
        "guide": {"expert": f"token:{token_run}", "risk": "const:7", "neuron": "primed"},
    }[kind]
    prompts = [f"Say {i}." for i in range(5)]
    samples = [Sample(input=prompt, target="x") for prompt in prompts]
    log = evaluate(folder, samples, tmp_path, arguments, max_tokens=5)
    assert log.status == "success", log.error
    said = {sample.input: sample.output.completion for sample in log.samples}
    model = load(folder)
    token = SoftToken.load(token_run, model) if kind != "base" else None
    from trimtab.neuron.guide import Guide
    from trimtab.neuron.neuron import Neuron
    from trimtab.neuron.risk import ConstantRisk

    options: dict[str, Any] = {"token": token} if kind == "token" else {}
    if kind == "guide" and token:
        options = {"guide": Guide(token, Neuron.named("primed"), ConstantRisk(7))}
    ours = generate(model, prompts, max_new_tokens=5, **options)
    assert said == {prompt: reply.text for prompt, reply in zip(prompts, ours, strict=True)}
    assert sum(batches) == 5
    assert len(batches) < 5  # those that wait together are made together


def test_turns_prefill_and_stop(folder: Path, tmp_path: Path) -> None:
    turns = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Hi")]
    samples = [
        Sample(input=turns, target="x", id="plain"),
        Sample(input=[*turns, ChatMessageAssistant(content="The")], target="x", id="begun"),
    ]
    log = evaluate(folder, samples, tmp_path, {}, max_tokens=3)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ours = generate(load(folder), [chat, chat], prefills=["", "The"], max_new_tokens=3)
    by_id = {sample.id: sample.output for sample in log.samples}
    assert [by_id[name].completion for name in ("plain", "begun")] == [reply.text for reply in ours]
    stops = {"length": "max_tokens", "eos": "stop"}
    assert [by_id[name].stop_reason for name in ("plain", "begun")] == [stops[reply.stop] for reply in ours]
    assert by_id["plain"].usage.output_tokens == len(ours[0].ids)


def test_a_prompt_too_long_fails_alone(folder: Path, tmp_path: Path) -> None:
    samples = [Sample(input="x" * 900, target="x", id="long"), Sample(input="Hi", target="x", id="short")]
    log = evaluate(folder, samples, tmp_path, {}, max_tokens=3)
    assert log.status == "success"
    outputs = {sample.id: sample.output for sample in log.samples}
    assert outputs["long"].stop_reason == "model_length"
    assert "a prompt of" in outputs["long"].error
    assert outputs["short"].completion == generate(load(folder), ["Hi"], max_new_tokens=3)[0].text


def test_what_is_drawn_depends_on_the_conversation_and_how_often_it_was_asked(folder: Path, tmp_path: Path) -> None:
    samples = [Sample(input=f"Say {i}.", target="x", id=str(i)) for i in range(4)]

    def said(connections: int) -> dict[tuple[Any, int], str]:
        task = Task(dataset=samples, scorer=includes(), epochs=3, config=GenerateConfig(max_tokens=4, temperature=1.5))
        (log,) = eval(
            task, model=f"trimtab/{folder}", max_connections=connections, log_dir=str(tmp_path / "l"), display="none"
        )
        assert log.status == "success", log.error
        return {(sample.id, sample.epoch): sample.output.completion for sample in log.samples}

    def by_sample(found: dict[tuple[Any, int], str]) -> dict[Any, list[str]]:
        return {i: sorted(text for (name, _), text in found.items() if name == i) for i in {name for name, _ in found}}

    alone, together = by_sample(said(1)), by_sample(said(8))
    assert alone == together
    assert all(len(set(texts)) == 3 for texts in alone.values())


@pytest.mark.anyio
async def test_tools_are_refused(folder: Path) -> None:
    api = bridge.TrimtabAPI(str(folder))
    with pytest.raises(Exception, match="calls no tools"):
        await api.generate([ChatMessageUser(content="Hi")], [tool], "auto", GenerateConfig())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
