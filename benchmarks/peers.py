"""peers: this workbook beside other libraries for diffusion models of images, each as its own documentation uses it.

Each of `PEERS` is a generator function of a `Task`: it trains for the task's seconds of CPU on one thread, then yields
the number of images seen, and then samples, float (n, C, H, W) in [0, 1], a batch at every `next`. A library that has a
training loop trains by it. All networks have about a million parameters, and are called CALLS times for a sample.
`race` runs each in a process of its own; `codecs` and `splines` compare two pieces. `wddm[peers]` brings the libraries.
"""

import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.profiling import anonymous_bytes, time_in_turn
from wddm.data import batches, load
from wddm.experiment import build
from wddm.kan import SplineLinear
from wddm.metrics.intervals import median
from wddm.metrics.scores import METRICS, Options
from wddm.training import Trainer
from wddm.wavelets import WaveletCodec

CALLS, BATCH = 50, 64  # network calls for a sample; samples drawn at a time


@dataclass(frozen=True)
class Task:
    """What a peer is to do. `seconds` are of CPU, of one thread; images are mirrored at random if `flip`."""

    peer: str
    data: str  # folder of a prepared set
    learning_rate: float
    seconds: float
    seed: int = 0
    count: int = 512  # of samples
    flip: bool = False

    @property
    def images(self) -> np.ndarray:
        """The prepared images, uint8 (N, H, W, C)."""
        return load(self.data).images

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Endless batches (B, C, H, W) in [-1, 1], for documentation that leaves the loading to the user."""
        return batches(self.images, batch_size, seed=self.seed, flip=self.flip)


Peer = Callable[[Task], Generator[Any]]


def ours(task: Task, level: int, labelled: bool = False) -> Generator[Any]:
    """This workbook by its defaults, with labels only if `labelled`; DDIM."""
    prepared = load(task.data)
    sizes = {"backbone": "unet", "widths": [64, 64], "layers_per_block": 1, "attention_levels": [1], "seed": task.seed}
    codec, network = build({"level": level, "class_conditional": labelled, **sizes}, prepared)
    labels = prepared.labels if labelled else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=network, codec=codec, images=prepared.images, labels=labels, folder=Path(folder), train_kimg=1e6,
            learning_rate=task.learning_rate, flip=task.flip, seed=task.seed, checkpoint_kimg=0, preview_kimg=0,
            log_every=2,
        )  # fmt: skip
        steps = trainer.steps()
        until(task, lambda: next(steps))
        yield trainer.images_seen
        pipeline = trainer.averaged()
        pipeline.set_progress_bar_config(disable=True)
        for start in itertools.count(step=BATCH):
            asked = [k % len(prepared.class_names or ()) for k in range(start, start + BATCH)] if labelled else None
            options = {"num_inference_steps": CALLS, "seed": task.seed + start, "output_type": "pt"}
            yield pipeline(BATCH, labels=asked, **options).images


def denoising_diffusion(task: Task) -> Generator[Any]:
    """denoising-diffusion-pytorch by its Trainer, on a folder of images; DDIM. Documented: learning rate 8e-5."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    images = task.images
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("images").mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image.squeeze()).save(f"images/{number}.png")
        network = Unet(dim=20, dim_mults=(1, 2, 4), channels=images.shape[-1])
        model = GaussianDiffusion(network, image_size=images.shape[1], timesteps=1000, sampling_timesteps=CALLS)
        trainer = Trainer(
            model, "images", train_batch_size=32, gradient_accumulate_every=2, train_lr=task.learning_rate,
            train_num_steps=0, ema_decay=0.995, amp=False, calculate_fid=False, save_and_sample_every=10**9,
            augment_horizontal_flip=task.flip,
        )  # fmt: skip

        def ten_more() -> None:
            trainer.train_num_steps += 10
            trainer.train()

        until(task, ten_more)
        yield trainer.step * 64
        trainer.ema.ema_model.eval()
        while True:
            yield trainer.ema.ema_model.sample(batch_size=BATCH)


