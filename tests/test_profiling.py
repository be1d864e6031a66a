"""Oracles: the published forward costs, closed forms, clocks that we turn ourselves."""

import pytest
import torch
from diffusers import UNet2DModel

from wddm.backbones import build_backbone
from wddm.profiling import forward_flops

GFLOP = {  # published, to the digits given
    ("unet", "cifar10", 1): "3.18",
    ("unet", "cifar10", 2): "0.20",
    ("unet", "stl10", 1): "12.82",
    ("unet", "celebahq", 0): "812",
    ("unet", "celebahq", 1): "122",
    ("unet", "celebahq", 2): "13.8",
    ("ukan", "cifar10", 0): "11.19",
    ("ukan", "cifar10", 1): "2.60",
    ("ukan", "cifar10", 2): "0.32",
    ("ukan", "stl10", 0): "45.6",
    ("ukan", "stl10", 1): "11.2",
    ("ukan", "celebahq", 0): "266",
    ("ukan", "celebahq", 1): "51",
    ("ukan", "celebahq", 2): "46",
}


@pytest.mark.parametrize(("kind", "dataset", "level"), GFLOP)
def test_forward_flops_are_the_published_ones(kind: str, dataset: str, level: int) -> None:
    wanted = GFLOP[kind, dataset, level]
    with torch.device("meta"):
        backbone = build_backbone(kind, dataset=dataset, level=level)
    got = forward_flops(backbone, attention=False) / 1e9
    assert f"{got:.{len(wanted.partition('.')[2])}f}" == wanted


def test_attention_is_counted_unless_it_is_left_out() -> None:
    """Two products of (n, c) with (c, n) in the middle block and nowhere else: 4 n^2 c."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    backbone = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, attention_head_dim=8, **blocks)
    assert forward_flops(backbone) - forward_flops(backbone, attention=False) == 4 * 64**2 * 32


def test_counting_needs_no_memory_and_leaves_the_network_alone() -> None:
    backbone = build_backbone("ukan", dataset="digits", level=1).train()
    forward_flops(backbone)
    assert backbone.training and {p.device.type for p in backbone.parameters()} == {"cpu"}
