"""How query rows and slots are cut up among the kernel's programs."""

TILE = 64
"""Slots that a turn of the kernel's loop takes."""
PROGRAMS = 264
"""Two a multiprocessor of an H200. Slots are split until there are about as many programs."""
MAX_SPLITS = 16
"""Parts of the slots, each of which the second kernel reads. In a draft's step over 1,024 slots on
an H200, 16 parts take 5.0 us and 8 take 7.2."""


def cut(M: int, kv_heads: int, slots: int, batch: int = 1) -> tuple[int, int, int]:
    """(rows of a block, blocks, splits of the slots) for M query rows of each kv head and sequence;
    blocks are those of one sequence."""
    rows = min(64, max(16, 1 << (M - 1).bit_length()))
    blocks, turns = -(-M // rows), slots // TILE
    wanted = min(turns, MAX_SPLITS, max(1, PROGRAMS // (batch * blocks * kv_heads)))
    each = -(-turns // wanted)
    return rows, blocks, -(-turns // each)
