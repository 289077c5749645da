"""Named shapes that tests lower and benchmarks time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lowrank_attention.latents import Latents, block_bytes


@dataclasses.dataclass(frozen=True)
class LowrankShape:
    """A model's attention over latents; ranks are those of one group of kv heads."""

    heads: int
    kv_heads: int
    head_dim: int
    groups: int
    k_rank: int
    v_rank: int
    rope_theta: float

    @property
    def frequencies(self) -> np.ndarray:
        half = self.head_dim // 2
        return (self.rope_theta ** (-np.arange(half) / half)).astype(np.float32)

    def cache_bytes(self, batch: int, slots: int, bits: int) -> int:
        """Bytes of the latents of one layer, steps and offsets included."""
        each = sum(block_bytes(r, bits) for r in (self.k_rank, self.v_rank))
        return batch * slots * self.groups * (each + (8 if bits < 16 else 0))

    def arguments(self, batch: int, slots: int, bits: int, positions: int = 1) -> tuple:
        """(q, k, v, up_k, up_v, lengths) of `lowrank_attention` as shapes, bfloat16."""
        bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        g, H = self.groups, self.head_dim

        def latents(rank):
            ranks = (rank,) * g
            if bits == 16:
                return Latents(bf16(batch, slots, g * rank), None, None, 16, ranks)
            codes = (batch, slots, g * block_bytes(rank, bits))
            step = bf16(batch, slots, g)
            return Latents(jax.ShapeDtypeStruct(codes, jnp.uint8), step, step, bits, ranks)

        ups = (bf16(g, r, self.kv_heads // g, H) for r in (self.k_rank, self.v_rank))
        q = bf16(batch, positions, self.heads, H)
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return q, latents(self.k_rank), latents(self.v_rank), *ups, lengths


LOWRANK = {
    # half of the keys' and values' numbers kept, ranks of keys and values 1 : 3
    "llama-2-7b": LowrankShape(32, 32, 128, 8, 128, 384, 1e4),
    "qwen2.5-7b": LowrankShape(28, 4, 128, 1, 128, 384, 1e6),
    "llama-3.1-8b": LowrankShape(32, 8, 128, 2, 128, 384, 5e5),
    "qwen3-8b": LowrankShape(32, 8, 128, 2, 160, 352, 1e6),
    "smollm2-135m": LowrankShape(9, 3, 64, 1, 64, 96, 1e4),
}
