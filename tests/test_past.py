"""Keys and values with room to grow: the same as copying everything at every step, and written in place."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from trimtab.decoding.past import Growing, Past

LAYERS, HEADS, SIZE = 2, 2, 3


def grown(past: Past, new: Tensor) -> None:
    """Read one column `[B, 1]` of numbers: layer i caches them times i + 1, and their negatives as values."""
    for layer in range(LAYERS):
        states = (new * (layer + 1)).view(len(new), 1, 1, 1).expand(-1, HEADS, 1, SIZE)
        past.cache.update(states, -states, layer)
    past.mask = torch.cat([past.mask, torch.ones(len(new), 1, dtype=torch.long)], 1)
    past.lengths = past.lengths + 1


def held(past: Past) -> list[list[float]]:
    """What each row has read and not unread, from the cache's last layer; every layer, head and value checked against it."""
    keys = past.cache.layers[-1].keys
    for number, layer in enumerate(past.cache.layers):
        assert torch.equal(layer.keys * LAYERS, keys * (number + 1))
        assert torch.equal(layer.values, -layer.keys)
    return [
        [key for key, seen in zip(row, mask, strict=True) if seen]
        for row, mask in zip((keys[:, 0, :, 0] / LAYERS).tolist(), past.mask.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_a_past_holds_what_its_rows_have_read_whatever_is_done_to_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Growing, "ROOM", 3)  # so that it is often used up
    chance, numbers = random.Random(seed), iter(range(1, 10_000))
    family: list[tuple[Past, list[list[float]]]] = [(Past.empty(3, torch.device("cpu")), [[], [], []])]
    for _ in range(60):
        past, rows = chance.choice(family)
        what = chance.choice(["grow", "grow", "grow", "select", "retract", "stack"])
        if what == "grow":
            new = [float(next(numbers)) for _ in rows]
            grown(past, torch.tensor(new))
            for row, number in zip(rows, new, strict=True):
                row.append(number)
        elif what == "select" and len(rows) > 1 and past.mask.shape[1]:
            keep = sorted(chance.sample(range(len(rows)), len(rows) - 1))
            past.select(torch.tensor(keep))
            rows[:] = [rows[i] for i in keep]
        elif what == "retract":  # of what all rows have just read
            drafted = [[float(next(numbers)) for _ in rows] for _ in range(4)]
            for new in drafted:
                grown(past, torch.tensor(new))
            counts = [chance.randrange(4) for _ in rows]
            past.retract(counts)
            for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
                row.extend(new[i] for new in drafted[: 4 - count])
        elif what == "stack" and len(family) < 4 and past.mask.shape[1]:
            other, theirs = chance.choice(family)
            if other.mask.shape[1]:
                family.append((Past.stack(past, other), [list(row) for row in rows + theirs]))
        for each, expected in family:
            if each.mask.shape[1]:
                assert held(each) == expected
            assert each.lengths.tolist() == [len(row) for row in expected]


@torch.no_grad()
def test_a_new_token_is_written_behind_the_others_and_nothing_is_copied() -> None:
    past = Past.empty(2, torch.device("cpu"))
    grown(past, torch.tensor([1.0, 2.0]))
    where = past.cache.layers[0].keys.data_ptr()
    for _ in range(Growing.ROOM):
        grown(past, torch.tensor([3.0, 4.0]))
        assert past.cache.layers[0].keys.data_ptr() == where
    grown(past, torch.tensor([5.0, 6.0]))
    assert past.cache.layers[0].keys.data_ptr() != where


def test_gradients_flow_through_what_was_read_with_them() -> None:
    past = Past.empty(1, torch.device("cpu"))
    with torch.no_grad():
        grown(past, torch.tensor([1.0]))
    new = torch.tensor([2.0], requires_grad=True)
    grown(past, new)
    grown(past, new)
    past.cache.layers[0].keys.sum().backward()
    assert new.grad is not None
    assert new.grad.item() == 2 * HEADS * SIZE


def test_what_inference_mode_made_may_grow_outside_it() -> None:
    past = Past.empty(1, torch.device("cpu"))
    with torch.inference_mode():
        grown(past, torch.tensor([1.0]))
    with torch.no_grad():
        grown(past, torch.tensor([2.0]))
    assert held(past) == [[1.0, 2.0]]
