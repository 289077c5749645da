"""From the categories of data sets to ours; riders are joined with what they ride.

BDD100K labels a rider and the bicycle or motorcycle as two boxes; Q-YOLOP wants one. They are
paired by the Hungarian algorithm, and a pair becomes one box around both.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from llm_jax.extras import need
from qyolop_jax.config import DETECTION
from qyolop_jax.samples import Report

RIDER = "rider"
CATEGORIES = {
    "person": "pedestrian",
    "pedestrian": "pedestrian",
    "car": "vehicle",
    "truck": "vehicle",
    "bus": "vehicle",
    "train": "vehicle",
    "caravan": "vehicle",
    "trailer": "vehicle",
    "vehicle": "vehicle",
    "motor": "scooter",
    "motorcycle": "scooter",
    "scooter": "scooter",
    "bike": "bicycle",
    "bicycle": "bicycle",
    "bicyclist": "bicycle",
    RIDER: RIDER,
}
"""Categories of BDD100K (2018, 2020), CamVid and iVS. A bicyclist is a rider with bicycle."""
IGNORED = {"other person": "pedestrian", "other vehicle": "vehicle"}
"""Categories that become crowds of our class, so that they count neither way."""
NO_OBJECTS = frozenset({"traffic light", "traffic sign"})
"""Categories that are left out without a report, like those of lanes and areas."""
LEAST_OVERLAP = 0.1  # share of the smaller box that a rider and a cycle have in common


@dataclasses.dataclass(frozen=True)
class Object:
    """A labelled box in a category of its data set; (x1, y1, x2, y2) in pixels."""

    category: str
    box: tuple[float, float, float, float]
    crowd: bool = False


def affinity(riders_n4: ArrayLike, cycles_m4: ArrayLike) -> np.ndarray:
    """[n, m] how well each rider fits each cycle, 0 (not at all) to 1.

    The overlap as a share of the smaller box, reduced by the sideways distance of the two.
    """
    r, c = (np.asarray(b, np.float64).reshape(-1, 4) for b in (riders_n4, cycles_m4))
    r, c = r[:, None], c[None]
    size = np.minimum(r[..., 2:], c[..., 2:]) - np.maximum(r[..., :2], c[..., :2])
    inter = np.maximum(size, 0).prod(-1)
    area = lambda b: (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = inter / np.maximum(np.minimum(area(r), area(c)), 1e-9)
    apart = np.abs((r[..., 0] + r[..., 2] - c[..., 0] - c[..., 2]) / 2)
    wide = np.maximum(r[..., 2] - r[..., 0], c[..., 2] - c[..., 0])
    fit = overlap * np.exp(-2 * apart / np.maximum(wide, 1e-9))
    return np.where(overlap >= LEAST_OVERLAP, fit, 0.0)


def pair_riders(riders_n4: ArrayLike, cycles_m4: ArrayLike) -> list[tuple[int, int]]:
    """Pairs (rider, cycle) with the largest sum of affinities, each at most once, by rider.

    MissingPackage without scipy.
    """
    assignment = need("scipy.optimize", "vision", "pairing riders with cycles")
    fit = affinity(riders_n4, cycles_m4)
    rows, columns = assignment.linear_sum_assignment(fit, maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if fit[i, j] > 0]


def around(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, float]:
    """The smallest box around both."""
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def relabel(
    objects: Sequence[Object],
    classes: Sequence[str] = DETECTION,
    report: Report | None = None,
    name: str = "",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes [n, 4] float32, classes [n] int32, crowd [n]) of objects of a data set.

    A rider without a cycle becomes a crowd of pedestrians: a person, but not on foot, so it counts
    neither way. A cycle without a rider stays what it is. Unknown categories, and those that are
    not among `classes`, are left out and counted.
    """
    report = Report() if report is None else report
    kept: list[tuple[str, tuple, bool]] = []
    riders, cycles = [], []
    for o in objects:
        if o.category in NO_OBJECTS or o.category.startswith(("lane", "area", "drivable")):
            continue
        ours, crowd = CATEGORIES.get(o.category), o.crowd
        if ours is None and o.category in IGNORED:
            ours, crowd = IGNORED[o.category], True
        if ours is None:
            report.count(f"object of the unknown category {o.category!r}", name)
        elif ours == RIDER and not crowd:
            riders.append(o.box)
        elif ours in ("scooter", "bicycle") and o.category != "bicyclist" and not crowd:
            cycles.append((ours, o.box))
        else:
            kept.append(("pedestrian" if ours == RIDER else ours, o.box, crowd))
    pairs = pair_riders(riders, [b for _, b in cycles]) if riders and cycles else []
    ridden = {j: i for i, j in pairs}
    for j, (ours, box) in enumerate(cycles):
        kept.append((ours, around(box, riders[ridden[j]]) if j in ridden else box, False))
    alone = set(range(len(riders))) - set(ridden.values())
    report.count("rider without a cycle, kept as ignored", name, len(alone))
    kept += [("pedestrian", riders[i], True) for i in sorted(alone)]

    known = [k for k in kept if k[0] in classes]
    for ours, *_ in kept:
        if ours not in classes:
            report.count(f"object of class {ours!r}, which the model does not have", name)
    return (
        np.array([b for _, b, _ in known], np.float32).reshape(-1, 4),
        np.array([classes.index(c) for c, _, _ in known], np.int32),
        np.array([c for _, _, c in known], bool),
    )
