"""Products by oneDNN are torch's products, to rounding; layers stay what others take them for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from trimtab.linear import Linear, by_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40, bias=False)).requires_grad_(False)
    by_onednn(found)
    return found


@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 3, 48), (0, 48)])
def test_products_are_torchs(network: nn.Sequential, shape: tuple[int, ...]) -> None:
    assert type(network[0]) is Linear
    read = torch.randn(shape)
    with torch.inference_mode():
        found = network[0](read)
    torch.testing.assert_close(found, linear(read, network[0].weight, network[0].bias), atol=1e-5, rtol=1e-5)


def test_columns_picked_out_of_wider_rows_are_read_right(network: nn.Sequential) -> None:
    read = torch.randn(5, 96)[:, ::2]
    with torch.inference_mode():
        found = network[0](read)
    torch.testing.assert_close(found, linear(read, network[0].weight, network[0].bias), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_input(network: nn.Sequential) -> None:
    read = torch.randn(3, 48, requires_grad=True)
    network(read).sum().backward()
    assert read.grad is not None
    assert read.grad.abs().sum() > 0


def test_layers_are_linear_layers_to_everybody_else(network: nn.Sequential, tmp_path: Path) -> None:
    assert isinstance(network[0], nn.Linear)
    twin = copy.deepcopy(network)
    twin[0].weight.zero_()  # not the first one's
    assert network[0].weight.abs().sum() > 0
    torch.save(network.state_dict(), tmp_path / "weights")
    plain = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40, bias=False))
    plain.load_state_dict(torch.load(tmp_path / "weights"))


def test_other_dtypes_and_layers_of_others_are_left_alone() -> None:
    class Theirs(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(4, 4).bfloat16(), Theirs(4, 4))
    by_onednn(network)
    assert [type(layer) for layer in network] == [nn.Linear, Theirs]


def test_a_layer_that_was_cast_since_still_computes(network: nn.Sequential) -> None:
    with torch.inference_mode():
        assert network.bfloat16()(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