def diffusers_example(task: Task) -> Generator[Any]:
    """The recipe of diffusers' example for unconditional images, whose script is in no package; DDIM.

    AdamW with its settings, a cosine after 500 steps of warm-up, batches of 16, DDPM's linear schedule, its EMAModel's
    average. Documented: learning rate 1e-4. The cosine needs the number of steps, estimated first from five of them.
    """
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    size, channels, stream = task.images.shape[1], task.images.shape[-1], task.batches(16)
    model = UNet2DModel(
        size, channels, channels, layers_per_block=1, block_out_channels=(64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), task.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    noising, average = DDPMScheduler(1000, beta_schedule="linear"), EMAModel(model.parameters(), use_ema_warmup=True)
    average.inv_gamma, average.power, average.decay = 1.0, 0.75, 0.9999

    def loss() -> Tensor:
        clean = next(stream)
        noise, t = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        return nn.functional.mse_loss(model(noising.add_noise(clean, noise, t), t).sample, noise)

    def five() -> None:
        for _ in range(5):
            loss().backward()

    five()
    began = time.process_time()
    five()
    total = math.ceil(5 * task.seconds / (time.process_time() - began))
    optimizer.zero_grad()
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=min(500, total // 10), num_training_steps=total)
    seen = 0

    def step() -> None:
        nonlocal seen
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        seen += 16

    until(task, step)
    yield seen
    average.copy_to(model.parameters())
    pipeline = DDIMPipeline(model.eval(), DDIMScheduler.from_config(noising.config, timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    while True:
        drawn = pipeline(BATCH, num_inference_steps=CALLS, output_type="np").images
        yield torch.from_numpy(drawn).permute(0, 3, 1, 2)


def smalldiffusion(task: Task) -> Generator[Any]:
    """smalldiffusion as in its FashionMNIST example, in batches of 64, not 1,024. Documented: learning rate 7e-4."""
    from smalldiffusion import ScheduleLogLinear, Unet, img_normalize, samples, training_loop
    from smalldiffusion.model import Scaled
    from torch.utils.data import DataLoader
    from torch_ema import ExponentialMovingAverage

    pixels = torch.from_numpy(task.images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    loader, (channels, size, _) = DataLoader(pixels, 64, shuffle=True), pixels.shape[1:]  # type: ignore[arg-type]
    model = Scaled(Unet)(
        size, channels, channels, ch=64, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(size // 2,)
    )
    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    average, seen = ExponentialMovingAverage(model.parameters(), decay=0.999), 0
    loop = training_loop(loader, model, schedule, epochs=10**6, lr=task.learning_rate)

    def step() -> None:
        nonlocal seen
        seen += len(next(loop).x0)
        average.update()

    until(task, step)
    yield seen
    with average.average_parameters():
        while True:
            *_, clean = samples(model, schedule.sample_sigmas(CALLS), gam=1.6, batchsize=BATCH)
            yield img_normalize(clean)


PEERS: dict[str, tuple[Peer, tuple[float, ...]]] = {  # function, and learning rates: documented, another
    "wddm, level 1": (partial(ours, level=1), (2e-3,)),
    "wddm, level 1, told labels": (partial(ours, level=1, labelled=True), (2e-3,)),
    "wddm, level 0 (pixels)": (partial(ours, level=0), (2e-3,)),
    "denoising-diffusion-pytorch": (denoising_diffusion, (8e-5, 1e-3)),
    "diffusers, its example": (diffusers_example, (1e-4, 1e-3)),
    "smalldiffusion": (smalldiffusion, (7e-4, 2e-3)),
}


def until(task: Task, step: Callable[[], object]) -> None:
    """Call `step` until the task's seconds of CPU are over; those of processes that load images do not count."""
    began = time.process_time()
    while time.process_time() - began < task.seconds:
        step()


def perform(task: Task, to: Path) -> dict[str, Any]:
    """Train and draw in this process, on one thread; write samples.npy to `to`, and return what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    began, running = time.process_time(), PEERS[task.peer][0](task)
    seen, trained = next(running), time.process_time()
    drawn = torch.cat(list(itertools.islice(running, -(-task.count // BATCH))))[: task.count]
    ended = time.process_time()
    running.close()
    np.save(to / "samples.npy", (drawn.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return asdict(task) | {
        "images_seen": seen, "training_s": trained - began, "sampling_s": ended - trained,
        "memory_gib": anonymous_bytes(peak=True) / 2**30,  # getrusage would count the parent's peak, too
    }  # fmt: skip


def apart(task: Task) -> tuple[dict[str, Any], np.ndarray]:
    """`perform` in a process of its own: what it took, and samples uint8 (n, H, W, C)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.peers", json.dumps(asdict(task)), folder]
        alone = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}  # the task is of a CPU
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode:
            raise RuntimeError(f"{task.peer} failed: {done.stderr.strip().splitlines()[-1]}")
        return json.loads((Path(folder) / "row.json").read_text()), np.load(Path(folder) / "samples.npy")


def measured(task: Task, level: int) -> dict[str, Any]:
    """What a peer took, how its samples score against the set (FWD at `level`), and the samples themselves."""
    row, samples = apart(task)
    judges = [METRICS[name] for name in ("perceptual", "wavelet", "classifier")]
    numbers = [score.record() for judge in judges for score in judge(samples, load(task.data), Options(level=level))]
    return row | {key: value for record in numbers for key, value in record.items()} | {"samples": samples}


def race(task: Task, seeds: Sequence[int], level: int, jobs: int = 1) -> pd.DataFrame:
    """A row of `measured` per run, `jobs` of them at a time: every peer with the first seed at all its learning rates,
    with the other seeds at the `chosen` one, which was best by KID, or by FWD where there is no KID.
    """
    first = [
        replace(task, peer=peer, learning_rate=rate, seed=seeds[0])
        for peer, (_, rates) in PEERS.items()
        for rate in rates
        if "told labels" not in peer or load(task.data).labels is not None
    ]
    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(partial(measured, level=level), first))
        rows.sort(key=lambda row: row.get("kid_efficientnet", row["fwd"]), reverse=True)
        chosen = {row["peer"]: row["learning_rate"] for row in rows}  # the last, which is the best
        others = [
            replace(one, seed=seed) for seed in seeds[1:] for one in first if one.learning_rate == chosen[one.peer]
        ]
        rows += pool.map(partial(measured, level=level), others)
    table = pd.DataFrame(rows)
    return table.assign(chosen=table.learning_rate == table.peer.map(chosen))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per peer at the chosen learning rate: means over seeds, with the lowest and the highest in brackets."""

    def spread(values: pd.Series) -> str:
        form = ",.0f" if values.max() >= 1000 else ".3g"
        return "{:{form}} ({:{form}} to {:{form}})".format(values.mean(), values.min(), values.max(), form=form)

    rows, none = [], pd.Series(dtype=float)
    for peer, (function, _) in PEERS.items():
        if not len(own := table[table.chosen & (table.peer == peer)]):
            continue  # it wants labels, and there are none
        scores = {"KID x 1000": 1000 * own.get("kid_efficientnet", none), "FWD": own.fwd}
        scores["confident"] = own.get("confident_share", none)
        rows.append(
            {"peer": peer, "learning rate": own.learning_rate.iloc[0]}
            | {name: spread(values) for name, values in scores.items() if len(values)}
            | {
                "images seen": round(own.images_seen.mean()), "s to draw": own.sampling_s.mean(),
                "GiB": own.memory_gib.max(),
                "lines": inspect.getsource(getattr(function, "func", function)).count("\n"),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def codecs(wavelet: str, level: int = 2, side: int = 32, rounds: int = 7) -> pd.DataFrame:
    """Encoding and decoding 64 RGB images by this codec, pytorch-wavelets and ptwt: pyramids, which all three have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pkg_resources is deprecated
        from ptwt import wavedec2, waverec2
        from pytorch_wavelets import DWTForward, DWTInverse

    x, ours = torch.rand(64, 3, side, side), WaveletCodec(wavelet, level, "pyramid", "none")
    there, back = DWTForward(level, wave=wavelet, mode="periodization"), DWTInverse(wave=wavelet, mode="periodization")
    ways: dict[str, Callable[[], Tensor]] = {
        "wddm": lambda: ours.decode(ours.encode(x)),
        "pytorch-wavelets": lambda: back(there(x)),
        "ptwt": lambda: waverec2(wavedec2(x, wavelet, mode="periodic", level=level), wavelet),
    }
    taken = time_in_turn(ways, rounds=rounds)
    return pd.DataFrame(
        {
            "wavelet": wavelet, "codec": name, "ms for 64 images": 1000 * median(seconds).value,
            "times ours": median(seconds / taken["wddm"]).value, "error": (ways[name]() - x).abs().max().item(),
        }
        for name, seconds in taken.items()
    )  # fmt: skip


def splines(width: int = 128, tokens: int = 256, rounds: int = 7) -> pd.DataFrame:
    """A forward and backward pass of a spline layer from `width` to `width` values: ours, and pykan's KANLayer."""
    from kan.KANLayer import KANLayer

    x = torch.rand(tokens, width) * 2 - 1
    layers = {"wddm": SplineLinear(width, width), "pykan": KANLayer(width, width, num=5, k=3)}

    def both(layer: nn.Module) -> None:
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).sum().backward()

    taken = time_in_turn({name: partial(both, layer) for name, layer in layers.items()}, rounds=rounds)
    return pd.DataFrame(
        {"layer": name, "ms": 1000 * median(s).value, "times ours": median(s / taken["wddm"]).value}
        for name, s in taken.items()
    )


if __name__ == "__main__":
    where = Path(sys.argv[2])
    (where / "row.json").write_text(json.dumps(perform(Task(**json.loads(sys.argv[1])), where)))
