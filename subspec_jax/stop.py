"""When one more draft step pays: the draft's own scores, calibrated on accepted tokens.

The *gain* of a step is the log of the sum of its sharpened path probabilities. It orders trees
well, but it is not a log-probability: if the sum is 0.86, SmolLM2 accepts one step in four. So the
chance is learned from finished rounds. This runs in NumPy on the host; the device gets one least
gain per step.

Letters: L steps of a tree, X pairs of a gain and an outcome.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PRIOR = (1.0, 1.5, 1.0)
"""Intercept and slopes at the start: about those of single texts of SmolLM2-135M."""
FINEST = 1e-4
"""Gains nearer to 0 than this count as equal: float32 sums of probabilities are 1 ± 1e-7."""


def features(gain_X: Any, step_X: Any) -> np.ndarray:
    """[X, 3]: one, how sure the draft is, how shallow the step is. Higher values: more chance."""
    sure_X, step_X = np.broadcast_arrays(-np.log(FINEST - np.minimum(gain_X, 0.0)), step_X)
    return np.stack([np.ones_like(sure_X), sure_X / 3 - 1, -step_X / 10], axis=-1)


class Calibration:
    """A logistic curve: P(the target accepts a node), from the step's gain and its number.

    The chance rises with the gain and falls with the number. The curve is the maximum a posteriori
    over the last `rounds` rounds, with a Gaussian prior of precision `strength` around `PRIOR`.
    Each round of age multiplies a weight by `decay`. Slopes cannot become negative.
    """

    def __init__(self, strength: float = 5.0, decay: float = 0.98, rounds: int = 64):
        self.strength, self.decay = strength, decay
        self.prior = np.array(PRIOR)
        self.weights = self.prior.copy()
        self._rounds = collections.deque(maxlen=rounds)

    def learn(self, gain_X: Any, step_X: Any, hit_X: Any) -> None:
        """Adds the pairs of one round: gains and step numbers, and whether a node was accepted."""
        if not len(gain_X):
            return
        self._rounds.appendleft((features(np.asarray(gain_X), step_X), np.asarray(hit_X, float)))
        x_X3 = np.concatenate([x for x, _ in self._rounds])
        hit_X = np.concatenate([hit for _, hit in self._rounds])
        age_X = np.repeat(np.arange(len(self._rounds)), [len(hit) for _, hit in self._rounds])
        weight_X = self.decay**age_X
        for _ in range(4):  # Newton's method, from the last round's result
            p_X = _logistic(x_X3 @ self.weights)
            slope = x_X3.T @ (weight_X * (p_X - hit_X))
            slope += self.strength * (self.weights - self.prior)
            curvature = (x_X3 * (weight_X * p_X * (1 - p_X))[:, None]).T @ x_X3
            curvature += self.strength * np.eye(3)
            self.weights = self.weights - np.linalg.solve(curvature, slope)
            self.weights[1:] = np.maximum(self.weights[1:], (0.05, 0.0))

    def chance(self, gain_X: Any, step_X: Any) -> np.ndarray:
        """[X] P(the target accepts a node of the step)."""
        return _logistic(features(np.asarray(gain_X, float), step_X) @ self.weights)

    def least_gain(self, chance: float, step_L: Any) -> np.ndarray:
        """[L] the gain that gives a step this chance; inf: no gain does; -inf: every gain does."""
        if chance <= 0:
            return np.full(len(step_L), -np.inf)
        if chance >= 1:
            return np.full(len(step_L), np.inf)
        intercept, sure, shallow = self.weights
        wanted_L = (math.log(chance / (1 - chance)) - intercept) / sure
        wanted_L = wanted_L + shallow / sure * np.asarray(step_L) / 10
        gain_L = FINEST - np.exp(np.minimum(-3 * (wanted_L + 1), 50.0))
        return np.where(gain_L < 0, gain_L, np.inf)


def _logistic(z):
    return 0.5 + 0.5 * np.tanh(z / 2)


class StopRule:
    """When drafting stops: the least gain for each step of a tree of `steps` steps.

    Drafting stops when the chance of one more accepted token is below `chance`; 0: it never stops.
    "auto" is the break-even point: the tokens that an average round yields in the time of one draft
    step (the renewal argument: continue while the marginal tokens per second exceed the average).
    `forwarded`: every node is forwarded by the draft. Raises ValueError for a negative chance.
    """

    def __init__(
        self, chance: float | str, steps: int, forwarded: bool = False, decay: float = 0.95
    ):
        if chance != "auto" and not float(chance) >= 0:
            raise ValueError(f"stop_gain is {chance}; expected 'auto' or a number from 0 on")
        self.chance, self.decay = chance, decay
        self.step_L = np.arange(max(steps, 1)) + 1
        self.later = 0 if forwarded else 1
        """1: a step's forward pass gives the nodes of the next step. 0: all nodes are forwarded, to
        draft below them, so the forward pass is a cost of the step itself."""
        self.calibration = Calibration()
        # Decaying means per round: (seconds, tokens, draft seconds, draft steps).
        self._average = None

    def learn(
        self,
        gains: Sequence[float],
        hits: Any,
        seconds: float,
        tokens: int,
        draft_s: float,
        steps: int | None = None,
    ) -> None:
        """Adds a finished round: the gain of each step, and whether a node of it was accepted.

        `steps` is the number of draft steps if their gains are not known (looked-up tokens).
        """
        if self.chance == 0:
            return
        known = len(gains) - self.later
        steps = len(gains) or steps
        if known > 0:
            self.calibration.learn(gains[:known], self.step_L[:known], hits[self.later :])
        if not steps:
            return
        new = np.array([seconds, tokens, draft_s, steps])
        old = new if self._average is None else self._average
        self._average = self.decay * old + (1 - self.decay) * new

    def least_chance(self) -> float:
        """The chance of acceptance at which a step breaks even; 0 before the first measurement."""
        if self.chance != "auto":
            return float(self.chance)
        if self._average is None:
            return 0.0
        seconds, tokens, draft_s, steps = self._average
        return draft_s / steps * tokens / seconds

    def least_gain_L(self) -> np.ndarray:
        """float32 [steps]: the least gain of each step, for the device."""
        return self.calibration.least_gain(self.least_chance(), self.step_L).astype(np.float32)
