"""WaveletPipeline: noise -> solver steps in coefficient space -> codec -> images in [0, 1].

A `DiffusionPipeline` of three parts (backbone, scheduler, codec), saved and loaded as any other. `SOLVERS` names the
diffusers scheduler classes; published checkpoints, which store no scheduler, load through `from_published`.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from wddm.objective import NOISE, PREDICTION_TYPES
from wddm.ukan import UKANModel
from wddm.wavelets import WaveletCodec

SOLVERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "deis": "DEISMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
}


class WaveletPipeline(DiffusionPipeline):
    """Unconditional image generation by a denoiser of wavelet coefficients."""

    model_cpu_offload_seq = "backbone"

    def __init__(self, backbone: ModelMixin, scheduler: SchedulerMixin, codec: WaveletCodec) -> None:
        super().__init__()
        self.register_modules(backbone=backbone, scheduler=scheduler, codec=codec)

    @property
    def image_size(self) -> int:
        """Side of the images drawn, in pixels."""
        return self.backbone.config.sample_size * 2**self.codec.config.level

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator | list[Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        seed: int = 0,
        callback_on_step_end: Callable | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many.
            generator: one for the batch or one per image. Default: one per image, image k seeded `seed + k`, so
                that it does not depend on the batch size.
            num_inference_steps: solver steps.
            eta: 0 deterministic DDIM, 1 as random as DDPM; only for solvers that know it.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the last two float in [0, 1].
            callback_on_step_end: called `(pipeline, i, t, {"latents": ..., "denoised": ...})` after each step;
                "denoised" is the solver's estimate of the clean coefficients, or None; the "latents" of the
                dictionary it returns are gone on with.

        Raises:
            ValueError: unknown output type, eta for a solver without it, a wrong number of generators.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"got output_type={output_type!r}, wanted pil, np or pt: choose one of them")
        if generator is None:
            generator = image_generators(range(seed, seed + batch_size))
        step_options = self._step_options(eta, generator)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        shape = (batch_size, self.backbone.config.in_channels, *[self.backbone.config.sample_size] * 2)
        latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self.backbone.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            prediction = self.backbone(self.scheduler.scale_model_input(latents, t), t).sample
            out = self.scheduler.step(prediction, t, latents, **step_options)
            latents = out.prev_sample
            if callback_on_step_end is not None:
                state = {"latents": latents, "denoised": getattr(out, "pred_original_sample", None)}
                latents = (callback_on_step_end(self, i, t, state) or state)["latents"]
        images = self.decode(latents)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of coefficients (B, 4^L C, h, w)."""
        return (self.codec.decode(latents) / 2 + 0.5).clamp(0, 1)

    def _step_options(self, eta: float, generator: Generator | list[Generator]) -> dict:
        """The options that this solver's `step` takes."""
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise ValueError(f"got eta={eta} for {type(self.scheduler).__name__}, wanted 0: take ddim or leave eta out")
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in known}

    @classmethod
    def from_published(
        cls,
        path: str | Path,
        *,
        level: int = 1,
        image_size: int | None = None,
        prediction_type: str = "epsilon",
        solver: str = "ddim",
        spacing: str = "leading",
        **hub,
    ) -> Self:
        """A published UNet or U-KAN checkpoint (folder or Hub repository), wired as the published system wires it.

        Raises:
            ValueError: `image_size` or `level` contradict the checkpoint, or it is damaged.
        """
        where = {"subfolder": hub.get("subfolder")} if hub.get("subfolder") else {}
        kind = UNet2DModel if UKANModel.load_config(path, **where)["_class_name"] == "UNet2DModel" else UKANModel
        backbone = kind.from_pretrained(path, **hub).eval()
        side, channels = backbone.config.sample_size * 2**level, backbone.config.in_channels
        if image_size not in (None, side):
            raise ValueError(
                f"got image_size={image_size} at level {level}, wanted {side}: the checkpoint's maps have side "
                f"{backbone.config.sample_size}; leave image_size out or change the level"
            )
        if channels % 4**level or channels // 4**level not in (1, 3):
            raise ValueError(
                f"got level={level} for a checkpoint of {channels} channels, wanted channels = 3 x 4^level: "
                "give the level that it was trained at"
            )
        codec = WaveletCodec("haar", level, "packet", "dyadic", "AVHD")
        return cls(backbone, build_solver(solver, prediction_type, spacing=spacing), codec)


def build_solver(
    name: str, prediction_type: str = "epsilon", *, spacing: str = "leading", clip: float = 1.0
) -> SchedulerMixin:
    """A solver by name, on our noise schedule.

    Args:
        name: a key of `SOLVERS`.
        prediction_type: what the network predicts.
        spacing: how the steps are spread over the 1000: "leading", "trailing" or "linspace".
        clip: solvers that clip the clean estimate do so at this absolute value (the codec's `limit`).
    """
    for what, got, wanted in (
        ("solver", name, tuple(SOLVERS)),
        ("prediction_type", prediction_type, PREDICTION_TYPES),
        ("spacing", spacing, ("leading", "trailing", "linspace")),
    ):
        if got not in wanted:
            raise ValueError(f"got {what}={got!r}, wanted one of {', '.join(wanted)}: choose one of them")
    solver = getattr(diffusers, SOLVERS[name])
    options = {
        **NOISE,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "clip_sample": True,
        "clip_sample_range": clip,
        "variance_type": "fixed_small",
    }
    known = inspect.signature(solver.__init__).parameters
    return solver(**{key: value for key, value in options.items() if key in known})


def image_generators(seeds: range) -> list[Generator]:
    """One CPU generator per image, so that image k is the same on every device and in every batch."""
    return [Generator().manual_seed(seed) for seed in seeds]


def sample_images(
    pipeline: WaveletPipeline, count: int, *, batch_size: int = 64, seed: int = 0, **options
) -> Iterator[np.ndarray]:
    """Draw `count` images batch by batch, uint8 (b, H, W, C), image k seeded `seed + k`; the last batch is shorter.

    `options` go to the pipeline's call: num_inference_steps, eta.
    """
    for start in range(0, count, batch_size):
        generators = image_generators(range(seed + start, seed + min(start + batch_size, count)))
        images = pipeline(len(generators), generators, output_type="np", **options).images
        yield (images * 255).round().astype(np.uint8)
