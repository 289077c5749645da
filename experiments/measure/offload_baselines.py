"""Times Hugging Face transformers on a model that does not fit, with accelerate's CPU offload.

    python -m experiments.measure.offload_baselines --model qwen2.5-7b --memory-limit 8GB --out FILE

`experiments.measure.offload` runs it in a separate process, because torch and JAX would share the
card. Weights are random, so the number of tokens that prompt lookup accepts means nothing. Without
a card torch computes on the CPU, nothing is offloaded, and the record says so.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common.cli import run
from llm_jax import registry
from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.files import atomic_file
from llm_jax.testing import tiny_config
from subspec_jax.memory import UNITS, parse_bytes

PROMPT = 64
"""Tokens of the prompt."""
PURPOSE = "the comparison with Hugging Face transformers"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Time one way to generate."""

    out: Path
    model: str = "qwen2.5-7b"
    memory_limit: str = "8GB"
    lookup: int = 0
    """generate's prompt_lookup_num_tokens; 0: one token after another."""
    tokens: int = 8
    """Tokens of the timed call of generate, the second one."""


def sizes(model: str) -> Config:
    """The config of a registered model, or of the tiny one that tests use."""
    if model == "tiny":
        return tiny_config("qwen2", layers=2)
    return registry.find_model(model).config


def transformers_config(cfg: Config) -> Any:
    """The same architecture as a config of transformers."""
    transformers = need("transformers", "baselines", PURPOSE)
    kinds = dict(qwen2="Qwen2Config", qwen3="Qwen3Config", mistral="MistralConfig")
    kind = getattr(transformers, kinds.get(cfg.family, "LlamaConfig"))
    return kind(
        hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        vocab_size=cfg.vocab, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied,
        max_position_embeddings=4096,
    )  # fmt: skip


def random_model(cfg: Config) -> Any:
    """The model of transformers with random bfloat16 weights in host memory.

    One block of random numbers is repeated, because drawing all of them would take minutes.
    """
    torch = need("torch", "baselines", PURPOSE)
    transformers = need("transformers", "baselines", PURPOSE)
    config = transformers_config(cfg)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    block = (torch.randn(2**16) * cfg.d_model**-0.5).to(torch.bfloat16)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        whole = flat.numel() // block.numel() * block.numel()
        flat[:whole].view(-1, block.numel()).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its table was not among the parameters
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def resident_layers(cfg: Config, limit: int) -> int:
    """How many layers fit within `limit` bytes beside tables, a streamed layer and work space."""
    layer = 2 * (cfg.layer_matrix_elements + cfg.layer_vector_elements)
    tables = 2 * cfg.vocab * cfg.d_model * (1 if cfg.tied else 2)
    free = limit - tables - 2 * layer - 600 * UNITS["MB"]
    return max(0, min(cfg.layers, free // layer))


def dispatch(model: Any, cfg: Config, limit: int) -> int:
    """Spreads the model over card and host with accelerate; returns how many layers stay."""
    torch = need("torch", "baselines", PURPOSE)
    accelerate = need("accelerate", "baselines", PURPOSE)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), 0)
    resident = resident_layers(cfg, limit)
    where = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    where |= {f"model.layers.{i}": 0 if i < resident else "cpu" for i in range(cfg.layers)}
    accelerate.dispatch_model(model, where, main_device=0)
    return resident


def main(args: Baseline, console: Console) -> dict[str, Any]:
    torch = need("torch", "baselines", PURPOSE)
    transformers = need("transformers", "baselines", PURPOSE)
    cfg, limit = sizes(args.model), parse_bytes(args.memory_limit)
    on_card = torch.cuda.is_available()
    model = random_model(cfg)
    resident = dispatch(model, cfg, limit) if on_card else cfg.layers
    prompt = torch.randint(0, cfg.vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to("cuda:0" if on_card else "cpu")
    options = dict(do_sample=False, prompt_lookup_num_tokens=args.lookup or None)

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            mask = torch.ones_like(prompt)
            found = model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, **options)
        if on_card:
            torch.cuda.synchronize()
        assert found.shape[1] == PROMPT + tokens
        return time.perf_counter() - began

    seconds(1)
    took = seconds(args.tokens)  # the prompt's pass streams as much as any other, so it counts
    layer = 2 * cfg.layer_matrix_elements
    record = {
        "tokens_per_s": args.tokens / took,
        "tokens": args.tokens,
        "resident": resident,
        "streamed_bytes": (cfg.layers - resident) * layer,
        "peak_bytes": torch.cuda.max_memory_reserved() if on_card else None,
        "device": torch.cuda.get_device_name(0) if on_card else "cpu",
        "note": "random weights" + ("" if on_card else "; on a CPU, nothing is offloaded"),
        "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with atomic_file(args.out) as scratch:
        scratch.write_text(json.dumps(record))
    console.print(record)
    return record


def cli(words: Sequence[str] | None = None) -> int:
    return run(Baseline, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
