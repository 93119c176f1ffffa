"""What a trained run gains at search time alone: recall on two halves of its validation images.

    python -m benchmarks.at_search_time --run runs/compact

larger     images of more pixels than in training, where crops had made things look larger (FixRes, arXiv:1906.06423)
flip       the mean of an image's embedding and its mirror image's
hubness    less the mean of the largest cosines with training captions (for an image) or images (for a caption): NNN
           (arXiv:2410.24114)

A row is chosen on the first half (a fixed permutation) and confirmed on the other, each searched by itself; in brackets
the 95 % interval of the difference to the first row, by a paired bootstrap over images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from clip_scratch import encode_text, load
from clip_scratch.data.loaders import build_loaders
from clip_scratch.data.source import open_data
from clip_scratch.device import keep_freed_memory
from clip_scratch.evaluation.bootstrap import interval, resampled_recalls
from clip_scratch.evaluation.retrieval import ranks

from .batch_size import hits


@dataclass
class Arguments:
    """Compare ways to search with one model."""

    run: str
    captions_path: str = ""  # of the same data set elsewhere
    larger: tuple[int, ...] = (256, 288, 320)
    nearest: tuple[int, ...] = (16, 128)  # of the bank
    weights: tuple[float, ...] = (0.5, 0.75)  # of the hubness


@dataclass
class Embedded:
    """N images (N, P), their captions (C, P) and the image of each (C,), and what is taken from their cosines."""

    images: torch.Tensor
    texts: torch.Tensor
    own: torch.Tensor
    hub_images: torch.Tensor  # (N,)
    hub_texts: torch.Tensor  # (C,)


@torch.inference_mode()
def embed_images(model, data, flip: bool = False) -> torch.Tensor:
    """The images of a data set, (N, P)."""
    parts = []
    for rows in torch.arange(len(data)).split(64):
        pixels = data.pixels(0, rows.tolist())
        embedded = model.encode_image(pixels)
        parts.append(F.normalize(embedded + model.encode_image(pixels.flip(-1)), dim=1) if flip else embedded)
    return torch.cat(parts)


def hubness(queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """The mean of the k largest cosines of each row with a bank, (N,)."""
    return torch.cat([(part @ bank.T).topk(k).values.mean(1) for part in queries.split(256)])


def of_half(found: Embedded, half: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Hits and queries of each image of a half, searched by itself: (n, 6), (n, 6)."""
    captions = torch.isin(found.own, half).nonzero().flatten()
    images, texts, own = found.images[half], found.texts[captions], torch.searchsorted(half, found.own[captions])

    def less(vectors: torch.Tensor, hub: torch.Tensor) -> torch.Tensor:
        """With a column that a 1 in the other vectors takes from every cosine."""
        return torch.cat([vectors, -hub[:, None]], 1)

    def with_one(vectors: torch.Tensor) -> torch.Tensor:
        return torch.cat([vectors, torch.ones(len(vectors), 1)], 1)

    image_rank, _ = ranks(less(images, found.hub_images[half]), with_one(texts), own)
    _, text_rank = ranks(with_one(images), less(texts, found.hub_texts[captions]), own)
    return hits(image_rank, text_rank, own.numpy(), len(half))


def main(arguments: Arguments) -> None:
    """Print the table."""
    keep_freed_memory()
    model = load(arguments.run, "cpu").eval()
    cfg = model.cfg
    if arguments.captions_path:
        cfg = dataclasses.replace(cfg, captions_path=arguments.captions_path, image_path="")
    source = open_data(cfg)

    def data(split: str, size: int = cfg.size):
        settings = dataclasses.replace(source.cfg, size=size, image_cache=False)
        return build_loaders(source.split(split), model.tokenizer, "valid", settings).dataset

    def texts(split: str, of) -> torch.Tensor:  # image after image
        return encode_text(model, source.split(split)["caption"].to_numpy()[of.rows])

    valid, train = data("valid"), data("train")
    own = torch.arange(len(valid)).repeat_interleave(torch.from_numpy(valid.counts).long())
    no_hubs = torch.zeros(len(valid)), torch.zeros(len(own))
    plain = Embedded(embed_images(model, valid), texts("valid", valid), own, *no_hubs)
    rows = {f"as trained, {cfg.size} pixels": plain}
    rows |= {
        f"{size} pixels": dataclasses.replace(plain, images=embed_images(model, data("valid", size)))
        for size in arguments.larger
    }
    rows["flip"] = dataclasses.replace(plain, images=embed_images(model, valid, flip=True))
    banks = embed_images(model, train), texts("train", train)
    for k in arguments.nearest:
        hub_images, hub_texts = hubness(plain.images, banks[1], k), hubness(plain.texts, banks[0], k)
        for weight in arguments.weights:
            hubs = {"hub_images": weight * hub_images, "hub_texts": weight * hub_texts}
            rows[f"hubness, {k} nearest, weight {weight:g}"] = dataclasses.replace(plain, **hubs)

    n = len(valid)
    halves = [half.sort().values for half in torch.randperm(n, generator=torch.Generator().manual_seed(0)).chunk(2)]
    base: list[np.ndarray] = []
    print("| | first half | other half | R@1 |\n|---|---|---|---|")
    for name, found in rows.items():
        line = f"| {name} "
        for number, half in enumerate(halves):
            hit, sizes = of_half(found, half)
            samples = 100 * resampled_recalls(hit, sizes).sum(1)
            base += [samples] if len(base) <= number else []
            low, high = interval(samples - base[number])
            difference = f" [{low:+.1f}, {high:+.1f}]" if found is not plain else ""
            line += f"| {100 * (hit.sum(0) / sizes.sum(0)).sum():.1f}{difference} "
        hit, sizes = of_half(found, torch.arange(n))
        recalls = 100 * hit.sum(0) / sizes.sum(0)
        print(f"{line}| {recalls[0]:.1f} / {recalls[3]:.1f} |", flush=True)


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.at_search_time")))
