"""Oracles: diffusers' own pipeline bit for bit, the published runs, the exact denoiser of a Gaussian."""

import json
import shutil
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from wddm.backbones import build_backbone
from wddm.loading import load_scheduler
from wddm.objective import FLOW, SINGLE_STEP, SOLVERS, build_solver, diffusion_loss, of_target, set_steps
from wddm.pipeline import WaveletPipeline
from wddm.sampling import open_pipeline, sample_images
from wddm.ukan import UKANModel
from wddm.wavelets import WaveletCodec

OF_FLOW = [name for name, (_, of_flow) in SOLVERS.items() if of_flow]
MODELS = sorted(path.parent for path in Path(__file__).parents[1].glob("notebooks/models/*/model_index.json"))


def tiny_pipeline(level: int = 1, solver: str = "ddim", prediction_type: str = "epsilon") -> WaveletPipeline:
    torch.manual_seed(0)
    backbone = build_backbone("unet", dataset="digits", level=level, widths=(16, 32)).eval()
    codec = WaveletCodec(level=level, scaling="dyadic")
    spacing = None if prediction_type == FLOW else "leading"
    pipeline = WaveletPipeline(backbone, build_solver(solver, prediction_type, spacing=spacing), codec)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("solver", "theirs"), [("ddpm", DDPMPipeline), ("ddim", DDIMPipeline)])
