"""Layers on the host: where every array is, what moves, and how much the device holds meanwhile."""

import dataclasses
import gc
import importlib.metadata
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placement import is_offloaded

import subspec_jax.memory as memory_module
import subspec_jax.verify as verify
from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.config import Config
from llm_jax.model import hidden
from llm_jax.stream import Stream, route, to_device
from llm_jax.testing import tiny_params
from subspec_jax.decoder import Decoder
from subspec_jax.memory import CONTEXT_BYTES, card_bytes, device_bytes, enforce_limit
from subspec_jax.offload import offload, place, rows_of, streamed_bytes
from subspec_jax.verify import Target, run_pass

CFG = Config(5, 32, 4, 2, 8, 48, 31, dtype="float32", qkv_bias=True)
MATRICES = 4 * CFG.layer_matrix_elements  # bytes a layer streams


@pytest.fixture(scope="module")
def params():
    return tiny_params(CFG)


def kinds(layer):
    """(memory kinds of the matrices, memory kinds of the vectors)."""
    leaves = jax.tree.leaves(layer)
    pick = lambda test: {a.sharding.memory_kind for a in leaves if test(a)}
    return pick(lambda a: a.ndim == 2), pick(lambda a: a.ndim == 1)


def pointers(tree):
    return [a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)]


def test_matrices_go_to_pinned_memory_and_vectors_stay(params):
    layer = params.layers[0]
    away = offload(layer)
    assert kinds(layer) == ({"device"}, {"device"})
    assert kinds(away) == ({"pinned_host"}, {"device"})
    assert is_offloaded(away) and not is_offloaded(layer)
    assert streamed_bytes(away) == streamed_bytes(layer) == MATRICES
    assert away.attn_norm.unsafe_buffer_pointer() == layer.attn_norm.unsafe_buffer_pointer()
    assert away.attn.q_bias.unsafe_buffer_pointer() == layer.attn.q_bias.unsafe_buffer_pointer()


def test_there_and_back_is_bit_equal(params):
    layer = params.layers[1]
    back = to_device(offload(layer))
    assert kinds(back) == ({"device"}, {"device"})
    chex.assert_trees_all_equal(back, layer)
    again = offload(offload(layer))
    assert kinds(again) == ({"pinned_host"}, {"device"})
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, layer))


def test_numpy_layers_are_placed_too(params):
    """As they come from a checkpoint, without passing through the device."""
    layer = jax.tree.map(np.asarray, params.layers[2])
    away = offload(layer)
    assert kinds(away) == ({"pinned_host"}, {"device"})
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, away), layer)


@pytest.mark.parametrize("resident", [0, 2, 5, 7])
def test_place_puts_the_first_layers_on_the_device(params, resident):
    placed = place(params.layers, resident)
    assert [is_offloaded(l) for l in placed] == [i >= resident for i in range(5)]
    fetched = tuple(to_device(l) for l in placed)
    chex.assert_trees_all_equal(fetched, params.layers)


@pytest.mark.parametrize("before, after", [(2, 2), (1, 3), (4, 2)])
def test_place_moves_only_what_changes(params, before, after):
    first = place(params.layers, before)
    second = place(first, after)
    moved = range(min(before, after), max(before, after))
    for i in range(5):
        same = [a == b for a, b in zip(pointers(first[i]), pointers(second[i]), strict=True)]
        matrix = [a.ndim == 2 for a in jax.tree.leaves(first[i])]
        assert all(s or (m and i in moved) for s, m in zip(same, matrix, strict=True))
        assert is_offloaded(second[i]) == (i >= after)
    chex.assert_trees_all_equal(tuple(map(to_device, second)), params.layers)


@pytest.mark.parametrize("resident, ahead", [(0, 1), (2, 1), (0, 2), (3, 4), (5, 1)])
def test_a_stream_yields_all_layers_in_order(params, resident, ahead):
    placed = place(params.layers, resident)
    stream = Stream(route(placed), ahead)
    assert stream.bytes == min(ahead + 1, 5 - resident) * MATRICES
    for i in range(5):
        layer = next(stream)
        assert not is_offloaded(layer)
        chex.assert_trees_all_equal(layer, params.layers[i])
        if i < resident:
            assert pointers(layer) == pointers(placed[i])
    assert stream.bytes == (5 - resident) * MATRICES
    with pytest.raises(StopIteration):
        next(stream)


def test_a_dropped_stream_keeps_nothing_alive(params):
    """Without help from the garbage collector, which may come too late for the device's memory."""
    gc.collect()
    gc.disable()
    try:
        layers = place(params.layers, 2)
        stream = Stream(route(layers), 1)
        next(stream)
        watched = weakref.ref(stream)
        del stream
        assert watched() is None
    finally:
        gc.enable()


