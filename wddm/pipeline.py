"""WaveletPipeline: noise -> solver steps in coefficient space -> codec -> images in [0, 1].

A `DiffusionPipeline` of three parts (backbone, scheduler, codec), saved and loaded as any other. Published checkpoints,
which store no scheduler, load through `from_published`.
"""

import inspect
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi
from torch import Generator, Tensor

from wddm.backbones import load_backbone
from wddm.bandrate import BandRates, Group
from wddm.cards import card_of
from wddm.conditions import Answer, Labels, Missing, correction, held, labelled, numbered
from wddm.loading import check_config, fetched, is_path, load_scheduler, load_strictly, read_config
from wddm.objective import NOISE, SOLVERS, build_solver, check_options, exact_step, of_target, set_steps, trained_by
from wddm.wavelets import WaveletCodec, check_choice, check_multiple

Callback = Callable[..., dict[str, Tensor] | None]  # (pipeline, i, t, {"latents": ..., "denoised": ...})


class WaveletPipeline(DiffusionPipeline):
    """Image generation by a denoiser of wavelet coefficients."""

    model_cpu_offload_seq, _exclude_from_cpu_offload = "backbone", ("codec",)  # which is small, and not called itself

    def __init__(
        self, backbone: ModelMixin, scheduler: SchedulerMixin, codec: WaveletCodec, class_names: list[str] | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(backbone=backbone, scheduler=of_target(scheduler), codec=codec)
        self.register_to_config(class_names=None if class_names is None else [*map(str, class_names)])
        config, sides = backbone.config, self.map_size
        whole = len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
        if not whole or config.in_channels != config.out_channels:
            got = f"sample_size {config.sample_size}, {config.in_channels} channels in and {config.out_channels} out"
            raise ValueError(f"got a backbone of {got}, wanted a side or (height, width), and as many out as in")
        check_multiple("channels", config.in_channels, 4**codec.config.level, "4^level", "take parts of one model")

    @property
    def map_size(self) -> tuple[int, int]:
        """(h, w) of the coefficient maps."""
        return tuple(size) if isinstance(size := self.backbone.config.sample_size, list | tuple) else (size, size)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the images drawn, in pixels, or (height, width) where they are not square."""
        height, width = (side * 2**self.codec.config.level for side in self.map_size)
        return height if height == width else (height, width)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, generator: Generator | list[Generator] | None = None, num_inference_steps: int = 50,
        eta: float = 0.0, output_type: str = "pil", return_dict: bool = True, seed: int = 0,
        detail_steps: int | None = None, latents: Tensor | None = None, callback_on_step_end: Callback | None = None,
        labels: Labels | None = None, guidance: float = 1.0, guidance_details: float | None = None,
        low_resolution: Tensor | None = None, known: Tensor | None = None, mask: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:  # fmt: skip
        """Draw images, as `output_type` "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the last two float in [0, 1].

        Args:
            generator: one for the batch or one per image; None: image k has its own, seeded `seed + k`.
            eta: from 0, deterministic DDIM, to 1, as random as DDPM; other solvers have no eta.
            detail_steps: solver steps of the detail bands; None: as many as the coarse band takes (see bandrate.py).
            latents: unit noise (B, 4^L C, h, w) to start from; the generators then draw only the solver's noise.
            callback_on_step_end: called `(pipeline, i, t, {"latents": ..., "denoised": ...})` after each step, where
                "denoised" estimates the clean coefficients, or is None; sampling goes on with the "latents" it returns.
            labels: one for all images or one per image, by number or name; None: images of any class.
            guidance, guidance_details: weight of the label, and one for the detail bands alone; above 1 it counts more.
            low_resolution: (B or 1, C, H/2^k, W/2^k) in [0, 1], k <= L: means over 2^k x 2^k pixels of the result.
            known, mask: images (B or 1, C, H, W) in [0, 1], kept where the bool mask (B or 1, 1, H, W) is True. This
                and low_resolution take 8 network calls a step; 8 steps of ddim at eta=0.7 equalled 16 on CIFAR-10.

        ValueError: the solver or the checkpoint cannot do what is asked; coefficients or images are not finite.
        """
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        self._check_solver(num_inference_steps, eta, detail_steps, guidance_details)
        whole = isinstance(batch_size, int | np.integer) and batch_size > 0
        each = isinstance(generator, list) and len(generator) == batch_size
        if not whole or not (each or isinstance(generator, Generator | None)):
            raise ValueError(f"got {batch_size=}, {generator=}, wanted 1 or more, a generator or as many: give seed")
        network, missing = self._network(batch_size, labels, guidance, guidance_details, (low_resolution, known, mask))
        generator = image_generators(range(seed, seed + batch_size)) if generator is None else generator
        z = self._noise(latents, batch_size, generator)  # (B, 4^L C, h, w)
        set_steps(self.scheduler, int(num_inference_steps), self._execution_device)
        scheduler = self.scheduler if detail_steps is None else self._band_rates(detail_steps, generator)
        taken = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in taken}
        z, step, training = z * scheduler.init_noise_sigma, exact_step(scheduler), self.backbone.training
        try:
            self.backbone.eval()  # without dropout
            for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
                done = step(network(scheduler.scale_model_input(z, t), t), t, z, **options)
                z = done.prev_sample
                if missing is not None and i + 1 == len(scheduler.timesteps):
                    z = z + missing(z)
                if callback_on_step_end is not None:
                    state = {"latents": z, "denoised": getattr(done, "pred_original_sample", None)}
                    z = (callback_on_step_end(self, i, t, state) or {}).get("latents", z)
        finally:
            self.backbone.train(training)
        images: Any = self.decode(z)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(visible(images))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _network(
        self, count: int, labels: Labels | None, weight: float, details: float | None, known: tuple[Tensor | None, ...]
    ) -> tuple[Answer, Missing | None]:
        """The network under its conditions (see conditions.py), and the function for the last correction, or None."""
        level, channels = self.codec.config.level, self.backbone.config.in_channels
        coarse = channels // 4**level
        weights = [weight] * coarse + [weight if details is None else details] * (channels - coarse)
        numbers = None if labels is None else numbered(labels, self.config.get("class_names"))
        answer = labelled(self.backbone, count, numbers, weights)
        missing = correction(self.codec, (count, coarse, *(side * 2**level for side in self.map_size)), *known)
        return (held(answer, self.scheduler, missing, self.codec.clip_value) if missing else answer), missing

    def _check_solver(self, steps: int, eta: float, detail_steps: int | None, guidance_details: float | None) -> None:
        """Raise a ValueError if the solver cannot do what is asked; let it clip only above the codec's `clip_value`."""
        kind, config, largest = type(self.scheduler).__name__, self.scheduler.config, self.codec.clip_value.item()
        if config.get("clip_sample") and config.get("clip_sample_range", 1) < largest:  # it would clip real images
            self.scheduler.register_to_config(clip_sample_range=largest)
        maximum = config.num_train_timesteps
        if not all(count in range(1, maximum + 1) for count in (steps, 1 if detail_steps is None else detail_steps)):
            raise ValueError(f"got {steps!r} steps, detail_steps={detail_steps!r}, wanted 1 to {maximum}: change them")
        name = next((name for name, known in SOLVERS.items() if kind in known), kind)
        check_options(name, eta=eta, detail_steps=detail_steps)
        for name, value in (("detail_steps", detail_steps), ("guidance_details", guidance_details)):
            if value is not None and not self.codec.config.level:
                raise ValueError(f"got {name} at level 0, which has no detail bands: leave {name} out")

    def _noise(self, latents: Tensor | None, batch_size: int, generator: Generator | list[Generator]) -> Tensor:
        """Unit noise (B, 4^L C, h, w): `latents`, or drawn if there are none; at least float32, which solvers need."""
        shape = (batch_size, self.backbone.config.in_channels, *self.map_size)
        dtype = torch.promote_types(self.backbone.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"got latents {tuple(latents.shape)}, wanted {shape}: give noise of that shape")
        return latents.to(self._execution_device, dtype)

    def _band_rates(self, detail_steps: int, generator: Generator | list[Generator]) -> BandRates:
        """The coarse (first) band by this pipeline's solver, the details by a copy of it with `detail_steps` steps."""
        copies = [one.clone_state() for one in generator] if isinstance(generator, list) else generator.clone_state()
        details, channels = deepcopy(self.scheduler), self.backbone.config.in_channels
        set_steps(details, int(detail_steps), self._execution_device)
        cut = channels // 4**self.codec.config.level
        return BandRates(Group(self.scheduler, slice(0, cut), generator), Group(details, slice(cut, channels), copies))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of coefficients (B, 4^L C, h, w); ValueError if they are not finite."""
        images = self.codec.decode(latents.to(self.codec.dtype)) / 2 + 0.5
        if images.isfinite().all():
            return images.clamp(0, 1)
        solver = f"{type(self.scheduler).__name__} in {self.scheduler.num_inference_steps} steps"
        source, also = ("the codec", "") if latents.isfinite().all() else (solver, "more steps, another solver or ")
        raise ValueError(f"got images that are not finite from {source}, wanted numbers: take {also}another checkpoint")

    @classmethod
    def from_pretrained(cls, path: str | Path, *, scheduler: SchedulerMixin | None = None, **options: Any) -> Self:
        """Load a pipeline folder or Hub repository that we saved; `scheduler` replaces the stored one.

        No module that its files name is imported. `options`: revision, cache_dir, token, local_files_only,
        torch_dtype. ValueError: a part is absent, damaged, pickled, or its tensors do not fit its config.
        """
        folder = fetched(path, options)
        names = {"class_names": read_config(cls, folder).get("class_names")}
        check_config(cls, names, folder)
        stored = load_scheduler(folder / "scheduler")
        given, wanted = (trained_by(of_target(one)) for one in (scheduler or stored, stored))
        if given != wanted:
            raise ValueError(f"got a scheduler of {given}, wanted {wanted}, as was trained: take one of build_solver's")
        backbone = load_backbone(folder / "backbone", **options)
        codec = load_strictly(WaveletCodec.from_pretrained, folder / "codec", **options)
        pipeline = cls(backbone, scheduler or stored, codec, **names)
        pipeline.register_to_config(_name_or_path=str(folder))
        return pipeline

    @classmethod
    def from_published(
        cls, path: str | Path, *, level: int | None = 1, image_size: int | None = None,
        prediction_type: str | None = None, solver: str = "ddim", spacing: str = "leading", **options: Any,
    ) -> Self:  # fmt: skip
        """A published UNet or U-KAN checkpoint (folder or Hub repository), wired as the published system wires it.

        `level` None: computed from the channels, for RGB images. `prediction_type` None, as checkpoints do not store
        it: "sample" if "celeba" is in the path, else "epsilon". `options`: those of `from_pretrained`, and subfolder.
        ValueError: `image_size` or `level` contradict the checkpoint, or it is damaged.
        """
        folder = fetched(path, options) / (options.pop("subfolder", None) or "")
        backbone = load_backbone(folder, **options)
        channels, timesteps = backbone.config.in_channels, backbone.config.get("num_train_timesteps")
        level = round(math.log(max(channels, 3) / 3, 4)) if level is None else level
        if channels % 4**level or channels // 4**level not in (1, 3):
            raise ValueError(f"got level={level} for {channels} channels, wanted 3 x 4^level: give its own level")
        if timesteps not in (None, wanted := NOISE["num_train_timesteps"]):
            raise ValueError(f"got a checkpoint of {timesteps} timesteps, wanted {wanted}, as published: give another")
        prediction_type = prediction_type or ("sample" if "celeba" in str(path).lower() else "epsilon")
        codec = WaveletCodec("haar", level, "packet", "dyadic", "AVHD")
        pipeline = cls(backbone, build_solver(solver, prediction_type, spacing=spacing), codec)
        if image_size not in (None, pipeline.image_size):
            size = f"wanted {pipeline.image_size}, as its maps say: leave image_size out or change the level"
            raise ValueError(f"got image_size={image_size} at level {level}, {size}")
        return pipeline

    def push_to_hub(
        self, repo_id: str, *, report: str | Path | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload this pipeline with a model card to the Hub, or write it to a local folder; returns its address.

        `report`: the folder reports/<run> of its training; None: that of the run whose runs/<run>/pipeline was loaded,
        or, without such a report, the card that it was loaded with.
        """
        hub, local = HfApi(token=token), is_path(repo_id)
        name = repo_id if local else hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = card_of(self, name, report)
        with TemporaryDirectory() as temporary:
            folder = Path(repo_id if local else temporary).expanduser()
            self.save_pretrained(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            for file in (folder / "model_index.json", *folder.glob("*/config.json")):  # without local paths
                file.write_bytes(b"".join(x for x in file.read_bytes().splitlines(True) if b"_name_or_path" not in x))
            message = "Upload WaveletPipeline"
            return name if local else str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message))


def visible(images: np.ndarray) -> np.ndarray:
    """The channels of images (..., C) that are shown: the first three as RGB or, of fewer, the first as grey."""
    return images[..., : 3 if images.shape[-1] >= 3 else 1]


def image_generators(seeds: range) -> list[Generator]:
    """One CPU generator per image, so that image k is the same on every device and in every batch."""
    return [Generator().manual_seed(seed) for seed in seeds]
