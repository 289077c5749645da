"""Device memory that the programs of a round need in addition to weights and caches."""

import math

from llm_jax.config import DTYPES, Config
from llm_jax.ordered import block_slots
from pallas_kernels.quantized_matmul.api import LARGEST
from pallas_kernels.quantized_matmul.packing import fields_of
from pallas_kernels.quantized_matmul.reference import DENSE_WEIGHTS
from pallas_kernels.residual_decode import parts_of
from pallas_kernels.residual_decode.reference import SLAB_WEIGHTS
from pallas_kernels.tree_attention.api import HEADS
from subspec_jax.draft_model import Draft
from subspec_jax.tree import PassShape, TreeSpec, pass_nodes
from subspec_jax.verify import GREEDY_ROWS, QUEUED, rows_at_a_time

DECODE_BYTES = 20
"""Bytes of work space for each weight of a slab that is decoded."""


def work_bytes(
    cfg: Config,
    spec: TreeSpec,
    draft: Draft,
    slots: int,
    chunk: int,
    plain: bool = True,
    residual: bool = False,
    kernels: bool = False,
    split_head: bool = False,
    texts: int = 1,
    shape: PassShape | None = None,
) -> int:
    """Bytes for the largest of: blocks of prefill or verification, the head, a draft step; with
    the trees of `texts` texts together.

    `plain`: the cache holds the keys and values; otherwise those of one layer are rebuilt at a
    time. `residual`: layers are residuals, and one matrix is decoded at a time; with `kernels`,
    only a part of it. The kernels need no work space to decode residuals and to attend to plain
    caches. They also need none to multiply up to 64 rows by low-bit matrices; for more rows, a part
    of the matrix is made dense. `shape`: every pass has its rows, whose newest keys and values are
    gathered.
    """
    size = DTYPES[cfg.dtype]
    rebuilt = 0 if plain else 4 * slots * cfg.kv_heads * cfg.head_dim * (4 + size)

    def block(tokens, ordered=False):
        scores = cfg.heads * tokens * slots * (4 + size)  # logits in float32, weights in the dtype
        if kernels and plain and cfg.head_dim in HEADS:
            scores = 2 * tokens * cfg.heads * cfg.head_dim * 4  # averages over parts of the slots
        if ordered:
            at_once = max(block_slots(slots), shape.levels)
            scores = tokens * cfg.heads * (at_once * (4 + size) + 3 * cfg.head_dim * 4)
            scores += 2 * tokens * shape.levels * cfg.kv_heads * cfg.head_dim * size
        wide = tokens * (3 * cfg.d_ff + 6 * cfg.d_model) * size
        slab = 0 if kernels else DECODE_BYTES * min(SLAB_WEIGHTS, largest)
        decoded = (part if kernels else largest) * size + slab if residual else 0
        pairs = 0 if cfg.experts is None else tokens * cfg.experts.chosen * cfg.d_model * 4
        return max(scores, decoded) + wide + tokens * slots + rebuilt + pairs

    nodes = pass_nodes(spec, texts) if shape is None else shape.rows
    logits = rows_at_a_time(nodes, split_head) * cfg.vocab * 4
    head = 2 * logits
    largest = max(map(math.prod, cfg.joined_matrices.values()))
    fields = fields_of(draft.bits or 4)
    part = max(math.prod(s) // parts_of(s, fields) for s in cfg.joined_matrices.values())
    if split_head:
        weights = cfg.d_model * cfg.vocab
        parts = parts_of((cfg.d_model, cfg.vocab), fields) if kernels else 1
        decoded = weights // parts * (size + (0 if kernels else 4))
        head = logits + max(logits, decoded + 2 * logits // parts)
        greedy = nodes if texts == 1 else min(nodes, GREEDY_ROWS)
        head = max(head, decoded + 2 * greedy * cfg.vocab * 4 // parts)
    rows = texts * (spec.width + spec.lookup)
    step = rows * cfg.vocab * 4 * 3 + block(rows)
    if draft.bits is not None:
        low = max(largest, cfg.d_model * cfg.vocab) if draft.head_bits is not None else largest
        if draft.int8:
            step += 4 * rows * (cfg.d_ff + cfg.d_model)  # sums as int32
        elif not kernels:
            step += low * size  # a matrix is made dense
        elif max(rows, draft.own_cache * chunk) > LARGEST:
            step = max(step, block(chunk)) + min(low, DENSE_WEIGHTS) * size  # a part of it is
    passes = block(max(chunk, nodes))
    if shape is not None:
        passes = max(passes, block(nodes, ordered=True))
    return max(QUEUED * passes, head, step)
