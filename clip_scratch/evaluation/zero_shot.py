"""Zero-shot classification: the label whose prompts lie nearest to an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F

from ..errors import UserError
from ..models.clip import CLIPModel
from ..retrieval.embed import ImageLike, encode_image, encode_text

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")


def classify(
    model: CLIPModel,
    images: ImageLike | Sequence[ImageLike],
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> list[list[tuple[str, float]]]:
    """For each image, every label with its probability, best first.

    A label's vector is the mean of its normalised prompts, normalised again (Radford et al. 2021, section
    3.1.4); probabilities are the softmax at the model's temperature. Raises UserError for a template without {}
    and where there is no label or template.
    """
    if not labels or not templates:
        raise UserError("classification needs at least one label and one template")
    if wrong := [t for t in templates if "{}" not in t]:
        raise UserError(f"a template holds {{}} where the label goes, not {wrong[0]!r}")
    prompts = [template.format(label) for label in labels for template in templates]
    per_label = encode_text(model, prompts).view(len(labels), len(templates), -1).mean(1)  # (labels, P)
    cosine = encode_image(model, images) @ F.normalize(per_label, dim=-1).T  # (N, labels)
    probabilities = (model.logit_scale.detach().cpu() * cosine).softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True)
    return [[(labels[i], p[i].item()) for i in row.tolist()] for p, row in zip(probabilities, order, strict=True)]
