"""Denoisers by name and size: `build_backbone("unet" | "ukan" | "dit", dataset=..., level=...)`.

A UNet is diffusers' `UNet2DModel`, U-KAN and DiT are ours; all are called `model(sample, timestep).sample` on
coefficients (B, 4^L C, H/2^L, W/2^L). To add one, write a function that builds it, whose arguments are its options, and
enter it in `BACKBONES`. The presets of UNet and U-KAN are the published models; those marked `ours` fill the gaps.
"""

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from wddm.dit import DiTModel
from wddm.loading import CLASS_NAME, load_strictly, read_config
from wddm.ukan import FEWER_WIDTHS, UKANModel
from wddm.wavelets import check_choice, check_multiple

IMAGES = {"digits": (16, 1), "patches": (32, 3), "cifar10": (32, 3), "stl10": (64, 3), "celebahq": (256, 3)}
Options = dict[str, Any]  # arguments of a network, by name


class Preset(NamedTuple):
    """Widths of each backbone for a data set at a level, and the UNet's levels with attention."""

    unet: tuple[int, ...]
    attention: tuple[int, ...]
    ukan: tuple[int, ...]
    dit: tuple[int, ...] | None = None  # one width per block; none where the maps have more than 1,024 positions


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
    ("digits", 0): Preset((32, 64, 64), (), (64, 64), 4 * (64,)),  # ours, for a laptop, as all that follow
    ("digits", 1): Preset((64, 64), (), (64,), 4 * (64,)),
    ("digits", 2): Preset((64,), (), (64,), 4 * (64,)),
    ("patches", 0): Preset((32, 64, 128), (), (64, 64, 128), 4 * (64,)),
    ("patches", 1): Preset((64, 128), (), (64, 128), 4 * (128,)),
    ("patches", 2): Preset((64,), (), (64,), 4 * (128,)),
}


def build_backbone(
    backbone: str,
    *,
    dataset: str | None = None,
    level: int = 1,
    image_size: int | None = None,
    image_channels: int | None = None,
    widths: Sequence[int] | None = None,
    attention_levels: Sequence[int] | None = None,
    layers_per_block: int | None = None,
    attention_head_dim: int = 64,
    dropout: float | None = None,
    matched: bool = False,
) -> ModelMixin:
    """A freshly initialised denoiser for images of `dataset` at wavelet level `level`.

    Args:
        backbone: a key of `BACKBONES`.
        dataset: name of a preset; without one (a folder of your own), give image_size, image_channels and widths.
        level: wavelet level L; the network sees 4^L C channels of side image_size / 2^L.
        image_size, image_channels, widths, attention_levels, layers_per_block, dropout: override the preset.
        attention_head_dim: channels of an attention head, or its greatest common divisor with the widths. Published
            models have 8; wider heads train faster, above all on large maps.
        matched: build a pixel-space (level 0) network with as many parameters instead, for a fair comparison.

    Raises:
        ValueError: unknown backbone, no preset for (dataset, level) and no widths, sides that do not divide, an
            option that this backbone does not have.
    """
    check_choice("backbone", backbone, BACKBONES)
    size, channels = IMAGES.get(dataset or "", (0, 0))
    size, channels = image_size or size, image_channels or channels
    if not size or not channels:
        raise ValueError(f"got dataset={dataset!r} without image_size and image_channels, wanted both: give them")
    why = f"2^level, level={level}"
    check_multiple("image_size", size, 2**level, why, "choose a smaller level or another resolution")
    if attention_head_dim < 1:
        raise ValueError(f"got attention_head_dim {attention_head_dim}, wanted 1 or more: take 8, as published, or 64")

    def build(level: int, options: Options) -> ModelMixin:
        head_dim, stacked = math.gcd(attention_head_dim, *options["block_out_channels"]), 4**level * channels
        # by name: what is given by position, diffusers takes for a default, and `from_config` then drops it
        maps = {"sample_size": size // 2**level, "in_channels": stacked, "out_channels": stacked}
        return BACKBONES[backbone].build(**maps, attention_head_dim=head_dim, **options)

    common = {"layers_per_block": layers_per_block, "dropout": dropout}
    given = common | {"block_out_channels": widths, "attention_levels": attention_levels}
    options = resolve_options(backbone, dataset, level, given)
    if matched and level:
        with torch.device("meta"):
            parameters = build(level, options).num_parameters()
        level, options = 0, resolve_options(backbone, dataset, 0, common)
        options["block_out_channels"] = matched_widths(partial(build, 0), options, parameters)
    return build(level, options)


def resolve_options(backbone: str, dataset: str | None, level: int, given: Options) -> Options:
    """Arguments of a network: the given ones that are not None, else the preset's; ValueError if one does not fit."""
    accepted = inspect.signature(BACKBONES[backbone].build).parameters
    given = {name: value for name, value in given.items() if value is not None}
    if foreign := [name for name in given if name not in accepted]:
        raise ValueError(f"got {', '.join(foreign)} for a {backbone}, which does not have it: leave it out")
    options: Options = {"attention_levels": (), "layers_per_block": 1 if dataset == "digits" else 2}
    options["dropout"] = 0.1 if dataset == "cifar10" else 0.0
    if "block_out_channels" not in given:
        options |= preset_sizes(backbone, dataset, level)
    options = {name: value for name, value in (options | given).items() if name in accepted}
    widths, attending = tuple(options["block_out_channels"]), list(options.get("attention_levels", ()))
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"got widths {list(widths)}, wanted multiples of 8: for example [64, 128]")
    if not set(attending) <= set(range(len(widths))):
        raise ValueError(f"got attention_levels {attending}, wanted levels of 0 to {len(widths) - 1}: change them")
    return options | {"block_out_channels": widths}


