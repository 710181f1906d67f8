# SPDX-License-Identifier: Apache-2.0
import evaluate
import numpy as np
import pytest
import scipy.linalg

from diffusers_learngene import metrics


@pytest.fixture(scope="module")
def fid():
    return metrics.load("fid")


def features(n=300, d=6, seed=0):
    draws = np.random.default_rng(seed)
    return draws.normal(size=(n, d)) @ draws.normal(size=(d, d)) + draws.normal(size=d)


def reference(x, y):
    """The textbook formula, with the square root of a general matrix."""
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)


def test_it_is_a_module_of_evaluate(fid):
    assert isinstance(fid, evaluate.Metric) and "Frechet" in fid.description and "heusel" in fid.citation


@pytest.mark.parametrize(("n", "m", "d"), [(300, 500, 6), (300, 300, 1), (2000, 1000, 64)])
def test_it_is_the_textbook_formula(fid, n, m, d):
    x, y = features(n, d, 0), features(m, d, 1)
    one_dimension = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    expected = one_dimension if d == 1 else reference(x, y)
    assert fid.compute(predictions=x, reference_features=y)["fid"] == pytest.approx(expected, rel=1e-8)


def test_closed_forms(fid):
    identity = {"mu": np.zeros(3), "sigma": np.eye(3)}
    x = features(400, 3)
    whitened = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
    assert fid.compute(predictions=whitened, reference_stats=identity)["fid"] == pytest.approx(0, abs=1e-9)
    # N(2, 9 I) against N(0, I) in 3 dimensions: 3 * 2^2 + 3 * (3 - 1)^2
    assert fid.compute(predictions=3 * whitened + 2, reference_stats=identity)["fid"] == pytest.approx(24)


def test_it_is_symmetric_and_zero_on_equal_sets(fid):
    x, y = features(seed=0), features(seed=1)
    there = fid.compute(predictions=x, reference_features=y)["fid"]
    assert there == pytest.approx(fid.compute(predictions=y, reference_features=x)["fid"])
    assert 0 <= fid.compute(predictions=x, reference_features=x)["fid"] < 1e-9


def test_fewer_images_than_features(fid):
    x, y = features(20, 64, 0), features(30, 64, 1)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
    singular = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(19 * 29), compute_uv=False)
    assert fid.compute(predictions=x, reference_features=y)["fid"] == pytest.approx(expected - 2 * singular.sum())


def test_batches_and_files(fid, tmp_path):
    x, y = features(seed=0), features(seed=1)
    np.savez(tmp_path / "stats.npz", mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    for part in np.array_split(x, 3):
        fid.add_batch(predictions=part)
    batched = fid.compute(reference_stats=str(tmp_path / "stats.npz"))["fid"]
    assert batched == pytest.approx(fid.compute(predictions=x, reference_features=y)["fid"])


@pytest.mark.parametrize(
    ("predictions", "arguments", "message"),
    [
        (features(), {}, "Give one of reference_features"),
        (features(), {"reference_features": features(), "reference_stats": {}}, "Give one of reference_features"),
        (features(), {"reference_features": features(d=5)}, "predictions have 6 features, but the reference has 5"),
        (features(), {"reference_stats": {"mu": np.zeros(6)}}, r"has no \['sigma'\]"),
        (features(1), {"reference_features": features()}, r"predictions has shape \(1, 6\)"),
        (features() * np.nan, {"reference_features": features()}, "predictions holds 1800 values"),
    ],
)
def test_errors(fid, predictions, arguments, message):
    with pytest.raises(ValueError, match=message):
        fid.compute(predictions=predictions, **arguments)


def test_unknown_metrics():
    with pytest.raises(ValueError, match=r"name='FID' is not one of the metrics \['fid'"):
        metrics.load("FID")
