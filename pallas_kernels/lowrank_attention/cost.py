"""How long the Triton kernels take for one new token, fitted to measurements on one H200.

Within 15 % of every row of experiments/results/h200_lowrank_attention.jsonl (4K to 128K slots, one
rank pair, two models). For other ranks and GPUs it compares choices; it does not predict times.
docs/performance.md says what limits the kernels.
"""

START = 4.3e-6
"""Seconds before and after a score kernel's work."""
SCORES = {"absorbed": {16: 376e12, 4: 310e12}, "rebuilt": {16: 245e12, 4: 168e12}}
"""Operations a second, 2 R_k K' columns a slot and group; 64 columns absorbed, H rebuilt."""
AVERAGES = {"absorbed": {16: 2.2e12, 4: 2.9e12}, "rebuilt": {16: 1.8e12, 4: 1.25e12}}
"""Value latents a second."""
AROUND = 13e-6
"""Seconds of the small programs around both kernels …"""
SLOW_PAIRS = 9.5e-12
"""… and, where queries are absorbed, for each slot and query head."""


def decode_seconds(
    heads: int,
    kv_heads: int,
    head_dim: int,
    groups: int,
    k_rank: int,
    v_rank: int,
    bits: tuple[int, int],
    slots: int,
    batch: int = 1,
) -> float:
    """Seconds of one layer's attention of one token over `slots` latents; 16, 8 or 4 bits.

    8 bits were not measured and count as 4, which need the same unpacking.
    """
    absorbed = heads == kv_heads
    way = "absorbed" if absorbed else "rebuilt"
    k_bits, v_bits = (16 if b == 16 else 4 for b in bits)
    rows = batch * slots
    operations = 2 * rows * k_rank * kv_heads * (64 if absorbed else head_dim)
    scores = START + operations / SCORES[way][k_bits]
    averages = 1.3 * START + rows * groups * v_rank / AVERAGES[way][v_bits]
    return scores + averages + AROUND + (rows * heads * SLOW_PAIRS if absorbed else 0)
