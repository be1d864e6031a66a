"""Oracles: diffusers' own pipeline bit for bit, the published runs, the exact denoiser of a Gaussian."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from torch.testing import assert_close

from wddm.backbones import build_backbone
from wddm.pipeline import SOLVERS, WaveletPipeline, build_solver, sample_images
from wddm.ukan import UKANModel
from wddm.wavelets import WaveletCodec


def tiny_pipeline(level: int = 1, solver: str = "ddim", prediction_type: str = "epsilon") -> WaveletPipeline:
    torch.manual_seed(0)
    backbone = build_backbone("unet", dataset="digits", level=level, widths=(16, 32)).eval()
    pipeline = WaveletPipeline(backbone, build_solver(solver, prediction_type), WaveletCodec(level=level))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("solver", "theirs"), [("ddpm", DDPMPipeline), ("ddim", DDIMPipeline)])
def test_level_0_is_diffusers_pipeline_bit_for_bit(solver: str, theirs: type) -> None:
    ours = tiny_pipeline(level=0, solver=solver)
    reference = theirs(ours.backbone, build_solver(solver))
    reference.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 6, "output_type": "np"}
    wanted = reference(generator=torch.Generator().manual_seed(3), **options).images
    assert np.array_equal(ours(generator=torch.Generator().manual_seed(3), **options).images, wanted)


@pytest.mark.parametrize(
    ("solver", "steps", "eta", "prediction_type"),
    [
        ("ddim", 10, 0.0, "epsilon"),
        ("ddim", 10, 0.7, "epsilon"),
        ("ddim", 5, 0.0, "sample"),
        ("ddpm", 12, 0.0, "epsilon"),
    ],
)
def test_published_sampling_runs(published, solver: str, steps: int, eta: float, prediction_type: str) -> None:
    pipeline = WaveletPipeline.from_published(
        published / "checkpoint", level=1, image_size=32, prediction_type=prediction_type, solver=solver
    )
    images = pipeline(2, torch.Generator().manual_seed(42), num_inference_steps=steps, eta=eta, output_type="pt").images
    reference = load_file(published / "reference.safetensors")
    assert_close(images, reference[f"sample_{solver}{steps}_eta{eta}_{prediction_type}"], atol=1e-4, rtol=0)


class GaussianDenoiser(torch.nn.Module):
    """The exact denoiser of independent coefficients N(mean, std^2)."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, mean: float, std: float, prediction_type: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=12, sample_size=8)
        self.mean, self.std, self.prediction_type = mean, std, prediction_type
        self.signal = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod

    def forward(self, sample, timestep):
        a = self.signal[timestep.long()]
        clean = self.mean + a.sqrt() * self.std**2 / (a * self.std**2 + 1 - a) * (sample - a.sqrt() * self.mean)
        noise = (sample - a.sqrt() * clean) / (1 - a).sqrt()
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        answers = {"epsilon": noise, "sample": clean, "v_prediction": velocity}
        return SimpleNamespace(sample=answers[self.prediction_type])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_exact_denoiser_gives_back_its_gaussian(solver: str, eta: float, prediction_type: str) -> None:
    mean, std = 0.1, 0.2
    backbone = GaussianDenoiser(mean, std, prediction_type)
    pipeline = tiny_pipeline(solver=solver, prediction_type=prediction_type)
    pipeline.scheduler = build_solver(solver, prediction_type, clip=20.0, spacing="trailing")
    pipeline.backbone = backbone
    drawn = []

    def keep(pipe, i, t, state):
        drawn[:] = [state["latents"]]

    generator = torch.Generator().manual_seed(0)
    pipeline(64, generator, num_inference_steps=1000, eta=eta, output_type="pt", callback_on_step_end=keep)
    # 49,152 values: standard errors of 0.001 and 0.0006; all steps, so that little of the solver's own error is left
    assert_close(drawn[0].mean().item(), mean, atol=0.004, rtol=0)
    assert_close(drawn[0].std().item(), std, atol=0.004, rtol=0)


