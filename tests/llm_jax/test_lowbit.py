"""Quantized safetensors: every form against its published layout, number by number."""

import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax.folder import WHOLE
from llm_jax.formats import open_checkpoint
from llm_jax.safetensors_file import DTYPES
from llm_jax.testing import tensors, tiny_config, tiny_params, write_safetensors

CFG = tiny_config("llama", layers=1)
GROUP = 32
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(path, named):
    """A safetensors file; its library writes no 8-bit floats from NumPy."""
    header, data = {}, b""
    for name, array in named.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def word(codes, bits, order=None):
    """Codes as one signed 32-bit word, the first one lowest."""
    order = order or range(len(codes))
    value = sum(int(codes[at]) << (bits * place) for place, at in enumerate(order))
    return value - 2**32 if value >= 2**31 else value


def words(codes, bits, order=None):
    """The last axis packed into words."""
    per = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    return np.array(
        [[word(row[i : i + per], bits, order) for i in range(0, len(row), per)] for row in padded],
        np.int32,
    )


def scales(rng, *shape, dtype=np.float16):
    return rng.uniform(0.01, 0.03, shape).astype(dtype)


def gptq(bits=4, version="gptq", ordered=False):
    def make(rng, out, inputs):
        groups = inputs // GROUP
        q = rng.integers(0, 2**bits, (out, inputs))
        zero = rng.integers(1, 2**bits, (groups, out))
        scale = scales(rng, groups, out)
        index = rng.permutation(inputs) // GROUP if ordered else np.arange(inputs) // GROUP
        dense = np.array(
            [
                [float(scale[g, o]) * (int(q[o, i]) - int(zero[g, o])) for i, g in enumerate(index)]
                for o in range(out)
            ]
        )
        stored = zero - (version == "gptq")
        return {
            "qweight": words(q, bits).T,
            "qzeros": words(stored, bits),
            "scales": scale,
            "g_idx": index.astype(np.int32),
        }, dense

    config = dict(quant_method="gptq", bits=bits, group_size=GROUP, desc_act=ordered)
    return config | dict(checkpoint_format=version, sym=False), make, "GPTQ, "


def awq():
    def make(rng, out, inputs):
        groups = inputs // GROUP
        q, zero = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (groups, out))
        scale = scales(rng, groups, out)
        dense = np.array(
            [
                [
                    float(scale[i // GROUP, o]) * (int(q[i, o]) - int(zero[i // GROUP, o]))
                    for i in range(inputs)
                ]
                for o in range(out)
            ]
        )
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": words(q, 4, order),
            "qzeros": words(zero, 4, order),
            "scales": scale,
        }, dense

    config = dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="GEMM")
    return config, make, "AWQ, 4.6"


