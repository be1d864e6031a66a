"""What the denoiser learns, and the solvers that remove noise with it; z are the coefficients of images x.

    z_t = sqrt(a_t) z + sqrt(1 - a_t) eps        a_t: `alphas_cumprod[t]` of the scheduler (Ho et al. 2020)
    epsilon: eps      sample: z      v_prediction: sqrt(a_t) eps - sqrt(1 - a_t) z   (Salimans & Ho 2022)
    SNR(t) = a_t / (1 - a_t)

The network is shown z_t and t and nothing else. To add a weighting, write a function and enter it in `WEIGHTINGS`; to
add a solver, enter its diffusers class in `SOLVERS`.
"""

import inspect
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor, nn
from torch.nn import functional as F

from wddm.wavelets import WaveletCodec, check_choice

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
NOISE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


class Loss(NamedTuple):
    """`total` is what is minimised, a scalar; the parts are detached: per_channel (4^L C,), reconstruction scalar."""

    total: Tensor
    per_channel: Tensor
    reconstruction: Tensor


def noise_scheduler(prediction_type: str = "v_prediction") -> DDPMScheduler:
    """The forward process: 1000 steps of the squared-cosine schedule (Nichol & Dhariwal 2021)."""
    return DDPMScheduler(**NOISE, prediction_type=check_choice("prediction_type", prediction_type, PREDICTION_TYPES))


