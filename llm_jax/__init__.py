"""A plain decoder-only language model as pure functions over pytrees.

    import llm_jax
    path = llm_jax.find_checkpoint("smollm2-135m")
    checkpoint = llm_jax.open_checkpoint(path)
    cfg, tokenizer = checkpoint.config(), checkpoint.tokenizer()
    prompt = tokenizer.encode("The capital of France is")
    tokens = llm_jax.generate(checkpoint.load(cfg), prompt, cfg, steps=16)

Importing it needs jax and numpy alone, and loads a module when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any


def shown(text: object, most: int = 500) -> str:
    """Text from somebody else's file as a message may print it: one line of `most` characters.

    Control characters, line breaks and characters that turn the direction of writing come out as
    escapes such as \\x1b, so that a name in a file cannot clear the screen or imitate a message.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most - 1]}…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class LLMError(ValueError):
    """The base of this package's errors; their messages are for users.

    What a file puts into a message is escaped (`shown`) here, for every error.
    """

    def __init__(self, message: object = ""):
        lines = str(message).split("\n")
        super().__init__("\n".join(shown(line, len(line)) for line in lines))


class CheckpointError(LLMError):
    """A checkpoint that cannot be used; the message is for the user and needs no traceback."""


if TYPE_CHECKING:
    from llm_jax.attention import caches_for
    from llm_jax.checkpoint import Checkpoint
    from llm_jax.config import Config
    from llm_jax.formats import open_checkpoint
    from llm_jax.generation import generate, prefill
    from llm_jax.hf_names import params_from_hf, params_to_hf
    from llm_jax.model import forward
    from llm_jax.params import Params, init
    from llm_jax.quantize import Quantized, dequantize
    from llm_jax.registry import MODELS, find_checkpoint, find_model, open_model
    from llm_jax.sample import Sampler
    from llm_jax.tokenizer import Tokenizer

_HOMES = {  # name -> its module, imported when the name is first used
    "Checkpoint": "llm_jax.checkpoint",
    "Config": "llm_jax.config",
    "MODELS": "llm_jax.registry",
    "Params": "llm_jax.params",
    "Quantized": "llm_jax.quantize",
    "Sampler": "llm_jax.sample",
    "Tokenizer": "llm_jax.tokenizer",
    "caches_for": "llm_jax.attention",
    "dequantize": "llm_jax.quantize",
    "find_checkpoint": "llm_jax.registry",
    "find_model": "llm_jax.registry",
    "forward": "llm_jax.model",
    "generate": "llm_jax.generation",
    "init": "llm_jax.params",
    "open_checkpoint": "llm_jax.formats",
    "open_model": "llm_jax.registry",
    "params_from_hf": "llm_jax.hf_names",
    "params_to_hf": "llm_jax.hf_names",
    "prefill": "llm_jax.generation",
}
__all__ = [
    "MODELS",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "LLMError",
    "Params",
    "Quantized",
    "Sampler",
    "Tokenizer",
    "caches_for",
    "dequantize",
    "find_checkpoint",
    "find_model",
    "forward",
    "generate",
    "init",
    "open_checkpoint",
    "open_model",
    "params_from_hf",
    "params_to_hf",
    "prefill",
    "shown",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
