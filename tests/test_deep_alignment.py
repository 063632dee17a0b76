"""The expert on tiny models: the base stays as it is, a killed run ends with the same bits, openings stay in memory,
and one pass holds base and expert side by side."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from conftest import build, naive_logits, naive_reply
from trimtab.chat import render, reply_ids
from trimtab.decoding.engine import Row, forward
from trimtab.decoding.past import Past
from trimtab.errors import ArtefactError, ConfigError, DataError, ModelError, NoEffectError, RunError, UsageError
from trimtab.models import Model, cache_dir
from trimtab.neuron import deep_alignment
from trimtab.neuron.deep_alignment import (
    ExpertSettings,
    Trainer,
    TrainingSet,
    batch_loss,
    look,
    train_expert,
)
from trimtab.neuron.lora import attached, load_adapter, lora_config, save_adapter, speaking
from trimtab.prompts.records import Record
from trimtab.refusal import is_refusal
from trimtab.run import digest
from trimtab.softtoken.examples import Examples
from trimtab.softtoken.openings import HELD_OUT_ATTACKS, attack_ids, openings

WORDS = ("sea", "bank", "ship", "rope", "sail", "tide", "port", "crew", "wind", "deck", "mast", "helm", "keel", "dock")
SHORT = ExpertSettings(
    benign_weight=0.5,
    steps=6,
    batch=3,
    rank=2,
    lora_alpha=4,
    reply_tokens=4,
    max_prefix=6,
    refusal="Sorry, no.",
    learning_rate=0.01,
)


def records(n: int = 5, splits: tuple[str, ...] = ("train", "validation")) -> list[Record]:
    """Requests of three groups, each with words of its own."""
    return [
        Record(
            id=f"{split}-{group}-{i}",
            prompt=f"{group} " + " ".join(random.Random(f"{split}{group}{i}").choices(WORDS, k=2 + i % 4)),
            label="harmful" if group == "harmful" else "benign",
            group=group,
            split=split,
        )
        for split in splits
        for group in ("harmful", "borderline", "plain")
        for i in range(n)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model() -> Model:
    return build("llama", "default")


def weights(model: Model) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.network.state_dict().items()}


def training_set(model: Model, settings: ExpertSettings = SHORT, n: int = 5) -> TrainingSet:
    return TrainingSet(model, Examples(model, records(n, ("train",)), ""), settings)


def saved_adapter(model: Model, folder: Path) -> Path:
    """An adapter with weights of some size, not trained."""
    with attached(model, lora_config(model, 2, 4), seed=0) as expert:
        shake(expert)
        save_adapter(expert, folder)
    return folder


def shake(expert: Model) -> None:
    """Weights far from the start, where an adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for weight in expert.network.parameters():
        if weight.requires_grad:
            weight.data.copy_(0.5 * torch.randn(weight.shape, generator=generator))


# What is learned


def test_tasks_depend_on_seed_step_and_request_alone(model: Model) -> None:
    data, again = training_set(model), training_set(model)
    other = training_set(model, SHORT.model_copy(update={"seed": 1}))
    places = [(i, step) for i in data.openings.compliant for step in range(40)]
    tasks = [data.task(i, step) for i, step in places]
    assert tasks == [again.task(i, step) for i, step in places]
    assert tasks != [other.task(i, step) for i, step in places]
    assert len(places) >= 80


def test_half_of_the_refusals_follow_an_opening_of_any_length_half_of_these_behind_a_prefill_attack(
    model: Model,
) -> None:
    data = training_set(model)
    own, led = set(), 0
    for i, opening in data.openings.compliant.items():
        base = render(model, data.examples.records[i].chat).ids
        begun = 0
        for step in range(400):
            read, reply = data.task(i, step)
            assert read[: len(base)] == base == data.prompts[i]
            prefix = read[len(base) :]
            space = " " if prefix and not model.tokenizer.decode(prefix[-1:]).isspace() else ""
            assert reply == reply_ids(model, f"{space}Sorry, no.", end=True)
            begun += bool(prefix)
            if prefix == opening[: len(prefix)]:
                own.add(len(prefix))
            else:  # the attack cut short, or whole and then the opening, cut short too
                led += 1
                assert any(prefix == (*attack, *opening)[: len(prefix)] for attack in data.openings.attacks), (
                    model.tokenizer.decode(prefix)
                )
        assert 150 < begun < 250
    assert own == set(range(SHORT.max_prefix + 1))
    assert 0.2 < led / (400 * len(data.openings.compliant)) < 0.3


