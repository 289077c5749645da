"""Panoptic driving perception: train in stages, evaluate, predict.

    python -m experiments.qyolop                                # generated scenes, in minutes
    python -m experiments.qyolop train --data camvid apollo --data-dir DATA --size 384 640
    python -m experiments.qyolop evaluate --run FOLDER --data camvid --data-dir DATA
    python -m experiments.qyolop quantize --run FOLDER --sensitivity
    python -m experiments.qyolop export --run FOLDER --format onnx
    python -m experiments.qyolop benchmark --run FOLDER
    python -m experiments.qyolop predict --run FOLDER --input IMAGE, FOLDER or VIDEO

Without a subcommand it trains: a network of quarter width learns objects, drivable lanes and typed
lines from drawn scenes, and leaves panels of labels beside predictions to look at.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.common.cli import fail, run
from llm_jax.extras import MissingPackage

try:
    from experiments.qyolop.benchmark import BenchmarkNetwork, benchmark_command
    from experiments.qyolop.deploy import Quantize, quantize_command
    from experiments.qyolop.evaluate import Evaluate, evaluate_command
    from experiments.qyolop.exporting import Export, export_command
    from experiments.qyolop.predict import Predict, predict_command
    from experiments.qyolop.train import Train, train_command
except MissingPackage as error:  # the network's own packages, which only this command needs
    fail(str(error))
    sys.exit(2)

SUBCOMMANDS: dict[type, Callable[[Any, Console], int]] = {
    Train: train_command,
    Evaluate: evaluate_command,
    Quantize: quantize_command,
    Export: export_command,
    BenchmarkNetwork: benchmark_command,
    Predict: predict_command,
}
Subcommand = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[BenchmarkNetwork, tyro.conf.subcommand("benchmark")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
)


AGAIN = (
    "what is written stays; the same command with the same --output goes on (`export`, `predict` "
    "of a video, and `evaluate` and `benchmark` without --output, begin anew)"
)


@dataclasses.dataclass(frozen=True)
class Command:
    """The words of a command line; no words mean `train`."""

    command: Annotated[Subcommand, tyro.conf.arg(name="", help="Without one: train.")] = (
        dataclasses.field(default_factory=Train)
    )


def main(args: Any, console: Console) -> int:
    """Runs a subcommand: an instance of one of the classes in `SUBCOMMANDS`."""
    return SUBCOMMANDS[type(args)](args, console)


def cli(words: Sequence[str] | None = None) -> int:
    """The exit status of a command line."""
    command = lambda flags, console: main(flags.command, console)
    return run(Command, command, __doc__, words, 130, AGAIN)


if __name__ == "__main__":
    sys.exit(cli())
