"""GPU kernels behind plain functions: each has a jnp reference, which is its specification."""
