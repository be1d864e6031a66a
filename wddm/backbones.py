"""Denoisers by name and size: `build_backbone("unet" | "ukan", dataset=..., level=...)`.

A UNet is diffusers' `UNet2DModel`, a U-KAN is ours; both are called `model(sample, timestep).sample` on coefficients
(B, 4^L C, H/2^L, W/2^L). The presets are the published models, whose parameter counts the tests hold us to; rows
marked `ours` complete the grid.
"""

import math
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DModel

from wddm.loading import CLASS_NAME, load_strictly, read_config
from wddm.ukan import UKANModel

IMAGES = {"digits": (16, 1), "patches": (32, 3), "cifar10": (32, 3), "stl10": (64, 3), "celebahq": (256, 3)}
DROPOUT = {"cifar10": 0.1}  # elsewhere 0
LAYERS_PER_BLOCK = {"digits": 1}  # elsewhere 2

PRESETS = {  # (dataset, level): UNet widths, UNet levels with attention, U-KAN widths
    ("cifar10", 0): ((128, 256, 256, 256), (1,), (128, 256, 256)),  # UNet: the DDPM baseline
    ("cifar10", 1): ((128, 256, 256), (0, 1), (128, 256)),
    ("cifar10", 2): ((64, 128, 128), (0,), (128,)),
    ("stl10", 0): ((128, 256, 256, 256), (2, 3), (128, 256, 256, 256)),  # UNet: ours
    ("stl10", 1): ((128, 256, 256, 256), (0, 1), (128, 256, 256)),
    ("stl10", 2): ((128, 256, 256), (0,), (128, 256)),  # ours
    ("celebahq", 0): ((128, 256, 256, 512), (), (64, 128, 256, 256)),
    ("celebahq", 1): ((128, 128, 256, 256, 256), (2, 3), (64, 128, 128, 256, 256)),
    ("celebahq", 2): ((64, 128, 128, 256), (1,), (128, 256, 256, 256)),
    ("celebahq", 3): ((64, 128, 256), (1,), (128, 256, 256)),  # ours
    ("digits", 0): ((32, 64, 64), (), (64, 64)),  # ours, small enough for a laptop, as all that follow
    ("digits", 1): ((64, 64), (), (64,)),
    ("digits", 2): ((64,), (), (64,)),
    ("patches", 0): ((32, 64, 128), (), (64, 64, 128)),
    ("patches", 1): ((64, 128), (), (64, 128)),
    ("patches", 2): ((64,), (), (64,)),
}


