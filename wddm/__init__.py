"""wddm: wavelet-domain denoising diffusion, as a workbook. Import the modules: `from wddm import wavelets`."""

__version__ = "0.1.0"
