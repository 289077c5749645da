"""All true boxes are scored, and what is left out is named."""

import jax.numpy as jnp
import numpy as np
import pytest

from qyolop_jax import evaluation
from qyolop_jax.config import ModelConfig
from qyolop_jax.formats import ReadError
from qyolop_jax.metrics import MetricError
from qyolop_jax.network import Network
from qyolop_jax.postprocess import Predictions
from qyolop_jax.samples import Report, make_sample

CFG = ModelConfig(0.25, "relu", size=(384, 640))
GRID = [(x * 32 + 2.0, y * 24 + 2.0) for y in range(16) for x in range(20)]
NETWORK = Network(CFG, lambda values, images: {}, None)


def crowded(count, large=64):
    """An image with `count` vehicles, of which the first are larger, and its boxes."""
    wide = lambda i: np.float32([20, 18] if i < large else [10, 10])
    boxes = np.array([[*at, *(at + wide(i))] for i, at in enumerate(GRID[:count])], np.float32)
    return make_sample(np.zeros((384, 640, 3), np.uint8), boxes, np.ones(count, np.int32)), boxes


def finds(boxes, monkeypatch):
    """Evaluation of a network that finds exactly these boxes in each image."""

    def predictor(forward, cfg, conf):
        def run(_, images):
            one = np.zeros((100, 4), np.float32)
            one[: len(boxes)] = boxes
            valid = np.arange(100) < len(boxes)
            every = lambda a: np.repeat(a[None], len(images), 0)
            mask = np.zeros((len(images), *CFG.size), np.uint8)
            there, kinds = every(valid), every(valid.astype(np.int32))
            return Predictions(every(one), every(valid * 0.9), kinds, there, mask, mask, mask)

        return run

    monkeypatch.setattr(evaluation, "predictor", predictor)


@pytest.mark.parametrize("count", [64, 65, 200, 320])
def test_every_true_box_counts(count, monkeypatch):
    """A detector that finds the 64 large ones has a recall of 64 over all."""
    sample, boxes = crowded(count)
    finds(boxes[:64], monkeypatch)
    report = Report()
    found = evaluation.evaluate(NETWORK, [sample], batch=2, report=report)
    assert found["detection/recall50"] == pytest.approx(64 / count)
    assert found["detection/AP50"] == pytest.approx(64 / count, abs=0.01)
    assert not report


def test_the_batch_changes_no_score(monkeypatch):
    samples = [crowded(n)[0] for n in (3, 100, 0, 20)]
    finds(crowded(64)[1], monkeypatch)
    one, four = (evaluation.evaluate(NETWORK, samples, batch) for batch in (1, 4))
    assert one == pytest.approx(four, nan_ok=True)
    assert one["detection/recall50"] == pytest.approx((3 + 64 + 20) / 123)


class Broken(list):
    def __getitem__(self, index):
        if index in (0, 2):
            raise ReadError(f"number {index} is corrupt")
        return super().__getitem__(index)


def test_what_is_broken_is_named_or_an_error(monkeypatch):
    sample, boxes = crowded(4)
    finds(boxes, monkeypatch)
    report = Report()
    found = evaluation.evaluate(NETWORK, Broken([sample] * 3), report=report)
    assert found["detection/recall50"] == 1 and report.counts == {"broken sample left out": 2}
    assert "number 0 is corrupt" in str(report) and "number 2 is corrupt" in str(report)
    with pytest.raises(ReadError, match="number 0 is corrupt"):
        evaluation.evaluate(NETWORK, Broken([sample] * 3))
    with pytest.raises(MetricError, match=r"none of 1 samples could be scored: .*number 0"):
        evaluation.evaluate(NETWORK, Broken([sample]), report=Report())
    with pytest.raises(MetricError, match="none of 0 samples"):
        evaluation.evaluate(NETWORK, [])
    for conf in (1.5, -0.1, float("nan")):
        with pytest.raises(MetricError, match="expected a score from 0 to 1"):
            evaluation.evaluate(NETWORK, [sample], conf=conf)
    assert jnp.isnan(evaluation.evaluate(NETWORK, [crowded(0)[0]])["detection/AP50"])
