"""Percentile bootstrap over images (Efron 1979): how far a recall would move with other images of the same kind."""

import numpy as np

RESAMPLES = 2000
_CELLS = 1 << 22  # counts held at a time, so that memory does not grow with images x resamples


def resampled_recalls(hits: np.ndarray, sizes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """M recalls, as fractions, of every resample of N images: (resamples, M).

    `hits` (N, M) counts the queries of each image that found their answer, `sizes` (N, M) all its queries: an
    image is drawn with all its captions. All M see the same resamples, so that two of them may be subtracted
    (a paired bootstrap).
    """
    rng, n = np.random.default_rng(seed), len(hits)
    step, recalls = max(1, _CELLS // n), []
    for start in range(0, resamples, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))  # times each image is drawn
        recalls.append(counts @ hits / (counts @ sizes))
    return np.concatenate(recalls)


def interval(samples: np.ndarray) -> np.ndarray:
    """The 95 % interval of bootstrap samples (resamples, ...): lower and upper ends, (2, ...)."""
    return np.quantile(samples, [0.025, 0.975], axis=0)
