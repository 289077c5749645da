"""Masks made calm for the eye: what people look at, never what is scored."""

import numpy as np

from llm_jax.extras import need
from qyolop_jax.postprocess import Found

PATCH = 100
"""An area smaller than the image divided by this is taken for its surroundings."""
SPECK = 20_000
"""A line smaller than the image divided by this goes."""


def tidy(found: Found) -> Found:
    """The same with areas smoothed and every line in one kind.

    An area pixel takes the commonest class of a square of 1/24 of the width around it, small
    patches that of what is around them. A line, its pixels that touch, takes the kind that most of
    it has.
    """
    area = smoothed(np.asarray(found.area), found.area.shape[1] // 24)
    return found._replace(area=area, lane=one_kind(np.asarray(found.lane)))


def commonest(mask: np.ndarray, counts: np.ndarray, across: int) -> np.ndarray:
    """The class that most of the pixels that count have within a square, uint8 [H, W]."""
    cv2 = need("cv2", "vision", "smoothing masks")
    side = (max(1, across),) * 2
    layers = range(int(mask.max(initial=0)) + 1)
    votes = [cv2.boxFilter(((mask == c) & counts).astype(np.float32), -1, side) for c in layers]
    return np.argmax(votes, 0).astype(np.uint8)


def smoothed(mask: np.ndarray, across: int) -> np.ndarray:
    """The commonest class around each pixel [H, W], and patches in that of their surroundings."""
    cv2 = need("cv2", "vision", "smoothing masks")
    calm = commonest(mask, np.ones(mask.shape, bool), across)
    small = np.zeros(mask.shape, bool)
    for c in range(int(calm.max(initial=0)) + 1):
        _, where, stats, _ = cv2.connectedComponentsWithStats((calm == c).astype(np.uint8))
        few = stats[:, cv2.CC_STAT_AREA] < mask.size // PATCH
        small |= few[where] & (calm == c)
    return np.where(small, commonest(calm, ~small, 4 * across), calm)


def one_kind(mask: np.ndarray) -> np.ndarray:
    """Every group of foreground pixels that touch in its commonest kind; specks go."""
    cv2 = need("cv2", "vision", "smoothing masks")
    count, where = cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=8)
    votes = np.zeros((count, int(mask.max(initial=0)) + 1), np.int64)
    np.add.at(votes, (where.ravel(), mask.ravel()), 1)
    kind = votes.argmax(1)
    kind[votes.sum(1) < mask.size // SPECK] = 0
    return kind[where].astype(np.uint8)
