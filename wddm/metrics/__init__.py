"""metrics: how far generated images are from real ones, with intervals."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Import `frechet_wavelet_distance` when it is first asked for: its module needs torch."""
    if name != "frechet_wavelet_distance":
        raise AttributeError(f"module 'wddm.metrics' has no attribute {name!r}")
    return import_module("wddm.metrics.frechet").frechet_wavelet_distance
