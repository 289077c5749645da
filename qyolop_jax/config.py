"""The settings of a network: size, classes, anchors; and what the values of masks mean."""

import dataclasses
import json
from typing import Literal

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

Activation = Literal["silu", "relu", "hardswish"]


class ModelConfigError(QyolopError):
    """Impossible settings of a network; the message says what is possible."""


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
        if not 0 < self.width <= 4:
            raise ModelConfigError(f"width is {self.width}; expected above 0 and at most 4")
        if self.activation not in ("silu", "relu", "hardswish"):
            raise ModelConfigError(
                f"activation {self.activation!r}; possible are silu, relu and hardswish"
            )
        if any(n < 32 or n % 32 for n in self.size):
            raise ModelConfigError(f"size is {self.size}; expected multiples of 32 (height, width)")
        if not self.detection or len(self.area) < 2 or len(self.lane) < 2:
            raise ModelConfigError(
                "expected at least one object class, and a background and one more of each mask"
            )
        if len(self.anchors) != 3 or any(len(level) != 3 for level in self.anchors):
            raise ModelConfigError("expected three anchors for each of the strides 8, 16 and 32")

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The settings that `to_json` wrote."""
        whole = lambda x: tuple(map(whole, x)) if isinstance(x, list) else x
        return cls(**{k: whole(v) for k, v in json.loads(text).items()})

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels of the input per cell, for each of the three detection outputs."""
        return (8, 16, 32)
