"""solvers: one table from a name to the diffusers class, and what each of them knows.

All take `spacing` and run on our noise schedule. `eta` is ddim's alone, `detail_steps` (bandrate.py) for the
single-step ones; `check_options` says so. `exact_step` is how the pipeline steps with any of them.
"""

import inspect
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from wddm.objective import NOISE, PREDICTION_TYPES

SOLVERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "deis": "DEISMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
}
NOT_OF_SAMPLE = ("pndm", "euler_a")  # diffusers' classes do not know prediction_type="sample"
SINGLE_STEP = ("ddpm", "ddim", "euler", "euler_a", "heun")  # they keep nothing from the steps before the last
ASSUME_EQUAL_GAPS = ("DDIMScheduler", "PNDMScheduler")  # see `exact_step`


def default_spacing(name: str) -> str:
    """ "trailing", which starts at pure noise; but "leading" for heun.

    From pure noise (sigma near 20,000 on our schedule) its correction takes a derivative from far below over all of the
    first step: the network's error grows a hundredfold, and no image comes of it.
    """
    return "leading" if name == "heun" else "trailing"


def build_solver(
    name: str, prediction_type: str = "epsilon", *, spacing: str | None = "leading", clip: float = 1.0
) -> SchedulerMixin:
    """A solver by name, on our noise schedule.

    Args:
        name: a key of `SOLVERS`.
        prediction_type: what the network predicts.
        spacing: how the steps are spread over the 1000: "leading", "trailing", "linspace", or None: `default_spacing`.
        clip: solvers that clip the clean estimate do so at this absolute value (the codec's `limit`).
    """
    spacing = spacing or default_spacing(name)
    for what, got, wanted in (
        ("solver", name, tuple(SOLVERS)),
        ("prediction_type", prediction_type, PREDICTION_TYPES),
        ("spacing", spacing, ("leading", "trailing", "linspace")),
    ):
        if got not in wanted:
            raise ValueError(f"got {what}={got!r}, wanted one of {', '.join(wanted)}: choose one of them")
    if prediction_type == "sample" and name in NOT_OF_SAMPLE:
        raise ValueError(f"got prediction_type='sample' for {name}, which does not know it: choose another solver")
    solver = getattr(diffusers, SOLVERS[name])
    options = {
        **NOISE,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "clip_sample": True,
        "clip_sample_range": clip,
        "variance_type": "fixed_small",
        "skip_prk_steps": True,  # PNDM's Runge-Kutta start diverges where the schedule leaves no signal
    }
    known = inspect.signature(solver.__init__).parameters
    return solver(**{key: value for key, value in options.items() if key in known})


def check_options(name: str, *, eta: float = 0.0, detail_steps: int | None = None) -> None:
    """Raise a ValueError that says which option a solver cannot honour, if there is one."""
    if eta and name != "ddim":
        raise ValueError(f"got eta={eta} for {name}, wanted 0: only ddim knows eta, take it or leave eta out")
    if not 0 <= eta <= 1:
        raise ValueError(f"got eta={eta}, wanted 0 (deterministic) to 1 (as random as ddpm): change eta")
    if detail_steps and name not in SINGLE_STEP:
        raise ValueError(f"got detail_steps for {name}, wanted one of {', '.join(SINGLE_STEP)}: choose one of them")


def exact_step(solver: SchedulerMixin) -> Callable[..., Any]:
    """`solver.step`, made to end exactly at the next of the timesteps that are set.

    DDIM and PNDM take t - 1000 // num_inference_steps for the next timestep, which is another one where the steps do
    not divide 1000: at 300 steps, spaced trailing, the spread of a Gaussian came out 18 % too wide. So before each step
    they are told the number of steps that the gap to the next timestep stands for.
    """
    if type(solver).__name__ not in ASSUME_EQUAL_GAPS:
        return solver.step
    count, gaps = solver.num_inference_steps, []
    for t, after in pairwise([*solver.timesteps.tolist(), -1]):
        gaps.append(t - after or gaps[-1])  # PNDM visits its second timestep twice, to do the first step again
    remaining = iter(gaps)

    def step(*args: Any, **options: Any) -> Any:
        solver.num_inference_steps = Fraction(solver.config.num_train_timesteps, next(remaining))
        try:
            return solver.step(*args, **options)
        finally:
            solver.num_inference_steps = count

    return step
