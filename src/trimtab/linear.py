"""Products with frozen weights on the CPU, in float32, by oneDNN.

torch hands them to MKL, whose kernels for few rows leave half of an AMD processor's speed unused (`bench/linear_bench.py`); in bfloat16 it uses oneDNN itself. The weights stay as they
are: nothing is copied or packed, and a layer remains the `nn.Linear` that transformers and PEFT know. Where a gradient is wanted, torch computes as always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` whose products are made by oneDNN while no gradients are."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if torch.is_grad_enabled() or input.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(input)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


def by_onednn(network: Any) -> None:
    """Let the network's plain linear layers compute by oneDNN, if this build of torch has it and they are on the CPU in float32."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for layer in network.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
            layer.__class__ = Linear
