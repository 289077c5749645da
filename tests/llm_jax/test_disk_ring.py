"""The ring of buffers: layers in their order, and none overwritten while it is in use."""

import time

import jax
import numpy as np
import pytest
from test_disk_reader import FAULTS, numbers, readers, written

from llm_jax.disk import DiskError
from llm_jax.disk_ring import DiskRing
from llm_jax.stream import home

LAYERS = 7


@pytest.fixture
def model(tmp_path):
    """(layers of two arrays, where they lie); the matrices of a layer are of another size each."""
    layers = [(numbers(40 + i, 64), numbers(1000)) for i in range(LAYERS)]
    return layers, [written(tmp_path / f"{i}", 64, *some) for i, some in enumerate(layers)]


@pytest.fixture
def ring_of(model, tmp_path):
    """f(room, copies): a ring of these layers. A CPU copies what does not lie at a multiple of 64
    bytes, as a GPU copies everything."""
    layers, lying = model
    odd = [written(tmp_path / f"odd{i}", 4, *some) for i, some in enumerate(layers)]

    def ring(room, copies):
        place = home("pinned_host" if copies else "device")
        return DiskRing(odd if copies else lying, room, place, copies)

    return ring


def check(filled, want):
    for got, array in zip(filled.arrays, want, strict=True):
        np.testing.assert_array_equal(np.array(got), array)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("room", [1, 2, 3, LAYERS + 2])
def test_layers_come_in_a_circle_and_stay_while_in_use(model, ring_of, room, copies):
    layers, _ = model
    ring, used, rng = ring_of(room, copies), [], np.random.default_rng(room)
    for _ in range(3):
        ring.start()
        for want in layers:
            if len(used) == room:
                filled, before = used.pop(0)
                time.sleep(rng.choice([0, 0.003]))  # threads may read while we wait
                check(filled, before)
                ring.give_back(filled)
            used.append((ring.take(), want))
            check(*used[-1])
        while used:
            filled, before = used.pop(0)
            check(filled, before)
            ring.give_back(filled)
    ring.close()
    assert not readers()


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("taken, back", [(1, 0), (2, 0), (3, 2), (5, 5), (LAYERS, LAYERS)])
def test_a_pass_that_was_given_up_leaves_its_arrays_alone(model, ring_of, taken, back, copies):
    layers, _ = model
    ring = ring_of(3, copies)
    ring.start()
    out = []
    for i in range(taken):
        if len(out) == 3 or (out and i <= back):
            ring.give_back(out.pop(0)[0])
        out.append((ring.take(), layers[i]))
    for _ in range(2):
        ring.start()
        for want in layers:
            filled = ring.take()
            check(filled, want)
            ring.give_back(filled)
    for filled, want in out:  # the block that uses them may still run
        check(filled, want)
    ring.close()


def test_a_buffer_is_used_in_place_on_a_cpu(ring_of):
    ring = ring_of(2, copies=False)
    ring.start()
    filled = ring.take()
    first = filled.slot.bytes.ctypes.data
    at = filled.arrays[0].addressable_data(0).unsafe_buffer_pointer()
    assert first <= at < first + len(filled.slot.bytes)
    ring.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_reaches_who_takes_the_layer(model, ring_of, monkeypatch, fault):
    layers, lying = model
    fault(lying[4][1].file, lying[4][1], monkeypatch)
    ring = ring_of(2, copies=False)
    with pytest.raises(DiskError, match=FAULTS[fault]):
        ring.start()
        for want in layers:
            filled = ring.take()
            check(filled, want)
            ring.give_back(filled)
    assert not readers()


def test_threads_end_with_the_ring(ring_of):
    ring = ring_of(2, copies=True)
    ring.start()
    jax.block_until_ready(ring.take().arrays)
    assert readers()
    del ring
    for thread in readers():
        thread.join(5)
    assert not readers()