def test_level_0_is_diffusers_pipeline_bit_for_bit(solver: str, theirs: type) -> None:
    ours = tiny_pipeline(level=0, solver=solver)
    reference = theirs(ours.backbone, build_solver(solver, "epsilon", spacing="leading"))
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
    """The exact denoiser of Gaussian coefficients: E[z | z_t] for z ~ N(mean, covariance) over the channels."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, mean: float, covariance: torch.Tensor, prediction_type: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=len(covariance), sample_size=8)
        self.mean, self.covariance, self.prediction_type = mean, covariance.double(), prediction_type
        a = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
        self.sigma = (1 / a - 1).sqrt().numpy()

    def forward(self, sample, timestep):
        sigma = np.interp(float(timestep), np.arange(1000), self.sigma)
        signal, spread = (1 / (1 + sigma**2)) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        if self.prediction_type == FLOW:
            signal, spread = 1 - float(timestep) / 1000, float(timestep) / 1000
        noisy = signal**2 * self.covariance + spread**2 * torch.eye(len(self.covariance))
        x, gain = sample.double(), signal * self.covariance @ torch.linalg.inv(noisy)
        clean = self.mean + torch.einsum("ij,bjhw->bihw", gain, x - signal * self.mean)
        noise = (x - signal * clean) / spread
        velocity = signal * noise - spread * clean
        answers = {"epsilon": noise, "sample": clean, "v_prediction": velocity, FLOW: noise - clean}
        return SimpleNamespace(sample=answers[self.prediction_type].float())


def gaussian_latents(solver: str, covariance, prediction_type: str = "epsilon", spacing: str = "trailing", **options):
    """What a solver draws with the exact denoiser of N(0.1, covariance), (64, C, 8, 8)."""
    pipeline = tiny_pipeline()
    pipeline.codec.clip_value.fill_(20.0)
    pipeline.scheduler = build_solver(solver, prediction_type, spacing=spacing, codec=pipeline.codec)
    pipeline.backbone = GaussianDenoiser(0.1, covariance, prediction_type)
    drawn = []

    def keep(pipe, i, t, state):
        drawn[:] = [state["latents"]]

    pipeline(64, torch.Generator().manual_seed(0), output_type="pt", callback_on_step_end=keep, **options)
    return drawn[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", FLOW])
@pytest.mark.parametrize(("solver", "eta"), [*((name, 0.0) for name in SOLVERS), ("ddim", 1.0)])
def test_exact_denoiser_gives_back_its_gaussian(solver: str, eta: float, prediction_type: str) -> None:
    """Sample and v say what epsilon says, so they draw the same, except by pndm: it mixes outputs of several times."""
    if prediction_type == FLOW and solver not in OF_FLOW:
        with pytest.raises(ValueError, match=f"got {solver} for {FLOW}"):
            build_solver(solver, prediction_type)
        return
    covariance = 0.2**2 * torch.eye(4)
    if prediction_type in ("sample", "v_prediction") and solver != "pndm":
        options = {"num_inference_steps": 40, "eta": eta}
        epsilon = gaussian_latents(solver, covariance, **options)
        assert_close(gaussian_latents(solver, covariance, prediction_type, **options), epsilon, atol=1e-3, rtol=0)
        return
    steps = 1000 if solver in ("ddpm", "ddim", "euler", "euler_a") else 200  # the others are of higher order
    drawn = gaussian_latents(solver, covariance, prediction_type, num_inference_steps=steps, eta=eta)
    # 16,384 values: standard errors of 0.0016 and 0.0011, the rest is the solver's own
    assert_close(drawn.mean().item(), 0.1, atol=0.004, rtol=0)
    assert_close(drawn.std().item(), 0.2, atol=0.004, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_honours_the_spacing(solver: str, spacing: str) -> None:
    options = {"prediction_type": "v_prediction", "num_inference_steps": 150, "spacing": spacing}
    drawn = gaussian_latents(solver, 0.2**2 * torch.eye(4), **options)
    assert_close(drawn.mean().item(), 0.1, atol=0.006, rtol=0)
    assert_close(drawn.std().item(), 0.2, atol=0.012, rtol=0)  # ddpm and euler_a have 0.19 at 150 steps
    trailing = build_solver(solver, "v_prediction", spacing="trailing")
    other = build_solver(solver, "v_prediction", spacing=spacing)
    trailing.set_timesteps(7), other.set_timesteps(7)
    assert trailing.timesteps.tolist() != other.timesteps.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_is_that_of_the_diffusers_class_bit_for_bit(solver: str) -> None:
    pipeline = tiny_pipeline(solver=solver, prediction_type="v_prediction")
    images = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=9, output_type="pt").images
    bare, generator = build_solver(solver, "v_prediction", spacing="leading"), torch.Generator().manual_seed(3)
    bare.set_timesteps(9)
    z = torch.randn(2, 4, 8, 8, generator=generator) * bare.init_noise_sigma
    random = {"generator": generator} if solver in ("ddpm", "ddim", "euler", "euler_a") else {}
    with torch.no_grad():
        for t in bare.timesteps:
            z = bare.step(pipeline.backbone(bare.scale_model_input(z, t), t).sample, t, z, **random).prev_sample
    assert torch.equal(images, pipeline.decode(z))


@pytest.mark.parametrize("solver", OF_FLOW)
def test_the_loop_of_a_flow_is_that_of_the_diffusers_class_bit_for_bit(solver: str) -> None:
    pipeline = tiny_pipeline(solver=solver, prediction_type=FLOW)
    states = []
    options = {"output_type": "pt", "callback_on_step_end": lambda pipe, i, t, state: states.append(state)}
    images = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=9, **options).images
    if solver in SINGLE_STEP:  # the last step ends where the network says
        assert_close(states[-1]["denoised"], states[-1]["latents"], atol=1e-5, rtol=1e-5)
    bare = build_solver(solver, FLOW)
    set_steps(bare, 9)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in bare.timesteps:
            z = bare.step(pipeline.backbone(z, t).sample, t, z).prev_sample
    assert torch.equal(images, pipeline.decode(z))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_plain_schedulers_of_flows_are_taken_as_such(name: str) -> None:
    ours = tiny_pipeline(solver="heun" if "Heun" in name else "euler", prediction_type=FLOW)
    plain = WaveletPipeline(ours.backbone, getattr(diffusers, name)(), ours.codec)
    plain.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np"}
    assert np.array_equal(plain(2, **options).images, ours(2, **options).images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("KarrasVeScheduler", {}),  # no config
        ("IPNDMScheduler", {}),  # nothing about what is predicted
        ("SCMScheduler", {}),  # a target that is not ours
        ("DDPMWuerstchenScheduler", {}),  # no timesteps
        ("UniPCMultistepScheduler", {"prediction_type": FLOW}),  # the noise levels of another process
    ],
)
def test_schedulers_of_other_targets_are_refused_in_one_line(name: str, options: dict) -> None:
    ours = tiny_pipeline()
    with pytest.raises(ValueError, match=f"^got {name} for .*, wanted one for epsilon, .*build_solver's$"):
        WaveletPipeline(ours.backbone, getattr(diffusers, name)(**options), ours.codec)


def test_straight_paths_need_one_step() -> None:
    """A flow to a single image is a straight line: Euler's solver is exact in one step, as in any number of them."""
    for steps in (1, 4):
        drawn = gaussian_latents("euler", torch.zeros(4, 4), FLOW, num_inference_steps=steps)
        assert_close(drawn, torch.full_like(drawn, 0.1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", OF_FLOW)
def test_a_flow_is_saved_and_opened_with_a_solver_that_works(solver: str, tmp_path) -> None:
    pipeline = tiny_pipeline(solver=solver, prediction_type=FLOW)
    pipeline.save_pretrained(tmp_path)
    again, opened = WaveletPipeline.from_pretrained(tmp_path), open_pipeline(tmp_path, prediction_type=FLOW)
    first, second = (dict(one.scheduler.config) | {"_use_default_values": []} for one in (pipeline, again))
    assert first == second and second["prediction_type"] == FLOW
    assert type(opened.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    options = {"num_inference_steps": 3, "output_type": "np"}
    assert np.array_equal(again(2, **options).images, pipeline(2, **options).images)
    assert np.isfinite(opened(2, **options).images).all()
    with pytest.raises(ValueError, match="got eta="):
        opened(2, eta=0.5, **options)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("kind", ["unet", "ukan", "dit"])
def test_a_flow_is_learned_and_drawn_by_every_network_and_level(kind: str, level: int) -> None:
    network = build_backbone(kind, dataset="digits", level=level, widths=(16, 16))
    scheduler, codec = build_solver("euler", FLOW), WaveletCodec(level=level, scaling="dyadic")
    images, t = torch.rand(2, 1, 16, 16) * 2 - 1, torch.tensor([1.0, 1000.0])
    noise = torch.randn(2, 4**level, 16 // 2**level, 16 // 2**level)
    diffusion_loss(network, codec, scheduler, images, noise, t, weighting="none").total.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    pipeline = WaveletPipeline(network.eval(), scheduler, codec)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, num_inference_steps=2, output_type="pt").images.shape == (2, 1, 16, 16)


BY_TARGET = [*((name, "epsilon", 0.0) for name in SINGLE_STEP), ("ddim", "epsilon", 0.8)]
BY_TARGET += [(name, FLOW, 0.0) for name in SINGLE_STEP if name in OF_FLOW]


@pytest.mark.parametrize(("solver", "target", "eta"), BY_TARGET)
def test_equal_band_rates_are_the_plain_sampler_bit_for_bit(solver: str, target: str, eta: float) -> None:
    pipeline = tiny_pipeline(solver=solver, prediction_type=target)
    for generators in (None, torch.Generator().manual_seed(5)):
        again = None if generators is None else generators.clone_state()
        options = {"batch_size": 3, "num_inference_steps": 7, "eta": eta, "output_type": "np"}
        plain = pipeline(generator=generators, **options).images
        assert np.array_equal(pipeline(generator=again, detail_steps=7, **options).images, plain)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("steps", "detail_steps"), [(10, 5), (5, 10), (7, 5), (1, 6)])
@pytest.mark.parametrize("solver", SINGLE_STEP)
def test_bands_that_do_not_depend_on_each_other_are_drawn_as_if_alone(
    solver: str, steps: int, detail_steps: int, spacing: str
) -> None:
    kinds = ["sample" if solver == "ddim" else "epsilon", *[FLOW] * (solver in OF_FLOW and spacing == "trailing")]

    def drawn(**counts: int) -> torch.Tensor:
        return torch.cat([gaussian_latents(solver, 0.2**2 * torch.eye(4), kind, spacing, **counts) for kind in kinds])

    both = drawn(num_inference_steps=steps, detail_steps=detail_steps)
    assert_close(both[:, :1], drawn(num_inference_steps=steps)[:, :1], atol=1e-5, rtol=1e-5)
    assert_close(both[:, 1:], drawn(num_inference_steps=detail_steps)[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("steps", "detail_steps"), [(600, 200), (200, 600), (600, 350)])
@pytest.mark.parametrize("solver", SINGLE_STEP)
def test_correlated_bands_come_out_correlated(solver: str, steps: int, detail_steps: int) -> None:
    covariance = torch.tensor(
        [[0.3, 0.15, -0.1, 0.0], [0.15, 0.2, 0.0, 0.0], [-0.1, 0.0, 0.1, 0.02], [0, 0, 0.02, 0.05]]
    )
    for target in ("epsilon", *[FLOW] * (solver in OF_FLOW)):
        drawn = gaussian_latents(solver, covariance, target, num_inference_steps=steps, detail_steps=detail_steps)
        values = drawn.transpose(0, 1).flatten(1)  # (4, 4096)
        assert_close(values.mean(1), torch.full((4,), 0.1), atol=0.03, rtol=0)
        assert_close(torch.cov(values), covariance, atol=0.02, rtol=0)  # standard error of the largest: 0.007


def test_image_k_does_not_depend_on_the_batch_size() -> None:
    pipeline = tiny_pipeline()
    options = {"num_inference_steps": 4, "eta": 0.5}
    one_by_one = np.concatenate(list(sample_images(pipeline, 5, batch_size=1, seed=7, **options)))
    by_threes = np.concatenate(list(sample_images(pipeline, 5, batch_size=3, seed=7, **options)))
    assert one_by_one.shape == (5, 16, 16, 1) and one_by_one.dtype == np.uint8
    assert np.array_equal(one_by_one, by_threes)
    assert len(np.unique(one_by_one.reshape(5, -1), axis=0)) == 5


def test_a_network_in_training_is_drawn_from_without_dropout_and_goes_on_training() -> None:
    pipeline = tiny_pipeline()
    pipeline.backbone = build_backbone("ukan", dataset="digits", widths=(16, 16), dropout=0.5)
    first, second = (pipeline(2, num_inference_steps=2, output_type="pt").images for _ in range(2))
    assert torch.equal(first, second) and pipeline.backbone.training
    with pytest.raises(ZeroDivisionError):
        pipeline(2, num_inference_steps=2, callback_on_step_end=lambda *_: 1 / 0)
    assert pipeline.backbone.training  # after a call that was cut short, too
    pipeline.backbone.eval()
    assert torch.equal(pipeline(2, num_inference_steps=2, output_type="pt").images, first)
    assert not pipeline.backbone.training


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


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_of_every_target_is_saved_and_opened(solver: str, target: str, tmp_path) -> None:
    build_solver(solver, target).save_pretrained(tmp_path)
    assert of_target(load_scheduler(tmp_path)).config.prediction_type == target


@pytest.mark.parametrize("part", ["unet", "ukan", "codec"])
@pytest.mark.parametrize("harm", ["truncated", "missing", "extra", "shape", "pickle", "config"])
def test_damaged_pipelines_are_refused_by_name(tmp_path, part: str, harm: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.backbone = build_backbone("ukan" if part == "ukan" else "unet", dataset="digits", level=1, widths=(16, 32))
    pipeline.codec = WaveletCodec(scaling="band").fit(np.zeros((2, 16, 16, 1), np.uint8))
    pipeline.save_pretrained(tmp_path)
    folder = tmp_path / ("codec" if part == "codec" else "backbone")
    message = damage(folder, harm, "clip_value" if part == "codec" else "conv_in.bias")
    with pytest.raises(ValueError, match=message) as refused:
        WaveletPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and folder.name in str(refused.value)
    if part != "codec":
        with pytest.raises(ValueError, match=message):
            WaveletPipeline.from_published(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *product(
            ("model_index.json", "scheduler/scheduler_config.json", "backbone/config.json", "codec/config.json"),
            ("{", "[1, 2]", '"text"', "null", "\xff", "[" * 100_000),
        ),
        *product(
            ("scheduler/scheduler_config.json", "backbone/config.json"), ("{}", '{"_class_name": ["UNet2DModel"]}')
        ),
    ],
)
def test_malformed_configs_are_refused_in_one_line(tmp_path, file: str, content: str) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"^got .+, wanted .+") as refused:
        WaveletPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("backbone", "sample_size", "8"),
        ("backbone", "block_out_channels", 16),
        ("backbone", "in_channels", [4]),
        ("codec", "level", "1"),
        ("codec", "wavelet", {"name": "haar"}),
        ("scheduler", "num_train_timesteps", "many"),
        ("scheduler", "prediction_type", ["epsilon"]),
        ("scheduler", "_class_name", "UNet2DModel"),
    ],
)
def test_configs_of_wrong_types_are_refused_in_one_line(tmp_path, part: str, entry: str, value) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=rf"^got .*{part}.*, wanted ") as refused:
        WaveletPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changed",
    [{"ch_mult": 2}, {"ch": "16"}, {"in_channels": None}, {"dropout": "none"}, {"T": -1}, {"sample_size": []}],
)
def test_published_configs_of_wrong_types_are_refused_in_one_line(published, tmp_path, changed: dict) -> None:
    shutil.copytree(published / "checkpoint", tmp_path / "c", copy_function=shutil.copyfile)
    file = tmp_path / "c" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=r"^got .+, wanted .+") as refused:
        WaveletPipeline.from_published(tmp_path / "c")
    assert "\n" not in str(refused.value)


