"""Choosing a run's tree from its first rounds: `--depth auto`, `--width auto`."""

import dataclasses

from experiments.speculative.methods import Method
from subspec_jax.decoder import Round
from subspec_jax.plan import NO_DRAFT
from subspec_jax.shape import best_shape, measured_costs

TOKENS = 128
"""Decoded with the largest tree before choosing; some 10 to 40 rounds."""


def is_free(args, method: Method) -> bool:
    """Whether the method's depth or width is to be chosen.

    Best-first trees, looked-up tokens and trees drafted during verification keep the largest shape:
    their rounds do not tell what a smaller one would have accepted.
    """
    spec = method.spec
    fits = method.draft != NO_DRAFT and spec.kind != "best-first"
    fits &= not (spec.extra or spec.lookup)
    return fits and spec.depth > 0 and "auto" in (args.depth, args.width)


def choose(run, method: Method, prompt: list[int]) -> tuple[Method, float | None]:
    """(the method with the tree that the run's first rounds promise most of, tokens/s).

    Decodes the prompt with the largest tree and with a very small one, which tells what a node and
    a step cost; `run.settle_on` gives decoders. Times are measured, so choices may vary. None: the
    answer ended with its first token, and the tree stays as it is.
    """
    whole = method.spec
    small = dataclasses.replace(whole, depth=min(2, whole.depth), width=1)
    rounds: dict[tuple[int, int], list[Round]] = {}
    for spec, tokens, eos in ((small, 16, ()), (whole, TOKENS, run.eos)):
        decoder = run.settle_on(dataclasses.replace(method, spec=spec, stop_gain=0.0))
        tokens = min(tokens, run.args.max_length - len(prompt))
        for _ in decoder.rounds(prompt, min(tokens, 4)):  # compiles
            continue
        found = list(decoder.rounds(prompt, tokens, run.args.seed, eos))[1:]
        rounds[spec.depth, spec.width] = found
        del decoder  # its caches would stand beside the next one's
    found = rounds[whole.depth, whole.width]
    if not found:
        return method, None
    fixed = {
        name: None if getattr(run.args, name) == "auto" else getattr(whole, name)
        for name in ("depth", "width")
    }
    depth, width, rate = best_shape(
        [r.path for r in found],
        [r.depth for r in found],
        whole.width,
        measured_costs(rounds),
        **fixed,
    )
    return dataclasses.replace(
        method, spec=dataclasses.replace(whole, depth=depth, width=width)
    ), rate
