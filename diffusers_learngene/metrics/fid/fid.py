# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two sets of feature vectors, as a module of `evaluate`; needs nothing but numpy."""

import datasets
import evaluate
import numpy as np


_CITATION = """\
@inproceedings{heusel2017gans,
  title     = {{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author    = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017}
}
"""

_DESCRIPTION = """
The Frechet distance between the Gaussians that have the mean and the covariance of generated and of real images'
features: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). With the pool features of Inception v3 it is the FID.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: feature vectors of the generated images, (n, d).
    reference_features: feature vectors of real images, (m, d); m may differ from n.
    reference_stats: instead of them, their statistics: a dict, or the path of an .npz file, with "mu" (d,) and "sigma"
        (d, d).
Returns:
    fid: the distance, a float; 0 for equal statistics. It shrinks as n grows, so compare only equal n and equal
        features.
Examples:
    >>> import numpy as np
    >>> from diffusers_learngene.metrics import load
    >>> features = np.random.default_rng(0).normal(size=(100, 4))
    >>> result = load("fid").compute(predictions=features + 3, reference_features=features)
    >>> round(result["fid"], 6)
    36.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FID(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # The references are no column here: `evaluate` wants columns of one length.
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            reference_urls=["https://huggingface.co/papers/1706.08500"],
        )

    def _compute(self, predictions, reference_features=None, reference_stats=None):
        if (reference_features is None) == (reference_stats is None):
            raise ValueError("Give one of reference_features (m, d) and reference_stats (a dict or an .npz file).")
        mean, covariance = statistics(predictions, "predictions")
        if reference_stats is None:
            reference_mean, reference_covariance = statistics(reference_features, "reference_features")
        else:
            stats = reference_stats if isinstance(reference_stats, dict) else np.load(reference_stats)
            if missing := {"mu", "sigma"} - set(stats):
                raise ValueError(f"reference_stats has no {sorted(missing)}, but {sorted(stats)}.")
            reference_mean = np.asarray(stats["mu"], dtype=np.float64)
            reference_covariance = np.asarray(stats["sigma"], dtype=np.float64)
        if reference_covariance.shape != covariance.shape or reference_mean.shape != mean.shape:
            raise ValueError(
                f"predictions have {mean.size} features, but the reference has {reference_mean.size} (mean) and "
                f"{reference_covariance.shape} (covariance): both must come from one feature extractor."
            )
        return {"fid": frechet_distance(mean, covariance, reference_mean, reference_covariance)}


def statistics(features, name):
    """Mean (d,) and covariance (d, d), in float64, of features (n, d)."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} has shape {features.shape}: it must be (n, d) with n of at least 2.")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} holds {(~np.isfinite(features)).sum()} values that are not finite.")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """The squared Frechet distance between two Gaussians.

    (S_1 S_2)^(1/2) has the trace of the symmetric (R S_2 R)^(1/2), R = S_1^(1/2): two symmetric eigenvalue problems,
    exact for covariances of low rank too, where the square root of a general matrix is ill-conditioned and turns
    complex.
    """
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_2 @ root).clip(0)).sum()
    squared = ((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross
    return max(0.0, float(squared))  # rounding may leave equal Gaussians a little below 0
