"""A run's best model on a hub: its files, and a card that says what was measured."""

import json
import os
from pathlib import Path

from ..config import CFG
from ..environment import git_commit
from ..errors import UserError
from ..hub import HUB_FILES, hub_access, is_function

# Settings that are paths: the card leaves them out
_LOCAL = ("captions_path", "valid_captions_path", "test_captions_path", "image_path", "cache_path", "run_dir", "resume")


def push(best: Path, name: str, card: str) -> str:
    """Upload a `best/` folder and its card in one commit to the model `name`, which is made; returns the address.

    Raises UserError where the hub cannot be reached or refuses, and for encoders of the user's own.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    settings = json.loads((best / "config.json").read_text())
    for code in filter(is_function, (settings["model_name"], settings["text_encoder_model"])):
        raise UserError(f"{code} is code, and models on a hub come without: share the folder itself")
    public = {key: _public(key, value) for key, value in settings.items()}
    contents = {"config.json": json.dumps(public, indent=2).encode(), "README.md": card.encode()}
    files = {file.name: file for pattern in HUB_FILES for file in sorted(best.glob(pattern))}
    operations = [CommitOperationAdd(path, content) for path, content in (files | contents).items()]
    with hub_access(f"permission to write {name!r}", "Log in with `hf auth login`, and name it USER/NAME"):
        api = HfApi()
        url = api.create_repo(name, exist_ok=True)
        api.create_commit(name, operations, commit_message="clip_scratch model")
    return str(url)


def _public(key: str, value: object) -> object:
    """A setting without the folders of this machine: of a path its last part."""
    if key == "image_weights" and "+" in value:
        return "+".join(_public(key, file) for file in value.split("+"))
    is_path = key in _LOCAL or (isinstance(value, str) and os.path.isabs(os.path.expanduser(value)))
    return Path(value).name if is_path else value


def model_card(name: str, cfg: CFG, data: str, table: str, licence: str) -> str:
    """The README.md of a model: what it was trained on is `data`, what was measured on its validation split `table`."""
    changed = {key: value for key, value in vars(cfg).items() if value != getattr(CFG, key) and key not in _LOCAL}
    settings = "\n".join(f"{key}: {_public(key, value)}" for key, value in changed.items())
    towers = " and ".join(str(_public("", tower)) for tower in (cfg.model_name, cfg.text_encoder_model))
    title = name.rpartition("/")[2]
    return f"""---
library_name: clip_scratch
pipeline_tag: zero-shot-image-classification
tags: [clip, image-text-retrieval]
license: {licence or "other"}
---

# {title}

A dual encoder of images and sentences: {towers}, {cfg.projection_dim} dimensions.

```python
from clip_scratch import load
from clip_scratch.retrieval.embed import encode_image, encode_text

model = load("hub:{name}")
cosines = encode_image(model, ["photo.jpg"]) @ encode_text(model, ["a dog", "a cat"]).T
```

## Data

{data} {"Licence: " + licence + "." if licence else "Its licence was not stated."}

## Measured

On the validation split, which training chose the best epoch by, so that the figures are a little optimistic. One row an
image, its captions as a set, ties count against the model (the protocol of clip_benchmark); 95 % intervals are of a
bootstrap over images.

{table}

## Limits

It knows what its captions say and little else; words and scenes outside of them give meaningless scores. It carries the
biases of its data. Nobody has tested it for anything but retrieval.

## Settings

clip_scratch {git_commit() or ""}; what differs from the defaults:

```text
{settings}
```
"""
