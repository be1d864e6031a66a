"""WaveletPipeline: noise -> solver steps in coefficient space -> codec -> images in [0, 1].

A `DiffusionPipeline` of three parts (backbone, scheduler, codec), saved and loaded as any other. Published checkpoints,
which store no scheduler, load through `from_published`.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi
from PIL.Image import Image
from torch import Generator, Tensor

from wddm.backbones import load_backbone
from wddm.bandrate import Group, joined
from wddm.cards import find_report, model_card
from wddm.loading import fetched, load_strictly
from wddm.objective import NOISE, SOLVERS, build_solver, check_options
from wddm.wavelets import WaveletCodec


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
        detail_steps: int | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many.
            generator: one for the batch or one per image. Default: one per image, image k seeded `seed + k`, so
                that it does not depend on the batch size.
            num_inference_steps: solver steps.
            eta: 0 deterministic DDIM, 1 as random as DDPM; only for solvers that know it.
            detail_steps: solver steps of the detail bands, if others than those of the coarse band (see bandrate.py).
            latents: unit noise (B, 4^L C, h, w) to start from; the generators then only draw what the solver adds.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the last two float in [0, 1].
            callback_on_step_end: called `(pipeline, i, t, {"latents": ..., "denoised": ...})` after each step;
                "denoised" estimates the clean coefficients, or is None; the "latents" it returns are gone on with.

        Raises:
            ValueError: unknown output type, latents of another shape, a wrong number of generators or steps, eta or
                detail_steps for a solver that cannot honour them, coefficients that are not finite in the end.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"got output_type={output_type!r}, wanted pil, np or pt: choose one of them")
        if generator is None:
            generator = image_generators(range(seed, seed + batch_size))
        noise = self._noise(latents, batch_size, generator)
        groups = self._groups(noise, generator, eta, num_inference_steps, detail_steps)
        times = {visit: t for group in groups for visit, t in group.times.items()}
        for i, visit in enumerate(self.progress_bar(sorted(times))):
            t = times[visit]
            prediction = self.backbone(joined(groups, [group.seen_at(visit, t) for group in groups]), t).sample
            for group in groups:
                group.step_at(visit, t, prediction)
            if callback_on_step_end is not None:
                self._call_back(callback_on_step_end, i, t, groups)
        latents = joined(groups, [group.latents for group in groups])
        if not latents.isfinite().all():
            raise ValueError(
                f"got coefficients that are not finite from {type(self.scheduler).__name__} in {num_inference_steps} "
                "steps, wanted numbers: take more steps, leading spacing, another solver or another checkpoint"
            )
        images = self._images(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, latents: Tensor | None, batch_size: int, generator: Generator | list[Generator]) -> Tensor:
        """What sampling starts from (B, 4^L C, h, w): the latents given, or drawn."""
        shape = (batch_size, self.backbone.config.in_channels, *[self.backbone.config.sample_size] * 2)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self.device, dtype=self.backbone.dtype)
        if latents.shape != shape:
            raise ValueError(f"got latents {tuple(latents.shape)}, wanted {shape}: give noise of that shape")
        return latents.to(self.device, self.backbone.dtype)

    def _call_back(self, callback: Callable, i: int, t: Tensor, groups: list[Group]) -> None:
        """Show the caller the state of step i, and go on with the latents it returns."""
        estimates = [group.denoised for group in groups]
        state = {"latents": joined(groups, [group.latents for group in groups])}
        state["denoised"] = None if None in estimates else joined(groups, estimates)
        changed = callback(self, i, t, state) or {}
        for group in groups:
            group.latents = changed.get("latents", group.latents)

    def _images(self, latents: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image]:
        """Coefficients as images of that type."""
        images = self.decode(latents)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of coefficients (B, 4^L C, h, w)."""
        return (self.codec.decode(latents) / 2 + 0.5).clamp(0, 1)

    def _groups(
        self, noise: Tensor, generator: Generator | list[Generator], eta: float, steps: int, detail_steps: int | None
    ) -> list[Group]:
        """All channels as one group; with `detail_steps`, the coarse band and the details as two."""
        kind = type(self.scheduler).__name__
        name = next((name for name, known in SOLVERS.items() if known == kind), kind)
        known = inspect.signature(self.scheduler.step).parameters
        most = self.scheduler.config.num_train_timesteps
        if not all(1 <= count <= most for count in (steps, detail_steps or 1)):
            raise ValueError(f"got {steps} steps and detail_steps={detail_steps}, wanted 1 to {most}: change them")
        check_options(name, eta=eta, detail_steps=detail_steps)
        if detail_steps and not self.codec.config.level:
            raise ValueError("got detail_steps at level 0, which has no detail bands: leave detail_steps out")

        def group(solver: SchedulerMixin, count: int, channels: slice, source: Generator | list[Generator]) -> Group:
            solver.set_timesteps(count, device=self.device)
            options = {"eta": eta, "generator": source}
            return Group(solver, channels, noise, {key: value for key, value in options.items() if key in known})

        if detail_steps is None:
            return [group(self.scheduler, steps, slice(None), generator)]
        coarse = noise.shape[1] // 4**self.codec.config.level  # the coarse band comes first
        copies = [g.clone_state() for g in generator] if isinstance(generator, list) else generator.clone_state()
        return [
            group(self.scheduler, steps, slice(coarse), generator),
            group(deepcopy(self.scheduler), detail_steps, slice(coarse, None), copies),
        ]

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs) -> Self:
        """A pipeline folder or Hub repository of ours, as `DiffusionPipeline.from_pretrained` with its options.

        Raises:
            ValueError: a part is absent, damaged, pickled, or its tensors are not those of its config.
        """
        folder = fetched(path, kwargs)
        options = {key: kwargs[key] for key in ("torch_dtype",) if key in kwargs}
        if "backbone" not in kwargs:
            kwargs["backbone"] = load_backbone(folder / "backbone", **options)
        if "codec" not in kwargs:
            kwargs["codec"] = load_strictly(WaveletCodec.from_pretrained, folder / "codec", **options)
        try:
            return super().from_pretrained(folder, **kwargs)
        except OSError as error:
            raise ValueError(f"got {path}, which does not load: {str(error).strip().splitlines()[0]}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        report: str | Path | None = None,
        commit_message: str = "Upload WaveletPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload this pipeline with a model card (see cards.py) to the Hub; its address is returned.

        Args:
            repo_id: name on the Hub, or a local folder, which is then all that is written to.
            report: reports/<run> of its training, for the card; found if it was loaded from runs/<run>/pipeline.
        """
        report = Path(report) if report else find_report(self.config.get("_name_or_path") or "")
        local, hub = Path(repo_id).is_dir(), HfApi(token=token)
        name = repo_id if local else hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as aside:
            folder = Path(repo_id if local else aside)
            (folder / "README.md").write_text(model_card(self, name, report))
            self.save_pretrained(folder)
            if local:
                return name
            options = {"commit_message": commit_message, "create_pr": create_pr}
            return str(hub.upload_folder(repo_id=name, folder_path=folder, **options))

    @classmethod
    def from_published(
        cls,
        path: str | Path,
        *,
        level: int = 1,
        image_size: int | None = None,
        prediction_type: str | None = None,
        solver: str = "ddim",
        spacing: str = "leading",
        **options,
    ) -> Self:
        """A published UNet or U-KAN checkpoint (folder or Hub repository), wired as the published system wires it.

        Args:
            prediction_type: not stored in it; "sample" for a name with "celeba" in it, else "epsilon" unless given.
            options: subfolder, revision, cache_dir, token, local_files_only, torch_dtype.

        Raises:
            ValueError: `image_size` or `level` contradict the checkpoint, or it is damaged.
        """
        folder = fetched(path, options) / (options.pop("subfolder", None) or "")
        backbone = load_backbone(folder, **options)
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
        if backbone.config.num_train_timesteps not in (None, NOISE["num_train_timesteps"]):
            raise ValueError(
                f"got a checkpoint of {backbone.config.num_train_timesteps} timesteps, wanted "
                f"{NOISE['num_train_timesteps']}, as the published system has: give another"
            )
        prediction_type = prediction_type or ("sample" if "celeba" in str(path).lower() else "epsilon")
        codec = WaveletCodec("haar", level, "packet", "dyadic", "AVHD")
        return cls(backbone, build_solver(solver, prediction_type, spacing=spacing), codec)


def image_generators(seeds: range) -> list[Generator]:
    """One CPU generator per image, so that image k is the same on every device and in every batch."""
    return [Generator().manual_seed(seed) for seed in seeds]
