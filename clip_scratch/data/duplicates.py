"""Exact and near-duplicate images: signatures of their pixels, and pairs of nearly equal signatures."""

import hashlib
from itertools import pairwise

import numpy as np
import pandas as pd
from PIL import Image

MOST_BITS = 6  # of the 64 that may differ between near duplicates
LEAST_CORRELATION = 0.99  # of their 16 x 16 thumbnails; of product photos on white, 0.98 is often another product
_DCT = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))  # the 8 lowest frequencies of 32 samples


def signature(pixels: np.ndarray) -> dict:
    """What compares images, of RGB uint8 (H, W, 3): a `digest` of all pixels, a perceptual hash, a `thumbnail`.

    `phash` is pHash (Zauner 2010), 64 bits: which of the 8 x 8 lowest frequencies of the image in 32 x 32 grey pixels
    are above the median. The thumbnail is standardised, float16 (768,): a dot product is a correlation.
    """
    small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX), np.float32)
    frequencies = (_DCT @ (small @ np.array([0.299, 0.587, 0.114])) @ _DCT.T).ravel()
    thumbnail = small.reshape(16, 2, 16, 2, 3).mean((1, 3)).ravel()
    thumbnail -= thumbnail.mean()
    return {
        "digest": hashlib.sha256(b"%d x" % pixels.shape[1] + pixels.tobytes()).hexdigest(),
        "phash": np.packbits(frequencies > np.median(frequencies)).view(">u8")[0],
        "thumbnail": (thumbnail / max(np.linalg.norm(thumbnail), 1e-6)).astype(np.float16),
    }


def near_pairs(hashes: np.ndarray, most: int = MOST_BITS) -> np.ndarray:
    """All pairs i < j of 64-bit hashes (N,) that differ in at most `most` bits: (M, 2), sorted.

    Exact: cut into `most` + 1 bands, two such hashes agree in at least one band. Only hashes that do are compared, each
    with the next one of its band's bucket, then with the one after that, and so on.
    """
    hashes = np.asarray(hashes, np.uint64)
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(np.linspace(0, 64, most + 2).astype(int)):
        bands = (hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(bands, kind="stable")
        ends = np.searchsorted(bands[order], bands[order], "right")  # of each one's bucket
        ordered, rows, step = hashes[order], np.arange(len(hashes)), 1
        while len(rows := rows[rows + step < ends[rows]]):
            near = rows[np.bitwise_count(ordered[rows] ^ ordered[rows + step]) <= most]
            found.append(np.stack([order[near], order[near + step]], 1))
            step += 1
    return np.unique(np.concatenate(found), axis=0)  # within a bucket the order is that of the hashes


def duplicate_pairs(
    digests: pd.Series, hashes: np.ndarray, thumbnails: np.ndarray, splits: pd.Series
) -> pd.DataFrame:  # fmt: skip
    """Pairs of N images that are equal (`exact`) or nearly so: `first`, `second`, and in how many `bits` they differ.

    Near duplicates have near hashes (N,) and correlated thumbnails (N, 768). Of equal images within a split each is
    paired with the first one only, so that 1,000 copies are 999 pairs.
    """
    of_digest = pd.factorize(digests)[0]
    groups = pd.factorize(pd.Series(of_digest).astype(str) + splits.to_numpy())[0]
    leaders = np.unique(groups, return_index=True)[1]  # groups are numbered in the order of their first image
    pairs = leaders[near_pairs(hashes[leaders])]
    alike = [
        (thumbnails[part[:, 0]].astype(np.float32) * thumbnails[part[:, 1]]).sum(1) >= LEAST_CORRELATION
        for part in np.array_split(pairs, len(pairs) // 10_000 + 1)
    ]
    pairs = pairs[np.concatenate(alike) | (of_digest[pairs[:, 0]] == of_digest[pairs[:, 1]])]
    copies = np.setdiff1d(np.arange(len(groups)), leaders)
    first, second = np.concatenate([pairs, np.stack([leaders[groups[copies]], copies], 1)]).T
    exact, bits = of_digest[first] == of_digest[second], np.bitwise_count(hashes[first] ^ hashes[second])
    table = pd.DataFrame({"first": first, "second": second, "exact": exact, "bits": bits})
    return table.sort_values(["first", "second"], ignore_index=True)
