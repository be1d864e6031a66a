"""Denoisers by name and size: `build_backbone("unet" | "ukan" | "dit", dataset=..., level=...)`.

A UNet is diffusers' `UNet2DModel`, U-KAN and DiT are ours; all are called `model(sample, timestep).sample` on
coefficients (B, 4^L C, H/2^L, W/2^L). To add one, write a function that builds it, whose arguments are its options, and
enter it in `BACKBONES`. The presets of UNet and U-KAN are the published models; those marked `ours` fill the gaps.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from wddm.dit import DiTModel
from wddm.loading import CLASS_NAME, load_strictly, read_config
from wddm.ukan import UKANModel, check_halvings
from wddm.wavelets import check_choice, check_multiple, sides

IMAGES = {"digits": (16, 1), "patches": (32, 3), "cifar10": (32, 3), "stl10": (64, 3), "celebahq": (256, 3)}
PASSES = 3  # forward passes that a training step costs: the backward pass costs two


class Preset(NamedTuple):
    """Widths of each backbone for a data set at a level, and the UNet's levels with attention."""

    unet: tuple[int, ...]
    attention: tuple[int, ...]
    ukan: tuple[int, ...]
    dit: tuple[int, ...] | None = None  # one width per block; None where there are more than 1,024 tokens


PRESETS = {  # (dataset, level)
    ("cifar10", 0): Preset((128, 256, 256, 256), (1,), (128, 256, 256), 12 * (384,)),  # UNet: the DDPM baseline
    ("cifar10", 1): Preset((128, 256, 256), (0, 1), (128, 256), 10 * (384,)),
    ("cifar10", 2): Preset((64, 128, 128), (0,), (128,), 6 * (256,)),
    ("stl10", 0): Preset((128, 256, 256, 256), (2, 3), (128, 256, 256, 256)),  # UNet: ours
    ("stl10", 1): Preset((128, 256, 256, 256), (0, 1), (128, 256, 256), 12 * (384,)),
    ("stl10", 2): Preset((128, 256, 256), (0,), (128, 256), 10 * (384,)),  # ours
    ("celebahq", 0): Preset((128, 256, 256, 512), (), (64, 128, 256, 256)),
    ("celebahq", 1): Preset((128, 128, 256, 256, 256), (2, 3), (64, 128, 128, 256, 256)),
    ("celebahq", 2): Preset((64, 128, 128, 256), (1,), (128, 256, 256, 256)),
    ("celebahq", 3): Preset((64, 128, 256), (1,), (128, 256, 256), 12 * (384,)),  # ours
    ("digits", 0): Preset((32, 64, 64), (), (64, 64), 4 * (64,)),  # ours, for a laptop, like all that follow
    ("digits", 1): Preset((64, 64), (), (64,), 4 * (64,)),
    ("digits", 2): Preset((64,), (), (64,), 4 * (64,)),
    ("patches", 0): Preset((32, 64, 128), (), (64, 64, 128), 4 * (64,)),
    ("patches", 1): Preset((64, 128), (), (64, 128), 4 * (128,)),
    ("patches", 2): Preset((64,), (), (64,), 4 * (128,)),
}


