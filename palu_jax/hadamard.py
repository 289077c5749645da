"""Rotations that spread the energy of a block of latents evenly before it is quantized."""

import numpy as np


def rotation(size: int) -> np.ndarray:
    """An orthogonal [size, size] float64 matrix with entries of nearly equal size.

    It is a Hadamard matrix over sqrt(size) (by the constructions of Sylvester and Paley and their
    products) where these give one, else the Q of a fixed Gaussian matrix. The first row is
    constant. So the first latent, which has most of the energy, adds the same to every rotated
    latent, and a block's offset absorbs it.
    """
    found = _hadamard(size)
    if found is None:
        gaussian = np.random.default_rng(size).normal(size=(size, size))
        gaussian[:, 0] = 1
        q, _ = np.linalg.qr(gaussian)
        return (q * np.sign(q[0, 0])).T
    return found * found[:1] / np.sqrt(size)  # columns with the sign that makes the first row +


def _hadamard(size: int) -> np.ndarray | None:
    """A matrix of ±1 with orthogonal rows; None where these constructions give none."""
    if size in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:size, :size]
    if size % 4:
        return None
    if _is_prime(size - 1):  # Paley I: size - 1 = 3 mod 4
        q = size - 1
        s = np.zeros((size, size))
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
        return s + np.eye(size)
    if (half := _hadamard(size // 2)) is not None:
        return np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)
    if _is_prime(q := size // 2 - 1) and q % 4 == 1:  # Paley II
        s = np.ones((q + 1, q + 1)) - np.eye(q + 1)
        s[1:, 1:] = _jacobsthal(q)
        eye = np.eye(q + 1)
        return np.kron(s, np.array([[1, 1], [1, -1]])) + np.kron(eye, np.array([[1, -1], [-1, -1]]))
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """Entry (i, j) is 1 where i - j is a nonzero square modulo the prime q, 0 at i = j, else -1."""
    squares = {i * i % q for i in range(1, q)}
    row = np.array([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    return row[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
