"""The objects that answer /v1/chat/completions and /v1/completions, whole or in pieces."""

from collections.abc import Sequence
from typing import Any

from experiments.common.answer import Answer
from experiments.serve.asked import Asked
from experiments.serve.logprobs import logprobs_of
from experiments.serve.tools import Turn
from subspec_jax import __version__
from subspec_jax.requests import Told, Update


def usage(answers: Sequence[Answer], asked: Asked) -> dict[str, Any]:
    """Tokens of all answers; a prompt with several answers counts once."""
    prompts = [a for i, a in enumerate(answers) if i % asked.n == 0]
    prompt, completion = sum(len(a.request.prompt) for a in prompts), sum(a.tokens for a in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached for a in prompts)},
    }


class Wire:
    """The objects of one HTTP request's answer, by OpenAI's names."""

    def __init__(self, asked: Asked, id: str, created: int, model: str, tokenizer: Any):
        self.asked, self._tokenizer = asked, tokenizer
        self._form = asked.form(tokenizer)
        self._turns: dict[int, Turn] = {}
        self._chat = asked.kind == "chat"
        self._head = {"id": id, "created": created, "model": model}
        self._head["system_fingerprint"] = f"thimble-jax-{__version__}"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for i, a in enumerate(answers):
            message, finish = {"role": "assistant", "content": a.text, "refusal": None}, a.finish
            if self._form is not None:
                content, calls, finish = self._turn(i).read(a.text, finish)
                message["content"] = content or (None if calls else "")
                message |= {"tool_calls": list(calls.values())} if calls else {}
            body = {"message": message} if self._chat else {"text": a.text}
            logprobs = self._logprobs(a.logprobs)
            choice = {"index": i, **body, "logprobs": logprobs, "finish_reason": finish}
            choices.append(choice | {"thimble": a.speeds()})
        kind = "chat.completion" if self._chat else "text_completion"
        end = {"choices": choices, "usage": usage(answers, self.asked)}
        return {"object": kind, **self._head, **end}

    def first(self, index: int) -> dict[str, Any]:
        """The piece that a streamed chat message begins with."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, answer: Answer, update: Update) -> dict[str, Any]:
        """The piece of one round."""
        body, finish = {"content": update.text} if self._chat else update.text, update.finish
        if self._form is not None:
            content, calls, finish = self._turn(index).read(update.text, finish)
            body = {"content": content} if content or not calls else {}
            deltas = [{"index": n, **call} for n, call in calls.items()]
            body |= {"tool_calls": deltas} if deltas else {}
        chunk = self._chunk(index, body, finish, self._logprobs(update.logprobs))
        parts = [list(part) for part in update.parts]
        return chunk | {"thimble": answer.speeds() | {"parts": parts}}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last piece, where it is asked for."""
        return self._outer([]) | {"usage": usage(answers, self.asked)}

    def _chunk(self, index: int, body: Any, finish: str | None, logprobs: Any) -> dict[str, Any]:
        body = {"delta": body} if self._chat else {"text": body}
        return self._outer(
            [{"index": index, **body, "logprobs": logprobs, "finish_reason": finish}]
        )

    def _turn(self, index: int) -> Turn:
        if index not in self._turns:
            self._turns[index] = Turn(self._form, self.asked.tools)
        return self._turns[index]

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        return logprobs_of(self.asked.kind, told, self._tokenizer.token)

    def _outer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {"object": kind, **self._head, "choices": choices}
        return chunk | {"usage": None} if self.asked.include_usage else chunk
