"""From logits to the next id: what may be drawn, how often, and by which chance."""

from __future__ import annotations

import random
from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimtab.decoding.sampling import BROKEN, Sampling, chance, draw, greedy, penalised
from trimtab.errors import ConfigError

GRID = 4096


def random_logits(seed: int, rows: int = 4, vocabulary: int = 120, size: float = 3.0) -> Tensor:
    return size * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def drawn_shares(logits: Tensor, sampling: Sampling, n: int = GRID) -> Tensor:
    """How often each id `[V]` of one row of logits is drawn, for chances spread evenly over [0, 1)."""
    drawn = draw(logits.expand(n, -1), sampling, [(i + 0.5) / n for i in range(n)])
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / n


def by_transformers(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[B, V]` as `transformers.generate` would draw from, its warpers in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits).softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.3},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.5, "min_p": 1.0},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_what_is_drawn_is_what_transformers_would_draw(options: dict[str, Any]) -> None:
    """Even chances give every id its share, to within one step of the grid; what transformers rules out is never drawn."""
    sampling, logits = Sampling(**options), random_logits(1)
    for row, expected in zip(logits, by_transformers(logits, sampling), strict=True):
        shares = drawn_shares(row, sampling)
        assert not shares[expected == 0].any()
        torch.testing.assert_close(shares, expected, atol=1.01 / GRID, rtol=0)


@given(
    seed=st.integers(0, 2**20), top_k=st.integers(0, 20), top_p=st.floats(0.05, 1), min_p=st.floats(0, 0.5),
    temperature=st.floats(0.3, 3),
)  # fmt: skip
def test_any_options_leave_the_ids_that_transformers_leaves(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature, top_p, top_k, min_p)
    logits = random_logits(seed, rows=1, vocabulary=20, size=1.0)
    (expected,) = by_transformers(logits, sampling)
    torch.testing.assert_close(drawn_shares(logits[0], sampling, 512), expected, atol=1.01 / 512, rtol=0)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, rng = random_logits(2), random.Random(0)
    contexts = [[rng.randrange(120) for _ in range(9)] for _ in logits]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(contexts), logits.clone())
    assert torch.equal(penalised(logits, contexts, penalty), expected)
    # Base and expert have said the same.
    both = torch.stack([logits, -logits])
    found = penalised(both, contexts, penalty)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], penalised(-logits, contexts, penalty))


def test_the_penalty_by_hand() -> None:
    """Above 0 divided, below 0 multiplied, once however often it was said; a slot id beyond the table is passed over."""
    found = penalised(torch.tensor([[3.0, -2.0, 1.0, -torch.inf]] * 2), [(0, 0, 1, 3, 400), ()], 2.0)
    assert found.tolist() == [[1.5, -4.0, 1.0, -torch.inf], [3.0, -2.0, 1.0, -torch.inf]]


def test_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def drawn(*chances: float, **options: Any) -> list[int]:
        return draw(logits.expand(len(chances), -1), Sampling(temperature=1.0, **options), chances)

    assert drawn(0.0, 0.49, 0.51, 0.69, 0.71, 0.89, 0.91) == [0, 0, 1, 1, 2, 2, 3]
    assert drawn(0.0, 0.71, 0.72, 0.99, top_k=2) == [0, 1, 1, 2]  # the two ties both stay: 5/9, 2/9, 2/9
    assert drawn(0.0, 0.71, 0.72, 0.99, top_p=0.6) == [0, 0, 1, 1]  # the one that crosses stays: 5/7, 2/7
    assert drawn(0.0, 0.55, 0.56, 0.99, min_p=0.3) == [0, 0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_no_chance_falls_off_the_end(seed: int) -> None:
    """The first and the last chance there are draw the first and the last id that may be drawn."""
    logits = random_logits(seed, rows=1, vocabulary=30_000)
    logits[0, [0, 1, 29_998, 29_999]] = -torch.inf
    assert draw(logits, Sampling(temperature=1.0), [0.0]) == [2]
    last = draw(logits, Sampling(temperature=1.0), [1 - 2**-53])
    # In float64 the tail may be too light to move the sum: then the last id that does.
    assert last[0] <= 29_997
    assert logits[0, last[0]].isfinite()
    assert draw(torch.tensor([[0.0, 0.0, -torch.inf]]), Sampling(temperature=1.0), [1 - 2**-53]) == [1]


def test_hardly_any_temperature_is_greedy() -> None:
    logits = random_logits(3, rows=50)
    assert draw(logits, Sampling(temperature=1e-4), [0.999] * 50) == greedy(logits) == logits.argmax(-1).tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_greedy_ties_go_to_the_lowest_id(scores: list[int]) -> None:
    assert greedy(torch.tensor([scores], dtype=torch.float32)) == [scores.index(max(scores))]


@pytest.mark.parametrize("broken", [[0.0, nan, 1.0], [0.0, torch.inf, 1.0], [-torch.inf] * 3, [nan] * 3])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_a_row_that_is_not_finite_is_broken_and_the_others_are_not(
    broken: list[float], options: dict[str, Any]
) -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0], broken, [9.0, -torch.inf, 0.0]])
    assert greedy(logits) == [2, BROKEN, 0]
    assert draw(logits, Sampling(temperature=1.0, **options), [0.5, 0.5, 0.5]) == [2, BROKEN, 0]


def test_what_minus_infinity_rules_out_is_never_drawn() -> None:
    logits = random_logits(4, rows=1)
    logits[0, ::2] = -torch.inf
    shares = drawn_shares(logits[0], Sampling(temperature=3.0))
    assert not shares[::2].any()
    assert shares[1::2].count_nonzero() > 40


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    logits, chances = random_logits(5, rows=40), [chance(0, i, 0) for i in range(40)]
    sampling = Sampling(temperature=1.3, top_p=0.9)
    together = draw(logits, sampling, chances)
    assert together == [draw(logits[i : i + 1], sampling, chances[i : i + 1])[0] for i in range(40)]
    assert together[::-1] == draw(logits.flip(0), sampling, chances[::-1])


# chance


def test_chances_are_uniform_over_rows_places_and_seeds() -> None:
    """Kolmogorov-Smirnov: the largest gap to the straight line, below what chance alone exceeds once in 1000."""
    n = 4000
    for numbers in (
        [chance(0, 0, i) for i in range(n)],
        [chance(0, 0, -i) for i in range(n)],
        [chance(0, i, 1) for i in range(n)],
        [chance(i, 1, 1) for i in range(n)],
        [chance(7, i % 40, i // 40) for i in range(n)],
    ):
        assert all(0 <= x < 1 for x in numbers)
        ordered = sorted(numbers)
        gap = max(max(abs(x - i / n), abs(x - (i + 1) / n)) for i, x in enumerate(ordered))
        assert gap < 1.95 / n**0.5


def test_neighbours_are_independent() -> None:
    """Correlation of the chances of neighbouring places, rows and seeds, and of a place's two streams."""
    n = 4000
    here = torch.tensor([chance(3, i % 50, i // 50) for i in range(n)])
    for there in (
        [chance(3, i % 50, i // 50 + 1) for i in range(n)],
        [chance(3, i % 50 + 1, i // 50) for i in range(n)],
        [chance(4, i % 50, i // 50) for i in range(n)],
        [chance(3, i // 50, i % 50) for i in range(n)],
        [chance(3, i % 50, -(i // 50) - 1) for i in range(n)],
    ):
        assert torch.corrcoef(torch.stack([here, torch.tensor(there)]))[0, 1].abs() < 4 / n**0.5


def test_no_two_places_share_a_chance() -> None:
    found = {chance(s, r, p) for s in range(-3, 4) for r in range(20) for p in range(-20, 20)}
    assert len(found) == 7 * 20 * 40


def test_chances_are_fixed_for_ever() -> None:
    """A changed hash would change every sampled reply that was ever published with its seed."""
    assert chance(0, 0, 0) == 0.13870941014555427
    assert chance(1, 2, 3) == 0.4175580595044027
    assert chance(-1, 0, -5) == 0.04128990405587518
    assert chance(2**70, 9, 9) == 0.3390000928799165
    # The published first output of SplitMix64 from state 0; row and place take it back to 0 each time.
    first = 0xE220A8397B1DCDAF
    assert chance(0, -first, -first) == (first >> 11) / 2**53


# Settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": nan}, "temperature must be at least 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.01}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"top_k": -1, "min_p": -1}, "top_k must be at least 0; min_p"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**options)
