"""The plan's arithmetic: every item measured on real arrays, and limits that are exactly enough."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import register_dataclass
from placement import is_offloaded

from llm_jax.cache import empty_caches
from llm_jax.int8 import Int8
from llm_jax.params import abstract
from llm_jax.registry import MODELS
from llm_jax.testing import tiny_config, tiny_params
from pallas_kernels.quantized_matmul.packing import packed_bytes
from subspec_jax.draft_model import INT8, NO_DRAFT, Draft, make_draft
from subspec_jax.layout import tree_bytes
from subspec_jax.memory import AmountError, parse_bytes, show_bytes
from subspec_jax.offload import streamed_bytes
from subspec_jax.plan import PlanError, make_plan, published_tau
from subspec_jax.random_weights import random_target
from subspec_jax.residual.split import gaussian_room, split_head_shapes, split_shapes
from subspec_jax.tree import TreeSpec, cache_slots
from subspec_jax.work_space import work_bytes

SPEC, DRAFT = TreeSpec("beam", 3, 2), Draft(group=32)
LOOKUP = TreeSpec("beam", 3, 2, lookup=32)
ROOM = 2**30
MB = 2**20


def tiny(family="qwen2", **changes):
    return tiny_config(family, layers=4, **changes)


def plan_for(cfg, limit=ROOM, draft=DRAFT, spec=SPEC, **options):
    return make_plan(cfg, limit, spec, draft, **(dict(max_length=64, chunk=16) | options))


def nbytes(tree) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def matrices(tree) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree) if a.ndim > 1)


# --- Items -------------------------------------------------------------------------------------


@pytest.mark.quick_cases("0-False-float32", "4-True-float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("table_on_host", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 3, 4])
def test_items_of_the_target_are_the_bytes_of_what_is_placed(resident, table_on_host, dtype):
    plan = plan_for(tiny(dtype=dtype), resident=resident, table_on_host=table_on_host)
    params = random_target(plan).params
    layers = params.layers
    item = lambda name: plan.device.get(name, 0)
    assert item("resident layers") == sum(matrices(l) for l in layers[:resident])
    assert item("streaming ring") == sum(streamed_bytes(l) for l in layers[resident:][:2])
    vectors = nbytes(params.norm) + sum(nbytes(l) - matrices(l) for l in layers)
    assert item("norms and biases") == vectors
    assert item("output head") == params.head_DV.nbytes
    table = params.embed_VD.nbytes
    where = (0, table) if table_on_host else (table, 0)
    assert (item("embedding"), plan.host.get("embedding", 0)) == where
    streamed = sum(streamed_bytes(l) for l in layers[resident:])
    assert plan.host.get("streamed layers", 0) == plan.streamed_bytes == streamed
    assert plan.streamed == 4 - resident
    caches = empty_caches(plan.cfg, 1, cache_slots(64, SPEC))
    assert item("KV cache") == nbytes(caches)
    assert plan.total == sum(plan.device.values())
    assert all(count > 0 for count in (*plan.device.values(), *plan.host.values()))


@pytest.mark.quick_cases("3-False-True", "4-True-False")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("table_on_host", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_items_of_the_draft_are_the_bytes_of_the_substitutes(bits, table_on_host, share):
    draft = Draft(bits, 16, share_resident=share)
    plan = plan_for(tiny(), draft=draft, resident=1, table_on_host=table_on_host)
    target = random_target(plan)
    made = make_draft(target.params, plan.draft, plan.resident, iterations=0)
    pairs = zip(made.layers, target.params.layers, strict=True)
    own = [matrices(a) for a, b in pairs if a is not b]
    assert len(own) == (3 if share else 4)
    assert plan.device["substitutes"] == sum(own)
    expected = nbytes(made.embed_VD) if table_on_host else None
    assert plan.device.get("substitute embedding") == expected


@pytest.mark.slow
@pytest.mark.parametrize("head_bits", [None, 3, 4, 8])
@pytest.mark.parametrize("resident", [0, 2, 4])
def test_items_of_residuals_are_the_bytes_of_what_is_placed(resident, head_bits):
    """Substitutes of all layers are kept; a resident layer is one whose residual stays too."""
    cfg, stays = tiny(dtype="bfloat16", d_model=128), {0: set(), 2: {1, 2}, 4: {0, 1, 2, 3}}
    draft, room = Draft(4, 32, head_bits), gaussian_room(cfg, 4, 32)
    layer = split_shapes(cfg, 4, 32, room)
    model = dataclasses.replace(abstract(cfg), layers=(layer,) * 4)
    if in_two := head_bits == 4:  # as many as the layers have
        head = split_head_shapes(cfg, 4, 32, room["head"])
        model = dataclasses.replace(model, head_DV=head)
    plan = plan_for(cfg, draft=draft, model=model, resident=resident)
    assert plan.streams_residuals and not plan_for(cfg).streams_residuals
    target = random_target(plan)
    layers = target.params.layers
    assert plan.stays == stays[resident]
    assert [is_offloaded(l) for l in layers] == [i not in plan.stays for i in range(4)]
    item, size = lambda name: plan.device.get(name, 0), streamed_bytes(layers[0])
    assert item("resident layers") == resident * size
    assert item("streaming ring") == min(2, 4 - resident) * size
    assert plan.streamed_bytes == (4 - resident) * size
    made = make_draft(target.params, plan.draft, plan.resident)
    assert item("substitutes") == sum(matrices(l) for l in made.layers)
    assert item("draft head") == (0 if head_bits in (None, 4) else nbytes(made.head_DV))
    assert item("output head") == nbytes(target.params.head_DV) and plan.split_head == in_two
    kept = nbytes(target.params.norm) + sum(nbytes(l) for l in layers)
    vectors = kept - item("substitutes") - sum(map(streamed_bytes, layers))
    assert item("norms and biases") == vectors
    assert plan.draft_step_bytes == item("substitutes") + nbytes(made.head_DV)


def test_items_of_a_draft_model_and_of_an_own_cache():
    cfg, small = tiny(), tiny_config("llama", layers=1, d_model=32, tied=True)
    slots = cache_slots(64, SPEC)
    plan = plan_for(cfg, draft=Draft(None, own_cache=True, model=small))
    assert plan.device["draft model"] == nbytes(tiny_params(small))
    assert plan.device["draft KV cache"] == nbytes(empty_caches(small, 1, slots))
    assert "substitutes" not in plan.device
    plan = plan_for(cfg, draft=Draft(4, 32, own_cache=True))
    assert plan.device["draft KV cache"] == plan.device["KV cache"]
    assert not {"draft model", "draft KV cache"} & set(plan_for(cfg).device)


def test_a_model_of_other_layers_is_counted_as_it_is():
    """Arrays of three axes stream and stay in the draft as they are; every layer is looked at."""
    cfg = tiny()
    model = abstract(cfg)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    swap = lambda **fields: dataclasses.replace(
        model,
        layers=(*model.layers[:2], dataclasses.replace(model.layers[2], **fields), model.layers[3]),
    )
    other = swap(attn=Odd(array(64, 96), array(2, 8, 64)))
    plain, plan = (plan_for(cfg, model=m, resident=0) for m in (None, other))
    size, dense = 2 * 8 * 64 * 4, 64 * 96 * 4
    before = sum(a * b for a, b in (cfg.layer_matrices[n] for n in "qkvo")) * 4
    assert plan.streamed_bytes == plain.streamed_bytes - before + size + dense
    low = lambda *shape: packed_bytes(*shape, 4, 32)
    own = low(64, 96) + size - low(64, 64 + 2 * 32) - low(64, 64)
    assert plan.device["substitutes"] == plain.device["substitutes"] + own
    assert plan.device["KV cache"] == plain.device["KV cache"]
    rows = dataclasses.replace(model.layers[2].mlp, up=array(70, 96))
    with pytest.raises(PlanError, match=r"substitutes of 4 bits in groups of 32: .*up"):
        plan_for(cfg, model=swap(mlp=rows))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Odd:
    """Attention of another kind: a matrix and factors; its cache is the ordinary one."""

    w: Any
    factors: Any


def test_a_draft_step_reads_substitutes_resident_layers_and_the_head():
    cfg = tiny()
    layer = matrices(tiny_params(cfg).layers[0])
    plan = plan_for(cfg, resident=1)
    head = cfg.vocab * cfg.d_model * 4
    assert plan.draft_step_bytes == layer + plan.device["substitutes"] + head
    alone = plan_for(cfg, resident=1, draft=Draft(4, 32, share_resident=False))
    assert alone.draft_step_bytes == alone.device["substitutes"] + head
    low = plan_for(cfg, resident=1, draft=Draft(4, 32, head_bits=8))
    assert low.draft_step_bytes == plan.draft_step_bytes - head + low.device["draft head"]
    assert plan_for(cfg, draft=NO_DRAFT).draft_step_bytes == 0
    small = tiny_config("llama", layers=1, d_model=32)
    other = plan_for(cfg, draft=Draft(None, own_cache=True, model=small))
    assert other.draft_step_bytes == nbytes(tiny_params(small))


@pytest.mark.parametrize("ahead", [1, 2, 3, 9])
@pytest.mark.parametrize("resident", [0, 1, 2, 3, 4])
def test_the_ring_holds_no_more_layers_than_stream(resident, ahead):
    plan = plan_for(tiny(), resident=resident, ahead=ahead)
    layer = matrices(tiny_params(tiny()).layers[0])
    assert plan.device.get("streaming ring", 0) == layer * min(4 - resident, ahead + 1)


def scratch(cfg, spec, draft, slots, chunk):
    """Bytes of the largest program, or of two blocks, for float32 and bfloat16 alike."""
    size = jnp.dtype(cfg.dtype).itemsize

    def block(T):
        logits, weights = cfg.heads * T * slots * 4, cfg.heads * T * slots * size
        mask, hidden = T * slots, T * 3 * cfg.d_ff * size + T * 6 * cfg.d_model * size
        return logits + weights + mask + hidden

    dense = 2 * cfg.d_model * cfg.d_ff * size if draft.bits else 0
    rows = spec.width + spec.lookup
    drafting = 3 * rows * cfg.vocab * 4 + dense + block(rows)
    judging = 2 * min(64, spec.nodes) * cfg.vocab * 4
    return max(2 * block(chunk), 2 * block(spec.nodes), drafting, judging)


def test_products_of_many_rows_make_a_matrix_dense():
    """With kernels from 129 rows on, at most 40 million weights at a time; without, always a whole
    matrix, the output head among them if it is of low bits."""
    cfg = dataclasses.replace(MODELS["qwen2.5-7b"].config, dtype="bfloat16")
    layer, head = 2 * cfg.d_model * cfg.d_ff, cfg.d_model * cfg.vocab
    of = lambda width, kernels, **more: work_bytes(
        cfg, TreeSpec("beam", 1, width), Draft(4, 64, **more), 512, 129, kernels=kernels
    )
    more = of(129, True) - of(128, True)
    assert 80_000_000 < more < 81_000_000 + 12 * cfg.vocab
    assert of(6, True) < 60_000_000 and of(6, True, own_cache=True) > 100_000_000
    whole, low = of(6, False), of(6, False, head_bits=4)
    assert whole > 2 * layer and low - whole == 2 * (head - layer)


@pytest.mark.parametrize("cfg", [tiny(), tiny(vocab=2**15), tiny(d_ff=2048, dtype="bfloat16")])
@pytest.mark.parametrize(
    ("spec", "chunk"), [(SPEC, 16), (SPEC, 128), (TreeSpec(depth=24), 16), (LOOKUP, 4)]
)
@pytest.mark.parametrize("draft", [DRAFT, NO_DRAFT])
def test_work_space_is_that_of_the_largest_program(cfg, spec, chunk, draft):
    plan = plan_for(cfg, spec=spec, chunk=chunk, draft=draft)
    slots = cache_slots(64, spec)
    assert plan.device["work space"] == scratch(cfg, spec, draft, slots, chunk)


@pytest.mark.parametrize("head_dim, fewer", [(32, True), (16, False)])
def test_kernels_need_no_room_for_scores(head_dim, fewer):
    """Where they take such heads; the parts' averages of 32 tokens are 2 x 4 bytes each."""
    cfg = tiny(dtype="bfloat16", head_dim=head_dim)
    plain, kernels = (plan_for(cfg, draft=NO_DRAFT, chunk=512, kernels=k) for k in (False, True))
    slots = cache_slots(64, SPEC)
    scores, averages = 512 * cfg.heads * slots * 6, 2 * 512 * cfg.heads * head_dim * 4
    saved = plain.device["work space"] - kernels.device["work space"]
    assert saved == (2 * (scores - averages) if fewer else 0)


