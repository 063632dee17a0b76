"""Fast equals naive: cached, batched decoding gives what one row read from the start gives (law 4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import FAMILIES, TEMPLATES, build, naive_logits, naive_reply, vectors_for
from trimtab.chat import render
from trimtab.decoding import engine
from trimtab.decoding.engine import Prefixes, Row, by_length, common_length, forward, generate_ids
from trimtab.decoding.generate import generate
from trimtab.decoding.past import Past
from trimtab.decoding.sampling import Sampling
from trimtab.errors import ArtefactError
from trimtab.models import Model, slot
from trimtab.softtoken.artifact import SoftToken

CHATS = ("Hi", "Where is the inn, then? " * 3, "a  b", "!", "the the the", "Hi", "In the inn " * 4, "x" * 30)


def replies(
    model: Model, prompts: Sequence[Sequence[int]], vectors: Tensor | None = None, **options: object
) -> list[Row]:
    found = list(generate_ids(model, prompts, vectors=vectors, **options))
    assert sorted(row.index for row in found) == list(range(len(prompts)))
    return sorted(found, key=lambda row: row.index)


def prompts_of(model: Model, *, with_token: bool, n: int = 8) -> tuple[list[tuple[int, ...]], Tensor | None]:
    position = "user" if with_token else None
    prompts = [render(model, chat, position=position, n_tokens=2).ids for chat in CHATS[:n]]
    return prompts, vectors_for(model, 2) if with_token else None


@torch.inference_mode()
def transformers_reply(model: Model, ids: Sequence[int], vectors: Tensor | None, limit: int) -> list[int]:
    """Greedy `generate` of transformers itself, on embeddings put together by hand."""
    slots = model.slot_ids(0 if vectors is None else len(vectors))
    embeddings = model.embedding(torch.tensor([[0 if i in slots else i for i in ids]]))
    for column, i in enumerate(ids):
        if i in slots:
            embeddings[0, column] = vectors[slots.index(i)] * (32**0.5 if "gemma" in model.name else 1)
    found = model.network.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        suppress_tokens=[i for i in slots if i < model.network.config.vocab_size] or None,
    )[0].tolist()
    end = next((n for n, i in enumerate(found) if i in model.eos_ids), len(found))
    return found[:end]


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_batch_size_gives_the_ids_of_transformers_and_of_the_naive_loop(
    tiny: Callable[..., Model], family: str, with_token: bool
) -> None:
    model = tiny(family, "default", padding=4)
    prompts, vectors = prompts_of(model, with_token=with_token)
    naive = [naive_reply(model, ids, 12, vectors) for ids in prompts]
    assert [transformers_reply(model, ids, vectors, 12) for ids in prompts] == naive
    assert len({tuple(ids) for ids in naive}) >= 5  # what is said depends on what was asked, and on the token
    assert not with_token or naive != [naive_reply(model, ids, 12) for ids in prompts_of(model, with_token=False)[0]]
    for batch_size in (1, 3, 8):
        found = replies(model, prompts, vectors, max_new_tokens=12, batch_size=batch_size)
        assert [row.ids for row in found] == naive


@pytest.mark.parametrize(
    ("template", "position"),
    [(t, p) for t in TEMPLATES for p in ("start", "assistant", "reply") if (t, p) != ("no_system", "assistant")],
)
def test_other_templates_and_positions(tiny: Callable[..., Model], template: str, position: str) -> None:
    model = tiny("gemma3", template)
    vectors = vectors_for(model, 3)
    prompts = [render(model, chat, position=position, n_tokens=3).ids for chat in CHATS[:4]]
    found = replies(model, prompts, vectors, max_new_tokens=6)
    assert [row.ids for row in found] == [naive_reply(model, ids, 6, vectors) for ids in prompts]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=24), min_size=1, max_size=6), st.integers(0, 12))
def test_any_ids_with_any_common_beginning(
    tiny: Callable[..., Model], family: str, ends: list[list[int]], common: int
) -> None:
    model = tiny(family, "chatml")
    prompts = [[*range(40, 40 + common), *end] for end in ends]
    found = replies(model, prompts, max_new_tokens=4)
    assert [row.ids for row in found] == [naive_reply(model, ids, 4) for ids in prompts]


def test_rows_stop_when_they_are_done_and_the_others_go_on(tiny: Callable[..., Model]) -> None:
    shared = tiny("qwen3", "default")
    prompts, _ = prompts_of(shared, with_token=False)
    free = [row.ids for row in replies(shared, prompts, max_new_tokens=12)]
    # End-of-turn is whatever some rows say in the middle of their replies, and one row at once.
    model = Model(shared.name, shared.network, shared.tokenizer, "", {})
    model.__dict__["eos_ids"] = frozenset({free[0][4], free[1][7], free[2][0]})
    found = replies(model, prompts, max_new_tokens=12, batch_size=8)
    for row, said in zip(found, free, strict=True):
        end = next((n for n, i in enumerate(said) if i in model.eos_ids), None)
        assert (row.ids, row.stop) == ((said, "length") if end is None else (said[:end], "eos"))
    lengths = [len(row.ids) for row in found]
    assert lengths[2] == 0
    assert lengths[0] <= 4
    assert {row.stop for row in found} == {"eos", "length"}


@pytest.mark.parametrize("limit", [1, 5])
def test_the_limit_counts_new_tokens(tiny: Callable[..., Model], limit: int) -> None:
    model = tiny("llama", "default")
    assert [len(row.ids) for row in replies(model, [[5, 6], [7]], max_new_tokens=limit)] == [limit, limit]
    assert replies(model, [], max_new_tokens=limit) == []


@pytest.mark.parametrize("tied", [False, True])
def test_the_slot_is_never_generated(tied: bool) -> None:
    """Though its row exists and the model would say nothing else."""
    model = build("llama", "default", padding=4, tied=tied)
    prompts, vectors = prompts_of(model, with_token=True, n=3)
    slots = model.slot_ids(2)
    read: list[Tensor] = []
    handle = model.network.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    naive_logits(model, prompts[0], vectors)
    handle.remove()
    model.network.lm_head.weight[slots[1]] = 100 * read[0][0, -1]
    assert naive_logits(model, prompts[0], vectors)[-1].argmax() == slots[1]
    for sampling in (Sampling(), Sampling(temperature=2.0), Sampling(temperature=2.0, top_p=0.9)):
        found = replies(model, prompts, vectors, max_new_tokens=16, sampling=sampling)
        assert all(row.ids for row in found)
        assert not {i for row in found for i in row.ids} & set(slots)
    # Without a token the model is untouched, row and all.
    assert replies(model, [[i for i in prompts[0] if i not in slots]])[0].stop


def test_a_generation_left_halfway_leaves_no_hook_and_no_inference_mode(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "default")
    prompts, vectors = prompts_of(model, with_token=True)
    running = generate_ids(model, prompts, vectors=vectors, max_new_tokens=2, batch_size=1)
    next(running)
    assert not torch.is_inference_mode_enabled()
    running.close()
    assert not model.embedding._forward_hooks
    assert not model.embedding._forward_pre_hooks


def test_sampling_is_fixed_by_the_seed_and_not_by_the_batch(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "default")
    prompts, vectors = prompts_of(model, with_token=True)

    def ids(seed: int, batch_size: int, **options: float) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed, **options)
        return [
            r.ids for r in replies(model, prompts, vectors, max_new_tokens=8, sampling=sampling, batch_size=batch_size)
        ]

    first = ids(3, 8)
    assert ids(3, 8) == ids(3, 3) == ids(3, 1) == first
    assert ids(4, 8) != first
    assert first[0] != first[5]  # the same words, but each row has its own stream
    assert ids(3, 8, top_p=1e-9) == [naive_reply(model, p, 8, vectors) for p in prompts]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_sampling_draws_what_the_logits_say(tiny: Callable[..., Model], temperature: float, top_p: float) -> None:
    model = tiny("llama", "default")
    prompt = render(model, "Hi").ids
    probabilities = (naive_logits(model, prompt)[-1] / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        nucleus = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
        probabilities = torch.zeros_like(probabilities).index_put((nucleus,), probabilities[nucleus])
        probabilities /= probabilities.sum()
    n = 3000
    sampling = Sampling(temperature, top_p, seed=1)
    drawn = replies(model, [prompt] * n, max_new_tokens=1, sampling=sampling, batch_size=1000)
    counts = torch.bincount(
        torch.tensor([[*row.ids, *model.eos_ids][0] for row in drawn]), minlength=len(probabilities)
    )
    assert counts[probabilities == 0].sum() == 0
    # Total variation; for so many draws from so many words chance alone gives less.
    assert (counts / n - probabilities).abs().sum() / 2 < 0.12


# Prefixes and forward


def split_rows(model: Model) -> list[tuple[list[int], list[int]]]:
    """Beginnings (one is the common part alone) and tails of different lengths, longer than the windows; a slot in each tail."""
    (slot_id,) = model.slot_ids(1)
    common = list(range(50, 60))
    owns: list[list[int]] = [list(range(100, 121)), [], list(range(80, 83)), list(range(9, 20))]
    tails = [[3, slot_id, 5], [slot_id, *range(60, 74)], [7, slot_id], [slot_id]]
    return [(common + own, tail) for own, tail in zip(owns, tails, strict=True)]


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_beginnings_and_tails_give_the_logits_of_one_pass(
    tiny: Callable[..., Model], family: str, common: bool
) -> None:
    model = tiny(family, "chatml")
    rows = split_rows(model)
    if not common:  # another first id each: nothing is shared
        rows = [([i, *begin], tail) for i, (begin, tail) in enumerate(rows)]
    vectors = vectors_for(model).requires_grad_()
    read: list[int] = []
    prefixes = Prefixes(model, [begin for begin, _ in rows], batch_size=3, progress=read.append)
    assert prefixes.shared == (10 if common else 0)
    assert sum(read) == len(rows)
    for chosen in ([0, 1, 2, 3], [1], [3, 0], [2, 2]):
        past = prefixes.past(chosen)
        with slot(model, vectors):
            found = forward(model, [rows[i][1] for i in chosen], past, 1)[:, -1]
        expected = torch.stack([naive_logits(model, rows[i][0] + rows[i][1], vectors.detach())[-1] for i in chosen])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert past.lengths.tolist() == [len(rows[i][0] + rows[i][1]) for i in chosen]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_behind_cached_beginnings_reach_only_the_vectors(tiny: Callable[..., Model], family: str) -> None:
    model = tiny(family, "chatml")
    rows = split_rows(model)
    prefixes = Prefixes(model, [begin for begin, _ in rows])
    gradients = []
    for cached in (True, False):
        vectors = vectors_for(model).requires_grad_()
        with slot(model, vectors):
            if cached:
                found = forward(model, [tail for _, tail in rows], prefixes.past(range(4)), 1)[:, -1]
            else:
                found = torch.stack(
                    [model.network(input_ids=torch.tensor([begin + tail])).logits[0, -1] for begin, tail in rows]
                )
        found.log_softmax(-1)[:, 7].sum().backward()
        gradients.append(vectors.grad)
        assert all(p.grad is None for p in model.network.parameters())
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_keep_gives_the_last_columns(tiny: Callable[..., Model]) -> None:
    model = tiny("mistral", "chatml")
    tails = [list(range(12)), list(range(20, 25))]
    with torch.inference_mode():
        found = forward(model, tails, Past.empty(2, model.device), 3)
    assert found.dtype == torch.float32
    for row, tail in enumerate(tails):
        torch.testing.assert_close(found[row], naive_logits(model, tail)[-3:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_retreat_and_a_selection_leave_the_past_as_it_was(tiny: Callable[..., Model]) -> None:
    model = tiny("gemma3", "chatml")
    rows = [list(range(14)), [30, 31]]
    past = Past.empty(2, model.device)
    forward(model, rows, past, 1)
    for end in ([1, 2], [3]):
        found = forward(model, [end, end], past, 1)[:, -1]
        past.retract([len(end)] * 2)
        expected = torch.stack([naive_logits(model, row + end)[-1] for row in rows])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert past.lengths.tolist() == [14, 2]
    past.select(torch.tensor([1]))
    found = forward(model, [[9]], past, 1)[0, -1]
    torch.testing.assert_close(found, naive_logits(model, [30, 31, 9])[-1], atol=1e-4, rtol=1e-4)


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=4))
def test_common_length(rows: list[list[int]]) -> None:
    n = common_length(rows)
    assert all(row[:n] == rows[0][:n] for row in rows)
    assert any(len(row) == n for row in rows) or len({row[n] for row in rows}) > 1


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_by_length(lengths: list[int], batch_size: int) -> None:
    batches = list(by_length(lengths, batch_size))
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5), st.integers(1, 30))
def test_one_long_row_does_not_pad_many_short_ones(lengths: list[int], batch_size: int, tokens: int) -> None:
    batches = list(by_length(lengths, batch_size, tokens))
    order = [i for batch in batches for i in batch]
    assert order == [i for batch in by_length(lengths, batch_size) for i in batch]
    assert all(len(batch) == 1 or len(batch) * lengths[batch[-1]] <= tokens for batch in batches)
    # None could have held the row that begins the next.
    for batch, following in itertools.pairwise(batches):
        assert len(batch) == batch_size or (len(batch) + 1) * lengths[following[0]] > tokens


def test_prompts_are_read_in_passes_of_bounded_size(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", "default")
    rows = [[30 + i] * n for i, n in enumerate((3, 3, 4, 30))]
    expected = {row.index: row.ids for row in generate_ids(model, rows, max_new_tokens=4, batch_size=4)}
    widths: list[int] = []
    seen = engine.forward

    def spied(model: Model, tails: Sequence[Sequence[int]], *rest: Any) -> torch.Tensor:
        widths.append(len(tails) * max(map(len, tails)))
        return seen(model, tails, *rest)

    monkeypatch.setattr(engine, "READ_TOGETHER", 12)
    monkeypatch.setattr(engine, "forward", spied)
    assert {row.index: row.ids for row in generate_ids(model, rows, max_new_tokens=4, batch_size=4)} == expected
    assert widths[:2] == [3 * 3, 29]  # in one pass it were 4 * 29


# generate: the same on chats


def test_generate_replies_in_order_with_text_and_reason(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "default")
    done: list[None] = []
    found = generate(model, [*CHATS], max_new_tokens=9, batch_size=3, progress=lambda: done.append(None))
    assert [list(r.ids) for r in found] == [naive_reply(model, render(model, chat).ids, 9) for chat in CHATS]
    assert [r.text for r in found] == [model.tokenizer.decode(r.ids, skip_special_tokens=True) for r in found]
    assert len(done) == len(CHATS)


def test_generate_with_a_token_and_prefills(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", "default")
    token = SoftToken.of(model, vectors_for(model, 2), "user")
    found = generate(model, ["Hi", "Hi"], token=token, prefills=["", "Sure, the"], max_new_tokens=9)
    for reply, prefill in zip(found, ("", "Sure, the"), strict=True):
        ids = render(model, "Hi", position="user", n_tokens=2, prefill=prefill).ids
        assert list(reply.ids) == naive_reply(model, ids, 9, token.vectors)
    assert len({reply.ids for reply in [*found, *generate(model, ["Hi"], max_new_tokens=9)]}) == 3
    with pytest.raises(ArtefactError):
        generate(tiny("qwen3", "default"), ["Hi"], token=token)
    with pytest.raises(ValueError, match="shorter"):
        generate(model, ["Hi", "Hi"], prefills=["Sure"])
