"""Figures of the reports: arrays in, a matplotlib `Figure` out; nothing is shown, nothing saved, no state is left.

`style` holds the look of all and the figures made of images, `charts` the figures made of numbers.
"""

from wddm.plots.charts import *  # noqa: F403
from wddm.plots.style import *  # noqa: F403
