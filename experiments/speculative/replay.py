"""Accepted lengths from a trace: the engine is timed as if the draft were that good."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llm_jax.files import parse_json
from llm_jax.untrusted import read_text
from subspec_jax.methods import Method, MethodError

BLOCK = 48
"""Rounds of the published trace that together have its distribution."""

PUBLISHED_HAZARD = {"beam": 0.9749, "chain": 0.967}
"""Chance that one more level is accepted. beam: fitted to SubSpec's README (width 6, tau 28.35 at
depth 48, Qwen2.5-7B on MT-Bench); chain: of the acceptance data in its repository."""


def acceptance_trace(source: str, method: Method, seed: int = 0) -> Callable[[], Iterator[int]]:
    """A maker of endless iterators over accepted lengths, from a source of acceptance.

    `published`: draws at the published hazard, `BLOCK` at a time one from each part of equal
    probability, in random order, so that few rounds have the mean of many. Otherwise a file of
    records that `experiments.speculative` wrote: the rounds of the same method, over and over, but
    for those that the end of a text cut short.
    """
    if method.name == "vanilla":
        return lambda: iter(lambda: 0, None)
    if source == "published":
        if method.spec.kind not in PUBLISHED_HAZARD or method.draft.bits is None:
            raise MethodError(
                f"there is no published acceptance trace for the method {method.name}"
            )
        hazard, depth = PUBLISHED_HAZARD[method.spec.kind], method.spec.depth

        def draws():
            rng = np.random.default_rng(seed)
            log = math.log(hazard)
            while True:
                chance = 1 - (rng.permutation(BLOCK) + 0.5) / BLOCK
                yield from np.minimum(np.log(chance) / log, depth).astype(int).tolist()

        return draws
    try:
        lines = read_text(Path(source)).splitlines()
        records = [parse_json(line) for line in lines if line.strip()]
        rounds = [r["rounds"] for r in records if r["method"] == method.name]
        found = [
            accepted
            for r in rounds
            for accepted, emitted in zip(r["accepted"], r["emitted"], strict=True)
            if emitted > accepted
        ]
        if wrong := [n for n in found if type(n) is not int or n < 0]:
            raise ValueError(f"{wrong[0]!r} is no number of accepted tokens")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise MethodError(
            f"{source} is no acceptance trace ({e}); give 'published' or a records.jsonl that this "
            "program wrote"
        ) from e
    if not found:
        raise MethodError(f"{source} has no rounds of the method {method.name}")

    def recorded():
        while True:
            yield from found

    return recorded
