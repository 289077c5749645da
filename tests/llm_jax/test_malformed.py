"""Any change of a checkpoint's bytes: a named error, or a checkpoint that is rightly accepted.

Rightly accepted: it loads, its arrays have the shapes that its config says, and all are finite.
"""

import json
import struct

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jax import CheckpointError
from llm_jax.config import ConfigError
from llm_jax.folder import INDEX, WHOLE
from llm_jax.formats import open_checkpoint
from llm_jax.hf_config import from_hf
from llm_jax.testing import hf_config, tiny_config, tiny_params, write_gguf, write_safetensors

pytest.importorskip("gguf", reason="the gguf package writes the files under test")
CFG = tiny_config("qwen2", layers=1)
quickly = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
thoroughly = settings(
    max_examples=1000, deadline=20_000, database=None, suppress_health_check=list(HealthCheck)
)
how_often = pytest.mark.parametrize(
    "often", (quickly, pytest.param(thoroughly, marks=pytest.mark.slow)), ids=("quick", "slow")
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    where = tmp_path_factory.mktemp("written")
    write_safetensors(where / "whole", tiny_params(CFG), CFG)
    write_safetensors(where / "sharded", tiny_params(CFG), CFG, shards=2, tokenizer=False)
    write_gguf(where / "tiny.gguf", tiny_params(CFG), CFG)
    return where


def outcome(path, tokenizer=False) -> str:
    """ "refused" or "loaded"; whatever else happens fails the test."""
    try:
        checkpoint = open_checkpoint(path)
        if tokenizer:
            assert max(checkpoint.tokenizer().encode("the cat"), default=0) < CFG.vocab
        cfg = checkpoint.config()
        params = checkpoint.load(cfg, lambda index, layer: layer, lambda name, array: array)
    except CheckpointError as error:
        assert str(error)
        return "refused"
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, checkpoint.model_shapes(cfg))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    return "loaded"


@st.composite
def changed(draw, data: bytes, upto: int) -> bytes:
    """The bytes with some replaced, removed or inserted among the first `upto`, or cut."""
    at = draw(st.integers(0, upto - 1))
    new = draw(st.binary(max_size=9) | st.sampled_from((b"\xff" * 8, bytes(8), b"[" * 5000)))
    kind = draw(st.sampled_from(("replace", "insert", "remove", "cut")))
    if kind == "cut":
        return data[:at]
    end = at if kind == "insert" else at + len(new) if kind == "replace" else at + 1 + len(new)
    return data[:at] + (b"" if kind == "remove" else new) + data[end:]


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from((10**9, 10**400, -1, 0, "false", "2", 1e-6, "llama3", "default", WHOLE))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("rope_type", "type", "factor", "rope_theta", "quant_method", "x")),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
)
NAMES = (*hf_config(CFG), "rope_scaling", "rope_parameters", "dtype", "quantization_config")
NAMES += ("sliding_window", "use_sliding_window", "layer_types", "attention_bias", "mlp_bias")


@how_often
def test_values_of_a_config(often):
    families = st.sampled_from(("llama3", "mistral", "qwen2", "qwen3"))

    @often
    @given(families, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
    def check(family, changes):
        try:
            cfg = from_hf(hf_config(tiny_config(family)) | changes)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            return
        assert cfg.layers <= 10_000 and cfg.vocab <= 2**24 and 0 < cfg.norm_eps <= 0.1
        assert type(cfg.tied) is bool and 1 <= cfg.rope_theta <= 1e15

    check()


def replaced(tmp_path_factory, written, folder: str, file: str, data: bytes):
    """A folder with links to the files that were written, but for one that has these bytes."""
    where = tmp_path_factory.mktemp("m")
    for known in (written / folder).iterdir():
        if known.name != file:
            (where / known.name).symlink_to(known)
    (where / file).write_bytes(data)
    return where


@pytest.mark.parametrize(
    ("folder", "file"), (("whole", "config.json"), ("sharded", INDEX), ("whole", WHOLE))
)
@how_often
def test_bytes_of_a_folder(written, tmp_path_factory, folder, file, often):
    good = (written / folder / file).read_bytes()
    upto = len(good) if file != WHOLE else 8 + struct.unpack_from("<Q", good)[0]

    @often
    @given(changed(good, upto))
    def check(data):
        outcome(replaced(tmp_path_factory, written, folder, file, data))

    check()


@how_often
def test_values_of_an_index(written, tmp_path_factory, often):
    names = list(json.loads((written / "sharded" / INDEX).read_text())["weight_map"])
    files = st.sampled_from((WHOLE, "config.json", "model-00001-of-00002.safetensors", "gone"))

    @often
    @given(st.dictionaries(st.sampled_from(names), files | LEAVES) | VALUES)
    def check(places):
        data = json.dumps(dict(weight_map=places)).encode()
        outcome(replaced(tmp_path_factory, written, "sharded", INDEX, data))

    check()


@how_often
def test_values_of_a_safetensors_header(written, tmp_path_factory, often):
    """Overlaps, places outside of the file, and sizes that are not those of shape and dtype."""
    good = (written / "whole" / WHOLE).read_bytes()
    (length,) = struct.unpack_from("<Q", good)
    known, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    known.pop("__metadata__")
    at = st.integers(0, len(data) + 9) | st.sampled_from((2**63, 2**64 - 1, -1))
    entry = st.fixed_dictionaries(
        {},
        optional=dict(
            data_offsets=st.tuples(at, at) | LEAVES,
            shape=st.lists(st.integers(-1, 300) | st.just(2**62), max_size=3) | LEAVES,
            dtype=st.sampled_from(("F32", "F16", "BF16", "I8", "F64", "F4", "X")) | LEAVES,
        ),
    )

    @often
    @given(st.sampled_from(list(known)), entry)
    def check(name, change):
        text = json.dumps(known | {name: known[name] | change}).encode()
        file = struct.pack("<Q", len(text)) + text + data
        path = replaced(tmp_path_factory, written, "whole", WHOLE, file)
        same = all(known[name][key] == json.loads(json.dumps(change[key])) for key in change)
        assert outcome(path) == ("loaded" if same else "refused")

    check()


@how_often
def test_bytes_of_a_gguf_header(written, tmp_path, often):
    good = (written / "tiny.gguf").read_bytes()
    start = min(t.start for t in open_checkpoint(written / "tiny.gguf").header.tensors.values())
    numbers = st.sampled_from((0, 1, 9, 31, 33, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
    words = st.tuples(st.integers(4, start - 9), numbers, st.sampled_from("IQ"))

    def packed(word):
        at, number, code = word
        new = struct.pack("<" + code, number % 2 ** (8 * struct.calcsize(code)))
        return good[:at] + new + good[at + len(new) :]

    @often
    @given(changed(good, start) | words.map(packed))
    def check(data):
        (tmp_path / "x.gguf").write_bytes(data)
        outcome(tmp_path / "x.gguf", tokenizer=True)

    check()
