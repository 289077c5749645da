"""Tiny random checkpoints of every family, saved by `transformers` itself."""

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MOE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
HALVES = ["sliding_attention", "full_attention"] * 2
YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=10_000.0,
    beta_fast=32.0, beta_slow=1.0,
)  # fmt: skip
LONG = dict(
    rope_type="longrope", rope_theta=10_000.0, original_max_position_embeddings=128,
    short_factor=[1.0 + i / 10 for i in range(6)], long_factor=[2.0 + i for i in range(6)],
    partial_rotary_factor=0.75,
)  # fmt: skip
CASES = {
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": (
        "llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    ),
    "llama-yarn": ("llama", dict(rope_parameters=YARN)),
    "llama-dynamic": (
        "llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    ),
    "mistral-window": ("mistral", dict(sliding_window=16, head_dim=16)),
    "mistral-small": ("mistral", dict(sliding_window=None, head_dim=32)),
    "qwen2-window": (
        "qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=2),
    ),
    "qwen3-window": ("qwen3", dict(use_sliding_window=True, sliding_window=16, head_dim=16,
                                   max_window_layers=1)),
    "gemma": ("gemma", dict(head_dim=32)),
    "gemma2": ("gemma2", dict(head_dim=32, sliding_window=16, query_pre_attn_scalar=24,
                              attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", dict(head_dim=32, sliding_window=16, query_pre_attn_scalar=24,
                                   layer_types=HALVES)),
    "gemma3-linear": ("gemma3_text", dict(
        head_dim=32, sliding_window=16, layer_types=HALVES,
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        ))),
    "phi3": ("phi3", dict(sliding_window=16)),
    "phi4-mini": ("phi3", dict(rope_parameters=LONG, tie_word_embeddings=True)),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", dict(sliding_window=16, layer_types=HALVES)),
    "granite": ("granite", dict(embedding_multiplier=12.0, logits_scaling=8.0,
                                residual_multiplier=0.22, attention_multiplier=0.1)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 1, 0, 1])),
    "qwen2-moe": ("qwen2_moe", MOE | dict(
        shared_expert_intermediate_size=48, decoder_sparse_step=2)),
    "qwen2-moe-window": ("qwen2_moe", MOE | dict(
        shared_expert_intermediate_size=48, use_sliding_window=True, sliding_window=16,
        max_window_layers=3)),
    "qwen3-moe": ("qwen3_moe", MOE | dict(head_dim=16, norm_topk_prob=True)),
    "qwen3-moe-mixed": ("qwen3_moe", MOE | dict(
        head_dim=16, norm_topk_prob=False, mlp_only_layers=[1])),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=2)),
    "mixtral": ("mixtral", dict(num_local_experts=4, sliding_window=16)),
    "gpt-oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                                head_dim=16, layer_types=HALVES, rope_parameters=YARN)),
}  # fmt: skip
"""Name -> (model_type, what its config says)."""
METHODS = (
    "vanilla", "subspec", "chain", "best-first", "ngram", "subspec-post", "subspec-lookup",
    "subspec-own-cache", "subspec-unshared-layers",
)  # fmt: skip
"""The lossless methods that every case is decoded with."""
RESIDUAL = ("llama-biases", "gemma2", "gemma3", "phi4-mini", "olmo2", "granite", "smollm3")
"""Cases whose residuals are streamed, too."""
RESIDUAL_EXPERTS = (
    "qwen2-moe", "qwen2-moe-window", "qwen3-moe", "qwen3-moe-mixed", "olmoe", "mixtral", "gpt-oss",
)  # fmt: skip
"""The same, of those with experts."""
T = 40
"""Tokens of a prompt: more than every window, and behind yarn's original length."""


def saved(name, folder):
    """A random model of the family, saved by transformers: (folder, its torch model)."""
    import pytest  # not above: docs/make_families.py reads the tables

    torch = pytest.importorskip("torch", reason="pip install -e '.[reference]'")
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = CASES[name]
    cfg = AutoConfig.for_model(kind, **(SIZES | changes))
    cfg._attn_implementation = "eager"
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(cfg).eval().to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # no 0 and no 1, so that nothing forgotten goes unseen
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return folder, model
