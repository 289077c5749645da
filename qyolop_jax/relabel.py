"""Other people's categories to ours: maps, and riders joined with what they ride.

BDD100K labels a rider and the bicycle or motorcycle below as two boxes; Q-YOLOP wants one. Riders
are paired by the Hungarian algorithm, and a pair becomes one box around both.
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
"""Categories of BDD100K (2018 and 2020), CamVid and iVS. A bicyclist is a rider with bicycle."""
IGNORED = {"other person": "pedestrian", "other vehicle": "vehicle"}
"""Categories that count neither for nor against: crowds of our class."""
NO_OBJECTS = frozenset({"traffic light", "traffic sign"})
"""Categories that are left out without being reported; so are those of lanes and areas."""
LEAST_OVERLAP = 0.1  # of the smaller box, for a rider and something to ride


@dataclasses.dataclass(frozen=True)
class Object:
    """A labelled box in somebody's category; xyxy in pixels."""

    category: str
    box: tuple[float, float, float, float]
    crowd: bool = False


def affinity(riders_n4: ArrayLike, cycles_m4: ArrayLike) -> np.ndarray:
    """[n, m] how well each rider fits on each cycle, 0 to 1; 0 is not at all.

    The overlap in shares of the smaller box, less the farther the two are apart sideways.
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
    """Pairs (rider, cycle) of the largest summed affinity, each at most once, in rider order."""
    assignment = need("scipy.optimize", "vision", "pairing riders with cycles")
    fit = affinity(riders_n4, cycles_m4)
    rows, columns = assignment.linear_sum_assignment(fit, maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if fit[i, j] > 0]


def around(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, float]:
    """The smallest box that holds both."""
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def relabel(
    objects: Sequence[Object],
    classes: Sequence[str] = DETECTION,
    report: Report | None = None,
    name: str = "",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes [n, 4] float32, classes [n] int32, crowd [n]) of objects in others' categories.

    A rider without a cycle becomes a crowd of pedestrians, as it is a person but not one on foot:
    it counts neither way. Cycles without a rider stay what they are. Categories that are not known,
    or not among `classes`, are left out and counted.
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
