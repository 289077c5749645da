"""Lossless speculative decoding of a model that does not fit in the memory it is given.

    python -m experiments.speculative
    python -m experiments.speculative --model qwen2.5-7b --memory-limit 8GB --benchmark mt-bench
    python -m experiments.speculative --model qwen2.5-7b --weights random --memory-limit 8GB \\
        --replay-acceptance published
    python -m experiments.speculative --palu FOLDER     (from experiments.palu --save FOLDER)

Without flags: SmolLM2-135M on built-in prompts, with a memory limit that forces three quarters of
its layers to stream. `docs/speculative.md` has the numbers these commands printed.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.common import cli as command_line
from experiments.speculative import benchmarks
from experiments.speculative.flags import Speculative, opened
from experiments.speculative.run import Run, output_folder
from llm_jax.files import check_writable, locked
from llm_jax.progress import ConsoleReporter


def main(args: Speculative, console: Console) -> int:
    with opened(args, ConsoleReporter(console)) as engine:
        samples = benchmarks.load_conversations(
            args.benchmark, args.data_dir, args.samples, args.seed
        )
        folder = output_folder(args)
        with locked(folder):
            check_writable(folder)
            run = Run(args, console, engine, folder)
            run.prepare()
            run.decode(samples)
            run.report()
    return 0


def cli(words: Sequence[str] | None = None) -> int:
    return command_line.run(Speculative, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
