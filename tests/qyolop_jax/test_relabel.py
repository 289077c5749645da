"""Riders and cycles paired as brute force pairs them; categories mapped, and the rest counted."""

import itertools

import numpy as np
import pytest

from qyolop_jax.relabel import CATEGORIES, Object, affinity, pair_riders, relabel
from qyolop_jax.samples import Report


def boxes(rng, n, wide, high, spread):
    low = rng.uniform(0, spread, (n, 2))
    return np.concatenate([low, low + rng.uniform(0.6, 1.4, (n, 2)) * (wide, high)], 1)


def one_affinity(r, c):
    """The definition, for one pair, in plain Python."""
    width = min(r[2], c[2]) - max(r[0], c[0])
    height = min(r[3], c[3]) - max(r[1], c[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (r, c)]
    overlap = width * height / min(areas)
    if overlap < 0.1:
        return 0.0
    apart = abs((r[0] + r[2]) / 2 - (c[0] + c[2]) / 2)
    return overlap * np.exp(-2 * apart / max(r[2] - r[0], c[2] - c[0]))


@pytest.mark.parametrize("seed", range(15))
def test_pairs_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 5, 2)
    riders, cycles = boxes(rng, n, 20, 40, 40), boxes(rng, m, 30, 25, 40)
    fit = np.array([[one_affinity(r, c) for c in cycles] for r in riders])
    np.testing.assert_allclose(affinity(riders, cycles), fit, atol=1e-12)
    best = 0.0
    for k in range(1, min(n, m) + 1):
        for rows in itertools.combinations(range(n), k):
            for columns in itertools.permutations(range(m), k):
                best = max(best, sum(fit[i, j] for i, j in zip(rows, columns, strict=True)))
    pairs = pair_riders(riders, cycles)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(fit[i, j] > 0 for i, j in pairs)
    np.testing.assert_allclose(sum(fit[i, j] for i, j in pairs), best, atol=1e-12)


def test_a_greedy_choice_would_lose():
    """Rider 0 fits cycle 0 best of all pairs, but rider 1 fits nothing else as well."""
    riders = [(22, 0, 42, 40), (8, 0, 28, 40)]
    cycles = [(10, 20, 50, 50), (20, 20, 60, 50)]
    fit = affinity(riders, cycles)
    assert fit.argmax() == 0 and pair_riders(riders, cycles) == [(0, 1), (1, 0)]


def test_a_rider_and_a_motorcycle_become_one_scooter():
    report = Report()
    objects = [
        Object("car", (0, 0, 40, 30)),
        Object("rider", (50, 10, 70, 50)),
        Object("motor", (45, 30, 75, 60)),
        Object("bike", (100, 30, 130, 60)),  # parked
        Object("rider", (200, 10, 220, 50)),  # of something that is not labelled
        Object("person", (90, 10, 99, 40)),
        Object("bicyclist", (140, 10, 160, 50)),  # rider and bicycle already
        Object("other vehicle", (300, 0, 340, 30)),
        Object("traffic light", (10, 0, 12, 5)),
        Object("lane/single white", (0, 0, 1, 1)),
        Object("area/drivable", (0, 0, 1, 1)),
        Object("dog", (1, 1, 9, 9)),
        Object("bus", (5, 5, 9, 9), crowd=True),
    ]
    found, classes, crowd = relabel(objects, report=report, name="a.jpg")
    rows = sorted(zip(classes.tolist(), map(tuple, found.tolist()), crowd.tolist(), strict=True))
    assert rows == sorted([
        (1, (0, 0, 40, 30), False), (2, (45, 10, 75, 60), False), (3, (100, 30, 130, 60), False),
        (0, (200, 10, 220, 50), True), (0, (90, 10, 99, 40), False), (3, (140, 10, 160, 50), False),
        (1, (300, 0, 340, 30), True), (1, (5, 5, 9, 9), True),
    ])  # fmt: skip
    assert dict(report.counts) == {
        "object of the unknown category 'dog'": 1,
        "rider without a cycle, kept as ignored": 1,
    }
    assert found.dtype == np.float32 and classes.dtype == np.int32


def test_a_crowd_is_never_paired():
    found, classes, crowd = relabel(
        [Object("rider", (0, 0, 20, 40), True), Object("bike", (0, 20, 20, 50), True)]
    )
    assert sorted(classes.tolist()) == [0, 3] and crowd.all() and len(found) == 2


def test_classes_that_the_model_lacks_are_counted():
    report = Report()
    objects = [Object("car", (0, 0, 4, 4)), Object("person", (0, 0, 4, 4))]
    found, classes, _ = relabel(objects, ("pedestrian",), report, "b.jpg")
    assert classes.tolist() == [0] and len(found) == 1
    assert "1 x object of class 'vehicle', which the model does not have (b.jpg)" in str(report)


def test_nothing_gives_nothing():
    found, classes, crowd = relabel([])
    assert found.shape == (0, 4) and classes.shape == crowd.shape == (0,)


@pytest.mark.parametrize("category", sorted(set(CATEGORIES) - {"rider"}))
def test_every_category_has_a_class(category):
    found, classes, crowd = relabel([Object(category, (0, 0, 4, 4))])
    names = ("pedestrian", "vehicle", "scooter", "bicycle")
    assert names[classes[0]] == CATEGORIES[category] and not crowd.any() and len(found) == 1
