"""Does one cut-off serve all queries? Cosines against calibrated scores, on the validation images of a run.

    python -m benchmarks.calibration runs/speedrun [--plot docs/calibration.png]

Pairs of all queries are pooled, as a single threshold sees them. Queries: every validation caption, whose only right
image is its own; words that occur in the captions of at least ten images, and right are the images with the word in
any caption; and both kinds together, words repeated so that there are as many. AP is the area under the pooled
precision-recall curve (scikit-learn), P@R.3 the precision at the threshold that finds three of ten right pairs.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve

from clip_scratch import encode_image, encode_text, load, make_train_valid_dfs
from clip_scratch.retrieval.embed import trained_folder
from clip_scratch.retrieval.index import log_mean_exp
from clip_scratch.retrieval.indexing import _CAPTIONS


def standardised(scores: np.ndarray) -> np.ndarray:
    """Each row less its mean, by its deviation."""
    return (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)


def calibrations(cosines: np.ndarray, bank: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Ways to score (Q, N) cosines; `bank` (N, C) are those of the images with training captions."""
    of_query = log_mean_exp(scale * cosines)[:, None]
    of_image = log_mean_exp(scale * bank)
    by_image = (cosines - bank.mean(1)) / bank.std(1)
    return {
        "cosine": cosines,
        "z over the images": standardised(cosines),
        "z over the captions": by_image,
        "z over captions, then images": standardised(by_image),
        "log ratio, images": scale * cosines - of_query,
        "score (images and captions)": scale * cosines - (of_query + of_image) / 2,
    }


def main() -> None:
    """Print the tables, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model = load(options.run)
    train, valid = make_train_valid_dfs(model.cfg)
    names = valid["image"].drop_duplicates().tolist()
    own = valid["image"].map({name: i for i, name in enumerate(names)}).to_numpy()
    images = encode_image(model, [trained_folder(model.cfg, valid) / name for name in names]).numpy()
    captions = train["caption"].drop_duplicates()
    bank = (
        images @ encode_text(model, captions.sample(min(_CAPTIONS, len(captions)), random_state=0).tolist()).numpy().T
    )

    words_of = [set() for _ in names]
    for i, caption in zip(own, valid["caption"], strict=True):
        words_of[i] |= set(re.findall("[a-z]{3,}", caption.lower()))
    counts = Counter(word for words in words_of for word in words)
    words = [word for word, n in counts.most_common(300)[40:] if n >= 10]  # the commonest are "the", "and", "with" ...
    sentences, keywords = encode_text(model, valid["caption"].tolist()), encode_text(model, words)
    right_image = np.eye(len(names), dtype=bool)[own]
    right_word = np.array([[word in of_image for of_image in words_of] for word in words])
    times = max(1, len(own) // len(words))
    groups = {
        "captions": (sentences.numpy(), right_image),
        "words": (keywords.numpy(), right_word),
        "both": (np.r_[sentences, np.repeat(keywords, times, 0)], np.r_[right_image, np.repeat(right_word, times, 0)]),
    }
    scale, curves = model.logit_scale.item(), {}
    for group, (queries, right) in groups.items():
        print(f"\n{group}: {len(queries):,} queries, {len(names):,} images{'':<18} AP   P@R.3")
        for name, scores in calibrations(queries @ images.T, bank, scale).items():
            precision, recall, thresholds = precision_recall_curve(right.ravel(), scores.ravel())
            curves[group, name] = precision, recall, thresholds
            at = precision[recall >= 0.3][-1]
            print(f"  {name:<44}{100 * average_precision_score(right.ravel(), scores.ravel()):6.1f}  {100 * at:6.1f}")
    print("\nscore at least   captions: precision  recall    words: precision  recall   (percent)")
    for least in range(7):
        row = []
        for group in ("captions", "words"):
            precision, recall, thresholds = curves[group, "score (images and captions)"]
            i = min(np.searchsorted(thresholds, least), len(precision) - 1)
            row += [100 * precision[i], 100 * recall[i]]
        print(f"{least:>14}{row[0]:>21.1f}{row[1]:>8.1f}{row[2]:>18.1f}{row[3]:>8.1f}")
    if options.plot:
        draw(curves, options.plot)


def draw(curves: dict, path: Path) -> None:
    """Pooled precision against recall for the cosine and the score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    for axis, group in zip(figure.subplots(1, 3), ("captions", "words", "both"), strict=True):
        for name, colour in (("cosine", "#888"), ("score (images and captions)", "#d62728")):
            precision, recall, _ = curves[group, name]
            axis.plot(100 * recall, 100 * precision, color=colour, label=name.partition(" (")[0])
        axis.set(title=group, xlabel="recall, %", ylabel="precision, %", xlim=(0, 80), ylim=(0, None))
        axis.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
