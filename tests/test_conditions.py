"""Oracles: the guided score of a Gaussian mixture in closed form, what is known itself, and the plain sampler."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from test_pipeline import GaussianDenoiser, tiny_pipeline
from torch.nn import functional as F
from torch.testing import assert_close

from wddm.backbones import build_backbone
from wddm.conditions import numbered
from wddm.objective import FLOW, SINGLE_STEP, SOLVERS, TARGETS, build_solver
from wddm.pipeline import WaveletPipeline
from wddm.sampling import sample_images
from wddm.studies.sampling import denoising_error
from wddm.wavelets import WaveletCodec

OF_FLOW = [name for name, (_, of_flow) in SOLVERS.items() if of_flow]
CANNOT = [(name, FLOW) for name in SOLVERS if name not in OF_FLOW]
CODECS = [  # wavelet, level, transform, scaling
    ("haar", 1, "packet", "band"),
    ("haar", 2, "packet", "dyadic"),
    ("haar", 2, "pyramid", "none"),
    ("db2", 1, "packet", "dyadic"),
    ("sym4", 2, "packet", "band"),
    ("coif1", 2, "pyramid", "dyadic"),
    ("haar", 0, "packet", "dyadic"),
]


class Tiny(torch.nn.Module):
    """A network of random numbers that mixes all channels and neighbours, and counts its calls."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=channels, sample_size=side)
        self.conv, self.calls = torch.nn.Conv2d(channels, channels, 3, padding=1), 0

    def forward(self, sample, timestep):
        self.calls += 1
        return SimpleNamespace(sample=self.conv(sample).tanh())


