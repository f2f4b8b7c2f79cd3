"""Randomness as a function of what it is for, never as a state that has to be saved and restored."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part of the key, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed what augmentations draw from, Python's, NumPy's and PyTorch's CPU generators, and restore them after."""
    seed = derive_seed(*key)
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])
