"""The decoding methods that `experiments.speculative` compares, all on the same engine.

A method is what the planner needs to know (tree and draft) and how its proposer is made.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from experiments.common.cli import UserError
from llm_jax.config import Config
from llm_jax.params import Params
from subspec_jax.accept import Gate
from subspec_jax.plan import NO_DRAFT, Draft
from subspec_jax.propose import ModelDraft, PromptLookup, Proposer, Vanilla
from subspec_jax.tree import TreeSpec

Name = Literal[
    "subspec",
    "vanilla",
    "chain",
    "best-first",
    "ngram",
    "classic",
    "subspec-lossy",
    "subspec-post",
    "subspec-lookup",
    "subspec-own-cache",
    "subspec-unsharpened",
    "subspec-unshared-layers",
    "subspec-uncoupled",
]
NAMES: tuple[str, ...] = get_args(Name)


class MethodError(UserError):
    """A method that cannot run as asked; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to decode."""

    name: str
    spec: TreeSpec
    draft: Draft = NO_DRAFT
    gate: Gate | None = None
    stop_gain: float | str = 0.0
    longest: int = 3

    @property
    def lossless(self) -> bool:
        return self.gate is None

    def proposer(self, cfg: Config, params: Params | None) -> Proposer:
        """The proposer; `params` are the substitutes or the draft model, None without one."""
        if self.name == "vanilla":
            return Vanilla()
        if self.name == "ngram":
            return PromptLookup(self.spec, self.longest)
        draft_cfg = self.draft.model or cfg
        own = self.draft.own_cache
        return ModelDraft(params, draft_cfg, self.spec, own, self.stop_gain, self.longest)


VANILLA = Method("vanilla", Vanilla.spec)


def make_method(
    name: str,
    spec: TreeSpec,
    draft: Draft,
    gate: Gate,
    stop_gain: float | str,
    draft_model: Config | None,
    post_steps: int,
    longest: int,
) -> Method:
    """The method of that name, from the tree and substitutes the user chose for `subspec`."""
    change = dataclasses.replace
    substitutes = Method(name, spec, draft, stop_gain=stop_gain, longest=longest)
    chain = change(spec, kind="chain", width=1, budget=None)
    match name:
        case "subspec":
            return substitutes
        case "vanilla":
            return VANILLA
        case "chain":
            return change(substitutes, spec=chain)
        case "best-first":
            budget = spec.budget or spec.depth * spec.width
            return change(substitutes, spec=change(spec, kind="best-first", budget=budget))
        case "ngram":
            plain = change(spec, kind="beam", budget=None, extra=0, lookup=0)
            return Method(name, plain, longest=longest)
        case "classic":
            if draft_model is None:
                raise MethodError(
                    "the classic method drafts with a small model of the same vocabulary; "
                    "name it with --draft-model (for qwen2.5-7b: qwen2.5-0.5b or qwen2.5-1.5b)"
                )
            own = Draft(bits=None, own_cache=True, model=draft_model)
            alone = change(spec, sharpen=1.0, extra=0)
            return Method(name, alone, own, stop_gain=stop_gain, longest=longest)
        case "subspec-lossy":
            return change(substitutes, gate=gate)
        case "subspec-post":
            return change(substitutes, spec=change(spec, extra=spec.extra or post_steps, lookup=0))
        case "subspec-lookup":
            return change(substitutes, spec=change(spec, lookup=spec.lookup or 16, extra=0))
        case "subspec-own-cache":
            own = change(draft, own_cache=True)
            return change(substitutes, spec=change(spec, extra=0), draft=own)
        case "subspec-unsharpened":
            return change(substitutes, spec=change(spec, sharpen=1.0))
        case "subspec-unshared-layers":
            return change(substitutes, draft=change(draft, share_resident=False))
        case "subspec-uncoupled":
            return change(substitutes, spec=change(spec, coupled=False))
    raise MethodError(f"method {name!r} is not one of {', '.join(NAMES)}")


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
        lines = Path(source).read_text().splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
        rounds = [r["rounds"] for r in records if r["method"] == method.name]
        found = [
            accepted
            for r in rounds
            for accepted, emitted in zip(r["accepted"], r["emitted"], strict=True)
            if emitted > accepted
        ]
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
