"""The loss of a batch that several processes hold together, of which each computes its own rows of the logits.

Every process has the embeddings of some of the B images and C captions. The terms of the loss are divided among the N
processes, so that each computes B * C / N logits (for InfoNCE twice, once a direction), in tiles. The shares add up to
the loss of one process, and their gradients to its gradients.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .distributed import gather, gather_with_gradient, rank, world_size
from .losses import contrastive_loss, sigmoid_loss
from .tiled_losses import Positives, tiled_log_sum_exp, tiled_sigmoid_sum


def loss_share(
    loss: Callable[..., torch.Tensor], images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor, *ids
) -> torch.Tensor:
    """This process's share of `loss` over the images and captions of all processes; the shares add up to it.

    `loss` as `train_epoch` takes it; (b, P) and (c, P) embeddings and their ids in this process -> a scalar. A loss
    of one's own is computed whole by every process, which takes an equal share.
    """
    if world_size() == 1:
        return loss(images, texts, logit_scale, *ids)
    ids = [i if i is None else gather(i) for i in ids]
    image_spans, text_spans = _spans(ids[0]), _spans(ids[1])
    ids = [i if i is None else torch.cat(i) for i in ids]
    if isinstance(loss, partial) and loss.func is sigmoid_loss:  # with a bias to learn
        where = Positives(*ids), image_spans[rank()], text_spans
        total = _RingSigmoid.apply(logit_scale * images, texts, loss.keywords["logit_bias"], *where)
        return total / len(ids[0])
    images, texts = gather_with_gradient(images), gather_with_gradient(texts)
    if loss is contrastive_loss:
        spans = image_spans[rank()], text_spans[rank()]
        return _contrastive_share(logit_scale * images, texts, Positives(*ids), *spans)
    return loss(images, texts, logit_scale, *ids) / world_size()


def _spans(parts: list[torch.Tensor]) -> list[slice]:
    """Where the rows of each process are among those of all."""
    return [slice(*span) for span in pairwise(accumulate(map(len, parts), initial=0))]


def _contrastive_share(images, texts, positives: Positives, image_span: slice, text_span: slice) -> torch.Tensor:
    """The cross-entropies of some images and some captions, (B, P) and (C, P), as `contrastive_loss` averages them."""
    image_sum, image_count = positives.of_images(images, texts)
    text_sum, text_count = positives.of_captions(images, texts)
    of_images = tiled_log_sum_exp(images[image_span], texts) - (image_sum / image_count)[image_span]
    of_texts = tiled_log_sum_exp(texts[text_span], images) - (text_sum / text_count)[text_span]
    return (of_images.sum() / len(images) + of_texts.sum() / len(texts)) / 2


class _RingSigmoid(torch.autograd.Function):
    """The sum of `sigmoid_loss` over the images of this process and the captions of all, which go round (SigLIP).

    A process holds its own captions and those of one other at a time, and nothing as long as C. The gradients of the
    captions are computed in the forward pass and travel with them, until both are home.
    """

    @staticmethod
    def forward(ctx, images, texts, logit_bias, positives: Positives, image_span: slice, text_spans: list[slice]):
        total, d_images, d_bias = 0.0, torch.zeros_like(images), torch.zeros_like(logit_bias)
        longest = max(span.stop - span.start for span in text_spans)
        going_round = F.pad(torch.stack([texts, torch.zeros_like(texts)]), (0, 0, 0, longest - len(texts)))
        for turn in range(world_size()):
            span = text_spans[(rank() + turn) % world_size()]
            others, d_others = going_round[:, : span.stop - span.start]
            with torch.enable_grad():
                leaves = [leaf.detach().requires_grad_() for leaf in (images, others, logit_bias)]
                sums = positives.of_images(*leaves[:2], image_span, span)
                value = tiled_sigmoid_sum(*leaves, *sums)
            gradients = torch.autograd.grad(value, leaves)
            total += value.detach()
            for whole, part in zip((d_images, d_others, d_bias), gradients, strict=True):
                whole += part
            going_round = _from_next(going_round)
        ctx.save_for_backward(d_images, going_round[1, : len(texts)], d_bias)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return *(gradient * d for d in ctx.saved_tensors), None, None, None


def _from_next(tensor: torch.Tensor) -> torch.Tensor:
    """What the next process has, of the same shape; the previous one gets this process's."""
    received = torch.empty_like(tensor)
    previous, following = ((rank() + step) % world_size() for step in (-1, 1))
    sends = [dist.P2POp(dist.isend, tensor.contiguous(), previous), dist.P2POp(dist.irecv, received, following)]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    return received