def preset_sizes(backbone: str, dataset: str | None, level: int) -> dict[str, tuple[int, ...]]:
    """Widths of a preset and a UNet's attention levels, as arguments of the network; ValueError if there is none."""
    preset = PRESETS.get((dataset or "", level))
    widths = getattr(preset, backbone, None)
    if preset is None or widths is None:
        known = ", ".join(sorted({name for name, _ in PRESETS}))
        raise ValueError(
            f"got no widths and no preset for dataset {dataset!r} at level {level}, wanted one of them: give widths, "
            f"e.g. [64, 128], or choose among {known} at the levels that have a {backbone}"
        )
    return {"block_out_channels": widths} | ({"attention_levels": preset.attention} if backbone == "unet" else {})


def matched_widths(build: Callable[[Options], ModelMixin], options: Options, parameters: int) -> tuple[int, ...]:
    """The widths, scaled by the one factor, to multiples of 8, whose network comes closest to so many parameters."""

    def count(widths: tuple[int, ...]) -> int:
        return build(options | {"block_out_channels": widths}).num_parameters()

    percents, widths = range(10, 300, 2), options["block_out_channels"]
    scaled = sorted({tuple(max(8, 8 * round(width * percent / 800)) for width in widths) for percent in percents})
    with torch.device("meta"):
        larger = bisect_left(scaled, parameters, key=count)
        return min(scaled[max(0, larger - 1) : larger + 1], key=lambda widths: abs(count(widths) - parameters))


def build_unet(
    sample_size: int,
    in_channels: int,
    out_channels: int,
    block_out_channels: tuple[int, ...],
    attention_levels: Sequence[int],
    layers_per_block: int,
    attention_head_dim: int,
    dropout: float,
) -> UNet2DModel:
    """diffusers' UNet with self-attention in the middle and at `attention_levels` (0 = finest)."""
    levels = len(block_out_channels)
    check_multiple("maps of side", sample_size, 2 ** (levels - 1), f"{levels} widths", FEWER_WIDTHS)
    attends = [level in attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        dropout=dropout,
        attention_head_dim=attention_head_dim,
        norm_num_groups=math.gcd(32, *block_out_channels),
    )


class Backbone(NamedTuple):
    """A function that builds a network of this kind, and by class name the functions that load its checkpoints."""

    build: Callable[..., ModelMixin]
    load: dict[str, Callable[..., ModelMixin]]


BACKBONES = {
    "unet": Backbone(build_unet, {"UNet2DModel": partial(load_strictly, UNet2DModel.from_pretrained)}),
    "ukan": Backbone(UKANModel, dict.fromkeys(("UKANModel", CLASS_NAME), UKANModel.from_pretrained)),
    "dit": Backbone(DiTModel, {"DiTModel": partial(load_strictly, DiTModel.from_pretrained)}),
}


def backbone_name(class_name: str) -> str:
    """Key in `BACKBONES` of a network's class name; ValueError if it is none of theirs."""
    names = {known: name for name, entry in BACKBONES.items() for known in entry.load}
    if class_name not in names:
        raise ValueError(f"got a network of class {class_name}, wanted one of {', '.join(names)}: give another folder")
    return names[class_name]


def load_backbone(folder: Path, **options: Any) -> ModelMixin:
    """The network in a folder, of the class that its config.json names, in eval mode; `options`: torch_dtype."""
    class_name = str(read_config(UKANModel, folder).get("_class_name"))
    return BACKBONES[backbone_name(class_name)].load[class_name](folder, **options)


PASSES = 3  # forward passes that a training step costs: the backward pass takes two


def forward_flops(backbone: ModelMixin, *, attention: bool = True) -> int:
    """Floating-point operations of one forward pass at batch 1, without memory for weights or activations.

    A multiply-add counts as two; norms, activations and spline bases count as none. Published numbers leave out the two
    matrix products of attention: `attention=False`.
    """
    config, side = backbone.config, backbone.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy = type(backbone).from_config(config).eval()
        copy(torch.empty(1, config.in_channels, height, width), torch.zeros(1).long())
    counted = counter.get_flop_counts()["Global"].items()
    return sum(n for name, n in counted if attention or not any(part in str(name) for part in ("bmm", "attention")))
