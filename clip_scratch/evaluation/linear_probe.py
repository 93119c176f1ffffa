"""Linear probe: logistic regression on frozen image embeddings, as in Radford et al. 2021, section 3.2.

One difference: the features are the embeddings that retrieval compares, projected and L2-normalised. The paper probes
the image tower before the projection, so its accuracies are not comparable with these.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ..errors import UserError
from .classification import UNSEEN, Classified, classification_metrics

C_GRID = tuple(10.0**power for power in range(-3, 7))  # inverse strengths of the L2 penalty that are tried
_HELD_OUT = 5  # one image of a class in so many is held out, where C cannot be chosen on the validation split


def fit(features: np.ndarray, labels: Sequence[str], c: float):
    """scikit-learn's LogisticRegression (lbfgs) on features (N, D), with inverse L2 strength `c`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # With almost no penalty the weights keep growing long after the predictions have settled
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=1000).fit(features, labels)


def scores_of(classifier, features: np.ndarray) -> torch.Tensor:
    """The classifier's decision values, (N, K), for its K classes in the order of `classes_`."""
    values = torch.from_numpy(np.asarray(classifier.decision_function(features), dtype=np.float64))
    return torch.stack([-values, values], 1) if values.ndim == 1 else values  # of two classes it gives one column


def choose_c(
    features: np.ndarray, labels: Sequence[str], held_out: np.ndarray, held_out_labels: Sequence[str]
) -> float:
    """The C of the grid with the best accuracy on the held-out images; the smallest of equals."""
    accuracy = [
        float(np.mean(fit(features, labels, c).predict(held_out) == np.asarray(held_out_labels))) for c in C_GRID
    ]
    return C_GRID[int(np.argmax(accuracy))]


def hold_out(labels: Sequence[str], seed: int = 0) -> np.ndarray:
    """A mask (N,) of one image in five, drawn from each class with two images or more, of which one at least stays.

    Raises UserError where every class has one image only.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = pd.Series(np.asarray(labels)[order])
    mask = np.zeros(len(labels), dtype=bool)
    mask[order[shuffled.groupby(shuffled).cumcount() % _HELD_OUT == 1]] = True
    if not mask.any():
        raise UserError(
            "every class has only one training image, so none can be held out to choose the regularisation: "
            "add images, or report another split than valid"
        )
    return mask


def linear_probe(
    train: tuple[np.ndarray, Sequence[str]],
    report: tuple[np.ndarray, Sequence[str]],
    valid: tuple[np.ndarray, Sequence[str]] | None = None,
    seed: int = 0,
) -> Classified:
    """Fit on `train`, report on `report`; each is features (N, D) and N labels.

    C is chosen on `valid`, or without it on a fifth of the training images; the classifier is then fitted on all
    training images. The metrics, with `C`, `n_train_images` and `n_unseen`, are over the training classes; the
    `n_unseen` reported images whose class has no training image count as wrong. Raises UserError where there is one
    class only.
    """
    features, labels = train[0], np.asarray(train[1])
    if len(set(labels.tolist())) < 2:
        raise UserError(f"a linear probe needs two classes; all training images have the label {str(labels[0])!r}")
    if valid is None:
        held_out = hold_out(labels, seed)
        c = choose_c(features[~held_out], labels[~held_out], features[held_out], labels[held_out])
    else:
        c = choose_c(features, labels, *valid)
    classifier = fit(features, labels, c)
    classes = classifier.classes_.tolist()
    number = {label: i for i, label in enumerate(classes)}
    targets = torch.tensor([number.get(label, UNSEEN) for label in report[1]])
    scores = scores_of(classifier, report[0])
    metrics = classification_metrics(scores, targets, classes)
    metrics |= {"C": c, "n_train_images": len(labels), "n_unseen": int((targets == UNSEEN).sum())}
    return Classified(metrics, scores, targets, classes)
