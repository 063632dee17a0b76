"""The objective, against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from trimtab.softtoken.objective import Reference, focal_weights, kl_to_base, reply_nll, sta_loss, weighted_mean

LOSSES = torch.tensor([0.0, log(2), log(10)])  # p = 1, 1/2, 1/10


def some_logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("gamma", "direction", "weights"),
    [
        (0.0, "hard", [1, 1, 1]),
        (1.0, "hard", [0, 0.5, 0.9]),
        (2.0, "hard", [0, 0.25, 0.81]),
        (0.0, "easy", [1, 1, 1]),
        (2.0, "easy", [1, 0.25, 0.01]),
    ],
)
def test_focal_weights(gamma: float, direction: str, weights: list[float]) -> None:
    torch.testing.assert_close(focal_weights(LOSSES, gamma, direction), torch.tensor(weights).float())


def test_focal_weights_keep_their_precision_where_the_loss_vanishes() -> None:
    assert focal_weights(torch.tensor([1e-9]), 1.0).item() == pytest.approx(1e-9, rel=1e-4)


def test_focal_weights_are_never_negative_though_a_kl_may_be_by_rounding() -> None:
    assert focal_weights(torch.tensor([-1e-7]), 2.0).item() == 0.0


def test_no_gradient_through_the_weights() -> None:
    losses = LOSSES.clone().requires_grad_()
    weights = focal_weights(losses, 2.0)
    assert not weights.requires_grad
    sta_loss(losses, losses, benign_weight=0.0, gamma=2.0).backward()
    torch.testing.assert_close(losses.grad, weights / weights.sum())


def test_weighted_mean() -> None:
    losses = torch.tensor([1.0, 4.0])
    assert weighted_mean(losses, torch.tensor([3.0, 1.0])).item() == pytest.approx(7 / 4)
    assert weighted_mean(losses, torch.zeros(2)).item() == pytest.approx(2.5)
    assert weighted_mean(losses[:0], torch.zeros(0)).item() == 0.0


def test_reply_nll_sums_over_the_tokens_that_count() -> None:
    # Probabilities 1/2, 1/4, 1/4 at both positions of both rows.
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 2, 3)
    nll = reply_nll(logits, torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, 1], [1, 0]]))
    torch.testing.assert_close(nll, torch.tensor([3 * log(2), 2 * log(2)]))


def exact_kl(base: Tensor, tuned: Tensor) -> Tensor:
    p, q = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_kl_is_exact_where_the_reference_holds_the_whole_vocabulary() -> None:
    base, tuned = some_logits(0, 4, 3, 20), some_logits(1, 4, 3, 20)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = kl_to_base(tuned, Reference.of(base, n=1000), mask)
    torch.testing.assert_close(found.double(), (exact_kl(base, tuned) * mask).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_truncated_reference_gives_a_lower_bound(n: int) -> None:
    base, tuned = some_logits(2, 50, 1, 20), some_logits(3, 50, 1, 20)
    found = kl_to_base(tuned, Reference.of(base, n=n), torch.ones(50, 1)).double()
    exact = exact_kl(base, tuned).sum(-1)
    assert (found >= -1e-5).all()
    assert (found <= exact + 1e-4).all()
    assert (found < exact - 1e-3).any()


def test_kl_by_hand_with_one_token_and_the_rest() -> None:
    base, tuned = torch.tensor([[[0.5, 0.3, 0.2]]]).log(), torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    found = kl_to_base(tuned, Reference.of(base, n=1), torch.ones(1, 1))
    assert found.item() == pytest.approx(0.5 * log(2) + 0.5 * log(0.5 / 0.75), rel=1e-5)


def test_kl_of_the_same_model_is_zero_and_pulls_nowhere() -> None:
    base = some_logits(4, 2, 2, 30)
    tuned = base.clone().requires_grad_()
    found = kl_to_base(tuned, Reference.of(base, n=5), torch.ones(2, 2))
    found.sum().backward()
    assert found.abs().max() < 1e-5
    assert tuned.grad.abs().max() < 1e-5


def test_reference_keeps_the_likeliest_tokens_of_the_rows_asked_for() -> None:
    logits = torch.tensor([[[0.1, 0.6, 0.3]], [[0.7, 0.1, 0.2]]]).log()
    reference = Reference.of(logits, n=2).row(1)
    assert reference.ids.tolist() == [[[0, 2]]]
    torch.testing.assert_close(reference.log_p.exp(), torch.tensor([[[0.7, 0.2]]]))


@pytest.mark.parametrize(
    ("benign_weight", "gamma", "direction"),
    [(0.0, 0.0, "hard"), (1.0, 2.0, "hard"), (0.3, 2.0, "hard"), (0.5, 1.0, "easy")],
)
def test_sta_loss(benign_weight: float, gamma: float, direction: str) -> None:
    harmful, benign = [0.2, 1.5], [0.05, 0.9, 3.0]

    def mean(losses: list[float]) -> float:
        weights = [(1 - exp(-x) if direction == "hard" else exp(-x)) ** gamma for x in losses]
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    found = sta_loss(
        torch.tensor(harmful), torch.tensor(benign), benign_weight=benign_weight, gamma=gamma, direction=direction
    )
    assert found.item() == pytest.approx((1 - benign_weight) * mean(harmful) + benign_weight * mean(benign), rel=1e-5)


def test_sta_loss_in_figures() -> None:
    # Hard weights at gamma 1: 0, 1/2, 9/10; gamma 0: all 1.
    by_hand = (0.5 * log(2) + 0.9 * log(10)) / 1.4
    assert sta_loss(LOSSES, LOSSES, benign_weight=0.5, gamma=1.0).item() == pytest.approx(by_hand)
    assert sta_loss(LOSSES, LOSSES, benign_weight=0.5, gamma=0.0).item() == pytest.approx(log(20) / 3)