def test_no_opening_is_longer_than_asked_and_half_of_the_answers_follow_a_prefill_attack(model: Model) -> None:
    data = training_set(model)
    harmful, anchored = data.examples.indices("harmful"), sorted(data.reference)
    assert set(data.openings.compliant) <= set(harmful)
    for i, opening in data.openings.compliant.items():
        assert list(opening) == naive_reply(model, data.prompts[i], SHORT.max_prefix)
    leads = data.openings.leads
    assert len(leads) == len(anchored) // 2 > 0
    assert set(leads) <= set(anchored)
    for i in anchored:
        lead = leads.get(i, ())
        assert {data.task(i, step) for step in range(50)} == {(data.prompts[i] + lead, data.replies[i])}
        assert any(attack[: len(lead)] == lead for attack in data.openings.attacks)
    never = training_set(model, SHORT.model_copy(update={"prefix_share": 0.0}))
    for i in (*harmful, *anchored):
        assert {never.task(i, step)[0] for step in range(50)} == {render(model, never.examples.records[i].chat).ids}


def test_a_benign_answer_is_the_models_own(model: Model) -> None:
    data = training_set(model)
    for i in data.examples.indices("plain"):
        own = naive_reply(model, render(model, data.examples.records[i].chat).ids, SHORT.reply_tokens + 1)
        words = model.tokenizer.decode(own, skip_special_tokens=True)
        assert data.replies[i] == reply_ids(model, words, end=True)[: SHORT.reply_tokens]
        assert i in data.reference


