"""Every method has the tree and draft it promises."""

import dataclasses

import pytest

from llm_jax.testing import tiny_config
from subspec_jax.accept import Gate
from subspec_jax.draft_model import NO_DRAFT, Draft
from subspec_jax.methods import METHOD_NAMES, MethodError, make_method
from subspec_jax.plan import make_plan
from subspec_jax.propose import ModelDraft, PromptLookup, Vanilla
from subspec_jax.tree import TreeSpec

SPEC = TreeSpec("beam", depth=5, width=3, sharpen=0.3)
DRAFT, GATE = Draft(4, 32), Gate("probability", 0.4, 2)
CFG, SMALL = tiny_config("qwen2"), tiny_config("llama", layers=1)
changed = dataclasses.replace


def make(name, spec=SPEC, draft_model=SMALL, stop_gain=0.25):
    return make_method(name, spec, DRAFT, GATE, stop_gain, draft_model, 4)


PROMISED = {
    # name -> tree, draft
    "subspec": (SPEC, DRAFT),
    "vanilla": (TreeSpec("chain", depth=0), NO_DRAFT),
    "chain": (changed(SPEC, kind="chain", width=1), DRAFT),
    "best-first": (changed(SPEC, kind="best-first", budget=15), DRAFT),
    "ngram": (SPEC, NO_DRAFT),
    "classic": (changed(SPEC, sharpen=1.0), Draft(None, own_cache=True, model=SMALL)),
    "subspec-lossy": (SPEC, DRAFT),
    "subspec-post": (changed(SPEC, extra=8), DRAFT),
    "subspec-lookup": (changed(SPEC, lookup=16), DRAFT),
    "subspec-own-cache": (SPEC, changed(DRAFT, own_cache=True)),
    "subspec-unsharpened": (changed(SPEC, sharpen=1.0), DRAFT),
    "subspec-unshared-layers": (SPEC, changed(DRAFT, share_resident=False)),
    "subspec-uncoupled": (changed(SPEC, coupled=False), DRAFT),
}


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_has_the_tree_and_the_draft_it_promises(name):
    method = make(name)
    assert (method.name, method.spec, method.draft) == (name, *PROMISED[name])
    assert method.lossless == (name != "subspec-lossy")
    assert method.gate == (GATE if name == "subspec-lossy" else None)
    drafts = method.draft != NO_DRAFT
    assert method.stop_gain == (0.25 if drafts else 0.0)
    assert make_plan(CFG, 2**30, method.spec, method.draft).spec == method.spec


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_methods_proposer_is_of_the_same_tree(name):
    method, params = make(name), object()
    proposer = method.proposer(CFG, params)
    assert proposer.spec == method.spec
    if name == "vanilla":
        assert type(proposer) is Vanilla
    elif name == "ngram":
        assert (type(proposer), proposer.longest) == (PromptLookup, 4)
    else:
        assert type(proposer) is ModelDraft and proposer.params is params
        assert proposer.cfg == (SMALL if name == "classic" else CFG)
        assert proposer.own_cache == (name in ("classic", "subspec-own-cache"))
        assert proposer.stop_gain == 0.25 and proposer.longest == 4


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize(
    "spec",
    [
        TreeSpec("best-first", 5, 3, budget=7, extra=2),
        TreeSpec("chain", 4),
        TreeSpec("beam", 4, 2, extra=3),
        TreeSpec("beam", 4, 2, lookup=5),
    ],
    ids=["best-first", "chain", "drafting ahead", "looking up"],
)
def test_every_method_can_be_made_of_every_tree(name, spec):
    method = make(name, spec, stop_gain="auto")
    assert method.proposer(CFG, None).spec == method.spec
    assert method.spec.depth == (0 if name == "vanilla" else spec.depth)
    if name in ("ngram", "classic", "subspec-own-cache", "subspec-lookup"):
        assert method.spec.extra == 0  # these cannot draft ahead
    elif name == "subspec-post":
        assert method.spec.extra == (spec.extra or 8)
    if name in ("vanilla", "ngram", "subspec-post"):
        assert method.spec.lookup == 0
    else:
        assert method.spec.lookup == (spec.lookup or (16 if name == "subspec-lookup" else 0))
    if name == "best-first":
        assert method.spec.budget == (7 if spec.budget else spec.depth * spec.width)


def test_what_a_method_lacks_is_said():
    with pytest.raises(MethodError, match="--draft-model"):
        make("classic", draft_model=None)
    with pytest.raises(MethodError, match="'nosuch' is not one of subspec, vanilla"):
        make("nosuch")


def test_every_name_is_tested():
    assert set(METHOD_NAMES) == set(PROMISED)
