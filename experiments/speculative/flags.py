"""The flags of `experiments.speculative`, and the engine that they ask for."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from experiments.speculative import replay
from experiments.speculative.benchmarks import BenchmarkName
from llm_jax.progress import Reporter
from llm_jax.registry import find_checkpoint, open_model
from llm_jax.sample import Sampler
from palu_jax import store
from subspec_jax import opening, options
from subspec_jax.accept import Gate
from subspec_jax.decoder import LengthError
from subspec_jax.draft_model import Draft
from subspec_jax.engine import Engine
from subspec_jax.methods import Method, MethodError, MethodName
from subspec_jax.options import Exact
from subspec_jax.sources import Dtype, Quantizer
from subspec_jax.tree import TreeSpec

FROM_TEXT = ("ngram", "subspec-lookup")
"""Methods whose drafts depend on the text, so that they cannot be replayed."""


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Decode prompts speculatively, and the same prompts with other methods, and compare."""

    model: str = "smollm2-135m"
    """A registered name, such as qwen2.5-7b, llama-3.1-8b, qwen3-8b, mistral-7b, smollm2-135m."""
    checkpoint: Path | None = None
    """A local folder with safetensors, or a GGUF file, in place of the registered source."""
    adapter: Path | None = None
    """A folder with a LoRA adapter (adapter_config.json, adapter_model.safetensors) that is merged
    into the model. As --checkpoint, such a folder brings the model that it was trained on."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """random: no checkpoint, only the architecture, for timing (see --replay-acceptance)."""
    palu: Path | None = None
    """A folder that experiments.palu --save wrote: the model with a low-rank, quantized KV cache.
    Its own tokens are decoded, exactly."""
    dtype: Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU, float16 on GPUs without bfloat16 (T4)."""
    exact: Exact = "float32"
    """In which numbers every lossless method writes plain decoding's very tokens. bitwise: in 16
    bits too; all passes then have the rows of the largest tree."""
    stream: Literal["raw", "residual"] = "raw"
    """residual: of a streamed layer only what its substitute lacks is moved, about half the bytes,
    and the exact weights are put together on the device. Resident layers keep their residuals."""
    converted: Path | None = None
    """Folder of the converted model for --stream residual (see experiments.convert); made there if
    it is missing."""
    check_files: bool = True
    """Compare the files of a converted model or of --palu with their checksums when they are
    loaded."""
    verify_weights: bool = False
    """Also decode the converted model's weights and compare them with those it was made of."""
    memory_limit: str = "auto"
    """Device memory, such as 8GB (1 GB is 2**30 bytes); enforced on a GPU. On a CPU it is memory
    for weights and caches; layers beyond it are read from disk in every pass.
    auto: the card's; where the whole model fits, a limit that holds a quarter of its layers.
    full: what there is, whatever fits."""
    host_limit: str = "auto"
    """Host memory for layers that are not on the device, such as 4GB; those beyond it are read from
    disk in every pass. auto: what the machine has; without a GPU none. full: all are in memory."""
    disk_folder: Path | None = None
    """Folder for layers on disk, written once; in the cache if not given. With --stream residual
    they are in the converted model."""
    method: MethodName = "subspec"
    """The method whose text is shown."""
    compare: tuple[MethodName, ...] = ("chain", "ngram", "vanilla")
    """Methods decoded on the same prompts for the table; pass nothing behind it for none."""
    draft_bits: Literal[2, 3, 4, 8] | None = None
    """Bits a weight of the substitutes. If neither these nor a group are given: 4 in groups of 64;
    on a CPU 8 with one scale for each output, unless residuals or experts are streamed."""
    draft_group: int | None = None
    """Weights that share a step and an offset; 64 if not given. 0: one scale for each output, with
    8 bits, which a CPU multiplies as whole numbers."""
    draft_head_bits: Literal[2, 3, 4, 8] | None = None
    """Bits of an output head of the draft's own; the target's is shared if not given. With --stream
    residual and as many bits as --draft-bits, an untied head is kept as a substitute and a residual
    too, from which the exact one is put together once a pass: less memory than the head alone."""
    quantizer: Quantizer = "hqq"
    """hqq, or nearest: round to nearest, quicker and less exact."""
    experts: Literal["routed", "all"] = "routed"
    """Of a model with experts, what a pass brings to the device: those that its tokens are routed
    to, while the ones that are asked for most stay there; or all of them."""
    draft_experts: int | None = None
    """Experts that the draft routes a token to; as many as the target if not given."""
    zipf: float = 0.0
    """Random weights only: routers prefer some experts, as a law of Zipf with this exponent."""
    draft_model: str | None = None
    """The small model of the method classic."""
    draft_checkpoint: Path | None = None
    """A local folder or GGUF file for the small model."""
    tree: Literal["beam", "best-first", "chain"] = "beam"
    """How the draft tree grows."""
    depth: int | Literal["auto"] | None = None
    """Levels of the tree; 48 on a GPU; on a CPU, where verifying many tokens takes long, 8, or 16
    if layers are read from disk. auto: the number up to that which the first rounds' times and
    acceptance promise most of."""
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
    devices: int | None = None
    """Devices that share the model: each has --memory-limit, streams its part of every layer over
    its own link, and computes with it. All GPUs of this machine if not given, or one where the
    model cannot be shared."""
    table_on_host: bool | None = None
    """Keep an untied embedding table in host memory; whatever streams less if not given."""
    benchmark: BenchmarkName = "builtin"
    """Prompts. builtin: questions; texts: beginnings for a base model to continue, without a chat
    template. Both need nothing; the others come from --data-dir or the network."""
    prompt: str | None = None
    """A question of your own in place of a benchmark's; -: standard input."""
    system: str | None = None
    """What the model is told before each conversation."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""
    data_dir: Path | None = None
    """Folder with benchmark data; without it they come from the hub or tensorflow-datasets."""
    samples: int = 3
    """Conversations to decode."""
    max_new_tokens: int = 64
    """Tokens of an answer, at most."""
    max_length: int = 2048
    """Most tokens of a conversation; the KV cache is made for it."""
    chunk: int = 512
    """Prompt tokens of one prefill pass; every pass streams all offloaded layers."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens of this probability; 1: all."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the likeliest; 0: all."""
    seed: int = 0
    """Of sampling, of random weights, and of which samples are taken."""
    gate: Literal["entropy", "probability"] = "entropy"
    """How subspec-lossy decides that a mismatch may pass."""
    gate_threshold: float = 0.3
    """The gate is open below this entropy, or from this probability on."""
    gate_window: int = 6
    """Matches that must follow a mismatch."""
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


@contextlib.contextmanager
def refusals():
    """Turns the ValueErrors of settings' own types into an error for the user."""
    try:
        yield
    except ValueError as error:
        raise MethodError(str(error)) from error


