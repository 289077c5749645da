"""The decoding methods, all on the same engine.

A method is what the planner needs to know (tree and draft) and how its proposer is made.
"""

import dataclasses
from typing import Literal, get_args

from llm_jax.config import Config
from llm_jax.params import Params
from subspec_jax import SubspecError
from subspec_jax.accept import Gate
from subspec_jax.draft_model import NO_DRAFT, Draft
from subspec_jax.propose import ModelDraft, PromptLookup, Proposer, Vanilla
from subspec_jax.tree import TreeSpec

MethodName = Literal[
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
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)


class MethodError(SubspecError):
    """A method with settings that it cannot have; the message says what is missing."""


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
        if self.draft.experts is not None:
            if draft_cfg.experts is None:
                raise MethodError(
                    f"a draft of {self.draft.experts} experts a token was asked for, and "
                    f"{draft_cfg.family} models have no experts"
                )
            if not 1 <= self.draft.experts <= draft_cfg.experts.count:
                raise MethodError(
                    f"a draft of {self.draft.experts} experts a token was asked for; the model has "
                    f"{draft_cfg.experts.count}"
                )
            fewer = dataclasses.replace(draft_cfg.experts, chosen=self.draft.experts)
            draft_cfg = dataclasses.replace(draft_cfg, experts=fewer)
        own = self.draft.own_cache
        return ModelDraft(params, draft_cfg, self.spec, own, self.stop_gain, self.longest)


VANILLA = Method("vanilla", Vanilla.spec)

POST_STEPS = 8
"""Steps that subspec-post drafts during verification where the tree does not say."""


def make_method(
    name: str,
    spec: TreeSpec,
    draft: Draft,
    gate: Gate = Gate(),
    stop_gain: float | str = 0.0,
    draft_model: Config | None = None,
    longest: int = 3,
) -> Method:
    """The method of that name, from the tree and substitutes the user chose for `subspec`.

    `draft_model` is the small model of `classic`; `longest` is the longest n-gram that is looked
    up. Raises MethodError for a tree that the method cannot have.
    """
    given = name, spec, draft, gate, stop_gain, draft_model, longest
    try:
        return _make_method(*given)
    except MethodError:
        raise
    except ValueError as error:
        raise MethodError(str(error)) from error


def _make_method(name, spec, draft, gate, stop_gain, draft_model, longest) -> Method:
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
            return change(substitutes, spec=change(spec, extra=spec.extra or POST_STEPS, lookup=0))
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
    raise MethodError(f"method {name!r} is not one of {', '.join(METHOD_NAMES)}")
