"""What is compiled ahead is what decoding then asks for: no large program is compiled twice."""

import dataclasses

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from llm_jax.config import Config, Experts
from llm_jax.params import abstract
from llm_jax.sample import Sampler
from subspec_jax import tree
from subspec_jax.accept import Gate
from subspec_jax.batch import BatchDecoder
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import NO_DRAFT, Draft, make_draft
from subspec_jax.methods import make_method
from subspec_jax.plan import make_plan
from subspec_jax.precompile import Ahead, compile_ahead, use_cache
from subspec_jax.prefix_cache import Text
from subspec_jax.propose import ModelDraft, PromptLookup, Vanilla
from subspec_jax.random_weights import random_target
from subspec_jax.residual.split import gaussian_room, split_head_shapes, split_shapes
from subspec_jax.tree import PassShape, TreeSpec

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
LARGE = {"jit_block", "last_logits", "finish_round", "grow", "grow_along", "extend", "drawn"}
"""The programs that hold a layer, the head or the draft."""

BEAM = TreeSpec("beam", 2, 2)
WHOLE, PARTLY = list(range(1, 65)), list(range(1, 43))


@pytest.fixture
def compiled(tmp_path):
    """f() -> names of the programs that were compiled, and kept, since it was called last."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    reset_cache()
    use_cache(tmp_path)
    seen = set()

    def names():
        new = {f.name for f in tmp_path.glob("*-cache")} - seen
        seen.update(new)
        return {name.removeprefix("jit_").rsplit("-", 2)[0] for name in new}

    yield names
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def model(case: int, **changes) -> Config:
    """A model whose sizes no other test uses, so that nothing is in JAX's memory yet."""
    sizes = dict(layers=3, d_model=32, heads=4, kv_heads=2, head_dim=8, d_ff=64, vocab=120 + case)
    return Config(**(sizes | dict(dtype="float32") | changes))


CASES = {
    # name -> model, tree, what differs in the plan, sampler, gate, whether accepted lengths replay
    "shared table": (dict(qkv_bias=True), BEAM, {}, Sampler(), None, False),
    "table on host": ({}, BEAM, dict(table_on_host=True, resident=0), Sampler(), None, False),
    "tied": (dict(tied=True), BEAM, dict(resident=3), Sampler(), None, False),
    "gate": (dict(dtype="bfloat16"), BEAM, {}, Sampler(), Gate("entropy", 0.5, 1), False),
    "replay": ({}, BEAM, dict(draft=Draft(4, 16, share_resident=False)), Sampler(), None, True),
    "extra": ({}, TreeSpec("beam", 2, 2, extra=2), {}, Sampler(), None, False),
    "own head": ({}, BEAM, dict(draft=Draft(4, 16, head_bits=8)), Sampler(), None, False),
    "residual": (dict(dtype="bfloat16"), BEAM, {}, Sampler(), None, False),
    "residual head": (dict(dtype="bfloat16"), BEAM, {}, Sampler(), None, False),
    "lookup": ({}, TreeSpec("beam", 2, 2, lookup=4), {}, Sampler(), None, False),
    "bitwise": ({}, BEAM, dict(shape=PassShape(16, 32, 8)), Sampler(0.8), None, False),
    "sampling": (
        dict(qk_norm=True),
        TreeSpec("best-first", 4, 2, budget=4),
        {},
        Sampler(0.8, top_p=0.9),
        None,
        False,
    ),
}


def plan_for(cfg, spec, **changes):
    fixed = dict(draft=Draft(4, 16), max_length=90, chunk=32, resident=1)
    return make_plan(cfg, 2**30, spec, **(fixed | changes))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_decoding_compiles_no_large_program_again(compiled, name, monkeypatch):
    monkeypatch.setattr(tree, "SHORTEST", 64)  # the texts below end before and behind it
    sizes, spec, changes, sampler, gate, replay = CASES[name]
    cfg = model(list(CASES).index(name), **sizes)
    if "residual" in name:
        room = gaussian_room(cfg, 4, 16)
        layers = (split_shapes(cfg, 4, 16, room),) * cfg.layers
        shapes = dataclasses.replace(abstract(cfg), layers=layers)
        if "head" in name:
            shapes = dataclasses.replace(
                shapes, head_DV=split_head_shapes(cfg, 4, 16, room["head"])
            )
        changes = dict(model=shapes)
    plan = plan_for(cfg, spec, **changes)
    compile_ahead(dict(m=Ahead(plan, sampler, gate, replay)))
    unused = {"extend": not spec.extra, "grow_along": not spec.lookup, "drawn": plan.shape is None}
    assert LARGE & compiled() == LARGE - {name for name, none in unused.items() if none}

    target = random_target(plan)
    proposer = ModelDraft(make_draft(target.params, plan.draft, plan.resident, 0), cfg, spec)
    lengths = plan.max_length, plan.chunk, plan.shape
    decoder = Decoder(target, proposer, sampler, gate, *lengths)
    lengths = (lambda: iter(lambda: 1, None)) if replay else (lambda: None)
    assert len(decoder.generate(WHOLE, 6, replay=lengths())) == 6
    assert not LARGE & compiled()
    # A shorter last piece of a prompt takes another block, compiled ahead too.
    assert len(decoder.generate(PARTLY, 6, replay=lengths())) == 6
    assert not LARGE & compiled()


