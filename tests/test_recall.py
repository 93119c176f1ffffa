"""recall_at_k on matrices worked out by hand, against a slow double loop, and where it is easily got wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_scratch.errors import UserError
from clip_scratch.evaluation import retrieval
from clip_scratch.evaluation.retrieval import format_table, ranks, recall_at_k, recalls_of


def from_similarity(rows):
    """Embeddings whose similarity matrix, captions by images, is exactly `rows`."""
    texts = torch.tensor(rows, dtype=torch.double)  # (C, N)
    return torch.eye(texts.shape[1], dtype=torch.double), texts


def slow_recall(similarity, own, ks):
    """Rank by rank, in plain Python. Similarity of captions by images; a tie ranks before the right one."""
    image_ranks, text_ranks = [], []
    for c, row in enumerate(similarity):
        image_ranks.append(1 + sum(x >= row[own[c]] for i, x in enumerate(row) if i != own[c]))
    for i in sorted(set(own)):
        column = [row[i] for row in similarity]
        best = max(x for c, x in enumerate(column) if own[c] == i)
        text_ranks.append(1 + sum(x >= best for c, x in enumerate(column) if own[c] != i))
    found = {}
    for k in ks:
        found[f"image_retrieval_recall@{k}"] = sum(r <= k for r in image_ranks) / len(image_ranks)
        found[f"text_retrieval_recall@{k}"] = sum(r <= k for r in text_ranks) / len(text_ranks)
    found["rsum"] = 100 * sum(found.values())
    return found | {"image_median_rank": np.median(image_ranks), "text_median_rank": np.median(text_ranks)}


def check(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


# Three images with 3, 1 and 2 captions, no ties. Ranks of the right image: 1 2 3 | 1 | 2 1.
UNEVEN = (
    [[0.9, 0.2, 0.1], [0.5, 0.6, 0.1], [0.1, 0.3, 0.2], [0.3, 0.8, 0.7], [0.1, 0.9, 0.4], [0.2, 0.1, 0.3]],
    [0, 0, 0, 1, 2, 2],
)


def test_uneven_captions_by_hand():
    rows, own = UNEVEN
    # Images: 0's best caption (0.9) leads; 1's (0.8) is behind caption 4 (0.9); 2's (0.4) is behind caption 3 (0.7).
    check(
        recall_at_k(*from_similarity(rows), own, ks=(1, 2, 3)),
        {
            "image_retrieval_recall@1": 3 / 6, "image_retrieval_recall@2": 5 / 6, "image_retrieval_recall@3": 1,
            "text_retrieval_recall@1": 1 / 3, "text_retrieval_recall@2": 1, "text_retrieval_recall@3": 1,
            "image_median_rank": 1.5, "text_median_rank": 2, "rsum": 100 * (3 / 6 + 5 / 6 + 1 + 1 / 3 + 1 + 1),
        },
    )  # fmt: skip


def test_ties_count_against_the_model():
    # Caption 0 ties with image 1, caption 1 with all three; caption 2 is alone; images 3's caption ties with image 0.
    rows = [[0.5, 0.5, 0.1, 0.0], [0.4, 0.4, 0.4, 0.1], [0.0, 0.1, 0.9, 0.2], [0.3, 0.1, 0.2, 0.3]]
    own = [0, 1, 2, 3]
    # Ranks of the image: 2 3 1 2. Columns: 0.5 leads | 0.4 behind 0.5 | 0.9 leads | 0.3 leads.
    check(
        recall_at_k(*from_similarity(rows), own, ks=(1, 2)),
        {
            "image_retrieval_recall@1": 1 / 4, "image_retrieval_recall@2": 3 / 4,
            "text_retrieval_recall@1": 3 / 4, "text_retrieval_recall@2": 1,
            "image_median_rank": 2, "text_median_rank": 1, "rsum": 275,
        },
    )  # fmt: skip


def test_a_tie_between_own_captions_costs_nothing():
    rows, own = [[0.5, 0.1], [0.5, 0.1], [0.1, 0.9]], [0, 0, 1]
    assert recall_at_k(*from_similarity(rows), own, ks=(1,))["text_retrieval_recall@1"] == 1


def test_a_tie_with_another_image_s_caption_costs():
    rows, own = [[0.5, 0.1], [0.4, 0.1], [0.5, 0.9]], [0, 0, 1]
    assert recall_at_k(*from_similarity(rows), own, ks=(1, 2))["text_retrieval_recall@1"] == 1 / 2


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_a_model_that_says_one_thing_or_nothing_finds_nothing(value):
    """The collapsed model: perfect where ties are won, and chance where they are drawn."""
    n = 20
    found = recall_at_k(torch.full((n, 8), value), torch.full((2 * n, 8), value), [i // 2 for i in range(2 * n)])
    assert all(found[key] == 0 for key in found if "recall" in key) and found["rsum"] == 0
    assert found["image_median_rank"] == n and found["text_median_rank"] == 2 * n - 1


def test_one_nan_image_is_never_found_and_hides_others():
    images = torch.eye(3)
    images[1] = torch.nan
    found = recall_at_k(images, torch.eye(3), [0, 1, 2], ks=(1, 2))
    assert found["image_retrieval_recall@1"] == 0
    assert found["text_retrieval_recall@1"] == 2 / 3


def test_collapsed_up_to_rounding():
    """Equal directions in float32 of different lengths of sums still tie."""
    one = F.normalize(torch.randn(1, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = recall_at_k(one.repeat(50, 1), one.repeat(250, 1), torch.arange(250) // 5)
    assert found["rsum"] == 0


def test_all_right():
    n = 12
    found = recall_at_k(torch.eye(n), torch.eye(n).repeat_interleave(3, 0), torch.arange(n).repeat_interleave(3))
    assert found["rsum"] == pytest.approx(600) and found["image_median_rank"] == found["text_median_rank"] == 1
    assert list(found)[:3] == [f"image_retrieval_recall@{k}" for k in (1, 5, 10)]


def test_k_beyond_the_candidates():
    found = recall_at_k(torch.eye(2), torch.eye(2).flip(0), [0, 1], ks=(1, 100))
    assert found["image_retrieval_recall@1"] == 0 and found["text_retrieval_recall@100"] == 1


def test_an_image_without_captions_is_a_candidate_only():
    rows, own = [[0.5, 0.1, 0.6], [0.1, 0.5, 0.2]], [0, 1]
    found = recall_at_k(*from_similarity(rows), own, ks=(1,))
    assert found["image_retrieval_recall@1"] == 1 / 2 and found["text_retrieval_recall@1"] == 1


@st.composite
def problems(draw):
    """Similarities on a coarse grid, so that ties are common; captions in any order, images with none too."""
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    own = draw(st.lists(st.integers(0, n - 1), min_size=c, max_size=c))
    cells = st.integers(-4, 4).map(lambda x: x / 4)
    return draw(st.lists(st.lists(cells, min_size=n, max_size=n), min_size=c, max_size=c)), own


@given(problem=problems(), chunk=st.sampled_from([1, 2, 5, 4096]))
@settings(max_examples=150)
def test_equals_the_slow_version_in_chunks_of_any_size(problem, chunk):
    rows, own = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_CHUNK", chunk)
        check(recall_at_k(*from_similarity(rows), own, ks=(1, 2, 5)), slow_recall(rows, own, (1, 2, 5)))


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_order_does_not_matter(problem, data):
    rows, own = problem
    images, texts = from_similarity(rows)
    p = data.draw(st.permutations(range(len(images))))
    q = data.draw(st.permutations(range(len(own))))
    moved = [p.index(own[c]) for c in q]
    check(recall_at_k(images[p], texts[q], moved), recall_at_k(images, texts, own))


def test_random_embeddings_equal_the_slow_version():
    generator = torch.Generator().manual_seed(3)
    own = torch.randint(30, (77,), generator=generator)
    images = F.normalize(torch.randn(30, 16, generator=generator), dim=-1)
    texts = F.normalize(images[own] + 1.2 * torch.randn(77, 16, generator=generator), dim=-1)
    rows = (texts.double() @ images.double().T).tolist()
    check(recall_at_k(images, texts, own), slow_recall(rows, own.tolist(), (1, 5, 10)))


def test_agrees_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(4)
    own = torch.arange(90) // 3
    images, texts = torch.randn(30, 8, generator=generator), torch.randn(90, 8, generator=generator)
    scores = texts @ images.T
    target = own[:, None] == torch.arange(30)
    found = recall_at_k(images, texts, own)
    for k in (1, 5, 10):
        hits = torchmetrics.retrieval.RetrievalHitRate(top_k=k)
        rows = torch.arange(90)[:, None].expand(90, 30)
        to_image = hits(scores.flatten(), target.flatten(), indexes=rows.flatten()).item()
        hits.reset()
        columns = torch.arange(30)[:, None].expand(30, 90)
        to_text = hits(scores.T.flatten(), target.T.flatten(), indexes=columns.flatten()).item()
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(to_image, abs=1e-6)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(to_text, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_lists_tensors_and_any_precision(dtype):
    images, texts = (x.to(dtype) for x in from_similarity(UNEVEN[0]))
    one = recall_at_k(images, texts, UNEVEN[1])
    assert one == recall_at_k(images, texts, torch.tensor(UNEVEN[1])) == recall_at_k(images, texts, np.array(UNEVEN[1]))
    assert images.dtype == dtype and all(type(value) is float for value in one.values())


def test_refusals():
    with pytest.raises(UserError, match="at least one image and one caption"):
        recall_at_k(torch.zeros(0, 4), torch.zeros(0, 4), [])
    for own in ([0], [0, 2], [0, -1], [0, 1, 1]):
        with pytest.raises(ValueError, match="a row of image_embeddings"):
            recall_at_k(torch.eye(2), torch.eye(2), own)


def test_the_table_shows_percent_and_what_was_measured():
    text = format_table(recall_at_k(*from_similarity(UNEVEN[0]), UNEVEN[1], ks=(1, 2)), "valid", 1000, 5000)
    lines = text.splitlines()
    assert lines[0] == "valid: 1,000 images, 5,000 captions"
    assert lines[1].split() == ["R@1", "R@2", "median", "rank"]
    assert lines[2].split() == ["image", "to", "text", "33.3", "100.0", "2"]
    assert lines[3].split() == ["text", "to", "image", "50.0", "83.3", "1.5"]
    assert lines[-1] == "rsum 266.7"


@given(problem=problems())
@settings(max_examples=60)
def test_the_figures_are_those_of_the_ranks(problem):
    rows, own = problem
    embeddings = from_similarity(rows)
    image_rank, text_rank = ranks(*embeddings, own)
    assert image_rank.dtype == text_rank.dtype == torch.long
    assert len(image_rank) == len(own) and len(text_rank) == len(set(own))
    assert image_rank.min() >= 1 and image_rank.max() <= len(rows[0])
    assert recalls_of(image_rank, text_rank, (1, 2)) == recall_at_k(*embeddings, own, (1, 2))


def test_ranks_by_hand():
    image_rank, text_rank = ranks(*from_similarity(UNEVEN[0]), UNEVEN[1])
    assert image_rank.tolist() == [1, 2, 3, 1, 2, 1] and text_rank.tolist() == [1, 2, 2]
