"""The snippets of docs/palu.md run as they stand, one after the other."""

import re
from pathlib import Path

import jax
import numpy as np

import palu_jax
from llm_jax.testing import tiny_config, tiny_params
from palu_jax.attention import PaluAttention

PAGE = Path(__file__).parents[2] / "docs" / "palu.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)


def test_the_snippets_run(capsys):
    """And both ways to a planned model give the same one."""
    cfg = tiny_config("qwen2", heads=2, kv_heads=1, head_dim=32)
    rng = np.random.default_rng(0)
    given = dict(
        palu_jax=palu_jax,
        params=tiny_params(cfg),
        cfg=cfg,
        batches=[rng.integers(0, cfg.vocab, (2, 12))],
        inputs=rng.normal(size=(3, 2, 9, 40)),
        w_k=rng.normal(size=(40, 48)),
        w_v=rng.normal(size=(40, 48)),
    )
    found = []
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"{PAGE.name}, snippet {number}", "exec"), given)
        found.append(given.get("palu"))
        said = capsys.readouterr().out.splitlines()
        assert len(said) == (0, 3, 1)[number]
    one_call, by_steps, _ = found
    assert all(isinstance(layer.attn, PaluAttention) for layer in one_call.layers)
    same = jax.tree.map(np.array_equal, one_call, by_steps)
    assert all(jax.tree.leaves(same)) and len(SNIPPETS) == 3
    x, k = given["inputs"].reshape(-1, 40), given["k"]
    rest = x @ given["w_k"] - x @ k.down_DR @ k.up_RF
    np.testing.assert_allclose(k.error, (rest**2).sum(1).mean(), rtol=1e-9)
