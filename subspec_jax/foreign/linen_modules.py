"""Flax Linen modules over variables that hold low-bit weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from llm_jax.extras import need
from llm_jax.lowbit_array import LowBitArray, dot_general


@contextlib.contextmanager
def linen() -> Iterator[None]:
    """A context in which Flax Linen modules take variables from `subspec_jax.substitute`.

        with subspec_jax.linen():
            y = model.apply(variables, x)

    Inside it `Dense` and `DenseGeneral` multiply by the low-bit matrix itself. Any other module
    gets the dequantized array from `self.param`. Programs that are compiled inside stay as they
    are. Raises MissingPackage without Flax.
    """
    nn = need("flax.linen", "flax", "a Linen module")
    nn.meta.AxisMetadata.register(LowBitArray)  # `self.param` unboxes it

    def intercept(call, args, kwargs, context):
        module = context.module
        plain = type(module) in (nn.Dense, nn.DenseGeneral) and context.method_name == "__call__"
        if not plain or not module.has_variable("params", "kernel"):
            return call(*args, **kwargs)
        kernel = module.get_variable("params", "kernel")
        dense = isinstance(module, nn.DenseGeneral) and module.batch_dims
        if not isinstance(kernel, LowBitArray) or dense:
            return call(*args, **kwargs)
        return _product(module, kernel, *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def _product(module: Any, kernel: LowBitArray, inputs: Any) -> Any:
    """What a `Dense` or `DenseGeneral` gives for its low-bit kernel."""
    inputs = jnp.asarray(inputs)
    axes = getattr(module, "axis", -1)
    axes = [a % inputs.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))]
    bias = module.param("bias", lambda _: None) if module.use_bias else None
    dtype = module.dtype or jnp.result_type(inputs, kernel, *(() if bias is None else (bias,)))
    contract = ((tuple(axes), tuple(range(len(axes)))), ((), ()))
    y = dot_general(inputs.astype(dtype), kernel.astype(dtype), contract, module.precision)
    if bias is None:
        return y
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
