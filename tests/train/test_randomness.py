import random

import numpy as np
import torch

from grkan.train.randomness import derive_seed, seeded


def _draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002


def test_the_same_key_gives_the_same_draws_and_another_key_others():
    with seeded("augmentation", 0, 1, 2):
        first = _draws()
    with seeded("augmentation", 0, 1, 2):
        again = _draws()
    with seeded("augmentation", 0, 2, 1):
        other = _draws()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_generators_go_on_as_if_nothing_had_been():
    def two(between):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        _draws()
        between()
        return _draws()

    def inside():
        with seeded("x"):
            _draws()

    assert two(inside) == two(lambda: None)


def test_seeds_are_the_same_in_every_process():
    assert derive_seed("order", 0, 1) == 5464234415807774710
    assert 0 <= derive_seed("x") < 2**63
