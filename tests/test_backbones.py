"""Oracle: the published parameter counts, in millions, to the digits given."""

import pytest
import torch

from wddm.backbones import IMAGES, PRESETS, build_backbone

PUBLISHED = {
    ("unet", "cifar10", 0): 35.7,
    ("unet", "cifar10", 1): 26.19,
    ("unet", "cifar10", 2): 6.28,
    ("unet", "stl10", 1): 36.10,
    ("unet", "celebahq", 0): 67.47,  # published as 67.48; 67,474,691
    ("unet", "celebahq", 1): 39.73,
    ("unet", "celebahq", 2): 17.27,
    ("ukan", "cifar10", 0): 33.63,
    ("ukan", "cifar10", 1): 23.75,
    ("ukan", "cifar10", 2): 6.13,
    ("ukan", "stl10", 0): 43.54,
    ("ukan", "stl10", 1): 33.65,
    ("ukan", "celebahq", 0): 32.68,
    ("ukan", "celebahq", 1): 35.17,
    ("ukan", "celebahq", 2): 43.65,
}


@pytest.mark.parametrize(("kind", "dataset", "level"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(kind: str, dataset: str, level: int) -> None:
    wanted = PUBLISHED[kind, dataset, level]
    with torch.device("meta"):
        got = build_backbone(kind, dataset=dataset, level=level).num_parameters() / 1e6
    assert round(got, 1 if wanted == 35.7 else 2) == wanted


@pytest.mark.parametrize("kind", ["unet", "ukan"])
@pytest.mark.parametrize(("dataset", "level"), PRESETS)
def test_every_preset_runs(kind: str, dataset: str, level: int) -> None:
    with torch.device("meta"):
        model = build_backbone(kind, dataset=dataset, level=level).eval()
        size, channels = IMAGES[dataset]
        x = torch.empty(1, 4**level * channels, size // 2**level, size // 2**level)
        assert model(x, torch.zeros(1, dtype=torch.long)).sample.shape == x.shape
    assert model.config.dropout == (0.1 if dataset == "cifar10" else 0.0)


@pytest.mark.parametrize(("options", "wanted"), [({}, 8), ({"attention_head_dim": 64}, 64)])
def test_attention_heads_are_8_wide_as_published_or_as_asked_for(options: dict, wanted: int) -> None:
    with torch.device("meta"):
        model = build_backbone("unet", dataset="cifar10", **options)
        assert model.mid_block.attentions[0].heads == 256 // wanted
        assert model.num_parameters() == build_backbone("unet", dataset="cifar10").num_parameters()


@pytest.mark.parametrize("kind", ["unet", "ukan"])
def test_heads_are_as_wide_as_every_width_allows(kind: str) -> None:
    options = {"dataset": "digits", "level": 1, "widths": (24, 96), "attention_levels": (0, 1)}
    model = build_backbone(kind, **options, attention_head_dim=64)
    attentions = {m.to_q.out_features: m.heads for m in model.modules() if hasattr(m, "to_q")}
    assert attentions == {24: 3, 96: 12}
    assert model(torch.randn(1, 4, 8, 8), 3).sample.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("kind", ["unet", "ukan"])
def test_matched_is_a_pixel_network_of_the_same_size(kind: str) -> None:
    with torch.device("meta"):
        wavelet = build_backbone(kind, dataset="cifar10", level=1)
        pixel = build_backbone(kind, dataset="cifar10", level=1, matched=True)
    assert pixel.config.in_channels == 3 and pixel.config.sample_size == 32
    assert abs(pixel.num_parameters() / wavelet.num_parameters() - 1) < 0.05


def test_a_folder_of_ones_own_needs_its_sizes() -> None:
    model = build_backbone("unet", level=2, image_size=48, image_channels=1, widths=(32, 64))
    assert model.config.in_channels == 16 and model.config.sample_size == 12
    assert model(torch.randn(1, 16, 12, 12), 3).sample.shape == (1, 16, 12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vit", "dataset": "cifar10"}, "wanted unet or ukan"),
        ({"kind": "unet"}, "without image_size and image_channels"),
        ({"kind": "unet", "dataset": "cifar10", "level": 4}, "no preset for dataset 'cifar10' at level 4"),
        ({"kind": "unet", "dataset": "cifar10", "image_size": 30, "level": 2}, "wanted a multiple of 4"),
        (
            {"kind": "unet", "dataset": "digits", "widths": (32, 64, 64, 64, 64)},
            "maps of side 8 for 5 widths",
        ),
        ({"kind": "ukan", "dataset": "digits", "widths": (30,)}, "wanted multiples of 8"),
        ({"kind": "unet", "dataset": "digits", "attention_head_dim": 0}, "got attention_head_dim 0"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(options.pop("kind"), **options)
