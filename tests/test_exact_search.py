"""ExactSearch against a full scan in float64: random rows, ties, and rows that a bf16 scan alone ranks wrongly.

A scan in float32 is exact up to its rounding; one in bf16 scores all candidates again and is exact to the last digit.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_scratch.errors import UserError
from clip_scratch.retrieval import exact
from clip_scratch.retrieval.exact import ExactSearch

BOTH = pytest.mark.parametrize("half", [False, True])


def reference(rows, queries, k):
    """Scores and row numbers of a full scan in float64, equal scores by row."""
    products = (queries.double().numpy()[:, None] * rows.double().numpy()[None]).sum(2)  # (Q, N)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


def check(rows, queries, k, half):
    scores, numbers = ExactSearch(rows, half).search(queries, k)
    wanted, order = reference(rows, queries, k)
    assert scores.dtype == np.float32 and scores.shape == numbers.shape == wanted.shape
    if half:
        assert numbers.tolist() == order.tolist() and scores.tolist() == wanted.astype(np.float32).tolist()
    else:
        rows, queries = rows.double().numpy(), queries.double().numpy()
        rounding = 1e-5 * np.abs(rows).max(initial=0) * np.abs(queries).max(initial=0) * rows.shape[1]
        assert all(len(set(found)) == len(found) for found in numbers.tolist())
        assert np.abs(np.take_along_axis(queries @ rows.T, numbers, 1) - wanted).max(initial=0) <= rounding
        assert np.abs(scores - wanted).max(initial=0) <= rounding


def unit(n, dim, seed):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@BOTH
@given(
    n=st.sampled_from([1, 2, 7, 63, 64, 65, 700]),
    dim=st.sampled_from([1, 3, 16, 256]),
    spread=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    k=st.sampled_from([1, 2, 10, 100, 1000]),
    seed=st.integers(0, 999),
)
@settings(max_examples=80)
def test_equals_a_full_scan_in_float64(half, n, dim, spread, scale, k, seed):
    """Rows all over the sphere, rows crowded closer than bf16 or float32 can tell apart, and equal rows."""
    rows = scale * (unit(1, dim, seed) + spread * unit(n, dim, seed + 1000))
    rows = torch.cat([rows, rows[: n // 3]])
    queries = torch.cat([unit(2, dim, seed + 2000), rows[:1], -rows[:1]])
    check(rows, queries, k, half)


@BOTH
@pytest.mark.parametrize("n", [1000, 20_000])
def test_many_rows(half, n):
    check(unit(n, 64, 0), unit(3, 64, 1), 10, half)


def test_a_bf16_scan_alone_goes_wrong():
    """The best row is rounded down, and 500 others up, so that it scans below all of them."""
    rows = torch.zeros(501, 4)
    rows[:, 0] = 1 + 2.0**-8 + 2.0**-16  # bf16 has 1 and 1 + 2**-7 there, and rounds this up
    rows[137] = torch.tensor([1 + 2.0**-8 - 2.0**-16, 2.0**-6, 0.0, 0.0])  # and this down
    query = torch.tensor([[1.0, 2.0**-8, 0.0, 0.0]])
    scan = (query.bfloat16() @ rows.bfloat16().T).float()[0]
    assert (scan[137] < scan).sum() == 500
    assert ExactSearch(rows, half=True).search(query, 3)[1].tolist() == [[137, 0, 1]]
    check(rows, query, 3, half=True)


def test_few_rows_are_scored_again(monkeypatch):
    """The bound is of use: of 20,000 random rows it leaves a handful."""
    search, scored = ExactSearch(unit(20_000, 256, 0), half=True), []
    scores = ExactSearch._scores
    monkeypatch.setattr(
        ExactSearch, "_scores", lambda self, q, numbers: scored.append(len(numbers)) or scores(self, q, numbers)
    )
    search.search(unit(5, 256, 1), 10)
    assert len(scored) == 5 and all(10 <= count < 60 for count in scored)


def test_equal_rows_come_in_their_order():
    rows = unit(1, 256, 0).repeat(5000, 1)
    scores, numbers = ExactSearch(rows, half=True).search(unit(1, 256, 1), 7)
    assert numbers.tolist() == [list(range(7))] and len(set(scores[0].tolist())) == 1


@BOTH
def test_one_query_of_many_and_alone(half, monkeypatch):
    search, queries = ExactSearch(unit(300, 16, 0), half), unit(9, 16, 1)
    together = search.search(queries, 5)
    monkeypatch.setattr(exact, "_SCAN", 700)  # two queries at a time
    for one, other in zip(together, search.search(queries, 5), strict=True):
        assert np.allclose(one, other, atol=1e-6)
    for i, query in enumerate(queries):
        assert search.search(query[None], 5)[1][0].tolist() == together[1][i].tolist()


@BOTH
def test_few_rows_many_asked_and_none(half):
    scores, numbers = ExactSearch(torch.eye(3), half).search(torch.tensor([[0.5, 0.0, 1.0]]), 10)
    assert numbers.tolist() == [[2, 0, 1]] and scores.tolist() == [[1.0, 0.5, 0.0]]
    nothing = ExactSearch(torch.empty(0, 3), half)
    assert len(nothing) == 0 and [x.shape for x in nothing.search(torch.ones(2, 3), 4)] == [(2, 0), (2, 0)]
    assert [x.shape for x in ExactSearch(torch.eye(3), half).search(torch.empty(0, 3), 2)] == [(0, 2), (0, 2)]


@pytest.mark.filterwarnings("ignore:overflow")
def test_numbers_too_large_for_a_float32_product():
    rows = torch.tensor([[1e18, 0.0], [3e18, 0.0], [2e18, 0.0]])
    assert ExactSearch(rows, half=True).search(torch.tensor([[1e25, 0.0]]), 2)[1].tolist() == [[1, 2]]


def test_arrays_and_half_precision_are_taken():
    rows, query = unit(50, 8, 0), unit(1, 8, 1)
    wanted = ExactSearch(rows).search(query, 4)[1]
    assert ExactSearch(rows.numpy().astype(np.float64)).search(query.numpy(), 4)[1].tolist() == wanted.tolist()
    check(rows.bfloat16(), query.bfloat16(), 4, half=False)
    check(rows.requires_grad_().detach().T.contiguous().T, query, 4, half=True)  # strides of another order


def test_the_copy_is_made_where_it_pays(monkeypatch):
    monkeypatch.setattr(exact, "HALF_FROM", 64)
    for in_bf16 in (True, False):
        monkeypatch.setattr(exact, "_computes_in_bf16", lambda answer=in_bf16: answer)
        assert (ExactSearch(torch.ones(8, 8)).half is not None) == in_bf16
        assert ExactSearch(torch.ones(7, 9)).half is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@BOTH
def test_what_is_not_finite_is_refused(half, bad):
    rows = torch.ones(40, 3)
    rows[17, 1] = bad
    with pytest.raises(UserError, match="embeddings to search contain NaN or infinity"):
        ExactSearch(rows, half)
    with pytest.raises(UserError, match="a query contains NaN or infinity"):
        ExactSearch(torch.ones(4, 3), half).search(rows[17:18], 1)


def test_wrong_shapes_and_k():
    search = ExactSearch(torch.ones(4, 3))
    with pytest.raises(UserError, match=r"embeddings to search are \(N, P\), not \(3,\)"):
        ExactSearch(torch.ones(3))
    for query in (torch.ones(3), torch.ones(1, 4)):
        with pytest.raises(UserError, match=r"queries are \(Q, 3\) like the rows"):
            search.search(query, 1)
    with pytest.raises(UserError, match="k is at least 1, not 0"):
        search.search(torch.ones(1, 3), 0)
