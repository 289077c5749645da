"""The settings of a network: size, classes, anchors; and what the values of masks mean."""

import dataclasses
import json
import math
import numbers
from typing import Any, Literal

from qyolop_jax import QyolopError

DETECTION = ("pedestrian", "vehicle", "scooter", "bicycle")
AREA = ("background", "main", "alternative")
LANE = ("background", "single", "double", "dashed")
IGNORE = 255
"""Mask value: no loss, no metric."""
UNKNOWN = 254
"""Mask value: foreground of unknown kind; any class but background is right."""
ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
"""(width, height) at 640 pixels: YOLOv7's for COCO, which Q-YOLOP keeps."""

LARGEST_SIDE = 8192
"""Pixels of the longest side that a network may have."""

Activation = Literal["silu", "relu", "hardswish"]


class ModelConfigError(QyolopError):
    """Impossible settings of a network; the message says what is possible."""


def check_image_size(size: tuple[int, int]) -> None:
    """ModelConfigError unless this is (height, width), multiples of 32 up to `LARGEST_SIDE`."""
    if not _is_tuple(size, numbers.Integral) or len(size) != 2 or any(
        n < 32 or n % 32 or n > LARGEST_SIDE for n in size
    ):  # fmt: skip
        raise ModelConfigError(
            f"size is {size}; expected multiples of 32 up to {LARGEST_SIDE} (height, width)"
        )


def _is_tuple(value: Any, kind: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_anchors(levels: Any) -> bool:
    """Whether these are three times three pairs of lengths."""
    if not _is_tuple(levels, tuple) or [len(level) for level in levels] != [3] * 3:
        return False
    pairs = [pair for level in levels for pair in level]
    return all(
        isinstance(p, tuple) and len(p) == 2 and all(_is_number(n) and 0 < n < 1e5 for n in p)
        for p in pairs
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Q-YOLOP network. Width 1 has the channels of YOLOv7; all counts scale with it."""

    width: float = 1.0
    activation: Activation = "silu"
    detection: tuple[str, ...] = DETECTION
    area: tuple[str, ...] = AREA
    lane: tuple[str, ...] = LANE
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ANCHORS
    """For strides 8, 16 and 32, in pixels of an image 640 wide."""
    size: tuple[int, int] = (384, 640)
    """Height and width of the input."""

    def __post_init__(self):
        if not _is_number(self.width) or not 0 < self.width <= 4:
            raise ModelConfigError(f"width is {self.width!r}; expected above 0 and at most 4")
        if self.activation not in ("silu", "relu", "hardswish"):
            raise ModelConfigError(
                f"activation {self.activation!r}; possible are silu, relu and hardswish"
            )
        check_image_size(self.size)
        for kind in ("detection", "area", "lane"):
            names = getattr(self, kind)
            if not _is_tuple(names, str) or len(set(names)) < len(names) or len(names) > 80:
                raise ModelConfigError(
                    f"{kind} is {names!r}; expected at most 80 names, each different"
                )
        if not self.detection or len(self.area) < 2 or len(self.lane) < 2:
            raise ModelConfigError(
                "expected at least one object class, and a background and one more of each mask"
            )
        if not _is_anchors(self.anchors):
            raise ModelConfigError(
                "expected three anchors (width, height) for each of the strides 8, 16 and 32"
            )

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The settings that `to_json` wrote. ModelConfigError for anything else."""
        whole = lambda x: tuple(map(whole, x)) if isinstance(x, list) else x
        try:
            return cls(**{k: whole(v) for k, v in json.loads(text).items()})
        except ModelConfigError:
            raise
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ModelConfigError(f"settings {text[:60]!r}: {error}") from error

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels of the input per cell, for each of the three detection outputs."""
        return (8, 16, 32)