def build_backbone(
    kind: str,
    *,
    dataset: str | None = None,
    level: int = 1,
    image_size: int | None = None,
    image_channels: int | None = None,
    widths: tuple[int, ...] | None = None,
    attention_levels: tuple[int, ...] | None = None,
    layers_per_block: int | None = None,
    attention_head_dim: int = 8,
    dropout: float | None = None,
    matched: bool = False,
) -> ModelMixin:
    """A freshly initialised denoiser for images of `dataset` at wavelet level `level`.

    Args:
        kind: "unet" or "ukan".
        dataset: name of a preset; without one (a folder of your own), give image_size, image_channels and widths.
        level: wavelet level L; the network sees 4^L C channels of side image_size / 2^L.
        image_size, image_channels, widths, attention_levels, layers_per_block, dropout: override the preset.
        attention_head_dim: channels of an attention head, or the most of them that divides the widths. Published
            models have 8; with wider ones a UNet trains faster, the more so the larger the maps it attends on.
        matched: the pixel-space (level 0) network with as many parameters as the one described, for fair comparison.

    Raises:
        ValueError: unknown kind, no preset for (dataset, level) and no widths, or sides that do not divide.
    """
    if kind not in ("unet", "ukan"):
        raise ValueError(f"got backbone {kind!r}, wanted unet or ukan: choose one of them")
    if dataset in IMAGES:
        image_size, image_channels = image_size or IMAGES[dataset][0], image_channels or IMAGES[dataset][1]
    if image_size is None or image_channels is None:
        raise ValueError(f"got dataset={dataset!r} without image_size and image_channels, wanted both: give them")
    if image_size % 2**level:
        raise ValueError(
            f"got image_size {image_size}, wanted a multiple of {2**level} (2^level, level={level}): "
            "choose a smaller level or another resolution"
        )
    if attention_head_dim < 1:
        raise ValueError(f"got attention_head_dim {attention_head_dim}, wanted 1 or more: take 8, as published, or 64")
    widths, attention_levels = resolve_widths(kind, dataset, level, widths, attention_levels)
    build = build_unet if kind == "unet" else build_ukan
    shape = {"sample_size": image_size // 2**level, "channels": 4**level * image_channels}
    common = {
        "layers_per_block": layers_per_block or LAYERS_PER_BLOCK.get(dataset, 2),
        "attention_levels": attention_levels,
        "attention_head_dim": attention_head_dim,
        "dropout": DROPOUT.get(dataset, 0.0) if dropout is None else dropout,
    }
    if not matched or level == 0:
        return build(**shape, widths=widths, **common)
    with torch.device("meta"):
        wanted = build(**shape, widths=widths, **common).num_parameters()
    shape = {"sample_size": image_size, "channels": image_channels}
    widths, common["attention_levels"] = resolve_widths(kind, dataset, 0, None, None)
    return build(**shape, widths=matched_widths(build, shape, widths, common, wanted), **common)


def resolve_widths(
    kind: str, dataset: str | None, level: int, widths: tuple | None, attention_levels: tuple | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and attention levels: what is given, else the preset's."""
    preset = PRESETS.get((dataset, level))
    if widths is None and preset is None:
        known = ", ".join(sorted({name for name, _ in PRESETS}))
        raise ValueError(
            f"got no widths and no preset for dataset {dataset!r} at level {level}, wanted one of them: give widths, "
            f"e.g. [64, 128], or choose among {known} at the levels they have"
        )
    if attention_levels is None:
        attention_levels = preset[1] if widths is None and kind == "unet" else ()
    if widths is None:
        widths = preset[0] if kind == "unet" else preset[2]
    return tuple(widths), tuple(attention_levels)


def build_unet(
    sample_size: int,
    channels: int,
    widths: tuple,
    attention_levels: tuple,
    layers_per_block: int,
    attention_head_dim: int,
    dropout: float,
) -> UNet2DModel:
    """diffusers' UNet with self-attention in the middle and at `attention_levels` (0 = finest)."""
    check_side(sample_size, widths)
    attends = [level in attention_levels for level in range(len(widths))]
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        dropout=dropout,
        attention_head_dim=math.gcd(attention_head_dim, *widths),
        norm_num_groups=math.gcd(32, *widths),
    )


def build_ukan(
    sample_size: int,
    channels: int,
    widths: tuple,
    attention_levels: tuple,
    layers_per_block: int,
    attention_head_dim: int,
    dropout: float,
) -> UKANModel:
    """Our U-KAN, without attention unless it is asked for."""
    check_side(sample_size, widths)
    return UKANModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        attention_levels=attention_levels,
        attention_head_dim=math.gcd(attention_head_dim, *widths),
        dropout=dropout,
    )


def check_side(sample_size: int, widths: tuple[int, ...]) -> None:
    """Raise ValueError if a map of this side cannot be halved once per width after the first."""
    factor = 2 ** (len(widths) - 1)
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"got widths {list(widths)}, wanted multiples of 8: for example [64, 128]")
    if sample_size % factor:
        raise ValueError(
            f"got maps of side {sample_size} for {len(widths)} widths, wanted a multiple of {factor}: "
            "give fewer widths, a smaller level or another resolution"
        )


def matched_widths(build, shape: dict, widths: tuple, common: dict, wanted: int) -> tuple[int, ...]:
    """`widths` scaled by one factor, in multiples of 8, so that the parameter count comes closest to `wanted`."""
    candidates = {tuple(max(8, 8 * round(width * k / 800)) for width in widths) for k in range(10, 300, 2)}

    def distance(candidate: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return abs(build(**shape, widths=candidate, **common).num_parameters() - wanted)

    return min(sorted(candidates), key=distance)


def backbone_name(class_name: str | None) -> str:
    """The kind that `build_backbone` knows a network of this class by."""
    return {UNet2DModel.__name__: "unet", UKANModel.__name__: "ukan"}[class_name]


def load_backbone(folder: Path, **options) -> UNet2DModel | UKANModel:
    """The network in a folder, of the class that its config.json names, in eval mode; `options`: torch_dtype."""
    name = read_config(UKANModel, folder).get("_class_name")
    if name == UNet2DModel.__name__:
        return load_strictly(UNet2DModel.from_pretrained, folder, **options)
    if name in (UKANModel.__name__, CLASS_NAME):
        return UKANModel.from_pretrained(folder, **options)
    raise ValueError(f"got a {name} in {folder}, wanted UNet2DModel, UKANModel or {CLASS_NAME}: give another folder")
