"""Functions that the Trainer uses: checks, precision, seeds, noise, averages of the weights, and the log."""

import json
import resource
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from diffusers import ModelMixin
from diffusers.utils import make_image_grid, numpy_to_pil
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from wddm.files import read_rows, whole, write_text
from wddm.objective import TIME_SAMPLINGS
from wddm.pipeline import visible
from wddm.wavelets import WaveletCodec, check_choice, sides

SCHEDULES = ("constant_with_warmup", "cosine")  # those of diffusers that are offered
LABELS = 2**31  # last part of the seed (seed, step, LABELS) that drops labels
AVERAGES = "checkpoints/averages"
POWERS = 16.97, 6.94  # of two averages whose spread is 0.05 and 0.10 of the training so far
PRECISIONS = ("auto", "no", "fp16", "bf16")
ABOVE_0 = ("train_kimg", "learning_rate", "log_every")  # settings that have to be more than 0


@dataclass(frozen=True)
class Step:
    """Progress of training. Losses and norm are means since the last `Step`; images_per_s omits the caller's time."""

    step: int
    images_seen: int
    loss: float
    lr: float
    grad_norm: float
    images_per_s: float
    memory_gb: float  # peak in GiB, of the GPU or, without one, of the process
    band_loss: dict[str, float]  # squared error of the prediction in each band, unweighted
    validation_loss: float | None = None  # on held-out images, where it was measured at this step
    distances: dict[str, float] = field(default_factory=dict)  # from `measure`, where it was called at this step

    def logged(self) -> dict[str, Any]:
        """A row of the log, in which every distance has its own column."""
        row = asdict(self)
        return row | row.pop("distances")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's log.jsonl, one per `Step`; a last line cut short by a crash is left out."""
    return read_rows(Path(folder) / "log.jsonl")


def read_previews(folder: Path) -> dict[str, np.ndarray]:
    """A run's latest pictures of samples, at most six, uint8 (h, w, 3); keys give the images seen: "40,032 images"."""
    files = sorted((Path(folder) / "previews").glob("*.png"))[-6:]
    return {f"{int(file.stem):,} images": np.asarray(Image.open(file)) for file in files}


def forget_after(folder: Path, step: int, images_seen: int) -> None:
    """Remove from a run's log, previews and kept averages all that came after the step at which it goes on."""
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in read_log(folder) if row["step"] <= step))
    for file in (*(folder / "previews").glob("*.png"), *(folder / AVERAGES).glob("*.safetensors")):
        if int(file.stem) > images_seen:
            file.unlink()


def resolve_precision(precision: str, cpu: bool = False) -> str:
    """accelerate's name of the precision; "auto" is bf16 where a GPU has it, else "no". ValueError: fp16 on a CPU."""
    best = "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    if check_choice("precision", precision, PRECISIONS) == "fp16" and (cpu or not torch.accelerator.is_available()):
        raise ValueError("got precision='fp16' on a CPU, which would train in fp32, wanted bf16, no or auto: change it")
    return best if precision == "auto" else precision


def accelerator(precision: str, cpu: bool) -> Accelerator:
    """An Accelerator; all of a process share one precision and accumulation. ValueError: the first has another."""
    wanted = resolve_precision(precision, cpu)
    if is_initialized() and (found := AcceleratorState().mixed_precision) != wanted:
        raise ValueError(f"got precision={wanted!r} after {found!r}, wanted one in a process: restart the kernel")
    return Accelerator(mixed_precision=wanted, cpu=cpu or not torch.accelerator.is_available())


