"""What is asked of an image, as a wrapper round the network that no solver knows of.

Labels, by classifier-free guidance (Ho & Salimans 2022): of the answers u without and c with the label, u + w (c - u).
What is known, by null-space projection (DDNM, Wang et al. 2022, arXiv 2212.00490): the answer becomes its estimate of
the clean image x, that is made to agree with y = A x, and becomes an answer of the same target again,

    x + A^+ (y - A x)    A picks the pixels of a mask, or is the mean over cells, whose A^+ repeats each pixel

Images are floats in [0, 1] outside and in [-1, 1] here; whatever the codec, it is pixels that agree.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from wddm.bandrate import alpha_cumprod
from wddm.wavelets import WaveletCodec

Answer = Callable[[Tensor, Tensor], Tensor]  # the network's answer to z_t (B, 4^L C, h, w) at t
Missing = Callable[[Tensor], Tensor]  # what coefficients lack to agree with what is known
Labels = int | Sequence[int] | Tensor


def labelled(backbone: ModelMixin, count: int, labels: Labels | None, weights: Sequence[float]) -> Answer:
    """The network's answers for the labels of `count` images, guided by the weight of each channel; all 1: one call.

    None is the network's own "no label", its last. ValueError: labels that it does not have, weights below 0.
    """
    last = (getattr(backbone.config, "num_class_embeds", None) or 0) - 1
    guided = any(weight != 1 for weight in weights)
    if not all(0 <= weight < float("inf") for weight in weights) or (guided and labels is None):
        raise ValueError(f"got guidance {max(weights)}, wanted labels and a number from 0 on: leave guidance out")
    if last < 0 and labels is not None:
        raise ValueError("got labels for a network that was trained without, wanted none: leave labels out")
    if last < 0:
        return lambda z, t: backbone(z, t).sample
    given = torch.as_tensor(last if labels is None else labels)
    outside = labels is not None and ((given < 0) | (given >= last)).any()
    if outside or given.is_floating_point() or given.shape not in ((), (1,), (count,)):
        raise ValueError(f"got labels {given.tolist()}, wanted 0 to {last - 1}, one or {count} of them: change them")
    asked, weight = given.long().expand(count).to(backbone.device), torch.tensor(weights).view(-1, 1, 1)

    def answer(z: Tensor, t: Tensor) -> Tensor:
        with_label = backbone(z, t, class_labels=asked).sample
        if not guided:
            return with_label
        without = backbone(z, t, class_labels=torch.full_like(asked, last)).sample
        return without + weight.to(without) * (with_label - without)

    return answer


def correction(
    codec: WaveletCodec, shape: Sequence[int], low_resolution: Tensor | None, known: Tensor | None, mask: Tensor | None
) -> Missing | None:
    """What to add to coefficients (B, 4^L C, h, w) for images of `shape` (B, C, H, W) that agree with what is known.

    Known are images of sides H / 2^k, k <= L, of which the result has the means, or the pixels where a mask (B or 1, 1,
    H, W) is True; None if nothing is. ValueError: other shapes or values, or both.
    """
    if low_resolution is None and known is None and mask is None:
        return None
    if (known is None) != (mask is None) or (low_resolution is not None and known is not None):
        raise ValueError("got a part of known and mask, or low_resolution too, wanted one of them: give that alone")
    count, channels, height, width = shape
    images = torch.as_tensor(known if low_resolution is None else low_resolution)
    cells = [1] if low_resolution is None else [2**k for k in range(codec.config.level + 1)]
    sizes = [(n, channels, height // cell, width // cell) for cell in cells for n in (1, count)]
    if images.shape not in sizes or not images.is_floating_point() or not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"got images {tuple(images.shape)}, wanted floats in [0, 1] of {sizes[-1]}: change them")
    allowed = [(n, 1, height, width) for n in (1, count)]
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in allowed):
        raise ValueError(f"got a mask {tuple(mask.shape)} of {mask.dtype}, wanted bool (1, 1, {height}, {width})")
    cell, wanted = height // images.shape[-2], images.to(codec.device, codec.dtype) * 2 - 1
    zero = codec.encode(wanted.new_zeros(1, channels, height, width))

    def missing(z: Tensor) -> Tensor:
        error = wanted - F.avg_pool2d(codec.decode(z.to(codec.dtype)), cell)
        if mask is not None:
            error = error.where(mask.to(error.device), 0)
        error = error.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
        return (codec.encode(error) - zero).to(z.dtype)

    return missing


def held(answer: Answer, scheduler: SchedulerMixin, missing: Missing, clip: Tensor) -> Answer:
    """Answers whose clean estimates p z_t + q answer agree; they are clipped before, as some solvers clip after."""

    def agreeing(z: Tensor, t: Tensor) -> Tensor:
        a, output = alpha_cumprod(scheduler, float(t)), answer(z, t)
        signal, noise = a**0.5, (1 - a) ** 0.5
        weights = {"epsilon": (1 / signal, -noise / signal), "sample": (0.0, 1.0), "v_prediction": (signal, -noise)}
        p, q = weights[scheduler.config.prediction_type]
        estimate = p * z + q * output
        clipped = estimate.clamp(-clip, clip)
        change = missing(clipped)
        held_to = (change != 0).flatten(1).any(1).view(-1, 1, 1, 1)  # of an image with an empty mask nothing is known
        return output + (clipped - estimate + change).where(held_to, 0) / q

    return agreeing