# --- Limits ------------------------------------------------------------------------------------


@functools.cache
def totals(table_on_host=None, **options):
    """Predicted peak for every number of resident layers."""
    cfg = tiny(**options)
    plans = [plan_for(cfg, resident=r, table_on_host=table_on_host) for r in range(5)]
    return [p.total for p in plans]


def test_as_many_layers_are_resident_as_the_limit_holds():
    # substitutes give way to layers, and of the last streamed layers the ring gives way too
    need = totals(table_on_host=False)
    assert need[0] < need[1] < need[2]
    for limit in range(int(need[0] / 0.98) + 2, int(max(need) / 0.98) + 3, 4001):
        plan = plan_for(tiny(), limit, table_on_host=False)
        fitting = [r for r, total in enumerate(need) if total <= int(limit * 0.98)]
        assert plan.resident == max(fitting)
        assert plan.total == need[plan.resident] <= limit


@pytest.mark.parametrize("resident", range(5))
def test_a_plan_needs_its_total_and_the_spare_and_not_a_byte_less(resident):
    plan = plan_for(tiny(), resident=resident)
    fits = lambda limit: plan_for(tiny(), limit, resident=resident, table_on_host=False).total
    enough = next(n for n in range(plan.total, ROOM) if int(n * 0.98) >= plan.total)
    assert fits(enough) == plan.total
    with pytest.raises(PlanError):
        fits(enough - 1)
    assert plan_for(tiny(), plan.total, resident=resident, spare=0.0).total == plan.total


