"""The contrastive losses against slow, obvious loops in float64, by gradcheck, and by what must not change them."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_scratch.training import losses, tiled_losses
from clip_scratch.training.losses import LOSSES, contrastive_loss, positive_pairs, sigmoid_loss, soft_target_loss


def embeddings(n, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.double), dim=-1)


def dot(a, b):
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


def is_positive(i, j, image_ids, caption_image_ids, caption_ids):
    """Whether caption j describes image i: it is one of its own, or reads like one of its own."""
    for k, owner in enumerate(caption_image_ids):
        if owner == image_ids[i] and (k == j or (caption_ids is not None and caption_ids[k] == caption_ids[j])):
            return True
    return False


def slow_infonce(images, texts, scale, image_ids, caption_image_ids, caption_ids=None):
    def one_way(rows, columns, positive):
        losses = []
        for i, row in enumerate(rows):
            log_p = log_softmax([scale * dot(row, column) for column in columns])
            right = [log_p[j] for j in range(len(columns)) if positive(i, j)]
            losses.append(-math.fsum(right) / len(right))
        return math.fsum(losses) / len(losses)

    def positive(i, j):
        return is_positive(i, j, image_ids, caption_image_ids, caption_ids)

    return (one_way(images, texts, positive) + one_way(texts, images, lambda j, i: positive(i, j))) / 2


def slow_sigmoid(images, texts, scale, image_ids, caption_image_ids, caption_ids=None, bias=0.0):
    total = []
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = scale * dot(image, text) + bias
            sign = 1 if is_positive(i, j, image_ids, caption_image_ids, caption_ids) else -1
            total.append(math.log1p(math.exp(-sign * logit)))
    return math.fsum(total) / len(images)


def slow_soft_target(images, texts, scale, image_ids, caption_image_ids, caption_ids=None):
    images = [images[list(image_ids).index(owner)] for owner in caption_image_ids]
    n = len(texts)
    logits = [[scale * dot(texts[i], images[j]) for j in range(n)] for i in range(n)]
    target = []
    for i in range(n):
        row = [(dot(images[i], images[j]) + dot(texts[i], texts[j])) / 2 / scale for j in range(n)]
        target.append([math.exp(x) for x in log_softmax(row)])
    rows = [log_softmax(row) for row in logits]
    columns = [log_softmax([logits[i][j] for i in range(n)]) for j in range(n)]
    texts_loss = -math.fsum(target[i][j] * rows[i][j] for i in range(n) for j in range(n)) / n
    images_loss = -math.fsum(target[i][j] * columns[j][i] for i in range(n) for j in range(n)) / n
    return (texts_loss + images_loss) / 2


SLOW = {"infonce": slow_infonce, "sigmoid": slow_sigmoid, "soft_target": slow_soft_target}
# image ids, owner of each caption, caption ids
CASES = {
    "one caption each": ([4, 7, 9], [4, 7, 9], None),
    "several captions": ([4, 7, 9], [4, 4, 7, 9, 9, 9], None),
    "captions in any order": ([4, 7, 9], [9, 4, 9, 7, 4], None),
    "an image twice": ([4, 7, 4, 9], [4, 7, 4, 9], None),
    "an image twice, several captions": ([4, 7, 4], [4, 4, 7, 4, 4], [0, 1, 2, 0, 1]),
    "one sentence under two images": ([4, 7, 9], [4, 4, 7, 7, 9], [0, 1, 1, 2, 3]),
    "all captions the same": ([4, 7, 9], [4, 7, 9], [5, 5, 5]),
    "chain of sentences": ([1, 2, 3], [1, 1, 2, 2, 3], [0, 1, 1, 2, 2]),
    "one pair": ([3], [3], None),
}


def tensors(case):
    return [None if ids is None else torch.tensor(ids) for ids in CASES[case]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_slow_version(name, case):
    images, texts = embeddings(len(CASES[case][0])), embeddings(len(CASES[case][1]), seed=1)
    for scale in (1.0, 14.3, 100.0):
        fast = LOSSES[name](images, texts, scale, *tensors(case)).item()
        assert fast == pytest.approx(SLOW[name](images, texts, scale, *CASES[case]), rel=1e-10, abs=1e-12)


def test_sigmoid_with_its_bias():
    images, texts = embeddings(3), embeddings(5, seed=1)
    case = "one sentence under two images"
    fast = sigmoid_loss(images, texts, 10.0, *tensors(case), logit_bias=torch.tensor(-10.0)).item()
    assert fast == pytest.approx(slow_sigmoid(images, texts, 10.0, *CASES[case], bias=-10.0), rel=1e-10)


@pytest.mark.parametrize("case", ["several captions", "an image twice, several captions", "chain of sentences"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name, case):
    ids = tensors(case)

    def loss(images, texts, log_scale):
        return LOSSES[name](F.normalize(images, dim=-1), F.normalize(texts, dim=-1), log_scale.exp(), *ids)

    inputs = embeddings(len(ids[0]), 4), embeddings(len(ids[1]), 4, seed=1), torch.tensor(1.2, dtype=torch.double)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_gradient_of_the_bias():
    ids = tensors("several captions")
    loss = partial(sigmoid_loss, embeddings(3), embeddings(6, seed=1), 5.0, *ids)
    bias = torch.tensor(-3.0, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: loss(logit_bias=b), [bias])


@given(n=st.integers(1, 9), scale=st.floats(0.5, 100), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_one_caption_an_image_is_clip_s_loss(n, scale, seed):
    images, texts, ids = embeddings(n, seed=seed), embeddings(n, seed=seed + 1000), torch.arange(n)
    logits = scale * images @ texts.T
    expected = (F.cross_entropy(logits, ids) + F.cross_entropy(logits.T, ids)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, scale, ids, ids), expected)
    torch.testing.assert_close(contrastive_loss(images, texts, scale, ids, ids, ids + 5), expected)


@st.composite
def batches(draw):
    """A batch with repeated images and repeated sentences, each image with a caption at least."""
    image_ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    owners = image_ids + draw(st.lists(st.sampled_from(image_ids), max_size=6))
    caption_ids = draw(st.lists(st.integers(0, 8), min_size=len(owners), max_size=len(owners)))
    return image_ids, owners, caption_ids, draw(st.integers(0, 999))


@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches(), data=st.data())
@settings(max_examples=40)
def test_order_does_not_matter(name, batch, data):
    image_ids, owners, caption_ids, seed = batch
    if name == "soft_target":  # which of two copies of an image is meant depends on the order
        image_ids = list(dict.fromkeys(image_ids))
    images, texts = embeddings(len(image_ids), seed=seed), embeddings(len(owners), seed=seed + 1000)
    p = torch.tensor(data.draw(st.permutations(range(len(image_ids)))))
    q = torch.tensor(data.draw(st.permutations(range(len(owners)))))
    image_ids, owners, caption_ids = map(torch.tensor, (image_ids, owners, caption_ids))
    one = LOSSES[name](images, texts, 20.0, image_ids, owners, caption_ids)
    other = LOSSES[name](images[p], texts[q], 20.0, image_ids[p], owners[q], caption_ids[q])
    torch.testing.assert_close(one, other)


@given(batch=batches())
@settings(max_examples=40)
def test_random_batches_equal_the_slow_version(batch):
    *ids, seed = batch
    images, texts = embeddings(len(ids[0]), seed=seed), embeddings(len(ids[1]), seed=seed + 1000)
    for name in ("infonce", "sigmoid"):
        fast = LOSSES[name](images, texts, 7.0, *map(torch.tensor, ids)).item()
        assert fast == pytest.approx(SLOW[name](images, texts, 7.0, *ids), rel=1e-9, abs=1e-12)


@given(batch=batches(), shift=st.integers(1, 10**12))
@settings(max_examples=20)
def test_ids_are_names_only(batch, shift):
    image_ids, owners, caption_ids, seed = batch
    images, texts = embeddings(len(image_ids), seed=seed), embeddings(len(owners), seed=seed + 1000)
    image_ids, owners, caption_ids = map(torch.tensor, (image_ids, owners, caption_ids))
    one = contrastive_loss(images, texts, 9.0, image_ids, owners, caption_ids)
    other = contrastive_loss(images, texts, 9.0, image_ids + shift, owners + shift, 3 * caption_ids - shift)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_what_belongs_together_is_not_pushed_apart(loss):
    """Two copies of a pair, and two pairs with one sentence: perfect embeddings have a loss near their least."""
    a, b = torch.eye(4, dtype=torch.double)[:2]
    perfect = torch.stack([a, a, b]), torch.stack([a, a, b])
    ids = torch.tensor([1, 1, 2]), torch.tensor([1, 1, 2])
    sentences = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1])
    blind = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])
    offset = {"logit_bias": -50.0} if loss is sigmoid_loss else {}
    least = 2 / 3 * math.log(2) if loss is contrastive_loss else 0.0  # two positives share the probability
    assert loss(*perfect, 100.0, *ids, **offset).item() == pytest.approx(least, abs=1e-9)
    assert loss(*perfect, 100.0, *sentences, **offset).item() == pytest.approx(least, abs=1e-9)
    if loss is sigmoid_loss:  # InfoNCE has the same value there, but another gradient
        assert loss(*perfect, 100.0, *blind, **offset).item() > 10


def test_a_duplicate_s_gradient_pulls():
    """A sentence that also fits another image: only as a negative does it push that image away."""
    images = embeddings(2).requires_grad_()
    texts = embeddings(2, seed=5)
    ids = torch.tensor([0, 1])

    def pull(caption_ids):
        (gradient,) = torch.autograd.grad(contrastive_loss(images, texts, 10.0, ids, ids, caption_ids), images)
        return -(gradient[0] @ texts[1]).item()  # a step down the gradient moves image 0 towards caption 1 by this

    assert pull(torch.tensor([3, 3])) > pull(None)


def test_positive_pairs_by_hand():
    image_ids, owners, words = torch.tensor([1, 2, 3, 1]), torch.tensor([1, 2, 2, 3]), torch.tensor([0, 0, 1, 2])
    plain = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    shared = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    assert positive_pairs(image_ids, owners).int().tolist() == plain
    assert positive_pairs(image_ids, owners, words).int().tolist() == shared


def test_chance_level_and_extremes():
    """Equal embeddings give ln B; a scale of 100 stays finite in float32."""
    n = 16
    ids, same = torch.arange(n), torch.ones(n, 4) / 2
    assert contrastive_loss(same, same, 30.0, ids, ids).item() == pytest.approx(math.log(n), rel=1e-5)
    worst = torch.eye(n)
    assert contrastive_loss(worst, worst.roll(1, 0), 100.0, ids, ids).item() == pytest.approx(100, rel=1e-3)
    assert contrastive_loss(worst, worst, 100.0, ids, ids).item() == pytest.approx(0, abs=1e-6)
    for loss in (sigmoid_loss, soft_target_loss):
        assert torch.isfinite(loss(worst, worst.roll(1, 0), torch.tensor(100.0), ids, ids))


# --- tile by tile -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiled(monkeypatch):
    """A function that has the losses go tile by tile from now on, so many logits a tile."""

    def switch(logits):
        monkeypatch.setattr(losses, "TILED_FROM", 0)
        monkeypatch.setattr(tiled_losses, "TILE", logits)

    return switch


def value_and_gradients(name, images, texts, scale, ids, **bias):
    inputs = [x.clone().requires_grad_() for x in (images, texts, torch.tensor(scale, dtype=torch.double))]
    bias = {key: torch.tensor(value, dtype=torch.double, requires_grad=True) for key, value in bias.items()}
    value = LOSSES[name](*inputs, *ids, **bias)
    return value.detach(), *torch.autograd.grad(value, [*inputs, *bias.values()])


@given(
    batch=batches(), words=st.booleans(), scale=st.sampled_from([1.0, 14.3, 100.0]), tile=st.sampled_from([1, 9, 99])
)
@settings(max_examples=60)
def test_tiles_change_neither_value_nor_gradients(batch, words, scale, tile):
    *ids, seed = batch
    ids = [torch.tensor(i) for i in ids][: 3 if words else 2]
    images, texts = embeddings(len(ids[0]), seed=seed), embeddings(len(ids[1]), seed=seed + 1000)
    for name, bias in (("infonce", {}), ("sigmoid", {"logit_bias": -3.0})):
        plain = value_and_gradients(name, images, texts, scale, ids, **bias)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "TILED_FROM", 0)
            patch.setattr(tiled_losses, "TILE", tile)
            in_tiles = value_and_gradients(name, images, texts, scale, ids, **bias)
        for one, other in zip(plain, in_tiles, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_tiles_equal_the_slow_version(name, case, tiled):
    tiled(7)
    images, texts = embeddings(len(CASES[case][0])), embeddings(len(CASES[case][1]), seed=1)
    in_tiles = LOSSES[name](images, texts, 14.3, *tensors(case)).item()
    assert in_tiles == pytest.approx(SLOW[name](images, texts, 14.3, *CASES[case]), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_gradients_in_tiles(name, tiled):
    tiled(7)
    test_gradients(name, "an image twice, several captions")


def test_tiles_begin_at_the_threshold(monkeypatch):
    """From `TILED_FROM` logits on no (B, C) matrix is built; below it there is one."""
    images, texts, ids = embeddings(4), embeddings(8, seed=1), (torch.arange(4), torch.arange(8) % 4)
    asked = []
    monkeypatch.setattr(losses, "positive_pairs", lambda *ids: asked.append(ids) or positive_pairs(*ids))
    for name in ("infonce", "sigmoid"):
        for threshold, plain in ((33, 1), (32, 0)):
            monkeypatch.setattr(losses, "TILED_FROM", threshold)
            LOSSES[name](images, texts, 5.0, *ids)
            assert len(asked) == plain, (name, threshold)
            asked.clear()


def test_no_matrix_in_tiles(tiled):
    """What autograd keeps of a tiled step grows with B + C, not with B * C."""
    tiled(256)
    images, texts = embeddings(64).requires_grad_(), embeddings(320, seed=1).requires_grad_()
    ids = torch.arange(64), torch.arange(320) % 64, torch.arange(320) % 300
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        for name in ("infonce", "sigmoid"):
            LOSSES[name](images, texts, 10.0, *ids)
    assert max(kept) < 64 * 320 / 4


def test_extremes_in_tiles(tiled):
    tiled(64)
    test_chance_level_and_extremes()
