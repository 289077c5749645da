"""The flags of `experiments.palu`, and the configurations that they ask for."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from experiments.common.cli import UserError
from experiments.palu.methods import (
    PLANNED,
    RIVALS,
    Bits,
    CacheMethod,
    Classes,
    Granularity,
    Rival,
    group_of,
)
from llm_jax.config import Config
from palu_jax.compression import Search
from palu_jax.convert import Objective


@dataclasses.dataclass(frozen=True)
class Palu:
    """Convert a model in several ways and measure each on text."""

    model: str = "smollm2-135m"
    """A registered name, such as smollm2-135m, qwen2.5-0.5b, llama-2-7b."""
    checkpoint: Path | None = None
    """A local folder with safetensors, or a GGUF file, in place of the registered source."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU, float16 on GPUs without bfloat16. Caches of 16
    bits take 2 bytes a number in any case."""
    data_dir: Path | None = None
    """Folder with corpora; without it they come from the hub."""
    calibration: str = "python"
    """Text to calibrate on: python, wikitext2, c4, book, or a file."""
    calibration_tokens: int = 8192
    """Tokens to calibrate on."""
    calibration_length: int = 512
    """Tokens of a calibration sequence."""
    evaluation: str = "python"
    """Text to score: the same choices as for calibration, but other parts of the text."""
    tokens: int = 4096
    """Tokens to score; 0 for all."""
    context: int = 1024
    """Tokens of a window."""
    batch: int = 1
    """Windows at a time."""
    preset: Literal["few", "none", "paper"] = "few"
    """few: some configurations, unless --keep, --budget or --rivals choose others. none: the dense
    model alone. paper: the grid of the paper, comparisons of objectives, rotation and searches, and
    the rivals."""
    keep: tuple[float, ...] = ()
    """Shares of the ranks to keep; 0.7 is Palu-30%."""
    bits: tuple[Bits, ...] = (4,)
    """Bits of a stored latent."""
    key_bits: Bits | None = None
    """Bits of keys, where they differ from --bits."""
    value_bits: Bits | None = None
    """Bits of values, where they differ from --bits."""
    granularity: tuple[Granularity, ...] = ("J",)
    """Which kv heads share latents. M: none. G: groups of --group-size. J: all."""
    group_size: int = 2
    """kv heads in a group of granularity G."""
    objective: tuple[Objective, ...] = ("gradient",)
    """What the factors minimize. plain: the weights' error. whitened: the outputs' error (Palu).
    aware: the error in scores and behind the output projection. gradient: the change of the
    loss."""
    search: tuple[Search, ...] = ("error",)
    """How ranks are chosen. uniform: the same share everywhere. fisher: one share a projection
    (Palu). fisher-group: one share a group. error: least predicted error over all layers."""
    split: tuple[float, float] = (1, 1)
    """R_k : R_v of the uniform search."""
    budget: tuple[float, ...] = ()
    """Cache bytes a token, of all layers (below 1: a share of the bfloat16 cache). Then group size,
    ranks and bits are chosen by predicted error."""
    classes: tuple[Classes, ...] = (1,)
    """With --budget: 2 lets the planner give the first latents of a group more bits than the rest,
    which pays below 3 bits; on a GPU XLA reads them. --slowest leaves one class."""
    slowest: float | None = None
    """With --budget: the most microseconds that the attention of one decode step may take in all
    layers, over --slowest-at tokens, by the cost model of the kernels (an H200)."""
    slowest_at: int = 65536
    """Tokens in the cache for --slowest."""
    rank_multiple: int = 4
    """Ranks are multiples of it; the kernels on a GPU want 16 or 32."""
    rotate: bool = True
    """Rotate latents by a Hadamard matrix before they are quantized."""
    mean_split: bool = False
    """Keep each token's coefficient of the mean direction apart, in 16 bits."""
    fuse_values: bool = False
    """Multiply the value factors into the output projection."""
    sinks: int = 0
    """Number of first tokens kept in 16 bits."""
    window: int = 0
    """Number of newest tokens kept in 16 bits."""
    rivals: tuple[Rival, ...] = ()
    """Quantized caches of ordinary keys and values, for comparison."""
    retrieval: int = 0
    """Number of key-value retrieval prompts to answer."""
    retrieval_pairs: int = 12
    """Pairs in a retrieval prompt."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks through lm-eval (pip install -e '.[eval]'): arc_easy, arc_challenge, piqa,
    winogrande, hellaswag, lambada_openai, … from --data-dir, or any that lm-eval knows."""
    task_limit: int = 0
    """Documents of each task; 0 for all."""
    task_batch: int = 8
    """Rows of a task at a time."""
    generate: str | None = None
    """A prompt to continue with the dense model and with the first configuration."""
    save: Path | None = None
    """Folder for the first converted configuration."""
    seed: int = 0
    """For the places of calibration text and the retrieval prompts."""
    output: Path | None = None
    """Folder for statistics, records, table and plot; the same folder resumes."""


