"""The transforms for models that are not `llm_jax`'s: Flax NNX, Flax Linen, plain pytrees."""
