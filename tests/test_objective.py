"""Oracles: closed forms of the forward process; a model that knows the noise; finite gradients everywhere."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wddm.objective import (
    PREDICTION_TYPES,
    clean_estimate,
    diffusion_loss,
    loss_weights,
    noise_scheduler,
    target,
)
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
    images, codec = torch.rand(count, 3, 16, 16) * 2 - 1, WaveletCodec()
    t = torch.linspace(0, 999, count).long()
    return images, codec, torch.randn(count, 12, 8, 8), t


def true_answer(scheduler, codec, images, noise):
    return lambda noisy, t: target(scheduler, codec.encode(images), noise, t)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_knowing_the_answer_costs_exactly_nothing(kind: str) -> None:
    images, codec, noise, t = batch()
    scheduler = noise_scheduler(kind)
    loss = diffusion_loss(Answering(true_answer(scheduler, codec, images, noise)), codec, scheduler, images, noise, t)
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
    loss = diffusion_loss(
        Answering(lambda z, t: torch.zeros_like(z)), codec, noise_scheduler("epsilon"), images, noise, t
    )
    assert_close(loss.total, noise.square().mean())
    assert_close(loss.per_channel, noise.square().mean((0, 2, 3)))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_true_answer_implies_the_clean_coefficients(kind: str) -> None:
    _, _, noise, _ = batch(5)
    z, t, scheduler = torch.randn(5, 12, 8, 8), torch.tensor([0, 10, 300, 600, 900]), noise_scheduler(kind)
    noisy = scheduler.add_noise(z, noise, t)
    assert_close(clean_estimate(scheduler, noisy, target(scheduler, z, noise, t), t), z, atol=1e-4, rtol=1e-4)


def test_velocity_is_the_derivative_along_the_arc() -> None:
    z, noise, t = torch.randn(1, 1, 2, 2).double(), torch.randn(1, 1, 2, 2).double(), torch.tensor([400])
    scheduler = noise_scheduler("v_prediction")
    angle = torch.acos(scheduler.alphas_cumprod[400].double().sqrt())
    ahead, behind = (torch.cos(angle + d) * z + torch.sin(angle + d) * noise for d in (1e-4, -1e-4))
    assert_close(target(scheduler, z, noise, t), (ahead - behind) / 2e-4, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_reconstruction_uses_each_samples_own_t(kind: str) -> None:
    """The term vanishes for the true answer at every t, and its gradient for a wrong one does not."""
    images, codec, noise, t = batch()
    scheduler = noise_scheduler(kind)
    knowing = Answering(true_answer(scheduler, codec, images, noise))
    loss = diffusion_loss(knowing, codec, scheduler, images, noise, t, reconstruction=1.0)
    assert loss.reconstruction < 1e-4
    wrong = torch.zeros(8, 12, 8, 8, requires_grad=True)
    loss = diffusion_loss(Answering(lambda z, t: wrong), codec, scheduler, images, noise, t, reconstruction=1.0)
    (loss.total - loss.total.detach()).backward()
    with_term = wrong.grad.clone()
    wrong.grad = None
    diffusion_loss(Answering(lambda z, t: wrong), codec, scheduler, images, noise, t).total.backward()
    change = (with_term - wrong.grad).abs().amax((1, 2, 3))
    assert (change[:-1] > 0).all()  # at the last t nearly no signal is left, and so no weight


def test_reconstruction_does_not_drown_in_large_t() -> None:
    images, codec, noise, _ = batch()
    scheduler = noise_scheduler("epsilon")
    slightly_off = Answering(lambda z, t: noise + 0.1)
    terms = [
        diffusion_loss(slightly_off, codec, scheduler, images, noise, torch.full((8,), t), reconstruction=1.0)
        for t in (200, 999)
    ]
    assert terms[1].reconstruction < 2 * terms[0].reconstruction.clamp_min(0.05)


@pytest.mark.parametrize("name", ["prediction_type", "weighting"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name}='eps', wanted one of"):
        noise_scheduler("eps") if name == "prediction_type" else loss_weights(
            noise_scheduler(), torch.tensor([1]), "eps"
        )
