"""The house of DESIGN.md: verbs on top, nouns below, imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clip_scratch

PACKAGE = Path(clip_scratch.__file__).parent
FLOORS = {
    **dict.fromkeys(["errors", "config", "hub"], 0),
    "data": 1,
    "models": 2,
    **dict.fromkeys(["training", "evaluation", "retrieval"], 3),
}
VERBS = {path.stem for path in PACKAGE.glob("*.py")} - FLOORS.keys() - {"__init__"}
FLOORS |= dict.fromkeys(VERBS, 4)
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
    return path.parts[0].removesuffix(".py")


def imported_rooms(path):
    """(line, room) of every import of our own in a file, those inside functions too."""
    package = ("clip_scratch", *path.parts[:-1])
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
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


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    assert room(path) in FLOORS, f"{path}: a room that DESIGN.md does not know"
    for line, other in imported_rooms(path):
        assert other in FLOORS, f"{path}:{line} imports {other} from the package itself"
        assert FLOORS[other] <= FLOORS[room(path)], f"{path}:{line} imports {other}, which stands above it"


def test_this_test_sees_imports():
    assert {other for _, other in imported_rooms(Path("models/clip.py"))} == {"config", "data", "errors", "models"}
    assert {"errors"} <= {other for _, other in imported_rooms(Path("config.py"))}


def test_public_names_are_nouns_and_there():
    for name in clip_scratch.__all__:
        assert getattr(clip_scratch, name) is not None
        assert clip_scratch._HOME[name].partition(".")[0] not in VERBS, name
    assert {"CFG", "CLIPModel", "load", "encode_image", "encode_text", "make_train_valid_dfs", "build_loaders",
            "get_image_embeddings", "find_matches", "find_captions", "classify"} <= set(dir(clip_scratch))  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'find_match'"):
        _ = clip_scratch.find_match


def loaded_by(code):
    out = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return set(out.stdout.split())


@pytest.mark.parametrize("code", ["import clip_scratch", "from clip_scratch import CFG, UserError"])
def test_importing_the_package_is_light(code):
    loaded = loaded_by(code)
    assert not {f"clip_scratch.{verb}" for verb in VERBS} & loaded
    heavy = {
        "timm",
        "transformers",
        "albumentations",
        "pandas",
        "matplotlib",
        "sklearn",
        "torchvision",
        "datasets",
        "tyro",
    }
    assert not heavy & loaded


def test_the_model_brings_no_library_of_the_data_files():
    assert not {"pandas", "matplotlib", "sklearn", "datasets"} & loaded_by("import clip_scratch.training.losses")
