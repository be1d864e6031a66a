"""wddm: a workbook for wavelet-domain diffusion. Import the names below, or modules: `from wddm import wavelets`."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
NAMES = {
    "WaveletCodec": "wavelets", "UKANModel": "ukan", "build_backbone": "backbones", "Trainer": "training",
    "WaveletPipeline": "pipeline", "prepare": "data", "load": "data", "open_run": "workbook",
}  # fmt: skip
__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    """Import a name of `NAMES` from its module only when it is used, so that `import wddm` alone needs no torch."""
    if name not in NAMES:
        raise AttributeError(f"module 'wddm' has no attribute {name!r}")
    return getattr(import_module(f"wddm.{NAMES[name]}"), name)
