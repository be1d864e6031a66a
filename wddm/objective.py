"""What the denoiser learns: targets, loss weights and the reconstruction term, on coefficients z of images x.

    z_t = sqrt(a_t) z + sqrt(1 - a_t) eps        a_t: `alphas_cumprod[t]` of the scheduler (Ho et al. 2020)
    epsilon: eps      sample: z      v_prediction: sqrt(a_t) eps - sqrt(1 - a_t) z   (Salimans & Ho 2022)
    SNR(t) = a_t / (1 - a_t)

The network is shown z_t and t and nothing else.
"""

from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from wddm.wavelets import WaveletCodec

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
WEIGHTINGS = ("none", "min_snr")
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


class Loss(NamedTuple):
    """`total` is what is minimised, a scalar; the parts are detached: per_channel (4^L C,), reconstruction scalar."""

    total: Tensor
    per_channel: Tensor
    reconstruction: Tensor


def noise_scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    """The forward process: 1000 steps of the squared-cosine schedule (Nichol & Dhariwal 2021)."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"got prediction_type={prediction_type!r}, wanted one of {', '.join(PREDICTION_TYPES)}: choose one of them"
        )
    return DDPMScheduler(**NOISE, prediction_type=prediction_type)


def target(scheduler: SchedulerMixin, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer to z_t, shaped as z, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    return z if kind == "sample" else scheduler.get_velocity(z, noise, t)


def clean_estimate(scheduler: SchedulerMixin, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The estimate of z that `output` implies, at each sample's own t."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    a = signal_power(scheduler, t)  # (B, 1, 1, 1)
    if kind == "epsilon":
        return (noisy - (1 - a).sqrt() * output) / a.sqrt()
    return a.sqrt() * noisy - (1 - a).sqrt() * output


def signal_power(scheduler: SchedulerMixin, t: Tensor) -> Tensor:
    """a_t for each sample, (B, 1, 1, 1)."""
    return scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)


def loss_weights(scheduler: SchedulerMixin, t: Tensor, weighting: str, gamma: float = 5.0) -> Tensor:
    """Weight of each sample's squared error, (B, 1, 1, 1).

    "none" is 1. "min_snr" (Hang et al. 2023, arXiv 2303.09556) is min(SNR, gamma) on the error of z, expressed in
    the units of the prediction type.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"got weighting={weighting!r}, wanted one of {', '.join(WEIGHTINGS)}: choose one of them")
    a = signal_power(scheduler, t)
    if weighting == "none":
        return torch.ones_like(a)
    snr = a / (1 - a)
    error_of_z = {"epsilon": 1 / snr, "sample": torch.ones_like(snr), "v_prediction": 1 / (snr + 1)}
    return snr.clamp_max(gamma) * error_of_z[scheduler.config.prediction_type]


def diffusion_loss(
    model: ModelMixin,
    codec: WaveletCodec,
    scheduler: SchedulerMixin,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    weighting: str = "none",
    reconstruction: float = 0.0,
) -> Loss:
    """Loss of a batch of images (B, C, H, W) in [-1, 1], with noise shaped as their coefficients and t (B,).

    The reconstruction term is the smooth L1 distance between the decoded clean estimate and the image, times a_t, so
    that the estimates at large t, where 1/sqrt(a_t) blows up any error of the noise, do not drown the others.
    """
    z = codec.encode(images)
    noisy = scheduler.add_noise(z, noise, t)
    output = model(noisy, t).sample
    squared_error = (output - target(scheduler, z, noise, t)).square()
    total = (loss_weights(scheduler, t, weighting) * squared_error).mean()
    distance = total.new_zeros(())
    if reconstruction:
        decoded = codec.decode(clean_estimate(scheduler, noisy, output, t))
        distance = (signal_power(scheduler, t) * F.smooth_l1_loss(decoded, images, reduction="none")).mean()
        total = total + reconstruction * distance
    return Loss(total, squared_error.detach().mean((0, 2, 3)), distance.detach())
