"""ExactSearch against a full scan in float64: random rows, ties, and rows that a float32 scan alone ranks wrongly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_scratch.errors import UserError
from clip_scratch.retrieval import exact
from clip_scratch.retrieval.exact import ExactSearch


def reference(rows, queries, k):
    """Scores and row numbers of a full scan in float64, equal scores by row."""
    products = (queries.double().numpy()[:, None] * rows.double().numpy()[None]).sum(2)  # (Q, N)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


def check(rows, queries, k):
    scores, numbers = ExactSearch(rows).search(queries, k)
    wanted, order = reference(rows, queries, k)
    assert numbers.tolist() == order.tolist()
    assert scores.dtype == torch.float32 and scores.tolist() == wanted.astype(np.float32).tolist()


def unit(n, dim, seed):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(
    n=st.sampled_from([1, 2, 7, 63, 64, 65, 700]),
    dim=st.sampled_from([1, 3, 16, 256]),
    spread=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    k=st.sampled_from([1, 2, 10, 100, 1000]),
    seed=st.integers(0, 999),
)
@settings(max_examples=80)
def test_equals_a_full_scan_in_float64(n, dim, spread, scale, k, seed):
    """Rows all over the sphere, rows crowded closer than float32 can tell apart, and equal rows."""
    rows = scale * (unit(1, dim, seed) + spread * unit(n, dim, seed + 1000))
    rows = torch.cat([rows, rows[: n // 3]])
    queries = torch.cat([unit(2, dim, seed + 2000), rows[:1], -rows[:1]])
    check(rows, queries, k)


@pytest.mark.parametrize("n", [1000, 20_000])
def test_many_rows(n):
    check(unit(n, 64, 0), unit(3, 64, 1), 10)


def test_a_scan_in_float32_alone_goes_wrong():
    """Rows that differ by less than a float32 product's rounding are ranked by their products in float64."""
    rows = torch.cat([unit(1, 256, 0) + 1e-7 * unit(500, 256, 2)])
    query = unit(1, 256, 1)
    scan = (query @ rows.T)[0]
    assert scan.argsort(descending=True, stable=True)[:10].tolist() != reference(rows, query, 10)[1][0].tolist()
    check(rows, query, 10)


def test_equal_rows_come_in_their_order():
    rows = unit(1, 256, 0).repeat(5000, 1)
    scores, numbers = ExactSearch(rows).search(unit(1, 256, 1), 7)
    assert numbers.tolist() == [list(range(7))] and len(set(scores[0].tolist())) == 1


def test_one_query_of_many_and_alone(monkeypatch):
    search, queries = ExactSearch(unit(300, 16, 0)), unit(9, 16, 1)
    together = search.search(queries, 5)
    monkeypatch.setattr(exact, "_SCAN", 700)  # two queries at a time
    for one, other in zip(together, search.search(queries, 5), strict=True):
        assert torch.equal(one, other)
    for i, query in enumerate(queries):
        assert torch.equal(search.search(query[None], 5)[1][0], together[1][i])


def test_few_rows_many_asked_and_none():
    scores, numbers = ExactSearch(torch.eye(3)).search(torch.tensor([[0.5, 0.0, 1.0]]), 10)
    assert numbers.tolist() == [[2, 0, 1]] and scores.tolist() == [[1.0, 0.5, 0.0]]
    nothing = ExactSearch(torch.empty(0, 3))
    assert len(nothing) == 0 and [x.shape for x in nothing.search(torch.ones(2, 3), 4)] == [(2, 0), (2, 0)]
    assert [x.shape for x in ExactSearch(torch.eye(3)).search(torch.empty(0, 3), 2)] == [(0, 2), (0, 2)]


@pytest.mark.filterwarnings("ignore:overflow")
def test_numbers_too_large_for_a_float32_product():
    rows = torch.tensor([[1e18, 0.0], [3e18, 0.0], [2e18, 0.0]])
    assert ExactSearch(rows).search(torch.tensor([[1e25, 0.0]]), 2)[1].tolist() == [[1, 2]]


def test_arrays_and_bf16_are_taken():
    rows, query = unit(50, 8, 0), unit(1, 8, 1)
    wanted = ExactSearch(rows).search(query, 4)[1]
    assert torch.equal(ExactSearch(rows.numpy().astype(np.float64)).search(query.numpy(), 4)[1], wanted)
    check(rows.bfloat16(), query.bfloat16(), 4)
    check(rows.requires_grad_().detach().T.contiguous().T, query, 4)  # strides of another order


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    rows = torch.ones(40, 3)
    rows[17, 1] = bad
    with pytest.raises(UserError, match="embeddings to search contain NaN or infinity"):
        ExactSearch(rows)
    with pytest.raises(UserError, match="a query contains NaN or infinity"):
        ExactSearch(torch.ones(4, 3)).search(rows[17:18], 1)


def test_wrong_shapes_and_k():
    search = ExactSearch(torch.ones(4, 3))
    with pytest.raises(UserError, match=r"embeddings to search are \(N, P\), not \(3,\)"):
        ExactSearch(torch.ones(3))
    for query in (torch.ones(3), torch.ones(1, 4)):
        with pytest.raises(UserError, match=r"queries are \(Q, 3\) like the rows"):
            search.search(query, 1)
    with pytest.raises(UserError, match="k is at least 1, not 0"):
        search.search(torch.ones(1, 3), 0)
