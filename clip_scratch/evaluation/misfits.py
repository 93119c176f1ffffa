"""What a trained model adds to a report on a data set: the captions that fit their images worst."""

import pandas as pd
import torch
from torch.nn.functional import normalize

from ..data.doctor import Report
from ..models.clip import DualEncoder
from ..retrieval.embed import encode_image, encode_text

WORST = 100  # captions that are reported
SAME = 0.7  # cosine that confirms a near duplicate; of two photos of Flickr8k 98% have less
_SAMPLE = 2000  # images that a caption is compared with
_ROWS = 4096  # captions at a time


def add_misfits(report: Report, model: DualEncoder, progress: bool = True) -> None:
    """Add the finding "misfits", and take pairs of near duplicates out whose embeddings are not alike."""
    table = report.table[report.table["image"].isin(report.images.index)]
    if table.empty:
        return
    image_of_caption, names = pd.factorize(table["image"])
    images = encode_image(model, [report.folder / name for name in names], progress=progress)
    texts = encode_text(model, table["caption"].tolist(), progress=progress)
    scores = fit(images, texts, torch.from_numpy(image_of_caption))
    worst = scores.argsort()[:WORST].numpy()
    fits = [f"fit {scores[row]:+.1f} (a random image: 0)" for row in worst]
    report.add("misfits", table.iloc[worst], fits)

    for name in {"leaks", "near_duplicates"} & report.findings.keys():
        pairs = report.findings.pop(name)
        one, other = (images[names.get_indexer(pairs[side])] for side in ("image", "other"))
        cosines = (one * other).sum(1).numpy()
        detail = pairs["detail"] + pd.Series(cosines).map(", cosine {:.2f}".format)
        report.add(name, pairs[cosines >= SAME], detail)


def fit(images: torch.Tensor, texts: torch.Tensor, image_of_caption: torch.Tensor) -> torch.Tensor:
    """How well each caption fits: (N, P), (C, P) and image rows (C,) -> (C,).

    A caption is compared with its image together with the image's other captions, which are right more often than the
    model. The cosine is in standard deviations from the mean of its cosines with a sample of all images and their
    captions, since vague captions have higher cosines with every image than specific ones.
    """
    total = torch.zeros_like(images).index_add(0, image_of_caption, texts)
    sample = normalize(images + normalize(total, dim=1), dim=1)[:: -(-len(images) // _SAMPLE)]
    scores = []
    for part, own in zip(texts.split(_ROWS), image_of_caption.split(_ROWS), strict=True):
        target = normalize(images[own] + normalize(total[own] - part, dim=1), dim=1)  # without others: the image
        cosines = part @ sample.T
        scores.append(((part * target).sum(1) - cosines.mean(1)) / cosines.std(1, correction=0).clamp(min=1e-6))
    return torch.cat(scores)
