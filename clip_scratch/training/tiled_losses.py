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


class Positives:
    """The positive pairs of B images and C captions, with no matrix such as that of `positive_pairs`.

    Images with one id form a group, captions that read the same form another, and a link joins an image group to a
    caption group that has one of its captions: at most C links.
    """

    def __init__(self, image_ids, caption_image_ids, caption_ids=None):
        groups = torch.cat([image_ids, caption_image_ids]).unique(return_inverse=True)[1]
        self.images, owner = groups.split([len(image_ids), len(caption_image_ids)])  # the group of each, (B,), (C,)
        if caption_ids is None:
            caption_ids = torch.arange(len(owner), device=owner.device)
        self.captions = caption_ids.unique(return_inverse=True)[1]  # (C,)
        self.links = torch.stack([owner, self.captions]).unique(dim=1)  # (2, links)

    def of_images(self, images, texts, rows=slice(None), columns=slice(None)):
        """The sum of the positive logits of each image, and their number: (b, P), (c, P) -> (b,), (b,).

        `rows` and `columns` say which of the B images and C captions are given; all, by default.
        """
        return self._sums(images, self.images[rows], self.links[0], texts, self.captions[columns], self.links[1])

    def of_captions(self, images, texts):
        """The same of each caption: (B, P), (C, P) -> (C,), (C,)."""
        return self._sums(texts, self.captions, self.links[1], images, self.images, self.links[0])

    def _sums(self, rows, row_group, row_link, columns, column_group, column_link):
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)  # the last dimension counts
        zeros = columns.new_zeros(len(self.images) + len(self.captions), columns.shape[1])  # there are no more groups
        sums = zeros.index_add(0, column_group, columns)
        total = zeros.index_add(0, row_link, sums[column_link])[row_group]  # (rows, P + 1)
        return (rows * total[:, :-1]).sum(1), total[:, -1]


def tiled_contrastive_loss(images, texts, *ids):
    """`contrastive_loss`: a cross-entropy is the logsumexp less the mean over the positives."""
    of_rows, of_columns = _LogSumExps.apply(images, texts)
    positives = Positives(*ids)
    row_sum, row_count = positives.of_images(images, texts)
    column_sum, column_count = positives.of_captions(images, texts)
    return ((of_rows - row_sum / row_count).mean() + (of_columns - column_sum / column_count).mean()) / 2


def tiled_log_sum_exp(rows, columns):
    """The logsumexp of each row of rows @ columns.T: (R, P), (C, P) -> (R,)."""

    def of_tile(tile):
        return (tile @ columns.T).logsumexp(1)

    return torch.cat([checkpoint(of_tile, tile, use_reentrant=False) for tile in _tiles(rows, columns)])


def tiled_sigmoid_sum(images, texts, logit_bias, logits, count):
    """`sigmoid_loss` before the mean: every pair as a negative, and then less its logit if it is a positive.

    `logits` and `count` are the sum of each image's positive logits and their number, without the bias.
    """

    def as_negatives(tile):
        return -F.logsigmoid(-(tile @ texts.T + logit_bias)).sum()

    total = sum(checkpoint(as_negatives, tile, use_reentrant=False) for tile in _tiles(images, texts))
    return total - (logits + logit_bias * count).sum()
