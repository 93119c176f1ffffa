"""The notebooks, executed at small sizes by a kernel of this interpreter, each in an empty folder of its own."""

import base64
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
spec = importlib.util.spec_from_file_location("run_notebooks", NOTEBOOKS / "run.py")
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)
source_hash = run_notebooks.source_hash
# In place of the cell that is tagged "settings"
SMALL = 'RUN = ""\nN_SCENES, EPOCHS = 100, 1\n'
SMALL += "from clip_scratch.presets import Scenes\nScenes.size, Scenes.minutes = 32, 0\ndel Scenes"
KERNEL = "clip-scratch-tests"
SMALL_CLIP = 'MODEL = "models/clip"\nCAPTIONS = IMAGES = ""\nN_SCENES, EPOCHS = 100, 1'


RESET = """
%reset -f
import os, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "clip_scratch"]:
    del sys.modules[name]
os.chdir({!r})
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel for all notebooks, since importing the libraries takes longer than they do. It keeps nothing else."""
    home = tmp_path_factory.mktemp("kernel")
    folder = home / "jupyter" / "kernels" / KERNEL
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": KERNEL, "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home / "jupyter"))  # no installed kernel can stand in
        patch.setenv("JUPYTER_RUNTIME_DIR", str(home / "runtime"))
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures as outputs
        patch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]))
        client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=240, kernel_name=KERNEL)
        with client.setup_kernel():
            yield client


@pytest.fixture
def execute(tmp_path, kernel):
    """Run a notebook in `tmp_path / "work"`, and return it with its outputs."""
    work = tmp_path / "work"
    work.mkdir()

    def run(name, small=SMALL):
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        [settings] = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]
        settings.source = small
        reset = nbformat.v4.new_code_cell(RESET.format(str(work)))
        for cells in (nbformat.v4.new_notebook(cells=[reset]), notebook):
            kernel.nb = cells
            kernel.execute(cleanup_kc=False)  # raises CellExecutionError where a cell does
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        return notebook

    run.work = work
    return run


def text_of(cell):
    """What a cell printed and what it returned, as text."""
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join(parts)


def cell_with(notebook, words):
    [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    return cell


def pictures(cell):
    data = [o.get("data", {}) for o in cell.outputs]
    return [parts[kind] for parts in data for kind in ("image/png", "image/jpeg") if kind in parts]


def test_there_are_notebooks():
    assert {"01_train.ipynb", "02_find_matches.ipynb", "03_swap_encoders.ipynb", "04_finetune_hf_clip.ipynb"} <= {
        path.name for path in PATHS
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_code(path):
    """Committed as notebooks/run.py leaves them: people read notebooks before they run them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        message = f"{path.name} has outputs of other code: python notebooks/run.py {path.stem}"
        assert cell.metadata.get("source_hash") == source_hash(cell), message
        assert not [
            output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
        ]
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) // 2
    assert not re.search(r"/(home|root|tmp|Users|work)/", path.read_text())


@pytest.mark.slow
def test_train_then_find(execute):
    trained = execute("01_train.ipynb")
    assert "Did you mean epochs" in text_of(cell_with(trained, "Scenes.epoch = 3"))
    assert len(pictures(cell_with(trained, "plt.subplots(1, 4"))) == 1
    assert len(pictures(cell_with(trained, "metrics.jsonl"))) == 1
    assert "test: 10 images, 50 captions" in text_of(cell_with(trained, "evaluate(run"))
    assert sorted(p.name for p in execute.work.iterdir()) == ["data", "runs"]
    [run] = (execute.work / "runs").iterdir()

    found = execute("02_find_matches.ipynb", 'RUN = ""')  # takes the run that 01 made
    assert f"searching with runs/{run.name}" in text_of(cell_with(found, "searching with"))
    [query] = [cell for cell in found.cells if "query" in cell.metadata.get("tags", [])]
    [png] = pictures(query)
    assert base64.b64decode(png).startswith(b"\x89PNG\r\n\x1a\n")
    assert (execute.work / "indexes/queries.jpg").is_file()
    assert len(text_of(cell_with(found, "find_captions(model")).splitlines()) >= 5
    assert len(pictures(cell_with(found, "Index.open"))) == 1 and len(pictures(cell_with(found, "explain(model"))) == 1


@pytest.mark.slow
def test_find_without_a_run(execute):
    """With the released model; of fewer scenes than it was trained on."""
    few = 'RUN = ""\nfrom clip_scratch.models import saved\n_read = saved.run_config\n'
    few += "saved.run_config = lambda folder: dataclasses.replace(_read(folder), n_scenes=100)"
    found = execute("02_find_matches.ipynb", f"import dataclasses\n{few}")
    assert "searching with scenes-tiny" in text_of(cell_with(found, "searching with"))
    [query] = [cell for cell in found.cells if "query" in cell.metadata.get("tags", [])]
    assert len(pictures(query)) == 1 and not (execute.work / "runs").exists()


@pytest.mark.slow
def test_swap_encoders(execute):
    swapped = execute("03_swap_encoders.ipynb")
    assert len(list((execute.work / "runs").glob("swap-*/best/model.safetensors"))) == 3
    table = text_of(cell_with(swapped, "pd.DataFrame(rows)"))
    for row in ("as the preset", "another image encoder", "another text encoder", "four convolutions"):
        assert row in table


@pytest.mark.slow
def test_finetune_a_pretrained_clip(execute, hf_clip):
    shutil.copytree(hf_clip("clip"), execute.work / "models/clip")
    tuned = execute("04_finetune_hf_clip.ipynb", SMALL_CLIP)
    runs = [path.parent for path in (execute.work / "runs").glob("clip-*/*/best")]
    assert {run.name for run in runs} == {"zero-shot", "last-1"}
    table = text_of(cell_with(tuned, "print(comparison.text())"))
    assert "zero-shot clip" in table and "last-1" in table and "95 % interval" in table
    assert len(pictures(cell_with(tuned, "comparison.chart("))) == 1
    assert len(pictures(cell_with(tuned, "find_matches(model"))) == 1
    assert text_of(cell_with(tuned, "classify(model")).count("%") == 3
