"""What a trained model adds to a report on a data set: captions that fit their images worst, and how alike pairs are."""

import pandas as pd
import torch

from ..data.doctor import Report
from ..models.clip import DualEncoder
from ..retrieval.embed import encode_image, encode_text

WORST = 100  # captions that are reported
SAME = 0.9  # cosine that confirms a near duplicate
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
    fits = [f"{scores[row]:+.1f} standard deviations from the mean of all images" for row in worst]
    report.add("misfits", table.iloc[worst], fits)

    number = pd.Series(range(len(names)), names)
    for name in {"leaks", "near_duplicates"} & report.findings.keys():
        pairs = report.findings.pop(name)
        cosines = (images[number[pairs["image"]].to_numpy()] * images[number[pairs["other"]].to_numpy()]).sum(1).numpy()
        detail = pairs["detail"] + pd.Series(cosines).map(", cosine {:.2f}".format)
        report.add(name, pairs.assign(detail=detail)[cosines >= SAME])


def fit(images: torch.Tensor, texts: torch.Tensor, image_of_caption: torch.Tensor) -> torch.Tensor:
    """How well each caption fits its image: (N, P), (C, P) and image rows (C,) -> (C,).

    The cosine in standard deviations from the mean of the caption's cosines with a sample of all images, since vague
    captions have higher cosines with every image than specific ones.
    """
    sample = images[:: -(-len(images) // _SAMPLE)]
    scores = []
    for part, own in zip(texts.split(_ROWS), image_of_caption.split(_ROWS), strict=True):
        others = part @ sample.T
        scores.append(((part * images[own]).sum(1) - others.mean(1)) / others.std(1).clamp(min=1e-6))
    return torch.cat(scores)