def check(args: Speculative) -> None:
    """Raises the error of the first flag that is wrong, before anything is fetched."""
    if args.samples < 1 or args.max_new_tokens < 1:
        raise LengthError("--samples and --max-new-tokens must be at least 1")
    if args.max_new_tokens >= args.max_length:
        raise LengthError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in "
            f"--max-length {args.max_length}"
        )
    for name, least, most in (("ngram", 1, 64), ("seed", 0, 2**32 - 1)):
        if not least <= getattr(args, name) <= most:
            raise MethodError(f"--{name} is {getattr(args, name)}; expected {least} to {most}")
    if args.draft_experts is not None and args.draft_experts < 1:
        raise MethodError(f"--draft-experts is {args.draft_experts}; expected at least 1")
    if not 0 <= args.zipf <= 10:
        raise MethodError(f"--zipf is {args.zipf}; expected a number from 0 to 10")
    if args.zipf and args.weights != "random":
        raise MethodError("--zipf needs --weights random; a checkpoint has its own routers")
    if not all(args.stop):
        raise MethodError("--stop has an empty text, which would end every answer at once")
    if args.prompt is not None and args.benchmark != "builtin":
        raise MethodError("--prompt takes the place of --benchmark; drop one of them")
    if args.system is not None and args.benchmark == "texts":
        raise MethodError("--benchmark texts has no conversations, which --system would begin")
    if args.replay_acceptance:
        _check_replay(args)
    if args.stream == "residual":
        if args.palu is not None:
            raise MethodError("residuals are of plain layers; drop --palu or take --stream raw")
        if args.dtype == "float32":
            raise MethodError(
                "residuals are of 16-bit weights; drop --dtype float32 or take --stream raw"
            )
    else:
        if args.converted is not None or args.verify_weights:
            raise MethodError("--converted and --verify-weights need --stream residual")
        if not args.check_files and args.palu is None:
            raise MethodError("--no-check-files needs --stream residual or --palu")
    if args.weights == "random":
        if args.checkpoint is not None:
            raise MethodError("--weights random needs no --checkpoint; drop one of them")
        if args.adapter is not None:
            raise MethodError("--adapter changes a checkpoint's weights; drop --weights random")
        if args.palu is not None:
            raise MethodError("--palu was made from a checkpoint; drop --weights random")
        if args.draft_checkpoint is not None:
            raise MethodError("--weights random takes --draft-model, no --draft-checkpoint")
    with refusals():
        _sampler(args), _tree(args), _gate(args), _stop_gain(args)


def _check_replay(args: Speculative) -> None:
    if args.stop:
        raise MethodError("a replayed run's text means nothing; drop --stop")
    if args.check_lossless:
        raise MethodError("a replayed run's text means nothing; it cannot be checked")
    if args.method in FROM_TEXT or args.lookup:
        which = args.method if args.method in FROM_TEXT else "--lookup"
        raise MethodError(f"a replayed run's text means nothing; {which} drafts from the text")
    if "auto" in (args.depth, args.width):
        raise MethodError(
            "a replayed run accepts what its trace says, whatever the tree: give --depth and "
            "--width numbers"
        )


