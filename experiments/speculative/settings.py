"""From the command's settings to what runs: model, methods, limit, plans. Starts no device."""

import contextlib
import dataclasses
import functools
import itertools
import math
import subprocess
import sys

from experiments import convert
from experiments.speculative import methods
from llm_jax import registry
from llm_jax.checkpoint import open_checkpoint
from llm_jax.params import abstract
from llm_jax.sample import Sampler
from pallas_kernels.device import switched_off
from palu_jax import store
from subspec_jax import offload, plan
from subspec_jax.accept import Gate
from subspec_jax.decoder import LengthError
from subspec_jax.residual import convert as residual_convert
from subspec_jax.residual.files import Converted
from subspec_jax.residual.split import gaussian_room, split_head_shapes, split_shapes
from subspec_jax.tree import TreeSpec

FROM_TEXT = ("ngram", "subspec-lookup")
"""Methods whose drafts depend on the text, so that they cannot be replayed."""


@contextlib.contextmanager
def refusals():
    """Turns the ValueErrors of settings' own types into an error for the user."""
    try:
        yield
    except ValueError as error:
        raise methods.MethodError(str(error)) from error


def check_settings(args) -> None:
    """Raises the error of the first setting that cannot be."""
    if args.samples < 1 or args.max_new_tokens < 1:
        raise LengthError("--samples and --max-new-tokens must be at least 1")
    if args.max_new_tokens >= args.max_length:
        raise LengthError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in "
            f"--max-length {args.max_length}"
        )
    for name, least in (("ngram", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise methods.MethodError(
                f"--{name} is {getattr(args, name)}; expected {least} or more"
            )
    if args.replay_acceptance and args.check_lossless:
        raise methods.MethodError("a replayed run's text means nothing; it cannot be checked")
    if args.replay_acceptance and (args.method in FROM_TEXT or args.lookup):
        which = args.method if args.method in FROM_TEXT else "--lookup"
        raise methods.MethodError(
            f"a replayed run's text means nothing; {which} drafts from the text"
        )
    if args.stream == "residual":
        if args.palu is not None:
            raise methods.MethodError(
                "residuals are of plain layers; drop --palu or take --stream raw"
            )
        if args.dtype == "float32":
            raise methods.MethodError(
                "residuals are of 16-bit weights; drop --dtype float32 or take --stream raw"
            )
    elif args.converted is not None or args.verify_weights:
        raise methods.MethodError("--converted and --verify-weights need --stream residual")
    if args.replay_acceptance and "auto" in (args.depth, args.width):
        raise methods.MethodError(
            "a replayed run accepts what its trace says, whatever the tree: give --depth and "
            "--width numbers"
        )
    with refusals():
        sampler(args), tree(args), gate(args), stop_gain(args)


def sampler(args) -> Sampler:
    return Sampler(args.temperature, args.top_k, args.top_p, args.min_p)


def tree(args) -> TreeSpec:
    depth, width = (8, 2) if offload.card_bytes() is None else (48, 6)
    return TreeSpec(
        kind=args.tree,
        depth=depth if args.depth in (None, "auto") else args.depth,
        width=width if args.width in (None, "auto") else args.width,
        budget=args.budget,
        sharpen=args.sharpen,
        extra=args.post_speculation,
        lookup=args.lookup,
    )


def gate(args) -> Gate:
    return Gate(args.gate, args.gate_threshold, args.gate_window)


def stop_gain(args) -> float | str:
    if args.stop_gain == "auto":
        return "auto"
    with contextlib.suppress(ValueError):
        if 0 <= (gain := float(args.stop_gain)) < math.inf:
            return gain
    raise ValueError(f"--stop-gain is {args.stop_gain!r}; expected auto or a number from 0 on")


def model_config(args, console):
    """(checkpoint or None, Config). Nothing is placed yet."""
    card = offload.card_bytes()
    wanted = args.dtype
    if wanted == "auto":
        on_cpu = "bfloat16" if args.stream == "residual" else "float32"
        wanted = on_cpu if card is None else offload.card_dtype()
    if args.weights == "random":
        if args.checkpoint is not None:
            raise methods.MethodError("--weights random needs no --checkpoint; drop one of them")
        if args.palu is not None:
            raise methods.MethodError("--palu was made from a checkpoint; drop --weights random")
        return None, dataclasses.replace(registry.find_model(args.model).config, dtype=wanted)
    path = registry.find_checkpoint(
        args.model, args.checkpoint, progress=lambda m: console.print(m, style="dim")
    )
    checkpoint = open_checkpoint(path)
    if args.palu is not None:
        checkpoint = store.PaluCheckpoint(checkpoint, store.describe(args.palu))
    cfg = checkpoint.config(wanted)
    checkpoint.check(cfg)
    if args.max_length > cfg.max_length:
        raise LengthError(
            f"--max-length {args.max_length} is more than the {cfg.max_length} positions this "
            "model was made for (its sliding window, where it has one)"
        )
    return checkpoint, cfg


def chosen_methods(args, cfg, checkpoint) -> list[methods.Method]:
    """The methods to run, in order: the main one first, or vanilla where the others are checked."""
    draft_model = None
    if args.draft_model is not None or args.draft_checkpoint is not None:
        draft_model = draft_config(args, cfg, checkpoint)
    draft = plan.Draft(args.draft_bits, args.draft_group, args.draft_head_bits)
    names = list(dict.fromkeys((args.method, *args.compare)))
    if args.replay_acceptance:
        names = [n for n in names if n not in FROM_TEXT]
    if args.check_lossless:
        names = ["vanilla"] + [n for n in names if n != "vanilla"]
    post_steps = args.post_speculation or 8
    rest = (draft, gate(args), stop_gain(args), draft_model, post_steps, args.ngram)
    with refusals():
        found = [methods.make_method(name, tree(args), *rest) for name in names]
    if args.replay_acceptance:
        if any(method.spec.extra for method in found):
            raise methods.MethodError(
                "drafting during verification cannot be replayed: whether it helps depends on the "
                "tokens; drop --post-speculation and subspec-post"
            )
        for method in found:
            methods.acceptance_trace(args.replay_acceptance, method, args.seed)
    return found


def draft_config(args, cfg, checkpoint):
    """The Config of the small draft model, which must share the target's vocabulary."""
    if args.weights == "random":
        if args.draft_model is None:
            raise methods.MethodError("--weights random takes --draft-model, no --draft-checkpoint")
        found = dataclasses.replace(registry.find_model(args.draft_model).config, dtype=cfg.dtype)
        same = True
    else:
        small = open_checkpoint(registry.find_checkpoint(args.draft_model, args.draft_checkpoint))
        found = small.config(cfg.dtype)
        small.check(found)
        text = "Speculation: 2 tokenizers, één vocabulary?\n"
        same = small.tokenizer().encode(text) == checkpoint.tokenizer().encode(text)
    if found.vocab > cfg.vocab or not same:
        raise methods.MethodError(
            f"the draft model has a vocabulary of {found.vocab} and the model one of {cfg.vocab}"
            + ("" if same else ", and they cut text into different tokens")
            + "; speculation needs the same tokens, so take a smaller model of the same family"
        )
    return found


def converted(args, cfg, checkpoint, console) -> Converted | None:
    """The model as substitutes and residuals, converted first if need be; None if it is not wanted.

    Another process converts: this one must not touch the device before its limit is set.
    """
    if args.stream != "residual" or checkpoint is None:
        return None
    kind = f"{args.draft_bits}x{args.draft_group}-{args.quantizer}-{cfg.dtype}"
    folder = args.converted or registry.cache_folder() / "converted" / f"{args.model}-{kind}"
    folder = folder.expanduser()
    if args.converted is None and args.checkpoint is not None:
        raise methods.MethodError(
            "--stream residual with --checkpoint needs --converted FOLDER: where the converted "
            "model is, or is to be written"
        )
    iterations = convert.ITERATIONS[args.quantizer]
    quantizer = args.draft_bits, args.draft_group, iterations
    if not residual_convert.is_complete(folder, cfg):
        console.print(f"Converting to {folder}, once …", style="dim", highlight=False)
        flags = dict(
            to=folder,
            model=args.model,
            checkpoint=args.checkpoint,
            dtype=cfg.dtype,
            draft_bits=args.draft_bits,
            draft_group=args.draft_group,
            quantizer=args.quantizer,
        )
        given = [(f"--{k.replace('_', '-')}", str(v)) for k, v in flags.items() if v is not None]
        command = [sys.executable, "-m", "experiments.convert", *itertools.chain(*given)]
        if subprocess.run(command).returncode:
            raise methods.MethodError("the conversion failed; its message is above")
    return residual_convert.convert(checkpoint, cfg, folder, *quantizer)


def target_shapes(args, cfg, method, source: Converted | None):
    """The target as shapes and dtypes: plain layers, low-rank ones, or residuals."""
    if args.stream == "residual" and method.draft.bits is not None:
        # As many bits as the layers: then the substitute of a head in two parts is the low-bit one.
        split = method.draft.head_bits == method.draft.bits
        if source is None:
            return residual_shapes(cfg, method.draft, split)
        return source.model_with_split_head if split else source.model
    return plain_shapes(args.palu, cfg)


@functools.cache
def plain_shapes(palu, cfg):
    """`palu` is the folder of a stored conversion or None."""
    plain = abstract(cfg)
    return plain if palu is None else store.abstract_layers(store.describe(palu), plain, cfg)


@functools.cache
def residual_shapes(cfg, draft, split_head):
    """Of random weights, whose residuals are known to take so much."""
    kind = cfg, draft.bits, draft.group
    room = gaussian_room(*kind)
    model = dataclasses.replace(abstract(cfg), layers=(split_shapes(*kind, room),) * cfg.layers)
    if not split_head or "head" not in room:
        return model
    return dataclasses.replace(model, head_DV=split_head_shapes(*kind, room["head"]))


def make_plan(
    args, cfg, method, limit, resident=None, table_on_host=None, source=None
) -> plan.Plan:
    return plan.make_plan(
        cfg,
        limit,
        method.spec,
        method.draft,
        max_length=args.max_length,
        chunk=args.chunk,
        ahead=args.ahead,
        resident=args.resident if resident is None else resident,
        table_on_host=args.table_on_host if table_on_host is None else table_on_host,
        model=target_shapes(args, cfg, method, source),
        kernels=offload.card_has_kernels() and not switched_off() and cfg.dtype == "bfloat16",
    )


TRIALS = 2**29
"""Added to the pool of an emulated limit: the compiler times candidate kernels on buffers of its
own, which for a model as small as SmolLM2 outweigh the model."""


def memory_limit(args, cfg, setups, console, source=None) -> tuple[int, int | None]:
    """(bytes to plan with, bytes of the pool enforced on a GPU or None). Before JAX starts."""
    card = offload.card_bytes()
    if offload.card_is_idle():
        console.print(
            "There is an NVIDIA card here, but this JAX is for CPUs: pip install -e '.[cuda]'",
            style="yellow",
        )
    whole = 2**60 if card is None else card - offload.CONTEXT_BYTES
    slack = 0
    if args.memory_limit == "full":
        limit = whole
    elif args.memory_limit != "auto":
        limit = plan.parse_bytes(args.memory_limit)
    else:
        limit = whole
        with contextlib.suppress(plan.PlanError):
            fits = all(make_plan(args, cfg, s, whole, source=source).streamed == 0 for s in setups)
            if fits and args.resident is None:
                # An untied table may go to the host, which a plan would use for more layers.
                rest = (2**60, cfg.layers // 4, None if cfg.tied else True)
                quarter = (make_plan(args, cfg, s, *rest, source) for s in setups)
                limit = round(max(part.total for part in quarter) / 0.975)
                console.print(
                    f"The whole model fits here. A limit of {plan.show_bytes(limit)} is emulated, "
                    "so that most layers stream; --memory-limit full uses what there is.",
                    style="dim",
                )
                slack = TRIALS
    pool = offload.enforce_limit(limit + slack)
    return (limit if pool is None else min(limit, pool)), pool
