"""Band-rate sampling: the coarse band and the details each go from noise to image in their own number of steps.

The network needs all bands at one noise level t. It is called at every t at which either group of bands steps, and a
group that is between two of its own steps is shown as its last step predicts it there,

    z_t = signal(t) z + noise(t) eps      z, eps: the clean coefficients and the noise of the group's last step

(multirate integration with dense output, Gear & Wells 1984); the network's answer for such a group is not used.
Tensors have all channels, (B, C, h, w), even where only those of one group are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Generator, Tensor

from wddm.objective import exact_step, factors, noised

Visit = tuple[float, int]  # (-t, how often the network was called at t before): heun does so twice


class Group:
    """Some `channels` of the coefficients, with a single-step solver of their own whose timesteps are set.

    Groups that step together draw the same noise from equal `generators`, and each uses its channels of it.
    """

    def __init__(self, solver: SchedulerMixin, channels: slice, generators: Generator | list[Generator]) -> None:
        self.solver, self.channels, self.generators = solver, channels, generators
        self.step, times = exact_step(solver), solver.timesteps.tolist()
        self.times: dict[Visit, Tensor] = {(-t, times[:i].count(t)): solver.timesteps[i] for i, t in enumerate(times)}
        self.denoised: Tensor | None = None  # the estimate of the clean coefficients, from the last step

    def seen_at(self, visit: Visit, t: Tensor, z: Tensor) -> Tensor:
        """The network's input at t, (B, C, h, w), of which only this group's channels are used."""
        if visit in self.times:
            self._seen, self._t = self.solver.scale_model_input(z, t), t
            return self._seen
        if self.denoised is None:
            return z / self.solver.init_noise_sigma
        of_z, of_noise = factors(self.solver, self._t)
        return noised(self.solver, self.denoised, (self._seen - of_z * self.denoised) / of_noise, t).to(z.dtype)

    def step_at(self, visit: Visit, output: Tensor, t: Tensor, z: Tensor, options: dict[str, Any]) -> Tensor:
        """z after the solver's step at t; z itself if t is none of this group's timesteps."""
        if visit not in self.times:
            return z
        done = self.step(output, t, z, **options | ({"generator": self.generators} if "generator" in options else {}))
        self.denoised = done.pred_original_sample
        return done.prev_sample


class BandRates:
    """Groups of bands with the interface of one diffusers scheduler, whose place they take in the sampling loop."""

    def __init__(self, *groups: Group) -> None:
        self.groups = groups
        times = {visit: t for group in groups for visit, t in group.times.items()}
        self.timesteps, self._visits = [times[visit] for visit in sorted(times)], iter(sorted(times))
        sigmas = torch.tensor([float(group.solver.init_noise_sigma) for group in groups])
        widths = torch.tensor([group.channels.stop - group.channels.start for group in groups])
        self.init_noise_sigma = sigmas.repeat_interleave(widths).view(-1, 1, 1).to(self.timesteps[0].device)

    def scale_model_input(self, z: Tensor, t: Tensor) -> Tensor:
        """The network's input at t, joined from all groups."""
        self._visit = next(self._visits)
        return self._joined([group.seen_at(self._visit, t, z) for group in self.groups])

    def step(self, output: Tensor, t: Tensor, z: Tensor, **options: Any) -> DDIMSchedulerOutput:
        """Advance the groups that have a step at t, with the network's output."""
        latents = self._joined([group.step_at(self._visit, output, t, z, options) for group in self.groups])
        estimates = [group.denoised for group in self.groups if group.denoised is not None]
        return DDIMSchedulerOutput(latents, self._joined(estimates) if len(estimates) == len(self.groups) else None)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor of all channels, those of each group from its own part."""
        return torch.cat([part[:, group.channels] for group, part in zip(self.groups, parts, strict=True)], dim=1)
