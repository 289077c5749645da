"""Which depth and width pay: tokens a second of smaller trees, from the rounds of a larger one.

A narrower beam keeps an accepted path as long as its nodes rank below the narrower width in every
level: fewer parents compete there, so this counts too little rather than too much.

Letters: L levels, W widths.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subspec_jax.draft_model import NO_DRAFT
from subspec_jax.methods import Method
from subspec_jax.propose import Round

FIRST_TOKENS = 128
"""Decoded with the largest tree before a tree is chosen: some 10 to 40 rounds."""


@dataclasses.dataclass(frozen=True)
class TreeCosts:
    """Measured seconds. Between two measurements lies a line; beyond the outermost, their value."""

    draft_s: Mapping[int, float]
    """Of one draft step, by width."""
    verify_s: Mapping[int, float]
    """Of the target's pass, by places verified, the root included."""
    other_s: float = 0.0
    """Of the rest of a round."""

    def step_s(self, width: int) -> float:
        return _between(self.draft_s, width)

    def pass_s(self, nodes: int) -> float:
        return _between(self.verify_s, nodes)

    def round_s(self, depth: int, width: int) -> float:
        """Seconds of a round with a whole tree of that shape."""
        return depth * self.step_s(width) + self.pass_s(1 + depth * width) + self.other_s


def _between(measured: Mapping[int, float], at: int) -> float:
    places = sorted(measured)
    return float(np.interp(at, places, [measured[p] for p in places]))


def measured_costs(trees: Mapping[tuple[int, int], Iterable[Round]]) -> TreeCosts:
    """Medians of what rounds took, by (depth, width) of their trees; those may have stopped early,
    but the pass is of all places."""
    draft, verify, other = {}, {}, []
    for (depth, width), rounds in trees.items():
        seconds = [(r.draft_s / max(r.depth, 1), r.verify_s, r.other_s) for r in rounds]
        if not seconds:
            raise ValueError(f"no rounds were recorded with depth {depth} and width {width}")
        typical = np.median(seconds, axis=0)
        draft.setdefault(width, []).append(typical[0])
        verify.setdefault(1 + depth * width, []).append(typical[1])
        other.append(typical[2])
    mean = lambda found: {at: float(np.mean(values)) for at, values in found.items()}
    return TreeCosts(mean(draft), mean(verify), float(np.mean(other)))


def reached(paths, depths, depth: int, width: int, wide: int) -> np.ndarray:
    """[depth] P(the accepted path reaches level l) of beams of `width`, from beams of `wide`.

    `paths` are the places of accepted nodes and `depths` the levels of the trees, round by round.
    Levels that a tree did not have say nothing of it (the product-limit estimate).
    """
    trials_L, hits_L = np.zeros(depth), np.zeros(depth)
    for path, deepest in zip(paths, depths, strict=True):
        ranks = (np.asarray(path[:depth], int) - 1) % wide
        lost = np.flatnonzero(ranks >= width)
        kept = lost[0] if len(lost) else len(ranks)
        hits_L[:kept] += 1
        trials_L[: min(kept + 1, deepest)] += 1
    return np.cumprod(np.divide(hits_L, trials_L, out=np.zeros(depth), where=trials_L > 0))


def predicted(paths, depths, wide: int, costs: TreeCosts) -> np.ndarray:
    """Tokens a second [L, W] of beams of 1 … levels and 1 … `wide` nodes a level."""
    deepest = max(depths, default=0)
    rate_LW = np.zeros((deepest, wide))
    for width in range(1, wide + 1):
        tokens_L = 1 + np.cumsum(reached(paths, depths, deepest, width, wide))
        seconds = [costs.round_s(d, width) for d in range(1, deepest + 1)]
        rate_LW[:, width - 1] = tokens_L / seconds
    return rate_LW


def best_shape(
    paths, depths, wide: int, costs: TreeCosts, depth: int | None = None, width: int | None = None
) -> tuple[int, int, float]:
    """(depth, width, tokens a second) of the beam with the highest prediction.

    `depth` and `width` fix one of the two. No shape larger than the recorded one is considered:
    nothing is known of it, and memory was planned for no more. Ties go to the smaller tree.
    """
    rate_LW = predicted(paths, depths, wide, costs)
    if not rate_LW.size:
        raise ValueError("no recorded round has a tree")
    rows = range(len(rate_LW)) if depth is None else [min(depth, len(rate_LW)) - 1]
    columns = range(wide) if width is None else [min(width, wide) - 1]
    row, column = max(((r, c) for r in rows for c in columns), key=lambda at: rate_LW[at])
    return row + 1, column + 1, float(rate_LW[row, column])


def can_choose(method: Method) -> bool:
    """Whether rounds of the method tell what a smaller tree would have accepted.

    Best-first trees, looked-up tokens and trees drafted during verification do not: they keep their
    shape.
    """
    spec = method.spec
    fits = method.draft != NO_DRAFT and spec.kind != "best-first"
    return fits and not (spec.extra or spec.lookup) and spec.depth > 0


def choose_tree(
    engine: Any,
    method: Method,
    prompt: Sequence[int],
    depth: int | None = None,
    width: int | None = None,
) -> tuple[Method, float | None]:
    """(the method with the tree that the first rounds promise most of, tokens a second).

    `engine` is a `subspec_jax.engine.Engine`. It decodes the prompt with the method's own tree, the
    largest, and with a very small one, which tells what a node and a step cost. `depth` and `width`
    fix one of the two. Times are measured, so choices may vary. None: the answer ended with its
    first token, and the tree stays as it is.
    """
    whole = method.spec
    small = dataclasses.replace(whole, depth=min(2, whole.depth), width=1)
    rounds: dict[tuple[int, int], list[Round]] = {}
    for spec, tokens, eos in ((small, 16, ()), (whole, FIRST_TOKENS, engine.eos)):
        engine.use(dataclasses.replace(method, spec=spec, stop_gain=0.0))
        tokens = min(tokens, engine.options.max_length - len(prompt))
        for _ in engine.rounds(prompt, min(tokens, 4), eos=()):  # compiles
            continue
        found = list(engine.rounds(prompt, tokens, eos=eos))[1:]
        rounds[spec.depth, spec.width] = found
    found = rounds[whole.depth, whole.width]
    if not found:
        return method, None
    paths, depths = [r.path for r in found], [r.depth for r in found]
    costs = measured_costs(rounds)
    depth, width, rate = best_shape(paths, depths, whole.width, costs, depth, width)
    chosen = dataclasses.replace(whole, depth=depth, width=width)
    return dataclasses.replace(method, spec=chosen), rate