def fp8(block=None, name="weight_scale_inv", dtype=np.float32, method="fp8"):
    """block None: a scale for the matrix; "rows": one a row; (a, b): one for each such block."""

    def make(rng, out, inputs):
        stored = rng.normal(0, 8, (out, inputs)).astype(ml_dtypes.float8_e4m3fn)
        rows, columns = (1, inputs) if block == "rows" else block or (out, inputs)
        shape = -(-out // rows), -(-inputs // columns)
        scale = scales(rng, *shape, dtype=np.float32).astype(dtype)
        dense = [
            [float(stored[o, i]) * float(scale[o // rows, i // columns]) for i in range(inputs)]
            for o in range(out)
        ]
        scale = scale if block else scale.reshape(())
        return {"weight": stored, name: scale}, np.array(dense)

    config = dict(quant_method=method)
    config |= dict(weight_block_size=list(block)) if type(block) is tuple else {}
    return config, make, "FP8, 8."


def compressed(kind, bits, strategy, symmetric=True, ordered=False):
    packed = kind == "int" and (bits < 8 or strategy == "group")

    def make(rng, out, inputs):
        span = 2 ** (bits - 1)
        rows, columns = dict(
            tensor=(out, inputs), channel=(1, inputs), group=(1, GROUP), block=(24, 40)
        )[strategy]
        shape = -(-out // rows), -(-inputs // columns)
        scale = scales(rng, *shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
        zero = np.zeros(shape, int) if symmetric else rng.integers(-span, span, shape)
        order = np.arange(inputs) // columns
        parts = {"weight_scale": scale.reshape(1) if strategy == "tensor" else scale}
        if ordered:
            order = rng.permutation(order)
            parts["weight_g_idx"] = order.astype(np.int32)
        if kind == "float":
            parts["weight"] = q = rng.normal(0, 8, (out, inputs)).astype(ml_dtypes.float8_e4m3fn)
        else:
            q = rng.integers(-span, span, (out, inputs))
            parts |= {"weight": q.astype(np.int8)}
        if packed:
            del parts["weight"]
            parts["weight_packed"] = words(q + span, bits)
            parts["weight_shape"] = np.array([out, inputs])
        if not symmetric:
            stored = words((zero + span).T, bits).T if packed else zero.astype(np.int8)
            parts["weight_zero_point"] = np.ascontiguousarray(stored)
        dense = [
            [
                float(scale[o // rows, order[i]])
                * (float(q[o, i]) - int(zero[o // rows, order[i]]))
                for i in range(inputs)
            ]
            for o in range(out)
        ]
        return parts, np.array(dense)

    weights = dict(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric)
    weights |= dict(group_size=GROUP) if strategy == "group" else {}
    weights |= dict(block_structure=[24, 40]) if strategy == "block" else {}
    form = "pack-quantized" if packed else f"{kind}-quantized"
    config = dict(quant_method="compressed-tensors", format=form, ignore=["lm_head"])
    config |= dict(config_groups=dict(group_0=dict(weights=weights, targets=["Linear"])))
    return config, make, f"{'FP' if kind == 'float' else 'INT'}{bits}, "


def mxfp4():
    def make(rng, out, inputs):
        codes = rng.integers(0, 16, (out, inputs))
        power = rng.integers(115, 127, (out, inputs // 32)).astype(np.uint8)
        number = lambda c: E2M1[c % 8] * (-1 if c > 7 else 1)
        dense = [
            [number(codes[o, i]) * 2.0 ** (int(power[o, i // 32]) - 127) for i in range(inputs)]
            for o in range(out)
        ]
        blocks = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
        return {
            "weight_blocks": blocks.reshape(out, -1, 16),
            "weight_scales": power,
        }, np.array(dense)

    return dict(quant_method="mxfp4"), make, "MXFP4, 4.25 bits"


def nf4(kind="nf4", nested=True, size=64):
    def make(rng, out, inputs):
        codes = rng.integers(0, 16, out * inputs)
        table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        blocks = -(-codes.size // size)
        state = dict(quant_type=kind, blocksize=size, dtype="bfloat16", shape=[out, inputs])
        parts = {"weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]}
        parts["weight.quant_map"] = table
        largest = scales(rng, blocks, dtype=np.float32)
        if nested:
            state |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=0.25)
            outer, level = scales(rng, -(-blocks // 256), dtype=np.float32), rng.random(256)
            level, at = level.astype(np.float32), rng.integers(0, 256, blocks).astype(np.uint8)
            parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": level}
            parts["weight.absmax"] = at
            each = [level[at[b]] * outer[b // 256] + np.float32(0.25) for b in range(blocks)]
            largest = np.array(each, np.float32)
        else:
            parts["weight.absmax"] = largest
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
        dense = [float(table[c]) * float(largest[i // size]) for i, c in enumerate(codes)]
        return parts, np.array(dense).reshape(out, inputs)

    return dict(quant_method="bitsandbytes", load_in_4bit=True), make, kind.upper()


def llm_int8():
    def make(rng, out, inputs):
        q, largest = rng.integers(-127, 128, (out, inputs)), scales(rng, out, dtype=np.float32)
        dense = np.array([[np.float32(v) * s for v in row] for row, s in zip(q, largest)])
        parts = {"weight": q.astype(np.int8), "SCB": largest}
        return parts | {"weight_format": np.zeros((), np.uint8)}, dense * np.float32(1 / 127)

    return dict(quant_method="bitsandbytes", load_in_8bit=True), make, "LLM.int8, 8."


FORMS = {
    "gptq": gptq(),
    "gptq 8 bits": gptq(8),
    "gptq 2 bits": gptq(2),
    "gptq of the second version": gptq(4, "gptq_v2"),
    "gptq in another order": gptq(4, ordered=True),
    "awq": awq(),
    "fp8 blocks": fp8((24, 40)),
    "fp8 blocks of powers of two": fp8((24, 40), dtype=ml_dtypes.float8_e8m0fnu),
    "fp8 whole": fp8(),
    "fp8 whole, another name": fp8(name="weight_scale"),
    "fp8 rows": fp8("rows", "weight_scale", method="fbgemm_fp8"),
    "compressed fp8 whole": compressed("float", 8, "tensor"),
    "compressed fp8 rows": compressed("float", 8, "channel"),
    "compressed fp8 blocks": compressed("float", 8, "block"),
    "compressed int8 rows": compressed("int", 8, "channel"),
    "compressed int8 with zeros": compressed("int", 8, "channel", symmetric=False),
    "compressed int4 groups": compressed("int", 4, "group"),
    "compressed int4 with zeros": compressed("int", 4, "group", symmetric=False),
    "compressed int4 in another order": compressed("int", 4, "group", False, ordered=True),
    "compressed int8 groups": compressed("int", 8, "group"),
    "compressed int4 rows": compressed("int", 4, "channel"),
    "mxfp4": mxfp4(),
    "nf4": nf4(),
    "fp4, one level": nf4("fp4", nested=False, size=128),
    "int8 of bitsandbytes": llm_int8(),
}


def write(folder, config, make, cfg=CFG):
    """A tiny model whose layers have matrices of that form; (the folder, dense by name)."""
    rng = np.random.default_rng(3)
    write_safetensors(folder, tiny_params(cfg), cfg, tokenizer=False)
    named, dense = tensors(tiny_params(cfg), cfg, open_checkpoint(folder).names), {}
    for name in [n for n in named if n.endswith("_proj.weight")]:
        parts, dense[name] = make(rng, *named.pop(name).shape)
        named |= {name.removesuffix("weight") + suffix: array for suffix, array in parts.items()}
    save(folder / WHOLE, named)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | dict(quantization_config=config)))
    return folder, dense


@pytest.mark.parametrize("form", FORMS)
def test_each_weight_is_what_its_layout_says(tmp_path, monkeypatch, form):
    monkeypatch.setattr(checkpoint, "_ROWS", 7)  # blocks of rows begin inside of words
    config, make, told = FORMS[form]
    folder, dense = write(tmp_path / "model", config, make)
    found = open_checkpoint(folder)
    assert found.config("float32") == CFG
    found.check(CFG)
    assert len(dense) == 7
    for name, want in dense.items():
        field = name.split(".")[-2].removesuffix("_proj")
        got = found.read(field, CFG, 0).T
        np.testing.assert_array_equal(got, want.astype(np.float32), strict=True)
    (line,) = found.notices(CFG)
    assert line.startswith(f"stored as {told}")
    assert line.endswith(
        "(7 matrices): the target is the model that they dequantize to, in float32"
    )


def test_a_weight_is_rounded_once(tmp_path):
    config, make, _ = FORMS["awq"]
    folder, dense = write(tmp_path / "model", config, make)
    got = open_checkpoint(folder).layer(0, tiny_config("llama", layers=1, dtype="bfloat16"))
    want = dense["model.layers.0.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.mlp.up.T, want, strict=True)


def test_experts_are_turned_to_inputs_first(tmp_path):
    """[expert, out, groups, 16] bytes are [expert, in, out] numbers, as transformers has them."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 2, 16)).astype(np.uint8)
    power = rng.integers(120, 130, (3, 5, 2)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder, _ = write(tmp_path / "model", *FORMS["mxfp4"][:2])
    save(folder / WHOLE, {f"{name}_blocks": blocks, f"{name}_scales": power})
    found = open_checkpoint(folder)
    tensor = found.contents.tensors[name]
    assert tensor.shape == (3, 64, 5)
    got = found.reader(tensor, "", CFG)(1, 3)
    for e, i, o in ((1, 0, 0), (1, 33, 4), (2, 63, 3), (2, 2, 1)):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        want = math.copysign(E2M1[code % 8], -1 if code > 7 else 1)
        assert got[e - 1, i, o] == want * 2.0 ** (int(power[e, o, i // 32]) - 127)
