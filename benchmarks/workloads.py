"""workloads: what is measured here, as generator functions: every `next` is one call of so many steps.

    compare({"ours": partial(training, network), "theirs": partial(bare_training, network)}, batch_size=16)

`training` is in wddm.studies.efficiency, and what a network and its images are.
"""

import subprocess
import sys
from collections.abc import Callable, Generator
from functools import partial
from itertools import islice
from pathlib import Path

import nbformat
import numpy as np
import torch
from torch import Tensor

from benchmarks import plain
from wddm.backbones import build_backbone
from wddm.data import batches
from wddm.kan import SplineLinear
from wddm.steps import resolve_precision, tune
from wddm.studies.efficiency import Network, device, noise_images


def bare_training(
    network: Network,
    *,
    batch_size: int = 16,
    steps: int = 1,
    precision: str = "auto",
    compile: bool = False,
    recursion: bool = False,
) -> Generator[Tensor]:
    """The network in a bare loop, on batches that lie ready on the device; with `recursion`, its splines by that."""
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
    """Forward and backward pass of one spline layer on (batch_size * tokens, width), so many times a call."""
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
    """Our data path: so many batches a call of prepared images (N, H, W, C), in random order, mirrored at random."""
    yield from islice(batches(images, batch_size, seed=0, flip=True), steps - 1, None, steps)


def decoded_batches(images: np.ndarray, *, batch_size: int, steps: int = 1) -> Generator[Tensor]:
    """The same from PNG files, by a DataLoader that decodes them in this process."""
    yield from islice(plain.loader_batches(images, batch_size), steps - 1, None, steps)


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    """What it costs to start: commands, each a process, in a workbook of one empty notebook in `folder`."""
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
