"""Lossless speculative decoding of a model that does not fit in the memory it is given.

    python -m experiments.speculative
    python -m experiments.speculative --model qwen2.5-7b --memory-limit 8GB --benchmark mt-bench
    python -m experiments.speculative --model qwen2.5-7b --weights random --memory-limit 8GB \\
        --replay-acceptance published
    python -m experiments.speculative --palu FOLDER     (from experiments.palu --save FOLDER)

Without flags: SmolLM2-135M on built-in prompts, with a memory limit that forces three quarters of
its layers to stream. `README.md` has the numbers these commands printed.
"""

import dataclasses
import logging
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console

from experiments.speculative import benchmarks, methods, report, settings
from experiments.speculative.runner import Run
from llm_jax.checkpoint import CheckpointError
from llm_jax.config import ConfigError
from palu_jax.store import StoreError
from subspec_jax.decoder import LengthError
from subspec_jax.plan import PlanError
from subspec_jax.residual.files import ResidualError

USER_ERRORS = (
    benchmarks.BenchmarkError,
    methods.MethodError,
    report.RecordError,
    CheckpointError,
    ConfigError,
    LengthError,
    PlanError,
    ResidualError,
    StoreError,
)


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Decode prompts speculatively, and the same prompts with other methods, and compare."""

    model: str = "smollm2-135m"
    """A registered name, such as qwen2.5-7b, llama-3.1-8b, qwen3-8b, mistral-7b, smollm2-135m."""
    checkpoint: Path | None = None
    """A local folder with safetensors, or a GGUF file, in place of the registered source."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """random: no checkpoint, only the architecture, for timing (see --replay-acceptance)."""
    palu: Path | None = None
    """A folder that experiments.palu --save wrote: the model with a low-rank, quantized KV cache.
    Its own tokens are decoded, exactly."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU, float16 on GPUs without bfloat16 (T4)."""
    stream: Literal["raw", "residual"] = "raw"
    """residual: of a streamed layer only what its substitute lacks is moved, about half the bytes,
    and the exact weights are put together on the device. Resident layers keep their residuals."""
    converted: Path | None = None
    """Folder of the converted model for --stream residual (see experiments.convert); made there if
    it is missing."""
    verify_weights: bool = False
    """Compare the converted model's weights with their checksums when they are loaded."""
    memory_limit: str = "auto"
    """Device memory, such as 8GB (1 GB is 2**30 bytes); enforced on a GPU, planned for on a CPU.
    auto: the card's; where the whole model fits, a limit that holds a quarter of its layers.
    full: the card's, whatever fits."""
    method: methods.Name = "subspec"
    """The method whose text is shown."""
    compare: tuple[methods.Name, ...] = ("chain", "ngram", "vanilla")
    """Methods decoded on the same prompts for the table; pass nothing behind it for none."""
    draft_bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight of the substitutes."""
    draft_group: int = 64
    """Weights that share a step and an offset."""
    draft_head_bits: Literal[2, 3, 4, 8] | None = None
    """Bits of an output head of the draft's own; the target's is shared if not given. With --stream
    residual and as many bits as --draft-bits, an untied head is kept as a substitute and a residual
    too, from which the exact one is put together once a pass: less memory than the head alone."""
    quantizer: Literal["hqq", "nearest"] = "hqq"
    draft_model: str | None = None
    """The small model of the method classic."""
    draft_checkpoint: Path | None = None
    tree: Literal["beam", "best-first", "chain"] = "beam"
    depth: int | Literal["auto"] | None = None
    """Levels of the tree; 48 on a GPU, 8 on a CPU, where verifying many tokens takes long. auto:
    the number up to that which the first rounds' times and acceptance promise most of."""
    width: int | Literal["auto"] | None = None
    """Nodes added a step; 6 on a GPU, 2 on a CPU. auto: chosen like the depth."""
    budget: int | None = None
    """Nodes of a best-first tree; depth x width if not given."""
    sharpen: float = 0.2
    """Temperature of the draft's probabilities when nodes are ranked."""
    stop_gain: str = "0"
    """Stop drafting where the chance of another accepted token, learned from the draft's scores in
    finished rounds, falls below this; auto: the break-even point from the measured times."""
    post_speculation: int = 0
    """Steps drafted below the tree while it is being verified (subspec-post: 8 if 0 here)."""
    ngram: int = 3
    """Longest n-gram that prompt lookup matches."""
    lookup: int = 0
    """Most tokens, copied from where the last n-gram stood before, that a step of the draft tries
    below its best node (subspec-lookup: 16 if 0 here)."""
    resident: int | None = None
    """Layers to keep on the device; as many as fit if not given."""
    ahead: int = 1
    """Layers on their way while one is in use."""
    table_on_host: bool | None = None
    """Keep an untied embedding table in host memory; whatever streams less if not given."""
    benchmark: benchmarks.BenchmarkName = "builtin"
    data_dir: Path | None = None
    """Folder with benchmark data; without it they come from the hub or tensorflow-datasets."""
    samples: int = 3
    max_new_tokens: int = 64
    max_length: int = 2048
    """Most tokens of a conversation; the KV cache is made for it."""
    chunk: int = 512
    """Prompt tokens of one prefill pass; every pass streams all offloaded layers."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    gate: Literal["entropy", "probability"] = "entropy"
    """How subspec-lossy decides that a mismatch may pass."""
    gate_threshold: float = 0.3
    gate_window: int = 6
    check_lossless: bool = False
    """Decode again the plain way and compare token by token."""
    replay_acceptance: str | None = None
    """Accept draft tokens as a trace says, right or wrong, to time the engine on random weights:
    published, or a records.jsonl of an earlier run."""
    predict: Literal["auto", "yes", "no"] = "auto"
    """Time one layer of each kind before the model is loaded, and predict what a round takes; auto:
    on a GPU."""
    output: Path | None = None
    """Folder for records, table and plots; the same folder resumes an interrupted run."""
    show: bool = True
    """Show the text as it is generated."""


def main(args: Speculative, console: Console) -> int:
    settings.check_settings(args)  # before a checkpoint is fetched
    checkpoint, cfg = settings.model_config(args, console)
    setups = settings.chosen_methods(args, cfg, checkpoint)
    source = settings.converted(args, cfg, checkpoint, console)
    limit, pool = settings.memory_limit(args, cfg, setups, console, source)
    plans = {s.name: settings.make_plan(args, cfg, s, limit, source=source) for s in setups}
    samples = benchmarks.load_conversations(args.benchmark, args.data_dir, args.samples, args.seed)
    run = Run(args, console, cfg, setups, plans, output_folder(args))
    run.open(checkpoint, source, limit, pool)
    run.decode(samples)
    run.report()
    return 0


def output_folder(args) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = args.output or Path("runs") / f"speculative-{args.model}-{args.benchmark}-{stamp}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise report.RecordError(f"the folder {folder} cannot be made: {error.strerror}") from error
    return folder


def cli() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = tyro.cli(Speculative, description=__doc__)
    console = Console()
    if not console.is_terminal:  # 80 columns would cut the table
        console = Console(width=max(110, console.width))
    try:
        return main(args, console)
    except USER_ERRORS as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        Console(stderr=True).print(
            "error: the device ran out of memory, which the plan should have prevented; set a "
            f"lower --resident or a higher --memory-limit, and please report this: {error}",
            style="red", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("\ninterrupted; the same command with the same --output resumes")
        return 130


if __name__ == "__main__":
    sys.exit(cli())
