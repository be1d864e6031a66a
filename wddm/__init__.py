"""wddm: wavelet-domain denoising diffusion, as a workbook. These names, and modules: `from wddm import wavelets`."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
NAMES = {
    "WaveletCodec": "wavelets", "UKANModel": "ukan", "build_backbone": "backbones", "Trainer": "training",
    "WaveletPipeline": "pipeline", "prepare": "data", "load": "data", "open_run": "workbook",
}  # fmt: skip
__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    """One of the names above, whose module is imported when it is asked for: `import wddm` alone needs no torch."""
    if name not in NAMES:
        raise AttributeError(f"module 'wddm' has no attribute {name!r}")
    return getattr(import_module(f"wddm.{NAMES[name]}"), name)
