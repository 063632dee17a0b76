"""A network as transformers itself loads it, for the contenders that are not ours."""

from typing import Any

from torch import nn

from trimtab.linear import Linear


def stock(network: Any) -> Any:
    """The same network, its products made by torch again."""
    for layer in network.modules():
        if type(layer) is Linear:
            layer.__class__ = nn.Linear
    return network
