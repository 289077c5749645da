"""Log-probabilities in OpenAI's two forms: of a chat, and the older one of a text."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.serve.body import Body
from experiments.serve.errors import ApiError
from subspec_jax.logprobs import MOST, Logprob
from subspec_jax.requests import Told

LEGACY_MOST = 5
"""The likeliest tokens that /v1/completions tells, as OpenAI has it."""
LEAST = -9999.0
"""What OpenAI says of what can hardly be; JSON has no infinity."""
Named = Callable[[int], tuple[str, bytes | None]]
"""Of a token id, its name and its bytes: `Tokenizer.token`."""


def asked_logprobs(kind: str, body: Body) -> int | None:
    """How many of the likeliest tokens are told with each token; None: no token is told."""
    if kind == "text":
        return body.integer("logprobs", 0, LEGACY_MOST, None)
    wanted, most = body.flag("logprobs"), body.integer("top_logprobs", 0, MOST, 0)
    if most and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs; set it to true", "top_logprobs")
    return most if wanted else None


def logprobs_of(kind: str, told: Sequence[Told], named: Named) -> dict[str, Any]:
    """The field `logprobs` of a choice, whole or of a piece."""
    if kind == "chat":
        return {"content": [_chat(one.logprob, named) for one in told], "refusal": None}
    tops = [(*one.logprob.top, one.logprob[:2]) for one in told]
    return {
        "tokens": [_legacy(one.logprob.token, named) for one in told],
        "token_logprobs": [_finite(one.logprob.logprob) for one in told],
        "top_logprobs": [_by_name(top, named) for top in tops],
        "text_offset": [one.start for one in told],
    }


def _chat(logprob: Logprob, named: Named) -> dict[str, Any]:
    top = [_one(token, value, named) for token, value in logprob.top]
    return _one(logprob.token, logprob.logprob, named) | {"top_logprobs": top}


def _one(token: int, logprob: float, named: Named) -> dict[str, Any]:
    name, text = named(token)
    found = None if text is None else list(text)
    return {"token": name, "logprob": _finite(logprob), "bytes": found}


def _by_name(top: Sequence[tuple[int, float]], named: Named) -> dict[str, float]:
    """By the token's name; of two tokens with one name the likelier."""
    out: dict[str, float] = {}
    for token, logprob in top:
        out.setdefault(_legacy(token, named), _finite(logprob))
    return out


def _legacy(token: int, named: Named) -> str:
    """The name, or "bytes:" and what a token has that is no whole character."""
    name, text = named(token)
    return name if text is None or text == name.encode() else f"bytes:{name}"


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
