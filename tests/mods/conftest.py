"""Plain Python's random numbers, several rounds of them, from the seed of the test."""

import random

import pytest
import torch


@pytest.fixture(params=range(3))
def rng(request, seed):
    torch.manual_seed(seed + request.param)
    return random.Random(seed + request.param)
