"""`exact="bitwise"`: in 16 bits, too, every method has plain decoding's bits."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspec_jax
from llm_jax.attention import rms_norm
from llm_jax.config import FULL, SLIDING, Config
from llm_jax.linear import linear
from llm_jax.mlp import mlp
from llm_jax.model import unembed
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax import bitwise, decoder, memory
from subspec_jax.bitwise import ancestor_slots, lay_out_in_order, pass_shape
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.methods import METHOD_NAMES, MethodError, make_method
from subspec_jax.offload import place
from subspec_jax.plan import make_plan
from subspec_jax.tree import PassShape, TreeSpec, seedling
from subspec_jax.verify import Target, jit_block

LOSSLESS = tuple(name for name in METHOD_NAMES if name not in ("subspec-lossy", "classic"))
SPEC = TreeSpec(depth=4, width=3)
METHODS = {name: make_method(name, SPEC, Draft(4, 32)) for name in LOSSLESS}
STEPS, LENGTH = 48, 128
PROMPT = np.random.default_rng(0).integers(3, 250, 37).tolist()
GEMMA = dict(
    layers=3, window=24, layer_kinds=(SLIDING, FULL, SLIDING), attn_softcap=3.0, norms="around",
    qk_norm=True, query_scale=0.2,
)  # fmt: skip
FAMILIES = {
    "biases": tiny_config("qwen2", dtype="bfloat16", d_model=256, d_ff=512),
    "llama": tiny_config("llama3", dtype="bfloat16"),
    "windows": tiny_config("qwen3", dtype="bfloat16", **(GEMMA | dict(head_dim=16))),
}


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        yield


# --- Rows ---------------------------------------------------------------------------------------

CFG = Config(1, 576, 9, 3, 64, 1536, 3000, dtype="bfloat16")
WIDE = tiny_params(CFG)
LAYER = WIDE.layers[0]
ROW_WISE = {
    "narrow product": lambda x: linear(LAYER.attn.k, x),
    "wide product": lambda x: linear(LAYER.mlp.gate, x),
    "float32 product": lambda x: linear(LAYER.mlp.gate, x, jnp.float32),
    "norm": lambda x: rms_norm(x, LAYER.mlp_norm, 1e-5),
    "mlp": lambda x: mlp(LAYER.mlp, x, CFG),
    "head": lambda x: unembed(WIDE, x, CFG),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_a_rows_bits_do_not_depend_on_its_place(name):
    """Nor on the other rows. What is compared is large enough to be cut into tiles and threads."""
    f = jax.jit(ROW_WISE[name])
    x_1RD = jax.random.normal(
        jax.random.key(1), (1, bitwise.ROWS_ON_CPU, CFG.d_model), jnp.bfloat16
    )
    want_RX = np.asarray(f(x_1RD)[0])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(x_1RD.shape[1])
        np.testing.assert_array_equal(np.asarray(f(x_1RD[:, order])[0]), want_RX[order])
    alike_RX = np.asarray(f(jnp.broadcast_to(x_1RD[:, 5:6], x_1RD.shape))[0])
    assert (alike_RX == want_RX[5]).all()


def test_other_numbers_of_rows_have_other_bits():
    """So that the test above can fail, and why plain decoding has the rows of a tree."""
    f = jax.jit(ROW_WISE["float32 product"])
    x_1RD = jax.random.normal(
        jax.random.key(1), (1, bitwise.ROWS_ON_CPU, CFG.d_model), jnp.bfloat16
    )
    assert (np.asarray(f(x_1RD)[0, :1]) != np.asarray(f(x_1RD[:, :1])[0])).any()


# --- The layout of a pass -----------------------------------------------------------------------


def test_a_nodes_window_is_its_line_of_ancestors():
    parent = [-1, 0, 0, 2, 1, 3, 5, -1, 4]
    spec, shape, at = TreeSpec("beam", 4, 2), PassShape(rows=16, places=32, levels=8), 11
    E, tree = len(parent), seedling(jnp.int32(7), spec)
    lines = [[]] * E
    for i, up in enumerate(parent):
        lines[i] = [*(lines[up] if up >= 0 else []), i]
    ancestor = np.array([[j in lines[i] for j in range(E)] for i in range(E)])
    tree = dataclasses.replace(
        tree,
        token_E=jnp.arange(7, 7 + E, dtype=jnp.int32),
        parent_E=jnp.asarray(parent, jnp.int32),
        depth_E=jnp.asarray([len(line) - 1 for line in lines], jnp.int32),
        ancestor_EE=jnp.asarray(ancestor),
    )
    cut, tokens_1R, step = lay_out_in_order(tree, jnp.int32(at), spec, shape)
    assert tokens_1R.tolist() == [[*range(7, 7 + E), *[7] * (16 - E)]] and int(step.real) == E
    assert step.position_BT[0, E:].tolist() == [at] * (16 - E)
    for i, line in enumerate(lines):
        slots = [*range(at), *(at + j for j in line)][-8:]  # by position, the newest 8
        assert step.slot_TW[i, : len(slots)].tolist() == slots
    np.testing.assert_array_equal(step.slot_TW[E:], np.broadcast_to(step.slot_TW[0], (16 - E, 8)))
    early = ancestor_slots(cut, jnp.int32(2), 2 + cut.depth_E, 8)
    assert early[6, :7].tolist() == [0, 1, 2, 4, 5, 7, 8][:7]


def test_the_usual_pass_holds_every_method_of_the_usual_tree(monkeypatch):
    methods = lambda *tree: [make_method(n, TreeSpec(*tree), Draft()) for n in LOSSLESS]
    assert pass_shape(methods("beam", 8, 2)) == pass_shape(methods("beam", 16, 2))
    alone = pass_shape([METHODS["vanilla"]])
    assert alone == pass_shape(methods("beam", 8, 2)) == PassShape(64, 128, 64)
    monkeypatch.setattr(memory, "card_bytes", lambda: 2**33)
    usual = PassShape(320, 384, 64)
    assert pass_shape(methods("beam", 48, 6)) == pass_shape([METHODS["vanilla"]]) == usual
    assert pass_shape(methods("beam", 90, 6)) == PassShape(576, 640, 128)


# --- Texts --------------------------------------------------------------------------------------


@functools.cache
def target_of(family):
    cfg = FAMILIES[family]
    params = tiny_params(cfg, 1)
    return Target(dataclasses.replace(params, layers=place(params.layers, 1)), cfg)


def decoded(family, name, sampler, shape):
    """The tokens, and the numbers behind each of them after the last layer."""
    target, method, xs, numbers = target_of(family), METHODS[name], [], []
    low = make_draft(target.params, method.draft, 1) if method.draft.bits is not None else None
    run = decoder.run_pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "run_pass", lambda *a: (xs.append(run(*a)), xs[-1])[1])
        proposer = method.proposer(target.cfg, low)
        one = Decoder(target, proposer, sampler, max_length=LENGTH, chunk=16, shape=shape)
        rounds = list(one.rounds(PROMPT, STEPS, seed=3))
    for result, x in zip(rounds[1:], xs, strict=True):
        places = [0, *result.path][: len(result.tokens)]
        numbers.append(np.asarray(x[0])[places])
    assert name in ("vanilla", "ngram") or len(rounds) < STEPS  # something was accepted
    return SimpleNamespace(tokens=[t for r in rounds for t in r.tokens], x=np.concatenate(numbers))


@functools.cache
def plain(family, sampler, shape):
    return decoded(family, "vanilla", sampler, shape)


SMOLLM2 = Path.home() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE = pass_shape(METHODS.values())


@pytest.mark.quick_cases("subspec-biases-sampled")
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.9, top_k=50)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n in LOSSLESS if n != "vanilla"])
def test_every_method_has_plain_decodings_bits(name, family, sampler):
    want = plain(family, sampler, SHAPE)
    programs = jit_block._cache_size(), bitwise.jit_drawn._cache_size()
    got = decoded(family, name, sampler, SHAPE)
    assert got.tokens == want.tokens and len(set(want.tokens)) > 10
    np.testing.assert_array_equal(got.x, want.x)
    # By construction: it ran the programs that plain decoding had run.
    assert (jit_block._cache_size(), bitwise.jit_drawn._cache_size()) == programs


@pytest.mark.slow
def test_without_it_the_bits_differ():
    """So that the test above can fail."""
    want, got = (decoded("biases", name, Sampler(0.9), None) for name in ("vanilla", "subspec"))
    same = next((i for i, (a, b) in enumerate(zip(got.tokens, want.tokens)) if a != b), STEPS - 1)
    assert same and (got.x[:same] != want.x[:same]).any()


# --- The engine ---------------------------------------------------------------------------------

SMALL = dict(tree=SPEC, draft=Draft(4, 32), max_length=LENGTH, chunk=32, dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cfg = tiny_config("qwen2", layers=3, dtype="bfloat16")
    return write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(cfg), cfg)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["raw", "residual"])
def test_an_engines_methods_write_one_text(folder, tmp_path, stream):
    """Also where layers stay, are read from disk, and are put together from residuals."""
    more = dict(converted=tmp_path) if stream == "residual" else {}
    also = ("subspec", "ngram", "subspec-lookup")
    given = dict(
        method="vanilla",
        also=also,
        resident=1,
        stream=stream,
        exact="bitwise",
        sampler=Sampler(0.9),
    )
    with subspec_jax.open(folder, "16MB", **SMALL, **given, **more) as model:
        kinds = {p.streams_residuals for p in model.plans.values()}
        assert kinds == {stream == "residual"}
        assert len({p.slots for p in model.plans.values()}) == 1
        texts, programs = [], []
        for name in model.methods:
            model.use(name)
            texts.append(model.generate(PROMPT, STEPS, eos=()))
            programs.append((jit_block._cache_size(), bitwise.jit_drawn._cache_size()))
        assert texts == [texts[0]] * 4 and len(set(texts[0])) > 10
        assert len(set(programs)) == 1


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(method="subspec-lossy"), "subspec-lossy accepts tokens"),
        (dict(also=["subspec-lossy"]), "subspec-lossy accepts tokens"),
        (dict(texts=2), "texts that share a pass"),
        (dict(ladder=(1,)), "texts that share a pass"),
    ],
)
def test_what_cannot_promise_it_is_refused(folder, given, reason):
    with pytest.raises(MethodError, match=f"{reason}.*--exact bitwise"):
        subspec_jax.open(folder, "16MB", exact="bitwise", **SMALL, **given)


@pytest.mark.parametrize(
    "change, reason",
    [(dict(cards=2), "2 devices"), (dict(experts=object()), "experts are applied")],
)
def test_models_that_cannot_promise_it_are_refused(change, reason):
    cfg = SimpleNamespace(**(dict(cards=1, experts=None) | change))
    source = SimpleNamespace(cfg=cfg, shapes=lambda draft: SimpleNamespace(layers=()))
    options = subspec_jax.Options(exact="bitwise")
    with pytest.raises(MethodError, match=reason):
        bitwise.shaped(options, METHODS.values(), source)
    layers = SimpleNamespace(layers=(SimpleNamespace(attn=object()),))
    latents = SimpleNamespace(cfg=SimpleNamespace(cards=1, experts=None), shapes=lambda d: layers)
    with pytest.raises(MethodError, match="--palu"):
        bitwise.shaped(options, METHODS.values(), latents)


def test_the_plan_counts_the_rows_and_the_windows():
    """Plain decoding has the rows of a tree; two of its blocks may be queued."""
    cfg, shape = tiny_config("qwen2", dtype="bfloat16"), PassShape(320, 384, 64)
    of = lambda shape: make_plan(
        cfg, 2**30, METHODS["vanilla"].spec, max_length=600, chunk=16, shape=shape
    )
    usual, plan = of(None), of(shape)
    assert (usual.slots, plan.slots) == (640, 1024)
    heads = cfg.heads * (1024 * 6 + 3 * cfg.head_dim * 4)
    window = 2 * 64 * cfg.kv_heads * cfg.head_dim * 2
    hidden = (3 * cfg.d_ff + 6 * cfg.d_model) * 2 + 1024
    assert plan.device["work space"] == 2 * 320 * (heads + window + hidden)
    assert usual.device["work space"] < plan.device["work space"] / 10
    assert plan.device["KV cache"] == usual.device["KV cache"] * 1024 // 640


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="the model is not there")
def test_a_real_models_texts_are_plain_decodings():
    """Two questions and a sampled answer to each."""
    also, questions = ("subspec", "ngram"), ("Name three uses of a thimble.", "Count to ten.")
    given = dict(method="vanilla", also=also, dtype="bfloat16", exact="bitwise", max_length=256)
    with subspec_jax.open(SMOLLM2, "full", sampler=Sampler(0.7), **given) as model:
        asked = [model.tokenizer.chat([{"role": "user", "content": q}]) for q in questions]
        texts = []
        for name in model.methods:
            model.use(name)
            texts.append([model.generate(ids, 24, seed=7) for ids in asked])
    assert texts == [texts[0]] * 3 and min(map(len, texts[0])) > 10
