"""Exact nearest neighbours by a scan of all rows.

Q queries, N rows, P dimensions. The time is that of reading the rows from memory: where the processor computes in bf16,
a large matrix is scanned in a bf16 copy, which takes half the bytes and half the time at a million rows. The copy's
error is known, and all rows that may be among the best are scored again in float64: the result is that of a full scan.
Without a copy the best rows of a float32 scan are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    import torch

HALF_FROM = 2**22  # numbers (N * P) from which a bf16 copy pays: fewer, 16 MB of float32, stay in the CPU's cache
_SCAN = 2**25  # scores computed at a time
_BLOCKS = 64  # the k-th best of the maxima of disjoint blocks, found faster, bounds the k-th best from below


class ExactSearch:
    """The rows (N, P) of greatest dot product with a query; with L2-normalised rows, of greatest cosine.

    Tensors or arrays of any float type, read as float32. `half` says whether to make a bf16 copy for the scan (which
    takes as long as ten to twenty searches); by default where it pays. Raises UserError for rows that are not a matrix
    or not finite.
    """

    def __init__(self, embeddings: torch.Tensor | np.ndarray, half: bool | None = None):
        rows = _float32(embeddings)
        if rows.ndim != 2:
            raise UserError(f"embeddings to search are (N, P), not {rows.shape}")
        longest = np.sqrt(np.einsum("np,np->n", rows, rows).max(initial=0.0))
        if not np.isfinite(longest):
            raise UserError("embeddings to search contain NaN or infinity: remove those rows, or train again")
        self.rows, self.half = rows, None  # (N, P)
        if half or (half is None and rows.size >= HALF_FROM and _computes_in_bf16()):
            import torch

            self.half = torch.from_numpy(rows).bfloat16()
        # A product of roundings to bf16 is off by 2 * 2^-8 of |row||query|, its own rounding by 2^-8 more, and a sum
        # of P products in float32, in whatever order, by less than P * 2^-23; 1.01 covers the terms of second order
        self._error = 1.01 * float(longest) * (3 * 2.0**-8 + rows.shape[1] * 2.0**-23)

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: torch.Tensor | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, best first: (Q, P) -> float32 scores (Q, k), row numbers (Q, k).

        Fewer where there are fewer than k rows. Raises UserError for queries of another width or not finite, and for
        a k below 1.
        """
        queries = _float32(queries)
        if queries.ndim != 2 or queries.shape[1] != self.rows.shape[1]:
            raise UserError(f"queries are (Q, {self.rows.shape[1]}) like the rows, not {queries.shape}")
        if not np.isfinite(queries).all():
            raise UserError("a query contains NaN or infinity: check the model that embedded it")
        if k < 1:
            raise UserError(f"k is at least 1, not {k}")
        k, step = min(k, len(self)), max(1, _SCAN // max(1, len(self)))
        scores, numbers = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries) if k else 0, step):
            part = queries[start : start + step]
            for i, (query, scan) in enumerate(zip(part, self._scan(part), strict=True), start):
                candidates = self._candidates(query, scan, k)
                exact = self._scores(query, candidates)
                best = np.lexsort((candidates, -exact))[:k]  # equal scores in the order of their rows
                scores[i], numbers[i] = exact[best], candidates[best]
        return scores, numbers

    def _scan(self, queries: np.ndarray) -> np.ndarray:
        """All dot products (Q, N), in bf16 where there is such a copy."""
        if self.half is None:
            return queries @ self.rows.T if len(queries) > 1 else (self.rows @ queries[0])[None]
        import torch

        return (torch.from_numpy(queries).bfloat16() @ self.half.T).float().numpy()

    def _candidates(self, query: np.ndarray, scan: np.ndarray, k: int) -> np.ndarray:
        """Row numbers that contain the k best."""
        if self.half is None:
            return np.argpartition(scan, len(scan) - k)[len(scan) - k :]
        # The true score of a row among the best k is at least the k-th best of the scan less the error, and it scans
        # to no less than that less the error again. `not <`: a score that overflowed is a candidate
        blocks = scan
        if len(scan) >= _BLOCKS * k:
            blocks = scan[: len(scan) // _BLOCKS * _BLOCKS].reshape(_BLOCKS, -1).max(0)
        bound = np.partition(blocks, -k)[-k] - 2 * self._error * np.linalg.norm(query.astype(np.float64))
        return np.flatnonzero(~(scan < bound))

    def _scores(self, query: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Dot products in float64, summed alike for all rows, so that equal rows have equal scores."""
        return (self.rows[numbers] * query.astype(np.float64)).sum(1)


def _float32(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """A contiguous float32 array; bf16 tensors have no NumPy type of their own."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.ascontiguousarray(values, np.float32)


def _computes_in_bf16() -> bool:
    import torch

    from ..device import computes_in_bf16

    return computes_in_bf16(torch.device("cpu"))
