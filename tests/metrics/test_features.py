# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from diffusers_learngene.data.image_classes import load_image_classes
from diffusers_learngene.metrics import load
from diffusers_learngene.metrics.features import classifier_features


def test_the_distance_orders_what_eyes_would_order():
    data = load_image_classes()
    train, validation = default_collate(list(data.train)), default_collate(list(data.validation))
    features = classifier_features(train["images"], train["labels"])
    reference, fid = features(train["images"]), load("fid")
    assert reference.shape == (1437, 64) and reference.dtype == np.float64
    noise = torch.randn(validation["images"].shape, generator=torch.Generator().manual_seed(0))
    distances = [
        fid.compute(predictions=features(validation["images"] + scale * noise), reference_features=reference)["fid"]
        for scale in (0, 0.3, 1, 100)
    ]
    assert distances == sorted(distances) and distances[3] > 50 * distances[0]
    again = classifier_features(train["images"], train["labels"])
    assert np.array_equal(again(train["images"]), reference)
    with pytest.raises(ValueError, match=r"images of \(1, 4, 4\) instead of the \(1, 8, 8\)"):
        features(torch.zeros(2, 1, 4, 4))


def test_larger_images_are_averaged_down():
    images = torch.randn(20, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    features = classifier_features(images, torch.arange(20) % 2, hidden_size=5)
    assert features(images[:4]).shape == (4, 5)


def test_errors():
    with pytest.raises(ValueError, match="20 and 10"):
        classifier_features(torch.zeros(20, 1, 8, 8), torch.zeros(10))
    with pytest.raises(ValueError, match="one class"):
        classifier_features(torch.zeros(20, 1, 8, 8), torch.zeros(20))
