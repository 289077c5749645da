"""Low-rank, quantized KV caches: calibrate, choose ranks, convert, and measure the loss.

    python -m experiments.palu
    python -m experiments.palu --evaluation wikitext2 --calibration wikitext2 --context 2048 \\
        --tokens 8192 --preset paper --data-dir DATA
    python -m experiments.palu --keep 0.7 --bits 4 --save FOLDER

Without flags: SmolLM2-135M on the documentation that CPython carries, in a few configurations and
with some rivals. The last command stores a converted model, which
`experiments.speculative --palu FOLDER` decodes. `docs/palu.md` has the numbers.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.common.cli import run
from experiments.palu.flags import Palu, check
from experiments.palu.run import PaluRun, output_folder
from llm_jax.extras import need
from llm_jax.files import check_writable, locked


def main(args: Palu, console: Console) -> int:
    """Runs the command; returns its exit status, 0."""
    check(args)
    folder = output_folder(args)
    if args.save is not None:
        need("orbax.checkpoint", "palu", "--save")
        check_writable(args.save.expanduser().absolute().parent)
    with locked(folder):
        check_writable(folder)
        session = PaluRun(args, console, folder)
        console.print(f"Results go to {folder}", style="dim", highlight=False)
        session.open()
        session.measure()
        session.report()
        if args.generate is not None:
            session.continue_text()
    return 0


def cli(words: Sequence[str] | None = None) -> int:
    """The exit status of the command with these words, or with those of the command line."""
    return run(Palu, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
