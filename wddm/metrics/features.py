"""features: a small classifier of a labelled set, whose features a Frechet distance can be taken of.

It is trained here, on three quarters of the real images, and measured on the rest; a distance in its features says
what matters to tell these classes apart, and compares within one set only. It is no FID: the network is another.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wddm.files import whole
from wddm.metrics.diagnostics import unit_batches

VALUES, MOST, SIDE = 32, 20_000, 64  # features of an image; images to train on; larger ones are averaged to this
STEPS, BATCH = 500, 64


class FeatureNet(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> features (B, 32), before the last layer: convolutions to 4 x 4, their mean."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        widths = [channels, *(32 * min(2**depth, 4) for depth in range(max(1, (side // 4).bit_length())))]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2 if k else 1, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for k, (a, b) in enumerate(itertools.pairwise(widths))
        ]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], VALUES))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(VALUES, classes))
        self.sizes = (channels, side, classes)
        self.accuracy, self.held_out = 0.0, 0  # on how many real images it was not trained on

    def forward(self, images: Tensor) -> Tensor:
        return self.body(nn.functional.adaptive_avg_pool2d(images, self.sizes[1]) * 2 - 1)


def fit_features(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> FeatureNet:
    """Train the network on uint8 images (N, H, W, C) and labels (N,), on the CPU; the same for the same seed."""
    from sklearn.model_selection import train_test_split

    values, targets = np.unique(labels, return_inverse=True)
    if len(images) != len(labels) or len(values) < 2:
        raise ValueError(
            f"got {len(images)} images and {len(labels)} labels of {len(values)} classes, wanted one label each of 2 "
            "classes or more: give the labels of these images"
        )
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:MOST])
    fitted, held_out = train_test_split(rows, test_size=0.25, random_state=seed, stratify=targets[rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other at this size, and round otherwise
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureNet(images.shape[-1], min(SIDE, images.shape[1]), len(values))
        _train(network, images, targets, np.sort(fitted))
    torch.set_num_threads(threads)
    network.eval().requires_grad_(False)
    guesses = [network.head(network(batch.float())).argmax(1) for batch in unit_batches(images, rows=np.sort(held_out))]
    network.accuracy = float(np.mean(torch.cat(guesses).numpy() == targets[np.sort(held_out)]))
    network.held_out = len(held_out)
    return network


def _train(network: FeatureNet, images: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> None:
    """AdamW on a one-cycle schedule, random shifts by up to a sixteenth of the side."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    side = images.shape[1]
    for _ in range(STEPS):
        chosen = rows[torch.randint(len(rows), (BATCH,)).numpy()]
        batch = torch.cat(list(unit_batches(images, rows=np.sort(chosen))))
        shift = torch.randint(-(side // 16), side // 16 + 1, (2,)).tolist()
        logits = network.head(network(batch.float().roll(shift, (-2, -1))))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(targets[np.sort(chosen)]), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def save(network: FeatureNet, path: Path) -> None:
    """Write safetensors, with what it takes to build the network again and how good it is."""
    facts = {"sizes": network.sizes, "accuracy": network.accuracy, "held_out": network.held_out}
    with whole(path) as aside:
        save_file(network.state_dict(), aside, metadata={"network": json.dumps(facts)})


def load(path: Path) -> FeatureNet:
    """What `save` wrote."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["network"])
        network = FeatureNet(*facts["sizes"])
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    network.accuracy, network.held_out = facts["accuracy"], facts["held_out"]
    return network.eval().requires_grad_(False)
