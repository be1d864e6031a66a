"""metrics: how far generated images are from real ones, with intervals."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Of the module that needs torch, when it is asked for."""
    if name != "frechet_wavelet_distance":
        raise AttributeError(f"module 'wddm.metrics' has no attribute {name!r}")
    from wddm.metrics.frechet import frechet_wavelet_distance

    return frechet_wavelet_distance