def test_arrived_bytes_are_those_that_wait_on_the_device(params):
    stream = Stream(route(place(params.layers, 0)), 2)
    jax.block_until_ready([arriving.copies for arriving in stream._ready])
    assert stream.arrived_bytes() == 3 * MATRICES
    assert Stream(route(params.layers), 2).arrived_bytes() == 0


def one_pass(params, ahead=1, between=None):
    target = Target(params, CFG, ahead)
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    caches, step = list(empty_caches(CFG, 1, 8)), causal_step(0, 5, 8)
    return run_pass(target, target.stream(), tokens, caches, step, between), caches


@pytest.mark.parametrize("resident, ahead", [(0, 1), (0, 2), (2, 1)])
def test_a_streamed_pass_is_the_resident_one_bit_for_bit(params, resident, ahead):
    want = one_pass(params)
    placed = dataclasses.replace(params, layers=place(params.layers, resident))
    chex.assert_trees_all_equal(one_pass(placed, ahead), want)
    x, caches = hidden(
        params,
        jnp.array([[3, 1, 4, 1, 5]]),
        empty_caches(CFG, 1, 8),
        causal_step(0, 5, 8),
        CFG,
    )
    chex.assert_trees_all_close((want[0], tuple(want[1])), (x, caches), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("ahead", [1, 2])
def test_the_ring_holds_no_more_layers_than_it_should(params, monkeypatch, resident, ahead):
    """The one that is dispatched and `ahead` others; the next in its place when it is complete."""
    placed = dataclasses.replace(params, layers=place(params.layers, resident))
    one_pass(placed, ahead)
    gc.collect()
    at_rest, during, between = device_bytes(), [], []
    plain = verify.jit_block

    def watched(*args):
        during.append(device_bytes())
        return plain(*args)

    monkeypatch.setattr(verify, "jit_block", watched)
    one_pass(placed, ahead, lambda i: between.append(device_bytes()))
    layers = lambda held: [round((b - at_rest) / MATRICES) for b in held]
    left = [5 - max(i, resident) for i in range(6)]  # streamed layers from the i-th on
    assert layers(during) == [min(ahead + 1, left[i]) for i in range(5)]
    assert layers(between) == [min(ahead + 1, left[i + 1]) for i in range(5)]
    assert (left[resident] - ahead) * MATRICES > 0
    gc.collect()
    assert abs(device_bytes() - at_rest) < MATRICES / 4


def test_blocks_wait_until_those_before_have_returned_their_work_space(params, monkeypatch):
    """Also where nothing streams and the host could run ahead to the last layer."""
    plain, wait, dones, running = verify.jit_block, jax.block_until_ready, [], []

    def watched(*args):
        running.append(sum(not any(done is w for w in waited) for done in dones))
        out = plain(*args)
        dones.append(out[2])
        return out

    waited = []
    monkeypatch.setattr(verify, "jit_block", watched)
    monkeypatch.setattr(jax, "block_until_ready", lambda a: (waited.append(a), wait(a))[1])
    one_pass(params)
    assert running == [0, 1, 1, 1, 1] and verify.QUEUED == 2


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_decoder_stays_within_the_ring(params, ahead):
    """Watched between the layers of every pass, prefill aside."""
    placed = dataclasses.replace(params, layers=place(params.layers, 0))
    decoder = Decoder(Target(placed, CFG, ahead), max_length=32)
    rounds, held = decoder.rounds([1, 2, 3], 8), []
    next(rounds)
    gc.collect()
    at_rest = device_bytes()
    decoder.watch = lambda: held.append(device_bytes() - at_rest)
    list(rounds)
    assert len(held) == 7 * 5
    assert (ahead + 1) * MATRICES <= max(held) < (ahead + 1.5) * MATRICES


def test_fetched_and_dropped_layers_leave_no_host_memory(params):
    host = lambda: sum(
        a.nbytes for a in jax.live_arrays() if a.sharding.memory_kind == "pinned_host"
    )
    gc.collect()
    before = host()
    placed = place(params.layers, 0)
    assert host() - before == 5 * MATRICES
    placed = place(placed, 3)
    assert host() - before == 2 * MATRICES
    placed = place(placed, 5)
    assert host() == before
    del placed


def test_device_bytes_counts_every_buffer_once(params):
    gc.collect()
    before = device_bytes()
    a = jax.block_until_ready(jnp.zeros((1000,), jnp.float32) + 1)
    alias = jax.device_put(a, jax.devices()[0])
    assert device_bytes() - before == 4000
    away = jax.device_put(a, jax.memory.Space.Host)
    assert device_bytes() - before == 4000
    a.delete()
    alias.delete()
    assert device_bytes() == before and away.nbytes == 4000


def test_rows_of_a_table_on_the_host():
    table = np.arange(20.0).reshape(5, 4)
    got = rows_of(table, jnp.array([[4, 0, 4]]))
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, [[table[4], table[0], table[4]]])