@pytest.mark.parametrize("options", [{}, dict(resident=2), dict(table_on_host=False)], ids=str)
@pytest.mark.parametrize("chunk", [16, 512])
def test_a_refusal_names_the_least_limit_in_megabytes(chunk, options):
    cfg = tiny(vocab=2**14, d_ff=2048)
    try_with = lambda limit: plan_for(cfg, limit, chunk=chunk, **options)
    with pytest.raises(PlanError, match=r"2\.00 KB of device memory") as refused:
        try_with(2048)
    least = re.search(r"the least that works is (\d+MB)", str(refused.value))[1]
    assert try_with(parse_bytes(least)).total <= parse_bytes(least)
    with pytest.raises(PlanError, match=least):
        try_with(parse_bytes(least) - MB)


def test_the_table_goes_to_the_host_where_a_layer_more_fits():
    kept, moved = totals(table_on_host=False, vocab=4096), totals(table_on_host=True, vocab=4096)
    assert moved[1] < kept[0]  # the table is larger than a layer
    limit = int(kept[0] / 0.98) + 2
    plan = plan_for(tiny(vocab=4096), limit)
    assert plan.table_on_host and plan.resident > 0
    assert "embedding" not in plan.device and plan.host["embedding"] == 4096 * 64 * 4
    stays = plan_for(tiny(vocab=4096), limit, table_on_host=False)
    assert (stays.table_on_host, stays.resident) == (False, 0)
    # Where nothing is gained by it the table stays.
    assert not plan_for(tiny(vocab=4096)).table_on_host
    assert plan_for(tiny(vocab=4096), table_on_host=True).table_on_host


