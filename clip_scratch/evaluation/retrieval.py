"""Recall both ways in clip_benchmark's protocol: one row per distinct image, any number of captions each."""

from collections.abc import Sequence

import torch

from ..errors import UserError

TIE = 1e-9  # cosines this near are equal: float64 sums of float32 embeddings differ by far less in other orders
_CHUNK = 4096  # captions scored at a time, so that memory does not grow with captions x images


def recall_at_k(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, image_of_caption: torch.Tensor | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:  # fmt: skip
    """Recall@k of text-to-image and image-to-text retrieval, as fractions, with median ranks and rsum.

    (N, P) embeddings of distinct images, (C, P) of captions, and for each caption the row of its image (C,).
    `image_retrieval_recall@k`: captions whose image is among the top k images. `text_retrieval_recall@k`:
    images with any own caption among the top k captions. `image_median_rank` and `text_median_rank` count from
    1; `rsum` is the sum of the recalls in percent. A tie counts against the model, and so does a NaN. Images
    without captions are candidates only. Raises UserError where there is nothing to rank.
    """
    return recalls_of(*ranks(image_embeddings, text_embeddings, image_of_caption), ks)


def ranks(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, image_of_caption: torch.Tensor | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of each caption's image, (C,), and of the best own caption of each image with captions, from 1.

    Arguments, ties, NaN and errors are those of `recall_at_k`.
    """
    images, texts = image_embeddings.double().cpu(), text_embeddings.double().cpu()
    own = torch.as_tensor(image_of_caption, dtype=torch.long).cpu()  # (C,)
    if not len(images) or not len(texts):
        raise UserError("recall needs at least one image and one caption")
    if len(own) != len(texts) or own.min() < 0 or own.max() >= len(images):
        raise ValueError("image_of_caption holds, for each caption, a row of image_embeddings")

    # One pass for the best own caption of each image, one for the ranks; a chunk of similarities at a time.
    image_rank = torch.empty(len(texts), dtype=torch.long)
    best_own = torch.full((len(images),), -torch.inf, dtype=torch.double)
    for start in range(0, len(texts), _CHUNK):
        mine = own[start : start + _CHUNK]
        similarity = texts[start : start + _CHUNK] @ images.T  # (chunk, N)
        right = similarity.gather(1, mine[:, None])  # (chunk, 1)
        # The right image counts itself, so that the first rank is 1; `not behind` counts a NaN as ahead
        image_rank[start : start + _CHUNK] = (~(similarity < right - TIE)).sum(1)
        best_own.scatter_reduce_(0, mine, right[:, 0], "amax")
    better = torch.zeros(len(images), dtype=torch.long)
    for start in range(0, len(texts), _CHUNK):
        mine = own[start : start + _CHUNK]
        ahead = ~(texts[start : start + _CHUNK] @ images.T < best_own - TIE)  # (chunk, N)
        ahead[torch.arange(len(mine)), mine] = False  # own captions do not compete with each other
        better += ahead.sum(0)
    return image_rank, better[own.unique()] + 1


def recalls_of(image_rank: torch.Tensor, text_rank: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The metrics of `recall_at_k` from the `ranks` of all captions, (C,), and images, (N,)."""
    of = {"image": image_rank.double(), "text": text_rank.double()}
    recalls = {f"{kind}_retrieval_recall@{k}": (of[kind] <= k).double().mean().item() for kind in of for k in ks}
    medians = {f"{kind}_median_rank": rank.quantile(0.5).item() for kind, rank in of.items()}
    return recalls | medians | {"rsum": 100 * sum(recalls.values())}


def format_table(metrics: dict[str, float], split: str, n_images: int, n_captions: int) -> str:
    """The recall table that every command prints, in percent."""
    ks = sorted(int(key.partition("@")[2]) for key in metrics if key.startswith("image_retrieval_recall@"))
    lines = [
        f"{split}: {n_images:,} images, {n_captions:,} captions",
        f"{'':<16}" + "".join(f"{f'R@{k}':>8}" for k in ks) + f"{'median rank':>14}",
    ]
    for name, kind in (("image to text", "text"), ("text to image", "image")):
        recalls = "".join(f"{100 * metrics[f'{kind}_retrieval_recall@{k}']:>8.1f}" for k in ks)
        lines.append(f"{name:<16}{recalls}{metrics[f'{kind}_median_rank']:>14g}")
    return "\n".join([*lines, f"rsum {metrics['rsum']:.1f}"])
