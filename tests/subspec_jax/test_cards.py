"""Models that several devices share, on devices that XLA makes of one CPU; and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.cards import CardsError, per_card
from llm_jax.config import Experts
from llm_jax.testing import tiny_config

slow = pytest.mark.slow


@pytest.mark.parametrize("devices", [pytest.param(n, marks=slow) for n in (2, 4, 8)])
def test_on_devices(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(Path(__file__).with_name("on_cards.py"))],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    "heads, kv_heads, d_ff, cards, want",
    [
        (28, 4, 18944, 2, (14, 2, 9472)),  # Qwen2.5-7B
        (28, 4, 18944, 4, (7, 1, 4736)),
        (28, 4, 18944, 8, (7, 1, 2368)),  # four devices have no heads
        (9, 3, 1536, 2, (6, 2, 768)),  # SmolLM2
        (64, 8, 29568, 2, (32, 4, 14784)),  # Qwen2.5-72B
        (4, 1, 96, 2, (4, 1, 64)),
        (4, 2, 30, 4, (2, 1, 8)),
    ],
)
def test_a_card_has_whole_heads_and_groups(heads, kv_heads, d_ff, cards, want):
    cfg = tiny_config("llama", heads=heads, kv_heads=kv_heads, d_ff=d_ff, vocab=291)
    part = per_card(cfg, cards)
    assert (part.heads, part.kv_heads, part.d_ff) == want
    assert part.cards == cards and part.head_columns == -(-291 // cards)
    assert per_card(cfg, 1) == cfg


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(experts=Experts(4, 2, 32)), "models with experts are decoded on one device"),
        (dict(qk_norm=True, qk_norm_whole=True), "norms of q and k are over all heads"),
    ],
)
def test_models_that_cannot_be_divided_are_named(changes, reason):
    with pytest.raises(CardsError, match=f"2 devices: .*{reason}"):
        per_card(tiny_config("llama", **changes), 2)
