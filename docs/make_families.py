"""Writes docs/families.md: every family, what it is tested with, and what it cannot do.

    python docs/make_families.py           write the page
    python docs/make_families.py --print   print it

The tables are those that the tests run over (tests/family_cases.py) and those of the package.
tests/test_docs.py compares the page with what this makes now.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from family_cases import CASES, METHODS, RESIDUAL, RESIDUAL_EXPERTS, SIZES, T

from llm_jax.config import Config
from llm_jax.families import FAMILIES
from llm_jax.hf_config import from_hf
from llm_jax.models import MODELS
from palu_jax.attention import why_not

PAGE = Path(__file__).parent / "families.md"
HEAD = """# Families

The models that run here, by the `model_type` of their config.json. Made by
`python docs/make_families.py` from the tables that the tests use; do not edit this page by hand.
All other values are refused by name: no model runs as something else.

| family | models by name | logits of | every method | residuals | GGUF | Palu |
| --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
- **Logits of**: the cases that transformers saves as tiny random checkpoints. In float32 the logits
  of {T} tokens, more than every window, differ by at most 1e-4, and 64 greedy tokens are equal
  (`tests/llm_jax/test_families.py`).
- **Every method**: with offloaded layers, or experts that stream, the tokens of each case are those
  of plain decoding in float32, greedy and at temperature 0.8, with {methods}
  (`tests/subspec_jax/test_family_exactness.py`).
- **Residuals**: the cases whose tokens with --stream residual are those of the raw bfloat16
  weights; with experts, those of plain decoding with every method, sums in float32. Experts in
  MXFP4, as gpt-oss is published, are not converted: --stream raw brings them in their own form.
- **GGUF**: the value of `general.architecture`.
- **Palu**: whether `palu_jax.attention.why_not` finds nothing, or what it finds.

What does not fit, or less than one might think:

- Qwen3-Next and Qwen3.5, whose layers are gated delta nets in part: such a layer has one recurrent
  state and no cache slots, so the branches of a draft tree have nowhere to be. They are refused.
- Windows are masks over a full cache: results are exact, and no memory is saved.
- longrope uses its short list up to the original length, and a text is never longer than that.
- The rope type dynamic, as in transformers, up to `max_position_embeddings` only, where it changes
  nothing.
- Models that take pictures, too (Gemma 3 from 4B on, Mistral Small 3.1): text only.
"""


def tested(name: str) -> Config:
    """The config of a case, by way of the config.json that transformers would save."""
    from transformers import AutoConfig

    kind, changes = CASES[name]
    return from_hf(AutoConfig.for_model(kind, **(SIZES | changes)).to_dict(), "float32")


def palu(configs: dict[str, Config]) -> str:
    """Whether Palu fits all of them, or what does not fit."""
    found = {}
    for name, cfg in configs.items():
        reason = why_not(cfg)
        found.setdefault(reason and reason.split(" models have ")[1], []).append(name)
    if len(found) == 1:
        words = next(iter(found))
        return f"no: {words}" if words else "yes"
    odd = (f"no: {words} ({', '.join(names)})" for words, names in found.items() if words)
    return "; ".join(odd)


def row(family: str) -> str:
    """A family's row of the table."""
    named = {m.name: m.config for m in MODELS.values() if m.config.family == family}
    cases = {name: tested(name) for name, (kind, _) in CASES.items() if kind == family}
    arch = FAMILIES[family].architecture
    first = f"| `{family}` | {', '.join(named)}"
    if not cases:  # it reads as another one
        twin = next(f for f, other in FAMILIES.items() if other.fields is FAMILIES[family].fields)
        return f"{first} | as {twin} | as {twin} | as {twin} | {arch} | as {twin} |\n"
    every = f"{len(METHODS)} methods"
    residual = ", ".join(name for name in cases if name in RESIDUAL + RESIDUAL_EXPERTS)
    residual = residual or "not tested"
    return (
        f"{first} | {', '.join(cases)} | {every} | {residual} | {arch} | {palu(named | cases)} |\n"
    )


def page() -> str:
    """The page as Markdown."""
    return HEAD + "".join(map(row, FAMILIES)) + TAIL.format(T=T, methods=", ".join(METHODS))


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        PAGE.write_text(page())
