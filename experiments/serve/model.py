"""The flags that say which model is talked to, and how it is decoded; and the engine they open."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.common.cli import UserError
from experiments.speculative.flags import Speculative, opened
from llm_jax.progress import Reporter
from llm_jax.sample import Sampler
from subspec_jax.engine import Engine
from subspec_jax.methods import MethodName
from subspec_jax.options import Exact
from subspec_jax.sources import Dtype, Quantizer
from subspec_jax.tree import ladder


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """A model within a memory limit. All of these are flags of experiments.speculative too."""

    model: str = "smollm2-135m"
    """A registered name (--list-models), a local folder with safetensors, or a GGUF file."""
    adapter: Path | None = None
    """A folder with a LoRA adapter that is merged into the model."""
    palu: Path | None = None
    """A folder that experiments.palu --save wrote: the model with a low-rank KV cache."""
    memory_limit: str = "auto"
    """Device memory, such as 8GB; enforced on a GPU. On a CPU, layers beyond it are read from disk
    in every pass. auto: the card's; where the whole model fits, a limit that holds a quarter of its
    layers. full: what there is."""
    host_limit: str = "auto"
    """Host memory for layers that are not on the device; those beyond it are read from disk in
    every pass. auto: what the machine has; without a GPU none. full: all are in memory."""
    disk_folder: Path | None = None
    """Folder for layers on disk, written once; in the cache if not given."""
    dtype: Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU, float16 on GPUs without bfloat16 (T4)."""
    exact: Exact = "float32"
    """In which numbers every lossless method writes plain decoding's very tokens. bitwise: in 16
    bits too; then one answer at a time is decoded, and no cache is kept."""
    stream: Literal["raw", "residual"] = "raw"
    """residual: of a streamed layer only what its substitute lacks is moved."""
    converted: Path | None = None
    """Folder of the converted model for --stream residual (see experiments.convert)."""
    method: MethodName = "subspec"
    """How tokens are proposed; vanilla: not at all."""
    draft_bits: Literal[2, 3, 4, 8] | None = None
    """Bits a weight of the substitutes. If neither these nor a group are given: 4 in groups of 64;
    on a CPU 8 with one scale for each output, unless residuals or experts are streamed."""
    draft_group: int | None = None
    """Weights that share a step and an offset; 64 if not given. 0: one scale for each output, with
    8 bits, which a CPU multiplies as whole numbers."""
    quantizer: Quantizer = "hqq"
    """hqq, or nearest: round to nearest, quicker and less exact."""
    draft_model: str | None = None
    """The small model of the method classic."""
    depth: int | Literal["auto"] | None = None
    """Levels of the draft tree; 48 on a GPU, 8 on a CPU or 16 if layers are read from disk, and
    fewer for many answers together. auto: for each number of answers the number up to that which
    timing a layer promises most of."""
    width: int | None = None
    """Nodes added a step; 6 on a GPU, 2 on a CPU."""
    resident: int | None = None
    """Layers to keep on the device; as many as fit if not given."""
    devices: int | None = None
    """Devices that share the model, each with its part of every layer; all GPUs of this machine if
    not given, or one where the model cannot be shared."""
    max_length: int | None = None
    """Most tokens of a conversation; the KV cache is made for it. If not given: 2048, or a half or
    a quarter of that where the memory holds no more."""
    chunk: int = 512
    """Prompt tokens of one prefill pass; every pass streams all offloaded layers."""
    parallel: int | None = None
    """Answers that are decoded together and share every pass; each has a KV cache of its own, from
    which a later prompt with the same beginning goes on. If not given: 4 for a server and 1 for the
    shell; methods that cannot do this decode one answer after another, and keep no cache."""


MOST_PARALLEL = 256
ALONE = ("subspec-post",)
"""Methods for one text alone; `subspec_jax.batch.why_not_together` says why."""


def path_of(model: str) -> Path | None:
    """The folder or file that a model is named by, or None where it is a registered name."""
    path = Path(model).expanduser()
    return path if path.exists() else None


def name_of(model: str) -> str:
    """What the model is called in answers: its registered name, or that of its file."""
    path = path_of(model)
    return model if path is None else path.resolve().name.removesuffix(".gguf")


def open_engine(
    flags: ModelFlags, reporter: Reporter, sampler: Sampler, parallel: int = 1
) -> Engine:
    """The engine that the flags ask for, planned and not loaded.

    `sampler` is the usual one, and `parallel` the number of answers together where no flag says it.
    """
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(ModelFlags)}
    asked = given.pop("parallel")
    if asked is not None and not 1 <= asked <= MOST_PARALLEL:
        raise UserError(f"--parallel is {asked}; expected 1 to {MOST_PARALLEL}")
    if shorten := flags.max_length is None:
        del given["max_length"]
    given |= dataclasses.asdict(sampler)
    args = Speculative(checkpoint=path_of(flags.model), compare=(), max_new_tokens=1, **given)
    texts = asked or parallel
    bitwise = flags.exact == "bitwise"
    alone = flags.method in ALONE or bitwise
    if alone and asked is not None and asked > 1:
        which = "--exact bitwise" if bitwise else f"--method {flags.method}"
        raise UserError(f"{which} decodes one answer at a time; leave --parallel out")
    together = {} if alone else dict(texts=texts, ladder=ladder(texts))
    engine = opened(args, reporter, shorten, **together)
    if flags.depth == "auto" and (found := engine.choose_levels()):
        shapes = (f"{n}: {levels} ({rate:.1f} tokens/s)" for n, (levels, rate) in found.items())
        reporter.say(f"Levels of trees by answers together, as predicted: {', '.join(shapes)}")
    return engine


def warm_up(engine: Engine) -> None:
    """Loads, and compiles before anybody waits: on a GPU for every length, on a CPU for a short
    text and its answer."""
    engine.start()
    prompt = engine.tokenizer.chat([{"role": "user", "content": "Hello"}])
    room = engine.options.max_length - len(prompt)
    on_gpu = engine.device["platform"] == "gpu"
    if on_gpu or not engine.plan.ladder:
        engine.warm_up(prompt, room if on_gpu else min(8, room))
    else:  # for one answer; programs for more are made when there are more
        engine.generate(prompt, min(4, room))
