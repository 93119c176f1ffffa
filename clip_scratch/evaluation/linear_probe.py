"""Linear probe: logistic regression on frozen image embeddings, as in Radford et al. 2021, section 3.2.

One difference: the features are the embeddings that retrieval compares, projected and L2-normalised. The paper probes
the image tower before the projection, so its accuracies are not comparable with these.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ..errors import UserError
from .classification import UNSEEN, Classified, measure_classes

C_GRID = tuple(10.0**power for power in range(-3, 7))  # inverse strengths of the L2 penalty that are tried
Labelled = tuple[np.ndarray, Sequence[str]]  # features (N, D) and N labels


def fit(features: np.ndarray, labels: Sequence[str], c: float):
    """scikit-learn's LogisticRegression (lbfgs) on features (N, D), with inverse L2 strength `c`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # With almost no penalty the weights keep growing long after the predictions have settled
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=1000).fit(features, labels)


def choose_c(train: Labelled, held_out: Labelled) -> float:
    """The C of the grid with the best accuracy on the held-out images; the smallest of equals."""
    return max(C_GRID, key=lambda c: fit(*train, c).score(*held_out))


def hold_out(labels: np.ndarray) -> np.ndarray:
    """A mask (N,) of one image in five, drawn from each class with two images or more, of which one at least stays."""
    shuffled = pd.Series(labels).iloc[np.random.default_rng(0).permutation(len(labels))]
    return (shuffled.groupby(shuffled).cumcount() % 5 == 1).sort_index().to_numpy()


def linear_probe(train: Labelled, report: Labelled, valid: Labelled | None = None) -> Classified:
    """Fit on `train`, report on `report`.

    C is chosen on `valid`, or without it on a fifth of the training images; the classifier is then fitted on all
    training images. The metrics, with `C`, `n_train_images` and `n_unseen`, are over the training classes; the
    `n_unseen` reported images whose class has no training image count as wrong. Raises UserError where there is one
    class only, and without `valid` where every class has one image only.
    """
    features, labels = train[0], np.asarray(train[1])
    if (labels == labels[0]).all():
        raise UserError(f"a linear probe needs two classes; all training images have the label {str(labels[0])!r}")
    fitted, held_out = train, valid
    if valid is None:
        mask = hold_out(labels)
        if not mask.any():
            remedy = "add images, or report another split than valid"
            raise UserError(f"every class has only one training image, so none can be held out to choose C: {remedy}")
        fitted, held_out = (features[~mask], labels[~mask]), (features[mask], labels[mask])
    c = choose_c(fitted, held_out)
    classifier = fit(features, labels, c)
    targets = pd.Index(classifier.classes_).get_indexer(report[1])
    scores = classifier.decision_function(report[0])
    scores = np.stack([-scores, scores], 1) if scores.ndim == 1 else scores  # of two classes it gives one column
    found = measure_classes(torch.from_numpy(scores), torch.from_numpy(targets), classifier.classes_.tolist())
    found.metrics |= {"C": c, "n_train_images": len(labels), "n_unseen": int((targets == UNSEEN).sum())}
    return found
