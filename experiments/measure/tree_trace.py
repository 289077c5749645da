"""Records draft trees at every position of the target's answers, a trace to judge stop rules with.

    python -m experiments.measure.tree_trace trace.jsonl \\
        --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data-dir ../shared/data

Each tree has the full depth. The greedily decoded text tells which part of it the target would
accept, so no tree is verified. `experiments.measure.trees trace.jsonl --stop-rules` then replays
any rule, round by round, exactly. On two busy CPU cores sixteen trees took 52 to 100 seconds.
`experiments/results/cpu_smollm2_trees.jsonl` has 48 trees of each of four MT-Bench answers.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.common.cli import run
from experiments.common.unfinished import Unfinished
from experiments.speculative import benchmarks
from llm_jax import registry
from llm_jax.cache import empty_caches
from llm_jax.config import Config
from llm_jax.digest import json_digest
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate, prefill
from llm_jax.params import Params
from llm_jax.sample import Sampler
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.reference import dequantized
from subspec_jax.draft import Drafting, extend
from subspec_jax.draft_model import substitute
from subspec_jax.load import load_target
from subspec_jax.plan import make_plan
from subspec_jax.tree import Tree, TreeSpec, cache_slots, commit, path_to, seedling, step_gains


@dataclasses.dataclass(frozen=True)
class TreeTrace:
    """Record draft trees for every position of the target's answers."""

    output: tyro.conf.Positional[Path]
    model: str = "smollm2-135m"
    checkpoint: Path | None = None
    dtype: str = "float32"
    benchmark: tuple[str, ...] = ("mt-bench",)
    data_dir: Path | None = None
    samples: int = 4
    """Conversations of each benchmark."""
    seed: int = 0
    tokens: int = 96
    """Tokens of each answer. The last `depth` of them have no tree: they judge the trees before."""
    max_length: int = 416
    depth: int = 48
    width: int = 6
    sharpen: float = 0.2
    draft_bits: int = 4
    draft_group: int = 64
    batch: int = 16
    """Trees that grow at the same time."""
    minutes: float = 14.0
    """After this time no new batch begins."""


def main(args: TreeTrace, console: Console) -> int:
    began = time.monotonic()
    spec = TreeSpec("beam", args.depth, args.width, sharpen=args.sharpen)
    checkpoint = open_checkpoint(registry.find_checkpoint(args.model, args.checkpoint))
    cfg, tokenizer = checkpoint.config(args.dtype), checkpoint.tokenizer()
    whole = make_plan(cfg, 2**60, spec, max_length=args.max_length, resident=cfg.layers)
    params = load_target(checkpoint, whole).params
    draft = substitute(params, args.draft_bits, args.draft_group)
    # Dense again: the same numbers, and on a CPU several times as fast.
    dense = lambda w: dequantized(w, jnp.dtype(args.dtype)) if isinstance(w, Packed) else w
    draft = jax.tree.map(dense, draft, is_leaf=lambda w: isinstance(w, Packed))
    slots = cache_slots(args.max_length, spec)
    grow = tree_grower(draft, cfg, spec)
    aside = dict(output=None, checkpoint=None, data_dir=None, benchmark=(), samples=0, minutes=0.0)
    flags = dataclasses.asdict(dataclasses.replace(args, **aside))
    samples = [
        (name, sample) for name in args.benchmark
        for sample in benchmarks.load_conversations(name, args.data_dir, args.samples, args.seed)
    ]  # fmt: skip
    with Unfinished(args.output, [flags, checkpoint.identity()]) as work:
        for name, sample in samples:
            key = f"{name} {sample.id} {json_digest(sample.turns)}"
            if before := work.found(key):
                work.publish(args.output, key, before[0])
                console.print(f"{name} {sample.id}: done before", style="dim", highlight=False)
                continue
            prompt = sample.prompt(tokenizer)
            if len(prompt) + args.tokens > args.max_length:
                continue
            answer = [int(t) for t in generate(params, prompt, cfg, args.tokens)]
            ends = [i + 1 for i, t in enumerate(answer) if t in tokenizer.eos]
            answer = answer[: min(ends, default=len(answer))]
            text = [*prompt, *answer]
            _, caches = prefill(params, prompt + answer, empty_caches(cfg, 1, slots), cfg)
            rounds = []
            for first in range(len(prompt), len(text) - args.depth, args.batch):
                if time.monotonic() - began > 60 * args.minutes:
                    break
                ats = np.arange(first, first + args.batch)
                for at, tree in zip(ats.tolist(), grow(caches, text, ats)):
                    if at < len(text) - args.depth:
                        rounds.append(judged(tree, text[at + 1 :], spec))
                console.print(f"{name} {sample.id}: {len(rounds)} trees", highlight=False)
            if rounds:
                columns = {column: [r[column] for r in rounds] for column in rounds[0]}
                about = {"method": "subspec", "benchmark": name, "sample": sample.id, "turn": 0}
                about |= {"every_position": True, "model": args.model}
                work.publish(args.output, key, about | {"rounds": columns})
    return 0


def tree_grower(draft: Params, cfg: Config, spec: TreeSpec) -> Callable[..., list[Tree]]:
    """f(caches, text, ats) -> a list of trees in NumPy, with their roots at the positions `ats`.

    The caches hold the whole text; a tree's mask hides what comes after its root.
    """
    fixed = dict(cfg=cfg, spec=spec, sampler=Sampler())
    one = lambda tree, caches, at, draft: extend(
        Drafting(draft, tree, caches, at, jax.random.key(0), **fixed)
    )
    step = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None)), donate_argnums=(0, 1))
    last = jax.jit(jax.vmap(lambda tree: commit(tree, spec)))

    def grow(caches, text, ats):
        tokens = jnp.asarray([text[min(at, len(text) - 1)] for at in ats], jnp.int32)
        trees = jax.vmap(lambda token: seedling(token, spec))(tokens)
        caches = jax.tree.map(lambda a: jnp.repeat(a[None], len(ats), 0), caches)
        for _ in range(spec.depth):
            trees, caches = step(trees, caches, jnp.asarray(ats, jnp.int32), draft)
        trees = jax.device_get(last(trees))
        return [jax.tree.map(lambda a, i=i: a[i], trees) for i in range(len(ats))]

    return grow


def judged(tree: Tree, following: Sequence[int], spec: TreeSpec) -> dict[str, Any]:
    """The columns of a `Round` for a tree, given the tokens the target writes after its root."""
    here = 0
    for token in following[: spec.depth]:
        child = np.flatnonzero((tree.parent_E == here) & (tree.token_E == token))
        if not len(child):
            break
        here = int(child[0])
    path = path_to(here, tree.parent_E)
    return {
        "accepted": len(path),
        "drafted": int((tree.parent_E >= 0).sum()),
        "depth": int(tree.depth_E.max()),
        "path": path,
        "gains": [round(gain, 5) for gain in step_gains(tree.score_E, spec.width)],
    }


def cli(words: Sequence[str] | None = None) -> int:
    return run(TreeTrace, main, __doc__, words, again="the same command with the same file goes on")


if __name__ == "__main__":
    sys.exit(cli())
