"""Contrastive losses that know which captions belong to which images.

B images, C captions, P dimensions. A batch may hold several captions of an image, the same image twice, and
the same sentence under two images: none of those is a negative.
"""

import torch
import torch.nn.functional as F

from .tiled_losses import Positives, tiled_contrastive_loss, tiled_sigmoid_sum

# Number of logits (B * C) from which a loss is computed in tiles. Measured on two cores: from here on tiles, which
# stay in the processor's cache, are faster as well, and the plain loss takes 30 bytes per logit.
TILED_FROM = 2**22


def positive_pairs(
    image_ids: torch.Tensor, caption_image_ids: torch.Tensor, caption_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Which caption describes which image: (B,), (C,) -> bool (B, C).

    Captions with equal `caption_ids` (C,) read the same, so each describes the other's image as well.
    """
    positive = image_ids[:, None] == caption_image_ids[None, :]  # (B, C)
    if caption_ids is not None:
        words = caption_ids.unique(return_inverse=True)[1]  # (C,), numbered from 0
        described = torch.zeros_like(positive.T, dtype=torch.float)  # by a caption with these words, (words, B)
        positive = described.index_add_(0, words, positive.T.float())[words].T > 0
    return positive


def contrastive_loss(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor, caption_image_ids: torch.Tensor, caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Symmetric InfoNCE with several positives: the mean of image-to-text and text-to-image cross-entropy.

    (B, P) and (C, P) L2-normalised embeddings, the factor from cosine to logit, (B,) and (C,) image ids, and
    optionally (C,) ids of equal captions -> a scalar. The target of a row is uniform over its positives, so
    one caption an image gives CLIP's loss (Radford et al. 2021, arXiv:2103.00020) and several give UniCL's
    (Yang et al. 2022, arXiv:2204.03610). Every image and every caption needs a positive in the batch. From
    `TILED_FROM` logits on, the same value and gradients are computed tile by tile, with no (B, C) matrix.
    """
    ids = image_ids, caption_image_ids, caption_ids
    if len(image_embeddings) * len(text_embeddings) >= TILED_FROM:
        return tiled_contrastive_loss(logit_scale * image_embeddings, text_embeddings, *ids)
    logits = logit_scale * image_embeddings @ text_embeddings.T  # (B, C)
    target = positive_pairs(*ids).to(logits.dtype)
    to_text = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def sigmoid_loss(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor, caption_image_ids: torch.Tensor, caption_ids: torch.Tensor | None = None,
    logit_bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343): every (image, caption) is a yes-or-no question.

    Shapes as `contrastive_loss`; summed over all pairs and divided by the B images. Tiled as `contrastive_loss` is.
    """
    ids = image_ids, caption_image_ids, caption_ids
    if len(image_embeddings) * len(text_embeddings) >= TILED_FROM:
        images = logit_scale * image_embeddings
        positives = Positives(*ids).of_images(images, text_embeddings)
        return tiled_sigmoid_sum(images, text_embeddings, logit_bias, *positives) / len(images)
    logits = logit_scale * image_embeddings @ text_embeddings.T + logit_bias  # (B, C)
    sign = 2 * positive_pairs(*ids).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image_embeddings)


def soft_target_loss(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor, caption_image_ids: torch.Tensor, caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The loss of the well-known OpenAI-CLIP tutorial (M. M. Shariatnia, 2021), kept for comparison only.

    Its targets are the softmax of the mean of the image-image and text-text similarities, so two towers that
    agree on a wrong geometry are never corrected. Shapes as `contrastive_loss`; each caption is paired with
    its image, and `caption_ids` plays no part.
    """
    row = (caption_image_ids[:, None] == image_ids[None, :]).int().argmax(1)  # the image of each caption, (C,)
    images = image_embeddings[row]  # (C, P)
    logits = logit_scale * text_embeddings @ images.T  # (C, C)
    similarity = (images @ images.T + text_embeddings @ text_embeddings.T) / 2
    target = (similarity / logit_scale).softmax(-1)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2


LOSSES = {"infonce": contrastive_loss, "sigmoid": sigmoid_loss, "soft_target": soft_target_loss}
