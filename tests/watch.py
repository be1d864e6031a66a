"""`python tests/watch.py x.ipynb key=value...` executes a notebook and prints every message that shows something.

A line of JSON each: [index of the cell, kind of the message, id of the display, kinds of content].
"""

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


class Watched(NotebookClient):
    def process_message(self, message: Any, cell: Any, cell_index: int) -> Any:
        content = message["content"]
        if message["msg_type"] in ("display_data", "update_display_data", "stream"):
            place = content.get("transient", {}).get("display_id")
            print(json.dumps([cell_index, message["msg_type"], place, sorted(content.get("data", ()))]), flush=True)
        return super().process_message(message, cell, cell_index)


if __name__ == "__main__":
    notebook = nbformat.read(sys.argv[1], as_version=4)
    (at,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells[at].source += "\n" + "\n".join(sys.argv[2:])
    Watched(notebook, resources={"metadata": {"path": str(Path(sys.argv[1]).parent)}}).execute()
