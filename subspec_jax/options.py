"""What an engine is besides its model, its memory and its method."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from llm_jax.config import Config
from llm_jax.sample import Sampler
from subspec_jax import memory
from subspec_jax.draft_model import INT8, Draft
from subspec_jax.sources import Dtype, Quantizer
from subspec_jax.tree import PassShape, TreeSpec

Exact = Literal["float32", "bitwise"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of an engine that hold for all of its methods."""

    sampler: Sampler = Sampler()
    max_length: int | None = None
    """Most tokens of a conversation; the KV cache is made for it. None: 2048, or a half or a
    quarter of that where the memory does not hold more."""
    texts: int = 1
    """Most texts that are decoded together (`Engine.batch`); each has a KV cache of its own."""
    ladder: tuple[int, ...] = ()
    """The numbers of texts that programs are made for; none: 1, 2, 4, 8 … and `texts`. With (1,)
    an engine for one text has the programs of `Engine.batch`, too."""
    seed: int = 0
    dtype: Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU, float16 on GPUs without bfloat16 (T4)."""
    exact: Exact = "float32"
    """How plain decoding's text is promised. float32: with numbers of 32 bits; with 16, sums over
    trees round otherwise, which shows where two tokens nearly tie. bitwise: with 16 bits too, every
    lossless method writes it, because all run the same program (`subspec_jax.bitwise`)."""
    shape: PassShape | None = None
    """Of all methods' passes, where `exact` is bitwise; set by `subspec_jax.open`."""
    stream: Literal["raw", "residual"] = "raw"
    """residual: only the part of a streamed layer that its substitute lacks is copied, about half
    of the bytes; the device computes the exact weights from both. Converts the model once."""
    experts: Literal["routed", "all"] = "routed"
    """Which experts a pass brings to the device: those that its tokens are routed to, or all."""
    host_limit: int | None = None
    """Bytes of host memory for layers that are not on the device; those beyond it are on disk.
    None: what the machine has; on one without a GPU none, so that all layers that are not resident
    are on disk, unless they are random or cannot be there (`tiers.why_not_on_disk`)."""
    disk_folder: Path | None = None
    """Folder for layers on disk, with `stream` raw or random weights; None: in the cache."""
    zipf: float = 0.0
    """Random weights only: routers prefer some experts, as a law of Zipf with this exponent."""
    converted: Path | None = None
    """Folder of the converted model; None: in the cache."""
    devices: int | None = None
    """Devices that share the model (`llm_jax.cards`), each with the memory limit; None: all GPUs of
    this machine, or one where the model cannot be shared or there are none."""
    check_files: bool = True
    """Compare the files of a converted model with their checksums while they are loaded."""
    verify_weights: bool = False
    """Also decode all weights of a converted model, and compare them with those it was made of."""
    quantizer: Quantizer = "hqq"
    weights: Literal["checkpoint", "random"] = "checkpoint"
    chunk: int = 512
    """Prompt tokens of one prefill pass; every pass streams all offloaded layers."""
    resident: int | None = None
    """Layers to keep on the device; None: as many as fit."""
    ahead: int = 1
    """Layers that are being copied while one is in use."""
    table_on_host: bool | None = None
    """Keep an untied embedding table in host memory; None: what streams fewer bytes."""
    replay: bool = False
    """Rounds accept what a trace says, right or wrong, to time the engine; the text means nothing.
    """


def default_draft(cfg: Config, residual: bool = False) -> Draft:
    """The substitutes for this machine: 4 bits in groups of 64 on a GPU; on a CPU int8 matrices,
    unless residuals or experts are streamed."""
    on_cpu = memory.card_bytes() is None
    return INT8 if on_cpu and not residual and cfg.experts is None else Draft()


def default_tree(from_disk: bool = False, **changes: Any) -> TreeSpec:
    """The tree for this machine: 48 levels of 6 nodes on a GPU; on a CPU, where verifying many
    tokens takes long, 8 of 2, or 16 of 2 where passes take long because they read layers
    `from_disk`."""
    on_cpu = 16 if from_disk else 8, 2
    depth, width = on_cpu if memory.card_bytes() is None else (48, 6)
    return TreeSpec(**{"depth": depth, "width": width} | changes)


def reads_disk(limit: str | int, options: Options) -> bool:
    """Whether an engine with this memory limit probably reads layers from disk in every pass,
    before its plan is known: on a CPU all but the whole model in memory does."""
    by_itself = options.host_limit is None and options.weights == "checkpoint"
    return limit != "full" and by_itself and options.stream == "raw"
