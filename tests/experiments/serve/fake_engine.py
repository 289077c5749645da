"""An engine without a model: it answers at once, or a round whenever a test lets it."""

import math
import threading
from types import SimpleNamespace

from llm_jax import chat_template
from llm_jax.tokenizer import ByteTokenizer
from subspec_jax.check import NotFiniteError
from subspec_jax.logprobs import Logprob
from subspec_jax.propose import Round

LONGEST = 2000


class FakeEngine:
    """Says what it was told, in capitals, then again and again until the tokens are used up.

    A prompt with the word "slow" gets a round for each `gate.release()`, one with "broken" fails in
    its third round. Rounds have four tokens, of which the draft proposed three.
    """

    def __init__(self, template=None):
        self.tokenizer = ByteTokenizer() if template is None else Templated(template)
        self.script = None
        """What it says, whatever it was told; None: that."""
        self.eos = self.tokenizer.eos
        self.cfg = SimpleNamespace(vocab=257)
        self.options = SimpleNamespace(max_length=LONGEST)
        self.plan = SimpleNamespace(
            streamed_bytes=10**9, resident=3, cfg=SimpleNamespace(layers=12), ladder=()
        )
        self.method = SimpleNamespace(name="subspec")
        self.device = {"platform": "cpu"}
        self.decoder = SimpleNamespace(sampler=None, logprobs=False)
        self.gate = threading.Semaphore(0)
        self.running = 0
        """Generators that were begun and not ended."""
        self.samplers = []

    def start(self):
        """Touches no device."""

    def rounds(self, prompt, new_tokens, seed, eos):
        text = said(self.tokenizer.decode(prompt))
        self.samplers.append((self.decoder.sampler, seed))
        reply = answer(text, new_tokens)
        if self.script is not None:
            reply = [*self.script.encode(), 256][:new_tokens]
        self.running += 1
        try:
            for n, at in enumerate(range(-3, len(reply), 4)):
                if "slow" in text:
                    assert self.gate.acquire(timeout=60), "no test let this round end"
                if "broken" in text and n == 2:
                    raise NotFiniteError("the model computes NaN")
                tokens = reply[max(at, 0) : at + 4]
                if tokens:
                    took = dict(verify_s=0.25, streamed_bytes=10**9)
                    told = map(logprob, tokens) if self.decoder.logprobs else ()
                    yield Round(tokens, accepted=3 if n else 0, logprobs=tuple(told), **took)
        finally:
            self.running -= 1


class Templated(ByteTokenizer):
    """Bytes, with a chat template; its special tokens are text."""

    def __init__(self, template):
        super().__init__()
        object.__setattr__(self, "source", template)

    def template(self, tools=False):
        return self.source

    def chat(self, messages, tools=None):
        return self.encode(chat_template.render(self.source, messages, {}, "a test", tools))


def logprob(token: int) -> Logprob:
    """The next bytes are likelier, each by one; byte 0 cannot be."""
    top = tuple(((token + 20 - i) % 256, -float(i)) for i in range(20))
    return Logprob(token, -20.0, (*top[:19], (0, -math.inf)))


def said(prompt: str) -> str:
    """The last thing that was said in a conversation."""
    return prompt.removesuffix("\nassistant:").rsplit(": ", 1)[-1]


def answer(said: str, new_tokens: int) -> list[int]:
    """The tokens of the reply: what was said, in capitals; "bye" ends a turn."""
    words = f"{said.upper()} "
    if "bye" in said:
        return [*words.encode(), 256][:new_tokens]
    return list((words * (new_tokens // len(words) + 1)).encode())[:new_tokens]
