"""A token as one row of a checkpoint: every other byte as it was, ids and replies those of the token on its model."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import FAMILIES, TEMPLATES, build, vectors_for
from trimtab.chat import POSITIONS
from trimtab.errors import ArtefactError, ExportError, RunError
from trimtab.evaluation.metrics import wilson
from trimtab.exporters.checkpoint import INDEX, Rows, rewrite, tensors
from trimtab.exporters.export import export
from trimtab.exporters.head import unsaid
from trimtab.exporters.plan import folder_of, plan
from trimtab.models import Model, load
from trimtab.prompts.sources import load_prompts
from trimtab.softtoken.artifact import SoftToken, next_logits

ROWS: dict[str, dict[str, Any]] = {
    "appended": {},
    "unused": {"padding": 3},
    "reserved": {"reserved": 2},
    "appended, tied": {"tied": True},
    "unused, tied": {"tied": True, "padding": 2},
}


def saved(folder: Path, family: str = "llama", template: str = "default", shard: str = "5GB", **options: Any) -> Model:
    """A tiny model, read back from a folder."""
    made = build(family, template, **options)
    made.network.save_pretrained(folder, max_shard_size=shard)
    made.tokenizer.save_pretrained(folder)
    return load(folder)


def hashes(folder: Path) -> dict[str, str]:
    """Of every tensor's bytes."""
    found = {}
    for name, stored in tensors(folder).items():
        data = stored.file.read_bytes()[stored.begin : stored.end]
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_token_is_the_same_computation(family: str, row: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", family, **ROWS[row])
    token = SoftToken.of(model, vectors_for(model, 2, 8.0), "assistant")
    result = export(model, token, tmp_path / "out")
    assert result["plan"]["row"] == row.partition(",")[0]
    assert result["verified"]["replies_equal"] == result["verified"]["probes"]
    assert result["verified"]["logits_max_difference"] <= 1e-4
    assert result["template"]["conversations_equal"] > 200
    before, after = hashes(tmp_path / "model"), hashes(tmp_path / "out")
    touched = {result["plan"]["embedding"], result["plan"]["head"]}
    assert {name: each for name, each in before.items() if name not in touched} == {
        name: each for name, each in after.items() if name not in touched
    }
    table = load_file(tmp_path / "out" / "model.safetensors")[result["plan"]["embedding"]]
    ids = result["plan"]["ids"]
    assert torch.equal(table[list(ids)], token.vectors)
    kept = [i for i in range(len(model.table)) if i not in ids]
    assert torch.equal(table[kept], model.table[kept])


def test_a_tied_head_is_written_out_where_the_slot_would_be_said(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", tied=True)
    loud = SoftToken.of(model, vectors_for(model, 1, 40.0), "assistant")
    result = export(model, loud, tmp_path / "loud")
    assert result["slot_as_output"]["tied"] > 0.5
    assert result["plan"]["untie"]
    head = load_file(tmp_path / "loud" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head[:-1], model.table)
    assert json.loads((tmp_path / "loud" / "config.json").read_text())["tie_word_embeddings"] is False
    kept = export(model, loud, tmp_path / "kept", untie=False)
    assert not kept["plan"]["untie"]
    assert "lm_head.weight" not in load_file(tmp_path / "kept" / "model.safetensors")
    assert '"bad_words": ["<|trimtab_0|>"]' in kept["plan"]["engines"]["vLLM"]
    assert "bad_words" not in result["plan"]["engines"]["vLLM"]


def test_shards_that_hold_no_table_are_the_same_files(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", shard="20KB")
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    result = export(model, token, tmp_path / "out")
    same = [
        file["file"] for file in result["plan"]["files"] if file["what"] == "as it is" and "safetensors" in file["file"]
    ]
    assert len(same) > 2
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(each.end - each.begin for each in tensors(tmp_path / "out").values())


def test_what_is_written_can_be_read_by_the_library(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    name = "model.embed_tokens.weight"
    row = torch.arange(32.0)
    stored = tensors(tmp_path / "model")[name]
    told: list[int] = []
    rewrite(
        path,
        tmp_path / "new.safetensors",
        {name: Rows({1: row, len(model.table) + 1: row * 2}, len(model.table) + 3)},
        {"copy.weight": Rows({0: row}, len(model.table), stored)},
        told.append,
    )
    with safe_open(path, "pt") as old, safe_open(tmp_path / "new.safetensors", "pt") as new:
        assert new.metadata() == old.metadata()
        for key in old.keys():  # noqa: SIM118
            if key != name:
                assert torch.equal(old.get_tensor(key), new.get_tensor(key))
        table, copy = new.get_tensor(name), new.get_tensor("copy.weight")
    assert torch.equal(table[1], row)
    assert torch.equal(table[len(model.table) + 1], row * 2)
    assert not table[[len(model.table), len(model.table) + 2]].any()
    assert torch.equal(copy[0], row)
    assert torch.equal(copy[1:], model.table[1:])
    assert sum(told) == path.stat().st_size - _header_size(path) + (stored.end - stored.begin)


def _header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("n_tokens", [1, 2])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_edited_for_every_place_that_it_has(
    template: str, position: Any, n_tokens: int, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", template=template)
    token = SoftToken.of(model, vectors_for(model, n_tokens, 8.0), position)
    missing = {"chatml": ("after_bos",), "default": ("after_bos",), "no_system": ("assistant", "system")}
    if position in missing.get(template, ()):
        with pytest.raises(ExportError, match="cannot be edited safely"):
            export(model, token, tmp_path / "out", check=False)
        assert not (tmp_path / "out").exists()
        return
    result = export(model, token, tmp_path / "out", check=False)
    assert result["template"]["conversations_equal"] >= 75
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|trimtab_0|>!"}]
    turns = turns[template == "no_system" :]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.count("<|trimtab_0|>") == 1
    assert "Hi <| trimtab_0|>!" in text


def test_transformers_alone_replies_as_the_token_does(tmp_path: Path) -> None:
    from trimtab.decoding.generate import generate

    model = saved(tmp_path / "model", tied=True)
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    export(model, token, tmp_path / "out", check=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for words in ("Hello!", "the cinema", "inin"):
        turns = [{"role": "user", "content": words}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = network.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        expected = generate(model, [turns], token=token, max_new_tokens=12)[0]
        assert tuple(said[: len(expected.ids)]) == expected.ids


@pytest.fixture
def model(folder: Path) -> Model:
    return load(folder)


@pytest.fixture
def token(model: Model) -> SoftToken:
    return SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")


def test_nothing_is_written_over_but_an_earlier_export_if_told(model: Model, token: SoftToken, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ExportError, match=r"holds something that is no export\."):
            export(model, token, out, force=force)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    export(model, token, out)
    (out / "old.txt").touch()
    with pytest.raises(ExportError, match=r"holds an export already\.\n.*--force"):
        export(model, token, out)
    export(model, token, out, force=True)
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_read_is_never_replaced(
    folder: Path, token_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = shutil.copytree(folder, tmp_path / "chain" / "model")
    model = load(inside)
    token = SoftToken.load(token_run, model)
    (inside / "trimtab.json").write_text("{}")  # an export may be exported from
    for target in (inside, tmp_path / "chain", token_run):
        with pytest.raises(ExportError, match="holds the run, the model or the working folder"):
            export(model, token, target, force=True, run=token_run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="holds the run, the model or the working folder"):
        export(model, token, ".", force=True)
    assert (inside / "config.json").exists()


def test_a_killed_export_leaves_nothing_that_the_next_one_does_not_mend(
    model: Model, token: SoftToken, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(model, token, out)
    left = tmp_path / ".out.partial"
    (left / "new").mkdir(parents=True)
    (left / "new" / "half").touch()
    out.rename(left / "old")  # killed between two renames
    with pytest.raises(ExportError, match="holds an export already"):
        export(model, token, out)
    assert (out / "trimtab.json").exists()
    export(model, token, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_errors_that_are_not_the_disks_stay_what_they_are(
    model: Model, token: SoftToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("hub unreachable")

    monkeypatch.setattr("trimtab.exporters.export.write_weights", unreachable)
    with pytest.raises(ConnectionError, match="hub unreachable"):
        export(model, token, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_generation_config_ends_replies_as_before(
    folder: Path, token: SoftToken, tmp_path: Path
) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    model = load(bare)
    export(model, token, tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert there.eos_token_id == model.network.generation_config.eos_token_id is not None
    assert there.suppress_tokens == model.slot_ids(1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_in_half_precision_keeps_its_type(dtype: str, tmp_path: Path) -> None:
    made = build("llama", "default")
    made.network.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", dtype=dtype)
    token = SoftToken.of(model, vectors_for(model, 1, 8.0), "assistant")
    result = export(model, token, tmp_path / "out")
    assert result["verified"]["stored_dtype"] == dtype
    table = load_file(tmp_path / "out" / "model.safetensors")[result["plan"]["embedding"]]
    assert torch.equal(table[-1], token.vectors[0].to(getattr(torch, dtype)))


def test_a_silent_row_is_silent_where_states_allow_it() -> None:
    chance = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 64, generator=chance)
    heard = torch.randn(200, 8, generator=chance) @ basis + 3 * basis[0]  # what all states share
    row = unsaid(heard[:150])
    assert (heard[150:] @ row).max() < -10


def test_a_full_disk_leaves_nothing(
    model: Model, token: SoftToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(RunError, match=r"no room in"):
        export(model, token, tmp_path / "out")
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.exporters.huggingface.copy_shard", full)
    monkeypatch.setattr("trimtab.exporters.huggingface.rewrite", full)
    with pytest.raises(RunError, match=r"No space left on device\n.*Free some room"):
        export(model, token, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_shard_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = saved(tmp_path / "sharded", shard="20KB")
    spoken = SoftToken.of(sharded, vectors_for(sharded, 1, 8.0), "assistant")
    turn, ended = itertools.count(), []

    def copied(path: Path, target: Path, advance: Callable[[int], None]) -> None:
        if next(turn) == 1:
            raise OSError(28, "No space left on device")
        for _ in range(3000):  # much longer than the other
            advance(1)
            time.sleep(0.001)
        ended.append(path.name)

    monkeypatch.setattr("trimtab.exporters.huggingface.copy_shard", copied)
    with pytest.raises(RunError, match="No space left on device"):
        export(sharded, spoken, tmp_path / "out")
    assert next(turn) > 2
    assert not ended
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_another_models_token_and_damaged_or_odd_files_are_refused(
    token: SoftToken, folder: Path, tmp_path: Path
) -> None:
    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError):
        export(other, token, tmp_path / "out")
    broken = shutil.copytree(folder, tmp_path / "broken")
    model = replace(load(folder), origin={"kind": "folder", "path": str(broken)})
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ExportError, match="truncated"):
        export(model, token, tmp_path / "out")
    (broken / "model.safetensors").write_bytes(whole[:5])
    with pytest.raises(ExportError, match="no whole safetensors file"):
        export(model, token, tmp_path / "out")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="only safetensors"):
        export(model, token, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_written_wrongly_is_noticed(
    model: Model, token: SoftToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.exporters import checkpoint

    right: Callable[..., bytes] = checkpoint.encoded
    monkeypatch.setattr(checkpoint, "encoded", lambda vector, dtype: right(vector * 1.1, dtype))
    with pytest.raises(ExportError, match="its logits are not those of the token"):
        export(model, token, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_runs_figures_and_the_base_models_licence(
    model: Model, token: SoftToken, folder: Path, tmp_path: Path
) -> None:
    def rate(hits: int, n: int) -> dict[str, Any]:
        return {"keyword": {"refusal_rate": hits / n, "ci95": wilson(hits, n), "n": n}}

    measured = {"suites": {"test": {"harmful": rate(9, 10), "benign": rate(0, 20)}}, "arm": "token"}
    before = {"suites": {"test": {"harmful": rate(1, 10), "benign": rate(0, 20)}}}
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "eval" / "results.json").write_text(json.dumps({**measured, "base": before}))
    own = folder_of(model) / "README.md"
    own.write_text("---\nlicense: mit\n---\n\n# A model\n")
    try:
        export(model, token, tmp_path / "out", run=run, check=False)
    finally:
        own.unlink()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| test, harmful | 10 | 10% (2%-40%) | 90% (60%-98%) |" in card
    assert "| test, benign | 20 | 0% (0%-16%) | 0% (0%-16%) |" in card
    assert "\nlicense: mit\n" in card.split("---")[1]
    assert "Licence of the base model: mit." in card
    assert "vllm serve out --dtype float32" in card
    assert "llama-server -m out.gguf --jinja" in card


def test_the_slot_is_listened_for_in_replies_to_every_kind_of_request(
    model: Model, token: SoftToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is silent where one kind of request is answered need not be so elsewhere."""
    from trimtab.exporters import export as module

    groups = {record.text: record.group for record in load_prompts("builtin", split="test")}
    asked: list[Any] = []
    seen = lambda _model, _token, prompts: [torch.full((2, 1), float(i)) for i in range(len(prompts))]  # noqa: E731
    monkeypatch.setattr(module, "states", seen)
    monkeypatch.setattr(module, "in_place", lambda _model, _token, chat: asked.append(chat) or chat)
    heard, unfitted, _ = module._head(model, token)
    kinds = [groups[chat if isinstance(chat, str) else chat[-1]["content"]] for chat in asked]
    assert min(Counter(kinds).values()) >= 6
    assert set(kinds[2::3]) == {"harmful", "borderline", "plain"}  # what the row is not fitted to
    assert unfitted.unique().tolist() == [float(i) for i in range(2, len(kinds), 3)]
    assert len(heard) == 2 * len(kinds)


def test_a_processors_template_is_edited_too(tmp_path: Path) -> None:
    """transformers takes the one in an old `processor_config.json` before all others; what else a processor has stays as it is."""
    model = saved(tmp_path / "model")
    own = {"processor_class": "X", "chat_template": model.tokenizer.chat_template, "size": 3}
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(own))
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 3}')
    model = load(tmp_path / "model")
    token = SoftToken.of(model, vectors_for(model, 1, 30.0), "assistant")
    export(model, token, tmp_path / "out", check=False)
    there = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert there == {**own, "chat_template": load(tmp_path / "out").tokenizer.chat_template}
    assert there["chat_template"] != own["chat_template"]
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 3}'


def test_architectures_without_a_table_that_could_grow_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    token = SoftToken.of(model, vectors_for(model, 1, 30.0), "start")
    model.network.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.table)))
    with pytest.raises(ExportError, match="has no plain output table") as caught:
        plan(model, token, untie=False)
    assert "--format peft" in str(caught.value)
    model.network.lm_head.bias = None
    path = tmp_path / "model" / "model.safetensors"
    held = load_file(path)
    held["model.embed_tokens.renamed"] = held.pop("model.embed_tokens.weight")
    save_file(held, path)
    with pytest.raises(ExportError, match="0 tensors of the checkpoint could be its table embed_tokens"):
        plan(model, token, untie=False)


def test_the_plan_names_every_file_and_its_bytes(model: Model, token: SoftToken, folder: Path, tmp_path: Path) -> None:
    found = plan(model, token, untie=False)
    export(model, token, tmp_path / "out")
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {name for name, _, _ in found.files} == set(written)
    weights = next(size for name, _, size in found.files if name == "model.safetensors")
    assert abs(weights - written["model.safetensors"]) < 200  # the header's numbers may be longer


def test_a_reply_is_known_as_the_greedy_one_by_reading_it(model: Model, token: SoftToken) -> None:
    from trimtab.decoding.generate import generate
    from trimtab.exporters.verify import REPLY_TOKENS, _follow

    chats = ["Hello!", "the cinema", "What is in the inn?"]
    prompts = [token.render(model, chat).ids for chat in chats]
    replies = [reply.ids for reply in generate(model, chats, token=token, max_new_tokens=REPLY_TOKENS)]
    logits, greedy = _follow(model, prompts, replies, token.vectors)
    assert greedy == [True, True, True]
    for ids, found in zip(prompts, logits, strict=True):
        torch.testing.assert_close(found, next_logits(model, ids, token.vectors), atol=1e-4, rtol=1e-4)
    other = [(*replies[0][:2], replies[0][2] + 1, *replies[0][3:]), replies[1][:-1], ()]
    assert _follow(model, prompts, other, token.vectors)[1] == [False, False, False]


def test_states_are_what_the_head_reads_along_each_reply(model: Model, token: SoftToken) -> None:
    from trimtab.decoding.generate import generate
    from trimtab.exporters.head import REPLY_TOKENS, states

    chats = ["Hello!", "the cinema is in the inn", "in"]
    found = states(model, token, [token.render(model, chat) for chat in chats])
    head = model.network.get_output_embeddings()
    for heard, reply in zip(found, generate(model, chats, token=token, max_new_tokens=REPLY_TOKENS), strict=True):
        said = head(heard).argmax(-1).tolist()
        assert tuple(said[: len(reply.ids)]) == reply.ids
        assert len(said) == len(reply.ids) + (reply.stop == "eos")