def build_backbone(
    backbone: str, *, dataset: str | None = None, level: int = 1, image_size: int | Sequence[int] | None = None,
    image_channels: int | None = None, widths: Sequence[int] | None = None, layers_per_block: int | None = None,
    attention_levels: Sequence[int] | None = None, attention_head_dim: int = 64, dropout: float | None = None,
    num_class_embeds: int | None = None,
) -> ModelMixin:  # fmt: skip
    """A freshly initialised denoiser for images at wavelet level `level`; ValueError if the options do not fit.

    Args:
        dataset: a key of `IMAGES`, which gives size, channels and preset. Other images need image_size (a side, or
            height and width) and image_channels. Without widths they get the preset whose coefficient maps are nearest
            in side (geometric mean, by ratio); among equals, the one of the nearest level.
        widths, attention_levels, layers_per_block, dropout: override the preset.
        attention_head_dim: channels per attention head; where it does not divide all widths, the greatest common
            divisor. Published models have 8; wider heads train faster, above all on large maps.
        num_class_embeds: number of classes plus one for "no label"; None: the network takes no labels.
    """
    backbone = check_choice("backbone", backbone, BACKBONES)
    known_size, known_channels = IMAGES.get(dataset or "", (0, 0))
    size, channels = image_size or known_size, image_channels or known_channels
    if not size or not channels:
        raise ValueError(f"got dataset={dataset!r} without image_size and image_channels, wanted both: give them")
    for name, value, least in (
        ("level", level, 0), ("image_channels", channels, 1), ("attention_head_dim", attention_head_dim, 1),
        ("layers_per_block", layers_per_block, 1), ("num_class_embeds", num_class_embeds, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"got {name} {value}, wanted {least} or more: change it")
    if not 0 <= (dropout or 0) < 1:
        raise ValueError(f"got dropout {dropout}, wanted 0 or more and less than 1: change it")
    for side in sides(size):
        check_multiple("image_size", side, 2**level, f"2^level, level={level}", "choose another resolution or level")
    height, width = (side // 2**level for side in sides(size))
    accepted = inspect.signature(BACKBONES[backbone].build).parameters
    given: dict[str, Any] = {"block_out_channels": widths, "attention_levels": attention_levels, "dropout": dropout}
    given |= {"layers_per_block": layers_per_block, "num_class_embeds": num_class_embeds}
    given = {name: value for name, value in given.items() if value is not None}
    if foreign := [name for name in given if name not in accepted]:
        raise ValueError(f"got {', '.join(foreign)} for a {backbone}, which does not have it: leave it out")
    options: dict[str, Any] = {"attention_levels": (), "layers_per_block": 1 if dataset == "digits" else 2}
    options |= {"dropout": 0.1 if dataset == "cifar10" else 0.0}
    options |= {} if widths is not None else preset_sizes(backbone, dataset, level, math.sqrt(height * width))
    options = {name: value for name, value in (options | given).items() if name in accepted}
    options["block_out_channels"] = widths = tuple(options["block_out_channels"])
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"got widths {list(widths)}, wanted multiples of 8: for example [64, 128]")
    if not (attending := set(options.get("attention_levels", ()))) <= set(range(len(widths))):
        raise ValueError(f"got attention_levels {[*attending]}, wanted levels of 0 to {len(widths) - 1}: change them")
    options |= dict.fromkeys(("in_channels", "out_channels"), 4**level * channels)
    options |= {"sample_size": height if height == width else (height, width)}
    options["attention_head_dim"] = math.gcd(attention_head_dim, *widths)
    if "norm_num_groups" in accepted:  # at least two channels a group: a norm over one cancels the time embedding
        options["norm_num_groups"] = math.gcd(32, *(width // 2 for width in widths))
    return BACKBONES[backbone].build(**options)  # by name: diffusers' `from_config` drops what was passed by position


def preset_sizes(backbone: str, dataset: str | None, level: int, side: float = 1) -> dict[str, tuple[int, ...]]:
    """Widths, and a UNet's attention levels, of the data set's preset, or of the one with maps nearest to `side`."""
    key = (dataset or "", level)
    if key[0] not in IMAGES:
        off = {(name, n): math.log(IMAGES[name][0] / 2**n / side) for name, n in PRESETS}
        key = min(PRESETS, key=lambda other: (abs(off[other]), abs(other[1] - level)))
    widths = getattr(PRESETS.get(key), backbone, None)
    if widths is None:
        known = ", ".join(sorted({name for name, _ in PRESETS}))
        remedy = f"give widths, e.g. [64, 128], or choose among {known} at the levels that have a {backbone}"
        raise ValueError(f"got no preset for dataset {dataset!r} at level {level}, wanted one, or widths: {remedy}")
    return {"block_out_channels": widths} | ({"attention_levels": PRESETS[key].attention} if backbone == "unet" else {})


def build_unet(
    sample_size: int | tuple[int, int], in_channels: int, out_channels: int, block_out_channels: tuple[int, ...],
    attention_levels: Sequence[int], layers_per_block: int, attention_head_dim: int, dropout: float,
    num_class_embeds: int | None = None, norm_num_groups: int = 32,
) -> UNet2DModel:  # fmt: skip
    """diffusers' UNet with self-attention in the middle and at `attention_levels` (0 = finest)."""
    check_halvings(sample_size, len(block_out_channels))
    attends = [level in attention_levels for level in range(len(block_out_channels))]
    return UNet2DModel(
        sample_size=sample_size, in_channels=in_channels, out_channels=out_channels, dropout=dropout,
        block_out_channels=block_out_channels, layers_per_block=layers_per_block, num_class_embeds=num_class_embeds,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        attention_head_dim=attention_head_dim, norm_num_groups=norm_num_groups,
    )  # fmt: skip


def forward_flops(backbone: ModelMixin, *, attention: bool = True) -> int:
    """Floating-point operations of one forward pass at batch 1, counted without memory for weights or activations.

    A multiply-add counts as two; norms, activations and spline bases as none. The published numbers leave out the two
    products inside attention (`attention=False`), as counters that do not see into its fused kernel do.
    """
    config = backbone.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network, t = type(backbone).from_config(config).eval(), torch.zeros(1, dtype=torch.long)
        labels = {"class_labels": t} if config.get("num_class_embeds") else {}
        network(torch.empty(1, config.in_channels, *sides(config.sample_size)), t, **labels)
    counted = counter.get_flop_counts()["Global"].items()
    return sum(n for name, n in counted if attention or not any(part in str(name) for part in ("bmm", "attention")))


class Backbone(NamedTuple):
    """The function that builds a network of this kind, and those that load its checkpoints, by class name."""

    build: Callable[..., ModelMixin]
    load: dict[str, Callable[..., ModelMixin]]


BACKBONES = {
    "unet": Backbone(build_unet, {"UNet2DModel": partial(load_strictly, UNet2DModel.from_pretrained)}),
    "ukan": Backbone(UKANModel, dict.fromkeys(("UKANModel", CLASS_NAME), UKANModel.from_pretrained)),
    "dit": Backbone(DiTModel, {"DiTModel": partial(load_strictly, DiTModel.from_pretrained)}),
}


def backbone_name(class_name: str) -> str:
    """The key in `BACKBONES` for a network's class name; ValueError if no entry loads that class."""
    names = {known: name for name, entry in BACKBONES.items() for known in entry.load}
    if class_name not in names:
        raise ValueError(f"got a network of class {class_name}, wanted one of {', '.join(names)}: give another folder")
    return names[class_name]


def load_backbone(folder: Path, **options: Any) -> ModelMixin:
    """The network in a folder, of the class that its config.json names, in eval mode; `options`: torch_dtype."""
    if unknown := options.keys() - {"torch_dtype"}:
        raise ValueError(f"got {min(unknown)!r}, wanted options that loading has: leave it out, or set it afterwards")
    class_name = str(read_config(UKANModel, folder).get("_class_name"))
    return BACKBONES[backbone_name(class_name)].load[class_name](folder, **options)
