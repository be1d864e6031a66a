"""parquet: the images and labels in Parquet files as on the Hugging Face Hub, read in flat memory.

By pyarrow and not by `datasets`, which copies the files to Arrow ones and maps those into memory: reading 100,000
images of 64x64 so peaks at three times the memory.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from wddm.decoding import Item

CHUNK_BYTES = 2**22  # that a chunk of encoded images takes, on average


def images(files: list[Path]) -> tuple[int, Callable[[np.ndarray, int], Iterator[list[Item]]], list[str] | None]:
    """How many images the first column of images holds, the reader of a `Source`, and the names of the labels.

    Raises:
        ValueError: a file is no Parquet, is cut off, or holds other columns than the first.
    """
    import pyarrow as pa
    from datasets import ClassLabel, Features

    opened = [_open(file).metadata for file in files]
    counts, (schema, *others) = [one.num_rows for one in opened], [one.schema.to_arrow_schema() for one in opened]
    holds = [pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 for kind in schema.types]
    if not any(holds):
        raise ValueError(f"got columns {schema.names} in {files[0]}, wanted one of images: give other files")
    feature = Features.from_arrow_schema(schema).get("label")
    labelled = feature is not None and pa.types.is_integer(schema.field("label").type)
    columns = [schema.names[holds.index(True)], *["label"] * labelled]
    for file, other in zip(files[1:], others, strict=True):
        if not set(columns) <= set(other.names):
            raise ValueError(f"got columns {other.names} in {file}, wanted those of {files[0]}: separate them")
    stored = sum(one.row_group(i).total_byte_size for one in opened for i in range(one.num_row_groups))

    def read(rows: np.ndarray, size: int) -> Iterator[list[Item]]:
        first, size = 0, max(1, min(size, CHUNK_BYTES * sum(counts) // max(1, stored)))
        for file, count in zip(files, counts, strict=True):
            chosen = rows[slice(*np.searchsorted(rows, (first, first + count)))] - first
            if len(chosen):
                yield from _items(file, columns, chosen, size)
            first += count

    return sum(counts), read, feature.names if isinstance(feature, ClassLabel) else None


def _items(file: Path, columns: list[str], rows: np.ndarray, size: int) -> Iterator[list[Item]]:
    """Chunks of the given rows of one file; columns: of images, perhaps of labels."""
    import pyarrow as pa

    first = 0
    try:
        for batch in _open(file).iter_batches(size, columns=columns):
            part = rows[slice(*np.searchsorted(rows, (first, first + len(batch))))]
            taken = zip(part, batch.take(pa.array(part - first)).to_pylist(), strict=True)
            cells = [(row, cell[columns[0]] or {}, cell.get("label")) for row, cell in taken]
            yield [
                (cell.get("bytes"), label, f"{file}, row {row} {cell.get('path') or ''}".rstrip())
                for row, cell, label in cells
            ]
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"got {file}, which is damaged after row {first} ({message}): fetch it again") from None


def _open(file: Path):
    """pyarrow's reader, which so holds some pages of a file in memory, where by default it holds a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"got {file}, wanted a whole Parquet file ({message}): fetch it again") from None
