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
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.common import records
from experiments.common.cli import run
from experiments.palu.flags import Palu
from experiments.palu.run import PaluRun
from palu_jax import StoreError


def main(args: Palu, console: Console) -> int:
    """Runs the command; returns its exit status, 0."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = args.output or Path("runs") / f"palu-{args.model}-{args.evaluation}-{stamp}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise records.RecordError(
            f"the folder {folder} cannot be made: {error.strerror}"
        ) from error
    if args.save is not None and args.save.expanduser().exists():
        raise StoreError(f"{args.save} exists; choose another folder or remove it")
    if args.tokens < 0 or args.calibration_tokens < 2 or args.batch < 1:
        raise records.RecordError("--tokens, --calibration-tokens and --batch cannot be negative")
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
