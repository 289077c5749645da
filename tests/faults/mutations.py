"""Malformed inputs from valid ones: seeded, so that a number names a case."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD = (None, True, False, "", "12", "x" * 2000, "\x1b[2J", "../../etc/passwd", -1, 0, 1.5, 10**9)
ODD += (2**63, 10**30, float("nan"), float("inf"), [], [[]], [None], {}, {"a": {}}, "false")
"""What replaces a value of a JSON file."""


def mutated_bytes(valid: bytes, seed: int) -> bytes:
    """The bytes with one fault: cut, empty, a flipped bit, a changed run, more, or another start.

    Every other fault is in the first KiB, where formats have their headers.
    """
    rng = random.Random(seed)
    raw, size = bytearray(valid), len(valid)
    reach = size if rng.random() < 0.5 else min(size, 1024)
    at = rng.randrange(max(1, reach))
    match rng.randrange(8):
        case 0:
            return bytes(raw[:at])
        case 1:
            return b"" if rng.random() < 0.3 else bytes(raw[: size - 1])
        case 2 | 3 | 4:
            raw[at : at + 1] = bytes([raw[at] ^ 1 << rng.randrange(8)])
        case 5:
            raw[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.randbytes(8)])
        case 6:
            raw[at:at] = rng.randbytes(rng.randrange(1, 40))
        case 7:
            raw[at : at + rng.randrange(1, 200)] = b""
    return bytes(raw)


def mutated_json(valid: bytes, seed: int) -> bytes:
    """The JSON text with one value replaced, removed or doubled; one in six is damaged as bytes."""
    rng = random.Random(seed)
    if rng.random() < 1 / 6:
        return mutated_bytes(valid, seed)
    value = json.loads(valid)
    if rng.random() < 1 / 12:
        return json.dumps(rng.choice(ODD)).encode()
    if rng.random() < 1 / 24:
        return b'{"a":' * 100_000
    holder, key = rng.choice(list(_places(value)))
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case _:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(value).encode()


def mutated_lines(valid: bytes, seed: int) -> bytes:
    """JSON lines with a fault in one of them."""
    rng = random.Random(seed)
    lines = valid.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(lines[at], seed) + b"\n" * rng.randrange(2)
    return b"".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key) of every value in a JSON value; of long lists only the first ones."""
    keys = value.keys() if isinstance(value, dict) else range(min(len(value), 20))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
