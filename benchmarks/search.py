"""Exact search for one query: ExactSearch against NumPy and torch on 8,000, 100,000 and a million unit vectors.

Times are of the search alone, not of encoding the query; recall is against a full scan in float64.

    python -m benchmarks.search
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch

from clip_scratch.retrieval.exact import ExactSearch

ROWS = (8_000, 100_000, 1_000_000)
DIM = 256
K = 10
QUERIES = 20


def search_numpy(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The K best rows in plain NumPy: a product in float32, a partition, a sort of K."""
    scores = rows @ query
    best = np.argpartition(-scores, K)[:K]
    return best[np.argsort(-scores[best])]


def search_float64(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The K best rows of each query in float64, (Q, K)."""
    scores = torch.cat([part.double() @ queries.double().T for part in rows.split(50_000)])  # (N, Q)
    return scores.T.topk(K).indices


def milliseconds(search: Callable[[torch.Tensor], object], queries: torch.Tensor, calls: int) -> float:
    """Median time of a call, each with the next query, after one warm-up call."""
    search(queries[:1])
    times = []
    for _, i in zip(range(calls), cycle(range(len(queries))), strict=False):
        began = time.perf_counter()
        search(queries[i : i + 1])
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1000


def measure() -> list[dict]:
    """For each size: rows, ms of ExactSearch, numpy_ms, torch_ms, ratio (numpy_ms / ms), recall, seconds to prepare."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(QUERIES, DIM, generator=generator), dim=-1)
    everything = torch.randn(max(ROWS), DIM, generator=generator)
    everything /= everything.norm(dim=1, keepdim=True)
    results = []
    for n in ROWS:
        rows = everything[:n]
        began = time.perf_counter()
        search = ExactSearch(rows)
        prepare = time.perf_counter() - began
        calls = min(100, max(11, 4_000_000 // n))
        ms = milliseconds(lambda query, search=search: search.search(query, K), queries, calls)
        numpy_ms = milliseconds(lambda query, rows=rows: search_numpy(rows.numpy(), query[0].numpy()), queries, calls)
        torch_ms = milliseconds(lambda query, rows=rows: torch.topk(query @ rows.T, K), queries, calls)
        found, right = search.search(queries, K)[1], search_float64(rows, queries)
        recall = np.mean([len({*a} & {*b}) / K for a, b in zip(found.tolist(), right.tolist(), strict=True)])
        results.append({"rows": n, "ms": ms, "numpy_ms": numpy_ms, "torch_ms": torch_ms, "ratio": numpy_ms / ms,
                        "recall": float(recall), "prepare_s": prepare})  # fmt: skip
    return results


def main() -> None:
    """Print the table."""
    print(f"{'rows':>9}  {'ms':>7}  {'numpy ms':>8}  {'torch ms':>8}  {'ratio':>5}  {'recall':>6}  {'prepare s':>9}")
    for r in measure():
        print(
            f"{r['rows']:>9,}  {r['ms']:>7.2f}  {r['numpy_ms']:>8.2f}  {r['torch_ms']:>8.2f}  {r['ratio']:>5.1f}"
            f"  {r['recall']:>6.4f}  {r['prepare_s']:>9.2f}"
        )


if __name__ == "__main__":
    main()
