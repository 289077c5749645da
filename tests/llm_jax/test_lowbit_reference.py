"""Quantized safetensors against the libraries that write them, on torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_families import saved

from llm_jax.attention import caches_for, causal_step
from llm_jax.folder import WHOLE
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.model import forward
from llm_jax.mxfp4 import mxfp4_bytes
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.load import load_target
from subspec_jax.plan import make_plan
from subspec_jax.propose import ModelDraft
from subspec_jax.residual.convert import convert
from subspec_jax.residual.tensor_file import ResidualError
from subspec_jax.sources import find_source
from subspec_jax.tree import TreeSpec

torch = pytest.importorskip("torch", reason="the reference runs on torch")
safetensors = pytest.importorskip("safetensors.torch")
save_file = safetensors.save_file
CFG = tiny_config("llama", layers=1)
pytestmark = pytest.mark.reference

NAME = "model.layers.0.mlp.up_proj"


def dequantized(folder, config, parts, name=f"{NAME}.weight"):
    """What the checkpoint reads, in float32, of parts given as torch tensors."""
    write_safetensors(folder, tiny_params(CFG), CFG, tokenizer=False)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | dict(quantization_config=config)))
    save_file({f"{NAME}.{key}": value for key, value in parts.items()}, folder / WHOLE)
    found = open_checkpoint(folder)
    assert not found.contents.problems
    tensor = found.contents.tensors[name]
    return found.reader(tensor, "", CFG)(0, tensor.shape[0]), tensor


def test_fp8_blocks_as_transformers_dequantizes_them(tmp_path):
    reference = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) / 50
    config = dict(quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    got, _ = dequantized(tmp_path, config, dict(weight=weight, weight_scale_inv=scale))
    want = reference.Fp8Dequantize(None)._dequantize_one(weight, scale)
    np.testing.assert_array_equal(got, want.numpy(), strict=True)


def test_mxfp4_as_transformers_dequantizes_it(tmp_path):
    reference = pytest.importorskip("transformers.integrations.mxfp4")
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 4), dtype=torch.uint8)
    parts = dict(gate_up_proj_blocks=blocks, gate_up_proj_scales=scales)
    got, _ = dequantized(tmp_path, dict(quant_method="mxfp4"), parts, name=f"{NAME}.gate_up_proj")
    want = reference.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    np.testing.assert_array_equal(got, want.numpy(), strict=True)


@pytest.mark.parametrize(
    ("form", "weights"),
    (
        ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
        ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
        ("float-quantized", dict(type="float", strategy="block", block_structure=[128, 128])),
        ("int-quantized", dict(num_bits=8, type="int", strategy="channel")),
        ("int-quantized", dict(num_bits=8, type="int", strategy="tensor", symmetric=False)),
        ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=64)),
        ("pack-quantized", dict(num_bits=4, strategy="group", group_size=64, symmetric=False)),
        ("pack-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=False)),
        ("pack-quantized", dict(num_bits=2, type="int", strategy="group", group_size=128)),
    ),
)
def test_compressed_tensors_as_their_library_decompresses_them(tmp_path, form, weights):
    pytest.importorskip("compressed_tensors", reason="it compresses the weights under test")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    torch.manual_seed(0)
    weight, bits = torch.randn(256, 384), scheme.weights.num_bits
    rows, columns = dict(
        tensor=(256, 384), channel=(1, 384), group=(1, scheme.weights.group_size), block=(128, 128)
    )[scheme.weights.strategy]
    shape = (1,) if scheme.weights.strategy == "tensor" else (256 // rows, 384 // columns)
    state = dict(weight=weight, weight_scale=torch.rand(shape) / 2**bits * 4 + 0.01)
    if not scheme.weights.symmetric:
        span = 2 ** (bits - 1)
        state["weight_zero_point"] = torch.randint(-span, span, shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    config = dict(quant_method="compressed-tensors", format=form)
    config |= dict(config_groups=dict(a=json.loads(scheme.model_dump_json())))
    got, _ = dequantized(tmp_path, config, parts)
    want = compressor.decompress(parts, scheme)["weight"]
    np.testing.assert_array_equal(got, want.numpy(), strict=True)
    assert np.unique(got).size > 3


@pytest.mark.slow
def test_gpt_oss_with_experts_in_mxfp4(tmp_path):
    """A folder as OpenAI publishes it, against transformers' model with dequantized experts."""
    reference = pytest.importorskip("transformers.integrations.mxfp4")
    folder, model = saved("gpt-oss", tmp_path)
    named, rng = safetensors.load_file(folder / WHOLE), torch.Generator().manual_seed(0)
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            stem = f"model.layers.{i}.mlp.experts.{name}"
            count, inputs, outputs = named.pop(stem).shape
            shape = (count, outputs, inputs // 32)
            draw = lambda low, high, *size: torch.randint(
                low, high, size, dtype=torch.uint8, generator=rng
            )
            blocks, scales = draw(0, 256, *shape, 16), draw(121, 125, *shape)
            named[f"{stem}_blocks"], named[f"{stem}_scales"] = blocks, scales
            dense = reference.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            getattr(layer.mlp.experts, name).data = dense
    save_file(named, folder / WHOLE)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = dict(quant_method="mxfp4")
    (folder / "config.json").write_text(json.dumps(described))

    checkpoint = open_checkpoint(folder)
    cfg = checkpoint.config("float32")
    params = checkpoint.load(cfg)
    assert checkpoint.notices(cfg)[0].startswith("stored as MXFP4, 4.25 bits a weight (8 matrices)")
    tokens = np.random.default_rng(1).integers(3, 96, (1, 40))
    want = model(torch.from_numpy(tokens)).logits.detach().numpy()
    caches = caches_for(params, cfg, 1, 40)
    got, _ = forward(params, jnp.asarray(tokens), caches, causal_step(0, 40, 40), cfg)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-4)

    # Offloaded, the experts stay in MXFP4, and the tokens are the same.
    source = find_source(checkpoint, "float32")
    draft = Draft(bits=4, group=32)
    shapes = source.shapes(draft)
    size = mxfp4_bytes((64, 192)) + mxfp4_bytes((96, 64))
    assert {a.shape for a in shapes.layers[0].mlp.expert_gate_up.each} == {(size,)}
    spec = TreeSpec(depth=3, width=2)
    plan = make_plan(cfg, 2**30, spec, draft, max_length=96, chunk=16, model=shapes)
    target = load_target(checkpoint, plan)
    assert target.experts.host[0][0].nbytes == size
    low = make_draft(target.params, draft)
    decoder = Decoder(target, ModelDraft(low, cfg, spec), max_length=96, chunk=16)
    prompt = tokens[0].tolist()
    assert decoder.generate(prompt, 16) == generate(params, prompt, cfg, 16)

    with pytest.raises(ResidualError, match="the experts are stored in MXFP4, "):
        convert(checkpoint, checkpoint.config("bfloat16"), tmp_path / "out", group=32)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", (4, 8))
