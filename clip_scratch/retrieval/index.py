"""A saved index of a folder of images, and searches in it.

index.json      what it is of: the image folder, the model's fingerprint and logit scale
manifest.sqlite embeddings-N.f16   the images (see store.py; or a Milvus collection, see milvus_store.py)
captions.json captions.f16         captions of the model's training data, which describe images and calibrate scores
model/          a copy of the run's best/; query/ its text tower as ONNX, which starts faster

Nothing else is needed to search: an index may be moved, and its run deleted. Indexing is in indexing.py.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError, suggest
from .query import QueryEncoder
from .results import Matches
from .store import LocalStore

if TYPE_CHECKING:
    from ..models.clip import DualEncoder
    from .embed import ImageLike

INFO, FORMAT = "index.json", 1
_BACKGROUND = 4096  # images that a query is compared with to calibrate its scores


def read_info(folder: Path) -> dict:
    """The content of index.json. Raises UserError where there is none, or one of another version."""
    path = folder / INFO
    if not path.is_file():
        raise UserError(f"{folder} is not an index: there is no {path}. Make one: python -m clip_scratch.search index")
    try:
        info = json.loads(path.read_text())
        version = info["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} and index the images again") from error
    if version != FORMAT:
        raise UserError(f"{folder} is of another version of clip_scratch: delete it and index the images again")
    return info


def open_store(folder: Path, info: dict, writing: bool = False):
    """The store of an index: local, or the Milvus collection that it names."""
    if info["store"]:
        from .milvus_store import MilvusStore

        return MilvusStore(info["store"], folder, info["dim"], writing)
    return LocalStore(folder, info["dim"], writing)


def log_mean_exp(logits: np.ndarray) -> np.ndarray:
    """log(mean(exp(logits))) over the last axis."""
    most = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - most).mean(-1)) + most[..., 0]


class Index:
    """An index that is searched: `Index.open("indexes/photos").search("a dog on a beach")`.

    Safe to use from several threads. Writers do not disturb it: it sees what they commit.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        self.root = Path(folder)
        self.info = read_info(self.root)
        self.store = open_store(self.root, self.info)
        self.queries = QueryEncoder(self.root, device)
        self._lock = threading.Lock()  # of the model: one query at a time

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Index:
        """The index in `folder`; images in queries are embedded on `device`. Raises UserError for another folder."""
        return cls(folder, device)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return Path(self.info["folder"])

    @property
    def columns(self) -> list[str]:
        """What a `where` may ask of an image."""
        return [name for name in self.store.columns if name != "background"]

    @property
    def model(self) -> DualEncoder:
        """The model that the images were embedded with."""
        with self._lock:
            return self.queries.model

    def search(
        self,
        query: str | ImageLike | Sequence[str],
        n: int = 9,
        where: str = "",
        min_score: float | None = None,
    ) -> Matches | list[Matches]:
        """The n images that fit a query best, by cosine, best first; of several sentences a list of results.

        A string is a sentence, an image file, or a sum of weighted ones (see `QueryEncoder.composed`); a path, PIL
        image or array is an image. `where` is an SQL condition on `columns`, such as "year >= 2020 and path like
        '%holiday%'". `min_score` leaves out images of a lower calibrated score: the log of how much likelier the model
        finds this pair than a pair drawn at random, in nats. It is comparable between queries, as a cosine is not.
        Results have `records` with path, cosine, score and the manifest's columns. Raises UserError for an empty query,
        an n below 1 and a `where` that is not a condition.
        """
        if isinstance(query, list | tuple):
            return [self.search(one, n, where, min_score) for one in query]
        with self._lock:
            if isinstance(query, str):
                words, (embedding, of_words) = query, self.queries.composed(query)
            else:
                words, embedding, of_words = _name(query), self.queries.image([query])[0], False
        return self.nearest([words], embedding[None], n, where, min_score, of_words)[0]

    def similar(self, path: str, n: int = 9, where: str = "", min_score: float | None = None) -> Matches:
        """The n images most like an indexed one, itself left out. Raises UserError where it is not indexed."""
        results = self.nearest([path], self._vector(path)[None], n + 1, where, min_score, of_words=False)[0]
        others = [i for i, (name, _) in enumerate(results) if name != path][:n]
        return Matches(path, [results[i] for i in others], self.folder, [results.records[i] for i in others])

    def nearest(
        self,
        words: Sequence[str],
        embeddings: np.ndarray,
        n: int = 9,
        where: str = "",
        min_score: float | None = None,
        of_words: bool = True,
    ) -> list[Matches]:
        """`search` for queries that are embedded: (Q, P). `words` names them; `of_words`: none is of an image."""
        if n < 1:
            raise UserError(f"n is at least 1, not {n}")
        results = []
        for name, embedding in zip(words, embeddings, strict=True):
            score = self._scorer(embedding, of_words)
            k, records = n, self._scored(embedding, n, where, score)
            if min_score is not None:
                # Later images have no greater cosine, and none has a smaller background than this
                bound = partial(score, background=self.store.least_background())
                while len(records) == k and bound(records[-1]["cosine"]) >= min_score:
                    if sum(r["score"] >= min_score for r in records) >= n:
                        break
                    k *= 4
                    records = self._scored(embedding, k, where, score)
                records = [r for r in records if r["score"] >= min_score][:n]
            pairs = [(r["path"], r["cosine"]) for r in records]
            results.append(Matches(name, pairs, self.folder, records))
        return results

    def find_captions(self, image: str | ImageLike, n: int = 5) -> list[tuple[str, float]]:
        """The n captions of the training data that fit an image best, as (caption, cosine), best first.

        A string that is the path of an indexed image needs no model. Raises UserError for an index without captions.
        """
        captions, embeddings = self.captions
        if not captions:
            raise UserError(f"{self.root} has no captions: the captions file of its model was not found")
        vector = self.store.vector(image) if isinstance(image, str) else None
        if vector is None:
            with self._lock:
                vector = self.queries.image([image])[0]
        cosines = embeddings @ vector
        best = np.argsort(-cosines, kind="stable")[:n]
        return [(captions[i], float(cosines[i])) for i in best]

    def check_model(self, model: DualEncoder) -> None:
        """Raise UserError where `model` is not the one that embedded the images."""
        from ..models.saved import model_fingerprint

        if model_fingerprint(model) != self.info["fingerprint"]:
            raise UserError(f"{self.root} was built with another model ({self.info['run']}): index the images again")

    @cached_property
    def captions(self) -> tuple[list[str], np.ndarray]:
        """Distinct captions of the training data, and their embeddings (C, P)."""
        return read_captions_of(self.root, self.info["dim"])

    def _vector(self, path: str) -> np.ndarray:
        vector = self.store.vector(path)
        if vector is None:
            raise UserError(f"{path!r} is not in the index {self.root}.{suggest(path, self.store.known())}")
        return vector

    def _scored(self, embedding: np.ndarray, k: int, where: str, score: Callable[..., float]) -> list[dict]:
        """The records of the k nearest images, with their scores."""
        records = self.store.search(embedding[None], k, where)[0]
        backgrounds = [record.pop("background") for record in records]
        scores = [score(r["cosine"], background=b) for r, b in zip(records, backgrounds, strict=True)]
        first = ("path", "score", "cosine")  # in this order in a table
        records = [r | {"score": value} for r, value in zip(records, scores, strict=True)]
        return [{name: r[name] for name in first} | r for r in records]

    def _scorer(self, embedding: np.ndarray, of_words: bool) -> Callable[..., float]:
        """A function from an image's cosine and background to the log-likelihood ratio of the pair.

        The critic that InfoNCE learns, logit_scale * cosine, is a log density ratio up to terms of the image and of
        the query alone (van den Oord et al. 2018). Each is estimated by a log-mean-exp over a background: for the
        query over images of the index, for an image over training captions. The two estimates are averaged, so that
        neither a collection of dogs nor a query for nothing in particular shifts all scores.
        """
        scale = self.info["logit_scale"]
        of_query = float(log_mean_exp(scale * (self._images @ embedding))) if len(self._images) else 0.0

        def score(cosine: float, background: float | None) -> float:
            both = of_words and background is not None
            return scale * cosine - ((of_query + background) / 2 if both else of_query)

        return score

    @cached_property
    def _images(self) -> np.ndarray:
        return self.store.sample(_BACKGROUND)[1]


def read_captions_of(folder: Path, dim: int) -> tuple[list[str], np.ndarray]:
    """The captions that an index carries, none where it has none, and their embeddings (C, P) float32."""
    if not (folder / "captions.json").is_file():
        return [], np.empty((0, dim), np.float32)
    try:
        captions = json.loads((folder / "captions.json").read_text())
        return captions, np.fromfile(folder / "captions.f16", np.float16).reshape(len(captions), dim).astype(np.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"the captions of {folder} are damaged: delete it and index the images again") from error


def _name(image: ImageLike) -> str:
    return os.fspath(image) if isinstance(image, os.PathLike) else "an image"
