"""The losses of losses.py without a (B, C) matrix. `images` (B, P) are multiplied by the logit scale already."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

TILE = 2**21  # logits in a tile


def _tiles(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The images (B, P) in runs of rows that have about `TILE` logits each."""
    return images.split(max(1, TILE // len(texts)))


class _LogSumExps(torch.autograd.Function):
    """The logsumexp of each row and of each column of images @ texts.T: (B, P), (C, P) -> (B,), (C,).

    The logits of a tile live no longer than the tile; the backward pass computes them again.
    """

    @staticmethod
    def forward(ctx, images, texts):
        # Results are written in place: small tensors kept between the tiles would split the freed memory, and no tile
        # would fit where the last one was
        of_rows, of_columns, end = texts.new_empty(len(images)), texts.new_full((len(texts),), -torch.inf), 0
        for tile in _tiles(images, texts):
            logits = tile @ texts.T  # (rows, C)
            of_rows[end : (end := end + len(tile))] = logits.logsumexp(1)
            torch.logaddexp(of_columns, logits.logsumexp(0), out=of_columns)
        ctx.save_for_backward(images, texts, of_rows, of_columns)
        return of_rows, of_columns

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_columns):
        images, texts, of_rows, of_columns = ctx.saved_tensors
        d_images, d_texts, end = torch.empty_like(images), torch.zeros_like(texts), 0
        for tile in _tiles(images, texts):
            rows = slice(end, end := end + len(tile))
            logits = tile @ texts.T  # (rows, C)
            d_logits = (logits - of_rows[rows, None]).exp_().mul_(d_rows[rows, None])  # softmax of the rows ...
            d_logits += logits.sub_(of_columns).exp_().mul_(d_columns)  # ... and of the columns
            torch.mm(d_logits, texts, out=d_images[rows])
            d_texts.addmm_(d_logits.T, tile)
        return d_images, d_texts


def _positive_sums(images, texts, image_ids, caption_image_ids, caption_ids=None):
    """The sum of the positive logits and their number, of each image, (B,), (B,), and of each caption, (C,), (C,).

    With no matrix such as that of `positive_pairs`: images with one id form a group, captions that read the same form
    another, and a link joins an image group to a caption group that has one of its captions: at most C links.
    """
    groups = torch.cat([image_ids, caption_image_ids]).unique(return_inverse=True)[1]
    image_group, owner = groups.split([len(image_ids), len(caption_image_ids)])
    if caption_ids is None:
        caption_ids = torch.arange(len(owner), device=owner.device)
    caption_group = caption_ids.unique(return_inverse=True)[1]
    image_link, caption_link = torch.stack([owner, caption_group]).unique(dim=1)
    of_images = _linked_sums(images, image_group, image_link, texts, caption_group, caption_link)
    return *of_images, *_linked_sums(texts, caption_group, caption_link, images, image_group, image_link)


def _linked_sums(rows, row_group, row_link, columns, column_group, column_link):
    """For each row the sum of its dot products with the columns of the groups linked to its own, and their number."""
    columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)  # the last dimension counts
    zeros = columns.new_zeros(len(rows) + len(columns), columns.shape[1])  # there are no more groups
    sums = zeros.index_add(0, column_group, columns)
    total = zeros.index_add(0, row_link, sums[column_link])[row_group]  # (rows, P + 1)
    return (rows * total[:, :-1]).sum(1), total[:, -1]


def tiled_contrastive_loss(images, texts, *ids):
    """`contrastive_loss`: a cross-entropy is the logsumexp less the mean over the positives."""
    of_rows, of_columns = _LogSumExps.apply(images, texts)
    row_sum, row_count, column_sum, column_count = _positive_sums(images, texts, *ids)
    return ((of_rows - row_sum / row_count).mean() + (of_columns - column_sum / column_count).mean()) / 2


def tiled_sigmoid_loss(images, texts, logit_bias, *ids):
    """`sigmoid_loss`: every pair as a negative, and then less its logit if it is a positive."""

    def as_negatives(tile):
        return -F.logsigmoid(-(tile @ texts.T + logit_bias)).sum()

    total = sum(checkpoint(as_negatives, tile, use_reentrant=False) for tile in _tiles(images, texts))
    logits, count, *_ = _positive_sums(images, texts, *ids)
    return (total - (logits + logit_bias * count).sum()) / len(images)