# ---------------------------------------------------------------------------------- memory limit

GIB = 2**30
VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
)


@pytest.fixture
def environment(monkeypatch):
    """The three variables unset, and put back as they were afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch remembers, whatever is set
        monkeypatch.delenv(name)
    return monkeypatch


def test_no_card_no_limit(environment):
    environment.setattr(memory_module, "card_bytes", lambda: None)
    assert enforce_limit(8 * GIB) is None
    assert not any(name in os.environ for name in VARIABLES)


def test_a_limit_comes_too_late_when_jax_runs(environment):
    jax.devices()
    environment.setattr(memory_module, "card_bytes", lambda: 24 * GIB)
    with pytest.raises(RuntimeError, match="before JAX uses a device"):
        enforce_limit(8 * GIB)
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize("limit, pool", [(8 * GIB, 8 * GIB), (30 * GIB, 24 * GIB - CONTEXT_BYTES)])
def test_a_limit_is_the_allocators_fraction(environment, limit, pool):
    environment.setattr(memory_module, "card_bytes", lambda: 24 * GIB)
    environment.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    environment.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "7")
    assert enforce_limit(limit) == pool
    assert int(float(os.environ["XLA_CLIENT_MEM_FRACTION"]) * 24 * GIB) == pool
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "7"  # the user's own word
    del os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]
    enforce_limit(limit)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert 0.85 * memory - 1 < int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) < memory


@pytest.mark.parametrize("host_limit, pinned", [(4 * GIB, 5), (4 * GIB + 1, 6), (GIB // 2, 2)])
def test_a_limit_of_host_memory_is_one_of_pinned_memory(environment, host_limit, pinned):
    """In whole GiB, at least 1 more than the limit."""
    environment.setattr(memory_module, "card_bytes", lambda: 24 * GIB)
    environment.setattr(memory_module, "backends_started", lambda: False)
    enforce_limit(8 * GIB, host_limit)
    assert os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == str(pinned)
    del os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]
    enforce_limit(8 * GIB, 2**60)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) < memory


def test_a_limit_can_be_set_behind_every_import():
    """In a fresh process: nothing of this package starts a backend when it is imported."""
    program = """
import subspec_jax.decoder, subspec_jax.draft_model, subspec_jax.memory as o
import os, jax
o.card_bytes = lambda: 2**34
assert o.enforce_limit(2**33) == 2**33 and float(os.environ["XLA_CLIENT_MEM_FRACTION"]) == 0.5
jax.devices()
try:
    o.enforce_limit(2**33)
except RuntimeError:
    print("too late")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "too late\n", run.stderr


@pytest.fixture
def unasked():
    """Nothing is known of a card, before and after the test: answers are remembered."""
    remembered = [f for f in vars(memory_module).values() if hasattr(f, "cache_clear")]
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


@pytest.mark.parametrize(
    "answer, want",
    [
        ("24564\n", 24564 * 2**20),
        ("143771\n143771\n", 143771 * 2**20),
        ("", None),
        ("[N/A]\n", None),
    ],
)
def test_the_card_is_asked_without_jax(unasked, monkeypatch, answer, want):
    asked = []

    def fake(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(memory_module, "jax_for_cuda", lambda: True)
    assert card_bytes() == want
    assert not memory_module.card_is_idle()
    monkeypatch.setattr(memory_module, "jax_for_cuda", lambda: False)
    assert card_bytes() is None
    assert memory_module.card_is_idle() == (want is not None)
    assert asked[0][0] == "nvidia-smi" and asked[0][-2:] == ["-i", "3"]


@pytest.mark.parametrize(
    "error", [FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi")]
)
def test_without_a_driver_there_is_no_card(unasked, monkeypatch, error):
    def fake(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(memory_module, "jax_for_cuda", lambda: True)
    assert card_bytes() is None


@pytest.mark.parametrize(
    "name, platforms, want",
    [
        ("jax-cuda13-plugin", "", True),
        ("jax_cuda12_pjrt", "cuda", True),
        ("jax-cuda13-plugin", "cpu", False),
        ("jaxlib", "", False),
    ],
)
def test_a_card_counts_only_with_a_jax_that_can_use_it(unasked, monkeypatch, name, platforms, want):
    installed = SimpleNamespace(metadata={"Name": name})
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [installed])
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert memory_module.jax_for_cuda() == want
