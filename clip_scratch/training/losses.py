"""Contrastive losses that know which captions belong to which images.

B images, C captions, P dimensions. A batch may hold several captions of an image, the same image twice, and
the same sentence under two images: none of those is a negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def positive_pairs(
    image_ids: torch.Tensor, caption_image_ids: torch.Tensor, caption_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Which caption describes which image: (B,), (C,) -> bool (B, C).

    Captions with equal `caption_ids` (C,) read the same, so each describes the other's image as well.
    """
    positive = image_ids[:, None] == caption_image_ids[None, :]  # (B, C)
    if caption_ids is not None:
        same_words = caption_ids[:, None] == caption_ids[None, :]  # (C, C)
        positive = (positive.float() @ same_words.float()) > 0
    return positive


def contrastive_loss(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor,
    caption_image_ids: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE with several positives: the mean of image-to-text and text-to-image cross-entropy.

    (B, P) and (C, P) L2-normalised embeddings, the factor from cosine to logit, (B,) and (C,) image ids, and
    optionally (C,) ids of equal captions -> a scalar. The target of a row is uniform over its positives, so
    one caption an image gives CLIP's loss (Radford et al. 2021, arXiv:2103.00020) and several give UniCL's
    (Yang et al. 2022, arXiv:2204.03610). Every image and every caption needs a positive in the batch.
    """
    logits = logit_scale * image_embeddings @ text_embeddings.T  # (B, C)
    target = positive_pairs(image_ids, caption_image_ids, caption_ids).to(logits.dtype)
    to_text = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def sigmoid_loss(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor,
    caption_image_ids: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
    logit_bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343): every (image, caption) is a yes-or-no question.

    Shapes as `contrastive_loss`; summed over all pairs and divided by the B images.
    """
    logits = logit_scale * image_embeddings @ text_embeddings.T + logit_bias  # (B, C)
    sign = 2 * positive_pairs(image_ids, caption_image_ids, caption_ids).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image_embeddings)


def soft_target_loss(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor,
    caption_image_ids: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
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
