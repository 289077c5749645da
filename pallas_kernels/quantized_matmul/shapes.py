"""Named matrices that tests lower and benchmarks time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.packing import Packed, repack


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """A matrix [inputs, outputs]."""

    inputs: int
    outputs: int

    def packed(self, bits: int = 4, group: int = 64) -> Packed:
        """Packed, as shapes."""
        array = jax.ShapeDtypeStruct
        groups = self.inputs // group
        scale = array((groups, self.outputs), jnp.bfloat16)
        codes = array((groups, group, self.outputs), jnp.uint8)
        return jax.eval_shape(functools.partial(repack, bits=bits), codes, scale, scale)

    def rows(self, count: int) -> jax.ShapeDtypeStruct:
        """Rows to multiply, bfloat16."""
        return jax.ShapeDtypeStruct((count, self.inputs), jnp.bfloat16)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the 16-bit matrix."""
        return 2 * self.inputs * self.outputs


def _model(name: str, D: int, F: int, heads: int, kv_heads: int, H: int, V: int):
    q, kv = heads * H, kv_heads * H
    sizes = {
        "gate": (D, F),
        "down": (F, D),
        "o": (q, D),
        "kv": (D, kv),
        "qkv": (D, q + 2 * kv),
        "gate-up": (D, 2 * F),
        "head": (D, V),
    }
    return {f"{name}/{key}": MatmulShape(*size) for key, size in sizes.items()}


MATMUL = {
    **_model("qwen2.5-7b", 3584, 18944, 28, 4, 128, 152064),
    **_model("qwen2.5-32b", 5120, 27648, 40, 8, 128, 152064),
}
"""`qkv` and `gate-up` are matrices joined along their outputs when they are packed."""
