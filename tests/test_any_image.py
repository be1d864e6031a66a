"""From images of any kind to a report: grey files, an array of five channels, photographs that are not square."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import wddm
from PIL import Image

from wddm.plots import shown_channels

TINY = {
    "widths": "[8]", "layers_per_block": 1, "attention_levels": "[]", "batch_size": 8, "train_kimg": 0.016,
    "warmup_kimg": 0, "sampling_steps": 2, "eta": 0, "num_samples": 32, "fwd_level": 4,
}  # fmt: skip


def smooth(*shape: int) -> np.ndarray:
    """Images uint8 (N, H, W, C) that differ, brighter to the right and, by channel, to the bottom."""
    count, height, width, channels = shape
    across, down = np.linspace(0, 90, width), np.linspace(0, 90, height)[:, None, None]
    ramp = across[:, None] + down * np.linspace(0, 1, channels)
    return (ramp + np.linspace(0, 70, count)[:, None, None, None]).astype(np.uint8)


def grey(folder: Path) -> None:
    for i, image in enumerate(smooth(64, 16, 16, 1)[..., 0]):
        Image.fromarray(image).save(folder / f"{i}.png")


def five(folder: Path) -> None:
    np.save(folder / "bands.npy", smooth(64, 16, 16, 5))


def photographs(folder: Path) -> None:
    """Photographs in several sizes, all with the aspect ratio 3:4 of 48x64."""
    for i, image in enumerate(smooth(80, 48, 64, 3)):
        picture, scale = Image.fromarray(image), 1 + i % 3
        picture.resize((64 * scale, 48 * scale), Image.Resampling.NEAREST).save(folder / f"{i}.jpg", quality=95)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape", "options"),
    [
        (grey, (16, 16, 1), {"level": 1}),
        (five, (16, 16, 5), {"level": 2}),
        (photographs, (48, 64, 3), {"level": 2, "width": 64, "num_samples": 48}),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_images_of_any_kind_become_a_report(root: Path, make, shape: tuple[int, int, int], options: dict) -> None:
    name = make.__name__
    (root / name).mkdir()
    make(root / name)
    (root / f"params/{name}.yaml").write_text("dataset: folder\n")
    given = {"dataset_path": name, "resolution": shape[0], **TINY, **options}
    done = wddm(root, "run", f"params/{name}.yaml", **given)
    assert done.returncode == 0, done.stdout + done.stderr
    report = root / "reports" / name
    states = json.loads((report / "status.json").read_text())
    assert [entry["state"] for entry in states.values()] == ["ok"] * 4
    (prepared,) = (root / "data").glob("folder-*/images.npy")
    images, samples = np.load(prepared), np.load(root / "runs" / name / "samples.npy")
    prepared.parent.rename(root / f"{name}-prepared")
    assert images.shape[1:] == samples.shape[1:] == shape and len(samples) == given["num_samples"]
    # nothing is squashed and no channel mixed up: the ramps across and down are there, channel by channel
    wanted = smooth(len(images), *shape).mean((0, 1, 2)), smooth(1, *shape)[0].astype(float).mean(-1)
    np.testing.assert_allclose(images.mean((0, 1, 2)), wanted[0], atol=1)
    flat = images.mean((0, 3)) - images.mean()
    np.testing.assert_allclose(flat, wanted[1] - wanted[1].mean(), atol=2)
    network = json.loads((root / "runs" / name / "pipeline/backbone/config.json").read_text())
    factor = 2 ** options["level"]
    assert network["in_channels"] == network["out_channels"] == shape[2] * factor**2
    size = network["sample_size"]
    assert (size if isinstance(size, list) else [size, size]) == [shape[0] // factor, shape[1] // factor]
    said = shown_channels(shape[2]).strip()
    assert bool(said) is (shape[2] == 5)
    for notebook, figures in (("01_prepare", ("data",)), ("03_sample", ("samples", "trajectory")),
                              ("04_evaluate", ("real-and-generated", "neighbours"))):  # fmt: skip
        cells = json.loads((report / f"{notebook}.ipynb").read_text())["cells"]
        shown = [
            output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
        ]
        captions = {"".join(one["data"]["text/plain"]): one["metadata"]["image/png"]["alt"] for one in shown}
        for figure in figures:
            (caption,) = [text for name, text in captions.items() if name.endswith(f"figures/{figure}.png]")]
            assert said in caption if said else "Shown of" not in caption
        assert all((report / f"figures/{figure}.png").exists() for figure in figures)
    metrics = json.loads((report / "metrics.json").read_text())
    assert np.isfinite(metrics["fwd"]) and np.isfinite(metrics["fwd_floor"])