def checked(model: ModelMixin, codec: WaveletCodec, images: np.ndarray, **settings: Any) -> list[str]:
    """Check a Trainer's settings and give `advice`; ValueError: a number out of range, or parts that do not fit."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        got = f"got images of {type(images).__name__} of {getattr(images, 'dtype', None)}"
        raise ValueError(f"{got}, wanted uint8 (N, H, W, C): give a Dataset's .images")
    wanted = codec.shape(*np.roll(images.shape[1:], 1).tolist())
    if (size := (model.config.in_channels, *sides(model.config.sample_size))) != wanted:
        raise ValueError(f"got a network for {size}, wanted {wanted}, as the coefficients are: build it for these")
    check_choice("schedule", settings["schedule"], SCHEDULES)
    for name, value in settings.items():
        above = name in ABOVE_0 or (name == "metric_images" and settings["metric_kimg"])
        most = 1 if name == "label_dropout" and settings["labels"] is not None else np.inf
        if isinstance(value, int | float | np.number) and not (0 if above else -1e-12) < value < most:
            kind = "more than 0" if above else "0 or more" if most > 1 else "0 or more, below 1"
            raise ValueError(f"got {name}={value}, wanted {kind}: change it")
    if settings["metric_kimg"] and settings["measure"] is None:
        raise ValueError(f"got metric_kimg={settings['metric_kimg']:g} without measure, wanted both: give both")
    return advice(model, settings["learning_rate"], settings["warmup_kimg"] / settings["train_kimg"])


def check_batch(batch_size: int, accumulation: int = 1, num_processes: int = 1) -> None:
    """Raise a ValueError if a batch does not divide among processes and micro-batches."""
    if min(batch_size, accumulation, num_processes) < 1 or batch_size % (accumulation * num_processes):
        wanted = f"a multiple of {accumulation} (accumulation) times {num_processes} (processes)"
        raise ValueError(f"got batch_size={batch_size}, wanted {wanted}: change one of them")


def held_out(validation_images: int | None, count: int) -> np.ndarray:
    """Indices of `validation_images` (None: 0) of `count` images, spread evenly; ValueError if no others are left."""
    if validation_images is not None and not 0 < validation_images < count:
        got = f"got validation_images={validation_images} of {count} images"
        raise ValueError(f"{got}, wanted 1 or more, and fewer than all: change validation_images")
    return np.linspace(0, count - 1, validation_images or 0).round().astype(int)


def class_numbers(labels: np.ndarray | None, no_label: int, count: int) -> np.ndarray | None:
    """Labels (N,) as int64, negative ones as `no_label`; ValueError if they are not what the network was built for."""
    if labels is None and no_label < 0:
        return None
    whole = labels is not None and np.ndim(labels) == 1 and (labels := np.asarray(labels)).dtype.kind in "iub"
    if labels is None or not whole or len(labels) != count or labels.max() >= no_label or (labels < 0).all():
        got = "none" if labels is None else f"{len(labels)} up to {np.max(labels)}"
        wanted = f"wanted {count} below {no_label}" if no_label > 0 else "wanted none for this network"
        raise ValueError(f"got labels ({got}), {wanted}: build_backbone(num_class_embeds=classes + 1) takes as many")
    return np.where(labels < 0, no_label, labels).astype(np.int64)


def conditioned(network: nn.Module, *labels: Tensor) -> Any:
    """The network with its labels (B,) filled in, if there are any."""
    return partial(network, class_labels=labels[0]) if labels else network


def advice(model: ModelMixin, learning_rate: float, warmup: float = 0.0) -> list[str]:
    """Warnings, if networks of this width stopped learning at such a rate, and if the whole training is warm-up."""
    widest = max(model.config.get("block_out_channels") or [0])
    much = f"learning_rate {learning_rate:g} is much for {widest} channels"
    notes = [f"{much}: if the loss stops falling, take {0.128 / widest:.1g}"] if learning_rate * widest > 0.3 else []
    return notes + ["the training ends within its warm-up: take a smaller warmup_kimg"] * bool(warmup >= 1)


def tune(model: ModelMixin, device: torch.device, gradient_checkpointing: bool = False) -> None:
    """Set gradient checkpointing if asked for, and on a GPU TF32 in matrix products and channels-last memory."""
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.to(memory_format=torch.channels_last)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory since the start, in GiB: of a CUDA device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def derived_seed(*key: int) -> int:
    """An independent seed for every key, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])


def check_finite(unread: list[tuple[Tensor, ...]], step: int, learning_rate: float) -> None:
    """Raise a FloatingPointError if `Trainer.optimise` returned a loss or norm up to this step that is not finite."""
    if not unread:
        return
    losses, _, norms = (torch.stack(values) for values in zip(*unread, strict=True))  # read together, to wait once
    finite = (losses.isfinite() & norms.isfinite()).tolist()
    if not all(finite):
        got = f"got loss or gradient that are not finite at step {step - len(finite) + 1 + finite.index(False)}"
        remedy = f"lower learning_rate (now {learning_rate:g}); the last good checkpoint is kept"
        raise FloatingPointError(f"{got}, wanted numbers: {remedy}")


