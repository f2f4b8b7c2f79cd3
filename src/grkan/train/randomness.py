"""Randomness as a function of its purpose, without any state to save and restore."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on every part of the key. It is the same on every machine and process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed the generators that augmentations use (Python's, NumPy's, PyTorch's on the CPU), and restore them after."""
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
