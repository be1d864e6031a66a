"""Execute notebooks in place, `python notebooks/refresh.py notebooks/tutorials/*.ipynb`: how tutorials get outputs.

Only what the cells print and draw is written: no times, no state of widgets, no version of the interpreter. So the
same code gives the same bytes on the same machine.
"""

import sys
from pathlib import Path

from wddm.workbook.report import WIDGET


def refresh(path: Path) -> None:
    """Execute one notebook in its own folder, as nbval does, and write it with outputs; an error writes nothing."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # dead without its kernel; the picture beside it stays
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        refresh(Path(name))
