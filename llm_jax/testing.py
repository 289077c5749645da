"""Tiny models on disk for hermetic tests: a checkpoint folder, a GGUF file, and a tokenizer."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.attention import rope_frequencies
from llm_jax.checkpoint import table_shapes
from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.folder import INDEX, SafetensorsFolder
from llm_jax.gguf import GGUF
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.params import Params, abstract, named_parameters
from llm_jax.rope import Llama3Rope

TINY_FAMILIES: dict[str, dict[str, Any]] = {
    # name -> what it changes in the tiny model
    "llama": dict(family="llama", rope_theta=10_000.0),
    "llama3": dict(
        family="llama",
        rope_theta=500_000.0,
        rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
        head_dim=32,
    ),
    "mistral": dict(family="mistral", kv_heads=1),
    "qwen2": dict(family="qwen2", qkv_bias=True, norm_eps=1e-6),
    "qwen3": dict(family="qwen3", qk_norm=True, norm_eps=1e-6, head_dim=32),
}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(family: str = "qwen2", **changes: Any) -> Config:
    """A small float32 model of a family in `TINY_FAMILIES`; sizes are multiples of a GGUF block."""
    base = dict(
        layers=2,
        d_model=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        d_ff=96,
        vocab=288,
        rope_theta=1_000_000.0,
        max_length=512,
        dtype="float32",
    )
    return Config(**(base | TINY_FAMILIES[family] | changes))


def tiny_params(cfg: Config, seed: int = 0) -> Params:
    """Random parameters without any 0 or 1, so that a test sees a forgotten bias or norm."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.ndim > 1:
            value = rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape)
        else:
            value = ("norm" in path[-1].name) + rng.normal(0, 1 / 8, leaf.shape)
        return jax.device_put(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, abstract(cfg))


def tensors(params: Params, cfg: Config, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Every tensor of a model without experts by its name in a format, matrices [out, in]."""
    out = {names[field]: np.asarray(getattr(params, field)) for field in table_shapes(cfg)}
    for index, layer in enumerate(params.layers):
        for field, value in named_parameters(layer).items():
            out[names[field].format(index)] = np.asarray(value)
    keep = names["embed_VD"]
    return {k: np.ascontiguousarray(v if k == keep else v.T) for k, v in out.items()}


def hf_config(cfg: Config) -> dict[str, Any]:
    """The config.json of a model."""
    out = dict(
        model_type=cfg.family,
        architectures=[f"{cfg.family.capitalize()}ForCausalLM"],
        num_hidden_layers=cfg.layers,
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.d_ff,
        vocab_size=cfg.vocab,
        hidden_act="silu",
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta,
        tie_word_embeddings=cfg.tied,
        max_position_embeddings=cfg.max_length,
        torch_dtype=cfg.dtype,
        bos_token_id=None,
        eos_token_id=258,
    )
    if cfg.rope_scaling is not None:
        scaling = dataclasses.asdict(cfg.rope_scaling)
        length = scaling.pop("original_max_length")
        out["rope_scaling"] = dict(
            rope_type="llama3", original_max_position_embeddings=length, **scaling
        )
    return out


def tiny_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE: 256 bytes, three special tokens, then merges.

    `size` below 260 leaves merges out, and below 259 the last bytes.
    """
    pre_tokenizers = need("tokenizers", "models", "a tiny tokenizer").pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (
        (alphabet + list(SPECIAL))[:size] if size >= 259 else alphabet[: size - 3] + list(SPECIAL)
    )
    merges = []
    words = "Ġt he in er an Ġthe Ġa on re Ġs Ġan Ġin ing Ġand at en ed or it is es al ar"
    for word in words.split():
        for at in range(1, len(word)):
            if len(tokens) < size and word[:at] in tokens and word[at:] in tokens:
                merges.append(f"{word[:at]} {word[at:]}")
                tokens.append(word)
                break
    return tokens, merges


def tiny_tokenizer(size: int) -> Any:
    """A `transformers` tokenizer over `tiny_vocabulary`, with a chat template."""
    return from_metadata(_tokenizer_metadata(size), Path("tiny")).hf


def _tokenizer_metadata(size: int) -> dict[str, Any]:
    tokens, merges = tiny_vocabulary(size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_safetensors(
    folder: str | Path, params: Params, cfg: Config, shards: int = 1, tokenizer: bool = True
) -> Path:
    """The folder, filled as a Hugging Face repository: config, weights, tokenizer."""
    save_file = need("safetensors.numpy", "models", "writing safetensors files").save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(cfg)))
    named = tensors(params, cfg, SafetensorsFolder.names)
    if shards == 1:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {name: i * shards // len(named) + 1 for i, name in enumerate(named)}
        files = {i: f"model-{i:05}-of-{shards:05}.safetensors" for i in where.values()}
        for i, file in files.items():
            part = {name: named[name] for name in named if where[name] == i}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = dict(metadata={}, weight_map={name: files[i] for name, i in where.items()})
        (folder / INDEX).write_text(json.dumps(index))
    if tokenizer:
        tiny_tokenizer(cfg.vocab).save_pretrained(folder)
        eos = tiny_vocabulary(cfg.vocab)[0].index("<|endoftext|>")
        (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[eos])))
    return folder


def write_gguf(
    path: str | Path, params: Params, cfg: Config, quant: str = "F32", split: int = 0
) -> Path:
    """A GGUF file whose matrices are in `quant` (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0).

    With `split`, parts of so many tensors each; the path of the first one comes back.
    """
    gguf = need("gguf", "models", "writing a GGUF file")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arch = "llama" if cfg.family == "mistral" else cfg.family
    kind = gguf.GGMLQuantizationType[quant]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(cfg.layers)
    writer.add_context_length(cfg.max_length)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    for key, value in _tokenizer_metadata(cfg.vocab).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    if cfg.rope_scaling is not None:
        plain = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", plain / rope_frequencies(cfg))
    for name, value in tensors(params, cfg, GGUF.names).items():
        value = value.astype(np.float32)
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # rows of a head, halves [a b] of four: 0 1 2 3 -> 0 2 1 3, so that pairs are neighbours
            heads = value.reshape(-1, 2, cfg.head_dim // 2, cfg.d_model)
            value = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(value.shape)
        if value.ndim > 1 and quant != "F32":
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"), default=path) if split else path
