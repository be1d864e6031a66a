"""Figures of the reports: arrays in, a matplotlib `Figure` out; nothing is shown, nothing saved, no state is left.

`images` holds the figures made of images, `charts` those of training, pixels and bands, `scores` those of distances,
classes and speeds, and `style` what all of them look like.
"""

from wddm.plots.charts import (
    band_energy,
    band_histograms,
    band_kurtosis,
    band_trajectory,
    channel_histograms,
    heat_map,
    lines,
    noise_schedule,
    packet_map,
    spectra,
    training_curves,
)
from wddm.plots.images import coefficient_bands, compare_grids, compose, image_grid, neighbours, stacked, trajectory
from wddm.plots.scores import (
    class_counts,
    confidence,
    learning_curves,
    nearest_distances,
    quality_curves,
    rates_by_level,
    score_chart,
    speedup_against_flops,
    trade_off,
    variants,
)

__all__ = [
    "band_energy", "band_histograms", "band_kurtosis", "band_trajectory", "channel_histograms", "class_counts",
    "coefficient_bands", "compare_grids", "compose", "confidence", "heat_map", "image_grid", "learning_curves",
    "lines", "nearest_distances", "neighbours", "noise_schedule", "packet_map", "quality_curves", "rates_by_level",
    "score_chart", "spectra", "speedup_against_flops", "stacked", "trade_off", "training_curves", "trajectory",
    "variants",
]  # fmt: skip