def test_image_k_does_not_depend_on_the_batch_size() -> None:
    pipeline = tiny_pipeline()
    options = {"num_inference_steps": 4, "eta": 0.5}
    one_by_one = np.concatenate(list(sample_images(pipeline, 5, batch_size=1, seed=7, **options)))
    by_threes = np.concatenate(list(sample_images(pipeline, 5, batch_size=3, seed=7, **options)))
    assert one_by_one.shape == (5, 16, 16, 1) and one_by_one.dtype == np.uint8
    assert np.abs(one_by_one.astype(int) - by_threes).max() <= 1  # convolutions round by batch size
    assert len(np.unique(one_by_one.reshape(5, -1), axis=0)) == 5


def test_default_generators_are_those_of_the_seed() -> None:
    pipeline = tiny_pipeline()
    images = pipeline(2, num_inference_steps=3, seed=5, output_type="np").images
    assert np.array_equal(images, pipeline(2, num_inference_steps=3, seed=5, output_type="np").images)
    generators = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    assert np.array_equal(images, pipeline(2, generators, num_inference_steps=3, output_type="np").images)


def test_saved_pipeline_draws_the_same(tmp_path) -> None:
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    pipeline.codec = WaveletCodec(scaling="band").fit(
        np.random.default_rng(0).integers(0, 256, (9, 16, 16, 1)).astype(np.uint8)
    )
    pipeline.save_pretrained(tmp_path)
    again = WaveletPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.image_size == 16 and again.codec.config.scaling == "band"
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    assert np.array_equal(again(**options).images, pipeline(**options).images)


def test_output_types() -> None:
    pipeline = tiny_pipeline()
    images = {kind: pipeline(2, num_inference_steps=2, output_type=kind).images for kind in ("pt", "np", "pil")}
    assert images["pt"].shape == (2, 1, 16, 16) and images["np"].shape == (2, 16, 16, 1)
    assert images["pt"].min() >= 0 and images["pt"].max() <= 1
    assert_close(torch.from_numpy(images["np"]).permute(0, 3, 1, 2), images["pt"])
    wanted = (images["np"][1, ..., 0] * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(images["pil"][1]), wanted)
    assert isinstance(pipeline(1, num_inference_steps=1, return_dict=False), tuple)


def test_callback_may_replace_the_latents() -> None:
    pipeline = tiny_pipeline()
    seen = []

    def blank(pipe, i, t, state):
        seen.append((i, int(t), state["denoised"].shape))
        return {"latents": torch.zeros_like(state["latents"])}

    images = pipeline(1, num_inference_steps=3, output_type="pt", callback_on_step_end=blank).images
    assert [i for i, _, _ in seen] == [0, 1, 2] and seen[0][2] == (1, 4, 8, 8)
    assert_close(images, torch.full((1, 1, 16, 16), 0.5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws(solver: str) -> None:
    images = tiny_pipeline(solver=solver)(1, num_inference_steps=5, output_type="pt").images
    assert images.isfinite().all() and images.std() > 0


def test_clip_of_a_solver_is_the_codecs_limit() -> None:
    assert build_solver("ddim", clip=7.5).config.clip_sample_range == 7.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: build_solver("dimm"), "got solver='dimm', wanted one of ddpm, ddim"),
        (lambda p: build_solver("ddim", spacing="even"), "got spacing='even'"),
        (lambda p: tiny_pipeline(solver="pndm")(eta=0.5), "got eta=0.5 for PNDMScheduler, wanted 0"),
        (lambda p: tiny_pipeline()(output_type="png"), "wanted pil, np or pt"),
        (
            lambda p: WaveletPipeline.from_published(p, level=1, image_size=64),
            "got image_size=64 at level 1, wanted 32",
        ),
        (lambda p: WaveletPipeline.from_published(p, level=2), "got level=2 for a checkpoint of 12 channels"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(tmp_path, make, message: str) -> None:
    UKANModel(16, 12, 12, (32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
