"""Low-bit substitutes of the arrays in anybody's model, chosen by rules.

    rules = [Rule(r"layers/.*/kernel", bits=4, group=64)]
    low = subspec_jax.substitute(model_or_tree, rules)

The model that is given stays as it is; what no rule names is shared with the result. In place of a
matrix is a `llm_jax.lowbit_array.LowBitArray`, which says what JAX does with it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.int8 import int8
from llm_jax.lowbit_array import LowBitArray, matrix_axes
from llm_jax.packed import packed
from llm_jax.params import Params
from llm_jax.quantize import Quantized, check_grouping, quantize
from llm_jax.rules import RuleError, chosen
from llm_jax.stream import on_host, to_device
from pallas_kernels.bit_fields import pack_codes
from subspec_jax import SubspecError
from subspec_jax.draft_model import substitute as substitute_params
from subspec_jax.foreign.nnx_modules import Part, is_nnx
from subspec_jax.foreign.qarrays import from_qwix, qarray_of


def hqq(w_DF: jax.Array, bits: int, group: int) -> Quantized:
    """The matrix by half-quadratic quantization, 20 iterations."""
    return quantize(w_DF, bits, group, 20)


def nearest(w_DF: jax.Array, bits: int, group: int) -> Quantized:
    """The matrix rounded to the nearest codes."""
    return quantize(w_DF, bits, group, 0)


def symmetric(w_DF: jax.Array, bits: int, group: int) -> Quantized:
    """The matrix rounded to codes whose middle is zero: the numbers that a `qwix.QArray` has."""
    D, F = w_DF.shape
    check_grouping("the matrix", D, bits, group)
    w_QgF, half = w_DF.astype(jnp.float32).reshape(-1, group, F), 2 ** (bits - 1)
    largest = jnp.abs(w_QgF).max(1)
    step = jnp.where(largest == 0, 1.0, largest / (half - 0.5)).astype(jnp.bfloat16)
    codes = jnp.clip(jnp.round(w_QgF / step.astype(jnp.float32)[:, None]), -half, half - 1) + half
    return Quantized(pack_codes(codes.astype(jnp.uint8), bits, 1), step, -half * step, bits, group)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of the arrays whose whole path the pattern matches.

    A `qwix.QArray` at such a path keeps its codes (`from_qwix`): then `summed` and `stacked` count,
    and of the others only bits=None.
    """

    path: str
    """A regular expression, such as `layers/.*/kernel`; keys and numbers are joined by /."""
    bits: int | None = 4
    """2, 3, 4 or 8; None: these arrays stay, whatever later rules say."""
    group: int = 64
    """Weights along the inputs that share a step and an offset, a multiple of 8. 0, with 8 bits:
    one scale for each output (`llm_jax.int8`), which also rounds the activations to 8 bits."""
    quantizer: Callable[[jax.Array, int, int], Quantized] = hqq
    """f(w_DF, bits, group); where `group` is 0 it is not used."""
    summed: tuple[int, ...] = (0,)
    """The axes that a product sums over, counted behind those of a stack: the inputs. (0,) for
    kernels [D, F] and [D, N, H]; (0, 1) for [N, H, D]; (1,) for [N, D, H]."""
    stacked: int = 0
    """Axes in front that hold layers, for models that scan over them."""


def substitute(model: Any, rules: Sequence[Rule] | None = None, **options: Any) -> Any:
    """The model with low-bit substitutes in place of the matrices that `rules` choose.

    `model` is a Flax NNX module (a changed clone comes back), or any pytree, also one that holds
    such modules: a dict of arrays, the variables of a Flax Linen module (to be applied inside
    `subspec_jax.linen`), a State, an Equinox module, `llm_jax.Params`. A rule chooses among the
    float arrays that have at least two axes behind their stack. Shared arrays of an NNX module stay
    shared. Works on shapes, too (`jax.eval_shape`).

    Without rules the model is `llm_jax.Params` whose layers are all quantized, with the `options`
    of `subspec_jax.draft_model.substitute`: bits, group, iterations and others.

    Raises `llm_jax.rules.RuleError` for a rule that matches nothing, with the nearest paths, and
    LLMError for bits and groups that do not fit an array.
    """
    if rules is None:
        if not isinstance(model, Params):
            raise SubspecError(
                f"a {type(model).__name__} needs rules that choose its matrices, such as "
                'rules=[subspec_jax.Rule(r"layers/.*/kernel")]'
            )
        return substitute_params(model, **options)
    if options:
        raise SubspecError(f"{min(options)} is no option beside rules; put it into them")
    whole = lambda node: is_nnx(node) or qarray_of(node) is not None
    with_paths, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=whole)
    parts = [Part(jax.tree_util.keystr(p, simple=True, separator="/"), a) for p, a in with_paths]
    arrays = {path: array for part in parts for path, array in part.arrays.items()}
    found = _substituted(arrays, rules)
    return structure.unflatten([part.changed(found) for part in parts])


def _substituted(arrays: dict[str, Any], rules: Sequence[Rule]) -> dict[str, LowBitArray]:
    """Path -> substitute, of the arrays that the rules choose."""
    paths = [path for path, array in arrays.items() if _is_matrix(array)]
    found = chosen(rules, paths).items()
    return {path: _low(path, arrays[path], r) for path, r in found if r.bits is not None}


def _is_matrix(array: Any) -> bool:
    shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", None)
    return len(shape) > 1 and dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _low(path: str, array: Any, rule: Rule) -> LowBitArray:
    """The substitute of one array."""
    shape = tuple(array.shape)
    lead, own = shape[: rule.stacked], shape[rule.stacked :]
    summed = matrix_axes(own, rule.summed)
    if summed is None:
        raise RuleError(
            f"rule {rule.path!r}: {path} has shape {shape}; {rule.stacked} axes of a stack and "
            f"sums over {rule.summed} do not leave a matrix"
        )
    if qarray_of(array) is not None:
        return from_qwix(array, summed, rule.stacked)
    D = math.prod(own[i] for i in summed)
    if rule.group:
        check_grouping(path, D, rule.bits, rule.group)
    elif rule.bits != 8:
        raise RuleError(f"rule {rule.path!r}: group 0 means 8 bits, not {rule.bits}")

    def one(w):
        order = (*summed, *(i for i in range(len(own)) if i not in summed))
        w_DF = jnp.transpose(w, order).reshape(D, -1)
        return packed(rule.quantizer(w_DF, rule.bits, rule.group)) if rule.group else int8(w_DF)

    if isinstance(array, jax.ShapeDtypeStruct):
        several = one
        for _ in lead:
            several = jax.vmap(several)
        matrix = jax.eval_shape(several, array)
    else:
        layers = [one(_here(array[i])) for i in np.ndindex(*lead)]
        join = lambda *a: jnp.stack(a).reshape(*lead, *a[0].shape)
        matrix = jax.tree.map(join, *layers) if lead else layers[0]
    return LowBitArray(matrix, own, summed, jnp.dtype(array.dtype))


def _here(array: Any) -> jax.Array:
    """The array on the device, from wherever it is."""
    return to_device(array) if isinstance(array, np.ndarray) or on_host(array) else array
