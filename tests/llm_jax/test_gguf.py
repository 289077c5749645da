"""GGUF files: a round trip for every family and type, and a clear message for every broken file."""

import dataclasses
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax import CheckpointError, LLMError, testing
from llm_jax.attention import rope_frequencies
from llm_jax.formats import open_checkpoint
from llm_jax.gguf import GGUF
from llm_jax.rope import Llama3Rope
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors

gguf = pytest.importorskip("gguf", reason="the gguf package writes the files under test")


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def cfg():
    return tiny_config("llama", layers=1)


@pytest.fixture
def path(tmp_path, cfg):
    return write_gguf(tmp_path / "tiny.gguf", tiny_params(cfg), cfg)


@pytest.mark.parametrize("family", testing.TINY_FAMILIES)
@pytest.mark.parametrize("tied", (False, True))
def test_what_is_written_is_what_is_loaded(tmp_path, family, tied):
    cfg = tiny_config(family, tied=tied)
    params = tiny_params(cfg)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", params, cfg))
    family = "llama" if family == "mistral" else cfg.family
    assert checkpoint.config("float32") == dataclasses.replace(cfg, family=family)
    assert checkpoint.config().dtype == "bfloat16"
    assert_same(checkpoint.load(cfg), params)


def test_a_folder_with_one_file_is_that_file(path, cfg):
    assert open_checkpoint(path.parent) == GGUF(path)


def test_llama_rows_of_q_and_k_are_interleaved_in_the_file(path, cfg):
    raw = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    layer = open_checkpoint(path).load(cfg).layers[0]
    half = cfg.head_dim // 2
    for name, ours in (("q", layer.attn.q), ("k", layer.attn.k)):
        stored = raw[f"blk.0.attn_{name}.weight"]
        for row, head, i in ((0, 0, 0), (2, 0, 1), (1, 0, half), (cfg.head_dim + 3, 1, half + 1)):
            np.testing.assert_array_equal(stored[row], ours[:, head * cfg.head_dim + i])
    np.testing.assert_array_equal(raw["blk.0.attn_v.weight"], layer.attn.v.T)


def test_qwen_rows_are_not_interleaved(tmp_path):
    cfg = tiny_config("qwen2", layers=1)
    path = write_gguf(tmp_path / "x.gguf", tiny_params(cfg), cfg)
    raw = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    layer = open_checkpoint(path).load(cfg).layers[0]
    np.testing.assert_array_equal(raw["blk.0.attn_q.weight"], layer.attn.q.T)


ERROR = {
    # type -> largest error allowed, as a share of the largest weight of a block of 32
    "F32": 0.0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 1 / 254 + 2**-10,
    "Q5_0": 1 / 16 + 2**-10,
    "Q5_1": 1 / 31 + 2**-9,
    "Q4_0": 1 / 8 + 2**-10,
    "Q4_1": 1 / 15 + 2**-9,
}


@pytest.mark.parametrize("quant", ERROR)
def test_quantized_weights_are_close(tmp_path, quant):
    cfg = tiny_config("llama")
    params = tiny_params(cfg)
    path = write_gguf(tmp_path / "x.gguf", params, cfg, quant)
    stored = open_checkpoint(path).contents.tensors["blk.1.ffn_down.weight"]
    assert stored.dtype == quant
    loaded = open_checkpoint(path).load(cfg)
    for name in ("q", "o"):
        want = np.asarray(getattr(params.layers[1].attn, name)).T.reshape(-1, 32)
        got = np.asarray(getattr(loaded.layers[1].attn, name)).T.reshape(-1, 32)
        limit = ERROR[quant] * np.abs(want).max(axis=1, keepdims=True)
        assert np.all(np.abs(got - want) <= limit + 1e-7)
    assert quant == "F32" or np.any(loaded.layers[0].attn.q != params.layers[0].attn.q)


def finite_blocks(kind, rows, rng):
    """Random blocks, one a row, that dequantize to finite numbers; and those numbers."""
    kind = gguf.GGMLQuantizationType[kind]
    size, count = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, count), np.uint8)
    with np.errstate(all="ignore"):
        while (bad := ~np.isfinite(want := gguf.dequantize(blocks, kind)).all(axis=1)).any():
            blocks[bad] = rng.integers(0, 256, (bad.sum(), count), np.uint8)
    assert want.shape == (rows, size)
    return blocks, want


