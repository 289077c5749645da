"""Times the turns of a chat, with the prefix cache and without it.

    python -m experiments.measure.turns --model smollm2-135m --memory-limit 450MB

A system message of a page, then a question in each turn. Each turn's prompt is the whole
conversation so far. With the cache, only what is new is computed; without it, everything. Each line
of the output is one turn: passes and seconds to its first token.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.cli import run
from experiments.serve.model import ModelFlags, name_of, open_engine
from llm_jax.progress import default_reporter
from llm_jax.sample import Sampler
from subspec_jax.engine import Engine
from subspec_jax.prefix_cache import Rows, Text

TEXTS = Path(__file__).parents[1] / "speculative/texts.jsonl"
QUESTIONS = ("What is the page about?", "Say the same in one sentence.", "Which word matters most?")


@dataclasses.dataclass(frozen=True)
class ChatTurns(ModelFlags):
    """Time the turns of a chat."""

    new_tokens: int = 48
    """The most tokens of each answer."""
    output: Path = Path("turns.jsonl")
    """File that lines are added to."""


def main(args: ChatTurns, console: Console) -> int:
    texts = [json.loads(line)["turns"][0] for line in TEXTS.read_text().splitlines()]
    page = "\n\n".join(texts)
    with open_engine(args, default_reporter(), Sampler()) as engine:
        lines = [line for cached in (False, True) for line in chat(engine, args, page, cached)]
    table = Table(title=f"{name_of(args.model)} in {args.memory_limit}")
    for name in ("cache", "turn", "prompt", "cached", "passes", "first token, s", "GB streamed"):
        table.add_column(name, justify="right")
    for line in lines:
        records.append(args.output, line)
        table.add_row(
            "on" if line["cache"] else "off",
            str(line["turn"]),
            str(line["prompt_tokens"]),
            str(line["cached_tokens"]),
            str(line["passes"]),
            f"{line['first_token_s']:.2f}",
            f"{line['streamed_bytes'] / 1e9:.2f}",
        )
    console.print(table)
    return 0


def chat(engine: Engine, args: ChatTurns, page: str, cached: bool) -> list[dict[str, Any]]:
    """A line for each turn; programs are compiled by a chat before, which is not told."""
    engine.start()
    decoder, tokenizer = engine.batch(), engine.tokenizer
    for _again in range(2):
        decoder.rows = Rows(len(decoder.rows.users), decoder.rows.rewinds)
        messages, lines = [{"role": "system", "content": page}], []
        for turn, question in enumerate(QUESTIONS, 1):
            if not cached:
                decoder.rows = Rows(len(decoder.rows.users), decoder.rows.rewinds)
            messages.append({"role": "user", "content": question})
            text = Text(tokenizer.chat(messages), args.new_tokens, eos=engine.eos)
            began, passes, streamed = time.perf_counter(), 0, 0
            decoder.join(text)
            while not text.new:
                [(_, result)] = decoder.step()
                passes, streamed = passes + 1, streamed + result.streamed_bytes
            first = time.perf_counter() - began
            while not text.done:
                decoder.step()
            reply = [t for t in text.new if t not in engine.eos]
            messages.append({"role": "assistant", "content": tokenizer.decode(reply)})
            lines.append(
                dict(
                    model=name_of(args.model),
                    memory_limit=args.memory_limit,
                    cache=cached,
                    turn=turn,
                    prompt_tokens=len(text.prompt),
                    cached_tokens=text.cached,
                    passes=passes,
                    first_token_s=first,
                    streamed_bytes=streamed,
                    device=engine.device,
                    environment=records.environment(),
                )
            )
    return lines


def cli(words: Sequence[str] | None = None) -> int:
    return run(ChatTurns, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
