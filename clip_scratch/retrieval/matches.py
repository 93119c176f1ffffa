"""find_matches and find_captions: what fits a query best, as a result that draws itself in Jupyter."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ..errors import UserError
from ..models.clip import CLIPModel
from .embed import ImageLike, encode_image, encode_text, trained_folder
from .exact import ExactSearch
from .index import Index
from .results import Matches, columns_for, save_grid


def _best(
    embeddings: torch.Tensor | ExactSearch, queries: torch.Tensor, names: Sequence[str], n: int
) -> list[list[tuple[str, float]]]:
    """For each query (Q, P) the n best distinct names; a name that occurs several times counts with its best score.

    Searches for 8 n rows (an image mostly has one, or one for each of five captions), and for 8 times as many where
    those have fewer than n names. Rows of zeros, which stand for images that could not be read, are left out.
    """
    if len(embeddings) != len(names):
        raise UserError(f"{len(embeddings)} embeddings do not line up with {len(names)} names")
    if n < 1:
        raise UserError(f"n is at least 1, not {n}")
    # For one search a bf16 copy would take longer to make than it saves
    search = embeddings if isinstance(embeddings, ExactSearch) else ExactSearch(embeddings, half=False)
    name_of = names.iloc if isinstance(names, pd.Series) else names
    results: list[dict[str, float]] = [{} for _ in queries]
    k, short = 8 * n, list(range(len(queries)))
    while short:
        for i, scores, rows in zip(short, *search.search(queries[short], k), strict=True):
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                if len(results[i]) < n and (score or search.rows[row].any()):
                    results[i].setdefault(str(name_of[row]), score)
        short = [i for i in short if len(results[i]) < n] if k < len(search) else []
        k *= 8
    return [list(result.items()) for result in results]


def find_matches(
    model: CLIPModel,
    image_embeddings: torch.Tensor | ExactSearch | Index,
    query: str | Sequence[str],
    image_filenames: Sequence[str] | None = None,
    n: int = 9,
    image_path: str | Path | None = None,
    save: str | Path | None = None,
) -> Matches | list[Matches]:
    """The n distinct images that fit a query best, as (image name, cosine score), best first (tutorial name).

    `image_embeddings` (N, P) lines up with `image_filenames` (N,), which may name an image several times. The
    images are drawn from `image_path` (default: the folder the model was trained on) when Jupyter shows the
    result, or into the picture `save`. A list of queries gives a list of results. For many searches in many images,
    pass `ExactSearch(image_embeddings)`, which prepares them once, or an `Index`, which knows its file names. Raises
    UserError where the lengths differ, n is below 1, or the index was built with another model.
    """
    queries = [query] if isinstance(query, str) else list(query)
    embeddings = encode_text(model, queries)
    if isinstance(image_embeddings, Index):
        image_embeddings.check_model(model)
        results = image_embeddings.nearest(queries, embeddings.numpy(), n)
    else:
        folder = image_path or partial(trained_folder, model.cfg)
        best = _best(image_embeddings, embeddings, image_filenames, n)
        results = [Matches(q, pairs, folder) for q, pairs in zip(queries, best, strict=True)]
    if save and results:
        save_grid(results, save, columns_for(len(results[0])))
    return results[0] if isinstance(query, str) else results


def find_captions(
    model: CLIPModel,
    image: ImageLike,
    captions: Sequence[str],
    n: int = 5,
    text_embeddings: torch.Tensor | ExactSearch | None = None,
) -> list[tuple[str, float]]:
    """The n distinct captions that fit an image best, as (caption, cosine score), best first.

    `text_embeddings` (C, P) of the captions, or an ExactSearch of them as in `find_matches`, are computed where they
    are not given. Raises UserError where the lengths differ or n is below 1.
    """
    if text_embeddings is None:
        text_embeddings = encode_text(model, captions)
    return _best(text_embeddings, encode_image(model, image), captions, n)[0]
