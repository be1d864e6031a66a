"""Metrics: how far generated images are from real ones, with intervals."""

from wddm.metrics.frechet import frechet_wavelet_distance as frechet_wavelet_distance