@pytest.mark.quick_cases("vanilla")
@pytest.mark.parametrize("name", ["vanilla", "ngram"])
def test_without_a_draft_the_targets_programs_are_compiled(compiled, name):
    cfg = model(50 + (name == "ngram"))
    proposer = Vanilla() if name == "vanilla" else PromptLookup(BEAM)
    plan = plan_for(cfg, proposer.spec, draft=NO_DRAFT)
    compile_ahead(dict(m=Ahead(plan, Sampler())))
    assert LARGE & compiled() == {"jit_block", "last_logits", "finish_round"}
    decoder = Decoder(random_target(plan), proposer, max_length=90, chunk=32)
    assert len(decoder.generate(WHOLE, 6)) == 6
    assert not LARGE & compiled()


def test_what_methods_share_is_compiled_once(monkeypatch):
    """Chunks of a prompt and the head for its last token are the same programs for every tree."""
    cfg, made = model(65), []
    once = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: made.append(self) or once(self))
    ahead = {
        name: Ahead(plan_for(cfg, spec, draft=NO_DRAFT), Sampler())
        for name, spec in dict(small=Vanilla.spec, large=TreeSpec("beam", 2, 2)).items()
    }
    each = {name: sum(1 for _ in method.programs()) for name, method in ahead.items()}
    needs = compile_ahead(ahead | dict(again=ahead["large"]))
    # A block for the tree, and the end of its round; the rest is shared.
    assert len(made) == max(each.values()) + 2 and set(needs) == {"small", "large", "again"}
    assert needs["large"] == needs["again"] >= needs["small"] > 0


@pytest.mark.slow
def test_another_plan_needs_other_programs(compiled):
    """That the tests above see what is compiled at all."""
    plan = plan_for(model(60), Vanilla.spec, draft=NO_DRAFT)
    compile_ahead(dict(m=Ahead(plan, Sampler())))
    compiled()
    decoder = Decoder(random_target(plan), Vanilla(), Sampler(0.5), max_length=200, chunk=16)
    decoder.generate(WHOLE, 3)
    assert LARGE & compiled() == {"jit_block", "finish_round"}


TOGETHER = ["subspec", "sampled", "experts", "replay", "subspec-lookup", "subspec-lossy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_texts_together_compile_no_large_program_again(compiled, name, monkeypatch):
    """One, two and three texts, that share beginnings, join late and end early."""
    monkeypatch.setattr(tree, "SHORTEST", 64)
    changes = dict(experts=Experts(count=6, chosen=2, d_ff=32)) if name == "experts" else {}
    number, kind = TOGETHER.index(name), name if "-" in name else "subspec"
    cfg, method = model(70 + number, **changes), make_method(kind, BEAM, Draft(4, 16))
    resident = {} if name == "experts" else dict(resident=1)
    given = dict(draft=method.draft, texts=3, resident=None) | resident
    plan = plan_for(cfg, method.spec, **given)
    given = plan, Sampler(), method.gate, name == "replay", method.longest
    compile_ahead(dict(m=Ahead(*given)))
    large = {
        "grow_each",
        "grow_each_along",
        "finish_each",
        "first_draws",
        "_put_experts",
        "_attend_and_route",
    } | LARGE
    assert {"grow_each", "finish_each", "first_draws"} <= compiled()
    target = random_target(plan)
    draft = make_draft(target.params, plan.draft, plan.resident, 0)
    decoder = BatchDecoder(target, method, draft, 3, plan.max_length, plan.chunk)
    sampler = Sampler(0.8, top_p=0.9) if name == "sampled" else Sampler()
    replay = (lambda: iter(lambda: 1, None)) if name == "replay" else (lambda: None)
    prompts = [WHOLE[:n] for n in (5, 64, 64, 30, 42)]
    some = [Text(p, 6 + n, n, sampler, replay=replay()) for n, p in enumerate(prompts)]
    assert [len(new) for new in decoder.generate(some)] == [6, 7, 8, 9, 10]
    assert not large & compiled()
