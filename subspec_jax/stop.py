"""When a further draft step pays: the draft's own scores, calibrated on what was accepted.

The log of the sum of a step's sharpened path probabilities, its *gain*, orders trees well and is no
log-probability: where the sum is 0.86, SmolLM2 accepts every fourth such step. So the chance is
learned from finished rounds. NumPy, on the host; the device gets one least gain per step.

Letters: L steps of a tree, X pairs of a gain and an outcome.
"""

import collections
import math

import numpy as np

PRIOR = (1.0, 1.5, 1.0)
"""Intercept and slopes before anything is learned: about those of single texts of SmolLM2-135M."""
FINEST = 1e-4
"""Gains nearer to 0 than this are not told apart: float32 sums of probabilities are 1 ± 1e-7."""


def features(gain_X, step_X):
    """[X, 3]: one, how sure the draft is, how shallow the step is; more of each, more chance."""
    sure_X, step_X = np.broadcast_arrays(-np.log(FINEST - np.minimum(gain_X, 0.0)), step_X)
    return np.stack([np.ones_like(sure_X), sure_X / 3 - 1, -step_X / 10], axis=-1)


class Calibration:
    """A logistic curve: P(the target accepts a node) by gain and step; it falls with both.

    The maximum a posteriori of the last rounds, older ones weighing less by `decay` a round, with a
    Gaussian prior of precision `strength` around `PRIOR`. Slopes cannot become negative.
    """

    def __init__(self, strength: float = 5.0, decay: float = 0.98, rounds: int = 64):
        self.strength, self.decay = strength, decay
        self.prior = np.array(PRIOR)
        self.weights = self.prior.copy()
        self._rounds = collections.deque(maxlen=rounds)

    def learn(self, gain_X, step_X, hit_X) -> None:
        """One round's pairs."""
        if not len(gain_X):
            return
        self._rounds.appendleft((features(np.asarray(gain_X), step_X), np.asarray(hit_X, float)))
        x_X3 = np.concatenate([x for x, _ in self._rounds])
        hit_X = np.concatenate([hit for _, hit in self._rounds])
        age_X = np.repeat(np.arange(len(self._rounds)), [len(hit) for _, hit in self._rounds])
        weight_X = self.decay**age_X
        for _ in range(4):  # Newton's steps from the last round's answer
            p_X = _logistic(x_X3 @ self.weights)
            slope = x_X3.T @ (weight_X * (p_X - hit_X))
            slope += self.strength * (self.weights - self.prior)
            curvature = (x_X3 * (weight_X * p_X * (1 - p_X))[:, None]).T @ x_X3
            curvature += self.strength * np.eye(3)
            self.weights = self.weights - np.linalg.solve(curvature, slope)
            self.weights[1:] = np.maximum(self.weights[1:], (0.05, 0.0))

    def chance(self, gain_X, step_X):
        """P(the target accepts a node), [X]."""
        return _logistic(features(np.asarray(gain_X, float), step_X) @ self.weights)

    def least_gain(self, chance: float, step_L):
        """[L] the gain at which a step has that chance; inf where none has, -inf where all have."""
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
    """How unsure a draft may be: a least gain for each step of a tree of `steps` steps.

    `chance`: the chance of one more accepted token below which drafting stops; 0: it never stops.
    "auto" is the break-even point, the tokens that average rounds yield in the time of one draft
    step (the renewal argument: go on while the marginal tokens per second exceed the average).
    """

    def __init__(self, chance: float | str, steps: int, forwarded: bool = False, decay=0.95):
        if chance != "auto" and not float(chance) >= 0:
            raise ValueError(f"stop_gain is {chance}; expected 'auto' or a number from 0 on")
        self.chance, self.decay = chance, decay
        self.step_L = np.arange(max(steps, 1)) + 1
        self.later = 0 if forwarded else 1
        """A step's forward pass yields the next one's nodes; where all nodes are to be forwarded
        (for drafting below them) it is the price of the step's own."""
        self.calibration = Calibration()
        self._average = None  # (seconds, tokens, draft seconds, draft steps) a round, decaying

    def learn(
        self, gains, hits, seconds: float, tokens: int, draft_s: float, steps: int | None = None
    ) -> None:
        """A finished round: its steps' gains, and whether a node of the step was accepted.

        `steps` were forwarded where the gains of steps are not known (looked-up tokens).
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
        """The chance of acceptance at which a step breaks even; 0 while nothing is measured."""
        if self.chance != "auto":
            return float(self.chance)
        if self._average is None:
            return 0.0
        seconds, tokens, draft_s, steps = self._average
        return draft_s / steps * tokens / seconds

    def least_gain_L(self) -> np.ndarray:
        """What the device needs: float32 [steps]."""
        return self.calibration.least_gain(self.least_chance(), self.step_L).astype(np.float32)