class FlagError(UserError):
    """A flag's value that cannot be used; the message says what is possible."""


WHOLE = {
    # flag -> the least and the greatest value
    "calibration_tokens": (2, 10**8),
    "calibration_length": (2, 10**8),
    "tokens": (0, 10**9),
    "context": (2, 10**8),
    "batch": (1, 10**4),
    "group_size": (1, 10**4),
    "slowest_at": (1, 2**31 - 1),
    "rank_multiple": (1, 10**4),
    "sinks": (0, 2**31 - 1),
    "window": (0, 2**31 - 1),
    "retrieval": (0, 10**5),
    "retrieval_pairs": (1, 10**4),
    "task_limit": (0, 10**9),
    "task_batch": (1, 10**4),
    "seed": (0, 2**32 - 1),
}


def check(args: Palu) -> None:
    """Raises FlagError for values that no model can use; `methods_of` does the rest."""
    for name, (least, most) in WHOLE.items():
        if not least <= (value := getattr(args, name)) <= most:
            _refuse(name, value, f"a whole number from {least} to {most}")
    for name, kind in (
        ("bits", Bits),
        ("key_bits", Bits),
        ("value_bits", Bits),
        ("classes", Classes),
    ):
        given = getattr(args, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and value not in get_args(kind):
                _refuse(name, value, "one of " + ", ".join(map(str, get_args(kind))))
    for keep in args.keep:
        if not 0 < keep <= 1:
            _refuse("keep", keep, "shares above 0 and at most 1")
    for part in args.split:
        if not 0 < part < math.inf:
            _refuse("split", part, "two numbers above 0")
    for budget in args.budget:
        if not 0 < budget < math.inf:
            _refuse("budget", budget, "bytes a token, or a share below 1")
    if args.slowest is not None and not 0 < args.slowest < math.inf:
        _refuse("slowest", args.slowest, "microseconds above 0")
    for name in ("bits", "classes", "granularity", "objective", "search"):
        if not getattr(args, name):
            _refuse(name, "empty", "one value or more")
    if args.slowest is not None and not args.budget:
        raise FlagError("--slowest limits what --budget chooses; give a budget")
    if args.save is not None:
        if args.save.expanduser().exists():
            raise FlagError(f"--save: {args.save} exists; choose another folder or remove it")
        rivals_alone = args.preset == "few" and args.rivals
        if not (args.keep or args.budget) and (args.preset == "none" or rivals_alone):
            raise FlagError("--save stores the first conversion, and no flag asks for one: --keep")


def _refuse(name: str, value: object, expected: str) -> None:
    raise FlagError(f"--{name.replace('_', '-')} is {value}; expected {expected}")


def methods_of(args: Palu, cfg: Config) -> list[CacheMethod]:
    """The dense model first, then the configurations that the flags ask for.

    Raises ConvertError for flags that contradict the model.
    """
    group = lambda g: group_of(g, cfg, args.group_size)
    named = lambda **k: CacheMethod(
        "palu", group=group(k["granularity"]), multiple=args.rank_multiple, **k
    )
    chosen = [CacheMethod("dense")]
    planned = lambda budget, classes: CacheMethod(
        "palu", classes=classes, objective=args.objective[0], search=PLANNED, rotate=args.rotate,
        budget=budget * dense_bytes(cfg) if budget < 1 else budget, multiple=args.rank_multiple,
        slowest=None if args.slowest is None else args.slowest * 1e-6, context=args.slowest_at,
    )  # fmt: skip
    classes = args.classes if args.slowest is None else (1,)
    chosen += [planned(budget, n) for budget in args.budget for n in classes]
    if args.keep:
        common = dict(rotate=args.rotate, mean_split=args.mean_split, fuse_values=args.fuse_values,
                      sinks=args.sinks, window=args.window)  # fmt: skip
        for objective in args.objective:
            for granularity in args.granularity:
                for keep in args.keep:
                    for search in args.search:
                        for bits in args.bits:
                            chosen.append(named(
                                keep=keep, key_bits=args.key_bits or bits,
                                value_bits=args.value_bits or bits, granularity=granularity,
                                objective=objective, search=search,
                                split=args.split if search == "uniform" else (1, 1), **common,
                            ))  # fmt: skip
        return chosen + [CacheMethod(kind) for kind in args.rivals]
    if args.preset == "few" and not args.rivals and not args.budget:
        both = lambda keep, bits, **k: named(keep=keep, key_bits=bits, value_bits=bits, **k)
        paper = dict(granularity="J", objective="whitened")
        best = dict(granularity="J", objective="gradient", search="error")
        chosen += [both(0.7, bits, **paper) for bits in (16, 4)]
        chosen += [both(*c, **best) for c in ((0.7, 16), (0.5, 16), (0.7, 4), (0.7, 2))]
        chosen += [planned(0.27, n) for n in classes]
        return chosen + [CacheMethod(kind) for kind in ("int4", "int2")]
    if args.preset == "paper":
        chosen += _paper_grid(cfg, named)
    rivals = args.rivals or (RIVALS if args.preset == "paper" else ())
    return chosen + [CacheMethod(kind) for kind in rivals]


def _paper_grid(cfg, named) -> list[CacheMethod]:
    """The grid of the paper, then one change at a time. Methods that share decompositions are
    together."""
    sizes = ["J", "M"] + (["G"] if cfg.kv_heads > 2 else [])
    both = lambda keep, bits, **k: named(keep=keep, key_bits=bits, value_bits=bits, **k)
    found = []
    for g in sizes:
        paper = dict(granularity=g, objective="whitened")
        found += [both(keep, bits, **paper) for keep in (0.7, 0.5) for bits in (16, 4, 3, 2)]
        if g == "J":
            found += [both(0.7, bits, rotate=False, **paper) for bits in (4, 3, 2)]
            found += [both(0.7, 8, **paper), both(0.3, 16, **paper)]
    for objective in ("plain", "aware", "gradient"):
        for g in sizes[: 1 if objective == "plain" else None]:
            one = dict(granularity=g, objective=objective)
            found += [both(keep, 16, **one) for keep in (0.7, 0.5)]
            if g == "J" and objective != "plain":
                found += [both(0.7, bits, **one) for bits in (4, 2)]
            if g == "J" and objective == "gradient":
                found.append(both(0.5, 16, split=(1, 3), **one))
                found += [both(0.5, 16, search=s, **one) for s in ("fisher", "fisher-group")]
                for keep in (0.7, 0.5, 0.3):
                    found += [both(keep, bits, search="error", **one) for bits in (16, 4, 3, 2)]
                rest = dict(keep=0.7, search="error", **one)
                found.append(named(key_bits=4, value_bits=2, **rest))
                found += [named(key_bits=b, value_bits=b, sinks=4, **rest) for b in (4, 2)]
                found += [both(1.0, bits, **one) for bits in (4, 3, 2)]
    for objective in ("whitened", "gradient"):
        mean = dict(granularity="J", objective=objective, mean_split=True)
        found += [both(0.7, bits, **mean) for bits in (4, 2)]
    return found


def dense_bytes(cfg: Config) -> int:
    """Bytes a token of an ordinary bfloat16 cache, all layers."""
    return 2 * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim
