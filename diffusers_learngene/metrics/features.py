# SPDX-License-Identifier: Apache-2.0
"""Features of small images, for the Frechet distance where Inception has nothing to say.

Inception v3 was trained on photographs of 299 x 299 pixels and has to be downloaded; 8 x 8 digits are nothing to it.
The hidden layer of a small classifier of the data set at hand is a feature space that knows what matters there: what
tells its classes apart. Be honest about the number: it is comparable between models of the same data set, the same
real images and the same number of samples, and with nothing else.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F


if TYPE_CHECKING:
    import numpy as np

__all__ = ["classifier_features"]

MAX_RESOLUTION = 16


def classifier_features(
    images: torch.Tensor, labels: torch.Tensor, *, hidden_size: int = 64, seed: int = 0
) -> "Callable[[torch.Tensor], np.ndarray]":
    """Fit a classifier with one hidden layer (scikit-learn's, some seconds) and return its hidden layer as a function.

    Args:
        images: (n, C, H, W) in [-1, 1], real ones; averaged down to at most 16 x 16 pixels.
        labels: (n,).
        hidden_size: The number of features; keep it well below the number of images to be compared.
        seed: Of the classifier's weights: with the same one, the function is the same again.

    Returns:
        A function of images (m, C, H, W) in [-1, 1], which gives features (m, hidden_size), float64.

    Raises:
        ValueError: For images and labels that do not match, or a single class.
    """
    from sklearn.neural_network import MLPClassifier

    if len(images) != len(labels):
        raise ValueError(f"images and labels differ in length: {len(images)} and {len(labels)}.")
    if len(set(labels.tolist())) < 2:
        raise ValueError("labels are all of one class: there is nothing to tell apart, hence no features.")
    shape = images.shape[1:]
    # Stops when the loss stands still, long before max_iter on data sets of the size this is meant for.
    classifier = MLPClassifier((hidden_size,), random_state=seed, max_iter=1000)
    classifier.fit(_small(images), labels.cpu().numpy())
    weight, bias = classifier.coefs_[0], classifier.intercepts_[0]  # (pixels, hidden_size), (hidden_size,)

    def features(images: torch.Tensor) -> "np.ndarray":
        if images.shape[1:] != shape:
            raise ValueError(
                f"images of {tuple(images.shape[1:])} instead of the {tuple(shape)} fitted on, (C, H, W)."
            )
        return (_small(images) @ weight + bias).clip(0)

    return features


def _small(images: torch.Tensor) -> "np.ndarray":
    """(n, C, H, W) -> (n, pixels) float64, clamped to [-1, 1] and averaged down to at most 16 x 16."""
    images = images.detach().float().cpu().clamp(-1, 1)
    height, width = images.shape[2:]
    images = F.adaptive_avg_pool2d(images, (min(height, MAX_RESOLUTION), min(width, MAX_RESOLUTION)))
    return images.flatten(1).double().numpy()