@pytest.mark.parametrize("kind", sorted(GGUF.low_bit))
def test_every_type_that_gguf_dequantizes_is_read(tmp_path, kind):
    """No writer for most of these is at hand: random blocks, against one dequantization of all."""
    size, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    cfg = tiny_config("qwen3", layers=1, d_model=max(size, 64), vocab=600)
    blocks, want = finite_blocks(kind, 600 * cfg.d_model // size, np.random.default_rng(0))
    table = blocks.reshape(600, -1)
    found = open_checkpoint(write_with(tmp_path, cfg, {"token_embd.weight": (table, kind)}))
    np.testing.assert_array_equal(found.load(cfg).embed_VD, want.reshape(600, -1))
    (line,) = found.notices(cfg)
    assert line.startswith(f"stored as {kind}, {8 * count / size:.2f} bits a weight (1 matrices):")


def test_no_type_that_gguf_dequantizes_is_forgotten():
    known = {kind.name for kind in gguf.quants._type_traits} - {"BF16"}
    assert GGUF.low_bit >= known


@pytest.mark.parametrize(
    ("kind", "levels", "width"),
    (
        ("MXFP4", (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), 1),
        ("IQ4_NL", (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), 2),
    ),
)
def test_four_bit_tables_are_those_of_ggml(tmp_path, kind, levels, width):
    """A scale, then 16 bytes: the first half of a block low, the second half high."""
    cfg = tiny_config("qwen3", layers=1)
    blocks, _ = finite_blocks(kind, 576, np.random.default_rng(1))
    if kind == "MXFP4":
        blocks[:, 0] = 100 + blocks[:, 0] % 50
    path = write_with(tmp_path, cfg, {"token_embd.weight": (blocks.reshape(288, -1), kind)})
    got = open_checkpoint(path).load(cfg).embed_VD.reshape(-1, 32)
    for b, i in ((0, 0), (0, 17), (575, 31), (300, 15), (301, 16)):
        byte = int(blocks[b, width + i % 16])
        level = levels[byte & 15 if i < 16 else byte >> 4]
        scale = 2.0 ** (int(blocks[b, 0]) - 128)
        if kind == "IQ4_NL":
            scale = float(blocks[b, :2].copy().view(np.float16)[0])
        assert got[b, i] == np.float32(level * scale)


def write_with(folder, cfg, tensors, metadata=None) -> Path:
    """A tiny GGUF file with some tensors (name -> (bytes, type)) and metadata replaced."""
    original = gguf.GGUFReader(write_gguf(folder / "base.gguf", tiny_params(cfg), cfg))
    path = folder / "changed.gguf"
    arch = original.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, (metadata or {}).get("general.architecture", arch))
    for name, field in original.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = (metadata or {}).get(name, field.contents())
        if value is not None:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else field.types[0]
            writer.add_key_value(name, value, kind, sub or (field.types[0] if kind == 9 else None))
    for name, (value, kind) in (metadata or {}).get("new", {}).items():
        writer.add_key_value(name, value, kind)
    for tensor in original.tensors:
        data, kind = tensors.get(tensor.name, (tensor.data, tensor.tensor_type.name))
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, (data, kind) in tensors.items():
        if name not in {tensor.name for tensor in original.tensors}:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_is_what_gguf_reads(path):
    reader = gguf.GGUFReader(path)
    header = GGUF(path).header
    want = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == want
    assert {t.name: t.data_offset for t in reader.tensors} == {
        t.name: t.start for t in header.tensors.values()
    }


@pytest.mark.parametrize("factor", (8.0, 32.0))
def test_llama3_rope_scaling_is_recovered(tmp_path, factor):
    scaling = Llama3Rope(factor, 1.0, 4.0, 8192)
    cfg = tiny_config("llama3", rope_scaling=scaling)
    path = write_gguf(tmp_path / "x.gguf", tiny_params(cfg), cfg)
    assert open_checkpoint(path).config().rope_scaling == scaling


