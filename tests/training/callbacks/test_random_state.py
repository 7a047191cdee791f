import random

import numpy as np
import torch

from performer_lm.training.callbacks.random_state import capture, restore


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_what_follows_a_restored_state_is_what_followed_it_before() -> None:
    draw()
    np.random.randn()  # leaves a second normal cached
    state = capture(torch.device("cpu"))
    after = draw()
    draw()
    restore(state, torch.device("cpu"))
    assert draw() == after