def test_a_tied_table_stays_on_the_device():
    cfg = tiny(vocab=4096, tied=True)
    plan = plan_for(cfg, int(plan_for(cfg, resident=0).total / 0.98) + 2)
    assert (plan.table_on_host, plan.resident) == (False, 0)
    assert "output head" not in plan.device and "embedding" not in plan.host
    assert plan.device["embedding"] == 4096 * 64 * 4
    with pytest.raises(PlanError, match="head is its embedding table"):
        plan_for(cfg, table_on_host=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ahead=0), "at least one layer"),
        (dict(max_length=0), "at least 1"),
        (dict(chunk=0), "at least 1"),
        (dict(resident=5), "5 resident layers .* has 4"),
        (dict(resident=-1), "-1 resident layers"),
        (dict(draft=Draft(5)), "5 bits .* choose one of"),
        (dict(draft=Draft(4, 12)), "multiple of 8"),
        (dict(draft=Draft(4, 64)), r"down has 96 inputs, not a multiple of group 64; .*\[32, 16"),
    ],
)
def test_what_no_memory_can_mend_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        plan_for(tiny(), **change)


@pytest.mark.slow
def test_the_registrys_models_fit_the_cards_they_are_meant_for():
    spec, find = TreeSpec("beam", 48, 6), lambda name: MODELS[name].config
    seven = make_plan(find("qwen2.5-7b"), parse_bytes("8GB"), spec, Draft())
    assert 4 <= seven.resident <= 6
    assert seven.total < 8 * 2**30
    for name, card in [("qwen2.5-14b", "12GB"), ("qwen2.5-32b", "24GB")]:
        plan = make_plan(find(name), parse_bytes(card), spec, Draft())
        assert 0 <= plan.resident < plan.cfg.layers
    with pytest.raises(PlanError, match=r"4\.00 GB .* the least that works is"):
        make_plan(find("qwen2.5-7b"), parse_bytes("4GB"), spec, Draft())


