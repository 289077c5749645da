"""The text, the samplers and the proposers with which the loop is tested."""

import dataclasses
import functools

from llm_jax.config import Config
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_params
from subspec_jax.propose import ModelDraft, PromptLookup, Vanilla
from subspec_jax.tree import TreeSpec

PROMPT = [1, 2, 3, 5, 7, 1, 2, 3]
STEPS, LENGTH = 24, 64
SAMPLERS = {"greedy": Sampler(), "sampling": Sampler(0.8, top_k=40, top_p=0.95)}

BEAM = TreeSpec("beam", 3, 3)
PROPOSERS = {
    "vanilla": lambda tiny: Vanilla(),
    "chain": lambda tiny: ModelDraft(tiny.draft(4), tiny.cfg, TreeSpec("chain", 4)),
    "beam": lambda tiny: ModelDraft(tiny.draft(4), tiny.cfg, BEAM),
    "best-first": lambda tiny: ModelDraft(
        tiny.draft(4), tiny.cfg, TreeSpec("best-first", 6, 3, budget=12)
    ),
    "2 bits": lambda tiny: ModelDraft(tiny.draft(2), tiny.cfg, BEAM),
    "3 bits": lambda tiny: ModelDraft(tiny.draft(3), tiny.cfg, BEAM),
    "8 bits": lambda tiny: ModelDraft(tiny.draft(8), tiny.cfg, BEAM),
    "own cache": lambda tiny: ModelDraft(tiny.draft(2), tiny.cfg, BEAM, own_cache=True),
    "good own cache": lambda tiny: ModelDraft(tiny.draft(8), tiny.cfg, BEAM, own_cache=True),
    "another model": lambda tiny: ModelDraft(*another_model(), BEAM, own_cache=True),
    "auto": lambda tiny: ModelDraft(tiny.draft(3), tiny.cfg, BEAM, stop_gain="auto"),
    "stop": lambda tiny: ModelDraft(tiny.draft(3), tiny.cfg, BEAM, stop_gain=0.7),
    "lookup": lambda tiny: PromptLookup(BEAM),
    "post beam": lambda tiny: ModelDraft(tiny.draft(3), tiny.cfg, TreeSpec("beam", 2, 3, extra=2)),
    "post best-first": lambda tiny: ModelDraft(
        tiny.draft(3), tiny.cfg, TreeSpec("best-first", 5, 2, budget=6, extra=4)
    ),
    "post chain": lambda tiny: ModelDraft(tiny.draft(4), tiny.cfg, TreeSpec("chain", 2, extra=3)),
    "post and stop": lambda tiny: ModelDraft(
        tiny.draft(3), tiny.cfg, TreeSpec("beam", 2, 3, extra=2), stop_gain=0.7
    ),
    "post, much": lambda tiny: ModelDraft(
        tiny.draft(3), tiny.cfg, TreeSpec("best-first", 6, 2, budget=2, extra=4)
    ),
}
SAMPLED = {
    "uncoupled": lambda tiny: ModelDraft(
        tiny.draft(4), tiny.cfg, dataclasses.replace(BEAM, coupled=False, sharpen=1.0)
    ),
}


@functools.cache
def another_model():
    """A draft of other sizes that has never seen the target: (params, cfg)."""
    cfg = Config(1, 16, 2, 1, 8, 24, 97, dtype="float32")
    return tiny_params(cfg, 9), cfg
