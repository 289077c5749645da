"""Dataclasses from JSON: what fits their annotations comes back, everything else is named."""

import dataclasses
import json
from typing import Literal

import numpy as np
import pytest

from llm_jax.rope import LinearRope, Llama3Rope, RopeScaling
from llm_jax.values import ConfigError, from_json, is_plain


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", 4]
    inner: Inner | None
    pair: tuple[int, bool]
    counts: dict[str, int]

    def __post_init__(self):
        if self.name == "refused":
            raise ValueError("no name")


WHOLE = Outer("x", 4, Inner(0.5, (1, 2, 3)), (7, True), {"a": 1, "b": 2})


@pytest.mark.parametrize(
    "value",
    [
        WHOLE,
        dataclasses.replace(WHOLE, inner=None, kind="a", counts={}),
        dataclasses.replace(WHOLE, inner=Inner(2, ())),
    ],
    ids=["whole", "empty", "a whole number as a float"],
)
def test_what_was_written_comes_back(value):
    found = json.loads(json.dumps(dataclasses.asdict(value)))
    assert from_json(Outer, found, "it") == value


@pytest.mark.parametrize("value", [LinearRope(2.0), Llama3Rope(8.0, 1.0, 4.0, 8192)])
def test_a_subclass_is_known_by_its_fields(value):
    assert from_json(RopeScaling, dataclasses.asdict(value), "it") == value
    with pytest.raises(ConfigError, match="it is wrong: 'half' is not known"):
        from_json(RopeScaling, {"half": 1.0}, "it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda j: [], r"it is \[\]; expected an object"),
        (lambda j: j.pop("pair") and j, "it is wrong: 'pair' is missing"),
        (lambda j: j | {"more": 1}, "it is wrong: 'more' is not known"),
        (lambda j: j | {"name": 3}, r"it\.name is 3; expected str"),
        (lambda j: j | {"name": "refused"}, "it: no name"),
        (lambda j: j | {"kind": 4.0}, r"it\.kind is 4\.0; expected Literal\['a', 4\]"),
        (lambda j: j | {"inner": 0}, r"it\.inner is 0; expected an object"),
        (lambda j: j | {"inner": {"rate": "1", "sizes": []}}, r"it\.inner\.rate is '1'; expected"),
        (lambda j: j | {"inner": {"rate": 1e999, "sizes": []}}, r"it\.inner\.rate is inf;"),
        (lambda j: j | {"inner": {"rate": 1, "sizes": [1, True]}}, r"sizes\[1\] is True; .* int"),
        (lambda j: j | {"pair": [1]}, r"it\.pair is \[1\]; expected tuple\[int, bool\]"),
        (lambda j: j | {"pair": [2**63, True]}, r"it\.pair\[0\] is 9223372036854775808; expected"),
        (lambda j: j | {"counts": {"a": None}}, r"it\.counts\.a is None; expected int"),
        (lambda j: j | {"counts": []}, r"it\.counts is \[\]; expected dict\[str, int\]"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    found = json.loads(json.dumps(dataclasses.asdict(WHOLE)))
    with pytest.raises(ConfigError, match=words):
        from_json(Outer, change(found), "it")


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (1, {int, float}),
        (np.uint64(3), {int, float}),
        (-(2**63), set()),
        (0.5, {float}),
        (np.float32(0.5), {float}),
        (np.float32("nan"), set()),
        (float("-inf"), set()),
        (True, {bool}),
        ("1", {str}),
        (None, set()),
        (b"1", set()),
    ],
    ids=repr,
)
def test_plain_values(value, kinds):
    assert {kind for kind in (int, float, str, bool) if is_plain(kind, value)} == kinds
