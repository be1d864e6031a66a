"""What a device can do: its precision, its fast paths, random numbers of its own."""

import torch
from torch import nn


def resolve_precision(precision: str, cpu: bool = False) -> str:
    """accelerate's name of the precision; "auto" is bf16 where a GPU has it, else "no"."""
    wanted = ("auto", "no", "fp16", "bf16")
    if precision not in wanted:
        raise ValueError(f"got precision={precision!r}, wanted one of {', '.join(wanted)}: choose one of them")
    if precision != "auto":
        return precision
    return "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def tune(model: nn.Module, device: torch.device) -> None:
    """On a GPU, TF32 in matrix products and channels last in the model; nothing on the CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.to(memory_format=torch.channels_last)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the random numbers of this device alone.

    `torch.manual_seed` asks after every kind of device that there is, which takes a third of a millisecond.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)
