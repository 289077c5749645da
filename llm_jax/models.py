"""The models that can be asked for by name: two tables of sizes."""

import dataclasses

from llm_jax.config import Config
from llm_jax.hf_config import from_hf
from llm_jax.rope import Llama3Rope


@dataclasses.dataclass(frozen=True)
class RegisteredModel:
    """A model that can be asked for by name."""

    name: str
    repo: str
    """Its repository on the Hugging Face Hub."""
    config: Config
    """Its sizes, so that random weights of the right shape need no files."""
    note: str = ""
    revision: str | None = None
    """The commit to be fetched; None is the newest, and the one that was found is reported."""


_QWEN2 = dict(
    family="qwen2", qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_length=32_768, vocab=151_936
)
_QWEN3 = dict(
    family="qwen3", qk_norm=True, rope_theta=1e6, norm_eps=1e-6, max_length=40_960, vocab=151_936
)
_LLAMA3 = dict(rope_theta=5e5, max_length=131_072, vocab=128_256)
_SMOLLM2 = dict(rope_theta=1e5, max_length=8_192, vocab=49_152, tied=True)


def _models():
    """Rows: name, repo, layers, D, F, heads, kv heads, head size, and what else differs."""

    def model(
        name, repo, layers, d, f, heads, kv_heads, head_dim, *same,
        note="", revision=None, **changes,
    ):  # fmt: skip
        sizes = dict(layers=layers, d_model=d, d_ff=f, heads=heads, kv_heads=kv_heads)
        rest = {k: v for group in (*same, changes) for k, v in group.items()}
        cfg = Config(**sizes, head_dim=head_dim, **rest)
        return RegisteredModel(name, repo, cfg, note, revision)

    tied, big = dict(tied=True), dict(vocab=152_064)
    llama31 = dict(rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
    llama32 = dict(rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192), tied=True)
    licence = "the licence must be accepted on the Hub first"
    qwen25, coder = "Qwen/Qwen2.5-{}-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    llama, smol = "meta-llama/Llama-{}-Instruct", "HuggingFaceTB/SmolLM2-{}-Instruct"
    # fmt: off
    return (
        model("qwen2.5-0.5b", qwen25.format("0.5B"), 24, 896, 4864, 14, 2, 64, _QWEN2, tied),
        model("qwen2.5-1.5b", qwen25.format("1.5B"), 28, 1536, 8960, 12, 2, 128, _QWEN2, tied),
        model("qwen2.5-3b", qwen25.format("3B"), 36, 2048, 11_008, 16, 2, 128, _QWEN2, tied),
        model("qwen2.5-7b", qwen25.format("7B"), 28, 3584, 18_944, 28, 4, 128, _QWEN2, big),
        model("qwen2.5-14b", qwen25.format("14B"), 48, 5120, 13_824, 40, 8, 128, _QWEN2, big),
        model("qwen2.5-32b", qwen25.format("32B"), 64, 5120, 27_648, 40, 8, 128, _QWEN2, big),
        model("qwen2.5-72b", qwen25.format("72B"), 80, 8192, 29_568, 64, 8, 128, _QWEN2, big),
        model("qwen2.5-coder-0.5b", coder, 24, 896, 4864, 14, 2, 64, _QWEN2, tied),
        model("qwen3-0.6b", "Qwen/Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, _QWEN3, tied),
        model("qwen3-1.7b", "Qwen/Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, _QWEN3, tied),
        model("qwen3-4b", "Qwen/Qwen3-4B", 36, 2560, 9728, 32, 8, 128, _QWEN3, tied),
        model("qwen3-8b", "Qwen/Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, _QWEN3),
        model("qwen3-14b", "Qwen/Qwen3-14B", 40, 5120, 17_408, 40, 8, 128, _QWEN3),
        model("qwen3-32b", "Qwen/Qwen3-32B", 64, 5120, 25_600, 64, 8, 128, _QWEN3),
        model("llama-3.1-8b", llama.format("3.1-8B"), 32, 4096, 14_336, 32, 8, 128, _LLAMA3,
              llama31, note=licence),
        model("llama-3.2-1b", llama.format("3.2-1B"), 16, 2048, 8192, 32, 8, 64, _LLAMA3,
              llama32, note=licence),
        model("llama-3.2-3b", llama.format("3.2-3B"), 28, 3072, 8192, 24, 8, 128, _LLAMA3,
              llama32, note=licence),
        model("llama-2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, 11_008, 32, 32, 128, note=licence,
              vocab=32_000, max_length=4096),
        model("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", 32, 4096, 14_336, 32, 8, 128,
              family="mistral", rope_theta=1e6, vocab=32_768, max_length=32_768),
        model("smollm2-135m", smol.format("135M"), 30, 576, 1536, 9, 3, 64, _SMOLLM2,
              note="needs no Hub: also on PyPI, in 4 bits"),
        model("smollm2-360m", smol.format("360M"), 32, 960, 2560, 15, 5, 64, _SMOLLM2),
        model("smollm2-1.7b", smol.format("1.7B"), 24, 2048, 8192, 32, 32, 64, _SMOLLM2,
              dict(rope_theta=130_000.0)),
    )
    # fmt: on


def _more_models():
    """Rows of families whose description is translated from config.json's own words: name, repo,
    model_type, layers, D, F, heads, kv heads, head size, vocabulary, length, and what else it says.
    """

    def model(name, repo, kind, layers, d, f, heads, kv_heads, head_dim, vocab, length, **hf):
        note = hf.pop("note", "")
        sizes = dict(
            num_hidden_layers=layers, hidden_size=d, intermediate_size=f, head_dim=head_dim
        )
        sizes |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab)
        said = dict(model_type=kind, max_position_embeddings=length, **sizes, **hf)
        return RegisteredModel(name, repo, from_hf(said, "bfloat16"), note)

    licence = dict(note="the licence must be accepted on the Hub first")
    gemma3, gemma2 = "google/gemma-3-{}-it", "google/gemma-2-{}-it"
    linear = dict(rope_scaling=dict(rope_type="linear", factor=8.0))
    long = 131_072
    qwen_moe = dict(rope_theta=1e6, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
    yarn = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=4096)  # fmt: skip
    oss = dict(rope_scaling=yarn, rope_theta=150_000.0, num_experts_per_tok=4, layer_types=None)
    turns = lambda n: ["sliding_attention", "full_attention"] * (n // 2)
    tied = dict(tie_word_embeddings=True)
    mixtral = dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6)
    granite = dict(embedding_multiplier=12.0, attention_multiplier=0.0078125, rope_theta=1e7,
                   residual_multiplier=0.22, logits_scaling=16.0, rms_norm_eps=1e-5)  # fmt: skip
    # fmt: off
    return (
        model("gemma-3-270m", gemma3.format("270m"), "gemma3_text", 18, 640, 2048, 4, 1, 256,
              262_144, 32_768, sliding_window=512, **licence),
        model("gemma-3-1b", gemma3.format("1b"), "gemma3_text", 26, 1152, 6912, 4, 1, 256,
              262_144, 32_768, sliding_window=512, **licence),
        model("gemma-3-4b", gemma3.format("4b"), "gemma3_text", 34, 2560, 10_240, 8, 4, 256,
              262_208, long, sliding_window=1024, **linear, **licence),
        model("gemma-3-12b", gemma3.format("12b"), "gemma3_text", 48, 3840, 15_360, 16, 8, 256,
              262_208, long, sliding_window=1024, **linear, **licence),
        model("gemma-3-27b", gemma3.format("27b"), "gemma3_text", 62, 5376, 21_504, 32, 16, 128,
              262_208, long, sliding_window=1024, query_pre_attn_scalar=168, **linear, **licence),
        model("gemma-2-2b", gemma2.format("2b"), "gemma2", 26, 2304, 9216, 8, 4, 256, 256_000, 8192,
              **licence),
        model("gemma-2-9b", gemma2.format("9b"), "gemma2", 42, 3584, 14_336, 16, 8, 256, 256_000,
              8192, **licence),
        model("gemma-2-27b", gemma2.format("27b"), "gemma2", 46, 4608, 36_864, 32, 16, 128, 256_000,
              8192, query_pre_attn_scalar=144, **licence),
        model("phi-4", "microsoft/phi-4", "phi3", 40, 5120, 17_920, 40, 10, 128, 100_352, 16_384,
              rope_theta=250_000.0),
        model("olmo-2-7b", "allenai/OLMo-2-1124-7B-Instruct", "olmo2", 32, 4096, 11_008, 32, 32,
              128, 100_352, 4096, rope_theta=5e5, rms_norm_eps=1e-6),
        model("olmo-2-13b", "allenai/OLMo-2-1124-13B-Instruct", "olmo2", 40, 5120, 13_824, 40, 40,
              128, 100_352, 4096, rope_theta=5e5, rms_norm_eps=1e-6),
        model("olmoe-7b-a1b", "allenai/OLMoE-1B-7B-0125-Instruct", "olmoe", 16, 2048, 1024, 16, 16,
              128, 50_304, 4096),
        model("granite-3.3-8b", "ibm-granite/granite-3.3-8b-instruct", "granite", 40, 4096, 12_800,
              32, 8, 128, 49_159, long, **tied, **granite),
        model("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "smollm3", 36, 2048, 11_008, 16, 4, 128,
              128_256, 65_536, rope_theta=5e6, rms_norm_eps=1e-6, **tied),
        model("mistral-small-24b", "mistralai/Mistral-Small-24B-Instruct-2501", "mistral", 40, 5120,
              32_768, 32, 8, 128, 131_072, 32_768, rope_theta=1e8, rms_norm_eps=1e-5,
              sliding_window=None),
        model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 6144, 32, 4, 128,
              151_936, 40_960, moe_intermediate_size=768, **qwen_moe),
        model("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", "qwen3_moe", 94, 4096, 12_288, 64, 4, 128,
              151_936, 40_960, moe_intermediate_size=1536, **qwen_moe),
        model("mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral", 32, 4096, 14_336,
              32, 8, 128, 32_000, 32_768, sliding_window=None, **mixtral),
        model("gpt-oss-20b", "openai/gpt-oss-20b", "gpt_oss", 24, 2880, 2880, 64, 8, 64, 201_088,
              long, num_local_experts=32, **oss | dict(layer_types=turns(24))),
        model("gpt-oss-120b", "openai/gpt-oss-120b", "gpt_oss", 36, 2880, 2880, 64, 8, 64, 201_088,
              long, num_local_experts=128, **oss | dict(layer_types=turns(36))),
    )
    # fmt: on


MODELS: dict[str, RegisteredModel] = {m.name: m for m in (*_models(), *_more_models())}
"""Every model, by its name."""
