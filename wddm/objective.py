"""What the denoiser learns, and the solvers that remove noise with it; z are the coefficients of images x.

    z_t = signal(t) z + noise(t) eps    SNR(t) = (signal / noise)^2    The network is shown z_t and t and nothing else.
    epsilon: eps      sample: z      v_prediction: signal eps - noise z   (Salimans & Ho 2022)
        signal = sqrt(a_t), noise = sqrt(1 - a_t), t < 1000     a_t: the scheduler's `alphas_cumprod` (Ho et al. 2020)
    flow_prediction: eps - z   (rectified flow: Liu et al. 2022, Lipman et al. 2022)
        signal = 1 - t / 1000, noise = t / 1000, 0 < t <= 1000

To add a weighting, write a function and enter it in `WEIGHTINGS`; to add a solver, enter its classes in `SOLVERS`.
"""

import inspect
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from wddm.wavelets import WaveletCodec, check_choice

FLOW = "flow_prediction"
TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {  # (u, w) of the target u z + w eps
    "epsilon": lambda signal, noise: (0, 1), "sample": lambda signal, noise: (1, 0),
    "v_prediction": lambda signal, noise: (-noise, signal), FLOW: lambda signal, noise: (-1, 1),
}  # fmt: skip
NOISE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
TIMESTEPS: int = NOISE["num_train_timesteps"]
TIME_SAMPLINGS: dict[str, Callable[[int, Generator], Tensor]] = {  # -> indices of timesteps, 0: the least noise
    "uniform": lambda count, g: torch.randint(TIMESTEPS, (count,), generator=g, device=g.device),
    "logit_normal": lambda count, g: (  # mostly medium noise (Esser et al. 2024, arXiv 2403.03206)
        (TIMESTEPS * torch.randn(count, generator=g, device=g.device).sigmoid()).long().clamp_max(TIMESTEPS - 1)
    ),
}


class Loss(NamedTuple):
    """`total` is the scalar to minimise; `per_channel` (4^L C,) is the unweighted squared error, detached."""

    total: Tensor
    per_channel: Tensor


def noise_scheduler(prediction_type: str = "sample") -> SchedulerMixin:
    """The forward process: 1000 steps of the squared-cosine schedule (Nichol & Dhariwal 2021), or of a flow."""
    kind = check_choice("prediction_type", prediction_type, TARGETS)
    return build_solver("euler", FLOW) if kind == FLOW else DDPMScheduler(**NOISE, prediction_type=kind)


def factors(scheduler: SchedulerMixin, t: Tensor) -> tuple[Tensor, Tensor]:
    """signal(t) and noise(t), (B, 1, 1, 1); between whole t, noise / signal is interpolated linearly, as in solvers."""
    t = t.view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == FLOW:
        return 1 - t / TIMESTEPS, t / TIMESTEPS
    scheduler.alphas_cumprod = a = scheduler.alphas_cumprod.to(t.device)  # moved once, as in diffusers' `add_noise`
    row, sigma = t.long(), ((1 - a) / a).sqrt()
    sigma = torch.lerp(sigma[row], sigma[(row + 1).clamp_max(TIMESTEPS - 1)], (t - row).to(sigma.dtype))
    signal = (1 + sigma**2).rsqrt()
    return signal, sigma * signal


