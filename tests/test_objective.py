"""Oracles: closed forms of the forward process; a model that knows the noise; finite gradients everywhere."""

import inspect
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.testing import assert_close

from wddm import objective
from wddm.objective import (
    FLOW,
    SOLVERS,
    TARGETS,
    WEIGHTINGS,
    build_solver,
    clean_estimate,
    diffusion_loss,
    exact_step,
    factors,
    loss_weights,
    noise_scheduler,
    noised,
    set_steps,
    target,
)
from wddm.steps import draw_noise
from wddm.wavelets import WaveletCodec


class Answering(nn.Module):
    """Answers what it is told to and remembers what it was shown."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, sample, timestep):
        self.calls.append((sample, timestep))
        return SimpleNamespace(sample=self.answer(sample, timestep))


def batch(count: int = 8):
    images, codec = torch.rand(count, 3, 16, 16) * 2 - 1, WaveletCodec(scaling="dyadic")
    t = torch.linspace(0, 999, count).long()
    return images, codec, torch.randn(count, 12, 8, 8), t


def true_answer(scheduler, codec, images, noise):
    return lambda noisy, t: target(scheduler, codec.encode(images), noise, t)


@pytest.mark.parametrize("kind", TARGETS)
def test_knowing_the_answer_costs_exactly_nothing(kind: str) -> None:
    images, codec, noise, t = batch()
    scheduler = noise_scheduler(kind)
    knowing = Answering(true_answer(scheduler, codec, images, noise))
    loss = diffusion_loss(knowing, codec, scheduler, images, noise, t, weighting="none")
    assert loss.total.item() == 0
    assert torch.equal(loss.per_channel, torch.zeros(12))


def test_the_network_is_shown_the_noisy_coefficients_and_t_and_nothing_else() -> None:
    images, codec, noise, t = batch()
    scheduler = noise_scheduler("epsilon")
    model = Answering(lambda noisy, t: torch.zeros_like(noisy))
    diffusion_loss(model, codec, scheduler, images, noise, t)
    ((sample, timestep),) = model.calls
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert_close(sample, a.sqrt() * codec.encode(images) + (1 - a).sqrt() * noise)
    assert torch.equal(timestep, t)


def test_loss_of_silence_is_the_power_of_the_target() -> None:
    images, codec, noise, t = batch()
    silent = Answering(lambda z, t: torch.zeros_like(z))
    loss = diffusion_loss(silent, codec, noise_scheduler("epsilon"), images, noise, t, weighting="none")
    assert_close(loss.total, noise.square().mean())
    assert_close(loss.per_channel, noise.square().mean((0, 2, 3)))


@pytest.mark.parametrize("kind", TARGETS)
def test_the_true_answer_implies_the_clean_coefficients(kind: str) -> None:
    _, _, noise, _ = batch(5)
    z, t, scheduler = torch.randn(5, 12, 8, 8), torch.tensor([0, 10, 300, 600, 900]), noise_scheduler(kind)
    noisy = noised(scheduler, z, noise, t)
    assert_close(clean_estimate(scheduler, noisy, target(scheduler, z, noise, t), t), z, atol=1e-4, rtol=1e-4)


def test_velocity_is_the_derivative_along_the_arc() -> None:
    z, noise, t = torch.randn(1, 1, 2, 2).double(), torch.randn(1, 1, 2, 2).double(), torch.tensor([400])
    scheduler = noise_scheduler("v_prediction")
    angle = torch.acos(scheduler.alphas_cumprod[400].double().sqrt())
    ahead, behind = (torch.cos(angle + d) * z + torch.sin(angle + d) * noise for d in (1e-4, -1e-4))
    assert_close(target(scheduler, z, noise, t), (ahead - behind) / 2e-4, atol=1e-5, rtol=1e-5)


def test_the_flow_is_the_derivative_along_the_line_from_the_image_to_pure_noise() -> None:
    z, noise, t = torch.randn(2, 1, 2, 2).double(), torch.randn(2, 1, 2, 2).double(), torch.tensor([1.0, 700.5])
    scheduler = noise_scheduler("flow_prediction")
    ahead, behind = (noised(scheduler, z, noise, t.double() + d) for d in (0.5, -0.5))
    assert_close(target(scheduler, z, noise, t), 1000 * (ahead - behind))
    assert_close(noised(scheduler, z, noise, torch.tensor([1000.0])), noise)
    assert_close(noised(scheduler, z, noise, torch.tensor([0.0])), z)


def test_signal_and_noise_between_two_timesteps_are_those_of_diffusers_solvers() -> None:
    solver = build_solver("heun", spacing="linspace")
    solver.set_timesteps(7)
    assert (solver.timesteps % 1).any()
    signal, noise = factors(solver, solver.timesteps)
    assert_close((noise / signal).flatten(), solver.sigmas[:-1], rtol=1e-4, atol=0)
    assert_close((signal**2 + noise**2).flatten(), torch.ones(13))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("name", "law"), [("uniform", stats.uniform), ("logit_normal", None)])
def test_times_are_drawn_by_their_law(name: str, law, kind: str) -> None:
    scheduler, generator = noise_scheduler(kind), torch.Generator().manual_seed(0)
    noise, t = draw_noise(scheduler.timesteps.flip(0), name, (1, 2, 2), [generator], 20_000)
    first = 1 if kind == "flow_prediction" else 0
    assert noise.shape == (20_000, 1, 2, 2) and first <= t.min() and t.max() <= first + 999
    share = (t.double().numpy() - first + np.random.default_rng(0).random(20_000)) / 1000  # uniform within a timestep
    found = stats.kstest(share, law.cdf) if law else stats.kstest(special.logit(share), stats.norm.cdf)
    assert found.pvalue > 0.01
    if law and kind != FLOW:  # so that a seed means what it did before times could be drawn otherwise
        generator.manual_seed(0), torch.randn(noise.shape, generator=generator)
        assert torch.equal(t, torch.randint(1000, t.shape, generator=generator))


def test_min_snr_weights_are_the_papers() -> None:
    t = torch.tensor([5, 400, 500, 950])
    a = noise_scheduler().alphas_cumprod[t]
    snr = a / (1 - a)
    wanted = {
        "epsilon": torch.minimum(snr, torch.tensor(5.0)) / snr,
        "sample": torch.minimum(snr, torch.tensor(5.0)),
        "v_prediction": torch.minimum(snr, torch.tensor(5.0)) / (snr + 1),
    }
    for kind, weights in wanted.items():
        assert_close(loss_weights(noise_scheduler(kind), t, "min_snr").flatten(), weights)
        assert_close(loss_weights(noise_scheduler(kind), t, "none").flatten(), torch.ones(4))


def test_a_weight_multiplies_its_own_sample() -> None:
    images, codec, noise, t = batch()
    scheduler = noise_scheduler("sample")
    silent = Answering(lambda z, t: torch.zeros_like(z))
    loss = diffusion_loss(silent, codec, scheduler, images, noise, t, weighting="min_snr")
    power = codec.encode(images).square().mean((1, 2, 3))
    assert_close(loss.total, (loss_weights(scheduler, t, "min_snr").flatten() * power).mean())


@pytest.mark.parametrize("kind", TARGETS)
def test_reconstruction_uses_each_samples_own_t(kind: str) -> None:
    """The term vanishes for the true answer at every t, and its gradient for a wrong one does not."""
    images, codec, noise, t = batch()
    scheduler, t = noise_scheduler(kind), t + (kind == FLOW)  # whose first timestep is 1
    knowing = Answering(true_answer(scheduler, codec, images, noise))
    options = {"weighting": "none", "reconstruction": 1.0}
    assert diffusion_loss(knowing, codec, scheduler, images, noise, t, **options).total < 1e-4
    wrong = torch.zeros(8, 12, 8, 8, requires_grad=True)
    loss = diffusion_loss(Answering(lambda z, t: wrong), codec, scheduler, images, noise, t, **options)
    (loss.total - loss.total.detach()).backward()
    with_term = wrong.grad.clone()
    wrong.grad = None
    diffusion_loss(Answering(lambda z, t: wrong), codec, scheduler, images, noise, t, weighting="none").total.backward()
    change = (with_term - wrong.grad).abs().amax((1, 2, 3))
    assert (change[:-1] > 0).all()  # at the last t nearly no signal is left, and so no weight


def test_reconstruction_does_not_drown_in_large_t() -> None:
    images, codec, noise, _ = batch()
    scheduler = noise_scheduler("epsilon")
    slightly_off = Answering(lambda z, t: noise + 0.1)
    terms = []
    for t in (200, 999):
        given = slightly_off, codec, scheduler, images, noise, torch.full((8,), t)
        terms.append(diffusion_loss(*given, reconstruction=1.0).total - diffusion_loss(*given).total)
    assert terms[1] < 2 * terms[0].clamp_min(0.05)


@pytest.mark.parametrize("name", ["prediction_type", "weighting"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name}='eps', wanted one of"):
        noise_scheduler("eps") if name == "prediction_type" else loss_weights(
            noise_scheduler(), torch.tensor([1]), "eps"
        )


def test_a_weighting_is_a_function_and_its_entry(monkeypatch) -> None:
    monkeypatch.setitem(WEIGHTINGS, "late", lambda snr, prediction_type: 1 / (1 + snr))
    scheduler, t = noise_scheduler(), torch.tensor([5, 400])
    a = scheduler.alphas_cumprod[t]
    assert_close(loss_weights(scheduler, t, "late").flatten(), 1 - a)
    images, codec, noise, t = batch()
    silent = Answering(lambda z, t: torch.zeros_like(z))
    assert diffusion_loss(silent, codec, scheduler, images, noise, t, weighting="late").total > 0


def test_defaults_are_those_of_the_recipe() -> None:
    images, codec, noise, t = batch()
    silent, scheduler = Answering(lambda z, t: torch.zeros_like(z)), noise_scheduler()
    assert scheduler.config.prediction_type == build_solver("ddim").config.prediction_type == "sample"
    wanted = diffusion_loss(silent, codec, scheduler, images, noise, t, weighting="min_snr")
    assert torch.equal(diffusion_loss(silent, codec, scheduler, images, noise, t).total, wanted.total)


OF_FLOW = [name for name, (_, of_flow) in SOLVERS.items() if of_flow]


@pytest.mark.parametrize("name", OF_FLOW)
def test_steps_of_a_flow_are_equal_from_pure_noise_to_none(name: str) -> None:
    solver = build_solver(name, FLOW, spacing="trailing")
    assert solver.config.prediction_type == FLOW
    for steps in (1, 2, 7, 30, 999, 1000):
        set_steps(solver, steps)
        visited = solver.sigmas.unique().flip(0)
        assert len(solver.timesteps) == (2 * steps - 1 if name == "heun" else steps)
        assert_close(visited, torch.linspace(1, 0, steps + 1), atol=1.1e-3, rtol=0)
        assert_close(solver.timesteps, 1000 * solver.sigmas[:-1])
        assert solver.init_noise_sigma == 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_told_all_that_it_was_built_with(name: str) -> None:
    codec = WaveletCodec()
    codec.clip_value.fill_(7.5)
    config = build_solver(name, "epsilon", spacing="linspace", codec=codec).config
    assert (config.prediction_type, config.timestep_spacing) == ("epsilon", "linspace")
    assert (config.num_train_timesteps, config.beta_schedule) == (1000, "squaredcos_cap_v2")
    assert config.get("clip_sample_range") == (7.5 if name in ("ddpm", "ddim", "heun") else None)
    assert build_solver(name).config.timestep_spacing == "trailing"
    assert config.get("clip_sample", True) and build_solver(name).config.get("clip_sample_range", 1.0) == 1.0


def drawn(name: str, spacing: str, steps: int, eta: float) -> torch.Tensor:
    """What a solver makes of noise with the exact denoiser of a Gaussian of standard deviation 0.3."""
    solver, generator = build_solver(name, "v_prediction", spacing=spacing), torch.Generator().manual_seed(1)
    set_steps(solver, steps)
    z, step = torch.randn(1, 1, 32, 32, generator=generator) * solver.init_noise_sigma, exact_step(solver)
    known, table = inspect.signature(solver.step).parameters, solver.alphas_cumprod.numpy()
    options = {key: value for key, value in (("eta", eta), ("generator", generator)) if key in known}
    for t in solver.timesteps:
        a, seen = float(np.interp(float(t), np.arange(1000), table)), solver.scale_model_input(z, t)
        clean = a**0.5 * 0.09 / (a * 0.09 + 1 - a) * seen
        z = step((a**0.5 * seen - clean) / (1 - a) ** 0.5, t, z, **options).prev_sample
    return z


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_in_few_steps_is_finite_and_far_from_saturated(name: str, spacing: str) -> None:
    for eta, steps in itertools.product((0.0, 0.5, 1.0) if name == "ddim" else (0.0,), range(1, 13)):
        z = drawn(name, spacing, steps, eta)
        assert z.dtype == torch.float32 and z.isfinite().all(), (steps, eta)
        assert steps < 3 or z.std() < 0.5, (steps, eta)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SOLVERS)
def test_steps_are_as_many_as_were_asked_for_and_lead_as_far(name: str, spacing: str) -> None:
    solver = build_solver(name, "v_prediction", spacing=spacing)
    for steps in (*range(1, 130), 201, 497, 835, 998, 999):
        set_steps(solver, steps)
        times = solver.timesteps.unique()
        assert len(times) == solver.num_inference_steps == steps and times.min() >= 0 and times.max() <= 999, steps
    assert_close(drawn(name, spacing, 61, 0.0).std(), drawn(name, spacing, 62, 0.0).std(), atol=0.003, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_multistep_solver_has_no_two_steps_at_one_timestep(spacing: str) -> None:
    for name in SOLVERS:
        solver = build_solver(name, spacing=spacing)
        if name in ("dpmsolver++", "unipc", "deis") and spacing != "trailing":
            with pytest.raises(ValueError, match=f"got 1000 steps of .* spaced {spacing}, wanted no two on one"):
                set_steps(solver, 1000)
        else:
            set_steps(solver, 1000)
            assert len(solver.timesteps.unique()) == 1000


def test_names_are_taken_in_any_case() -> None:
    assert type(build_solver("DDIM", "Epsilon")) is type(build_solver("ddim"))
    assert build_solver("Euler_A", "V_Prediction").config.prediction_type == "v_prediction"
    assert noise_scheduler("EPSILON").config.prediction_type == "epsilon"
    objective.check_options("DDIM", eta=0.5, detail_steps=3)


def test_a_solver_is_an_entry_and_refuses_what_it_does_not_have(monkeypatch) -> None:
    monkeypatch.setitem(SOLVERS, "single", ("DPMSolverSinglestepScheduler", ""))  # its steps are always spaced alike
    assert type(build_solver("single")).__name__ == "DPMSolverSinglestepScheduler"
    with pytest.raises(ValueError, match="got spacing='leading' for single"):
        build_solver("single", spacing="leading")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_solver("dimm"), "got solver='dimm', wanted one of ddpm, ddim"),
        (lambda: build_solver("ddim", spacing="even"), "got spacing='even', wanted one of leading"),
        (lambda: build_solver("ddim", "eps"), "got prediction_type='eps', wanted one of epsilon"),
        (lambda: build_solver("ddim", FLOW), "got ddim for flow_prediction, wanted one of dpmsolver.., unipc, heun"),
        (lambda: build_solver("heun", FLOW, spacing="leading"), "got spacing='leading' for flow_prediction"),
        (lambda: objective.check_training(FLOW, "min_snr", "uniform"), "got weighting='min_snr' for flow_prediction"),
        (lambda: objective.check_training(FLOW, "none", "even"), "got time_sampling='even', wanted one of uniform"),
        (lambda: objective.check_options("pndm", eta=0.5), "got eta=0.5 for pndm, wanted 0"),
        (lambda: objective.check_options("ddim", eta=1.5), "got eta=1.5, wanted 0"),
        (lambda: objective.check_options("unipc", detail_steps=5), "got detail_steps for unipc, wanted one of ddpm"),
    ],
)
def test_what_a_solver_cannot_honour_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
