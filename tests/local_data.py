"""Small data sets that the tests write to disk."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from wddm import data


def pictures(count: int = 23, side: int = 16, seed: int = 0) -> np.ndarray:
    """Noise, uint8 (count, side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def write_shard(file: Path, cells: list[bytes], labels=None, *, column: str = "img", names=("cat", "dog"), **options):
    """A Parquet file with the columns, encodings and metadata that `datasets` writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features
    from datasets import Image as ImageColumn

    features, table = {column: ImageColumn()}, {column: [{"bytes": cell, "path": None} for cell in cells]}
    if labels is not None:
        features["label"], table["label"] = ClassLabel(names=list(names)), labels
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table, schema=Features(features).arrow_schema), file, **options)


def write_table(file: Path, cells: list, **columns) -> Path:
    """A Parquet file without metadata, as other writers than `datasets` leave it; the folder that it is in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image, **columns}), file)
    return file.parent


def hub_copy(folder: Path, images: np.ndarray) -> Path:
    """Two shards of `train` and one of `test` in a folder below; an image's label is the parity of its first value."""
    for name, part in (("train-00000-of-00002", images[:13]), ("train-00001-of-00002", images[13:]),
                       ("test-00000-of-00001", images[:1])):  # fmt: skip
        labels = (part[:, 0, 0, 0] % 2).tolist()
        write_shard(folder / "plain_text" / f"{name}.parquet", [encoded(image) for image in part], labels)
    return folder


def png_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def prepare(dataset: str, resolution: int, root: Path, **settings) -> data.Dataset:
    return data.prepare(dataset, resolution, root, progress=False, **settings)
