"""A model with several memories, for tests of several callers."""

import pytest

from knnmoe_hf import attach_memory, set_memory
from tests.models.callers import NAMES
from tests.support.models import random_memory, tiny_model


@pytest.fixture
def shared():
    """A model with three memories, of which the first is the default."""
    model = tiny_model("olmoe")
    for seed, name in enumerate(NAMES):
        attach_memory(model, random_memory(model, seed=seed + 1), name)
    set_memory(model, "law")
    return model