def noised(scheduler: SchedulerMixin, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = signal(t) z + noise(t) eps, shaped as z; t (B,) holds the timestep of each sample."""
    of_z, of_noise = factors(scheduler, t)
    return of_z * z + of_noise * noise


def target(scheduler: SchedulerMixin, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should predict from z_t, shaped as z, for the scheduler's prediction type."""
    of_z, of_noise = TARGETS[scheduler.config.prediction_type](*factors(scheduler, t))
    return of_z * z + of_noise * noise


def estimate_factors(scheduler: SchedulerMixin, t: Tensor) -> tuple[Tensor, Tensor]:
    """p and q, (B, 1, 1, 1): an answer y of the network to z_t implies the estimate p z_t + q y of z."""
    signal, noise = factors(scheduler, t)
    of_z, of_noise = TARGETS[scheduler.config.prediction_type](signal, noise)
    both = signal * of_noise - noise * of_z
    return of_noise / both, -noise / both


def clean_estimate(scheduler: SchedulerMixin, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The estimate of z (B, 4^L C, h, w) that the network's `output` for `noisy` implies, at each sample's own t."""
    p, q = estimate_factors(scheduler, t)
    return p * noisy + q * output


def min_snr(snr: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Weight min(SNR, gamma) of z's squared error, converted to the target's (Hang et al. 2023, arXiv 2303.09556)."""
    if prediction_type == FLOW:
        raise ValueError(f"got weighting='min_snr' for {FLOW}, wanted none: set weighting to none, or recipe to flow")
    error_of_z = {"epsilon": 1 / snr, "sample": torch.ones_like(snr), "v_prediction": 1 / (snr + 1)}
    return snr.clamp_max(gamma) * error_of_z[prediction_type]


WEIGHTINGS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "none": lambda snr, prediction_type: torch.ones_like(snr),  # Ho et al. 2020, section 3.4
    "min_snr": min_snr,
}


def loss_weights(scheduler: SchedulerMixin, t: Tensor, weighting: str) -> Tensor:
    """Weight of each sample's squared error, (B, 1, 1, 1), by the function that `WEIGHTINGS` has under this name."""
    weigh, (signal, noise) = WEIGHTINGS[check_choice("weighting", weighting, WEIGHTINGS)], factors(scheduler, t)
    return weigh((signal / noise) ** 2, scheduler.config.prediction_type)


def check_training(prediction_type: str, weighting: str, time_sampling: str) -> None:
    """Raise a ValueError if one of these options is unknown, or the weighting does not go with the prediction type."""
    check_choice("time_sampling", time_sampling, TIME_SAMPLINGS)
    loss_weights(noise_scheduler(prediction_type), torch.ones(1), weighting)


def diffusion_loss(
    model: nn.Module, codec: WaveletCodec, scheduler: SchedulerMixin, images: Tensor, noise: Tensor, t: Tensor, *,
    weighting: str = "min_snr", reconstruction: float = 0.0,
) -> Loss:  # fmt: skip
    """Loss of a batch of images (B, C, H, W) in [-1, 1], with noise shaped as their coefficients and t (B,).

    `reconstruction` weights a second term: the smooth L1 distance between the decoded clean estimate and the image,
    times signal(t)^2, because at large t the division by signal(t) makes any error of the noise large.
    """
    z = codec.encode(images)
    output = model(noisy := noised(scheduler, z, noise, t), t).sample
    squared_error = (output - target(scheduler, z, noise, t)).square()
    total = (loss_weights(scheduler, t, weighting) * squared_error).mean()
    if reconstruction:
        decoded = codec.decode(clean_estimate(scheduler, noisy, output, t))
        distance = F.smooth_l1_loss(decoded, images, reduction="none")
        total = total + reconstruction * (factors(scheduler, t)[0] ** 2 * distance).mean()
    return Loss(total, squared_error.detach().mean((0, 2, 3)))


SOLVERS = {  # name: class of diffusers, and its class for flow_prediction if there is one
    "ddpm": ("DDPMScheduler", ""), "ddim": ("DDIMScheduler", ""), "pndm": ("PNDMScheduler", ""),
    "dpmsolver++": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "heun": ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "euler": ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", ""),
    "deis": ("DEISMultistepScheduler", "DEISMultistepScheduler"), "lms": ("LMSDiscreteScheduler", ""),
}  # fmt: skip
SINGLE_STEP = ("ddpm", "ddim", "euler", "euler_a", "heun")  # solvers that use nothing from earlier steps


def default_solver(prediction_type: str) -> str:
    """Name of the solver for networks of this prediction type, where the user names none."""
    return "euler" if prediction_type.lower() == FLOW else "ddim"


def default_eta(solver: str) -> float:
    """Default eta in notebook 03: 1 (as random as ddpm) for ddim, 0 for the other solvers, which have no eta."""
    return float(solver.lower() == "ddim")


def build_solver(
    name: str, prediction_type: str = "sample", *, spacing: str | None = None, codec: WaveletCodec | None = None
) -> SchedulerMixin:
    """A solver by name, on our noise schedule; ValueError for an option that it does not have.

    `spacing` of the steps: "leading", "linspace" or "trailing" (default; starts at pure noise; the only one of a flow).
    ddpm, ddim and heun clip the clean estimate at the `clip_value` of the `codec`; without one, at 1.
    """
    name = check_choice("solver", name, SOLVERS)
    kind = check_choice("prediction_type", prediction_type, TARGETS)
    if not (class_name := SOLVERS[name][kind == FLOW]):
        able = ", ".join(name for name, (_, of_flow) in SOLVERS.items() if of_flow)
        raise ValueError(f"got {name} for {kind}, wanted one of {able}: choose one, or leave it out")
    solver, spacing = getattr(diffusers, class_name), spacing or "trailing"
    known = inspect.signature(solver.__init__).parameters
    if kind != FLOW and "timestep_spacing" in known:
        check_choice("spacing", spacing, ("leading", "trailing", "linspace"))
    elif spacing != "trailing":
        subject = kind if kind == FLOW else name
        raise ValueError(f"got spacing={spacing!r} for {subject}, which spaces its steps itself: leave spacing out")
    options = {"num_train_timesteps": TIMESTEPS, "prediction_type": kind, "use_flow_sigmas": kind == FLOW}
    if kind != FLOW:
        clip = codec.clip_value.item() if codec else 1.0
        options |= NOISE | {"timestep_spacing": spacing, "clip_sample": True, "clip_sample_range": clip}
        options["skip_prk_steps"] = True  # pndm's Runge-Kutta start diverges where the schedule leaves no signal
    return of_target(solver(**{key: value for key, value in options.items() if key in known}))


def of_target(solver: SchedulerMixin) -> SchedulerMixin:
    """The solver, with the prediction type in its config; ValueError if it is not made for one of `TARGETS`."""
    if (kind := type(solver).__name__).startswith("FlowMatch"):  # these do not store it
        solver.register_to_config(prediction_type=FLOW)
    config = getattr(solver, "config", {})
    predicts, of_noise = config.get("prediction_type"), not config.get("use_flow_sigmas", True)
    if predicts not in TARGETS or (predicts == FLOW and of_noise) or "num_train_timesteps" not in config:
        raise ValueError(f"got {kind} for {predicts}, wanted one for {', '.join(TARGETS)}: take one of build_solver's")
    return solver


def trained_by(solver: SchedulerMixin) -> dict[str, Any]:
    """What a solver must share with the training of its network: target, noise schedule and number of timesteps."""
    config = solver.config
    schedule = None if config.prediction_type == FLOW else config.get("beta_schedule")
    return {"prediction_type": config.prediction_type, "beta_schedule": schedule, "steps": config.num_train_timesteps}


def set_steps(solver: SchedulerMixin, count: int, device: torch.device | str | None = None) -> None:
    """Call `solver.set_timesteps`, without the step at t = -1 that rounding adds to trailing ones (61, for example).

    A flow gets equal steps, at t that need not be whole: in diffusers multistep solvers cut t to whole numbers, and the
    last step is 0.001 long for euler and heun, 0 for deis. ValueError: a multistep solver with two steps at one t.
    """
    if (kind := type(solver).__name__).startswith("FlowMatch"):  # these lack two attributes that all others have
        solver.init_noise_sigma, solver.scale_model_input, solver.sigma_min = 1.0, lambda z, t: z, 1 / count
    solver.set_timesteps(count, device=device)
    if solver.timesteps[-1] < 0:  # as 1000 / (1000 / 61) is more than 61
        solver.set_timesteps(count * (1 - 1e-12), device=device)
        solver.num_inference_steps = count
    if solver.config.prediction_type == FLOW:
        solver.timesteps = (solver.sigmas[:-1] * TIMESTEPS).to(device)
        if kind.startswith("DEIS"):
            solver.sigmas[-1] = 1e-6  # at 0 its formula divides by 0
    elif "Multistep" in kind and len(solver.timesteps.unique()) < count:
        got = f"got {count} steps of {kind} spaced {solver.config.timestep_spacing}"
        raise ValueError(f"{got}, wanted no two on one timestep: take fewer, or trailing spacing")


def check_options(name: str, *, eta: float | None = None, detail_steps: int | None = None) -> None:
    """Raise a ValueError if the solver called `name` cannot take one of these sampling options."""
    if eta and name.lower() != "ddim":
        raise ValueError(f"got eta={eta} for {name}, wanted 0: only ddim knows eta, take it or leave eta out")
    if not 0 <= (eta or 0) <= 1:
        raise ValueError(f"got eta={eta}, wanted 0 (deterministic) to 1 (as random as ddpm): change eta")
    if detail_steps and name.lower() not in SINGLE_STEP:
        raise ValueError(f"got detail_steps for {name}, wanted one of {', '.join(SINGLE_STEP)}: choose one of them")


def exact_step(solver: SchedulerMixin) -> Callable[..., Any]:
    """`solver.step` for the timesteps that are set, without three faults of diffusers' own, and with what it lacks:
    `pred_original_sample` in the solvers of flows; PNDM and euler_a for networks that predict "sample".

    DDIM and PNDM step to t - 1000 // num_inference_steps, which is not the next timestep if the number of steps does
    not divide 1000: at 300 steps, spaced trailing, a Gaussian's standard deviation came out 18 % too large. So for each
    step `num_inference_steps` is set to 1000 divided by the gap to the next timestep.
    DDIM with eta 1 and euler_a take the root of a difference as small as a_t, which is 2e-9 at t = 999: in float32 the
    difference comes out below zero. So it is computed in float64.
    Heun's correction multiplies the change of the clean estimate by half the ratio of the two noise levels: by 1,000
    and more in a first step from pure noise. Where the ratio is over 30, Euler's step is taken.
    """
    kind, plain = type(solver).__name__, solver.step
    if kind == "EulerAncestralDiscreteScheduler" and solver.sigmas[0] > 1000 * solver.sigmas[1]:
        solver.sigmas = solver.sigmas.double()
    if kind == "HeunDiscreteScheduler":
        return partial(_heun_step, solver)
    if kind.startswith("FlowMatch"):
        return partial(_flow_step, solver)
    if kind in ("PNDMScheduler", "EulerAncestralDiscreteScheduler") and solver.config.prediction_type == "sample":
        plain = partial(_velocity_step, solver)
    if kind not in ("DDIMScheduler", "PNDMScheduler"):
        return plain
    gaps: list[int] = []
    for t, after in pairwise([*solver.timesteps.tolist(), -1]):
        gaps.append(t - after or gaps[-1])  # PNDM visits its second timestep twice, to do the first step again
    remaining, count, table = iter(gaps), solver.num_inference_steps, solver.alphas_cumprod

    def step(*args: Any, **options: Any) -> Any:
        solver.num_inference_steps = Fraction(solver.config.num_train_timesteps, next(remaining))
        solver.alphas_cumprod = table.double() if options.get("eta") else table
        try:
            return plain(*args, **options)
        finally:
            solver.num_inference_steps, solver.alphas_cumprod = count, table

    return step


def _velocity_step(solver: SchedulerMixin, output: Tensor, t: Tensor, z: Tensor, **options: Any) -> Any:
    """`solver.step`, given the velocity (v_prediction) that the network's estimate of z implies."""
    signal, noise = factors(solver, t)
    velocity = (signal * solver.scale_model_input(z, t) - output) / noise
    solver.register_to_config(prediction_type="v_prediction")
    try:
        return solver.step(velocity.to(output.dtype), t, z, **options)
    finally:
        solver.register_to_config(prediction_type="sample")


def _flow_step(solver: SchedulerMixin, output: Tensor, t: Tensor, z: Tensor, **options: Any) -> Any:
    done = solver.step(output, t, z, **options)
    done.pred_original_sample = clean_estimate(solver, z, output, t)
    return done


def _heun_step(solver: SchedulerMixin, output: Tensor, t: Tensor, z: Tensor, **options: Any) -> Any:
    i, corrects = solver.step_index, not solver.state_in_first_order
    done = solver.step(output, t, z, **options)
    if corrects and solver.sigmas[i - 1] > 30 * solver.sigmas[i]:
        done.prev_sample = z  # the result of Euler's step
    return done
