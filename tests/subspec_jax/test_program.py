"""Programs of one dataclass: fields select, are given away, or are data."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import register_dataclass

from subspec_jax.program import Program, donated, static


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    x: jax.Array
    total: jax.Array = donated()
    times: int = static(default=2)
    more: jax.Array | None = None


@Program
def add(given: Inputs):
    """total + times * x (+ more)."""
    found = given.total + given.times * given.x
    return found if given.more is None else found + given.more


def test_a_program_is_its_function_compiled_once_for_each_static_value():
    before = add._cache_size()
    for times in (2, 2, 3):
        found = add(Inputs(jnp.float32(5), jnp.float32(1), times))
        assert float(found) == 1 + times * 5
    assert add._cache_size() - before == 2
    assert float(add(Inputs(jnp.float32(5), jnp.float32(1), more=jnp.float32(0.5)))) == 11.5
    assert add.__name__ == "add" and add.__doc__.startswith("total")
    assert float(add.function(Inputs(jnp.float32(2), jnp.float32(1)))) == 5


def test_only_donated_buffers_are_given_away():
    given = Inputs(jnp.ones(4), jnp.ones(4), more=jnp.ones(4))
    add(given)
    assert given.total.is_deleted() and not given.x.is_deleted() and not given.more.is_deleted()


def test_shapes_can_be_lowered_in_place_of_arrays():
    number = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = add.lower(Inputs(number, number, 7)).compile()
    assert "add" in compiled.as_text()


def test_a_field_that_is_forgotten_is_an_error():
    with pytest.raises(TypeError, match="total"):
        add(Inputs(jnp.float32(1)))
