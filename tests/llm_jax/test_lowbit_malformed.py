"""Quantized safetensors whose parts are missing, do not fit, or are not known: each is named."""

import json
import struct

import numpy as np
import pytest
from test_lowbit import CFG, FORMS, save, write

from llm_jax import CheckpointError
from llm_jax.folder import WHOLE
from llm_jax.formats import open_checkpoint
from llm_jax.safetensors_file import DTYPES

UP = "model.layers.0.mlp.up_proj."


def changed(folder, **changes):
    """The file with tensors of the up projection replaced, or without them where None is given."""
    data = (folder / WHOLE).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    named = {}
    for name, about in json.loads(data[8 : 8 + length]).items():
        begin, end = about["data_offsets"]
        raw = np.frombuffer(data[8 + length + begin : 8 + length + end], DTYPES[about["dtype"]])
        named[name] = raw.reshape(about["shape"])
    dots = lambda name: name.replace("___", ":").replace("__", ".").replace(":", "__")
    named |= {UP + dots(name): array for name, array in changes.items()}
    save(folder / WHOLE, {name: array for name, array in named.items() if array is not None})


I32 = lambda *shape: np.zeros(shape, np.int32)
F16 = lambda *shape: np.ones(shape, np.float16)


@pytest.mark.parametrize(
    ("form", "changes", "expected"),
    (
        ("gptq", dict(scales=None), "scales is missing"),
        ("gptq", dict(qzeros=None), "qzeros is missing"),
        ("gptq in another order", dict(g_idx=None), "g_idx is missing"),
        ("gptq", dict(scales=F16(3, 96)), "scales has shape [3, 96]; expected [2, 96]"),
        ("gptq", dict(qzeros=I32(2, 9)), "qzeros has shape [2, 9]; expected [2, 12]"),
        ("gptq", dict(qweight=F16(8, 96)), "qweight is stored as F16; expected I32"),
        ("gptq", dict(g_idx=I32(63)), "g_idx has shape [63]; expected [64]"),
        ("gptq", dict(weight=F16(96, 64)), "up_proj.weight is there in two forms"),
        ("gptq 8 bits", dict(qweight=I32(8, 96)), "qzeros has shape [2, 24]; expected [1, 24]"),
        ("awq", dict(scales=None), "scales is missing"),
        ("awq", dict(qzeros=I32(2, 11)), "qzeros has shape [2, 11]; expected [2, 12]"),
        ("fp8 blocks", dict(weight_scale_inv=None), "weight_scale_inv is missing"),
        (
            "fp8 blocks",
            dict(weight_scale_inv=np.ones((4, 3), np.float32)),
            "has shape [4, 3]; expected [4, 2], a scale for 24 x 40 weights",
        ),
        ("fp8 whole", dict(weight_scale_inv=np.ones(95, np.float32)), "one scale, or 96, one a"),
        ("compressed int4 groups", dict(weight_scale=None), "weight_scale is missing"),
        ("compressed int4 groups", dict(weight_shape=None), "weight_shape is missing"),
        ("compressed int4 groups", dict(weight_shape=np.array([96, 72])), "these weights in 4 bit"),
        ("compressed int4 groups", dict(weight_shape=np.array([96, -8])), "these weights in 4 bit"),
        ("compressed int4 with zeros", dict(weight_zero_point=None), "weight_zero_point is missi"),
        ("compressed int8 rows", dict(weight_scale=F16(2, 48)), "expected one scale, or 96, one"),
        ("mxfp4", dict(weight_scales=None), "weight_scales is missing"),
        ("mxfp4", dict(weight_scales=np.zeros((96, 3), np.uint8)), "shape [96, 3]; expected [96"),
        ("nf4", dict(weight__absmax=None), "weight.absmax is missing"),
        ("nf4", dict(weight__nested_absmax=None), "weight.nested_absmax is missing"),
        ("nf4", dict(weight=np.zeros(9, np.uint8)), "has 9 bytes; expected half of the 6,144 wei"),
        ("int8 of bitsandbytes", dict(SCB=np.ones(9, np.float32)), "SCB has shape [9]; expected"),
    ),
)  # fmt: skip
def test_parts_that_are_missing_or_do_not_fit_are_named(tmp_path, form, changes, expected):
    folder, _ = write(tmp_path / "model", *FORMS[form][:2])
    changed(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check(CFG)
    title, line, *more = str(caught.value).splitlines()
    assert title.endswith("1 problem:") and not more
    assert line.startswith("  model.safetensors: model.layers.0.mlp.up_proj.weight cannot be deq")
    assert expected in line


@pytest.mark.parametrize(
    ("state", "expected"),
    (
        (b"[1]", "holds list, not an object"),
        (b"{", "is not valid JSON"),
        (b"\xff" * 5, "is not valid JSON"),
        (b" " * 70_000, "70,000 bytes; expected at most 65,536"),
        (b'{"quant_type": "fp4"}', "quant_type is 'fp4'; expected nf4 or fp4, as the name says"),
        (b'{"quant_type": "nf4", "shape": [2]}', "shape is [2]; expected two lengths"),
        (b'{"quant_type": "nf4", "shape": [96, 0]}', "shape is [96, 0]; expected two lengths"),
        (
            b'{"quant_type": "nf4", "shape": [96, 64], "blocksize": 0}',
            "blocksize is 0; expected a whole",
        ),
    ),
)
def test_a_broken_description_of_a_weight(tmp_path, state, expected):
    folder, _ = write(tmp_path / "model", *FORMS["nf4"][:2])
    changed(folder, weight__quant_state__bitsandbytes___nf4=np.frombuffer(state, np.uint8))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check(CFG)
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", (-1, 2))
def test_groups_that_do_not_exist(tmp_path, value):
    folder, _ = write(tmp_path / "model", *FORMS["gptq"][:2])
    index = np.zeros(64, np.int32)
    index[5] = value
    changed(folder, g_idx=index)
    with pytest.raises(CheckpointError, match=r"g_idx names the group .*; expected 0 to 1"):
        open_checkpoint(folder).load(CFG)


def test_scales_that_are_not_finite(tmp_path):
    folder, _ = write(tmp_path / "model", *FORMS["mxfp4"][:2])
    changed(folder, weight_scales=np.full((96, 2), 255, np.uint8))
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds NaN or infinity"):
        open_checkpoint(folder).load(CFG)


G = dict(quant_method="gptq", bits=4, group_size=32)
C = dict(quant_method="compressed-tensors", format="pack-quantized")
group = lambda **weights: dict(group_0=dict(weights=dict(num_bits=4, type="int") | weights))


@pytest.mark.parametrize(
    ("config", "expected"),
    (
        ([], "quantization_config is []; expected an object"),
        (dict(bits=4), "quant_method is None; expected one of awq, bitsandbytes"),
        (dict(quant_method="aqlm"), "quant_method is 'aqlm'; expected one of awq, bitsandbytes"),
        (G | dict(bits=3), "bits is 3; expected 2, 4 or 8"),
        (G | dict(bits="4"), "bits is '4'; expected a whole number"),
        (G | dict(group_size=0), "group_size is 0; expected -1 (all inputs), or"),
        (dict(quant_method="gptq", bits=4), "group_size is missing"),
        (G | dict(checkpoint_format="marlin"), "checkpoint_format is 'marlin'; expected gptq or"),
        (G | dict(format="marlin"), "quantization_config.format is 'marlin'; expected gptq or"),
        (dict(quant_method="awq", bits=4, group_size=128, version="gemv"), "version is 'gemv'; ex"),
        (dict(quant_method="fp8", weight_block_size=[128]), "weight_block_size is [128]; expected"),
        (dict(quant_method="fp8", weight_block_size=[0, 1]), "weight_block_size is [0, 1]; expec"),
        (C | dict(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'; expected one"),
        (C, "config_groups is None; expected an object"),
        (C | dict(config_groups=group(num_bits=3)), "num_bits is 3; expected 8 for floats; 2, 4"),
        (C | dict(config_groups=group(type="float")), "num_bits is 4; expected 8 for floats; 2, 4"),
        (C | dict(config_groups=group(strategy="token")), "strategy is 'token'; expected tensor"),
        (C | dict(config_groups=group(strategy="group")), "group_size is None; expected a number"),
        (C | dict(config_groups=group(group_size=0)), "group_size is 0; expected -1"),
        (
            C | dict(config_groups=group(), transform_config=dict(config_groups=dict(a=1))),
            "transform_config is {'config_groups': {'a': 1}}; expected none",
        ),
    ),
)  # fmt: skip
def test_configurations_that_are_not_known_are_refused(tmp_path, config, expected):
    folder, _ = write(tmp_path / "model", config, FORMS["gptq"][1])
    if config == []:  # an empty list counts as none
        config = [1]
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"] = config
        (folder / "config.json").write_text(json.dumps(described))
        expected = "quantization_config is [1]; expected an object"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).config()
    assert str(caught.value).startswith(f"{folder / 'config.json'}: quantization_config")
    assert expected in str(caught.value)


def test_the_digest_knows_what_the_bytes_mean(tmp_path):
    one, _ = write(tmp_path / "one", *FORMS["gptq"][:2])
    two, _ = write(tmp_path / "two", *FORMS["gptq"][:2])
    assert open_checkpoint(one).digest() == open_checkpoint(two).digest()
    described = json.loads((two / "config.json").read_text())
    described["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (two / "config.json").write_text(json.dumps(described))
    assert open_checkpoint(one).digest() != open_checkpoint(two).digest()


@pytest.mark.parametrize("value", (0, 1))
def test_biases_that_gptq_adds_are_left_out_if_they_are_zero(tmp_path, value):
    folder, _ = write(tmp_path / "model", *FORMS["gptq"][:2])
    changed(folder, bias=np.full(96, value, np.float16))
    found = open_checkpoint(folder)
    if value:
        with pytest.raises(CheckpointError, match=r"up_proj.bias is not part of this model"):
            found.check(CFG)
    else:
        found.check(CFG)
        assert found.left_out(CFG) == {f"{UP}bias": "biases of zero"}
