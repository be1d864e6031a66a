"""contenders: what is measured, as generators: every `next` is one call of so many steps.

    contest({"ours": partial(training, network), "bare": partial(bare_training, network)})

A network is what `build_backbone` takes, `{"kind": "unet", "dataset": "cifar10", "level": 1}`; images are noise, which
no speed here depends on, but where they are decoded.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from wddm.backbones import IMAGES, build_backbone
from wddm.batches import batches
from wddm.kan import SplineLinear
from wddm.learner import resolve_precision, tune
from wddm.pipeline import WaveletPipeline
from wddm.solvers import build_solver
from wddm.studies import baselines
from wddm.training import Step, Trainer
from wddm.wavelets import WaveletCodec


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def noise_images(network: Mapping, count: int) -> np.ndarray:
    """uint8 (count, H, W, C), as those of the network's data set are shaped."""
    size, channels = IMAGES[network["dataset"]]
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


class Unsaved(Trainer):
    """A Trainer that writes no checkpoint: they cost seconds every `checkpoint_kimg`, not part of any step."""

    def save(self, name: str | None = None) -> None: ...


def training(
    network: Mapping, *, batch_size: int = 16, steps: int = 1, precision: str = "auto", compile: bool = False
) -> Iterator[Step]:
    """Our loop as it runs everywhere, with batches, log and checks: so many steps a call, with a `Step` logged."""
    model = build_backbone(**network)
    with TemporaryDirectory() as folder:
        trainer = Unsaved(
            model=model,
            codec=WaveletCodec("haar", network["level"]),
            images=noise_images(network, 4 * batch_size),
            folder=Path(folder),
            train_kimg=1e6,
            batch_size=batch_size,
            log_every=steps,
            precision=precision,
            compile=compile,
            preview_kimg=0.0,
        )
        yield from trainer.steps()


def bare_training(
    network: Mapping,
    *,
    batch_size: int = 16,
    steps: int = 1,
    precision: str = "auto",
    compile: bool = False,
    recursion: bool = False,
) -> Iterator[Tensor]:
    """The same network in a bare loop, on batches that lie ready on the device; `recursion`: in its splines."""
    model = build_backbone(**network).to(device()).train()
    if recursion:
        baselines.with_recursion(model)
    tune(model, device())
    level, bf16 = network["level"], resolve_precision(precision) == "bf16"
    loop = baselines.BareLoop(torch.compile(model) if compile else model, level, bf16=bf16)
    images = torch.from_numpy(noise_images(network, batch_size)).to(device()).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.empty_like(baselines.haar(images, level))
    while True:
        for _ in range(steps):
            t = torch.randint(1000, (batch_size,), device=device())
            loss = loop.step(images, noise.normal_(), t)
        yield loss


def sampling(
    network: Mapping,
    *,
    batch_size: int = 16,
    steps: int = 1,
    sampling_steps: int = 10,
    precision: str = "auto",
    compile: bool = False,
) -> Iterator[Tensor]:
    """WaveletPipeline with DDIM of so many steps; here a step of the contest is a batch of images."""
    model = build_backbone(**network).to(device()).eval()
    bf16 = resolve_precision(precision) == "bf16"
    tune(model, device())
    codec = WaveletCodec("haar", network["level"]).to(device())
    if compile:
        model.compile()
    pipeline = WaveletPipeline(model, build_solver("ddim", "v_prediction", spacing="trailing"), codec)
    pipeline.set_progress_bar_config(disable=True)
    while True:
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
            for _ in range(steps):
                images = pipeline(batch_size=batch_size, num_inference_steps=sampling_steps, output_type="pt").images
        yield images


def spline_layer(*, width: int, tokens: int, recursion: bool = False, steps: int = 1) -> Iterator[None]:
    """Forward and backward pass of one spline layer on (tokens, width), so many times a call."""
    layer = SplineLinear(width, width).to(device())
    if recursion:
        baselines.with_recursion(layer)
    x = torch.randn(tokens, width, device=device(), requires_grad=True)
    while True:
        for _ in range(steps):
            layer(x).square().mean().backward()
            layer.zero_grad()
            x.grad = None
        yield


def prepared_batches(images: np.ndarray, *, batch_size: int, steps: int = 1) -> Iterator[Tensor]:
    """Our data path: so many batches a call of prepared images (N, H, W, C), in random order, mirrored at random."""
    yield from islice(batches(images, batch_size, seed=0, flip=True), steps - 1, None, steps)


def decoded_batches(images: np.ndarray, *, batch_size: int, steps: int = 1) -> Iterator[Tensor]:
    """The same from PNG files, by a DataLoader that decodes them in this process."""
    yield from islice(baselines.loader_batches(images, batch_size), steps - 1, None, steps)


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    """What it costs to start: commands, each a process, in a workbook of one empty notebook in `folder`."""
    import nbformat

    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Empty\n\n**Inputs:** none\n**Outputs:** none"),
            nbformat.v4.new_code_cell(
                'run: str = "empty"  # name\nseed: int = 0  # unused', metadata={"tags": ["parameters"]}
            ),
        ]
    )
    for name in ("notebooks", "params"):
        (folder / name).mkdir()
    nbformat.write(notebook, folder / "notebooks" / "01_empty.ipynb")
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
