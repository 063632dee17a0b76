"""A row more in a GGUF file: every other tensor's bytes as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

from trimtab.errors import ExportError
from trimtab.exporters import gguf

WORDS, HIDDEN = 6, 32
TABLE = np.random.default_rng(0).normal(size=(WORDS, HIDDEN)).astype(np.float32)
ROW = torch.from_numpy(np.random.default_rng(1).normal(size=HIDDEN).astype(np.float32)) * 40


def made(path: Path, kind: Kind = Kind.Q8_0, head: Kind | None = None, add_bos: bool = False) -> Path:
    """A file with all that matters here, and two tensors that must stay as they are."""
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(WORDS)
    writer.add_token_list([f"word{i}" for i in range(WORDS)])
    writer.add_token_types([int(TokenType.NORMAL)] * WORDS)
    writer.add_token_scores([-1.0] * WORDS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bool("tokenizer.ggml.add_bos_token", add_bos)
    writer.add_chat_template("{{ messages }}")
    tables = {
        "token_embd.weight": kind,
        "blk.0.ffn_down.weight": Kind.Q4_1,
        **({"output.weight": head} if head else {}),
    }
    for name, its in tables.items():
        data = TABLE if its == Kind.F32 else quantize(TABLE, its)
        writer.add_tensor(name, data, raw_dtype=its)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def table(path: Path, name: str) -> Any:
    tensor = next(each for each in GGUFReader(path).tensors if each.name == name)
    return dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("kind", gguf.EXACT, ids=lambda kind: kind.name)
def test_an_appended_row_changes_the_tables_and_nothing_else(kind: Kind, untie: bool, tmp_path: Path) -> None:
    source, target = made(tmp_path / "a.gguf", kind), tmp_path / "b.gguf"
    told: list[int] = []
    found = gguf.patch(
        source, target, {WORDS: ROW}, ["<|t|>"], template="new", silent={WORDS: -ROW}, untie=untie, advance=told.append
    )
    assert found == kind.name
    assert gguf.changed(gguf.tensors(source), gguf.tensors(target)) == {gguf.EMBEDDING, *([gguf.HEAD] if untie else [])}
    before, after = contents(source), contents(target)
    new = {
        "tokenizer.ggml.tokens": [*before["tokenizer.ggml.tokens"], "<|t|>"],
        "tokenizer.ggml.token_type": [*before["tokenizer.ggml.token_type"], int(TokenType.CONTROL)],
        "tokenizer.ggml.scores": [*before["tokenizer.ggml.scores"], 0.0],
        "tokenizer.chat_template": "new",
        "llama.vocab_size": WORDS + 1,
        gguf.SUPPRESS: [WORDS],
    }
    assert after == before | new
    assert torch.allclose(gguf.rows(gguf.tensors(target), [WORDS])[0], ROW, rtol=0, atol=float(ROW.abs().max()) / 100)
    assert np.array_equal(table(target, gguf.EMBEDDING)[:WORDS], table(source, gguf.EMBEDDING))
    assert gguf.others_kept(gguf.tensors(source), gguf.tensors(target), [WORDS])
    assert gguf.said(target, [WORDS]) == (("<|t|>",), "new", True)
    assert gguf.said(target, [WORDS - 1]) == ((f"word{WORDS - 1}",), "new", False)  # may be sampled
    if untie:
        head = table(target, gguf.HEAD)
        assert np.array_equal(head[:WORDS], table(source, gguf.EMBEDDING))
        assert np.dot(head[WORDS], ROW.numpy()) < 0
    assert abs(gguf.sizes(source, 1, untie)[0] - target.stat().st_size) < 300  # keys, names, alignment
    assert sum(told) == sum(tensor.n_bytes for tensor in GGUFReader(target).tensors)


def test_a_row_that_is_there_already_is_set_and_an_own_head_stays(tmp_path: Path) -> None:
    source, target = made(tmp_path / "a.gguf", Kind.F32, head=Kind.F32), tmp_path / "b.gguf"
    gguf.patch(source, target, {4: ROW}, ["<|t|>"], template="new", silent=None, untie=False)
    assert gguf.changed(gguf.tensors(source), gguf.tensors(target)) == {gguf.EMBEDDING}
    assert torch.equal(gguf.rows(gguf.tensors(target), [4])[0], ROW)
    assert gguf.others_kept(gguf.tensors(source), gguf.tensors(target), [4])
    assert not gguf.others_kept(gguf.tensors(source), gguf.tensors(target), [3])
    after = contents(target)
    assert after["tokenizer.ggml.tokens"][4] == "<|t|>"
    assert after["llama.vocab_size"] == WORDS


def test_two_vectors_and_one_spare_row(tmp_path: Path) -> None:
    source, target = made(tmp_path / "a.gguf", Kind.F32), tmp_path / "b.gguf"
    last = WORDS - 1
    gguf.patch(
        source,
        target,
        {last: ROW, WORDS: ROW * 2},
        ["<|t|>", "<|u|>"],
        template="new",
        silent={WORDS: -ROW},
        untie=True,
    )
    assert torch.equal(gguf.rows(gguf.tensors(target), [last, WORDS]), torch.stack([ROW, ROW * 2]))
    head = table(target, gguf.HEAD)
    assert np.array_equal(head[:WORDS], table(source, gguf.EMBEDDING))
    assert np.array_equal(head[WORDS], -ROW.numpy())
    after = contents(target)
    assert after["tokenizer.ggml.tokens"][last:] == ["<|t|>", "<|u|>"]
    assert after[gguf.SUPPRESS] == [last, WORDS]


def test_an_own_head_grows_by_a_silent_row(tmp_path: Path) -> None:
    source, target = made(tmp_path / "a.gguf", Kind.F16, head=Kind.Q8_0), tmp_path / "b.gguf"
    gguf.patch(source, target, {WORDS: ROW}, ["<|t|>"], template="new", silent={WORDS: -ROW}, untie=False)
    head = table(target, gguf.HEAD)
    assert np.array_equal(head[:WORDS], table(source, gguf.HEAD))
    assert np.allclose(head[WORDS], -ROW.numpy(), atol=float(ROW.abs().max()) / 100)


def test_a_head_that_can_only_be_read_gets_a_zero_row_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = made(tmp_path / "a.gguf", Kind.F16, head=Kind.Q8_0), tmp_path / "b.gguf"
    assert gguf.holds_silence(source)
    assert gguf.holds_silence(made(tmp_path / "c.gguf"))

    def only_read(data: Any, kind: Kind) -> Any:
        if kind == Kind.Q8_0:
            raise NotImplementedError
        return quantize(data, kind)

    monkeypatch.setattr(gguf, "quantize", only_read)
    assert not gguf.holds_silence(source)
    gguf.patch(source, target, {WORDS: ROW}, ["<|t|>"], template="new", silent={WORDS: -ROW}, untie=False)
    assert not table(target, gguf.HEAD)[WORDS].any()
    assert np.array_equal(table(target, gguf.HEAD)[:WORDS], table(source, gguf.HEAD))


def test_a_token_before_bos_keeps_llama_cpp_from_putting_one_before_both(tmp_path: Path) -> None:
    source = made(tmp_path / "a.gguf", add_bos=True)
    for at_start in (True, False):
        target = tmp_path / f"{at_start}.gguf"
        gguf.patch(source, target, {WORDS: ROW}, ["<|t|>"], template="new", at_start=at_start, silent=None, untie=False)
        assert contents(target)["tokenizer.ggml.add_bos_token"] is not at_start


def test_a_coarse_table_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    coarse = made(tmp_path / "a.gguf", Kind.Q4_1)
    options: dict[str, Any] = {"template": "new", "silent": None, "untie": False}
    with pytest.raises(ExportError, match=r"Q4_1, too coarse for a trained row\.\n.*--token-embedding-type q8_0"):
        gguf.patch(coarse, tmp_path / "b.gguf", {WORDS: ROW}, ["<|t|>"], **options)
    with pytest.raises(ExportError, match="Q4_1, too coarse"):  # the plan says so before anything is measured
        gguf.sizes(coarse, 1, False)
    coarse.write_bytes(coarse.read_bytes()[:200])
    with pytest.raises(ExportError, match="no whole GGUF file"):
        gguf.patch(coarse, tmp_path / "b.gguf", {WORDS: ROW}, ["<|t|>"], **options)
