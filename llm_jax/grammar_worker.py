"""Compiles a grammar on trial, in a process of its own, which `llm_jax.grammar` starts.

A grammar comes with a request. llguidance bounds most of its work itself, but not all: some
hundred patterns that all hold together took minutes and 20 GB. So the system ends this process
where a grammar takes too long, and grants it no more memory than the limit. What passes here is
compiled once more by whoever asked, at the same small cost.

The first line is the tokenizer; each further one is a request, and gets a line as its reply.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

MEMORY = 1 << 29
"""Bytes that this process may have for grammars, beyond what the tokenizer needs."""
LIMITS = dict(max_lexer_states=50_000, verbose_errors=False)
"""States take up to 2 kB each; 250,000 of them, llguidance's own limit, would be half a GB."""


class _Bytes:
    """What llguidance asks of a tokenizer whose tokens are the bytes."""

    tokens = (*(bytes([i]) for i in range(256)), b"\xff<eos>")
    special_token_ids, eos_token_id, bos_token_id = (256,), 256, None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def tokens_of(described: str | None, eos: list[int]) -> Any:
    """The `LLTokenizer` of a tokenizer.json, or of bytes; `eos` are the tokens that end a text."""
    import llguidance

    given = llguidance.TokenizerWrapper(_Bytes()) if described is None else described
    return llguidance.LLTokenizer(given, eos_token=eos)


def matcher_of(tokens: Any, kind: str, text: str, lenient: bool) -> Any:
    """The `LLMatcher` of a grammar; raises ValueError with what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json":
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"lenient": lenient})
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        grammar = LLMatcher.grammar_from_lark(text)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    if wrong := trial.get_error():
        nothing = wrong.startswith("NoExtension")
        raise ValueError("no text follows this grammar" if nothing else wrong)
    return matcher


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    tokens = tokens_of(**json.loads(sys.stdin.readline()))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    granted = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = pages * resource.getpagesize() + MEMORY
    limit = limit if granted == resource.RLIM_INFINITY else min(limit, granted)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        request = json.loads(line)
        # The processor's time, so that a busy machine does not count.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = {}
        try:
            matcher_of(tokens, **request["grammar"])
        except Exception as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
