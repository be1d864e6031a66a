"""workloads: what is measured here, as generator functions: every `next` is one call of `steps` steps.

compare({"ours": partial(training, network), "theirs": partial(bare_training, network)}, batch_size=16)
"""

import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor

from benchmarks import plain
from wddm.backbones import IMAGES, build_backbone
from wddm.data import batches
from wddm.kan import SplineLinear
from wddm.objective import build_solver
from wddm.pipeline import WaveletPipeline
from wddm.steps import resolve_precision, tune
from wddm.training import Step, Trainer
from wddm.wavelets import WaveletCodec

Network = Mapping[str, Any]  # what `build_backbone` takes: {"backbone": "unet", "dataset": "cifar10", "level": 1}
Row = dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_paper(network: Network) -> ModelMixin:
    """A network on the meta device, without memory for its weights: to count its parameters and operations."""
    with torch.device("meta"):
        return build_backbone(**network)


def noise_images(network: Network, count: int) -> np.ndarray:
    """uint8 (count, H, W, C), shaped as those of the network's data set; no speed here depends on what they show."""
    size, channels = IMAGES[network["dataset"]]
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


class Unsaved(Trainer):
    """A Trainer that writes no checkpoints: they take seconds every `checkpoint_kimg`, and are part of no step."""

    def save(self, name: str | None = None) -> None: ...


def training(
    network: Network, *, batch_size: int = 16, steps: int = 1, precision: str = "auto", compile: bool = False
) -> Generator[Step]:
    """Our training loop as it runs everywhere, with batches, log and checks: `steps` steps a call."""
    with TemporaryDirectory() as folder:
        trainer = Unsaved(
            model=build_backbone(**network),
            codec=WaveletCodec("haar", network["level"], scaling="dyadic"),
            images=noise_images(network, 4 * batch_size),
            folder=Path(folder),
            train_kimg=1e6,
            batch_size=batch_size,
            log_every=steps,
            preview_kimg=0,
            precision=precision,
            compile=compile,
        )
        yield from (step for step in trainer.steps() if step.step % steps == 0)  # without the extra rows at the start


def sampling(
    network: Network,
    *,
    batch_size: int = 16,
    steps: int = 1,
    sampling_steps: int = 10,
    precision: str = "auto",
    compile: bool = False,
) -> Generator[object]:
    """WaveletPipeline with `sampling_steps` of DDIM: `steps` batches of images a call."""
    model = build_backbone(**network).to(device()).eval()
    tune(model, device())
    if compile:
        model.compile()
    codec = WaveletCodec("haar", network["level"], scaling="dyadic").to(device())
    pipeline = WaveletPipeline(model, build_solver("ddim", "v_prediction", spacing="trailing"), codec)
    pipeline.set_progress_bar_config(disable=True)
    while True:
        with torch.autocast(device().type, torch.bfloat16, enabled=resolve_precision(precision) == "bf16"):
            for _ in range(steps):
                output = pipeline(batch_size=batch_size, num_inference_steps=sampling_steps, output_type="pt")
        yield output


def bare_training(
    network: Network,
    *,
    batch_size: int = 16,
    steps: int = 1,
    precision: str = "auto",
    compile: bool = False,
    recursion: bool = False,
) -> Generator[Tensor]:
    """The network in a bare loop, on batches that are ready on the device; with `recursion`, splines by recursion."""
    model = build_backbone(**network).to(device()).train()
    if recursion:
        plain.with_recursion(model)
    tune(model, device())
    level, bf16 = network["level"], resolve_precision(precision) == "bf16"
    loop = plain.BareLoop(torch.compile(model) if compile else model, level, bf16=bf16)
    images = torch.from_numpy(noise_images(network, batch_size)).to(device()).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.empty_like(plain.haar(images, level))
    while True:
        for _ in range(steps):
            t = torch.randint(1000, (batch_size,), device=device())
            loss = loop.step(images, noise.normal_(), t)
        yield loss


def spline_layer(
    *, width: int, tokens: int, batch_size: int = 1, recursion: bool = False, steps: int = 1
) -> Generator[None]:
    """Forward and backward pass of one spline layer on (batch_size * tokens, width), `steps` times a call."""
    layer = SplineLinear(width, width).to(device())
    if recursion:
        plain.with_recursion(layer)
    x = torch.randn(batch_size * tokens, width, device=device(), requires_grad=True)
    while True:
        for _ in range(steps):
            layer(x).square().mean().backward()
            layer.zero_grad()
            x.grad = None
        yield


def prepared_batches(images: np.ndarray, *, batch_size: int, steps: int = 1) -> Generator[Tensor]:
    """Our data path: `steps` batches a call of prepared images (N, H, W, C), in random order, mirrored at random."""
    yield from islice(batches(images, batch_size, seed=0, flip=True), steps - 1, None, steps)


def decoded_batches(images: np.ndarray, *, batch_size: int, steps: int = 1) -> Generator[Tensor]:
    """The same batches from PNG files, by a DataLoader that decodes them in this process."""
    yield from islice(plain.loader_batches(images, batch_size), steps - 1, None, steps)


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    """Commands whose start is timed, each a process, in a workbook of one empty notebook that is made in `folder`."""
    parameters = 'run: str = "empty"  # name\nseed: int = 0  # unused'
    cells = [
        nbformat.v4.new_markdown_cell("# Empty\n\n**Inputs:** none\n**Outputs:** none"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    for name in ("notebooks", "params"):
        (folder / name).mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "01_empty.ipynb")
    (folder / "params" / "empty.yaml").write_text("run: empty\n")

    def command(*words: str) -> Callable[[], object]:
        return partial(subprocess.run, [sys.executable, *words], cwd=folder, check=True, capture_output=True)

    return {
        "python": command("-c", "pass"),
        "import wddm": command("-c", "import wddm"),
        "wddm --help": command("-m", "wddm", "--help"),
        "wddm run, an empty notebook": command("-m", "wddm", "run", "params/empty.yaml", "--force"),
        "wddm run, nothing to do": command("-m", "wddm", "run", "params/empty.yaml"),
    }
