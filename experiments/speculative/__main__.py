"""Lossless speculative decoding of a model that does not fit in the memory it is given.

    python -m experiments.speculative
    python -m experiments.speculative --model qwen2.5-7b --memory-limit 8GB --benchmark mt-bench
    python -m experiments.speculative --model qwen2.5-7b --weights random --memory-limit 8GB \\
        --replay-acceptance published
    python -m experiments.speculative --prompt "What is a thimble?" --compare vanilla
    python -m experiments.speculative --palu FOLDER     (from experiments.palu --save FOLDER)

Without flags: SmolLM2-135M on built-in prompts, with a memory limit that forces three quarters of
its layers to stream. `docs/speculative.md` has the numbers these commands printed.
"""

import dataclasses
import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.common import cli as command_line
from experiments.common.cli import UserError
from experiments.speculative import benchmarks
from experiments.speculative.benchmarks import Conversation
from experiments.speculative.flags import Speculative, opened
from experiments.speculative.run import Run, output_folder
from llm_jax.files import check_writable, locked
from llm_jax.progress import ConsoleReporter


def main(args: Speculative, console: Console) -> int:
    with opened(args, ConsoleReporter(console)) as engine:
        samples = conversations(args)
        folder = output_folder(args)
        with locked(folder):
            check_writable(folder)
            run = Run(args, console, engine, folder)
            run.prepare()
            run.decode(samples)
            run.report()
    return 0


def conversations(args: Speculative) -> list[Conversation]:
    """The prompt of the flags, or the benchmark's conversations."""
    if args.prompt is None:
        how = args.benchmark, args.data_dir, args.samples, args.seed
        found = benchmarks.load_conversations(*how)
    else:
        found = [Conversation("prompt", "prompt", (_prompt(args.prompt),))]
    return [dataclasses.replace(c, system=args.system) for c in found]


def _prompt(given: str) -> str:
    """The text; where it is "-", that of standard input."""
    text = given
    if given == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is no UTF-8: {error}") from error
    if not text.strip():
        raise UserError("the prompt is empty; give --prompt a text, or - and text at the input")
    return text.strip()


def cli(words: Sequence[str] | None = None) -> int:
    return command_line.run(Speculative, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
