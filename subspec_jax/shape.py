"""The best depth and width: tokens per second of smaller trees, from the rounds of a larger one.

A narrower beam keeps an accepted path as long as the rank of its node is below the narrower width
in every level. In a real narrower beam fewer parents compete, so this estimate is rather too low
than too high.

Letters: L levels, W widths.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subspec_jax.draft_model import NO_DRAFT
from subspec_jax.methods import Method
from subspec_jax.predict_experts import Routing
from subspec_jax.propose import Round

FIRST_TOKENS = 128
"""Tokens decoded with the largest tree before a tree is chosen: about 10 to 40 rounds."""


@dataclasses.dataclass(frozen=True)
class TreeCosts:
    """Measured seconds. Values between two measurements are interpolated linearly: those of a step
    by its width, those of a pass by what it `needs`.

    Outside the measured range, the nearest measurement counts.
    """

    draft_s: Mapping[int, float]
    """Seconds of one draft step, by width."""
    verify_s: Mapping[int, float]
    """Seconds of the target's pass, by number of verified places, with the root."""
    other_s: float = 0.0
    """Seconds of the rest of a round."""
    needs: Callable[[int], float] = float
    """What the seconds of a pass grow with, by its nodes: these themselves, or the experts that
    they are expected to need (`Routing.experts`), whose number grows ever more slowly."""

    def step_s(self, width: int) -> float:
        """Seconds of a draft step of `width` nodes."""
        return _between(self.draft_s, width)

    def pass_s(self, nodes: int) -> float:
        """Seconds of the target's pass over `nodes` places."""
        return _between({self.needs(n): s for n, s in self.verify_s.items()}, self.needs(nodes))

    def round_s(self, depth: int, width: int) -> float:
        """Seconds of a round with a whole tree of that shape."""
        return depth * self.step_s(width) + self.pass_s(1 + depth * width) + self.other_s


def _between(measured: Mapping[Any, float], at: float) -> float:
    places = sorted(measured)
    return float(np.interp(at, places, [measured[p] for p in places]))


def measured_costs(
    trees: Mapping[tuple[int, int], Iterable[Round]], routing: Routing | None = None
) -> TreeCosts:
    """The median costs of rounds, which are given by (depth, width) of their trees.

    Trees may have stopped early, but the pass always computes all places. `routing`: how tokens
    choose experts, where a pass brings them one by one. Raises ValueError if a shape has no rounds.
    """
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
    needs = float if routing is None else routing.experts
    return TreeCosts(mean(draft), mean(verify), float(np.mean(other)), needs)


def reached(
    paths: Sequence[Sequence[int]], depths: Sequence[int], depth: int, width: int, wide: int
) -> np.ndarray:
    """[depth] P(the accepted path reaches level l) in beams of `width`, from beams of `wide`.

    For each round, `paths` has the places of the accepted nodes and `depths` the number of levels
    of the tree. A tree gives no information about levels that it did not have (the product-limit
    estimate).
    """
    trials_L, hits_L = np.zeros(depth), np.zeros(depth)
    for path, deepest in zip(paths, depths, strict=True):
        ranks = (np.asarray(path[:depth], int) - 1) % wide
        lost = np.flatnonzero(ranks >= width)
        kept = lost[0] if len(lost) else len(ranks)
        hits_L[:kept] += 1
        trials_L[: min(kept + 1, deepest)] += 1
    return np.cumprod(np.divide(hits_L, trials_L, out=np.zeros(depth), where=trials_L > 0))


def predicted(
    paths: Sequence[Sequence[int]], depths: Sequence[int], wide: int, costs: TreeCosts
) -> np.ndarray:
    """Tokens per second [L, W] of beams with 1 … L levels of 1 … `wide` nodes each."""
    deepest = max(depths, default=0)
    rate_LW = np.zeros((deepest, wide))
    for width in range(1, wide + 1):
        tokens_L = 1 + np.cumsum(reached(paths, depths, deepest, width, wide))
        seconds = [costs.round_s(d, width) for d in range(1, deepest + 1)]
        rate_LW[:, width - 1] = tokens_L / seconds
    return rate_LW


def best_shape(
    paths: Sequence[Sequence[int]],
    depths: Sequence[int],
    wide: int,
    costs: TreeCosts,
    depth: int | None = None,
    width: int | None = None,
) -> tuple[int, int, float]:
    """(depth, width, tokens per second) of the beam with the highest prediction.

    `depth` and `width` fix one of the two. Shapes larger than the recorded one are not considered:
    nothing is known about them, and the memory plan has no room for them. Ties go to the smaller
    tree. Raises ValueError if no recorded round has a tree.
    """
    rate_LW = predicted(paths, depths, wide, costs)
    if not rate_LW.size:
        raise ValueError("no recorded round has a tree")
    rows = range(len(rate_LW)) if depth is None else [min(depth, len(rate_LW)) - 1]
    columns = range(wide) if width is None else [min(width, wide) - 1]
    row, column = max(((r, c) for r in rows for c in columns), key=lambda at: rate_LW[at])
    return row + 1, column + 1, float(rate_LW[row, column])


def can_choose(method: Method) -> bool:
    """Whether rounds of the method show what a smaller tree would have accepted.

    They do not for best-first trees, looked-up tokens and trees drafted during verification. Such
    trees keep their shape.
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
    """(the method with the tree that is predicted to be fastest, its tokens per second).

    `engine` is a `subspec_jax.engine.Engine`. It decodes the prompt with the method's own tree,
    which is the largest, and with a very small one, to find the cost of a node and of a step.
    `depth` and `width` fix one of the two. Times are measured, so the choice may vary. Of a model
    with experts, the time of a pass between the two grows with the experts that its nodes are
    expected to need, by how often each was asked for. If the answer ends with its first token, the
    method is unchanged and the rate is None.
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
    cache, routing = engine.decoder.target.experts, None
    if cache is not None:
        routing = Routing.counted(cache.score_LE, engine.cfg.experts.chosen)
    costs = measured_costs(rounds, routing)
    depth, width, rate = best_shape(paths, depths, whole.width, costs, depth, width)
    chosen = dataclasses.replace(whole, depth=depth, width=width)
    return dataclasses.replace(method, spec=chosen), rate
