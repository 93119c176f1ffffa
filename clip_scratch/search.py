"""Search with a run: `python -m clip_scratch.search RUN "two dogs in the snow" [--images FOLDER] [--save F.png]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from .errors import UserError, run_command

_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class Arguments:
    """Find the images that fit a sentence, or the captions that fit an image."""

    run: Positional[str]  # run folder, or its best/
    query: Positional[str]  # a sentence, or the path of an image
    images: str = ""  # folder to search, with all below it; empty: the run's validation images
    n: int = 9  # how many to show
    save: str = ""  # write the grid of images found to this PNG


def images_below(folder: Path) -> list[str]:
    """The image files below a folder, as sorted paths relative to it. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to search")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in _ENDINGS)
    if not names:
        raise UserError(f"there are no images below {folder}")
    return names


def main(arguments: Arguments) -> None:
    """Print the best matches with their cosine scores, and draw them where asked."""
    from .data.captions import image_folder, read_captions, split_of
    from .models.saved import load
    from .retrieval.embed import encode_image
    from .retrieval.matches import find_captions, find_matches

    model = load(arguments.run)
    if Path(arguments.query).suffix.lower() in _ENDINGS:
        table = split_of(read_captions(model.cfg), "valid", model.cfg.captions_path)
        for caption, score in find_captions(model, arguments.query, table["caption"].tolist(), arguments.n):
            print(f"{score:6.3f}  {caption}")
        return
    if arguments.images:
        folder = Path(arguments.images)
        names = images_below(folder)
    else:
        table = split_of(read_captions(model.cfg), "valid", model.cfg.captions_path)
        folder = image_folder(model.cfg, table)
        names = table["image"].drop_duplicates().tolist()
    embeddings = encode_image(model, [folder / name for name in names], progress=True)
    matches = find_matches(
        model, embeddings, arguments.query, names, arguments.n, image_path=folder, save=arguments.save or None
    )
    print(matches)
    if arguments.save:
        print(f"written: {arguments.save}")


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.search")))
