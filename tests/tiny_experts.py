"""Tiny checkpoints with experts, tensor by tensor as Hugging Face names them."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from llm_jax.testing import tiny_tokenizer

D, HEADS, KV, HEAD, WIDE, NARROW, SHARED, EXPERTS, VOCAB = 64, 4, 2, 16, 128, 32, 48, 6, 288
BLOCK = dict(qwen2_moe="mlp", qwen3_moe="mlp", mixtral="block_sparse_moe")
THREE = {  # gate, up, down of an expert
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
}
MORE = {
    "qwen2_moe": dict(
        moe_intermediate_size=NARROW, num_experts=EXPERTS, shared_expert_intermediate_size=SHARED
    ),
    "qwen3_moe": dict(moe_intermediate_size=NARROW, num_experts=EXPERTS, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=EXPERTS, sliding_window=None),
}


def tensors(family, layers, dense, seed=0, dtype=ml_dtypes.bfloat16):
    """name -> tensor, matrices [out, in]. Each expert has its own distribution of weights."""
    rng, found = np.random.default_rng(seed), {}

    def put(name, *shape, size=1.0, around=0.0, tails=1e9):
        scale = size * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
        found[name] = (around + scale * rng.standard_t(tails, shape)).astype(dtype)

    put("model.embed_tokens.weight", VOCAB, D, size=8.0)
    put("model.norm.weight", D, around=1.0)
    put("lm_head.weight", VOCAB, D)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{at}.{norm}.weight", D, around=1.0)
        for name, out in (("q", HEADS * HEAD), ("k", KV * HEAD), ("v", KV * HEAD)):
            put(f"{at}.self_attn.{name}_proj.weight", out, D)
            if family == "qwen2_moe":
                put(f"{at}.self_attn.{name}_proj.bias", out)
            if family == "qwen3_moe" and name != "v":
                put(f"{at}.self_attn.{name}_norm.weight", HEAD, around=1.0)
        put(f"{at}.self_attn.o_proj.weight", D, HEADS * HEAD)
        at = f"{at}.{BLOCK[family]}"
        if layer in dense:
            for name in ("gate", "up"):
                put(f"{at}.{name}_proj.weight", WIDE, D)
            put(f"{at}.down_proj.weight", D, WIDE)
            continue
        put(f"{at}.gate.weight", EXPERTS, D, size=3.0)
        width = WIDE if family == "mixtral" else NARROW
        for expert in range(EXPERTS):
            for name, shape in zip(THREE[family], ((width, D), (width, D), (D, width))):
                put(f"{at}.experts.{expert}.{name}.weight", *shape, tails=3 + 3 * expert)
        last = (
            f"{at}.experts.{EXPERTS - 1}."  # its weights have few values, so its residual is short
        )
        for name in [name for name in found if name.startswith(last)]:
            found[name] = np.sign(found[name].astype(np.float32)).astype(dtype) * dtype(0.1)
        if family == "qwen2_moe":
            for name in ("gate", "up"):
                put(f"{at}.shared_expert.{name}_proj.weight", SHARED, D)
            put(f"{at}.shared_expert.down_proj.weight", D, SHARED)
            put(f"{at}.shared_expert_gate.weight", 1, D)
    return found


def write(folder, family="qwen3_moe", layers=3, dense=(1,), seed=0, dtype=ml_dtypes.bfloat16):
    """(the folder, its tensors): a model of which the layers `dense` have no experts."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        model_type=family, num_hidden_layers=layers, hidden_size=D, num_attention_heads=HEADS,
        num_key_value_heads=KV, head_dim=HEAD, intermediate_size=WIDE, vocab_size=VOCAB,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=512,
        num_experts_per_tok=2, tie_word_embeddings=False, torch_dtype=np.dtype(dtype).name,
        bos_token_id=None, eos_token_id=258,
    )  # fmt: skip
    if family != "mixtral":
        config["mlp_only_layers"] = list(dense)
    (folder / "config.json").write_text(json.dumps(config | MORE[family]))
    found = tensors(family, layers, dense, seed, dtype)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    return folder, found


def matrices(found, family, layer, expert):
    """(gate_up [D, 2F], down [F, D]) of an expert, from the tensors of the file."""
    at = f"model.layers.{layer}.{BLOCK[family]}.experts.{expert}"
    gate, up, down = (found[f"{at}.{name}.weight"].T for name in THREE[family])
    return np.concatenate([gate, up], axis=1), down
