"""Lossless speculative decoding of models too big for the GPU (SubSpec, arXiv 2509.18344).

    import subspec_jax
    model = subspec_jax.open("smollm2-135m", memory="450MB")
    print(model.plan)
    for text in model.chat("Name three uses of a thimble."):
        print(text, end="")

Importing this needs jax and numpy alone and starts no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"


class SubspecError(ValueError):
    """The base of this package's errors; their messages are for users."""


if TYPE_CHECKING:
    from llm_jax.sample import Sampler
    from subspec_jax.accept import Gate
    from subspec_jax.decoder import Decoder
    from subspec_jax.draft_model import Draft, make_draft
    from subspec_jax.engine import Engine
    from subspec_jax.foreign.linen_modules import linen
    from subspec_jax.foreign.qarrays import from_qwix, to_qwix
    from subspec_jax.foreign.substitutes import Rule, substitute
    from subspec_jax.foreign.target import ForeignModel
    from subspec_jax.load import load_target
    from subspec_jax.methods import Method, make_method
    from subspec_jax.opening import open
    from subspec_jax.options import Options
    from subspec_jax.plan import Plan, make_plan
    from subspec_jax.propose import ModelDraft, PromptLookup, Round
    from subspec_jax.requests import Request, Update
    from subspec_jax.scheduler import Scheduler
    from subspec_jax.tree import TreeSpec
    from subspec_jax.verify import Target

_HOMES = {  # name -> the module it is in, imported when the name is first used
    "Decoder": "subspec_jax.decoder",
    "Draft": "subspec_jax.draft_model",
    "Engine": "subspec_jax.engine",
    "ForeignModel": "subspec_jax.foreign.target",
    "Gate": "subspec_jax.accept",
    "Method": "subspec_jax.methods",
    "ModelDraft": "subspec_jax.propose",
    "Options": "subspec_jax.options",
    "Plan": "subspec_jax.plan",
    "PromptLookup": "subspec_jax.propose",
    "Request": "subspec_jax.requests",
    "Round": "subspec_jax.propose",
    "Rule": "subspec_jax.foreign.substitutes",
    "Sampler": "llm_jax.sample",
    "Scheduler": "subspec_jax.scheduler",
    "Target": "subspec_jax.verify",
    "TreeSpec": "subspec_jax.tree",
    "Update": "subspec_jax.requests",
    "from_qwix": "subspec_jax.foreign.qarrays",
    "linen": "subspec_jax.foreign.linen_modules",
    "load_target": "subspec_jax.load",
    "make_draft": "subspec_jax.draft_model",
    "make_method": "subspec_jax.methods",
    "make_plan": "subspec_jax.plan",
    "open": "subspec_jax.opening",
    "substitute": "subspec_jax.foreign.substitutes",
    "to_qwix": "subspec_jax.foreign.qarrays",
}
__all__ = [
    "Decoder",
    "Draft",
    "Engine",
    "ForeignModel",
    "Gate",
    "Method",
    "ModelDraft",
    "Options",
    "Plan",
    "PromptLookup",
    "Request",
    "Round",
    "Rule",
    "Sampler",
    "Scheduler",
    "SubspecError",
    "Target",
    "TreeSpec",
    "Update",
    "__version__",
    "from_qwix",
    "linen",
    "load_target",
    "make_draft",
    "make_method",
    "make_plan",
    "open",
    "substitute",
    "to_qwix",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
