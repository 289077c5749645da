"""Layers on disk: where a plan puts them, that decoding is exact, and what is said of faults."""

import dataclasses
import itertools
import os
import threading
from types import SimpleNamespace

import jax
import pytest

import subspec_jax
from llm_jax import registry
from llm_jax.config import Experts
from llm_jax.disk import DiskArray, DiskError, on_disk
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.params import abstract
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax import memory
from subspec_jax.limits import plan_for
from subspec_jax.methods import VANILLA
from subspec_jax.offload import streamed_bytes
from subspec_jax.options import Options
from subspec_jax.plan import PlanError, make_plan
from subspec_jax.predict import pass_seconds
from subspec_jax.prefix_cache import Text
from subspec_jax.sources import Source
from subspec_jax.tiers import with_disk
from subspec_jax.tree import TreeSpec

CFG = tiny_config("qwen2", layers=5, d_model=64, d_ff=128)
ONE = streamed_bytes(tiny_params(CFG).layers[0])
SMALL = dict(
    tree=TreeSpec("beam", depth=3, width=2),
    draft=subspec_jax.Draft(4, 16),
    max_length=96,
    chunk=32,
    resident=1,
)
METHODS = ("subspec", "chain", "best-first", "subspec-lookup", "subspec-post", "ngram", "vanilla")
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        patch.setenv("THIMBLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(CFG), CFG)


@pytest.fixture(scope="module")
def prompt(folder):
    return open_checkpoint(folder).tokenizer().encode("A thimble holds little. A thimble holds")


@pytest.fixture(scope="module")
def plain(folder, prompt):
    """f(sampler): what the model writes with all weights in memory, by a loop of `llm_jax`."""
    params = open_checkpoint(folder).load(CFG)
    return lambda sampler: generate(params, prompt, CFG, NEW, sampler, seed=3)


def opened(folder, **changes):
    return subspec_jax.open(folder, "16MB", **SMALL | changes)


def disk_threads():
    return {t for t in threading.enumerate() if t.name.startswith("disk")}


# ---------------------------------------------------------------------- where layers are


@pytest.mark.parametrize("resident", [0, 2, 4])
@pytest.mark.parametrize("room", [0, 0.5, 1, 2.5, 3, 4, 5])
def test_as_few_layers_as_possible_are_on_disk(resident, room):
    limit = int(room * ONE)
    plan = make_plan(CFG, 2**30, TreeSpec("chain", 2, 1), resident=resident)
    found = with_disk(plan, limit, on_card=False)
    moved = CFG.layers - resident
    kept = min(moved, int(room))
    assert len(found.disk) == moved - kept and not found.disk & found.stays
    assert found.disk_bytes == (moved - kept) * ONE
    assert found.host.get("streamed layers", 0) == kept * ONE <= limit or not found.disk
    assert found.streamed_bytes == plan.streamed_bytes and found.device == plan.device


def test_layers_on_disk_are_spread():
    cfg = dataclasses.replace(CFG, layers=40)
    plan = make_plan(cfg, 2**30, TreeSpec("chain", 2, 1), resident=0)
    found = sorted(with_disk(plan, 30 * ONE, on_card=False).disk)
    assert len(found) == 10 and {b - a for a, b in itertools.pairwise(found)} == {4}


def test_on_a_card_the_ring_is_counted_in_host_memory():
    plan = make_plan(CFG, 2**30, TreeSpec("chain", 2, 1), resident=0)
    found = with_disk(dataclasses.replace(plan, ahead=1), 5 * ONE + 10, on_card=True)
    assert found.disk == frozenset()  # all five fit, without a ring
    with pytest.raises(PlanError, match="ring"):
        with_disk(plan, 4 * ONE, on_card=True)
    cfg = dataclasses.replace(CFG, layers=9)
    plan = make_plan(cfg, 2**30, TreeSpec("chain", 2, 1), resident=0)
    found = with_disk(plan, 7 * ONE, on_card=True)
    assert sum(found.host.values()) <= 7 * ONE and found.host["disk ring"] == 5 * ONE
    assert len(found.disk) == 7


def test_the_table_has_a_column_for_the_disk():
    plan = make_plan(CFG, 2**30, TreeSpec("chain", 2, 1), resident=2)
    text = str(with_disk(plan, ONE, on_card=False))
    assert text.splitlines()[1].split() == ["device", "host", "disk"]
    assert text.endswith(f"{memory.show_bytes(3 * ONE)} a pass, 2 of them from disk")
    assert "disk" not in str(plan)


@pytest.mark.parametrize(
    "sizes, lie, seconds",
    [
        ([10, 10, 10], {0, 1, 2}, 3 * 10 / 0.5 + 10 + 1),  # the disk is the slower one
        ([10, 10, 10], set(), 30 + 1),
        ([10, 10, 10], {1}, 20 + 10 + 10 + 1),  # copies keep their order
        ([40, 10, 10], {1}, 40 + 10 + 10 + 1),  # read while the first one is copied
        ([0, 0, 10], {2}, 20 + 10 + 1),
    ],
)
def test_the_pipeline_reads_first_and_copies_then(sizes, lie, seconds):
    assert pass_seconds(sizes, 1.0, 1.0, 1, lie=lie, disk=0.5) == pytest.approx(seconds)


def test_reading_goes_on_while_the_draft_runs():
    # 3 layers fit into the ring: they are there when the draft ends, the fourth is read then
    late = pass_seconds([10] * 4, 1.0, 1e9, 1, early=1000, lie=range(4), disk=1.0)
    assert late == pytest.approx(1 + 10 + 1, abs=1e-6)


@pytest.mark.parametrize("experts, resident", [("routed", None), ("all", 0), ("all", 1)])
def test_experts_stay_in_host_memory_and_say_so(experts, resident):
    cfg = tiny_config("qwen3", experts=Experts(count=5, chosen=2, d_ff=32))
    files = SimpleNamespace(model_shapes=abstract, experts_in_mxfp4=lambda cfg: False)
    source = Source("tiny", cfg, files, experts=experts)
    how = Options(max_length=64, chunk=16, resident=resident, experts=experts)
    plan = plan_for(source, VANILLA, how, 2**26)
    assert not plan.disk and plan.host  # nobody asked: they stay where they were
    assert plan_for(source, VANILLA, dataclasses.replace(how, host_limit=2**26), 2**26) == plan
    with pytest.raises(PlanError, match="experts are kept in host memory"):
        plan_for(source, VANILLA, dataclasses.replace(how, host_limit=1000), 2**26)


# ---------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def lying(folder):
    with opened(folder, also=METHODS[1:]) as model:
        yield model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_the_models_own_tokens(lying, prompt, plain, method):
    lying.use(method)
    assert lying.plan.disk == {1, 2, 3, 4} and not lying.plan.host
    assert lying.generate(prompt, NEW, eos=()) == plain(Sampler())
    assert lying.disk_reads().bytes >= lying.plan.disk_bytes
    places = jax.tree.leaves(lying.target.stored)
    assert all(isinstance(a, DiskArray | jax.ShapeDtypeStruct) for a in places)  # nothing twice
    on_device = lying.target.params.layers
    assert [on_disk(layer) for layer in on_device] == [False, True, True, True, True]


def test_sampling_is_exact_too(folder, prompt, plain):
    sampler = Sampler(0.8, top_k=40)
    with opened(folder, sampler=sampler) as model:
        assert model.generate(prompt, NEW, seed=3, eos=()) == plain(sampler)


@pytest.mark.parametrize("ahead, resident, host", [(1, 0, 2.5), (3, 1, 2.5), (2, 2, 1), (4, 0, 0)])
def test_three_tiers_mix(folder, prompt, plain, ahead, resident, host):
    limit = int(host * ONE)
    with opened(folder, ahead=ahead, resident=resident, host_limit=limit) as model:
        assert len(model.plan.disk) == 5 - resident - int(host)
        assert model.generate(prompt, NEW, eos=()) == plain(Sampler())


@pytest.mark.parametrize("method", ["subspec", "vanilla"])
def test_texts_together_are_exact(folder, prompt, plain, method):
    with opened(folder, method=method, texts=3, ladder=(1, 3)) as model:
        batch = model.batch()
        texts = [Text(prompt, NEW) for _ in range(3)]
        for text in texts:
            assert batch.join(text)
        while not all(text.done for text in texts):
            batch.step()
        assert model.plan.disk and model.disk_reads().bytes > 0
        for text in texts:
            assert text.tokens[len(prompt) :] == plain(Sampler())


@pytest.mark.slow
@pytest.mark.parametrize("host", ["full", "auto"])
def test_residuals_on_disk_are_exact(folder, prompt, tmp_path_factory, host):
    tree = dict(stream="residual", dtype="bfloat16", method="subspec", also=("vanilla",))
    where = tmp_path_factory.getbasetemp() / "converted"
    with opened(folder, host=host, converted=where, **tree) as model:
        assert bool(model.plan.disk) == (host == "auto")
        own = model.generate(prompt, NEW, eos=())
        assert (model.disk_reads().bytes > 0) == (host == "auto")
        model.use("vanilla")
        assert own == model.generate(prompt, NEW, eos=())


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["raw", "residual"])
def test_random_weights_are_written_where_they_are_asked_for(tmp_path, monkeypatch, stream):
    cfg = tiny_config("qwen3", d_model=128, d_ff=128, layers=4)
    tiny = registry.RegisteredModel("tiny", "a/tiny", cfg)
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    how = SMALL | dict(weights="random", stream=stream, draft=subspec_jax.Draft(4, 64))
    with subspec_jax.open("tiny", "64MB", **how) as model:
        assert not model.plan.disk  # not by themselves
    how |= dict(host="1KB", disk_folder=tmp_path)
    with subspec_jax.open("tiny", "64MB", also=("vanilla",), **how) as model:
        assert len(model.plan.disk) == 3
        own = model.generate([1, 2, 3], NEW)
        assert model.disk_reads().bytes > 0 and list(tmp_path.glob("*/layer-00003.safetensors"))
        if stream == "raw":  # random residuals complete another layer than the plain method has
            model.use("vanilla")
            assert own == model.generate([1, 2, 3], NEW)


# ---------------------------------------------------------------------- faults


def overwrite(file, data):
    with file.open("r+b") as handle:
        handle.write(data)


FAULTS = {  # what is done to a file, given other bytes for it -> what is said
    overwrite: "damaged",
    lambda file, data: os.truncate(file, 9000): "shorter than it was",
}


@pytest.mark.parametrize("harm, words", FAULTS.items(), ids=["flip", "cut"])
@pytest.mark.parametrize("method", ["subspec", "vanilla"])
def test_a_file_that_breaks_while_decoding_is_named(folder, prompt, tmp_path, method, harm, words):
    others = disk_threads()
    with opened(folder, method=method, disk_folder=tmp_path) as model:
        rounds = model.rounds(prompt, 40, eos=())
        next(rounds)
        file = next(tmp_path.glob("*/layer-00003.safetensors"))
        data = bytearray(file.read_bytes())
        harm(file, bytes(data[:5000]) + bytes([data[5000] ^ 4]) + bytes(data[5001:]))
        with pytest.raises(DiskError, match=rf"layer-00003.*{words}"):
            list(rounds)
        assert disk_threads() <= others
        overwrite(file, data)
        assert len(model.generate(prompt, NEW, eos=())) == NEW  # and on it goes