def target(scheduler: SchedulerMixin, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer to z_t, shaped as z, by the scheduler's prediction type."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(z, noise, t)
    return noise if scheduler.config.prediction_type == "epsilon" else z


def clean_estimate(scheduler: SchedulerMixin, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The estimate of z (B, 4^L C, h, w) that the network's `output` for `noisy` implies, at each sample's own t."""
    prediction_type, a = scheduler.config.prediction_type, alphas_cumprod(scheduler, t)
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (noisy - (1 - a).sqrt() * output) / a.sqrt()
    return a.sqrt() * noisy - (1 - a).sqrt() * output


def alphas_cumprod(scheduler: SchedulerMixin, t: Tensor) -> Tensor:
    """a_t of each sample, (B, 1, 1, 1)."""
    return scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)


def no_weights(snr: Tensor, prediction_type: str) -> Tensor:
    """1 for every sample (Ho et al. 2020, section 3.4)."""
    return torch.ones_like(snr)


def min_snr(snr: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the error of z, in the units of the prediction type (Hang et al. 2023, arXiv 2303.09556)."""
    error_of_z = {"epsilon": 1 / snr, "sample": torch.ones_like(snr), "v_prediction": 1 / (snr + 1)}
    return snr.clamp_max(gamma) * error_of_z[prediction_type]


WEIGHTINGS: dict[str, Callable[[Tensor, str], Tensor]] = {"none": no_weights, "min_snr": min_snr}


def loss_weights(scheduler: SchedulerMixin, t: Tensor, weighting: str) -> Tensor:
    """Weight of each sample's squared error, (B, 1, 1, 1), by the function of that name in `WEIGHTINGS`."""
    a, weigh = alphas_cumprod(scheduler, t), WEIGHTINGS[check_choice("weighting", weighting, WEIGHTINGS)]
    return weigh(a / (1 - a), scheduler.config.prediction_type)


def diffusion_loss(
    model: nn.Module, codec: WaveletCodec, scheduler: SchedulerMixin, images: Tensor, noise: Tensor, t: Tensor, *,
    weighting: str = "min_snr", reconstruction: float = 0.0,
) -> Loss:  # fmt: skip
    """Loss of a batch of images (B, C, H, W) in [-1, 1], with noise shaped as their coefficients and t (B,).

    `reconstruction` weights a second term: the smooth L1 distance between the decoded clean estimate and the image,
    times a_t, because at large t the division by sqrt(a_t) makes any error of the noise large.
    """
    if not reconstruction >= 0:
        raise ValueError(f"got reconstruction={reconstruction}, wanted 0 or more: it weights a second term of the loss")
    z = codec.encode(images)
    output = model(noisy := scheduler.add_noise(z, noise, t), t).sample
    squared_error = (output - target(scheduler, z, noise, t)).square()
    total = (loss_weights(scheduler, t, weighting) * squared_error).mean()
    distance = total.new_zeros(())
    if reconstruction:
        decoded = codec.decode(clean_estimate(scheduler, noisy, output, t))
        distance = (alphas_cumprod(scheduler, t) * F.smooth_l1_loss(decoded, images, reduction="none")).mean()
        total = total + reconstruction * distance
    return Loss(total, squared_error.detach().mean((0, 2, 3)), distance.detach())


SOLVERS = {  # name: class of diffusers
    "ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler", "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
    "deis": "DEISMultistepScheduler", "lms": "LMSDiscreteScheduler",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # of one solver each
    "ddpm": {"variance_type": "fixed_small"},
    "pndm": {"skip_prk_steps": True},  # the Runge-Kutta start diverges where the schedule leaves no signal
}
NOT_OF_SAMPLE = ("pndm", "euler_a")  # diffusers' classes do not know prediction_type="sample"
SINGLE_STEP = ("ddpm", "ddim", "euler", "euler_a", "heun")  # they keep nothing from the steps before the last


def build_solver(
    name: str, prediction_type: str = "v_prediction", *, spacing: str | None = None, codec: WaveletCodec | None = None
) -> SchedulerMixin:
    """A solver by name, on our noise schedule; ValueError for an option that it does not have.

    Args:
        spacing: how the steps are spread over the 1000: "leading", "trailing" (from pure noise) or "linspace".
        codec: of the coefficients. ddpm, ddim and heun clip the clean estimate at its `clip_value`; without one, at 1.
    """
    name = check_choice("solver", name, SOLVERS)
    prediction_type = check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "sample" and name in NOT_OF_SAMPLE:
        raise ValueError(f"got prediction_type='sample' for {name}, which does not know it: choose another solver")
    solver = getattr(diffusers, SOLVERS[name])
    known = inspect.signature(solver.__init__).parameters
    options = {**NOISE, "prediction_type": prediction_type, **SETTINGS.get(name, {})}
    if "timestep_spacing" in known:
        options["timestep_spacing"] = spacing or "trailing"
        check_choice("spacing", options["timestep_spacing"], ("leading", "trailing", "linspace"))
    elif spacing:
        raise ValueError(f"got spacing={spacing!r} for {name}, which spaces its steps itself: leave spacing out")
    if "clip_sample" in known:
        options |= {"clip_sample": True, "clip_sample_range": codec.clip_value.item() if codec else 1.0}
    return solver(**options)


def check_options(name: str, *, eta: float = 0.0, detail_steps: int | None = None) -> None:
    """Raise a ValueError if the solver called `name` does not have one of these options of sampling."""
    if eta and name.lower() != "ddim":
        raise ValueError(f"got eta={eta} for {name}, wanted 0: only ddim knows eta, take it or leave eta out")
    if not 0 <= eta <= 1:
        raise ValueError(f"got eta={eta}, wanted 0 (deterministic) to 1 (as random as ddpm): change eta")
    if detail_steps and name.lower() not in SINGLE_STEP:
        raise ValueError(f"got detail_steps for {name}, wanted one of {', '.join(SINGLE_STEP)}: choose one of them")


def exact_step(solver: SchedulerMixin) -> Callable[..., Any]:
    """`solver.step`, for the timesteps that are set, without three faults that diffusers' own has.

    DDIM and PNDM step to t - 1000 // num_inference_steps, which is another timestep where the number of steps does not
    divide 1000: at 300 steps, spaced trailing, a Gaussian's standard deviation came out 18 % too large. So for each
    step `num_inference_steps` is set to 1000 divided by the gap to the next timestep.
    DDIM with eta 1 and euler_a take the root of a difference as small as a_t, which is 2e-9 at t = 999: in float32 it
    comes out below zero. So it is taken in float64.
    Heun's correction multiplies the change of the clean estimate by half of the ratio of the two noise levels: by 1,000
    and more in a first step from pure noise. Where the ratio is over 30, Euler's step is taken.
    """
    kind = type(solver).__name__
    if kind == "EulerAncestralDiscreteScheduler" and solver.sigmas[0] > 1000 * solver.sigmas[1]:
        solver.sigmas = solver.sigmas.double()
    if kind == "HeunDiscreteScheduler":
        return _heun_step(solver)
    if kind not in ("DDIMScheduler", "PNDMScheduler"):
        return solver.step
    gaps: list[int] = []
    for t, after in pairwise([*solver.timesteps.tolist(), -1]):
        gaps.append(t - after or gaps[-1])  # PNDM visits its second timestep twice, to do the first step again
    remaining, count, table = iter(gaps), solver.num_inference_steps, solver.alphas_cumprod

    def step(*args: Any, **options: Any) -> Any:
        solver.num_inference_steps = Fraction(solver.config.num_train_timesteps, next(remaining))
        solver.alphas_cumprod = table.double() if options.get("eta") else table
        try:
            return solver.step(*args, **options)
        finally:
            solver.num_inference_steps, solver.alphas_cumprod = count, table

    return step


def _heun_step(solver: SchedulerMixin) -> Callable[..., Any]:
    predicted: Tensor | None = None

    def step(*args: Any, **options: Any) -> Any:
        nonlocal predicted
        i, corrects = solver.step_index, not solver.state_in_first_order
        done = solver.step(*args, **options)
        if corrects and solver.sigmas[i - 1] > 30 * solver.sigmas[i]:
            done.prev_sample = predicted
        predicted = done.prev_sample
        return done

    return step
