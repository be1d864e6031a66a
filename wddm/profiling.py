"""profiling: what a network costs, counted."""

import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

ATTENTION = ("bmm", "attention")  # operators of its two products, of queries with keys and of weights with values


def forward_flops(backbone: ModelMixin, *, attention: bool = True) -> int:
    """Floating-point operations of one forward pass at batch 1, without memory for weights or activations.

    A multiply-add counts as two; what is not a matrix product or a convolution (norms, activations, spline bases)
    counts as none. The numbers published for these networks leave out the two products inside attention, as counters
    do that do not see into its fused kernel; `attention=False` agrees with them to the digits given.
    """
    config = backbone.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy = type(backbone).from_config(config).eval()
        copy(torch.empty(1, config.in_channels, config.sample_size, config.sample_size), torch.zeros(1).long())
    counted = counter.get_flop_counts()["Global"].items()
    return sum(flops for name, flops in counted if attention or not any(part in str(name) for part in ATTENTION))
