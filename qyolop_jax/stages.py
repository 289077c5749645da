"""What a run of training is made of: stages as people describe them, phases as `fit` runs them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax

from qyolop_jax import QyolopError

Variables = dict[str, Any]
"""A dict of pytrees; "params" is the one that gets gradients."""
Arrays = dict[str, Any]
"""Arrays by name, as `samples.collate` makes them; on the host or on a device."""
Loss = Callable[[Variables, Arrays], tuple[jax.Array, tuple[Variables, dict]]]
"""(variables, batch) -> (scalar, (changed variables other than "params", parts for the log))."""

MOST_EPOCHS = 10**6


class TrainError(QyolopError):
    """A run that cannot be started or continued; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training; `recipe.four_stages` makes the paper's four."""

    name: str
    epochs: float
    batch: int
    rate: float
    """Learning rate after the warm-up; it falls to `last_rate` along a cosine."""
    last_rate: float
    warmup: float = 0.0
    """Epochs over which the rate rises from zero."""
    mosaic: bool = False
    calm: float = 0.0
    """Number of last epochs without mosaic."""
    data: tuple[str, ...] = ()
    """Names of the data sets; empty means all."""
    shares: tuple[float, ...] = ()
    """Share of each data set in the mixture; empty means in proportion to their sizes."""
    kind: Literal["float", "qat"] = "float"

    def __post_init__(self):
        if not 0 <= self.warmup < self.epochs < MOST_EPOCHS or self.batch < 1:
            raise TrainError(
                f"stage {self.name}: epochs {self.epochs}, batch {self.batch}, warm-up "
                f"{self.warmup}; expected epochs above the warm-up, below {MOST_EPOCHS}, and a "
                "batch of 1 or more"
            )
        if self.shares and len(self.shares) != len(self.data):
            raise TrainError(
                f"stage {self.name}: {len(self.shares)} shares; expected one for each of "
                f"{', '.join(self.data)}"
            )
        if not 0 <= self.calm < MOST_EPOCHS:
            raise TrainError(f"stage {self.name}: {self.calm} calm epochs; expected 0 or more")
        if not 0 <= self.last_rate <= self.rate < math.inf:
            raise TrainError(
                f"stage {self.name}: the rate goes from {self.rate} to {self.last_rate}; expected "
                "it to fall, and finite rates"
            )


class Batches(Protocol):
    """An endless stream of batches whose place can be saved and restored, as grain's can."""

    def __next__(self) -> Arrays: ...

    def get_state(self) -> Any:
        """The place in the stream, as something that `json` can write."""

    def set_state(self, state: Any) -> None:
        """Moves to a place that `get_state` gave."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stage made ready to run: its loss, its first variables, its batches."""

    stage: Stage
    loss: Loss
    begin: Callable[[Variables | None], Variables]
    """First variables, from those of the stage before (None: there are none)."""
    batches: Callable[[bool], Batches]
    """A new stream; the argument says whether mosaic is on."""
    per_epoch: int
    """Steps in an epoch."""
    validate: Callable[[Variables, int, bool], dict] | None = None
    """(averaged variables, step, whether it is the last) -> what to log; after every epoch."""

    @property
    def steps(self) -> int:
        """Number of steps, at least 1."""
        return max(1, round(self.stage.epochs * self.per_epoch))

    @property
    def calm_from(self) -> int:
        """The step from which mosaic is off."""
        if not self.stage.mosaic:
            return 0
        return max(0, self.steps - round(self.stage.calm * self.per_epoch))