# --- Amounts and speeds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8 * 2**30),
        ("7.5 GiB", 15 * 2**29),
        ("500mb", 500 * MB),
        ("1KB", 1024),
        ("0.5TB", 2**39),
        (" 12 GIB ", 12 * 2**30),
        ("1e3MB", 1000 * MB),
    ],
)
def test_amounts_of_memory_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "8", "GB", "-1GB", "0GB", "8G", "8PB", "x GB", "nanGB", "infGB", "1e999GB", "8GBs"]
)
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(AmountError, match="write for example 8GB"):
        parse_bytes(text)


@given(st.integers(1024, 2**45))
def test_a_shown_amount_is_read_back_to_three_digits(count):
    shown = show_bytes(count)
    assert re.fullmatch(r"\d+\.\d\d [KMG]B", shown)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}[shown[-2]]
    assert abs(parse_bytes(shown) - count) <= 0.005 * unit + 1


def test_less_than_a_kilobyte_is_shown_in_bytes():
    assert [show_bytes(n) for n in (0, 1, 1023, 1024)] == ["0 B", "1 B", "1023 B", "1.00 KB"]


def test_tokens_per_second_add_the_pass_the_drafting_and_an_overhead():
    plan = plan_for(tiny(), resident=1)
    link, memory, overhead = 1e6, 1e7, 0.01
    one_pass = 3 * matrices(tiny_params(tiny()).layers[0]) / link
    assert plan.pass_seconds(link) == pytest.approx(one_pass)
    drafting = SPEC.depth * plan.draft_step_bytes / memory
    rate = plan.tokens_per_second(4.0, link, memory, overhead)
    assert rate == pytest.approx(4.0 / (one_pass + drafting + overhead))
    budgeted = dataclasses.replace(plan, spec=TreeSpec("best-first", 9, 2, budget=7))
    steps = 3  # of two nodes; a seventh has no place
    seconds = one_pass + steps * plan.draft_step_bytes / memory + overhead
    assert budgeted.tokens_per_second(4.0, link, memory, overhead) == pytest.approx(4.0 / seconds)


def test_the_published_tau_counts_the_bonus_token_and_the_levels():
    assert published_tau(48) == pytest.approx(28.4, abs=0.05)
    assert published_tau(0) == pytest.approx(1.0)
    survives = 0.9 ** np.arange(6)  # level k is reached with probability 0.9**k
    assert published_tau(5, 0.9) == pytest.approx(survives.sum())


@pytest.mark.parametrize("layers", [1, 2, 5, 28])
def test_residuals_that_move_are_spread_from_the_first_layer_to_the_last(layers):
    """The first has arrived when the pass begins; behind the last copy there is one block."""
    cfg = dataclasses.replace(tiny(d_model=128, dtype="bfloat16"), layers=layers)
    layer = split_shapes(cfg, 4, 32, gaussian_room(cfg, 4, 32))
    model = dataclasses.replace(abstract(cfg), layers=(layer,) * layers)
    for resident in range(layers + 1):
        plan = plan_for(cfg, draft=Draft(4, 32), model=model, resident=resident)
        moved = sorted(set(range(layers)) - plan.stays)
        assert len(moved) == layers - resident
        if len(moved) > 1:
            assert (moved[0], moved[-1]) == (0, layers - 1)
            gaps = np.diff(moved)
            assert gaps.max() - gaps.min() <= 1


def test_int8_substitutes_are_counted_as_they_are():
    """Every layer, resident or not, and a head of the draft's own; nothing is made dense."""
    cfg = tiny_config("llama", layers=4)
    make = lambda draft: make_plan(cfg, 2**30, TreeSpec(depth=2, width=2), draft, resident=2)
    plan, four = make(INT8), make(Draft(4, 16))
    draft = make_draft(plan.model, INT8, 2)
    is_int8 = lambda w: isinstance(w, Int8)
    low = lambda tree: [w for w in jax.tree.leaves(tree, is_leaf=is_int8) if is_int8(w)]
    assert plan.device["substitutes"] == tree_bytes(low(draft.layers))
    assert plan.device["draft head"] == tree_bytes(draft.head_DV)
    assert plan.device["work space"] <= four.device["work space"]


@pytest.mark.parametrize(
    "model, draft, reason",
    [
        ("qwen2.5-0.5b", Draft(4, 0), "8 bits"),
        ("qwen2.5-0.5b", Draft(8, 0, head_bits=4), "8 bits"),
        ("olmoe-7b-a1b", INT8, "experts have groups"),
    ],
)
def test_one_scale_for_an_output_is_for_8_bits_of_plain_layers(model, draft, reason):
    with pytest.raises(PlanError, match=reason):
        make_plan(MODELS[model].config, 2**34, TreeSpec(depth=2, width=2), draft)