def _sampler(args: Speculative) -> Sampler:
    return Sampler(args.temperature, args.top_k, args.top_p, args.min_p)


def _tree(args: Speculative) -> TreeSpec:
    given = {name: getattr(args, name) for name in ("depth", "width")}
    asked = args.memory_limit == "full" or args.host_limit != "auto" or args.palu is not None
    kind = options.Options(weights=args.weights, stream=args.stream)
    return options.default_tree(
        not asked and options.reads_disk(args.memory_limit, kind),
        kind=args.tree,
        budget=args.budget,
        sharpen=args.sharpen,
        extra=args.post_speculation,
        lookup=args.lookup,
        **{name: value for name, value in given.items() if value not in (None, "auto")},
    )


def _draft(args: Speculative) -> Draft | None:
    """The substitutes that were asked for; None: what suits the machine."""
    given = args.draft_bits, args.draft_group, args.draft_head_bits, args.draft_experts
    if all(value is None for value in given):
        return None
    group = 64 if args.draft_group is None else args.draft_group
    bits = args.draft_bits or (4 if group else 8)
    return Draft(bits, group, args.draft_head_bits, experts=args.draft_experts)


def _gate(args: Speculative) -> Gate:
    return Gate(args.gate, args.gate_threshold, args.gate_window)


def _stop_gain(args: Speculative) -> float | str:
    if args.stop_gain == "auto":
        return "auto"
    with contextlib.suppress(ValueError):
        if 0 <= (gain := float(args.stop_gain)) < math.inf:
            return gain
    raise ValueError(f"--stop-gain is {args.stop_gain!r}; expected auto or a number from 0 on")


def method_names(args: Speculative) -> list[str]:
    """The methods to run, in order: the main one first, or vanilla where the others are checked."""
    names = list(dict.fromkeys((args.method, *args.compare)))
    if args.replay_acceptance:
        names = [n for n in names if n not in FROM_TEXT]
    if args.check_lossless:
        names = ["vanilla"] + [n for n in names if n != "vanilla"]
    return names


def _check_traces(args: Speculative, methods: Iterable[Method]) -> None:
    """Raises MethodError for a method whose acceptance cannot be replayed."""
    if any(method.spec.extra for method in methods):
        raise MethodError(
            "drafting during verification cannot be replayed: whether it helps depends on the "
            "tokens; drop --post-speculation and subspec-post"
        )
    for method in methods:
        replay.acceptance_trace(args.replay_acceptance, method, args.seed)


def opened(args: Speculative, reporter: Reporter, shorten: bool = False, **more: Any) -> Engine:
    """The engine that the flags ask for, planned and not loaded.

    With `shorten`, conversations are as long as the memory allows, in place of --max-length. `more`
    are fields of `subspec_jax.Options` that have no flag.
    """
    check(args)
    model = args.model if args.checkpoint is None else args.checkpoint
    if args.palu is not None:
        path = find_checkpoint(args.model, args.checkpoint, progress=reporter.say)
        stored = store.describe(args.palu, args.check_files)
        base = open_model(path, args.adapter, reporter.say)
        model = store.PaluCheckpoint(base, stored, args.check_files)
    if args.stream == "residual" and args.checkpoint is not None and args.converted is None:
        raise MethodError(
            "--stream residual with --checkpoint needs --converted FOLDER: where the converted "
            "model is, or is to be written"
        )
    first, *others = method_names(args)
    found = opening.open(
        model,
        args.memory_limit,
        host=args.host_limit,
        method=first,
        also=others,
        tree=_tree(args),
        draft=_draft(args),
        gate=_gate(args),
        stop_gain=_stop_gain(args),
        longest=args.ngram,
        draft_model=args.draft_checkpoint or args.draft_model,
        adapter=args.adapter if args.palu is None else None,
        reporter=reporter,
        sampler=_sampler(args),
        dtype=args.dtype,
        exact=args.exact,
        stream=args.stream,
        converted=args.converted,
        disk_folder=args.disk_folder,
        check_files=args.check_files,
        verify_weights=args.verify_weights,
        quantizer=args.quantizer,
        weights=args.weights,
        max_length=None if shorten else args.max_length,
        chunk=args.chunk,
        seed=args.seed,
        resident=args.resident,
        ahead=args.ahead,
        devices=args.devices,
        table_on_host=args.table_on_host,
        experts=args.experts,
        zipf=args.zipf,
        replay=args.replay_acceptance is not None,
        **more,
    )
    if args.replay_acceptance:
        _check_traces(args, list(found.methods.values()))
    return found
