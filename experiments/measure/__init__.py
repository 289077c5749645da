"""Benchmarks of single parts: kernels, products, a draft step, transfers, trees."""
