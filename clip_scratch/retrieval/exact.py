"""Exact nearest neighbours: a fast scan with a known error, and float64 for the few rows that can be among the best.

Q queries, N rows, P dimensions. A million rows are read from memory once a query, so half the bytes are half the
time: the scan reads a bf16 copy where the processor computes in bf16, and the float32 rows otherwise. Either way
its error is bounded, every row that may be among the best k within that bound is scored again from the float32
rows in float64, and the result is that of a full scan in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..device import computes_in_bf16
from ..errors import UserError

HALF_FROM = 2**22  # numbers (N * P) from which a bf16 copy pays: fewer, 16 MB of float32, stay in the cache
_BLOCKS = 64  # rows of which only the best counts when the k-th best score is bounded from below
_SCAN = 2**25  # scores computed at a time
_CHUNK = 2**14  # rows converted at a time
_BF16 = 2.0**-8  # the greatest error of rounding to bf16, relative to the number
_FLOAT32 = 2.0**-24  # the same for float32


class ExactSearch:
    """The rows (N, P) of greatest dot product with a query, exactly; with L2-normalised rows, of greatest cosine.

    Tensors or arrays of any float type, read as float32. `half` says whether to keep a bf16 copy for the scan, half
    as large as the float32 rows; by default where it pays. Making it takes as long as some fifty searches.
    Raises UserError for rows that are no matrix or not finite.
    """

    def __init__(self, embeddings: torch.Tensor | np.ndarray, half: bool | None = None):
        self.rows = torch.as_tensor(embeddings).detach().float().cpu().contiguous()
        if self.rows.ndim != 2:
            raise UserError(f"embeddings to search are (N, P), not {tuple(self.rows.shape)}")
        if half is None:
            half = self.rows.numel() >= HALF_FROM and computes_in_bf16(self.rows.device)
        self.scanned = torch.empty_like(self.rows, dtype=torch.bfloat16) if half else self.rows  # (N, P)
        lengths, errors = [0.0], [0.0]
        for start in range(0, len(self), _CHUNK):
            part = self.rows[start : start + _CHUNK]
            # not by torch: its threads, waiting for more work, would hold up NumPy's in the scan that follows
            lengths.append(np.sqrt(np.einsum("np,np->n", part.numpy(), part.numpy()).max()))
            if half:
                rounded = self.scanned[start : start + _CHUNK].copy_(part)
                errors.append((part - rounded).norm(dim=1).max().item())
        self.length, self.error = float(np.max(lengths)), float(np.max(errors))  # of the worst row; NaN stays NaN
        if not np.isfinite(self.length + self.error):
            raise UserError("embeddings to search hold NaN or infinity; remove those rows, or train again")

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: torch.Tensor | np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best rows of each query, best first, equal ones by row: (Q, P) -> scores (Q, k), row numbers (Q, k).

        Scores are float32; there are N of them where k is greater. Raises UserError for queries of another width
        or not finite, and for a k below 1.
        """
        queries = torch.as_tensor(queries).detach().float().cpu()
        if queries.ndim != 2 or queries.shape[1] != self.rows.shape[1]:
            raise UserError(f"queries are (Q, {self.rows.shape[1]}) as the rows are, not {tuple(queries.shape)}")
        if not queries.isfinite().all():
            raise UserError("a query holds NaN or infinity; look for it in the embeddings given")
        if k < 1:
            raise UserError(f"k is at least 1, not {k}")
        k = min(k, len(self))
        scores, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
        if k:
            for i, (query, scan) in enumerate(zip(queries, self._scans(queries), strict=True)):
                candidates = self._candidates(query, scan, k)
                exact = self._scores(query, candidates)
                best = np.argsort(-exact, kind="stable")[:k]  # stable: equal ones stay in the order of the rows
                scores[i], rows[i] = torch.from_numpy(exact[best]), torch.from_numpy(candidates[best])
        return scores, rows

    def _scans(self, queries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each query's dot products with all rows (N,), off by no more than `_candidates` allows for."""
        for part in queries.split(max(1, _SCAN // len(self))):
            if self.scanned.dtype == torch.bfloat16:
                yield from part.bfloat16() @ self.scanned.T
            elif self.rows.numel() < HALF_FROM:  # by torch, in one thread: no time goes into waiting for another
                yield from part @ self.rows.T
            else:  # by NumPy, whose product of vector and matrix uses all threads: up to 4 times as fast as torch's
                yield from torch.from_numpy(part.numpy() @ self.rows.numpy().T)

    def _candidates(self, query: torch.Tensor, scan: torch.Tensor, k: int) -> np.ndarray:
        """The numbers, ascending, of all rows that may be among the k best.

        With x, q a row and the query, x', q' what is multiplied, |x'q' - xq| <= |x' - x||q'| + |x||q' - q|; the sum
        of P products in float32, whatever their order, adds less than P 2^-23 |x'||q'|. Call the total e. A row
        among the k best is at least as good as the k-th best of the scan, t, is in truth: t - e. It scans to that
        less another e. A bf16 scan has rounded t as well, and the row, but a rounded number never falls below
        the rounded bound.
        """
        multiplied = query.to(scan.dtype).float()
        length, query_error = multiplied.norm().item(), (multiplied - query).norm().item()
        error = self.error * length + self.length * query_error
        error += len(query) * 2 * _FLOAT32 * (self.length + self.error) * length
        error *= 1.001  # the lengths above were themselves computed in float32
        kth = _kth_best(scan, k).item()
        if scan.dtype == torch.bfloat16:
            kth -= _BF16 * abs(kth)
        bound = torch.tensor(kth - 2 * error - 1e-30, dtype=torch.double).to(scan.dtype)  # 1e-30: for underflow
        return np.flatnonzero(~(scan < bound).numpy())  # so said, a score that overflowed to NaN is a candidate too

    def _scores(self, query: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
        """Dot products in float64, summed alike for every row, so that equal rows have equal scores."""
        rows, query = self.rows.numpy(), query.double().numpy()
        parts = [numbers[i : i + _CHUNK] for i in range(0, len(numbers), _CHUNK)]
        return np.concatenate([(rows[part] * query).sum(1) for part in parts])


def _kth_best(scan: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th best of a scan (N,), or a little less: the k-th best of the best of disjoint sets is far quicker."""
    if len(scan) >= _BLOCKS * k:
        scan = scan[: len(scan) // _BLOCKS * _BLOCKS].view(_BLOCKS, -1).amax(0)
    return scan.topk(k).values[-1]
