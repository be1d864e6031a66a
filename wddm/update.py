"""One optimiser step: noise and timesteps drawn, loss, gradients clipped, weights and their average moved on.

All randomness is a function of (seed, step): what is drawn does not depend on what came before, nor on how many
processes share the batch.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from wddm.devices import seed_device
from wddm.objective import Loss, diffusion_loss

if TYPE_CHECKING:
    from wddm.training import Trainer


def optimise(trainer: "Trainer", images: Tensor) -> tuple[Loss, Tensor, Tensor]:
    """One optimiser step on this process's share of the batch; loss and gradient norms, left on the device."""
    noise, t = draw(trainer, images)
    rank = trainer.accelerator.process_index
    seed_device(trainer.accelerator.device, derived_seed(trainer.seed, trainer.step, 1 + rank))  # dropout
    losses = []
    for part in zip(*(x.chunk(trainer.accumulation) for x in (images, noise, t)), strict=True):
        with trainer.accelerator.accumulate(trainer.network):
            loss = diffusion_loss(
                trainer.network, trainer.codec, trainer.noise, *part,
                weighting=trainer.weighting, reconstruction=trainer.reconstruction,
            )  # fmt: skip
            trainer.accelerator.backward(loss.total)
            if trainer.accelerator.sync_gradients:
                norm, norms = clip(trainer)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
        losses.append(loss)
    trainer.lr.step()
    average(trainer.ema, trainer.weights)
    return Loss(*(torch.stack(values).mean(0).detach() for values in zip(*losses, strict=True))), norm, norms


def draw(trainer: "Trainer", images: Tensor) -> tuple[Tensor, Tensor]:
    """Noise (b, 4^L C, h, w) and timesteps (b,) of this process's share, cut from those of the whole batch."""
    device = trainer.accelerator.device
    generator = torch.Generator(device).manual_seed(derived_seed(trainer.seed, trainer.step))
    noise = torch.randn(trainer.batch_size, *trainer.codec.shape(*images.shape[1:]), generator=generator, device=device)
    t = torch.randint(len(trainer.noise.alphas_cumprod), (trainer.batch_size,), generator=generator, device=device)
    first = trainer.accelerator.process_index * len(images)
    return noise[first : first + len(images)], t[first : first + len(images)]


def clip(trainer: "Trainer") -> tuple[Tensor, Tensor]:
    """Scale the gradients down to norm 1; their norm before, all together and of every parameter (P,)."""
    trainer.accelerator.unscale_gradients()
    gradients = [p.grad for p in trainer.parameters.values()]
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(trainer.parameters.values(), 1.0, norm)
    if trainer.accelerator.scaler is not None:  # fp16: a step whose gradients overflow is left out, not wrong
        norm, norms = norm.nan_to_num(0, 0, 0), norms.nan_to_num(0, 0, 0)
    return norm, norms


@torch.no_grad()
def average(ema: EMAModel, weights: list[Tensor]) -> None:
    """`ema.step(weights)`, up to rounding, in one pass over the weights: small networks feel the three of that."""
    ema.optimization_step += 1
    torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.get_decay(ema.optimization_step))


def derived_seed(*key: int) -> int:
    """An independent seed for every key, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
