"""Philox-4x32-10 and normal numbers from it, as `torch.randn` draws them on CUDA (Salmon et al. 2011; curand)."""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four random words for each counter of four words, lowest first (Salmon et al. 2011, Section 3.3)."""
    a, b, c, d = (word.astype(np.uint64) for word in counter)
    for turn in range(ROUNDS):
        first, second = (np.uint64((key[i] + turn * WEYL[i]) & 0xFFFFFFFF) for i in (0, 1))
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (right >> HALF) ^ b ^ first, right & LOW, (left >> HALF) ^ d ^ second, left & LOW
    return a.astype(np.uint32), b.astype(np.uint32), c.astype(np.uint32), d.astype(np.uint32)


def box_muller(first: Words, second: Words) -> NDArray[np.float64]:
    """One normal number from two words: √(−2 ln u) sin v with u in (0, 1) and v in (0, 2π) (curand_normal.h)."""
    u = (first.astype(np.float64) + 0.5) * 2.0**-32
    v = (second.astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-32)
    return np.asarray(np.sqrt(-2.0 * np.log(u)) * np.sin(v))


def randn(seed: int, call: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What the `call`-th `torch.randn(shape)` after `torch.manual_seed(seed)` gives on CUDA, to single precision.

    Number i is the first normal of subsequence i, one thread to a number. So it is for a latent of Stable Diffusion's
    sizes; from some hundred thousand numbers on, as many as the GPU has threads at once, CUDA has another order.
    """
    count = int(np.prod(shape))
    index, zero = np.arange(count, dtype=np.uint32), np.zeros(count, dtype=np.uint32)
    first, second, _, _ = philox((zero + np.uint32(call), zero, index, zero), (seed & 0xFFFFFFFF, seed >> 32))
    return box_muller(first, second).astype(np.float32).reshape(shape)
