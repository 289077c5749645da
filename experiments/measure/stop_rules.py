"""Rules that stop a draft tree early, replayed on recorded trees of the full depth.

Letter: L is the step of a draft, which adds one level.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.common.records import Record, RecordError
from subspec_jax.propose import Round
from subspec_jax.shape import TreeCosts
from subspec_jax.stop import StopRule


@dataclasses.dataclass(frozen=True)
class Text:
    """The trees that were drafted for the answer to one prompt.

    With `every`, there is a tree for every position of the text: a rule that emits n tokens
    continues with the n-th tree from there, so its rounds are exactly those of a run. Otherwise the
    trees are the rounds of a run, and a rule is judged as if its rounds began at the same places.
    """

    rounds: Sequence[Round]
    every: bool = False


STARTS = 16
"""How often a text with a tree for every position is replayed: from each of its first positions."""

_COLUMNS = ("accepted", "drafted", "depth", "draft_s", "verify_s", "other_s", "path", "gains")


def texts_of(found: Sequence[Record], method: str) -> list[Text]:
    """The trees of a method's records. Raises RecordError if trees or columns are missing."""
    texts = []
    for record in found:
        columns = record["rounds"]
        if record["method"] != method or not any(columns.get("drafted", ())):
            continue
        if missing := {"path", "gains"} - set(columns):
            raise RecordError(f"the records are of an older version, without {sorted(missing)}")
        known = [name for name in _COLUMNS if name in columns]
        rows = zip(*(columns[name] for name in known), strict=True)
        rounds = [Round([], **dict(zip(known, row))) for row in rows]
        texts.append(Text([r for r in rounds if r.depth], record.get("every_position", False)))
    if not texts:
        raise RecordError(f"no record of the method {method} has drafted trees")
    return texts


class Fixed:
    """Every tree has `depth` levels. The other rules override `levels` and `learn`."""

    def __init__(self, depth: int):
        self.depth = depth

    def levels(self, tree: Round) -> tuple[int, int]:
        """(levels to propose, draft steps to pay for), given the tree of the full depth."""
        levels = min(self.depth, len(tree.gains))
        return levels, levels

    def learn(self, tree: Round, levels: int, tokens: int, draft_s: float, seconds: float) -> None:
        """Is told the outcome of every round."""


class Oracle(Fixed):
    """Drafts exactly what will be accepted, but at least one level."""

    def __init__(self):
        pass

    def levels(self, tree: Round) -> tuple[int, int]:
        levels = min(max(tree.accepted, 1), len(tree.gains))
        return levels, levels


class Uncalibrated(Fixed):
    """Stops where the sum of sharpened path probabilities is below the break-even point.

    A step's sum is known only after its forward pass, so one step more is paid than proposed.
    """

    def __init__(self):
        self.average = None

    def levels(self, tree: Round) -> tuple[int, int]:
        if self.average is None:
            return len(tree.gains), len(tree.gains)
        draft_s, steps, tokens, seconds = self.average
        low = np.flatnonzero(np.exp(tree.gains) <= draft_s / steps * tokens / seconds)
        levels = int(low[0]) if len(low) else len(tree.gains)
        return levels, min(levels + 1, len(tree.gains))

    def learn(self, tree: Round, levels: int, tokens: int, draft_s: float, seconds: float) -> None:
        new = np.array([draft_s, max(levels, 1), tokens, seconds])
        self.average = new if self.average is None else 0.8 * self.average + 0.2 * new


class Calibrated(Fixed):
    """`subspec_jax.stop.StopRule`, used as `ModelDraft` uses it."""

    def __init__(self, steps: int):
        self.stop = StopRule("auto", steps)

    def levels(self, tree: Round) -> tuple[int, int]:
        least_L = self.stop.least_gain_L()[: len(tree.gains) - 1]
        low = np.flatnonzero(np.asarray(tree.gains[:-1]) <= least_L)
        levels = int(low[0]) + 1 if len(low) else len(tree.gains)
        return levels, levels

    def learn(self, tree: Round, levels: int, tokens: int, draft_s: float, seconds: float) -> None:
        hits = np.arange(levels) < tree.accepted
        self.stop.learn(tree.gains[:levels], hits, seconds, tokens, draft_s)


def visited(text: Text) -> list[Round]:
    """The rounds of runs that always draft to the full depth."""
    if not text.every:
        return list(text.rounds)
    found = []
    for at in range(STARTS):
        while at < len(text.rounds):
            found.append(text.rounds[at])
            at += text.rounds[at].accepted + 1
    return found


def replay(text: Text, rule: Fixed, costs: TreeCosts, width: int, start: int = 0) -> np.ndarray:
    """The sums (tokens, seconds, levels, rounds) of the text's rounds from tree `start` on.

    A pass verifies all places of a tree of the full depth, also those that stay empty.
    """
    deepest = max(len(tree.gains) for tree in text.rounds)
    step_s, pass_s = costs.step_s(width), costs.pass_s(1 + deepest * width)
    total, at = np.zeros(4), start
    while at < len(text.rounds):
        tree = text.rounds[at]
        levels, steps = rule.levels(tree)
        tokens = min(tree.accepted, levels) + 1
        draft_s = steps * step_s
        seconds = draft_s + pass_s + costs.other_s
        rule.learn(tree, levels, tokens, draft_s, seconds)
        total += tokens, seconds, levels, 1
        at += tokens if text.every else 1
    return total


def compare_rules(
    texts: Sequence[Text], costs: TreeCosts, width: int, starts: int = STARTS
) -> list[dict[str, Any]]:
    """One dict for each rule, over all texts and the `starts` first positions of each.

    "calibrated" starts from the prior and meets one text after another; "calibrated, warm" has
    learned from all other texts before. Neither sees a tree before it decides on it.
    """
    deepest = max(len(tree.gains) for text in texts for tree in text.rounds)
    first = range(starts if all(text.every for text in texts) else 1)

    def fresh(make: Callable[[], Fixed]) -> np.ndarray:
        """A new rule for each text and start."""
        return sum(replay(text, make(), costs, width, s) for text in texts for s in first)

    def through(make: Callable[[], Fixed]) -> np.ndarray:
        """A new rule for each start; it keeps what it learned from one text to the next."""
        total = np.zeros(4)
        for s in first:
            rule = make()
            total += sum(replay(text, rule, costs, width, s) for text in texts)
        return total

    def warm() -> np.ndarray:
        """A calibrated rule for each text and start that has seen the other texts."""
        total = np.zeros(4)
        for held in texts:
            for s in first:
                rule = Calibrated(deepest)
                for other_s in first[::4]:
                    for text in texts:
                        if text is not held:
                            replay(text, rule, costs, width, other_s)
                total += replay(held, rule, costs, width, s)
        return total

    fixed = {d: fresh(lambda d=d: Fixed(d)) for d in range(1, deepest + 1)}
    best = max(fixed, key=lambda d: fixed[d][0] / fixed[d][1])
    found = {
        f"fixed depth {deepest}": fixed[deepest],
        f"fixed depth {best}, the best in hindsight": fixed[best],
        "uncalibrated": through(Uncalibrated),
        "calibrated": through(lambda: Calibrated(deepest)),
        "calibrated, warm": warm(),
        "oracle": fresh(Oracle),
    }
    return [
        {
            "rule": rule,
            "tokens_per_s": tokens / seconds,
            "tau": tokens / rounds,
            "levels": levels / rounds,
            "rounds": int(rounds),
        }
        for rule, (tokens, seconds, levels, rounds) in found.items()
    ]
