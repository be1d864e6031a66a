"""Band-rate sampling: groups of bands that go from noise to image in steps of their own number.

The network needs all bands at one noise level t. So it is called at every t at which any group steps, and a group that
is between two of its own steps is shown as its last estimate has it there,

    z_t = sqrt(a_t) z + sqrt(1 - a_t) eps        z, eps: what the group's own last step took for clean and for noise

(multirate integration with dense output, Gear & Wells 1984); the network's answer for such a group is not used. Groups
with equal timesteps are one solver, and one group is the plain sampler.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import pairwise

import torch
from diffusers import SchedulerMixin
from torch import Tensor

Visit = tuple[float, int]  # (-t, how often the network was called at t before): some solvers call it twice

# These take t - 1000 // steps for the next timestep, which is another where steps does not divide 1000: at 300 steps,
# spaced trailing, the spread of a Gaussian came out 18 % too wide. So they are told each gap as steps it stands for.
EVEN_GAPS = ("DDIMScheduler", "PNDMScheduler")


class Group:
    """Some channels of the coefficients, with the solver that takes them from noise to image.

    Args:
        solver: a diffusers scheduler of this group alone, its timesteps set.
        channels: of the coefficients (B, C, h, w), the ones that are this group's.
        noise: unit noise (B, C, h, w) that all groups start from.
        options: for the solver's `step`. A generator in them is the group's own, so that groups that step together
            draw the same noise, of which each uses its channels.
    """

    def __init__(self, solver: SchedulerMixin, channels: slice, noise: Tensor, options: dict) -> None:
        self.solver, self.channels, self.options, self.noise = solver, channels, options, noise
        self.latents = noise * solver.init_noise_sigma  # (B, C, h, w), of which `channels` are meant
        self.denoised: Tensor | None = None  # the estimate of the clean coefficients, from the last step
        self.times = dict(zip(visits(solver.timesteps), solver.timesteps, strict=True))
        self._gaps = dict(zip(self.times, gaps(solver.timesteps.tolist()), strict=True))

    def seen_at(self, visit: Visit, t: Tensor) -> Tensor:
        """What the network is shown of this group at t, (B, C, h, w)."""
        if visit in self.times:
            self._seen, self._t = self.solver.scale_model_input(self.latents, t), t
            return self._seen
        if self.denoised is None:
            return self.noise
        a, b = self._signal_power(self._t), self._signal_power(t)
        noise = (self._seen - a**0.5 * self.denoised) / (1 - a) ** 0.5
        return b**0.5 * self.denoised + (1 - b) ** 0.5 * noise

    def step_at(self, visit: Visit, t: Tensor, prediction: Tensor) -> None:
        """Advance by the network's answer (B, C, h, w), if t is one of this group's."""
        if visit not in self.times:
            return
        steps = self.solver.num_inference_steps
        if type(self.solver).__name__ in EVEN_GAPS:
            self.solver.num_inference_steps = Fraction(len(self.solver.alphas_cumprod), self._gaps[visit])
        out = self.solver.step(prediction, t, self.latents, **self.options)
        self.solver.num_inference_steps = steps
        self.latents, self.denoised = out.prev_sample, getattr(out, "pred_original_sample", None)

    def _signal_power(self, t: Tensor) -> float:
        """a_t; between two steps of the schedule sigma = sqrt(1 / a - 1) is linear, as solvers have it."""
        a = self.solver.alphas_cumprod
        low = int(t)
        sigma = (1 / a[low : low + 2].double() - 1).sqrt()
        return 1 / (1 + torch.lerp(sigma[0], sigma[-1], float(t) - low).item() ** 2)


def visits(timesteps: Tensor) -> Iterator[Visit]:
    """In order of sampling; sorted, the visits of several groups are in order too."""
    count: Counter[float] = Counter()
    for t in timesteps.tolist():
        yield -t, count[t]
        count[t] += 1


def gaps(timesteps: list[float]) -> Iterator[int]:
    """How far each call of the network is from the next noise level; the first of two at one t is a step done again."""
    last = 0
    for t, after in pairwise([*timesteps, -1]):
        last = last if t == after else int(t - after)
        yield last


def joined(groups: list[Group], parts: Iterable[Tensor]) -> Tensor:
    """Of each part (B, C, h, w) the channels of its group."""
    return torch.cat([part[:, group.channels] for group, part in zip(groups, parts, strict=True)], dim=1)
