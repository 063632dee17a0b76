"""Tiny random models built on the spot, and a slow decoder to compare with. Nothing here touches the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRIMTAB_CACHE"] = tempfile.mkdtemp(prefix="trimtab-tests-")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trimtab.models import Model, load, slot
from trimtab.softtoken.artifact import SoftToken

# Harnesses and engines that are not installed are left out: `make interop` brings each into an environment of its own.
HARNESSES = {
    "interop/test_lm_eval.py": "lm_eval",
    "interop/test_inspect.py": "inspect_ai",
    "interop/test_llama_cpp.py": "xllamacpp",
}
collect_ignore = [file for file, package in HARNESSES.items() if find_spec(package) is None]
torch.set_num_threads(1)
settings.register_profile(
    "trimtab", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("trimtab")

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")
# A few merges, so that cutting a text for the slot can change how it is tokenised.
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ċ", "Ċ"), ("'", "m"), ("Ġ", "c"))

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}"
    + CHATML,
    "bos": "{{ bos_token }}" + CHATML,
    "trim": "{{ bos_token }}" + CHATML.replace("m.content", "(m.content | trim)"),
    "no_system": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + '</s>' }}{% endfor %}",
    "fold": "{{ bos_token }}{% set ns = namespace(first='') %}"
    "{% if messages[0].role == 'system' %}"
    "{% set ns.first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ (ns.first if loop.first else '') + (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
}
# Two layers each; the windows are shorter than the prompts of the tests.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"model_type": "mistral", "sliding_window": 20, "head_dim": 8},
}


def tiny_tokenizer(template: str | None, reserved: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text comes back as it was."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, list(MERGES)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(reserved))])
    end = {"no_system": "</s>", "fold": "<end_of_turn>"}.get(template or "", "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer


def build(
    family: str = "llama",
    template: str | None = "chatml",
    *,
    padding: int = 0,
    reserved: int = 0,
    tied: bool = False,
    seed: int = 0,
) -> Model:
    """A random model nobody else has: `padding` unused vocabulary rows, `reserved` special tokens."""
    tokenizer = tiny_tokenizer(template, reserved)
    config = AutoConfig.for_model(
        **FAMILIES[family],
        vocab_size=len(tokenizer) + padding,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        # Far above the usual 0.02: what is said must depend on every word read.
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    return Model(f"tiny-{family}", network, tokenizer, "for tests", {"kind": "test"})


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Model]:
    """`tiny(family, template, ...)`: as `build`, but shared, so never change what it returns."""
    return lru_cache(build)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model saved as a Hugging Face folder; copy it before damaging it."""
    path, model = tmp_path_factory.mktemp("models") / "tiny-llama", build("llama", "default")
    model.network.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def token_run(folder: Path, tmp_path: Path) -> Path:
    """A folder with a soft token for the model in `folder`."""
    model = load(folder)
    SoftToken.of(model, vectors_for(model, 1, 30.0), "user").save(tmp_path / "run")
    return tmp_path / "run"


def vectors_for(model: Model, n_tokens: int = 1, size: float = 2.0) -> Tensor:
    """Some soft tokens that make a difference."""
    return size * torch.randn(n_tokens, model.hidden_size, generator=torch.Generator().manual_seed(n_tokens))


@torch.inference_mode()
def naive_logits(model: Model, ids: Sequence[int], vectors: Tensor | None = None) -> Tensor:
    """Logits `[len(ids), V]` of one row read in one go: no cache, no padding."""
    with slot(model, vectors):
        return model.network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def naive_reply(model: Model, ids: Sequence[int], limit: int, vectors: Tensor | None = None) -> list[int]:
    """Greedy decoding that re-reads the whole prefix at every step (law 4)."""
    banned = model.slot_ids(len(vectors)) if vectors is not None else []
    reply: list[int] = []
    while len(reply) < limit:
        logits = naive_logits(model, [*ids, *reply], vectors)[-1].clone()
        logits[[i for i in banned if i < len(logits)]] = -torch.inf
        token = int(logits.argmax())
        if token in model.eos_ids:
            break
        reply.append(token)
    return reply