def test_a_folder_that_transformers_writes(tmp_path, bits):
    """Names, configuration and weights as `save_pretrained` of a quantized model leaves them."""
    transformers = pytest.importorskip("transformers")
    functional = pytest.importorskip("bitsandbytes.functional")
    # Rows of whole blocks: for others, bitsandbytes 0.50 dequantizes wrongly on a CPU.
    cfg = tiny_config("qwen2", d_model=128, d_ff=192, dtype="bfloat16")
    base = write_safetensors(tmp_path / "base", tiny_params(cfg), cfg, tokenizer=False)
    how = dict(load_in_8bit=True)
    if bits == 4:
        how = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    made = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=transformers.BitsAndBytesConfig(**how)
    )
    made.save_pretrained(tmp_path / "quantized")
    found = open_checkpoint(tmp_path / "quantized")
    assert found.config() == cfg
    for got, layer in zip(found.load(cfg).layers, made.model.layers, strict=True):
        for name in ("gate", "up", "down"):
            weight = getattr(layer.mlp, f"{name}_proj").weight
            if bits == 4:
                want = functional.dequantize_4bit(weight.data, weight.quant_state)
            else:
                want = functional.int8_vectorwise_dequant(weight.data, weight.SCB).bfloat16()
            np.testing.assert_array_equal(
                np.asarray(getattr(got.mlp, name)).T.astype(np.float32), want.float().numpy()
            )


@pytest.mark.parametrize("kind", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("storage", ("uint8", "bfloat16"))
def test_bitsandbytes_as_it_dequantizes(tmp_path, kind, nested, storage):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    packed, state = functional.quantize_4bit(
        torch.randn(64, 640),
        quant_type=kind,
        compress_statistics=nested,
        blocksize=64,
        quant_storage=getattr(torch, storage),
    )
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = dict(quant_method="bitsandbytes", load_in_4bit=True)
    got, tensor = dequantized(tmp_path, config, dict(weight=packed) | parts)
    assert tensor.dtype == kind.upper()
    want = functional.dequantize_4bit(packed, state)
    np.testing.assert_array_equal(got, want.numpy(), strict=True)


def test_int8_as_bitsandbytes_dequantizes_it(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight, scale, _ = functional.int8_vectorwise_quant(torch.randn(48, 96).half())
    config = dict(quant_method="bitsandbytes", load_in_8bit=True)
    got, _ = dequantized(tmp_path, config, dict(weight=weight, SCB=scale))
    want = functional.int8_vectorwise_dequant(weight, scale)
    np.testing.assert_array_equal(got, want.float().numpy(), strict=True)
