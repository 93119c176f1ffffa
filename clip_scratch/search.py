"""Search with a run: `python -m clip_scratch.search RUN "two dogs in the snow" [--images FOLDER] [--save F.png]`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from .errors import UserError, run_command


@dataclass
class Arguments:
    """Find the images that fit a sentence, or the captions that fit an image."""

    run: Positional[str]  # run folder, or its best/
    query: Positional[str]  # a sentence, or the path of an image
    images: str = ""  # folder to search, with all below it; empty: the run's validation images
    n: int = 9  # how many to show
    save: str = ""  # write the grid of the images found to this PNG
    device: str = "auto"  # cpu, cuda, ...; auto: the best available


def main(arguments: Arguments) -> None:
    """Print the best matches with their cosine scores, and draw them where asked."""
    from .data.captions import read_captions, split_of
    from .data.images import IMAGE_SUFFIXES, images_below
    from .files import check_target
    from .models.saved import load
    from .retrieval.embed import encode_image, trained_folder
    from .retrieval.matches import find_captions, find_matches

    by_image = Path(arguments.query).suffix.lower() in IMAGE_SUFFIXES
    if by_image and arguments.images:
        raise UserError("an image as the query finds captions of the run's validation images: leave out --images")
    check_target(arguments.save)
    model = load(arguments.run, arguments.device)
    if arguments.images:
        folder = Path(arguments.images)
        names, on_bad_image = images_below(folder), "skip"
    else:
        table = split_of(read_captions(model.cfg), "valid", model.cfg.captions_path)
        if by_image:
            for caption, score in find_captions(model, arguments.query, table["caption"].tolist(), arguments.n):
                print(f"{score:6.3f}  {caption}")
            return
        folder = trained_folder(model.cfg, table)
        names, on_bad_image = table["image"].drop_duplicates().tolist(), model.cfg.on_bad_image
    embeddings = encode_image(model, [folder / name for name in names], progress=True, on_bad_image=on_bad_image)
    matches = find_matches(model, embeddings, arguments.query, names, arguments.n, folder, arguments.save)
    print(matches)
    if arguments.save:
        print(f"written: {arguments.save}")


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.search")))
