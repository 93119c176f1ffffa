"""Run the notebooks and save them with their outputs: python notebooks/run.py [NAME ...].

Each code cell gets the hash of its source in its metadata, so that a test can tell when code and outputs are out of
step. Progress bars and warnings (stderr) are not saved.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent


def source_hash(cell) -> str:
    """The hash of a code cell's source, as it is saved in the cell's metadata."""
    return hashlib.sha256(cell.source.encode()).hexdigest()[:16]


def run(path: Path) -> None:
    """Execute a notebook in the folder of notebooks, and save it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.metadata["source_hash"] = source_hash(cell)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            print(path.name)
            run(path)
