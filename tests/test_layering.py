"""The layout of DESIGN.md, section 2: imports are a chain and light; files and functions stay short."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Command

import clip_scratch

PACKAGE = Path(clip_scratch.__file__).parent
# Each room may import the ones before it in the chain, but not those beside it; the base modules share one place
CHAIN = (
    ("errors", "files", "device", "environment", "config", "presets", "hub"),
    ("data",),
    ("models",),
    ("exporting", "retrieval"),
    ("evaluation",),
    ("training",),
)
PLACE = {room: place for place, rooms in enumerate(CHAIN) for room in rooms}
VERBS = {path.stem for path in PACKAGE.glob("*.py")} - PLACE.keys() - {"__init__"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def may_import(room, other):
    if room in VERBS:
        return True
    if room == other or (PLACE[room] == 0 and other in CHAIN[0]):
        return True
    return other in PLACE and PLACE[other] < PLACE[room]


def imported_rooms(source, path):
    """(line, room) of every import of our own in a file: inside functions and for types too."""
    package = ("clip_scratch", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "clip_scratch" and len(name) > 1:
                yield node.lineno, name[1]


def room_of(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in PLACE.keys() | VERBS, f"{path}: DESIGN.md has no such package"
    for line, other in imported_rooms((PACKAGE / path).read_text(encoding="utf-8"), path):
        assert other in PLACE.keys() | VERBS, f"{path}:{line} imports {other} from the package itself"
        assert may_import(room, other), f"{path}:{line}: {room} must not import {other}"


@pytest.mark.parametrize(
    ("path", "source", "rooms"),
    [
        ("evaluation/x.py", "def f():\n    from ..training.engine import train_epoch", ["training"]),
        ("data/x.py", "if TYPE_CHECKING:\n    from ..models.clip import CLIPModel", ["models"]),
        ("data/scenes/x.py", "from ...errors import UserError\nfrom .write import Scene", ["errors", "data"]),
        ("models/x.py", "import clip_scratch.retrieval.embed\nfrom clip_scratch import cli", ["retrieval", "cli"]),
        ("hub.py", "from . import config\nimport torch", ["config"]),
    ],
)  # fmt: skip
def test_this_test_sees_every_kind_of_import(path, source, rooms):
    assert [room for _, room in imported_rooms(source, Path(path))] == rooms


def test_the_chain():
    assert may_import("evaluation", "exporting") and may_import("training", "evaluation") and may_import("train", "cli")
    for room, other in (
        ("exporting", "retrieval"), ("retrieval", "exporting"), ("evaluation", "training"), ("data", "models"),
        ("config", "data"), ("training", "train"), ("models", "evaluation"),
    ):  # fmt: skip
        assert not may_import(room, other), (room, other)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    source = (PACKAGE / path).read_text(encoding="utf-8")
    assert source.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{node.name}, line {node.lineno}"


def test_public_names_are_nouns_and_there():
    for name in clip_scratch.__all__:
        assert getattr(clip_scratch, name) is not None
        assert getattr(getattr(clip_scratch, name), "__module__", "").partition(".")[2].partition(".")[0] not in VERBS
    assert {"CFG", "CLIPModel", "load", "encode_image", "encode_text", "make_train_valid_dfs", "build_loaders",
            "get_image_embeddings", "find_matches", "find_captions", "classify"} <= set(dir(clip_scratch))  # fmt: skip
    with pytest.raises(AttributeError, match="attribute find_match"):
        _ = clip_scratch.find_match


def loaded_by(code):
    out = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return set(out.stdout.split())


@pytest.mark.parametrize("code", ["import clip_scratch", "from clip_scratch import CFG, PRESETS, UserError"])
def test_importing_the_package_is_light(code):
    """Far below the time of torch, since neither it nor another large library is loaded."""
    loaded = loaded_by(code)
    assert not {f"clip_scratch.{verb}" for verb in VERBS} & loaded
    heavy = {"torch", "numpy", "timm", "transformers", "albumentations", "cv2", "PIL", "pandas"}
    heavy |= {"matplotlib", "sklearn", "torchvision", "datasets", "tyro", "tqdm", "safetensors"}
    assert not heavy & loaded


def test_the_model_brings_no_library_of_the_data_files():
    assert not {"pandas", "matplotlib", "sklearn", "datasets"} & loaded_by("import clip_scratch.training.losses")


def test_functions_named_like_verbs_stay_functions(tmp_path):
    """Importing the verb `clip_scratch.classify` would put the module in the place of the public function."""
    code = "import clip_scratch; from clip_scratch.classify import main; import clip_scratch.compare"
    code += "; from clip_scratch import classify, compare; assert classify.__module__.endswith('zero_shot')"
    forget = "import sys\nfor name in [name for name in sys.modules if name.startswith('clip_scratch')]:\n"
    (tmp_path / "verbs.py").write_text(f"{forget}    del sys.modules[name]\n{code}; print(type(compare))")
    done = Command(["verbs.py"], tmp_path).wait()
    assert done.stdout == "<class 'function'>\n", done.stderr


def test_public_names_are_typed():
    """The type checkers' stub names what the package gives, and every parameter and result is annotated."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    named = [alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(named) == sorted(clip_scratch.__all__) and (PACKAGE / "py.typed").is_file()
    for function in filter(inspect.isfunction, (getattr(clip_scratch, name) for name in named)):
        signature = inspect.signature(function)
        untyped = [name for name, p in signature.parameters.items() if p.annotation is inspect.Parameter.empty]
        assert not untyped and signature.return_annotation is not inspect.Signature.empty, function
