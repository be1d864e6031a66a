"""What is asked of an image, as a wrapper round the network that no solver knows of.

Labels, by classifier-free guidance (Ho & Salimans 2022): of the answers u without and c with the label, u + w (c - u).
What is known, by null-space projection (DDNM, Wang et al. 2022, arXiv 2212.00490): the answer becomes its estimate of
the clean image x, that is made to agree with y = A x, and becomes an answer of the same target again,

    x + A^+ (y - A x)    A picks the pixels of a mask, or is the mean over cells, whose A^+ repeats each pixel

It is pixels that agree, whatever the codec. Before that, what is not known follows from what is, as in guidance by
pseudo-inverse (Song et al. 2023): x moves by J u, the derivative along the u with A J u = y - A x, as near as seven
turns of damped conjugate gradients come, a call of the network each. Fewer leave details that do not fit: grain.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from wddm.objective import estimate_factors
from wddm.wavelets import WaveletCodec, check_choice

Answer = Callable[[Tensor, Tensor], Tensor]  # the network's answer to z_t (B, 4^L C, h, w) at t
Missing = Callable[[Tensor], Tensor]  # what coefficients lack to agree with what is known
Labels = int | str | Sequence[int | str] | Tensor
PUSH = 0.1  # step of the derivative, in parts of what is missing
TURNS = 7  # of conjugate gradients, a call of the network each
DAMPING = 0.005  # of them, in parts of the derivative along the first: what it hardly moves stays


def numbered(labels: Labels, names: Sequence[str] | None) -> list[int]:
    """Class numbers of labels: texts are `names` of classes or else numbers; ValueError for what is neither."""
    known = {name: number for number, name in enumerate(names or [])}
    given = np.array(labels.tolist() if isinstance(labels, Tensor) else labels, object).ravel().tolist()
    for label in map(str, given):
        if not label.isdecimal():
            check_choice("labels", label[:100], known or ["0, 1, 2, ... (the classes have no names)"])
    return [known[label] if isinstance(label, str) and label in known else int(label) for label in given]


def labelled(backbone: ModelMixin, count: int, labels: list[int] | None, weights: Sequence[float]) -> Answer:
    """The network's answers for one label or those of `count` images, by default its last, "no label", guided by the
    weight w of each channel. ValueError: labels that it does not have, weights below 0.
    """
    last, guided = (getattr(backbone.config, "num_class_embeds", None) or 0) - 1, any(w != 1 for w in weights)
    if not all(0 <= w < float("inf") for w in weights) or (guided and labels is None):
        got = f"got guidance {weights[0]:g}, of details {weights[-1]:g}"
        raise ValueError(f"{got}, wanted labels and a number from 0 on: leave guidance out")
    if last < 0 and labels is not None:
        raise ValueError("got labels for a network that was trained without, wanted none: leave labels out")
    if labels is not None and (len(labels) not in (1, count) or max(labels) >= last):
        raise ValueError(f"got labels {labels}, wanted 0 to {last - 1}, one or {count} of them: change them")

    def call(z: Tensor, t: Tensor, **labels: Tensor) -> Tensor:
        return backbone(z.to(backbone.dtype), t, **labels).sample.to(z.dtype)

    if last < 0:
        return call
    given, w = torch.tensor(labels or [last]), torch.tensor(weights).view(-1, 1, 1)

    def answer(z: Tensor, t: Tensor) -> Tensor:
        asked = given.expand(count).to(z.device)
        c = call(z, t, class_labels=asked)
        if not guided:
            return c
        u = call(z, t, class_labels=torch.full_like(asked, last))
        return u + w.to(u) * (c - u)

    return answer


def correction(
    codec: WaveletCodec, shape: Sequence[int], low_resolution: Tensor | None, known: Tensor | None, mask: Tensor | None
) -> Missing | None:
    """What coefficients lack for images of `shape` (B, C, H, W) to agree with what is known, or None if nothing is.

    Known are the means over cells of 2^k x 2^k pixels, k <= L, or the pixels where a mask (B or 1, 1, H, W) is True.
    ValueError: other shapes or values, or both.
    """
    if low_resolution is None and known is None and mask is None:
        return None
    if (known is None) != (mask is None) or (low_resolution is None) == (known is None):
        raise ValueError("got a part of known and mask, or low_resolution too, wanted one of them: give that alone")
    (count, channels, height, width), level = shape, codec.config.level if known is None else 0
    images = torch.as_tensor(low_resolution if known is None else known)
    sizes = [(n, channels, height // 2**k, width // 2**k) for k in range(level + 1) for n in (1, count)]
    if images.shape not in sizes or not images.is_floating_point() or not ((images >= 0) & (images <= 1)).all():
        got = f"got images {tuple(images.shape)} of {images.dtype}"
        raise ValueError(f"{got}, wanted floats in [0, 1] of {sizes[-1]}: change them")
    where = torch.ones(1, 1, height, width, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    if where.dtype != torch.bool or where.shape not in [(n, 1, height, width) for n in (1, count)]:
        raise ValueError(f"got a mask {tuple(where.shape)} of {where.dtype}, wanted bool (1, 1, {height}, {width})")
    cell, wanted, where = height // images.shape[-2], images.to(codec.clip_value) * 2 - 1, where.to(codec.device)
    zero = codec.encode(wanted.new_zeros(1, channels, height, width))

    def missing(z: Tensor) -> Tensor:
        error = wanted - F.avg_pool2d(codec.decode(z.to(codec.dtype)), cell)
        error = error.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
        return (codec.encode(error.where(where, 0)) - zero).to(z.dtype)

    return missing


def held(answer: Answer, scheduler: SchedulerMixin, missing: Missing, clip: Tensor) -> Answer:
    """Answers, by eight calls each, whose clean estimates p z_t + q answer agree; clipped, as solvers clip later."""

    def agreeing(z: Tensor, t: Tensor) -> Tensor:
        (p, q), output = estimate_factors(scheduler, t), answer(z, t)
        estimate = p * z + q * output
        v = way = missing(estimate.clamp(-clip, clip))
        moved, u, damping = estimate, torch.zeros_like(v), None
        for _ in range(TURNS):
            pushed = z + PUSH * way
            along = (p * pushed + q * answer(pushed, t) - estimate) / PUSH  # J way, as J is symmetric
            size, square = ((x * x).sum((1, 2, 3), keepdim=True) for x in (v, way))
            slope = (way * along).sum((1, 2, 3), keepdim=True)
            damping = DAMPING * (slope / square).nan_to_num(0, 0, 0).clamp_min(0) if damping is None else damping
            best = (size / (slope + damping * square)).nan_to_num(0, 0, 0).clamp_min(0)
            moved, u = moved + best * along, u + best * way
            v = missing(moved.clamp(-clip, clip)) - damping * u
            way = v + ((v * v).sum((1, 2, 3), keepdim=True) / size).nan_to_num(0, 0, 0) * way
        clipped = moved.clamp(-clip, clip)
        change = missing(clipped)
        any_known = (change != 0).flatten(1).any(1).view(-1, 1, 1, 1)  # not with an empty mask
        return output + ((clipped - estimate + change).where(any_known, 0) / q)

    return agreeing
