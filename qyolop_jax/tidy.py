"""Masks smoothed for people to look at; never for what is scored."""

import numpy as np

from llm_jax.extras import need
from qyolop_jax.postprocess import Found

PATCH = 100
"""A patch of area smaller than the image divided by this gets the class around it."""
SPECK = 20_000
"""A line smaller than the image divided by this is removed."""


def tidy(found: Found) -> Found:
    """The same with smooth areas and one kind per line.

    An area pixel gets the most common class in a square around it, 1/24 of the width wide; small
    patches get the class around them. A line (pixels that touch) gets its most common kind.
    """
    area = smoothed(np.asarray(found.area), found.area.shape[1] // 24)
    return found._replace(area=area, lane=one_kind(np.asarray(found.lane)))


def commonest(mask: np.ndarray, counts: np.ndarray, across: int) -> np.ndarray:
    """The most common class in a square around each pixel [H, W], of the pixels in `counts`."""
    cv2 = need("cv2", "vision", "smoothing masks")
    side = (max(1, across),) * 2
    layers = range(int(mask.max(initial=0)) + 1)
    votes = [cv2.boxFilter(((mask == c) & counts).astype(np.float32), -1, side) for c in layers]
    return np.argmax(votes, 0).astype(np.uint8)


def smoothed(mask: np.ndarray, across: int) -> np.ndarray:
    """The most common class around each pixel [H, W]; small patches get the class around them."""
    cv2 = need("cv2", "vision", "smoothing masks")
    calm = commonest(mask, np.ones(mask.shape, bool), across)
    small = np.zeros(mask.shape, bool)
    for c in range(int(calm.max(initial=0)) + 1):
        _, where, stats, _ = cv2.connectedComponentsWithStats((calm == c).astype(np.uint8))
        few = stats[:, cv2.CC_STAT_AREA] < mask.size // PATCH
        small |= few[where] & (calm == c)
    return np.where(small, commonest(calm, ~small, 4 * across), calm)


def one_kind(mask: np.ndarray) -> np.ndarray:
    """Every group of touching foreground pixels in its most common kind; specks are removed."""
    cv2 = need("cv2", "vision", "smoothing masks")
    count, where = cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=8)
    votes = np.zeros((count, int(mask.max(initial=0)) + 1), np.int64)
    np.add.at(votes, (where.ravel(), mask.ravel()), 1)
    kind = votes.argmax(1)
    kind[votes.sum(1) < mask.size // SPECK] = 0
    return kind[where].astype(np.uint8)