def test_no_module_that_a_checkpoint_names_is_imported(tmp_path, monkeypatch) -> None:
    """Neither from the checkpoint's own folder, nor from where Python looks for modules."""
    pipeline, folder = tiny_pipeline(), tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("backbone", "scheduler", "codec"):
        index[part] = [f"hostile_{part}", "Part"]
    index |= {"_class_name": ["hostile_pipeline", "Pipeline"], "extra": ["hostile_extra", "Part"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("backbone", "scheduler", "codec", "pipeline", "extra"):
        for place in (tmp_path, folder, folder / part):
            place.mkdir(exist_ok=True)
            (place / f"hostile_{part}.py").write_text("raise SystemExit('imported')")
    for part in ("backbone", "codec"):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": f"hostile_{part}.Part"}}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(folder)
    again = WaveletPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np"}
    assert np.array_equal(again(**options).images, pipeline(**options).images)
    assert not [name for name in sys.modules if name.startswith("hostile")]


def test_a_scheduler_that_is_given_clips_and_predicts_as_the_network_wants(tmp_path) -> None:
    """Clipped at 1, where coefficients reach 4, or told another target, it would draw wrong images in silence."""
    options = {"num_inference_steps": 3, "output_type": "np"}
    shipped = ROOT / "notebooks/models/digits"
    stored, given = (WaveletPipeline.from_pretrained(shipped, scheduler=one) for one in (None, build_solver("ddim")))
    for pipeline in (stored, given):
        pipeline.set_progress_bar_config(disable=True)
    assert stored.codec.clip_value > 4 and np.array_equal(stored(**options).images, given(**options).images)
    config = stored.scheduler.config
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler):
        WaveletPipeline.from_pretrained(shipped, scheduler=kind.from_config(config))
    noise = {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}
    for other in (
        DDIMScheduler(), build_solver("dpmsolver++", "epsilon"), build_solver("euler", "flow_prediction"),
        DDIMScheduler(prediction_type="sample"), DDIMScheduler(**noise, num_train_timesteps=500),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"got a scheduler of .*, wanted .*'sample', .*'squaredcos_cap_v2', .*1000"
        ):
            WaveletPipeline.from_pretrained(shipped, scheduler=other)


@pytest.mark.parametrize("option", ["backbone", "codec", "class_names", "torch_dtpye", "use_safetensors", "subfolder"])
def test_options_of_loading_that_nothing_takes_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"got '{option}', wanted options that loading has"):
        WaveletPipeline.from_pretrained(ROOT / "notebooks/models/digits", **{option: None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_the_same_in_half_precision(solver: str, dtype: torch.dtype) -> None:
    """The network alone is in half precision: solvers that start at noise levels of 20,000 would overflow."""
    images = []
    for kind in (torch.float32, dtype):
        pipeline = WaveletPipeline.from_pretrained(ROOT / "notebooks/models/digits", torch_dtype=kind)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = build_solver(solver, "sample")
        images.append(pipeline(4, num_inference_steps=5, output_type="pt").images)
        assert images[-1].dtype == kind
    assert (images[0] - images[1].float()).abs().mean() < 0.02


def test_parts_and_types_that_are_given_are_taken(tmp_path) -> None:
    pipeline, solver = tiny_pipeline(), build_solver("euler", "epsilon")
    pipeline.save_pretrained(tmp_path)
    again = WaveletPipeline.from_pretrained(tmp_path, scheduler=solver, torch_dtype=torch.bfloat16)
    assert again.scheduler is solver and again.backbone.dtype == again.codec.dtype == torch.bfloat16
    again.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    images = again(2, **options).images
    assert torch.equal(again(2, detail_steps=3, **options).images, images)


def damage(folder, harm: str, name: str) -> str:
    """Damage the weights or the config in a folder; returns what the error has to say."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
        return "does not load"
    if harm == "pickle":
        torch.save(tensors, file.with_suffix(".bin"))
        file.unlink()
        return "pickled weights are not read"
    if harm == "config":
        (folder / "config.json").write_text("{")
        return "config.json"
    if harm == "missing":
        del tensors[name]
    else:
        tensors["surplus" if harm == "extra" else name] = torch.zeros(31)
    save_file(tensors, file)
    return "surplus" if harm == "extra" else name


def test_a_codec_that_is_not_finite_draws_nothing() -> None:
    for harm in (float("nan"), float("inf")):
        pipeline = tiny_pipeline()
        pipeline.codec.scale.fill_(harm)
        with pytest.raises(ValueError, match="got images that are not finite from the codec, wanted numbers"):
            pipeline(1, num_inference_steps=2)


def test_what_is_not_finite_is_no_image() -> None:
    pipeline = tiny_pipeline(prediction_type="v_prediction", solver="euler_a")
    pipeline.backbone.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite from EulerAncestralDiscreteScheduler in 4 steps"):
        pipeline(1, num_inference_steps=4)


def test_published_prediction_type_goes_by_the_name(tmp_path) -> None:
    for name, wanted in (("wddm-ukan-celeba-hq-lvl1", "sample"), ("wddm-ukan-stl10-lvl1", "epsilon")):
        UKANModel(16, 12, 12, (32,)).save_pretrained(tmp_path / name)
        assert WaveletPipeline.from_published(tmp_path / name).scheduler.config.prediction_type == wanted


def test_a_network_that_is_offloaded_draws_on_the_device_where_it_runs(monkeypatch) -> None:
    """Between its calls it lies elsewhere, here on "meta" in place of a CPU beside a GPU; the codec stays."""
    pipe = tiny_pipeline()
    wanted = pipe(2, num_inference_steps=2, detail_steps=1, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert not hasattr(pipe.codec, "_hf_hook")
    monkeypatch.setattr(WaveletPipeline, "device", torch.device("meta"))
    assert torch.equal(pipe(2, num_inference_steps=2, detail_steps=1, output_type="pt").images, wanted)


def test_a_whole_number_of_steps_may_be_a_float() -> None:
    pipe = tiny_pipeline(solver="euler", prediction_type="flow_prediction")
    images = [pipe(num_inference_steps=steps, output_type="pt").images for steps in (2, 2.0, np.int64(2))]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


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


def test_noise_that_is_given_takes_the_place_of_what_would_be_drawn() -> None:
    pipeline, options = tiny_pipeline(), {"batch_size": 2, "num_inference_steps": 4, "output_type": "pt"}
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    drawn, given = pipeline(seed=5, **options).images, pipeline(latents=noise, **options).images
    assert torch.equal(given, drawn)
    a, b = (pipeline(latents=noise, eta=1.0, seed=seed, **options).images for seed in (0, 1))
    assert not torch.equal(a, b)  # the generators draw what ddim adds
    with pytest.raises(ValueError, match=r"got latents \(2, 4, 4, 4\), wanted \(2, 4, 8, 8\): give"):
        pipeline(latents=noise[..., :4, :4], **options)


def test_a_checkpoint_of_other_timesteps_is_refused(tmp_path) -> None:
    UKANModel(16, 12, 12, (32,), num_train_timesteps=50).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a checkpoint of 50 timesteps, wanted 1000"):
        WaveletPipeline.from_published(tmp_path)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws(solver: str) -> None:
    images = tiny_pipeline(solver=solver)(1, num_inference_steps=5, output_type="pt").images
    assert images.isfinite().all() and images.std() > 0


def test_clip_of_a_solver_is_the_codecs_value() -> None:
    codec = WaveletCodec()
    codec.clip_value.fill_(7.5)
    assert build_solver("ddim", codec=codec).config.clip_sample_range == 7.5


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_models_that_ship_are_small_and_draw_pictures_soon(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 12e6 and (folder / "README.md").is_file()
    began = time.perf_counter()
    pipeline = WaveletPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(16, num_inference_steps=20, seed=0, output_type="np").images
    assert time.perf_counter() - began < 20
    beside, apart = (np.abs(images - np.roll(images, shift, (0, 2))).mean() for shift in ((0, 1), (1, 0)))
    assert beside < 0.8 * apart  # neighbours are more alike than pixels of two images: in noise they are not


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: build_solver("dimm"), "got solver='dimm', wanted one of ddpm, ddim"),
        (lambda p: build_solver("ddim", spacing="even"), "got spacing='even'"),
        (lambda p: tiny_pipeline(solver="pndm")(eta=0.5), "got eta=0.5 for pndm, wanted 0"),
        (lambda p: tiny_pipeline()(eta=1.5), "got eta=1.5, wanted 0"),
        (lambda p: tiny_pipeline(solver="unipc")(detail_steps=5), "got detail_steps for unipc, wanted one of ddpm"),
        (lambda p: tiny_pipeline(level=0)(detail_steps=5), "got detail_steps at level 0"),
        (lambda p: tiny_pipeline()(num_inference_steps=1001), "got 1001 steps"),
        (lambda p: tiny_pipeline()(detail_steps=-1), "detail_steps=-1, wanted 1 to 1000"),
        (lambda p: tiny_pipeline()(detail_steps=0), "detail_steps=0, wanted 1 to 1000"),
        (lambda p: tiny_pipeline()(num_inference_steps=2.5), "got 2.5 steps, .*, wanted 1 to 1000"),
        (lambda p: tiny_pipeline()(0), "got batch_size=0, .*wanted 1 or more"),
        (lambda p: tiny_pipeline()(1.5), "got batch_size=1.5, .*wanted 1 or more"),
        (lambda p: tiny_pipeline()(2, [torch.Generator()]), "got batch_size=2, .* a generator or as many"),
        (lambda p: tiny_pipeline()(1, [torch.Generator()] * 2), "got batch_size=1, .* a generator or as many"),
        (lambda p: tiny_pipeline()(1, 7), "got batch_size=1, generator=7, wanted .*: give seed"),
        (lambda p: tiny_pipeline()(2, (torch.Generator(),) * 2), "got batch_size=2, .* a generator or as many"),
        (lambda p: tiny_pipeline()(output_type="png"), "wanted one of pil, np, pt"),
        (
            lambda p: WaveletPipeline.from_published(p, level=1, image_size=64),
            "got image_size=64 at level 1, wanted 32",
        ),
        (lambda p: WaveletPipeline.from_published(p, level=2), "got level=2 for 12 channels, wanted 3 x"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(tmp_path, make, message: str) -> None:
    UKANModel(16, 12, 12, (32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