def test_rope_divisors_of_one_are_no_scaling(tmp_path):
    cfg = tiny_config("llama")
    ones = np.ones(cfg.head_dim // 2, np.float32)
    path = write_with(tmp_path, cfg, {"rope_freqs.weight": (ones, "F32")})
    assert open_checkpoint(path).config("float32") == cfg


def test_unknown_rope_scaling_is_refused(tmp_path):
    cfg = tiny_config("llama3", rope_scaling=Llama3Rope(16.0, 1.0, 4.0, 8192))
    path = write_gguf(tmp_path / "x.gguf", tiny_params(cfg), cfg)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not Llama 3.1's"):
        open_checkpoint(path).config()


def test_rope_divisors_of_another_head_size_are_refused(tmp_path, cfg):
    path = write_with(tmp_path, cfg, {"rope_freqs.weight": (np.ones(5, np.float32), "F32")})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not Llama 3.1's"):
        open_checkpoint(path).config()


STRING, UINT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
FLOAT, BOOL = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.BOOL


def new(key, value, kind):
    return {"new": {key: (value, kind)}}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    (
        (
            {"general.architecture": "mamba"},
            "architecture is 'mamba'; supported are llama, qwen2",
        ),
        (
            {"llama.block_count": None, "llama.embedding_length": None},
            "lacks llama.block_count, llama",
        ),
        ({"llama.attention.head_count_kv": [2, 1]}, "kv_heads differs from layer to layer"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads cannot share 3 kv heads"),
        ({"llama.rope.dimension_count": 7}, "rotary_dim is 7; rotary positions need an even one"),
        ({"llama.rope.dimension_count": 18}, "rotary_dim is 18; expected a whole number from 2"),
        (new("llama.rope.scaling.type", "ntk", STRING), "rope scaling 'ntk' is not supported"),
        (new("llama.rope.scaling.type", "linear", STRING), "scaling.factor is None; expected a"),
        (new("llama.rope.scaling.factor", 0.5, FLOAT), "scaling.factor is 0.5; expected a number"),
        (new("llama.rope.scale_linear", np.nan, FLOAT), "scale_linear is nan; expected a number"),
        (
            {
                "new": {
                    "llama.rope.scaling.attn_factor": (2.0, FLOAT),
                    "llama.rope.scaling.factor": (4.0, FLOAT),
                }
            },
            "attn_factor is 2.0; expected 1",
        ),
        (new("llama.expert_count", 8, UINT), "llama.expert_used_count is missing"),
        (new("llama.attention.causal", False, BOOL), "causal is False; expected true"),
        (new("llama.attention.scale", 0.5, FLOAT), "attention.scale is 0.5; expected none"),
        (
            new("llama.vocab_size", 300, UINT),
            "vocab_size is 300; expected 288, the rows of the emb",
        ),
        ({"llama.attention.value_length": 8}, "value_length is 8; expected 16, the length of a"),
        ({"llama.block_count": 10**9}, "block_count is 1000000000; expected a whole number from 1"),
        ({"llama.block_count": 0}, "block_count is 0; expected a whole number from 1"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base is inf; expected a number from 1 to"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon is nan; expected"),
        (new("general.type", "adapter", STRING), "holds no model: its general.type is 'adapter'"),
        (new("general.type", 1, UINT), "general.type is 1; expected a string"),
        (new("split.count", 2, UINT), "is one of 2 parts of a split file, and is not called so"),
    ),
)
def test_models_that_cannot_be_run_are_refused(tmp_path, cfg, metadata, expected):
    path = write_with(tmp_path, cfg, {}, metadata)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).config()
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    (
        new("llama.rope.scaling.type", "none", STRING),
        new("llama.rope.scaling.factor", 1.0, FLOAT),
        new("llama.rope.scale_linear", 0.0, FLOAT),
        new("llama.vocab_size", 288, UINT),
        new("split.count", 1, UINT),
    ),
)
def test_values_that_change_nothing(tmp_path, cfg, metadata):
    assert open_checkpoint(write_with(tmp_path, cfg, {}, metadata)).config("float32") == cfg


@pytest.mark.parametrize(
    "metadata",
    (
        {"rope.scale_linear": 4.0},  # the key of old files
        {"rope.scaling.factor": 4.0},  # linear, where no type is stated
        {"rope.scaling.factor": 4.0, "rope.scaling.type": "linear"},
        {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},  # the new key counts
    ),
)
def test_linear_rope_scaling_is_that_of_llama_cpp(tmp_path, cfg, metadata):
    kinds = {str: STRING, float: FLOAT}
    stated = {"llama." + key: (value, kinds[type(value)]) for key, value in metadata.items()}
    found = open_checkpoint(write_with(tmp_path, cfg, {}, {"new": stated})).config("float32")
    slower = rope_frequencies(cfg) / np.float32(4)
    np.testing.assert_allclose(rope_frequencies(found), slower, rtol=1e-6)
    assert dataclasses.replace(found, rope_scaling=None) == cfg


ggml = "tokenizer.ggml."


