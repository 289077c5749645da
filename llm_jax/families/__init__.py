"""The families of models, one short file each; `Family` says what a family is."""

from llm_jax.families import gemma, gpt_oss, granite, llama, mixtral, olmo, phi, qwen_moe, smollm
from llm_jax.families.family import GGUF_NAMES, Family

_FILES = (llama, gemma, phi, olmo, granite, smollm, qwen_moe, mixtral, gpt_oss)
FAMILIES: dict[str, Family] = {f.model_type: f for file in _FILES for f in file.FAMILIES}
"""Every family, by its `model_type`."""

__all__ = ["FAMILIES", "GGUF_NAMES", "Family"]
