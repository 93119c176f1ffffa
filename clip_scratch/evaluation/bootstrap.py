"""Percentile bootstrap over images (Efron 1979): how far a recall would move with other images of the same kind."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
SEED = 0
_CELLS = 1 << 22  # counts held at a time, so that memory does not grow with images x resamples


def resample_counts(n: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each of n images is drawn in each resample of n: rows of (resamples, n), some at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))


def resampled_recalls(hits: np.ndarray, sizes: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """M recalls, as fractions, of every resample of N images: (resamples, M).

    `hits` (N, M) counts the queries of each image that found their answer, `sizes` (N, M) all its queries: an
    image is drawn with all its captions. All M see the same resamples, so that two of them may be subtracted
    (a paired bootstrap).
    """
    hits, sizes = np.asarray(hits, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    return np.concatenate([counts @ hits / (counts @ sizes) for counts in resample_counts(len(hits), resamples, seed)])


def interval(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """The percentile interval of bootstrap samples (resamples, ...): lower and upper ends, (2, ...)."""
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