@pytest.mark.parametrize(
    ("metadata", "expected"),
    (
        ({f"{ggml}eos_token_id": 288}, "eos_token_id has 288; expected an id below 282"),
        (
            new(f"{ggml}bos_token_id", 10**6, UINT),
            "bos_token_id has 1000000; expected an id below 282",
        ),
        (
            {f"{ggml}tokens": ["a", "a"], f"{ggml}token_type": None},
            "tokens has 'a'; expected every token once",
        ),
        ({f"{ggml}token_type": [1]}, "token_type has 1; expected as many entries as there are"),
        ({f"{ggml}merges": ["ab"]}, "the tokenizer in"),
        ({f"{ggml}merges": ["q qqq"]}, "cannot be read: Error while initializing BPE"),
        ({f"{ggml}model": "bert"}, "tokenizer model is 'bert'; supported are gpt2, llama"),
    ),
)
def test_tokenizers_that_do_not_fit_are_refused(tmp_path, cfg, metadata, expected):
    path = write_with(tmp_path, cfg, {}, metadata)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).tokenizer()
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows(tmp_path, cfg):
    tokens = [*(f"t{i}" for i in range(287)), "a", "b"]
    metadata = {f"{ggml}tokens": tokens, f"{ggml}token_type": None, f"{ggml}merges": None}
    path = write_with(tmp_path, cfg, {}, metadata)
    tokenizer = open_checkpoint(path).tokenizer()
    assert tokenizer.encode("aa") == [287, 287]
    with pytest.raises(LLMError, match="the token 'b', whose id is 288, and the embedding table"):
        tokenizer.encode("ab")


def test_of_very_many_problems_the_first_are_listed(tmp_path, cfg):
    names = [f"blk.{i}.{part}.weight" for i in (0, 9) for part in ("ffn_up", "ffn_gate",
             "ffn_down", "attn_q", "attn_k", "attn_v", "attn_output")]  # fmt: skip
    path = write_with(tmp_path, cfg, dict.fromkeys(names, (np.zeros(7, np.float32), "F32")))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).check(cfg)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} cannot be loaded, 14 problems:"
    assert len(lines) == 12 and lines[-1] == "  and 4 more"


def test_every_problem_with_tensors_is_listed_at_once(tmp_path, cfg):
    changes = {
        "blk.0.ffn_up.weight": (None, "F32"),
        "blk.0.attn_norm.weight": (np.zeros(7, np.float32), "F32"),
        "blk.0.ffn_gate.weight": (np.zeros((96, 64), np.int8), "I8"),
        "blk.9.ffn_norm.weight": (np.zeros(64, np.float32), "F32"),
    }
    path = write_with(tmp_path, cfg, changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).check(cfg)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} cannot be loaded, 4 problems:"
    assert "  changed.gguf: blk.0.ffn_up.weight is missing" in lines
    assert "  changed.gguf: blk.0.attn_norm.weight has shape [7]; expected [64]" in lines
    assert any(
        "blk.0.ffn_gate.weight is stored as I8; supported are BF16" in line for line in lines
    )
    assert "  changed.gguf: blk.9.ffn_norm.weight is not part of this model" in lines


def test_a_type_unknown_to_gguf_is_named(path, cfg):
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the dimension count and two dimensions
    assert struct.unpack_from("<I", data, at) == (0,)
    struct.pack_into("<I", data, at, 250)
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"blk.0.ffn_up.weight is stored as type 250; supported"
    ):
        open_checkpoint(path).check(cfg)


@pytest.mark.parametrize("keep", (5, 40, 500, 3000))
def test_a_file_cut_in_its_header(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is truncated or corrupt: its header cannot be read"):
        open_checkpoint(path).config()


def test_a_file_cut_in_its_tensors(path, cfg):
    path.write_bytes(path.read_bytes()[:-1000])
    assert open_checkpoint(path).config("float32") == cfg
    with pytest.raises(
        CheckpointError, match=r"tiny.gguf is truncated: .* ends at byte [\d,]+ and"
    ):
        open_checkpoint(path).load(cfg)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_header_never_ends_in_a_traceback(path, cfg, seed):
    """Random bytes in the header: either it still loads, or the one error the user is shown."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(4, 2000, 3):
        data[at] = rng.integers(0, 256)
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.check(checkpoint.config())
    except CheckpointError:
        pass


def test_files_that_are_not_gguf(path, tmp_path):
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tiny.gguf is empty"):
        open_checkpoint(path).config()
    path.write_bytes(b"<html>no such file</html>")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_checkpoint(path).config()
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(99))
    with pytest.raises(CheckpointError, match="is GGUF version 1; supported are 2 and 3"):
        open_checkpoint(path).config()


def test_both_formats_hold_the_same_model(tmp_path):
    cfg = tiny_config("llama3", tied=True, dtype="bfloat16")
    params = tiny_params(cfg)
    one = open_checkpoint(write_gguf(tmp_path / "x.gguf", params, cfg))
    two = open_checkpoint(write_safetensors(tmp_path / "folder", params, cfg))
    assert one.config() == two.config()
    assert_same(one.load(cfg), two.load(cfg))
    messages = [dict(role="user", content="the cat")]
    assert one.tokenizer().chat(messages) == two.tokenizer().chat(messages)
