"""Writes a model as 4-bit substitutes and the residuals that complete them exactly, once.

    python -m experiments.convert --model qwen2.5-7b --to ~/models/qwen2.5-7b-split
    python -m experiments.speculative --model qwen2.5-7b --stream residual --converted <that folder>

The folder is mapped into memory when it is used: the next start reads it and quantizes nothing, and
host memory holds about half of the 16-bit weights. An interrupted conversion goes on where it was;
every weight is decoded and compared before its layer's file appears.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llm_jax import registry
from llm_jax.checkpoint import CheckpointError, open_checkpoint
from llm_jax.config import ConfigError
from subspec_jax.offload import streamed_bytes
from subspec_jax.residual.convert import convert
from subspec_jax.residual.files import ResidualError

ITERATIONS = {"hqq": 20, "nearest": 0}


@dataclasses.dataclass(frozen=True)
class Convert:
    """What to convert, how, and where to."""

    to: Path
    """The folder; one that was begun with the same settings is gone on with."""
    model: str = "smollm2-135m"
    checkpoint: Path | None = None
    """A local folder with safetensors, or a GGUF file, in place of the registered source."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    draft_bits: Literal[2, 3, 4, 8] = 4
    draft_group: int = 64
    quantizer: Literal["hqq", "nearest"] = "hqq"
    code: Literal["levels", "planes"] = "levels"
    """levels: 7.5 to 7.7 bits a weight; planes: 9.1, easier to decode."""
    workers: int = 4
    """Matrices that are encoded at a time."""


def main(args: Convert, console: Console) -> None:
    path = registry.find_checkpoint(
        args.model, args.checkpoint, progress=lambda m: console.print(m, style="dim")
    )
    checkpoint = open_checkpoint(path)
    cfg = checkpoint.config(args.dtype)
    columns = (TextColumn("Converting layers"), BarColumn(), MofNCompleteColumn())
    options = dict(console=console, transient=True, disable=not console.is_terminal)
    with Progress(*columns, TimeElapsedColumn(), **options) as progress:
        task = progress.add_task("", total=cfg.layers)
        iterations = ITERATIONS[args.quantizer]
        quantizer = args.draft_bits, args.draft_group, iterations, args.code
        report = lambda done, total: progress.update(task, completed=done)
        model = convert(checkpoint, cfg, args.to, *quantizer, report, args.workers)
    streamed = sum(map(streamed_bytes, model.model.layers))
    weights = cfg.layers * cfg.layer_matrix_elements
    console.print(
        f"{args.to}: {cfg.layers} layers, {8 * streamed / weights:.2f} bits a weight to stream "
        f"({streamed / 1e9:.2f} GB a pass in place of {2 * weights / 1e9:.2f} GB), exact",
        highlight=False,
        soft_wrap=True,
    )


def cli() -> int:
    args = tyro.cli(Convert, description=__doc__)
    try:
        main(args, Console())
    except (CheckpointError, ConfigError, ResidualError, ValueError, OSError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("\ninterrupted; the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