def random_pipeline(
    wavelet="haar", level=1, transform="packet", scaling="dyadic", solver="ddim", target="v_prediction"
) -> WaveletPipeline:
    """A pipeline with random weights, for images of 2 channels and 32 x 32 pixels."""
    torch.manual_seed(0)
    codec = WaveletCodec(wavelet, level, transform, scaling)
    codec.fit(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 2), np.uint8))
    pipeline = tiny_pipeline(solver="ddim")
    pipeline.codec, pipeline.backbone = codec, Tiny(2 * 4**level, 32 // 2**level)
    pipeline.scheduler = build_solver(solver, target, codec=codec)
    return pipeline


def drawn(pipeline, **options) -> torch.Tensor:
    """Two images, scaled to [0, 1] but not clipped to it."""
    last: list[torch.Tensor] = []
    options = {"num_inference_steps": 4, "output_type": "pt"} | options
    pipeline(2, callback_on_step_end=lambda pipe, i, t, state: last.append(state["latents"]), **options)
    return pipeline.codec.decode(last[-1]) / 2 + 0.5


def cases() -> Iterator[tuple[str, str, tuple]]:
    """Solver, target and codec: every pair of them occurs, but not every three."""
    for i, solver in enumerate(SOLVERS):
        targets = [target for target in TARGETS if (solver, target) not in CANNOT]
        for j, codec in enumerate(CODECS):
            yield solver, targets[(i // 2 + j) % len(targets)], codec


@pytest.mark.parametrize(("solver", "target", "codec"), cases(), ids=str)
def test_what_is_known_is_met_by_every_solver_target_family_and_level(solver: str, target: str, codec: tuple) -> None:
    pipeline = random_pipeline(*codec, solver=solver, target=target)
    for k in range(min(1, codec[1]), codec[1] + 1):
        low = torch.rand(2, 2, 32 // 2**k, 32 // 2**k)
        assert_close(F.avg_pool2d(drawn(pipeline, low_resolution=low), 2**k), low, atol=1e-3, rtol=0)
    mask, known = torch.rand(2, 1, 32, 32) < 0.4, torch.rand(2, 2, 32, 32)
    images = drawn(pipeline, known=known, mask=mask)
    assert_close(images[mask.expand_as(images)], known[mask.expand_as(known)], atol=1e-3, rtol=0)
    assert images[~mask.expand_as(images)].std() > 0.01


def test_what_is_known_is_restored_without_a_label_unless_one_is_given() -> None:
    """Nobody knows the class of what is known; to draw all in turn would make a seven of a three."""
    torch.manual_seed(0)
    network = build_backbone("unet", dataset="digits", widths=(16,), num_class_embeds=4).eval()
    pipeline = WaveletPipeline(network, build_solver("ddim"), WaveletCodec(scaling="dyadic"))
    pipeline.set_progress_bar_config(disable=True)
    known = {"low_resolution": torch.rand(2, 1, 8, 8)}
    for labels, same in ((None, None), ([1], 1)):
        (images,) = sample_images(pipeline, 2, known=known, labels=labels, num_inference_steps=2)
        plain = pipeline(
            32, labels=same, low_resolution=known["low_resolution"].repeat(16, 1, 1, 1), num_inference_steps=2
        )
        assert np.array_equal(images[0, ..., 0], np.asarray(plain.images[0]))


def test_a_mask_of_all_returns_the_input_and_of_none_the_plain_sample() -> None:
    known, everywhere = torch.rand(1, 2, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)
    pairs = (("ddim", "epsilon"), ("heun", "v_prediction"), ("dpmsolver++", "sample"), ("euler", FLOW), ("unipc", FLOW))
    for solver, target in pairs:
        pipeline = random_pipeline("db2", 2, solver=solver, target=target)
        options = {"num_inference_steps": 5, "output_type": "pt", "known": known}
        assert_close(pipeline(2, mask=everywhere, **options).images, known.expand(2, -1, -1, -1), atol=1e-4, rtol=0)
        plain = pipeline(2, num_inference_steps=5, output_type="pt").images
        assert torch.equal(pipeline(2, mask=~everywhere, **options).images, plain)
        first = torch.stack([everywhere[0], ~everywhere[0]])  # each image has its own
        assert torch.equal(pipeline(2, mask=first, **options).images[1], plain[1])


@pytest.mark.parametrize("solver", SINGLE_STEP)
def test_what_is_known_is_known_at_other_band_rates(solver: str) -> None:
    low = torch.rand(1, 2, 16, 16)
    for target in ("v_prediction", *[FLOW] * (solver in OF_FLOW)):
        images = drawn(random_pipeline(solver=solver, target=target), low_resolution=low, detail_steps=7)
        assert_close(F.avg_pool2d(images, 2), low.expand(2, -1, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("solver", "target"), [("ddim", "epsilon"), ("euler", FLOW)])
def test_what_is_not_known_follows_from_what_is(solver: str, target: str) -> None:
    """For a Gaussian of five colours of different variances, where a detail band has correlation 0.8 with A."""
    variances = torch.tensor([0.04, 0.01, 0.003, 0.001, 0.0004])
    covariance = torch.diag(variances.repeat(4))  # A of all colours, H, V, D
    covariance[:5, 5:10] = covariance[5:10, :5] = torch.diag(0.8 * variances)
    pipeline = tiny_pipeline()
    pipeline.codec = WaveletCodec(scaling="none")
    pipeline.codec.clip_value.fill_(20.0)
    pipeline.backbone = GaussianDenoiser(0.0, covariance, target)
    pipeline.scheduler = build_solver(solver, target, codec=pipeline.codec)
    coarse = variances.sqrt().view(5, 1, 1) * torch.randn(64, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    low = (coarse / 4 + 0.5).clamp(0, 1)  # of Haar, the coarse band is twice the mean of pixels in [-1, 1]
    options = {"num_inference_steps": 100, "eta": float(solver == "ddim"), "output_type": "pt", "low_resolution": low}
    z = pipeline.codec.encode(pipeline(64, **options).images * 2 - 1)
    a, h = z[:, :5].transpose(0, 1).flatten(1), z[:, 5:10].transpose(0, 1).flatten(1)
    assert_close((a * h).sum(1) / (a * a).sum(1), torch.full((5,), 0.8), atol=0.08, rtol=0)


class Mixture(torch.nn.Module):
    """The exact denoiser of two Gaussians N(+-mean, spread^2): labels 0 and 1 stand for one of them, label 2 for both.

    With `guided` = (weights, label) it is the guided denoiser: from the gradient of log p(z) + w (log p(z | c) -
    log p(z)), where p are the densities of z_t.
    """

    dtype, device, spread = torch.float32, torch.device("cpu"), 0.15

    def __init__(self, target: str, guided: tuple | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, sample_size=8, num_class_embeds=3)
        self.target, self.guided, self.calls = target, guided, 0
        self.a = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()

    def log_density(self, z, signal, sigma, label):
        variance = (signal * self.spread) ** 2 + sigma**2
        logs = [-((z - mean) ** 2) / 2 / variance for mean in (signal * 0.5, -signal * 0.5)]
        return logs[label] if label < 2 else torch.logaddexp(*logs)  # per value: they are independent

    def score(self, z, signal, sigma, labels):
        z = z.double().requires_grad_()
        with torch.enable_grad():
            total = sum(self.log_density(z[i], signal, sigma, int(label)).sum() for i, label in enumerate(labels))
            return torch.autograd.grad(total, z)[0]

    def forward(self, sample, timestep, class_labels=None):
        self.calls += 1
        low, rest = int(timestep), float(timestep) % 1
        table = self.a[[min(low, 999), min(low + 1, 999)]]
        ratio = torch.lerp(*(1 / table - 1).sqrt(), rest)
        signal, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        if self.target == FLOW:
            sigma = min(float(timestep) / 1000, 1 - 1e-7)  # at 1 the formula below divides by 0
            signal = 1 - sigma
        both = [2] * len(sample)
        if self.guided is None:
            score = self.score(sample, signal, sigma, class_labels)
        else:
            free, (weights, label) = self.score(sample, signal, sigma, both), self.guided
            asked = self.score(sample, signal, sigma, [label] * len(sample))
            score = free + torch.tensor(weights).view(-1, 1, 1) * (asked - free)
        noise = -sigma * score
        clean = (sample - sigma * noise) / signal
        answers = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}
        answers |= {FLOW: noise - clean}
        return SimpleNamespace(sample=answers[self.target].float())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("solver", "detail_steps"), [*((name, None) for name in SOLVERS), ("ddim", 4), ("heun", 3)])
def test_guidance_is_that_of_the_guided_score(solver: str, detail_steps: int | None, target: str) -> None:
    if (solver, target) in CANNOT:
        return
    options = {"num_inference_steps": 6, "detail_steps": detail_steps, "output_type": "pt"}
    pipeline = tiny_pipeline()
    pipeline.codec.clip_value.fill_(20.0)
    for details in (None, 1.0):
        images = []
        for guided in (None, ([2.5] + 3 * [2.5 if details is None else details], 1)):
            asked = {} if guided else {"labels": 1, "guidance": 2.5, "guidance_details": details}
            spacing = None if target == FLOW else "leading"
            pipeline.scheduler = build_solver(solver, target, spacing=spacing, codec=pipeline.codec)
            pipeline.backbone = Mixture(target, guided)
            pipeline.backbone.config.num_class_embeds = None if guided else 3
            images.append(pipeline(2, **options, **asked).images)
        assert_close(*images, atol=2e-4, rtol=0)


def test_weight_1_is_the_plain_conditional_sampler_and_calls_the_network_once() -> None:
    pipeline, options = tiny_pipeline(), {"num_inference_steps": 5, "output_type": "pt"}
    pipeline.backbone = Mixture("epsilon")
    plain = pipeline(3, labels=[0, 1, 0], **options).images
    assert pipeline.backbone.calls == 5
    weights, labels = {"guidance": 1.0, "guidance_details": 1.0}, torch.tensor([0, 1, 0])
    assert torch.equal(pipeline(3, labels=labels, **weights, **options).images, plain)
    assert pipeline.backbone.calls == 10
    pipeline(3, labels=0, guidance=2.0, **options)
    assert pipeline.backbone.calls == 20
    pipeline.backbone = Mixture("epsilon", ([1.0] * 4, 0))
    assert_close(pipeline(3, **options).images[::2], plain[::2], atol=1e-4, rtol=0)


def conditional_pipeline(names: list[str] | None = None) -> WaveletPipeline:
    """A pipeline with three classes."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 16)}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8}
    backbone = UNet2DModel(**sizes, **blocks, num_class_embeds=4).eval()
    pipeline = WaveletPipeline(backbone, build_solver("ddim"), WaveletCodec(scaling="dyadic"), names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_labels_may_be_asked_for_by_name() -> None:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    pipeline = conditional_pipeline(["1", "2", "cat"])
    wanted = pipeline(2, labels=[1, 2], **options).images
    for labels in (["2", "cat"], [1, "cat"], ("2", 2)):  # a text is a name, where there is one
        assert torch.equal(pipeline(2, labels=labels, **options).images, wanted)
    assert torch.equal(pipeline(labels="2", **options).images, pipeline(labels=1, **options).images)
    assert torch.equal(pipeline(labels="0", **options).images, pipeline(labels=0, **options).images)
    assert numbered([1, "1", "cat", "0"], ["1", "2", "cat"]) == [1, 0, 2, 0]
    with pytest.raises(ValueError, match="got labels='cta', wanted one of 1, 2, cat: did you mean 'cat'"):
        pipeline(labels="cta", **options)


def test_labels_reach_the_network() -> None:
    pipeline, options = conditional_pipeline(), {"num_inference_steps": 3, "output_type": "pt"}
    images = pipeline(3, labels=[0, 1, 2], seed=0, **options).images
    for label in range(3):
        alone, other = (pipeline(3, labels=one, **options).images[label] for one in (label, (label + 1) % 3))
        assert torch.allclose(images[label], alone, atol=1e-6) and not torch.allclose(images[label], other, atol=1e-6)
    seen: list[torch.Tensor] = []
    keep = lambda module, inputs, named: seen.append(named["class_labels"])  # noqa: E731
    pipeline.backbone.register_forward_pre_hook(keep, with_kwargs=True)
    pipeline(3, **options)
    assert seen and all(labels.tolist() == [3, 3, 3] for labels in seen)  # nothing is asked for
    cycled = list(sample_images(pipeline, 5, labels=[2, 0], num_inference_steps=1))
    assert seen[-1][:5].tolist() == [2, 0, 2, 0, 2] and len(np.concatenate(cycled)) == 5
    list(sample_images(pipeline, 5, num_inference_steps=1))
    assert seen[-1][:5].tolist() == [0, 1, 2, 0, 1]  # every class in turn
    denoising_error(pipeline, np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8), [500])
    assert seen[-1].tolist() == [3, 3]  # of images whose class nobody says


FAULTS = [
    ({"labels": 3}, r"got labels \[3\], wanted 0 to 2"),
    ({"labels": [0, 1, 2]}, "wanted 0 to 2, one or 2 of them"),
    ({"labels": -1}, "got labels='-1'"),
    ({"labels": torch.tensor([True, False])}, "got labels='True'"),
    ({"labels": [0.5, 1.0]}, "got labels"),
    ({"guidance": 2.0}, "got guidance 2, of details 2, wanted labels"),
    ({"labels": 0, "guidance": float("nan")}, "got guidance nan"),
    ({"labels": 0, "guidance_details": -1.0}, "wanted labels and a number from 0 on"),
    ({"known": torch.rand(2, 1, 16, 16)}, "got a part of known and mask"),
    ({"mask": torch.ones(1, 1, 16, 16) > 0}, "got a part of known and mask"),
    ({"known": torch.rand(2, 1, 8, 8), "mask": torch.ones(1, 1, 16, 16) > 0}, r"got images \(2, 1, 8, 8\)"),
    ({"known": torch.rand(2, 1, 16, 16), "mask": torch.ones(1, 1, 16, 16)}, "of torch.float32, wanted bool"),
    ({"known": torch.rand(2, 1, 16, 16), "mask": torch.ones(1, 1, 8, 8) > 0}, r"got a mask \(1, 1, 8, 8\)"),
    ({"low_resolution": torch.rand(2, 1, 4, 4)}, r"got images \(2, 1, 4, 4\)"),
    ({"low_resolution": torch.rand(2, 1, 8, 8) + 1}, "wanted floats in"),
    ({"low_resolution": torch.full((2, 1, 8, 8), float("nan"))}, "wanted floats in"),
    ({"low_resolution": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "wanted floats in"),
]


@pytest.mark.parametrize(("options", "message"), FAULTS)
def test_conditions_that_cannot_be_met_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        conditional_pipeline()(2, num_inference_steps=1, **options)
    assert "\n" not in str(refused.value)


def test_what_is_known_is_known_in_half_precision() -> None:
    low = torch.rand(1, 2, 16, 16)
    pipeline = random_pipeline(solver="dpmsolver++", target="epsilon").to(torch.bfloat16)
    pipeline.backbone.dtype = torch.bfloat16
    images = drawn(pipeline, low_resolution=low).float()
    assert_close(F.avg_pool2d(images, 2), low.expand(2, -1, -1, -1), atol=0.02, rtol=0)


def test_pictures_of_other_channels_show_the_first() -> None:
    assert [image.mode for image in random_pipeline()(2, num_inference_steps=1).images] == ["L", "L"]  # of 2


def test_a_network_without_labels_refuses_them() -> None:
    with pytest.raises(ValueError, match="got labels for a network that was trained without, wanted none"):
        tiny_pipeline()(1, labels=0, num_inference_steps=1)
    with pytest.raises(ValueError, match="got guidance_details at level 0"):
        random_pipeline(level=0)(1, guidance_details=2.0)
