"""Conditions on the images that are drawn, as a wrapper round the network: no solver has to know of them.

Labels, by classifier-free guidance (Ho & Salimans 2022): u + w (c - u), of the answers c with and u without label.
Known pixels or means y, by null-space projection (DDNM, Wang et al. 2022, arXiv 2212.00490): the network's answer is
turned into its estimate x of the clean image, x is made to agree with y, and x is turned back into an answer:

    x + A^+ (y - A x)    A picks the pixels of a mask; or A takes the mean of every cell, and A^+ repeats it there

The pixels agree, whatever the codec. Before that, the unknown part is fitted to the known one by pseudo-inverse
guidance (Song et al. 2023): x moves by J u, with J the derivative of x by z_t, and A J u = y - A x solved for u by
seven iterations of damped conjugate gradients, each one call of the network. Fewer leave grain that does not fit.
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
Missing = Callable[[Tensor], Tensor]  # what must be added to coefficients z so that they agree with what is known
Labels = int | str | Sequence[int | str] | Tensor
PUSH = 0.1  # step of the finite difference, as a fraction of what is missing
TURNS = 7  # iterations of conjugate gradients, each one call of the network
DAMPING = 0.005  # of the iterations, relative to the slope in the first direction: keeps u small where J is


def numbered(labels: Labels, names: Sequence[str] | None) -> list[int]:
    """Class numbers of labels; a text is one of the class `names`, or else a number. ValueError if it is neither."""
    known = {name: number for number, name in enumerate(names or [])}
    given = np.array(labels.tolist() if isinstance(labels, Tensor) else labels, object).ravel().tolist()
    for label in map(str, given):
        if not label.isdecimal():
            check_choice("labels", label[:100], known or ["0, 1, 2, ... (the classes have no names)"])
    return [known[label] if isinstance(label, str) and label in known else int(label) for label in given]


def labelled(backbone: ModelMixin, count: int, labels: list[int] | None, weights: Sequence[float]) -> Answer:
    """The network's answers to `count` images with one label or a label each (None: "no label", the last), guided by a
    weight w per channel. ValueError: labels that the network does not have, weights below 0, weights without labels.
    """
    last, guided = (getattr(backbone.config, "num_class_embeds", None) or 0) - 1, any(w != 1 for w in weights)
    if not all(0 <= w < float("inf") for w in weights) or (guided and labels is None):
        got = f"got guidance {weights[0]:g}, of details {weights[-1]:g}"
        raise ValueError(f"{got}, wanted labels and a number from 0 on: leave guidance out")
    if last < 0 and labels is not None:
        raise ValueError("got labels for a network that was trained without, wanted none: leave labels out")
    if labels is not None and (len(labels) not in (1, count) or max(labels) >= last):
        some = [*dict.fromkeys(labels)][:9]  # drawn in turn, each occurs many times
        raise ValueError(f"got labels {some}, wanted 0 to {last - 1}, one or {count} of them: change them")

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
    """The `Missing` function for images of `shape` (B, C, H, W), or None if nothing about them is known.

    Known are the means over cells of 2^k x 2^k pixels, k <= L (`low_resolution`), or the pixels of `known` where `mask`
    (B or 1, 1, H, W) is True; images in [0, 1], B or 1 of them. ValueError: other shapes or values, or both kinds.
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
    """Answers whose clean estimates, clipped at `clip`, agree with what is known, by 1 + TURNS network calls each."""

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
        any_known = (change != 0).flatten(1).any(1).view(-1, 1, 1, 1)  # an empty mask changes nothing
        return output + ((clipped - estimate + change).where(any_known, 0) / q)

    return agreeing
