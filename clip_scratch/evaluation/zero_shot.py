"""Zero-shot classification: the label whose prompts are nearest to an image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..models.clip import DualEncoder
from ..retrieval.embed import ImageLike, encode_image, encode_text

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")


def classify(
    model: DualEncoder, images: ImageLike | Sequence[ImageLike], labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> list[list[tuple[str, float]]]:  # fmt: skip
    """For each image, every label with its probability, best first.

    Probabilities are the softmax, at the model's temperature, over the cosines with `label_embeddings`, which also
    raises its errors.
    """
    per_label = label_embeddings(model, labels, templates)  # (K, P)
    return ranked_labels(model, encode_image(model, images) @ per_label.T, labels)


def ranked_labels(model: DualEncoder, cosine: torch.Tensor, labels: Sequence[str]) -> list[list[tuple[str, float]]]:
    """Every label with its probability, best first, for each row of cosines (N, K)."""
    best = (model.logit_scale.detach().cpu() * cosine).softmax(-1).sort(descending=True)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(labels[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def label_embeddings(model: DualEncoder, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> torch.Tensor:
    """One L2-normalised vector per label, (K, P): the mean of its normalised prompts, normalised again.

    Radford et al. 2021, section 3.1.4. Underscores of a label become spaces in the prompts: data sets name their
    classes like dhoti_pants. Raises UserError for a template without {}, for labels that prompts cannot tell apart
    (equal up to case, spacing and underscores), and where there is no label or template.
    """
    if not labels or not templates:
        raise UserError("classification needs at least one label and one template")
    if wrong := [t for t in templates if "{}" not in t]:
        raise UserError(f"a template has {{}} where the label goes, unlike {wrong[0]!r}")
    seen: dict[str, str] = {}
    for label in labels:
        words = " ".join(label.replace("_", " ").lower().split())
        if words in seen:
            raise UserError(f"prompts cannot tell the labels {seen[words]!r} and {label!r} apart: use other words")
        seen[words] = label
    # replace, not format: other braces in a template are part of the sentence
    prompts = [template.replace("{}", label.replace("_", " ")) for label in labels for template in templates]
    per_label = encode_text(model, prompts).view(len(labels), len(templates), -1).mean(1)  # (K, P)
    return F.normalize(per_label, dim=-1)