def draw_noise(
    timesteps: Tensor, time_sampling: str, shape: tuple[int, int, int], generators: list[Generator], each: int
) -> tuple[Tensor, Tensor]:
    """Noise (N, *shape) and N of the ascending `timesteps`, on their device; every generator draws `each` of the N."""
    noise = [torch.randn(each, *shape, generator=one, device=one.device) for one in generators]
    places = torch.cat([TIME_SAMPLINGS[time_sampling](each, one) for one in generators])
    return torch.cat(noise).to(timesteps.device), timesteps[places.to(timesteps.device)]


def flattened(parts: Iterable[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The tensors of numbered parts in one dict, keyed `<number>.<name>`."""
    return {f"{number}.{name}": tensor for number, part in parts for name, tensor in part.items()}


def unflattened(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `flattened`: name and tensor of every part, by its number."""
    parts: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parts[int(number)][name] = tensor
    return parts


def write_preview(samples: np.ndarray, file: Path) -> None:
    """Write a PNG of samples uint8 (N, H, W, C), 16 in a row."""
    with whole(file) as aside:
        make_image_grid(numpy_to_pil(visible(samples) / 255), len(samples) // 16, 16).save(aside, "PNG")


@torch.no_grad()
def average(averages: Sequence[Mapping[str, Tensor]], weights: list[Tensor], step: int, decay: float) -> None:
    """Update `averages` with the weights after step + 1 steps: the first by diffusers' rule, with a decay that rises to
    `decay`; others by `POWERS`: weights of step s count as s^power (Karras et al. 2024, arXiv 2312.02696).
    """
    decays = [min(decay, (1 + step) / (10 + step)) if step else 0.0]
    decays += [(1 - 1 / (step + 1)) ** (power + 1) for power in POWERS]
    for kept, share in zip(averages, decays, strict=False):
        torch._foreach_lerp_([*kept.values()], weights, 1 - share)


def keep_averages(run: Path, images_seen: int, averages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write `averages` to the folder `AVERAGES` of a run, for `averaged_weights`."""
    with whole(run / AVERAGES / f"{images_seen:09d}.safetensors") as aside:
        save_file({name: tensor.contiguous() for name, tensor in flattened(enumerate(averages)).items()}, aside)


def averaged_weights(run: str | Path, half_life_kimg: float) -> dict[str, Tensor]:
    """The weights at the end of a training, averaged with any half-life (thousand images): the nearest weighted
    sum of the averages kept in `run`, by least squares over the share of every step (Karras et al. 2024, section 3.3).

    ValueError: no averages were kept, or the nearest sum has more than a tenth of the shares wrong.
    """
    if not (files := sorted(Path(run, AVERAGES).glob("*.safetensors"))):
        raise ValueError(f"got {run} without kept averages, wanted some: train it with averages_kimg")
    ends = np.array([int(file.stem) for file in files for _ in POWERS])[:, None]
    at = np.linspace(0, ends[-1, 0], 4001)[1:]  # images seen
    shares = np.where(at <= ends, at / ends, 0) ** np.resize(POWERS, len(ends))[:, None]
    wanted = 0.5 ** ((ends[-1] - at) / np.fmax(half_life_kimg, 1e-9) / 1000)  # 0 and nan: the last weights alone
    shares, wanted = shares / shares.sum(1, keepdims=True), wanted / wanted.sum()
    parts = np.linalg.lstsq(shares.T, wanted, rcond=1e-6)[0]
    parts /= parts.sum()
    if (wrong := np.abs(parts @ shares - wanted).sum() / 2) > 0.1:
        got = f"got a half-life of {half_life_kimg:g} kimg, {wrong:.0%} off with {len(files)} kept averages"
        raise ValueError(f"{got}, wanted 10 %: take one nearer to {ends[-1, 0] / 16e3:.2g}, or a smaller averages_kimg")
    found: dict[str, Tensor] = {}
    for file, pair in zip(files, parts.reshape(-1, len(POWERS)), strict=True):
        for number, weights in unflattened(load_file(file)).items():
            for name, tensor in weights.items():
                found[name] = found.get(name, 0) + pair[number] * tensor.double()
    return {key: tensor.float() for key, tensor in found.items()}