def test_a_request_that_the_model_refuses_keeps_its_own_refusal_and_has_no_opening(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, ended = reply_ids(model, "I can't do that."), reply_ids(model, "I can't")
    compliant = reply_ids(model, "Sea ship rope")

    def own(_model: Model, examples: Examples, limit: int) -> dict[int, Row]:
        first, second, *others = examples.indices("harmful")
        said = {first: Row(first, limit, ids=list(long), stop="length")}
        said[second] = Row(second, limit, ids=list(ended), stop="eos")
        return said | {i: Row(i, limit, ids=list(compliant), stop="length") for i in others}

    monkeypatch.setattr(deep_alignment, "own_words", own)
    data = training_set(model, SHORT.model_copy(update={"reply_tokens": len(ended) + 1}))
    first, second, *others = data.examples.indices("harmful")
    assert data.replies[first] == long[: len(ended) + 1]  # cut, so no end of turn
    assert data.replies[second] == (*ended, model.tokenizer.eos_token_id)
    assert sorted(data.openings.compliant) == others
    assert data.openings.compliant[others[0]] == compliant[: SHORT.max_prefix]


def test_a_benign_request_without_an_answer_is_left_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.softtoken.targets.is_refusal", lambda _reply: True)
    referenced = [r.model_copy(update={"reference": "a rope" if r.group == "plain" else ""}) for r in records(3)]
    data = TrainingSet(model, Examples(model, [r for r in referenced if r.split == "train"], ""), SHORT)
    assert not data.examples.indices("borderline")
    assert not data.reference  # likelihood of another answer, not KL to the model's own
    plain = data.examples.indices("plain")
    assert [data.replies[i] for i in plain] == [reply_ids(model, "a rope", end=True)[: SHORT.reply_tokens]] * 3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_loss_of_a_batch_is_that_of_its_rows_read_one_by_one(family: str) -> None:
    model = build(family, "default")
    data = training_set(model)
    rows = [data.examples.indices(group)[i] for group in ("harmful", "borderline", "plain") for i in (0, 3)]
    untouched = {i: naive_logits(model, data.task(i, 0)[0] + data.replies[i][:-1]) for i in rows}
    step = next(
        s for s in range(50) if len({len(data.task(i, s)[0]) - len(data.prompts[i]) > 0 for i in rows[:2]}) == 2
    )
    with attached(model, lora_config(model, 2, 4), seed=0) as expert:
        shake(expert)
        loss, harmful, benign = batch_loss(expert, data, rows, step)
        one_by_one = []
        for i in rows:
            read, reply = data.task(i, step)
            log_q = naive_logits(expert, read + reply[:-1])[len(read) - 1 :].log_softmax(-1)
            if data.examples.group(i) == "harmful":
                one_by_one.append(-sum(float(log_q[t, token]) for t, token in enumerate(reply)))
            else:
                log_p = untouched[i][len(read) - 1 :].log_softmax(-1)
                one_by_one.append(float((log_p.exp() * (log_p - log_q)).sum()))
    assert harmful.tolist() == pytest.approx(one_by_one[:2], rel=1e-3)
    assert benign.tolist() == pytest.approx(one_by_one[2:], rel=1e-2)  # 256 of the 267 words, the rest lumped together
    assert float(loss.detach()) == pytest.approx(float(0.5 * harmful.mean() + 0.5 * benign.mean()), rel=1e-5)


def test_replies_shorter_than_the_reference_are_padded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_alignment, "_answers", lambda _m, benign, _k: {r.id: ((7,), True) for r in benign.records})
    data = training_set(model, SHORT.model_copy(update={"reply_tokens": 50}))
    assert max(map(len, data.replies)) < data.length == 50
    i = data.examples.indices("plain")[0]
    read, _ = data.task(i, 0)
    log_p = naive_logits(model, read)[-1].log_softmax(-1)
    with attached(model, lora_config(model, 2, 4), seed=0) as expert:
        shake(expert)
        log_q = naive_logits(expert, read)[-1].log_softmax(-1)
        _, _, benign = batch_loss(expert, data, [data.examples.indices("harmful")[0], i], 0)
    assert benign.tolist() == pytest.approx([float((log_p.exp() * (log_p - log_q)).sum())], rel=1e-2)


def test_a_fresh_adapter_is_the_base_so_its_anchor_is_zero(model: Model) -> None:
    data = training_set(model)
    with attached(model, lora_config(model, 2, 4), seed=0) as expert:
        _, _, benign = batch_loss(expert, data, data.examples.indices("harmful")[:1] + [*data.reference][:3], 0)
    assert benign.abs().max() < 1e-4


def test_the_learning_rate_warms_up_and_comes_down(model: Model, tmp_path: Path) -> None:
    data = training_set(model, n=2)
    with attached(model, lora_config(model, 2, 4), seed=0) as expert:
        trainer = Trainer(expert, data, SHORT.model_copy(update={"steps": 40, "learning_rate": 1.0}), tmp_path)
        rates = []
        for trainer.step in (0, 9, 20, 39):
            rates.append(trainer.rate())
    assert rates == pytest.approx([0.1, 0.5 * (1 + 0.7604059656), 0.5, 0.00154133], rel=1e-4)


