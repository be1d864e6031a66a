"""Figures of the reports: arrays in, a matplotlib `Figure` out; nothing is shown, nothing saved, no state is left.

`style` is what all of them look like, and the figures made of images; `charts` are those of training, pixels and bands,
`scores` those of distances, classes and speeds. Importing them costs matplotlib alone: what needs pandas or seaborn
imports it.
"""

from wddm.plots.charts import *  # noqa: F403
from wddm.plots.scores import *  # noqa: F403
from wddm.plots.style import *  # noqa: F403
