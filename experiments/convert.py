"""Writes a model once as low-bit substitutes, and the residuals that complete them exactly.

    python -m experiments.convert --model qwen2.5-7b --to ~/models/qwen2.5-7b-split
    python -m experiments.speculative --model qwen2.5-7b --stream residual --converted <that folder>

When the folder is used, it is mapped into memory: the next start quantizes nothing, and residuals
take about half of the host memory that the 16-bit weights would. An interrupted conversion
continues where it stopped. Every weight is decoded and compared before its layer's file appears.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from experiments.common.cli import run
from llm_jax import registry
from llm_jax.config import DTYPES, Config
from llm_jax.progress import bar
from subspec_jax.offload import streamed_bytes
from subspec_jax.residual.convert import check_convertible, convert
from subspec_jax.residual.stacks import split_fields
from subspec_jax.sources import ITERATIONS


@dataclasses.dataclass(frozen=True)
class Convert:
    """What to convert, how, and where to."""

    to: Path
    """The folder to write. One that was begun with the same settings is continued."""
    model: str = "smollm2-135m"
    checkpoint: Path | None = None
    """A local folder with safetensors, or a GGUF file, in place of the registered source."""
    adapter: Path | None = None
    """A folder with a LoRA adapter (adapter_config.json, adapter_model.safetensors) to merge in."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    draft_bits: Literal[2, 3, 4, 8] = 4
    draft_group: int = 64
    quantizer: Literal["hqq", "nearest"] = "hqq"
    code: Literal["levels", "planes"] = "levels"
    """levels: 7.5 to 7.7 bits a weight; planes: 9.1 bits, but easier to decode (not of experts)."""
    workers: int = 4
    """Matrices that are encoded at the same time."""


def main(args: Convert, console: Console) -> None:
    say = lambda line: console.print(line, style="dim", highlight=False, soft_wrap=True)
    path = registry.find_checkpoint(args.model, args.checkpoint, progress=say)
    checkpoint = registry.open_model(path, args.adapter, say)
    cfg = checkpoint.config(args.dtype)
    check_convertible(checkpoint, cfg, args.draft_bits, args.draft_group, args.code)
    for line in checkpoint.notices(cfg):
        say(line)
    quantizer = args.draft_bits, args.draft_group, ITERATIONS[args.quantizer], args.code
    with bar(console, "Converting layers", cfg.layers) as progress:
        report = lambda done, total: progress(done)
        model = convert(checkpoint, cfg, args.to, *quantizer, report, args.workers)
    streamed = sum(map(streamed_bytes, model.model.layers))
    weights = split_weights(cfg)
    what = "a pass" if cfg.experts is None else "for all experts"
    console.print(
        f"{args.to}: {cfg.layers} layers, {8 * streamed / weights:.2f} bits a weight to stream "
        f"({streamed / 1e9:.2f} GB {what} in place of {weights * DTYPES[cfg.dtype] / 1e9:.2f} GB), "
        "exact",
        highlight=False,
        soft_wrap=True,
    )


def split_weights(cfg: Config) -> int:
    """The number of weights that are in two parts, without the output head."""
    layers = range(cfg.layers)
    names = ((cfg.layer_shapes(i), name) for i in layers for name in split_fields(cfg, i))
    return sum(math.prod(shapes[name]) for shapes, name in names)


def cli(words: Sequence[str] | None = None) -> int:
    return run(Convert, main, __doc__, words, again="the same command continues")


if __name__ == "__main__":
    sys.exit(cli())