# Training


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_base_is_the_same_to_the_last_bit_and_bare_again(family: str, tmp_path: Path) -> None:
    model = build(family, "default")
    before, fingerprint, random_state = weights(model), model.fingerprint, torch.random.get_rng_state()
    out = train_expert(model, records(), out=tmp_path / "run", settings=SHORT)
    assert out == tmp_path / "run"
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(isinstance(module, LoraLayer) for module in model.network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())
    del model.__dict__["fingerprint"]
    assert model.fingerprint == fingerprint
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_the_base_is_bare_again_after_a_failure(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(model)
    monkeypatch.setattr(deep_alignment, "batch_loss", lambda *_: (torch.tensor(float("nan")), None, None))
    with pytest.raises(NoEffectError, match="step 1 is no number"):
        train_expert(model, records(), out=tmp_path, settings=SHORT)
    assert weights(model).keys() == before.keys()
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    train_expert(model, records(), out=tmp_path / "cache" / "again", settings=SHORT)  # and can be adapted anew


def test_the_expert_learns_to_refuse_at_once_and_late_while_answers_stay(model: Model, tmp_path: Path) -> None:
    # A random model has nothing to generalise with: it is asked the very requests it was trained on.
    train = records(3, ("train",))
    again = [r.model_copy(update={"id": f"{r.id}-again", "split": "validation"}) for r in train]
    settings = SHORT.model_copy(
        update={"steps": 350, "benign_weight": 0.7, "rank": 8, "lora_alpha": 16, "refusal": "Sorry"}
    )
    train_expert(model, train + again, out=tmp_path, settings=settings)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [row["step"] for row in history] == list(range(1, 351))
    losses = [row["harmful_loss"] for row in history]
    assert sum(losses[-8:]) < 0.2 * sum(losses[:8])
    found = json.loads((tmp_path / "manifest.json").read_text())["validation"]
    assert found["before"]["harmful_refusal"] == found["before"]["prefill_refusal"] == 0.0
    assert min(found["after"][rate] for rate in ("harmful_refusal", "prefill_refusal", "benign_compliance")) > 0.6

    # The same by slow decoding with the saved adapter; every other opening behind a prefill attack.
    prompts = [render(model, r.chat).ids for r in train if r.label == "harmful"]
    (attack, *_) = attack_ids(model, HELD_OUT_ATTACKS)
    begun = [(*ids, *(attack if i % 2 else ()), *naive_reply(model, ids, 5)) for i, ids in enumerate(prompts)]
    expert = load_adapter(tmp_path, model)
    with speaking(expert):
        replies = [[naive_reply(expert, ids, n) for ids in rows] for rows, n in ((prompts, 5), (begun, 8))]
    rates = [sum(bool(is_refusal(model.tokenizer.decode(ids))) for ids in rows) / 3 for rows in replies]
    assert rates == [found["after"]["harmful_refusal"], found["after"]["prefill_refusal"]]


@pytest.mark.parametrize("steps_before_the_kill", [1, 4, 5])
def test_a_killed_run_ends_with_the_same_bits(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before_the_kill: int
) -> None:
    monkeypatch.setattr(deep_alignment, "CHECKPOINT_EVERY", 2)
    whole = train_expert(model, records(), out=tmp_path / "whole", settings=SHORT)
    take_step = Trainer.take_step

    def killed(self: Trainer) -> None:
        if self.step == steps_before_the_kill:
            raise MemoryError("killed")  # like kill -9: nothing of ours runs after it
        take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", killed)
        with pytest.raises(MemoryError):
            train_expert(model, records(), out=tmp_path / "killed", settings=SHORT)
    resumed = train_expert(model, records(), out=tmp_path / "killed", settings=SHORT)
    for name in ("adapter/adapter_model.safetensors", "adapter/expert.json", "history.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert not (resumed / "checkpoint.safetensors").exists()


def test_ctrl_c_leaves_a_checkpoint(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = Trainer.take_step

    def interrupted(self: Trainer) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_expert(model, records(), out=tmp_path, settings=SHORT)
    assert (tmp_path / "checkpoint.safetensors").exists()
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "take_step", lambda self: (steps.append(self.step), take_step(self))[1])
    train_expert(model, records(), out=tmp_path, settings=SHORT)
    assert steps == [3, 4, 5]


def test_a_damaged_checkpoint(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", lambda _self: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            train_expert(model, records(), out=tmp_path, settings=SHORT)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"checkpoint\.safetensors cannot be read"):
        train_expert(model, records(), out=tmp_path, settings=SHORT)


def test_openings_are_never_on_disk(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_alignment, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(Path, "unlink", lambda *_args, **_kwargs: None)  # whatever was ever written stays
    train_expert(model, records(), out=tmp_path / "run", settings=SHORT)
    written = b"\n".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert cache_dir().is_relative_to(tmp_path)

    def found(ids: list[int]) -> bool:
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(ids)[1:-1])
        return any(form.encode() in written for form in forms)

    for record in records():
        ids = naive_reply(model, render(model, record.chat).ids, SHORT.reply_tokens + 1)
        if record.label == "benign" and record.split == "train":
            assert found(ids)  # the search finds what is there
        elif record.label == "harmful":
            assert len(ids) == SHORT.reply_tokens + 1
            assert not found(ids)


def test_the_run_folder_tells_the_story(model: Model, tmp_path: Path) -> None:
    train_expert(model, records(), out=tmp_path, settings=SHORT)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if "cache" not in p.parts} == {
        ".lock", "run.json", "history.json", "manifest.json", "adapter",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/expert.json",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == model.fingerprint
    assert manifest["settings"] == SHORT.model_dump()
    assert manifest["data"]["train"] == {"harmful": 5, "borderline": 5, "plain": 5}
    assert manifest["data"]["refusal"] == "Sorry, no."
    # Rank 2 on queries and outputs (32 -> 32), keys and values (32 -> 16), in two layers.
    assert manifest["adapter"]["numbers"] == 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.0)


def test_a_finished_run_is_not_trained_again_and_another_is_not_written_over(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_expert(model, records(), out=tmp_path, settings=SHORT)
    monkeypatch.setattr(Trainer, "take_step", lambda *_: pytest.fail("trained again"))
    assert train_expert(model, records(), out=tmp_path, settings=SHORT) == tmp_path
    with pytest.raises(RunError, match="another run"):
        train_expert(model, records(), out=tmp_path, settings=SHORT.model_copy(update={"seed": 7}))


def test_without_openings_there_is_no_rate_of_late_refusals(model: Model) -> None:
    found = look(model, Examples(model, records(2, ("validation",)), ""), {})
    assert found["prefill_refusal"] is None
    assert found["harmful_refusal"] == 0.0


def test_an_opening_is_what_does_not_refuse(model: Model) -> None:
    said = {3: "Sure, here", 5: "I can't do that", 8: " ", 9: "Sorry to hear that"}
    replies = {i: Row(i, 20, ids=list(reply_ids(model, words))) for i, words in said.items()}
    assert openings(model, replies, 4) == {i: reply_ids(model, said[i])[:4] for i in (3, 9)}


# What cannot be used


def test_data_of_one_class(model: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no harmful prompts"):
        train_expert(model, [r for r in records() if r.label == "benign"], out=tmp_path, settings=SHORT)


def test_settings_out_of_range(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prefix_share"):
        train_expert(model, records(), out=tmp_path, prefix_share=1.5)
    with pytest.raises(ConfigError, match="unknown setting 'ranks'"):
        train_expert(model, records(), out=tmp_path, ranks=4)


def test_without_peft(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_adapter(model, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    for use in (lambda: train_expert(model, records(), out=tmp_path), lambda: load_adapter(folder, model)):
        with pytest.raises(UsageError, match="needs the package peft") as caught:
            use()
        assert caught.value.mend == "pip install 'trimtab[expert]'"


def test_a_family_without_the_usual_projections(model: Model) -> None:
    odd = replace(model, network=nn.ModuleDict({"c_attn": nn.Linear(2, 2)}))
    with pytest.raises(ModelError, match="no attention projection") as caught:
        lora_config(odd, 2, 4)
    assert "c_attn" in caught.value.mend


# The artefact


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_itself_reads_the_adapter(model: Model, tmp_path: Path) -> None:
    ids = render(model, "sea and ship").ids
    with attached(model, lora_config(model, 2, 4), seed=0) as expert:
        shake(expert)
        expected = naive_logits(expert, ids)
        save_adapter(expert, tmp_path)
    other = build("llama", "default")
    network = PeftModel.from_pretrained(other.network, tmp_path).eval()
    assert torch.equal(naive_logits(replace(other, network=network), ids), expected)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (("llama", "default", 1), r"weights \(fingerprint\): trained on \w+, this model has"),
        (("llama", "chatml", 0), r"chat template \(hash\)"),
    ],
)
def test_another_model_is_refused(model: Model, tmp_path: Path, other: tuple[str, str, int], differs: str) -> None:
    folder = saved_adapter(model, tmp_path)
    stranger = build(other[0], other[1], seed=other[2])
    with pytest.raises(ArtefactError, match=differs):
        load_adapter(folder, stranger)
    assert not any(isinstance(module, LoraLayer) for module in stranger.network.modules())


def test_a_damaged_or_edited_adapter_is_refused(model: Model, tmp_path: Path) -> None:
    folder = saved_adapter(model, tmp_path / "run" / "adapter")
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    tensors, config, identity = (
        folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "expert.json")
    )
    fields = json.loads(identity.read_text())

    def refused(path: Path, data: bytes, why: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=why):
            load_adapter(folder, model)
        path.write_bytes(whole[path])

    flipped = bytearray(whole[tensors])
    flipped[-1] ^= 1
    refused(tensors, bytes(flipped), "is not the file that was saved")
    refused(tensors, whole[tensors][:-40], "is not the file that was saved")
    refused(
        config, whole[config].replace(b'"lora_alpha": 4', b'"lora_alpha": 40'), "adapter_config.json is not the file"
    )
    refused(identity, json.dumps(fields | {"model": "other"}).encode(), "was edited")
    refused(identity, json.dumps(fields | {"more": 1}).encode(), "is damaged")
    refused(identity, json.dumps(fields | {"format": 9}).encode(), "has format 9")
    refused(identity, b"{", "holds no expert")
    assert fields["seal"] == digest({k: v for k, v in fields.items() if k != "seal"})
    tensors.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_adapter(folder, model)
    tensors.write_bytes(whole[tensors])
    load_adapter(tmp_path / "run", model)  # the run folder above it will do
    with pytest.raises(UsageError, match="wears an adapter already"):
        load_adapter(folder, model)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_base_and_expert_side_by_side(family: str, tmp_path: Path) -> None:
    model = build(family, "default")
    # Longer than the window of gemma3, and of different lengths.
    tails = [render(model, words).ids for words in ("the sea", "a ship with ropes and sails", "tide")]
    n = len(tails)

    def logits(of: Model, rows: list[tuple[int, ...]]) -> Tensor:
        with torch.inference_mode():
            return forward(of, rows, Past.empty(len(rows), of.device), 3)

    untouched, twice = logits(model, tails), logits(model, tails * 2)
    fingerprint, random_state = model.fingerprint, torch.random.get_rng_state()
    expert = load_adapter(saved_adapter(model, tmp_path), model)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert expert.fingerprint == model.fingerprint == fingerprint
    assert torch.equal(logits(model, tails), untouched)  # silent, from either side
    assert torch.equal(logits(expert, tails), untouched)

    with speaking(expert):
        alone = logits(expert, tails)
        assert torch.equal(logits(model, tails), alone)
    assert (alone - untouched).abs().amax(dim=(1, 2)).min() > 0.1
    with speaking(expert, beside_base=True):
        mixed = logits(expert, tails * 2)
    assert torch.equal(mixed[:n], twice[:n])
    torch.testing.assert_close(mixed[:n], untouched, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[n:], alone, atol=1e-5, rtol=1e-5)

    assert torch.equal(logits(model, tails), untouched)
    assert not any(p.requires_grad for p in expert.network.parameters())


def test_a_failure_while_the_expert_speaks_leaves_the_base_alone(model: Model, tmp_path: Path) -> None:
    ids = render(model, "sea and ship").ids
    untouched = naive_logits(model, ids)
    expert = load_adapter(saved_adapter(model, tmp_path), model)
    with pytest.raises(MemoryError), speaking(expert, beside_base=True):
        raise MemoryError
    assert torch.equal(naive_logits(model, ids), untouched)
    assert not any(module._forward_pre_hooks for module in expert.network.modules() if isinstance(module, LoraLayer))
