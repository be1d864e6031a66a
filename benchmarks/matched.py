"""matched: a pixel network with as many parameters as one on wavelets, for a fair comparison."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch

from wddm.backbones import build_backbone, preset_sizes


def matched(network: Mapping[str, Any]) -> dict[str, Any]:
    """The pixel network closest to `network` in its number of parameters, both as arguments of `build_backbone`.

    Its widths are those of the preset of the same data set at level 0, scaled by one factor, to multiples of 8.
    """
    pixels = {**network, "level": 0, **preset_sizes(network["backbone"], network["dataset"], 0)}
    preset = pixels.pop("block_out_channels")
    scaled = sorted({tuple(max(8, 8 * round(w * percent / 800)) for w in preset) for percent in range(10, 300, 2)})

    def count(widths: tuple[int, ...]) -> int:
        return build_backbone(**pixels | {"widths": widths}).num_parameters()

    with torch.device("meta"):
        wanted = build_backbone(**network).num_parameters()
        larger = bisect_left(scaled, wanted, key=count)
        near = scaled[max(0, larger - 1) : larger + 1]
        return pixels | {"widths": min(near, key=lambda widths: abs(count(widths) - wanted))}
